"""The work of every graph of a bundle: counted from its shapes, beside what the anatomy predicts."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..exporters.flops import count
from ..exporters.graphs import keeping, kept
from ..exporters.operators import for_target
from ..manifest import Manifest, TokenBudget
from ..surgery.anatomy import Anatomy
from ..surgery.costs import Work, predict
from ..surgery.load import describe


def predicted(a: Anatomy, budget: TokenBudget, role: str, bucket: int, target: str, dtype: str) -> Work:
    """What a graph of this target and dtype does in one call."""
    kind: torch.dtype = getattr(torch, dtype)
    causal = for_target(target).causal(kind, a.language.head_dim)
    return predict(a, budget, role, bucket, causal=causal, element_bytes=kind.itemsize)


def compare(model: Any, manifest: Manifest, folder: Path) -> dict[str, Any]:
    """For each graph: FLOPs and bytes of one call, `predicted` and `counted`, and the `ratio` of the FLOPs.

    Args:
        model: the cut model that the graphs were made of.
        folder: of the bundle.

    Raises:
        ExportError: an operator that cannot be counted.
    """
    found = {}
    for index, budget in enumerate(manifest.budgets):
        with keeping(model, kept(manifest, index)):
            a = describe(model)
        for name, graph in manifest.graphs.items():
            if graph.budget == index:
                want = predicted(a, budget, graph.role, graph.bucket, manifest.target, manifest.dtype)
                have = asdict(count(folder / graph.file))
                del have["modules"]  # long; `exporters.flops.count` says them of any graph
                found[name] = {"predicted": asdict(want), "counted": have, "ratio": want.flops / have["flops"]}
    return found
