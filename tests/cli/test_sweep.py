"""`sweep`, `overlay --method` and `passes`: what they print and write, and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from vlmcut.passes.tokens.methods import METHODS

Refuses = Callable[..., Any]
Run = Callable[..., Any]


@pytest.fixture
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One picture with two questions."""
    folder = tmp_path_factory.mktemp("asked")
    pixels = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    lines = [{"image": "a.png", "question": q, "answer": "red"} for q in ("What is red?", "What is left?")]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def test_sweep_writes_and_prints(run: Run, asked: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(
        "sweep", "tiny:llava", "-o", out, "--quality", asked, "--methods", "divprune:block=2,evs", "--keep", "4,8",
        "--seeds", "2", "--no-timing",
    )  # fmt: skip
    assert result.code == 0, result
    assert {p.name for p in out.iterdir()} == {"sweep.json", "sweep.png", "table.md"}
    written = (out / "table.md").read_text()
    assert result.out.strip().removesuffix(str(out)).strip() in written
    assert "divprune:block=2" in written and "does not apply: evs: " in written and "TTFT" not in written
    data = json.loads((out / "sweep.json").read_text())
    assert [(r["method"], r["keep"]) for r in data["rows"]] == [
        ("original", [16]), *((m, [k]) for k in (4, 8) for m in ("random", "uniform", "divprune:block=2")),
    ]  # fmt: skip
    assert (data["questions"], data["timing"]) == (2, None)


def test_sweep_as_json(run: Run, asked: Path, tmp_path: Path) -> None:
    result = run(
        "sweep", "tiny:llava", "-o", tmp_path / "out", "--quality", asked, "--methods", "uniform", "--prune", "0.75",
        "--no-timing", "--json",
    )  # fmt: skip
    assert json.loads(result.out) == json.loads((tmp_path / "out" / "sweep.json").read_text())


SWEEP = {
    "--methods divprun": ("divprun", "did you mean `divprune`?"),
    "--methods uniform,": ("no method ``", "known: "),
    "--methods divprune:blok=3": ("no option `blok`", "did you mean `block`?"),
    "--keep 0": ("--keep 0", "16 visual tokens", "choose 1 to 15"),
    "--keep 4,17": ("--keep 17", "16 visual tokens"),
    "--keep 4 --prune 0.5": ("--prune and --keep", "give one"),
    "--prune 1.5": ("--prune 1.5", "0 < R < 1"),
    "--prune nan": ("--prune nan", "0 < R < 1"),
    "--quality nowhere": ("nowhere", "questions.jsonl"),
}


@pytest.mark.parametrize("flags", SWEEP)
def test_sweep_refuses(flags: str, refuses: Refuses, asked: Path) -> None:
    given = flags.split()
    quality = [] if "--quality" in given else ["--quality", asked]
    result = refuses("sweep", "tiny:llava", "-o", "out", *quality, *given, says=SWEEP[flags])
    assert "loading" not in result.err  # no work was done


def test_sweep_without_questions(refuses: Refuses) -> None:
    refuses("sweep", "tiny:llava", "-o", "out", says=("tiny:llava/heldout", "--quality"))


def test_sweep_refuses_an_existing_folder(refuses: Refuses, tmp_path: Path, asked: Path) -> None:
    (tmp_path / "out").mkdir()
    refuses("sweep", "tiny:llava", "-o", "out", "--quality", asked, says=("`out` exists",))


@pytest.mark.parametrize("flags", ["--keep x", "--prune 0.5,", "--seeds 0", "--questions 0", "--image-size 3"])
def test_sweep_usage(flags: str, refuses: Refuses, asked: Path) -> None:
    name, value = flags.split()
    refuses("sweep", "tiny:llava", "-o", "out", "--quality", asked, name, value, code=2, says=(name,))


def test_overlay_of_methods(run: Run, picture: Path, tmp_path: Path) -> None:
    out = tmp_path / "kept.png"
    result = run(
        "overlay", "tiny:llava", "-i", picture, "-o", out, "--method", "uniform,divprune,tome", "--prune", "0.5"
    )
    assert result.code == 0, result
    assert result.out.splitlines() == [f"{out}: {m}: 8 of 16 tokens kept" for m in ("uniform", "divprune", "tome")]
    assert Image.open(out).size == (3 * 480 + 2 * 16, 480 + 34)


OVERLAY = {
    "--method uniform,divprun --keep 4": (1, "did you mean `divprune`?"),
    "--method uniform --keep 17": (1, "choose 1 to 16"),
    "--method evs --keep 4": (1, "frames"),
    "--method uniform": (2, "one of --prune and --keep"),
    "--method uniform --keep 4 --prune 0.5": (2, "one of --prune and --keep"),
    "--prune 0.5": (2, "--prune goes with --method"),
}


@pytest.mark.parametrize("flags", OVERLAY)
def test_overlay_refuses(flags: str, refuses: Refuses, picture: Path) -> None:
    code, says = OVERLAY[flags]
    refuses("overlay", "tiny:llava", "-i", picture, "-o", "kept.png", *flags.split(), code=code, says=(says,))


def test_overlay_of_a_broken_picture(refuses: Refuses, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no")
    refuses("overlay", "tiny:llava", "-i", "a.png", "-o", "kept.png", "--method", "uniform", "--keep", "4",
            says=("a.png", "not a readable image"))  # fmt: skip


def test_passes_names_stage_and_options(run: Run) -> None:
    text = run("passes").out
    for name, row in METHODS.items():
        assert f"\n  {name} " in text
        assert f"{row.stage}; {row.source}" in text
    assert "options alpha=5.0:proportional=true" in text  # as --method takes them
    data = json.loads(run("passes", "--json").out)["methods"]
    assert data.keys() == METHODS.keys()
    assert data["turbo"]["options"] == {"alpha": 5.0, "proportional": True}
    assert data["pool"]["stage"] == "grid" and data["turbo"]["title"] == "Turbo"
