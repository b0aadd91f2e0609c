"""All graphs of all budgets into one folder with one weight file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ..manifest import GraphInfo, TensorInfo, TokenBudget
from ..surgery.load import describe, locate
from . import onnx
from .components import components
from .operators import Operators
from .weights import WeightFile

FOLDER = "graphs"


@contextmanager
def keeping(model: Any, keep: int) -> Iterator[None]:
    """While inside, the model keeps `keep` visual tokens per image: one model serves several budgets."""
    selection = locate(model).selection
    if selection is None:
        assert keep == describe(model).visual_tokens
        yield
        return
    before, selection.keep = selection.keep, keep
    try:
        yield
    finally:
        selection.keep = before


def write_graphs(
    model: Any,
    budgets: Sequence[TokenBudget],
    operators: Operators,
    folder: Path,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, GraphInfo]:
    """Export vision, prefill and decode of every budget into `folder/graphs`."""
    place = folder / FOLDER
    place.mkdir()
    found: dict[str, GraphInfo] = {}
    with WeightFile(place) as weights:
        for index, budget in enumerate(budgets):
            with keeping(model, budget.visual_tokens):
                for component in components(model, describe(model), budget):
                    name = f"{component.role}-{budget.visual_tokens}"
                    progress(f"exporting {name}")
                    graph = onnx.export(component, model, operators)
                    inputs, outputs = _tensors(graph.graph.inputs), _tensors(graph.graph.outputs)
                    weights.save(graph, f"{name}.onnx")
                    found[name] = GraphInfo(
                        role=component.role,
                        budget=index,
                        file=f"{FOLDER}/{name}.onnx",
                        inputs=inputs,
                        outputs=outputs,
                    )
    return found


def _tensors(values: Sequence[ir.Value]) -> tuple[TensorInfo, ...]:
    return tuple(TensorInfo(name=n, dtype=d, shape=s) for n, d, s in map(onnx.info, values))
