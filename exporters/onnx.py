"""From a component to an ONNX graph: trace, translate, simplify, name. Weights stay where they are in memory."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass
from onnxscript import FLOAT, INT8, opset18, optimizer

from ..passes import int8 as _int8  # noqa: F401  registers the operator
from .components import Component
from .experts import static_experts
from .operators import OPSET, Operators, emitting

_op: Any = opset18


def _int8_linear(x: FLOAT, weight: INT8, scale: FLOAT, bias: FLOAT | None = None) -> FLOAT:
    """DynamicQuantizeLinear, MatMulInteger, rescale: the pattern that ONNX Runtime fuses."""
    quantized, x_scale, x_zero = _op.DynamicQuantizeLinear(x)
    product = _op.MatMulInteger(quantized, _op.Transpose(weight, perm=[1, 0]), x_zero)
    out = _op.Mul(_op.Cast(product, to=1), _op.Mul(x_scale, scale))
    return out if bias is None else _op.Add(out, bias)


def _stable_sort(self: FLOAT, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    """A whole TopK: ONNX gives equal values to the lower index first, which is what stable means."""
    end = dim + 1 if dim + 1 != 0 else None
    length = _op.Shape(self, start=dim) if end is None else _op.Shape(self, start=dim, end=end)
    return _op.TopK(self, length, axis=dim, largest=int(descending), sorted=1)


_TRANSLATIONS: dict[Any, Any] = {
    torch.ops.vlmcut.dynamic_int8_linear.default: _int8_linear,
    torch.ops.aten.sort.stable: _stable_sort,
}


def export(component: Component, model: Any, operators: Operators) -> ir.Model:
    """Export one component with static shapes.

    Returns:
        A model of opset 24 whose inputs and outputs carry the component's names, whose initializers are the model's
        own tensors (nothing copied), and whose nodes are named by the module that made them.
    """
    names = list(component.inputs)
    if component.role == "vision":
        args: tuple[Any, ...] = tuple(component.inputs.values())
    else:
        past = {k.removeprefix("past_"): v for k, v in component.inputs.items() if k.startswith("past_")}
        args = ({k: v for k, v in component.inputs.items() if not k.startswith("past_")}, past)
    with emitting(model, operators), static_experts(model), torch.no_grad(), _quiet():
        program = torch.export.export(component.module, args, strict=False)
        onnx_program = torch.onnx.export(
            program,
            args=(),
            opset_version=OPSET,
            optimize=False,
            custom_translation_table=_TRANSLATIONS,
            verbose=False,
        )
        assert onnx_program is not None
        graph_model = onnx_program.model
        _simplify(graph_model)
    _name(graph_model, names, component.outputs)
    return graph_model


def _simplify(model: ir.Model) -> None:
    def fold(node: ir.Node) -> bool | None:
        # A weight with a second reader (a tied embedding) would be stored twice, once transposed.
        if node.op_type == "Transpose" and node.inputs[0] is not None and len(node.inputs[0].uses()) > 1:
            return False
        # A weight spread over tiles ([CLS] of each) would be stored once more, larger.
        if node.op_type == "Expand" and node.inputs[0] is not None and node.inputs[0].is_initializer():
            return False
        # A table of positions that is resized to the picture's grid would be stored resized.
        if node.op_type == "Resize" or (node.op_type == "MatMul" and all(_constant(x) for x in node.inputs)):
            return False
        # A norm of learned queries would be stored normed (its square is where that begins).
        if node.op_type == "Pow" and node.inputs[0] is not None and len(node.inputs[0].shape or ()) > 1:
            return False
        # Chosen or mixed rows of a table of positions would be stored instead of the table.
        if node.op_type in ("Gather", "GatherND") and node.inputs[0] is not None and node.inputs[0].is_initializer():
            return None if node.outputs[0].shape == node.inputs[0].shape else False
        return None

    CommonSubexpressionEliminationPass()(model)
    optimizer.optimize_ir(model, should_fold=fold)
    CommonSubexpressionEliminationPass()(model)
    _take_few(model)
    RemoveUnusedNodesPass()(model)


def _take_few(model: ir.Model) -> None:
    """A sort of which only the first so many are read becomes a TopK of so many, which need not sort the rest."""
    for node in list(model.graph):
        if node.op_type != "TopK" or any(value.is_graph_output() for value in node.outputs):
            continue
        uses = [use.node for value in node.outputs for use in value.uses()]
        counts = {_first_few(reader, node.attributes["axis"].as_int()) for reader in uses}
        if len(counts) != 1 or None in counts:
            continue
        node.replace_input_with(1, uses[0].inputs[2])
        for value in node.outputs:
            value.shape = uses[0].outputs[0].shape
        for reader in uses:
            assert reader.inputs[0] is not None
            reader.outputs[0].replace_all_uses_with(reader.inputs[0], replace_graph_outputs=True)


def _first_few(node: ir.Node, axis: int) -> int | None:
    """The count of a slice from the first to a count on this axis."""
    if node.op_type != "Slice" or not all(_constant(value) for value in node.inputs[1:]):
        return None
    values = [v.const_value.numpy().tolist() for v in node.inputs[1:] if v is not None and v.const_value is not None]
    shape = node.outputs[0].shape
    if shape is None:
        return None
    (start, end, axes, *step), rank = values, len(shape)
    plain = start == [0] and len(axes) == 1 and axes[0] % rank == axis % rank and step in ([], [[1]])
    return end[0] if plain else None


def _constant(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None


def _name(model: ir.Model, inputs: list[str], outputs: tuple[str, ...]) -> None:
    """Give inputs, outputs and nodes their names; drop the tracer's metadata, which holds paths of this machine."""
    graph = model.graph
    assert len(graph.inputs) == len(inputs) and len(graph.outputs) == len(outputs)
    for value, name in zip(graph.inputs, inputs, strict=True):
        value.name = name
    for index, (value, name) in enumerate(zip(list(graph.outputs), outputs, strict=True)):
        if value.is_graph_input() or value.is_initializer():  # an output must be made by a node
            identity = ir.node("Identity", [value])
            identity.outputs[0].shape, identity.outputs[0].type = value.shape, value.type
            graph.append(identity)
            graph.outputs[index] = value = identity.outputs[0]
        value.name = name
    for count, node in enumerate(graph):
        scope = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
        path = [s for s in scope.strip("[]").replace("'", "").split(", ") if s]
        node.name = f"{path[-2] if len(path) > 1 else 'graph'}/{node.op_type}_{count}"
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
    graph.metadata_props.clear()
    model.metadata_props.clear()
    model.producer_name, model.producer_version = "vlmcut", None
    graph.name = "vlmcut"
    graph.doc_string = model.doc_string = None


class _quiet:
    """The exporter warns about its own internals; a failure still raises."""

    def __enter__(self) -> None:
        self._filters = warnings.catch_warnings()
        self._filters.__enter__()
        warnings.simplefilter("ignore")
        self._loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
        self._levels = [logger.level for logger in self._loggers]
        for logger in self._loggers:
            logger.setLevel(logging.ERROR)

    def __exit__(self, *error: object) -> None:
        for logger, level in zip(self._loggers, self._levels, strict=True):
            logger.setLevel(level)
        self._filters.__exit__(None, None, None)


def info(value: ir.Value) -> tuple[str, str, tuple[int, ...]]:
    """Name, NumPy dtype and shape of a graph input or output; every dimension must be a number."""
    assert value.name and value.dtype is not None and value.shape is not None
    return value.name, str(np.dtype(value.dtype.numpy())), tuple(int(d) for d in value.shape)  # type: ignore[arg-type]
