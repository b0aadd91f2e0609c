"""benchmarks/passes.py on its small model: what is run, what is said of it, and where the rows go."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NAMES = ("alone", "costs", "cuts", "exports", "contenders", "families", "passes")


@pytest.fixture(scope="module")
def passes() -> Iterator[Any]:
    """The script, which finds its neighbours as scripts do."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import passes  # type: ignore[import-not-found]

        yield passes
    finally:
        sys.path.pop(0)
        for name in NAMES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def bench(passes: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return passes.Bench(True, tmp_path_factory.mktemp("original"), 1, 1)


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_every_recipe_can_be_planned_and_changes_a_graph(bench: Any, passes: Any) -> None:
    for name, steps in bench.recipes.items():
        planned = passes.make(steps).plan(bench.a)
        changed = {role for role in passes.ROLES if bench._key(role, planned) != bench._key(role, bench.a)}
        assert changed, name
        if "vision" in name:
            assert changed == {"vision"}
        elif name.startswith(("skip-visual", "slim-visual")):  # visual tokens do less in a prompt alone
            assert changed == {"prefill"}
        elif not name.startswith(("prune-tokens", "the same")):
            assert changed == {"prefill", "decode"}, name


def test_visual_work_is_what_the_text_alone_does_not_take(bench: Any, passes: Any) -> None:
    whole, half = bench.a, passes.make(bench.recipes["exit 2"]).plan(bench.a)
    assert passes.visual_work(half) * 2 == passes.visual_work(whole)
    fewer = replace(passes.budget(whole), images=0)
    text = passes.predict(whole, fewer, "prefill").flops
    assert passes.visual_work(whole) == passes.predict(whole, passes.budget(whole), "prefill").flops - text
    assert passes.visual_work(replace(whole, keep=(0,))) == 0


def test_rows_of_a_recipe(bench: Any, tmp_path: Path) -> None:
    prefill, decode, first = map(cells, bench.rows("exit 2", tmp_path))
    assert [row[1] for row in (prefill, decode, first)] == ["prefill", "decode", "first token"]
    assert prefill[4] == decode[4] == "1.0000" and prefill[6] == "50.0 %" and decode[7] == "89.8 %"
    for row in (prefill, decode):
        assert float(row[8].removesuffix(" %")) > 0
        memory = [float(one.strip("()")) for one in row[9].split()]
        assert all(20 < one < 500 for one in memory)  # MB of ONNX Runtime and a small graph, not of this process
    assert first[5] != "100.0 %"


def test_rows_that_were_not_made_now_stay(passes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "costs.md"
    page.write_text(f"Above.\n\n{passes._MARKS[0]}\n{passes._MARKS[1]}\n\nBelow.\n")
    monkeypatch.setattr(passes, "_PAGE", page)
    for rows in (["| b | vision | 1 |", "| b | first token | 1 |"], ["| a | decode | 2 |"], ["| b | vision | 3 |"]):
        passes.write(rows, ["a", "b"])
    assert page.read_text() == (
        f"Above.\n\n{passes._MARKS[0]}\n{passes._HEAD}\n| a | decode | 2 |\n| b | vision | 3 |\n{passes._MARKS[1]}\n\n"
        "Below.\n"
    )
