"""All graphs of all budgets into one folder with one weight file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ..manifest import GraphInfo, Manifest, TensorInfo, TokenBudget
from ..surgery.load import describe
from ..surgery.selection import attached
from . import onnx
from .components import components
from .operators import Operators
from .weights import WeightFile

FOLDER = "graphs"


@contextmanager
def keeping(model: Any, keep: Sequence[int]) -> Iterator[None]:
    """While inside, the model keeps so many visual tokens of an image of each bucket: one model serves every budget."""
    about = attached(model)
    if about.selection is None:
        assert tuple(keep) == tuple(bucket.tokens for bucket in about.buckets)
        yield
        return
    before, about.selection.keep = about.selection.keep, tuple(keep)
    try:
        yield
    finally:
        about.selection.keep = before


def kept(manifest: Manifest, budget: int) -> tuple[int, ...]:
    """Visual tokens that the graphs of a budget keep of an image of each bucket."""
    graphs = [manifest.graph("vision", budget, bucket) for bucket in range(len(manifest.buckets))]
    return tuple(next(t.shape[0] for t in graph.outputs if t.name == "image_features") for graph in graphs)


def write_graphs(
    model: Any,
    budgets: Sequence[TokenBudget],
    keeps: Sequence[Sequence[int]],
    operators: Operators,
    folder: Path,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, GraphInfo]:
    """Export prefill and decode of every budget, and vision of every budget and bucket, into `folder/graphs`.

    Args:
        keeps: for each budget, visual tokens of an image of each bucket.
    """
    place = folder / FOLDER
    place.mkdir()
    found: dict[str, GraphInfo] = {}
    with WeightFile(place) as weights:
        buckets = attached(model).buckets
        for index, (budget, keep) in enumerate(zip(budgets, keeps, strict=True)):
            with keeping(model, keep):
                made = components(model, budget, keep, describe(model).quantized)
                for number, component in enumerate(made):
                    bucket = number if component.role == "vision" else 0
                    size = f"-{buckets[bucket].name}" if component.role == "vision" and len(buckets) > 1 else ""
                    name = f"{component.role}{size}-{budget.visual_tokens}"
                    progress(f"exporting {name}")
                    graph = onnx.export(component, model, operators)
                    inputs, outputs = _tensors(graph.graph.inputs), _tensors(graph.graph.outputs)
                    weights.save(graph, f"{name}.onnx")
                    found[name] = GraphInfo(
                        role=component.role,
                        budget=index,
                        bucket=bucket,
                        file=f"{FOLDER}/{name}.onnx",
                        inputs=inputs,
                        outputs=outputs,
                    )
    return found


def _tensors(values: Sequence[ir.Value]) -> tuple[TensorInfo, ...]:
    return tuple(TensorInfo(name=n, dtype=d, shape=s) for n, d, s in map(onnx.info, values))
