"""Lint rules about one operator at a time: dtypes, forms that the importer refuses or ignores, quantization.

Each rule yields (node, message, fix) per fault; `lint.RULES` gives it its id and severity.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from . import trt_ops as trt
from .trt_graph import Graph, Node

Fault = tuple[str, str, str]  # node or tensor, message, fix


# --- dtypes: TensorRT takes them as written and inserts no cast ---


def no_such_dtype(graph: Graph) -> Iterator[Fault]:
    for name, dtype in graph.dtypes.items():
        if dtype in trt.NO_TENSOR and not (name in graph.constant_dtypes and dtype in trt.NO_INITIALIZER):
            effect = "is narrowed to float32" if dtype == "DOUBLE" else "does not exist in TensorRT"
            yield graph.blame(name), f"`{name}` is {dtype}, which {effect}", "cast it to FLOAT or INT64"


def mixed_dtypes(graph: Graph) -> Iterator[Fault]:
    for node in graph.nodes:
        if node.op in trt.SAME_DTYPE:
            picked = trt.SAME_DTYPE[node.op] or range(len(node.inputs))
            seen = {n: graph.dtypes[n] for i in picked if (n := node.input(i)) in graph.dtypes}
            if len(set(seen.values())) > 1:
                yield node.name, f"{node.op} mixes {_pairs(seen)}", "insert Cast at the cheaper side"


def refused_dtype(graph: Graph) -> Iterator[Fault]:
    for node in graph.nodes:
        op = trt.OPS.get(node.op)
        if op is None or not op.dtypes:
            continue
        data = node.outputs[0] if node.op in trt.TYPED_BY_OUTPUT else node.input(trt.DATA_OPERAND.get(node.op, 0))
        for name in (data, node.outputs[0]) if node.op == "Cast" else (data,):
            dtype = graph.dtypes.get(name, "")
            outside = name in graph.inputs or name in graph.outputs
            moved = node.op in trt.MOVES_DATA and dtype in trt.QUANTIZED  # TRT401 and TRT402 look after these
            if dtype and dtype not in op.dtypes and not moved and not (dtype == "UINT8" and outside):
                yield node.name, f"{node.op} of {dtype} `{name}`; it takes {', '.join(sorted(op.dtypes))}", op.fix


def operand_dtype(graph: Graph) -> Iterator[Fault]:
    for node in graph.nodes:
        like = {i: () for i in trt.OPERANDS_LIKE_X.get(node.op, ())}
        if node.op == "Attention":
            like = {1: (), 2: (), 3: ("BOOL",)}
        x = graph.dtypes.get(node.input(0))
        for i, also in like.items():
            name = node.input(i)
            if x and graph.dtypes.get(name, x) not in (x, *also):
                text = f"{node.op}: `{name}` is {graph.dtypes[name]}, but `{node.input(0)}` is {x}"
                yield node.name, text, "cast the constant" if name in graph.constants else "insert Cast"


def half_range(graph: Graph) -> Iterator[Fault]:
    """Weights are not searched: constants up to `trt_graph.SMALL_BYTES` only."""
    for node in graph.nodes:
        halves = graph.dtypes.get(node.input(0)) == "FLOAT16"
        into_half = node.op == "Cast" and graph.dtypes.get(node.outputs[0]) == "FLOAT16"
        for name in node.inputs:
            value = graph.value(name) if into_half or graph.dtypes.get(name) == "FLOAT16" else None
            if value is not None and value.size and not np.all(np.abs(value.astype(np.float64)) <= 65504):
                text = f"`{name}` reaches {np.max(np.abs(value.astype(np.float64)))}, float16 ends at 65504"
                yield node.name, text, "fill masks with -6.0e4, or use a BOOL mask"
        epsilon = node.attributes.get("epsilon")
        if halves and epsilon is not None and epsilon < 6e-8 and node.attributes.get("stash_type") != 1:
            yield node.name, f"epsilon {epsilon:g} is 0 in float16, which starts at 6e-8", "normalise in float32"
        if halves and node.op in ("ReduceL2", "ReduceSumSquare"):
            yield node.name, f"{node.op} adds squares in float16: overflow above 65504", "cast to float32 before it"


# --- operators ---


def topk_size(graph: Graph) -> Iterator[Fault]:
    for node in graph.nodes:
        k = graph.value(node.input(1)) if node.op == "TopK" else None
        if k is not None and k.size == 1 and k.item() > trt.TOPK_MAX_K:
            text = f"TopK of K={k.item()}, at most {trt.TOPK_MAX_K}"
            yield node.name, text, "select what to drop when that is fewer, or rank in tiles and merge"


def topk_form(graph: Graph) -> Iterator[Fault]:
    for node in graph.nodes:
        if node.op == "TopK":
            if not node.attributes.get("sorted", 1):
                yield node.name, "TopK with sorted=0", "set sorted=1"
            if graph.value(node.input(1)) is None:
                yield node.name, f"TopK takes K from `{node.input(1)}`, not a constant", "fold K into a constant"


def attention_form(graph: Graph) -> Iterator[Fault]:
    for node in graph.nodes:
        if node.op == "Attention":
            yield from ((node.name, *fault) for fault in _attention(graph, node))


def _attention(graph: Graph, node: Node) -> Iterator[tuple[str, str]]:
    decompose, explicit = "write MatMul, Softmax, MatMul", "say it in the BOOL mask"
    a = node.attributes
    if sum(map(bool, node.outputs)) > 1:
        yield f"Attention with {len(node.outputs)} outputs, the importer gives 1", decompose
    if node.input(4) or node.input(5):
        yield "Attention with past_key and past_value is refused", "update the cache with TensorScatter"
    if node.input(6):
        yield f"Attention ignores nonpad_kv_seqlen (`{node.input(6)}`)", explicit
    harmless = {"scale", "is_causal", "q_num_heads", "kv_num_heads"}
    for name in sorted(a.keys() - harmless):
        if a[name] != 0:
            yield f"Attention refuses or ignores {name}={a[name]}", decompose if "soft" in name else explicit
    if a.get("scale", 0.0) <= 0:
        text = f"scale={a['scale']:g}: its square root is taken" if "scale" in a else "no scale: sqrt(D) at run time"
        yield f"Attention with {text}", "set scale = 1/sqrt(head_dim)"
    if node.input(3) and a.get("is_causal"):
        yield "Attention with a mask and is_causal=1 is refused", explicit
    if node.input(0) == node.input(1) and node.input(0) in graph.inputs:
        yield f"Attention takes graph input `{node.input(0)}` as Q and as K: RTX 1.7 crashes", "insert Identity"
    if "If" in node.parents:
        yield "Attention inside If does not build", "move it out"
    q, k, v, mask = (graph.shapes.get(node.input(i)) for i in range(4))
    for i, shape in enumerate((q, k, v, mask)):
        if shape is not None and len(shape) != 4:
            yield f"Attention: `{node.input(i)}` has rank {len(shape)}, not 4", "reshape to [B, heads, S, head_dim]"
    if k and v and k != v:
        yield f"Attention: K is {list(k)}, V is {list(v)}", "pad V, or " + decompose
    if q and k and len(q) == len(k) == 4 and k[1] > 0 and q[1] % k[1]:
        yield f"Attention: {q[1]} query heads do not divide into {k[1]} key heads", "repeat keys"
    if q and len(q) == 4 and q[3] > trt.ATTENTION_MAX_HEAD_DIM:
        yield f"Attention: head_dim {q[3]}, at most {trt.ATTENTION_MAX_HEAD_DIM}", decompose


def causal_corner(graph: Graph) -> Iterator[Fault]:
    for node in graph.nodes:
        if node.op == "Attention" and node.attributes.get("is_causal"):
            q, k = graph.shapes.get(node.input(0)), graph.shapes.get(node.input(1))
            if q and k and q[-2] != k[-2]:
                text = f"is_causal=1 aligns the upper left corner, but there are {q[-2]} queries and {k[-2]} keys"
                yield node.name, text, "give an explicit BOOL mask"


def scatter_form(graph: Graph) -> Iterator[Fault]:
    for node in graph.nodes:
        if node.op == "TensorScatter":
            cache, axis = node.input(0), node.attributes.get("axis", -2)
            shape = graph.shapes.get(cache)
            if shape is not None and len(shape) != 4:
                yield node.name, f"cache `{cache}` has rank {len(shape)}, not 4", "use [B, heads, S, head_dim]"
            if axis not in (-2, 2):
                yield node.name, f"TensorScatter on axis {axis}, not -2", "transpose the cache"
            if node.attributes.get("mode", b"linear") != b"linear":
                yield node.name, "TensorScatter with mode=circular", "use linear mode and a longer cache"
            if cache not in graph.inputs:
                yield node.name, f"cache `{cache}` is not a graph input", "make it one"
            if node.outputs[0] not in graph.outputs:
                yield node.name, f"updated cache `{node.outputs[0]}` is not a graph output", "make it one"


def cache_alias(graph: Graph) -> Iterator[Fault]:
    for node in graph.nodes:
        cache = node.input(0)
        for other, _ in graph.consumers.get(cache, []) if node.op == "TensorScatter" else []:
            if other is not node:
                text = f"updates `{cache}` in place, and `{other.name}` ({other.op}) takes it too"
                yield node.name, text, f"let `{other.name}` take `{node.outputs[0]}`"


def scatter_reduction(graph: Graph) -> Iterator[Fault]:
    for node in graph.nodes:
        if node.op in ("ScatterND", "ScatterElements"):
            how = node.attributes.get("reduction", b"none").decode()
            if how != "none":
                yield node.name, f"{node.op} with reduction={how} needs a plugin", "use a one-hot MatMul"
            data, index = graph.shapes.get(node.input(0)), graph.shapes.get(node.input(1))
            if node.op == "ScatterElements" and data and index and any(map(int.__gt__, index, data)):
                yield node.name, f"indices {list(index)} are larger than data {list(data)}", "pad the data"


# --- quantization ---


def quantized_constant(graph: Graph) -> Iterator[Fault]:
    for name, dtype in graph.constant_dtypes.items():
        for node, _ in graph.consumers.get(name, []) if dtype in trt.QUANTIZED else []:
            if node.op not in ("DequantizeLinear", "QuantizeLinear"):
                yield node.name, f"{node.op} takes the {dtype} constant `{name}`", "put DequantizeLinear behind it"


def quantized_edge(graph: Graph) -> Iterator[Fault]:
    for node in graph.nodes:
        todo = [node.outputs[0]] if node.op == "QuantizeLinear" else []
        while todo:
            name = todo.pop()
            for user, _ in graph.consumers.get(name, []):
                if user.op in trt.MOVES_DATA:
                    todo += user.outputs
                elif user.op != "DequantizeLinear":
                    text = f"`{name}` goes to {user.op} `{user.name}` while quantized"
                    yield node.name, text, "put DequantizeLinear between them"


def scale_and_zero(graph: Graph) -> Iterator[Fault]:
    for node in graph.nodes:
        if node.op not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        scale, zero = graph.value(node.input(1)), graph.value(node.input(2))
        kinds = {graph.dtypes.get(n) for n in (node.input(2), node.input(0), node.outputs[0])} & {"UINT8", "UINT4"}
        if kinds:
            yield node.name, f"{node.op} with {', '.join(sorted(map(str, kinds)))}", "re-quantize to a signed dtype"
        if zero is not None and np.any(zero.astype(np.float32) != 0):
            yield node.name, f"zero point up to {np.max(np.abs(zero.astype(np.float32))):g}", "quantize symmetrically"
        if scale is not None and scale.size:
            s = scale.astype(np.float64)
            if not np.all((s > 0) & np.isfinite(s)):
                yield node.name, f"scale from {s.min():g} to {s.max():g}", "clamp to a positive normal number"


def _pairs(seen: dict[str, str]) -> str:
    return ", ".join(f"{dtype} `{name}`" for name, dtype in seen.items())
