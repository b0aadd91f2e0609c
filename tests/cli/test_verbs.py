"""What the verbs print when all is well: data on stdout, progress on stderr, JSON that parses."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import vlmcut
from PIL import Image
from vlmcut.errors import VlmcutError
from vlmcut.exporters.build import seal
from vlmcut.flags import cuts
from vlmcut.manifest import read

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
    assert "4, 8 kept by divprune" in text.out and "for a tower that has no [CLS] token" in text.out
    assert "applies" in text.out and "prune-tokens divprune" in text.out
    assert json.loads(run("inspect", "tiny:llava", "--json").out)["before"]["anatomy"]["family"] == "llava"


def test_image_size(run: Any, tmp_path: Path) -> None:
    for verb in ("inspect", "convert"):
        more = ("--dry-run",) if verb == "convert" else ()
        result = run(verb, "tiny:llava", "--prune", "0.7", "--image-size", "30x40", *more)
        assert result.code == 0 and "tokens   30x40 px: 16 visual tokens per image, 5 kept" in result.out
    assert run("cut", "tiny:llava", "--prune", "0.7", "--image-size", "30x40", "-o", tmp_path / "cut").code == 0
    again = run("inspect", tmp_path / "cut", "--image-size", "30x40")
    assert again.code == 0 and "30x40 px: 16" in again.out


def test_several_image_sizes_reach_the_request(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def plan(request: Any) -> Any:
        seen.append(request.image_size)
        raise VlmcutError("enough", hint="stop")

    monkeypatch.setattr("vlmcut.pipeline.plan", plan)
    for verb in (("inspect",), ("convert", "--dry-run"), ("cut", "-o", "out")):
        assert run(verb[0], "tiny:llava", *verb[1:], "--image-size", "336x672,672x336,90x12").code == 1
        assert run(verb[0], "tiny:llava", *verb[1:]).code == 1
    assert seen == [((336, 672), (672, 336), (90, 12)), ()] * 3


def test_every_cut_flag_reaches_every_verb_that_cuts(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One declaration: the three verbs show the same flags and ask for the same cuts."""
    seen: list[Any] = []

    def plan(request: Any) -> Any:
        seen.append(request)
        raise VlmcutError("enough", hint="stop")

    monkeypatch.setattr("vlmcut.pipeline.plan", plan)
    given = {
        "prune": 0.5, "method": "divprune", "drop_heads": {"vision": 0.5}, "drop_layers": {"language": 1},
        "drop_neurons": {"vision": 0.25, "language": 0.5}, "importance": "loss", "ranking": "global",
        "inside": "fastv", "ladder": ((1, 0.5),), "exit_layer": 2, "skip_visual": {"mlp": 1, "layer": 2},
        "slim_visual": {"heads": 0.5, "neurons": 0.25}, "carriers": 3, "heal": 7,
        "vocabulary": 99, "quantize": "int8", "recipe": Path("r.toml"), "frames": 3, "image_size": ((32, 48),),
    }  # fmt: skip
    flags = (
        "--prune 0.5 --method divprune --drop-heads vision:0.5 --drop-layers language:1 --drop-neurons "
        "vision:0.25,language:0.5 --importance loss --ranking global --inside fastv --ladder 1:0.5 --exit 2 "
        "--skip-visual mlp:1 --skip-visual layer:2 --slim-visual heads:0.5,neurons:0.25 --carriers 3 --heal 7 "
        "--vocabulary 99 --quantize int8 --recipe r.toml --frames 3 --image-size 32x48"
    )
    for verb in (("inspect",), ("convert", "--dry-run"), ("cut", "-o", "out")):
        assert run(verb[0], "tiny:llava", *verb[1:], *flags.split()).code == 1
        assert {name: getattr(seen[-1], name) for name in given} == given
        assert run(verb[0], "tiny:llava", *verb[1:], "--keep", "7").code == 1
        assert seen[-1].keep == (7,)
    assert {*given, "keep"} == set(inspect.signature(cuts).parameters)


def test_passes(run: Any) -> None:
    data = json.loads(run("passes", "--json").out)
    text = run("passes").out
    for kind in ("passes", "methods"):
        for name, row in data[kind].items():
            assert name in text and row["summary"] in text and row["source"] in text


def test_cut_and_reload(run: Any, tmp_path: Path) -> None:
    out = tmp_path / "cut"
    assert run("cut", "tiny:llava", "--prune", "0.7", "-o", out).out.splitlines()[-1] == str(out)
    prune = {
        "name": "prune-tokens",
        "keep": 5,
        "method": "fastervlm",
        "seed": 0,
        "line_breaks": "drop",
        "pool": "image",
    }
    assert vlmcut.load(out).recipe[-1] == prune
    twice = run("cut", out, "--drop-heads", "language:0.5", "-o", tmp_path / "twice")
    assert twice.code == 1 and "is a cut model already" in twice.err and not (tmp_path / "twice").exists()


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


def test_fit(run: Any, refuses: Any, bundle: Path, copied: Any, picture: Path) -> None:
    """A bundle whose processor makes of every picture but one what its bucket does not take."""
    folder = copied(bundle)
    settings = folder / "processor" / "processor_config.json"
    data = json.loads(settings.read_text())
    data["image_processor"]["do_resize"] = False
    settings.write_text(json.dumps(data))
    seal(read(folder), folder)
    for verb in (("run", folder, "-p", "x"), ("overlay", folder, "-o", "new.png")):
        result = refuses(*verb, "-i", picture, says=("1x3x30x40", "1x3x32x32", "`run --fit` does", "--image-size"))
        assert result.out == ""
        done = run(*verb, "-i", picture, "--fit")
        assert done.code == 0 and done.out
    resized = Image.open(picture).resize((32, 32), Image.Resampling.BICUBIC)
    want = vlmcut.Bundle(bundle).generate([resized], "x")
    assert run("run", folder, "-p", "x", "-i", picture, "--fit").out.strip() == want


def test_progress_goes_to_stderr(run: Any, bundle: Path) -> None:
    result = run("verify", bundle, "--json")
    assert "…" in result.err and "…" not in result.out


def test_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vlmcut", "nonsense"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 2 and "Error: " in done.stderr and done.stdout == ""
