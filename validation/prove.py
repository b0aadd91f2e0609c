"""Every graph of a bundle and every weight, judged; what `convert` and the survey of all types share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import ParityError
from ..exporters.graphs import keeping, kept
from ..manifest import Manifest
from ..runtime.sessions import Graphs
from ..surgery.anatomy import Anatomy
from . import complete, exactness, report
from .exactness import Exactness

Progress = Callable[[str], None]


def prove(model: Any, a: Anatomy, manifest: Manifest, folder: Path, *, seed: int, progress: Progress) -> Exactness:
    """Judge every graph of every budget and every weight; record golden tensors. Raises ParityError."""
    graph_files = [folder / g.file for g in manifest.graphs.values()]
    progress("checking that every weight is there")
    missing = complete.missing_weights(model, graph_files)
    dead = complete.unread_weights(model, missing)
    if missing := [name for name in missing if name not in dead]:
        raise ParityError(
            f"{len(missing)} weights of the cut model are in no graph, first `{missing[0]}`",
            hint="a weight was changed or lost on the way; report this as a bug",
        )
    (folder / "golden").mkdir(exist_ok=True)
    verdict = Exactness()
    for index, budget in enumerate(manifest.budgets):
        progress(f"verifying the graphs that keep {budget.visual_tokens} tokens")
        prefix = "" if len(manifest.budgets) == 1 else f"{budget.visual_tokens}/"
        runner = Graphs(folder, manifest, index)
        with keeping(model, kept(manifest, index)):
            one, cases = exactness.measure(model, a, budget, runner, seed=seed, name=prefix)
        cases[0].save(folder / "golden" / f"{budget.visual_tokens}.npz")
        del runner  # its sessions hold a copy of the weights
        verdict.merge(one)
    if not verdict.ok:
        raise ParityError(report.failure(verdict), hint="no bundle was written; see the worst rows above")
    return verdict
