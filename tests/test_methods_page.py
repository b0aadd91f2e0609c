"""docs/methods.md is what the table of methods says now."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from vlmcut.passes.tokens.methods import METHODS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def maker() -> Any:
    """benchmarks/methods_page.py, which finds its neighbour as a script does."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        spec = importlib.util.spec_from_file_location("methods_page", ROOT / "benchmarks" / "methods_page.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


@pytest.fixture(scope="module")
def page(maker: Any) -> str:
    return maker.page()


def test_the_committed_page_is_made_from_the_table(maker: Any, page: str) -> None:
    assert maker.PAGE.read_text() == page, "run python benchmarks/methods_page.py --write"


def test_every_method_has_its_rows(page: str, maker: Any) -> None:
    first, second = page.split("## Which family takes which")
    assert [line.split("`")[1] for line in first.splitlines() if line.startswith("| `")] == list(METHODS)
    rows = {line.split("`")[1]: line.split("|")[2:-1] for line in second.splitlines() if line.startswith("| `")}
    assert list(rows) == list(METHODS)
    notes = {line.split(".")[0] for line in second.splitlines() if line[:1].isdigit()}
    cells = {cell.strip() for row in rows.values() for cell in row}
    assert cells == {"yes", *notes}  # no note is missing, none is left over
    assert all(len(row) == len(maker.KINDS) for row in rows.values())
    assert {cell.strip() for cell in rows["random"] + rows["divprune"]} == {"yes"}
    assert rows["tome"][0].strip() == "yes" and rows["tome"][maker.KINDS.index("qwen3_vl")].strip() != "yes"


def test_what_a_method_looks_at(maker: Any) -> None:
    said = {name: maker.inputs(name, row) for name, row in METHODS.items()}
    assert said["random"] == said["divprune"] == "-"
    assert said["fastervlm"] == "attention: last block, [CLS]"
    assert said["hiprune"] == "attention: blocks 8 and 23 of 24, grid"
    assert said["vtc-cls"] == "attention: blocks 12 to 23 of 24, [CLS]"
    assert said["pool"] == "grid" and said["cdpruner"] == "question" and said["evs"] == "frames"
