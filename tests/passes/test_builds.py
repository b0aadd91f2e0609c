"""TensorRT-RTX builds each cut inside the language model, another family each; docs/builds.md has all of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from vlmcut.errors import ExportError
from vlmcut.surgery.load import describe

from .cut_helpers import needs_rtx, script

builds = script("builds")

# A setting -> whose prefill and decode are built. Engines of trim-vocabulary: test_vocabulary_bundle.py.
DIAGONAL = {
    "fastv, exit": ("llava-siglip-qwen2", "float16"),
    "pyramiddrop": ("gemma3", "float32"),
    "fitprune": ("internvl", "float16"),
    "skip-visual mlp": ("paligemma", "float16"),
    "skip-visual layer": ("qwen3_vl", "float16"),
    "skip-visual apart": ("qwen2_vl", "float16"),
    "slim-visual heads": ("smolvlm", "float16"),
    "bottleneck": ("qwen2_5_vl", "float16"),
}


@needs_rtx
@pytest.mark.parametrize("name", DIAGONAL)
def test_engines_of_a_cut_inside_are_built(name: str) -> None:
    """TensorRT-RTX 1.7.1 died of the last two, while layers that read text alone scattered keys into the cache."""
    kind, dtype = DIAGONAL[name]
    before, loaded = builds.cut(kind, name)
    changed = builds.changed(before, describe(loaded.model))
    assert changed == (("prefill",) if name.startswith(("skip", "slim")) else ("prefill", "decode"))
    assert builds.build(loaded.model, ("prefill", "decode"), dtype) == 2


@pytest.mark.parametrize(
    ("child", "says"),
    [
        ("import os, sys\nprint('decode.onnx', flush=True)\nos.abort()", r"TensorRT dies of decode\.onnx \(signal 6\)"),
        ("import sys\nsys.exit('no kernel for `Attention`')", "no kernel for `Attention`"),
    ],
)
def test_a_build_that_fails_is_said(child: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builds, "_BUILD", child)
    with pytest.raises(ExportError, match=says):
        builds.build(builds.original("llava").model, ("decode",))


def test_a_failure_stands_in_its_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> int:
        raise ExportError("prefill.onnx: a | b\n  c")

    monkeypatch.setattr(builds, "build", fail)
    assert builds.cell("llava", "exit", "float32") == "failed: prefill.onnx: a / b c"


def test_a_refusal_that_is_not_in_the_table_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builds, "REFUSED", {"its convolutions": frozenset({("exit", "lfm2_vl")})})
    assert builds.cell("lfm2_vl", "exit", "float32") == "no (1)"
    monkeypatch.setattr(builds, "REFUSED", {"another reason": frozenset({("exit", "lfm2_vl")})})
    with pytest.raises(AssertionError, match="refused, but not because another reason"):
        builds.cell("lfm2_vl", "exit", "float32")
    monkeypatch.setattr(builds, "REFUSED", {"its convolutions": frozenset({("exit", "llava")})})
    with pytest.raises(AssertionError, match="llava, exit: not refused, although its convolutions"):
        builds.cell("llava", "exit", "float32")


def test_rows_that_were_not_made_now_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "builds.md"
    page.write_text(f"Above.\n{builds._MARKS[0]}\n{builds._MARKS[1]}\nBelow.\n")
    monkeypatch.setattr(builds, "_PAGE", page)
    for name, row in (("llava, float16", "| llava, float16 | 1 |"), ("llava, float32", "| llava, float32 | 2 |")):
        builds.write({name: row})
    builds.write({"llava, float16": "| llava, float16 | 3 |"})
    text = page.read_text()
    assert text.startswith("Above.\n") and text.endswith("Below.\n")
    assert [line for line in text.splitlines() if line.startswith("| llava")] == [
        "| llava, float32 | 2 |", "| llava, float16 | 3 |"
    ]  # fmt: skip
    assert all(f"{i}. {reason}" in text for i, reason in enumerate(builds.REFUSED, start=1))


def test_the_page_says_what_the_table_refuses() -> None:
    """Every cell of docs/builds.md is engines that were built, or a refusal that the plan is tested for."""
    lines = [line for line in builds._PAGE.read_text().splitlines() if line.startswith("| ")]
    titles, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert titles == ["model", "nothing cut", *builds.SETTINGS, "date"] and rows
    for model, whole, *cells, _ in rows:
        kind = model.split(",")[0]
        assert whole == "v p d"
        for name, cell in zip(builds.SETTINGS, cells, strict=True):
            reason = builds.refusal(name, kind)
            want = r"[vpd]( [vpd])*" if reason is None else rf"no \({list(builds.REFUSED).index(reason) + 1}\)"
            assert re.fullmatch(want, cell), f"{model}, {name}: {cell}"
