"""`verify --against MODEL`: the stored recipe is applied to the model again, and fresh inputs judge the bundle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from ..errors import BundleError
from ..exporters.graphs import keeping, kept
from ..manifest import ExactnessRow, Manifest
from ..passes import folder as cut_folder
from ..passes import recipe as recipes
from ..runtime.sessions import Graphs
from ..surgery.load import describe
from . import exactness


def verify_fresh(
    folder: Path, manifest: Manifest, against: str, *, provider: str, seed: int, progress: Callable[[str], None]
) -> list[ExactnessRow]:
    """Rows of all budgets on inputs of `seed`; a token that differs beyond a near tie is a row of its own."""
    progress(f"cutting `{against}` by the bundle's recipe")
    sizes = tuple(bucket.size for bucket in manifest.buckets)
    loaded = cut_folder.load(against, sizes=sizes, frames=manifest.layout.frames)
    if not loaded.recipe:
        recipes.from_tables(manifest.recipe, "the bundle's recipe").apply(loaded.model, None)
    model = loaded.model.to(getattr(torch, manifest.dtype))
    a = describe(model)
    made, stored = a.to_json(), manifest.anatomy
    if other := sorted(k for k, v in made.items() if v != stored.get(k)):
        raise BundleError(
            f"`{against}` is not the model of this bundle: its {other[0]} is {made[other[0]]}, the bundle's is "
            f"{stored.get(other[0])}",
            hint=f"the bundle was made from `{manifest.source.get('id')}`",
        )
    rows: list[ExactnessRow] = []
    for index, budget in enumerate(manifest.budgets):
        progress(f"fresh inputs for the budget that keeps {budget.visual_tokens} tokens")
        prefix = "" if len(manifest.budgets) == 1 else f"{budget.visual_tokens}/"
        graphs = Graphs(folder, manifest, index, provider=provider)
        with keeping(model, kept(manifest, index)):
            verdict, _ = exactness.measure(model, a, budget, graphs, seed=seed, name=prefix)
        wrong = len(verdict.wrong)
        rows += [
            *verdict.rows,
            ExactnessRow(
                graph=f"{prefix}greedy",
                output="tokens",
                max_abs=wrong,
                floor=0,
                tolerance=0,
                ok=not wrong,
                note=f"{verdict.equal} of {verdict.tokens} equal, {len(verdict.near_ties)} near ties",
            ),
        ]
    return rows
