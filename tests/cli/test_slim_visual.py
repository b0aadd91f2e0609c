"""A recipe with slim-visual through the command line: planned, converted, proven, answered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from vlmcut.passes.recipe import PASSES

RECIPE = """
[[pass]]
name = "slim-visual"
what = "heads"
fraction = 0.5
first = 1

[[pass]]
name = "slim-visual"
what = "neurons"
fraction = 0.5
ranking = "global"
"""
SIZES = ("--text-tokens", "24", "--new-tokens", "4")


def test_a_recipe_is_planned_and_converted(run: Any, tmp_path: Path) -> None:
    recipe, out = tmp_path / "r.toml", tmp_path / "out"
    recipe.write_text(RECIPE)
    planned = run("inspect", "tiny:llava", "--recipe", recipe, *SIZES)
    assert planned.code == 0, planned
    assert "idle     visual tokens, heads: 3 in layer 1, 3 in layer 2" in planned.out
    assert "idle     visual tokens, neurons: 40 in layer 0, 40 in layer 1, 40 in layer 2" in planned.out
    assert "note     before layer 1 they use all" in planned.out
    done = run("convert", "tiny:llava", "--recipe", recipe, *SIZES, "-o", out)
    assert done.code == 0, done
    anatomy = json.loads((out / "manifest.json").read_text())["anatomy"]
    (idle,) = [one["idle"] for one in anatomy.values() if isinstance(one, dict) and "idle" in one] or [anatomy["idle"]]
    assert idle["heads"] == [[1, 3], [2, 3]]
    assert sum(kept for _, kept in idle["neurons"]) == 120 and idle["neurons"][-1] == [2, 0]  # measured
    for work in anatomy["work"].values():
        assert work["ratio"] == pytest.approx(1, abs=0.05)
    assert run("run", out, "-p", "What?").code == 0
    assert "slim-visual" in PASSES and "slim-visual" in run("passes").out
