"""The work of an exported graph, counted from its shapes: multiply-adds of every product, bytes of weights and states.

A multiply-add is two FLOPs. Products alone are counted (matrix products, convolutions, attention); norms, activations,
softmax, sorting and rounding are not. Attention is counted by the pairs of rows that its operator multiplies:

- an operator that is causal by itself: a row and those before it, S (S + 1) / 2 pairs of S rows, fewer with a window;
- an operator with a mask, and a product written as MatMul, Softmax, MatMul: every pair, seen or not;
- one query against a cache: all rows of the cache, which is the last step of a full budget.

`surgery/costs.py` predicts the same numbers from an `Anatomy`, by the same rules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx.defs
import onnx_ir as ir

from ..errors import ExportError
from ..surgery.costs import Work, pairs

_CONTRIB = "com.microsoft"
# Standard operators that multiply and have no rule here; every other one without a rule has no product.
_UNKNOWN = frozenset(
    "AffineGrid CausalConvWithState ConvInteger ConvTranspose DFT DeformConv Det GRU If LSTM LinearAttention Loop "
    "QLinearConv QLinearMatMul RNN STFT Scan SequenceMap".split()
)
_STANDARD = frozenset(schema.name for schema in onnx.defs.get_all_schemas_with_history() if not schema.domain)


@dataclass(frozen=True)
class Counted(Work):
    """The work of one call, and where it goes."""

    modules: dict[str, int]  # module path -> FLOPs, in the order of the graph; modules without a product are absent

    def by(self, depth: int) -> dict[str, int]:
        """FLOPs by the first `depth` parts of the module path."""
        found: Counter[str] = Counter()
        for path, flops in self.modules.items():
            found[".".join(path.split(".")[:depth])] += flops
        return dict(found)


def count(graph: Path | ir.Model) -> Counted:
    """Count a graph whose shapes are all numbers, as vlmcut's exports are.

    Raises:
        ExportError: an operator that multiplies, or may, in a way not known here; a shape that is not known.
    """
    model = graph if isinstance(graph, ir.Model) else ir.load(graph)
    modules: Counter[str] = Counter()
    for node in model.graph:
        if flops := _flops(node):
            modules[(node.name or "").rpartition("/")[0] or "graph"] += flops
    states = sum(_bytes(value) for value in model.graph.inputs if (value.name or "").startswith("past_"))
    weights = sum(map(_read, model.graph.initializers.values()))
    return Counted(modules.total(), weights, states, dict(modules))


def _flops(node: ir.Node) -> int:
    rule = _RULES.get((node.domain, node.op_type))
    if rule is not None:
        return rule(node)
    if node.domain or node.op_type not in _STANDARD or node.op_type in _UNKNOWN:
        kind = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        raise ExportError(
            f"cannot count the work of `{node.name}`: no rule for {kind}", hint="add one to exporters/flops.py"
        )
    return 0


def _shape(node: ir.Node, index: int) -> tuple[int, ...]:
    """Shape of an input."""
    value = node.inputs[index]
    shape = None if value is None else value.shape
    if shape is None or not all(isinstance(d, int) for d in shape):
        name = None if value is None else value.name
        raise ExportError(
            f"cannot count the work of `{node.name}`: input {index}, `{name}`, has shape {shape}",
            hint="export with static shapes",
        )
    return shape.numpy()


def _given(node: ir.Node, index: int) -> bool:
    return len(node.inputs) > index and node.inputs[index] is not None


def _attribute(node: ir.Node, name: str, default: Any) -> Any:
    found = node.attributes.get(name)
    return default if found is None else found.value


def _matmul(node: ir.Node) -> int:
    a, b = _shape(node, 0), _shape(node, 1)
    a, b = (1, *a) if len(a) == 1 else a, (*b, 1) if len(b) == 1 else b
    return 2 * prod(np.broadcast_shapes(a[:-2], b[:-2])) * a[-2] * a[-1] * b[-1]


def _gemm(node: ir.Node) -> int:
    a, b = _shape(node, 0), _shape(node, 1)
    m, k = a[::-1] if _attribute(node, "transA", 0) else a
    return 2 * m * k * (b[0] if _attribute(node, "transB", 0) else b[1])


def _conv(node: ir.Node) -> int:
    """Every output element is a product over the kernel and the input channels of its group."""
    out = node.outputs[0].shape
    if out is None or not all(isinstance(d, int) for d in out):
        raise ExportError(
            f"cannot count the work of `{node.name}`: its output has shape {out}", hint="export with static shapes"
        )
    return 2 * prod(out.numpy()) * prod(_shape(node, 1)[1:])


def _einsum(node: ir.Node) -> int:
    """Two operands: one multiply-add for every combination of all indices."""
    operands = str(_attribute(node, "equation", "")).replace(" ", "").partition("->")[0].split(",")
    if len(operands) != 2 or any("." in letters for letters in operands):
        raise ExportError(
            f"cannot count the work of `{node.name}`: Einsum of {len(operands)} operands, or with an ellipsis",
            hint="write it as MatMul",
        )
    sizes: dict[str, int] = {}
    for index, letters in enumerate(operands):
        for letter, size in zip(letters, _shape(node, index), strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    return 2 * prod(sizes.values())


def _attention(node: ir.Node) -> int:
    """Attention of the standard: [B, heads, rows, head_dim] or [B, rows, heads * head_dim]."""
    q, k, v = (_shape(node, index) for index in range(3))
    heads = _attribute(node, "q_num_heads", 0) or q[1]
    kv_heads = _attribute(node, "kv_num_heads", 0) or k[1]
    width = q[-1] + v[-1] if len(q) == 4 else q[-1] // heads + v[-1] // kv_heads
    past = _shape(node, 4)[-2] if _given(node, 4) else 0
    rows, seen = q[-2], past + k[-2]
    if _attribute(node, "is_causal", 0) and not _given(node, 3):  # the first query sees the past and the first key
        return 2 * q[0] * heads * width * pairs(rows, past + rows)
    return 2 * q[0] * heads * width * rows * seen


def _multi_head(node: ir.Node) -> int:
    """com.microsoft MultiHeadAttention over [B, rows, heads * head_dim], nothing masked."""
    q, k, v = (_shape(node, index) for index in range(3))
    if any(_given(node, index) for index in range(3, len(node.inputs))):
        raise ExportError(
            f"cannot count the work of `{node.name}`: MultiHeadAttention with more than q, k and v",
            hint="add a rule to exporters/flops.py",
        )
    return 2 * q[0] * q[1] * k[1] * (q[2] + v[2])


def _group_query(node: ir.Node) -> int:
    """com.microsoft GroupQueryAttention: causal behind the rows of the cache; the whole buffer where that varies."""
    batch, rows, width = _shape(node, 0)
    total = node.inputs[6]
    known = None if total is None or total.const_value is None else total.const_value
    seen = _shape(node, 3)[2] if known is None else int(known.numpy())
    window = max(0, _attribute(node, "local_window_size", 0))  # -1 says none
    return 4 * batch * width * pairs(rows, seen, window)


_RULES: dict[tuple[str, str], Callable[[ir.Node], int]] = {
    ("", "MatMul"): _matmul,
    ("", "MatMulInteger"): _matmul,
    ("", "Gemm"): _gemm,
    ("", "Conv"): _conv,
    ("", "Einsum"): _einsum,
    ("", "Attention"): _attention,
    (_CONTRIB, "MultiHeadAttention"): _multi_head,
    (_CONTRIB, "GroupQueryAttention"): _group_query,
}


def _bytes(value: ir.Value) -> int:
    assert value.shape is not None and value.dtype is not None
    return ceil(prod(value.shape.numpy()) * value.dtype.itemsize)


def _read(weight: ir.Value) -> int:
    """Bytes of an initializer that a call reads.

    All, or the rows taken where nothing but Gather reads it; and beside all those that are always taken, which a
    runtime keeps as a weight of its own.
    """
    readers = [use.node for use in weight.uses()]
    whole = _bytes(weight)
    taken = [node for node in readers if node.op_type == "Gather" and node.inputs[0] is weight]
    if not readers:
        return 0
    if len(taken) < len(readers):
        return whole + sum(_bytes(node.outputs[0]) for node in taken if _known(node.inputs[1]))
    return min(whole, sum(_bytes(node.outputs[0]) for node in taken))


def _known(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None
