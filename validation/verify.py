"""Judge a bundle again: from its golden tensors on any machine, or against the model with fresh inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from ..errors import BundleError
from ..manifest import ExactnessRow, check_files, read
from ..runtime.sessions import Graphs
from . import cases

Progress = Callable[[str], None]


def verify(
    bundle: str | Path,
    *,
    against: str | None = None,
    provider: str = "cpu",
    seed: int = 1,
    progress: Progress = lambda _: None,
) -> list[ExactnessRow]:
    """Check every file's hash, then every graph.

    Args:
        against: the source model: the recipe is applied to it again and fresh inputs are used. None uses the golden
            tensors of the bundle and needs no torch.
        provider: cpu or cuda.
        seed: of the fresh inputs.

    Returns:
        One row per graph output; all `ok` if the bundle is exact here.

    Raises:
        BundleError: a changed, missing or incomplete file.
    """
    folder = Path(bundle)
    manifest = read(folder)
    progress("checking the sha256 of every file")
    check_files(folder, manifest, hashes=True)
    known = [ExactnessRow(**row) for row in manifest.exactness.get("rows", [])]
    if not known:
        raise BundleError(f"`{folder}` holds no exactness rows", hint="convert the model again")
    if against is not None:
        from .fresh import verify_fresh  # needs torch

        return verify_fresh(folder, manifest, against, provider=provider, seed=seed, progress=progress)
    rows: list[ExactnessRow] = []
    for index, budget in enumerate(manifest.budgets):
        progress(f"running the golden tensors of the budget that keeps {budget.visual_tokens} tokens")
        prefix = "" if len(manifest.budgets) == 1 else f"{budget.visual_tokens}/"
        graphs = Graphs(folder, manifest, index, provider=provider)
        case = cases.read_case(folder / "golden" / f"{budget.visual_tokens}.npz", manifest.layout)
        mine = [
            dataclasses.replace(row, graph=row.graph.removeprefix(prefix), note="")
            for row in known
            if row.graph.startswith(prefix)
        ]
        judged = cases.judge(cases.distances(graphs, case), mine)
        rows += [dataclasses.replace(row, graph=prefix + row.graph) for row in judged]
    return rows
