"""What the verbs print when all is well: data on stdout, progress on stderr, JSON that parses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import vlmcut
from PIL import Image

SMALL = ("--images", "2", "--text-tokens", "24", "--new-tokens", "20")
VERBS = ("convert", "inspect", "cut", "verify", "run", "bench", "overlay", "build", "lint", "passes")


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from vlmcut import cli; sys.argv = ['vlmcut', '--help']\n"
        "try: cli.main()\n"
        "except SystemExit as stop: assert not stop.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'onnxruntime', 'onnx'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    for verb in VERBS:
        assert verb in done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_help_fits_one_screen(verb: str, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    result = run(verb, "--help")
    assert result.code == 0 and result.err == ""
    assert len(result.out.splitlines()) <= 50


def test_dry_run_writes_nothing(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("convert", "tiny:llava", "--prune", "0.7", *SMALL, "--dry-run")
    assert result.code == 0 and "5 kept by fastervlm" in result.out and "54 cache rows" in result.out
    as_json = run("convert", "tiny:llava", "--prune", "0.7", *SMALL, "--dry-run", "--json")
    assert json.loads(as_json.out) == vlmcut.inspect("tiny:llava", prune=0.7, images=2, text_tokens=24, new_tokens=20)
    assert list(tmp_path.iterdir()) == []


def test_inspect(run: Any) -> None:
    text = run("inspect", "tiny:llava-siglip-qwen2", "--keep", "4,8")
    assert text.code == 0 and text.err == ""
    assert "4/8 kept by fastervlm" in text.out and "applies" in text.out and "prune-tokens divprune" in text.out
    assert json.loads(run("inspect", "tiny:llava", "--json").out)["before"]["anatomy"]["family"] == "llava"


def test_passes(run: Any) -> None:
    data = json.loads(run("passes", "--json").out)
    text = run("passes").out
    for kind in ("passes", "methods"):
        for name, row in data[kind].items():
            assert name in text and row["summary"] in text and row["source"] in text


def test_cut_and_reload(run: Any, tmp_path: Path) -> None:
    out = tmp_path / "cut"
    assert run("cut", "tiny:llava", "--prune", "0.7", "-o", out).out.splitlines()[-1] == str(out)
    assert vlmcut.load(out).recipe[-1] == {"name": "prune-tokens", "keep": 5, "method": "fastervlm", "seed": 0}


@pytest.mark.parametrize("against", [(), ("--against", "tiny:llava", "--seed", "5")])
def test_verify(against: tuple[str, ...], run: Any, bundle: Path) -> None:
    text = run("verify", bundle, *against)
    assert text.code == 0 and "FAIL" not in text.out
    assert len(text.out.splitlines()) == (9 if against else 8)
    data = json.loads(run("verify", bundle, *against, "--json").out)
    assert data["ok"] is True and all(row["ok"] for row in data["rows"])


def test_verify_json_of_a_bad_bundle(run: Any, bundle: Path, copied: Any) -> None:
    """Machines get every row even when it fails, and the exit code."""
    folder = copied(bundle)
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    data["exactness"]["rows"][0]["tolerance"] = 0.0
    path.write_text(json.dumps(data))
    result = run("verify", folder, "--json")
    assert result.code == 1 and "error: 1 of 8 rows" in result.err
    found = json.loads(result.out)
    assert found["ok"] is False and [row["ok"] for row in found["rows"]] == [False] + [True] * 7


def test_run_streams_the_answer(run: Any, bundle: Path, picture: Path) -> None:
    result = run("run", bundle, "-i", picture, "-i", picture, "-p", "left <image> right", "--max-new-tokens", "5")
    assert result.code == 0 and result.err == ""
    assert result.out.strip() == vlmcut.Bundle(bundle).generate([picture] * 2, "left <image> right", 5)


def test_bench_of_two(run: Any, bundle: Path, bundle_int8: Path) -> None:
    args = ("bench", bundle, "--vs", bundle_int8, "--runs", "2", "--decode-tokens", "2")
    text = run(*args).out.splitlines()
    assert len(text) == 4 and text[-1].startswith("ratio to the other: vision_ms ")
    data = json.loads(run(*args, "--json").out)
    assert list(data) == [str(bundle), str(bundle_int8)]
    assert data[str(bundle)]["prompt_tokens"] == 34 and data[str(bundle_int8)]["prompt_tokens"] == 29
    keep = json.loads(run("bench", bundle_int8, "--keep", "16", "--runs", "1", "--json").out)
    assert keep[str(bundle_int8)]["prompt_tokens"] == 40


def test_overlay(run: Any, bundle: Path, picture: Path) -> None:
    out = picture.parent / "new" / "drawing.png"
    result = run("overlay", bundle, "-i", picture, "-o", out)
    assert result.code == 0 and result.out.endswith("5 of 16 tokens kept\n")
    with Image.open(out) as drawing:
        assert (drawing.format, drawing.size) == ("PNG", (480, 480))
    assert [p.name for p in out.parent.iterdir()] == ["drawing.png"]


def test_progress_goes_to_stderr(run: Any, bundle: Path) -> None:
    result = run("verify", bundle, "--json")
    assert "…" in result.err and "…" not in result.out


def test_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vlmcut", "nonsense"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 2 and "Error: " in done.stderr and done.stdout == ""
