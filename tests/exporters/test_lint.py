"""Every rule has a tiny graph that trips it, good graphs trip none; TensorRT for RTX gives a second opinion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from vlmcut.errors import ExportError
from vlmcut.exporters import trt_ops
from vlmcut.exporters.engines import build_engine
from vlmcut.exporters.lint import RULES, lint

F32, F16, I32, I64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT32, TensorProto.INT64
I8, BOOL, F64 = TensorProto.INT8, TensorProto.BOOL, TensorProto.DOUBLE
_serial = iter(range(10**9))


def info(name: str, shape: Sequence[int | str], dtype: int = F32) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> NodeProto:
    """Inputs and outputs are words; `-` is an omitted one."""
    ins, outs = (["" if w == "-" else w for w in text.split()] for text in (inputs, outputs))
    return helper.make_node(op, ins, outs, name=f"{op.lower()}_{outs[0]}", **attributes)


def const(name: str, value: Any, dtype: type = np.int64) -> TensorProto:
    return numpy_helper.from_array(np.asarray(value, dtype), name)


def model(
    nodes: list[NodeProto],
    inputs: list[ValueInfoProto],
    outputs: list[ValueInfoProto],
    constants: Sequence[TensorProto] = (),
    *,
    opset: int = 24,
) -> ModelProto:
    graph = helper.make_graph(nodes, "g", inputs, outputs, list(constants))
    opsets = [helper.make_opsetid("", opset)]
    opsets += [helper.make_opsetid(d, 1) for d in sorted({n.domain for n in nodes} - {"", "ai.onnx"})]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def unary(op: str, dtype: int = F32, shape: Sequence[int | str] | None = None, **attributes: Any) -> ModelProto:
    shape = shape or [2, 4]
    return model([node(op, "x", "y", **attributes)], [info("x", shape, dtype)], [info("y", shape, dtype)])


def attention(inputs: str = "q k v m", **attributes: Any) -> ModelProto:
    q = [1, 6, 5, 32]
    given = [info("q", q, F16), info("k", [1, 2, 9, 32], F16), info("v", [1, 2, 9, 32], F16)]
    extra = {"m": info("m", [1, 1, 5, 9], BOOL), "n": info("n", [1], I64)}
    given += [extra[n] for n in inputs.split() if n in extra]
    return model([node("Attention", inputs, "y", **{"scale": 0.18, **attributes})], given, [info("y", q, F16)])


def attention_f32() -> ModelProto:
    shape = [1, 2, 8, 32]
    inputs = [info(n, shape) for n in "qkv"]
    return model([node("Attention", "q k v", "y", scale=0.2)], inputs, [info("y", shape)])


def scatter(cache: str = "c", **attributes: Any) -> ModelProto:
    shape = [1, 2, 9, 32]
    nodes = [node("Neg", "c", "n")] if cache == "n" else []
    nodes.append(node("TensorScatter", f"{cache} u w", "y", **attributes))
    inputs = [info("c", shape, F16), info("u", [1, 2, 3, 32], F16), info("w", [1], I64)]
    return model(nodes, inputs, [info("y", shape, F16)])


def topk(k: int, n: int, **attributes: Any) -> ModelProto:
    outputs = [info("v", [1, k]), info("i", [1, k], I64)]
    return model([node("TopK", "x k", "v i", **attributes)], [info("x", [1, n])], outputs, [const("k", [k])])


def quantized(nodes: list[NodeProto], zero: int = 0, scale: float = 0.1) -> ModelProto:
    constants = [const("s", scale, np.float32), const("z", zero, np.int8), const("w", np.ones((4, 4)), np.int8)]
    return model(nodes, [info("x", [4, 4])], [info("y", [4, 4])], constants)


def bad_opset() -> ModelProto:
    return model([node("Relu", "x", "y")], [info("x", [2])], [info("y", [2])], opset=26)


def contrib() -> ModelProto:
    n = node("BiasGelu", "x x", "y")
    n.domain = "com.microsoft"
    return model([n], [info("x", [4])], [info("y", [4])])


def with_function() -> ModelProto:
    m = model([node("Relu", "x", "y")], [info("x", [4])], [info("y", [4])])
    body = [helper.make_node("Relu", ["a"], ["b"])]
    m.functions.append(helper.make_function("here", "Twice", ["a"], ["b"], body, [helper.make_opsetid("", 24)]))
    m.opset_import.append(helper.make_opsetid("here", 1))
    return m


def external(**told: str) -> ModelProto:
    m = model([node("Add", "x w", "y")], [info("x", [4])], [info("y", [4])], [const("w", [1] * 4, np.float32)])
    w = m.graph.initializer[0]
    w.ClearField("raw_data")
    w.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "m.data", "offset": "0", "length": "16", **told}.items():
        w.external_data.add(key=key, value=value)
    return m


def unnamed() -> ModelProto:
    m = unary("Relu")
    m.graph.node[0].name = ""
    return m


def nested(depth: int) -> ModelProto:
    graph = helper.make_graph([node("Relu", "x", "y0")], "deepest", [], [info("y0", [2])])
    for i in range(1, depth + 1):
        other = helper.make_graph([node("Neg", "x", f"n{i}")], f"else{i}", [], [info(f"n{i}", [2])])
        step = node("If", "c", f"y{i}", then_branch=graph, else_branch=other)
        graph = helper.make_graph([step], f"then{i}", [], [info(f"y{i}", [2])])
    inputs = [info("x", [2])]
    return model(list(graph.node), inputs, list(graph.output), [const("c", True, np.bool_)])


def a_sequence() -> ModelProto:
    kind = helper.make_tensor_sequence_value_info("y", F32, [2])
    return model([node("SequenceConstruct", "x", "y")], [info("x", [2])], [kind])


def zero_operand() -> ModelProto:
    empty = const("e", np.zeros((0, 4)), np.float32)
    return model([node("Concat", "x e", "y", axis=0)], [info("x", [2, 4])], [info("y", [2, 4])], [empty])


def runtime_reshape() -> ModelProto:
    return model([node("Reshape", "x s", "y")], [info("x", [2, 4]), info("s", [1], I64)], [info("y", [8])])


def lost_shape() -> ModelProto:
    nodes = [node("Reshape", "x s", "r"), node("ReduceSum", "r", "y", keepdims=0)]
    return model(nodes, [info("x", [2, 4]), info("s", [1], I64)], [info("y", [])])


def conditional() -> ModelProto:
    then = helper.make_graph([node("Relu", "x", "a")], "t", [], [info("a", [2])])
    other = helper.make_graph([node("Neg", "x", "b")], "e", [], [info("b", [2])])
    step = node("If", "c", "y", then_branch=then, else_branch=other)
    return model([step], [info("c", [], BOOL), info("x", [2])], [info("y", [2])])


def looped() -> ModelProto:
    ins = [info("i", [], I64), info("go", [], BOOL), info("h", [2])]
    nodes = [node("Identity", "go", "on"), node("Neg", "h", "g")]
    body = helper.make_graph(nodes, "b", ins, [info("on", [], BOOL), info("g", [2])])
    constants = [const("n", 3), const("t", True, np.bool_)]
    return model([node("Loop", "n t x", "y", body=body)], [info("x", [2])], [info("y", [2])], constants)


def binary(op: str, a: int, b: int, **attributes: Any) -> ModelProto:
    return model([node(op, "x z", "y", **attributes)], [info("x", [4], a), info("z", [4], b)], [info("y", [4], a)])


def mask_fill() -> ModelProto:
    nodes = [node("Cast", "m", "h", to=F16), node("Add", "x h", "y")]
    return model(nodes, [info("x", [4], F16)], [info("y", [4], F16)], [const("m", [-3.4e38] * 4, np.float32)])


def cache_read_late() -> ModelProto:
    m = scatter(axis=-2)
    m.graph.node.append(node("Neg", "c", "z"))
    m.graph.output.append(info("z", [1, 2, 9, 32], F16))
    return m


def scatter_add() -> ModelProto:
    inputs = [info("x", [4]), info("i", [2, 1], I64), info("u", [2])]
    return model([node("ScatterND", "x i u", "y", reduction="add")], inputs, [info("y", [4])])


def passthrough() -> ModelProto:
    return model([node("Relu", "x", "y")], [info("x", [4])], [info("x", [4]), info("y", [4])])


def norm(scale: int, outputs: str = "y") -> ModelProto:
    given = [info("x", [2, 4], F16), info("s", [4], scale)]
    return model([node("LayerNormalization", "x s", outputs)], given, [info("y", [2, 4], F16)])


Q, DQ = node("QuantizeLinear", "x s z", "q"), node("DequantizeLinear", "q s z", "y")

# rule -> graphs that must trip it, with what TensorRT for RTX says: True builds, False refuses, None not asked.
BAD: dict[str, list[tuple[Callable[[], ModelProto], bool | None]]] = {
    "TRT001": [(lambda: unary("Det", shape=[2, 2]), False), (lambda: binary("BitwiseAnd", I32, I32), False)],
    "TRT002": [(bad_opset, True)],
    "TRT003": [(contrib, None)],
    "TRT004": [(with_function, True)],
    "TRT006": [
        (lambda: external(location="../m.data"), None),
        (lambda: external(location="/m.data"), None),
        (lambda: external(location="C:\\m.data"), None),
        (lambda: external(location="absent.data"), False),
        (lambda: external(length="12"), None),
        (lambda: external(offset="8"), False),
        (lambda: external(basepath="x"), None),
    ],
    "TRT009": [(unnamed, True)],
    "TRT010": [
        (lambda: norm(F16, "y m"), False),
        (lambda: model([node("Split", "x", "y -", num_outputs=2)], [info("x", [2])], [info("y", [1])]), False),
    ],
    "TRT012": [(passthrough, True)],
    "TRT013": [(lambda: unary("Relu", shape=[1] * 9), False), (lambda: nested(25), None)],
    "TRT014": [(a_sequence, False), (lambda: model([node("Cast", "w", "y", to=F32)], [], [info("y", [2])],
                                                   [const("w", [1, 2], np.uint16)]), False)],
    "TRT015": [(lambda: unary("Relu", nonsense=1), None)],
    "TRT016": [(zero_operand, True)],
    "TRT101": [(lambda: unary("Relu", shape=["n", 4]), False)],
    "TRT102": [(lost_shape, False)],
    "TRT103": [(runtime_reshape, False)],
    "TRT104": [(lambda: model([node("NonZero", "x", "y")], [info("x", [4])], [info("y", [1, "n"], I64)]), False)],
    "TRT105": [(conditional, True)],
    "TRT106": [(looped, True)],
    "TRT201": [(lambda: unary("Relu", F64), True), (lambda: unary("Abs", TensorProto.INT16), False)],
    "TRT202": [(lambda: binary("Add", F32, F16), False), (lambda: binary("Mul", I64, I32), False)],
    "TRT203": [
        (lambda: unary("Relu", I32), False),
        (lambda: unary("HardSwish", TensorProto.BFLOAT16), False),
        (attention_f32, False),
    ],
    "TRT205": [(lambda: norm(F32), False)],
    "TRT208": [(mask_fill, True), (lambda: unary("ReduceL2", F16, keepdims=1), None)],
    "TRT301": [(lambda: topk(3841, 4000), False)],
    "TRT302": [(lambda: topk(3, 9, sorted=0), True)],
    "TRT303": [
        (lambda: attention(softcap=30.0), False),
        (lambda: attention("q k v m - - n"), True),  # builds, and computes without the length
        (lambda: attention("q k v m", is_causal=1), False),
        (lambda: attention("q k v m", scale=-1.0), None),
    ],
    "TRT304": [(lambda: attention("q k v", is_causal=1), True)],  # builds, aligned to the wrong corner
    "TRT306": [(lambda: scatter("n", axis=-2), False), (lambda: scatter(mode="circular"), False),
               (lambda: scatter(axis=3), None)],
    "TRT307": [(cache_read_late, True)],
    "TRT309": [(scatter_add, False)],
    "TRT401": [(lambda: quantized([node("Transpose", "w", "t"), node("DequantizeLinear", "t s z", "d"),
                                   node("MatMul", "x d", "y")]), False)],
    "TRT402": [(lambda: quantized([Q, node("Neg", "q", "n"), node("DequantizeLinear", "n s z", "y")]), True),
               (lambda: quantized([Q, node("MatMul", "q w", "y")]), False)],
    "TRT403": [(lambda: quantized([Q, DQ], zero=1), False), (lambda: quantized([Q, DQ], scale=-0.1), None)],
    "TRT501": [(lambda: unary("Swish", F16), None)],
}  # fmt: skip


def edited(m: ModelProto, **fields: Any) -> ModelProto:
    """Change fields of the first node."""
    for key, value in fields.items():
        if isinstance(value, str):
            setattr(m.graph.node[0], key, value)
        else:
            del getattr(m.graph.node[0], key)[:]
            getattr(m.graph.node[0], key).extend(value)
    return m


def two_opsets() -> ModelProto:
    m = unary("Relu")
    m.opset_import.append(helper.make_opsetid("ai.onnx", 23))
    return m


def named_twice(first: str, second: str) -> ModelProto:
    m = model([node("Neg", "x", first), node("Abs", first, second)], [info("x", [4])], [info(second, [4])])
    for n in m.graph.node:
        n.name = "same" if first != "_" else n.op_type
    return m


def attends(q: list[int], k: list[int], v: list[int], **attributes: Any) -> ModelProto:
    inputs = [info("q", q, F16), info("k", k, F16), info("v", v, F16)]
    return model([node("Attention", "q k v", "y", **{"scale": 0.2, **attributes})], inputs, [info("y", q, F16)])


def attends_in_if() -> ModelProto:
    shape = [1, 2, 4, 32]
    then = helper.make_graph([node("Attention", "q k v", "a", scale=0.2)], "t", [], [info("a", shape, F16)])
    other = helper.make_graph([node("Identity", "q", "b")], "e", [], [info("b", shape, F16)])
    inputs = [info("c", [], BOOL), *(info(n, shape, F16) for n in "qkv")]
    return model([node("If", "c", "y", then_branch=then, else_branch=other)], inputs, [info("y", shape, F16)])


def initializer_out() -> ModelProto:
    w = const("w", 1, np.float32)
    return model([node("Relu", "x", "y")], [info("x", [2])], [info("y", [2]), info("w", [])], [w])


def scatters_inside() -> ModelProto:
    m = scatter(axis=-2)
    m.graph.node.append(node("Neg", "y", "z"))
    m.graph.output[0].name = "z"
    return m


def scatters_rank3() -> ModelProto:
    inputs = [info("c", [2, 9, 32], F16), info("u", [2, 3, 32], F16)]
    return model([node("TensorScatter", "c u", "y", axis=-2)], inputs, [info("y", [2, 9, 32], F16)])


def scatter_large() -> ModelProto:
    inputs = [info("x", [1, 4]), info("i", [2, 4], I64), info("u", [2, 4])]
    return model([node("ScatterElements", "x i u", "y")], inputs, [info("y", [1, 4])])


def tiny_epsilon() -> ModelProto:
    inputs = [info("x", [2, 4], F16), info("s", [4], F16)]
    return model([node("LayerNormalization", "x s", "y", epsilon=1e-9)], inputs, [info("y", [2, 4], F16)])


def asymmetric() -> ModelProto:
    constants = [const("s", 0.1, np.float32), const("z", 0, np.uint8)]
    return model([Q, DQ], [info("x", [4])], [info("y", [4])], constants)


KV = [1, 2, 4, 32]
# Further guards of rules with several: the graph, and words that its finding must hold.
GUARDS: list[tuple[str, Callable[[], ModelProto], str]] = [
    ("TRT002", two_opsets, "[23, 24]"),
    ("TRT009", lambda: named_twice("a", "b"), "2 nodes"),
    ("TRT009", lambda: named_twice("_", "b"), "`_`"),
    ("TRT009", lambda: named_twice("a", "a"), "defined 2 times"),
    ("TRT010", lambda: edited(topk(3, 9), output=["v"]), "1 of 2"),
    ("TRT012", initializer_out, "initializer"),
    ("TRT208", tiny_epsilon, "epsilon 1e-09"),
    ("TRT302", lambda: model([node("TopK", "x k", "v i")], [info("x", [9]), info("k", [1], I64)],
                             [info("v", ["k"]), info("i", ["k"], I64)]), "takes K from `k`"),
    ("TRT303", lambda: attends(KV, KV, KV, scale=0.0), "scale=0"),
    ("TRT303", lambda: edited(attends(KV, KV, KV), attribute=[]), "no scale"),
    ("TRT303", lambda: edited(attends(KV, KV, KV), output=["y", "pk", "pv"]), "3 outputs"),
    ("TRT303", lambda: attention("q k v m k v"), "past_key"),
    ("TRT303", lambda: edited(attends(KV, KV, KV), input=["q", "q", "v"]), "as Q and as K"),
    ("TRT303", lambda: attends(KV, KV, [1, 2, 4, 16]), "[1, 2, 4, 16]"),
    ("TRT303", lambda: attends([1, 3, 4, 32], KV, KV), "3 query heads"),
    ("TRT303", lambda: attends(*[[1, 2, 4, 320]] * 3), "320, at most 256"),
    ("TRT303", lambda: attends(*[[1, 4, 64]] * 3, q_num_heads=2, kv_num_heads=2), "rank 3"),
    ("TRT303", attends_in_if, "inside If"),
    ("TRT306", scatters_inside, "not a graph output"),
    ("TRT306", scatters_rank3, "rank 3"),
    ("TRT309", scatter_large, "[2, 4]"),
    ("TRT403", asymmetric, "UINT8"),
]  # fmt: skip
UNTESTED_BY_FILE = {"TRT005"}  # needs a gigabyte; has a test of its own


def save(m: ModelProto, folder: Path) -> Path:
    path = folder / f"m{next(_serial)}.onnx"
    onnx.save(m, path)
    (folder / "m.data").write_bytes(bytes(16))
    return path


CASES = [pytest.param(rule, make, says, id=f"{rule}-{i}") for rule, all_ in BAD.items()
         for i, (make, says) in enumerate(all_)]  # fmt: skip


def test_every_rule_has_a_graph_that_trips_it() -> None:
    assert BAD.keys() | UNTESTED_BY_FILE == RULES.keys()


@pytest.mark.parametrize(("rule", "make", "rtx"), CASES)
def test_bad_graph_trips_its_rule(rule: str, make: Callable[[], ModelProto], rtx: bool | None, tmp_path: Path) -> None:
    found = [f for f in lint(save(make(), tmp_path), "trt") if f.rule == rule]
    assert found, f"{rule} found nothing"
    assert all(f.node and f.message and f.fix and f.severity == RULES[rule][0] for f in found)


@pytest.mark.parametrize(("rule", "make", "words"), GUARDS, ids=[f"{r}-{w}" for r, _, w in GUARDS])
def test_every_guard_of_a_rule_is_tripped(
    rule: str, make: Callable[[], ModelProto], words: str, tmp_path: Path
) -> None:
    messages = [f.message for f in lint(save(make(), tmp_path), "trt") if f.rule == rule]
    assert any(words in m for m in messages), messages


def test_finding_names_node_numbers_and_fix(tmp_path: Path) -> None:
    (found,) = lint(save(topk(3841, 4000), tmp_path), "rtx")
    assert (found.rule, found.severity, found.node) == ("TRT301", "error", "topk_v")
    assert "3841" in found.message and "3840" in found.message and found.fix


def test_profiles_differ_where_the_importers_do(tmp_path: Path) -> None:
    path = save(unary("Swish", F16), tmp_path)
    assert [f.rule for f in lint(path, "trt")] == ["TRT501"]
    assert lint(path, "rtx") == []


def test_large_embedded_weights_are_told_without_reading_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmcut.exporters.lint.MIB", 16)  # the limit of 1024 MiB becomes 16 KiB
    w = const("w", np.zeros((64, 128)), np.float32)
    m = model([node("MatMul", "x w", "y")], [info("x", [2, 64])], [info("y", [2, 128])], [w])
    assert [f.rule for f in lint(save(m, tmp_path), "trt")] == ["TRT005"]


def test_lint_refuses_what_it_cannot_read(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("not a graph")
    for path, profile in (("text.onnx", "trt"), ("absent.onnx", "trt"), ("text.onnx", "trt-9")):
        with pytest.raises(ExportError) as caught:
            lint(tmp_path / path, profile)
        assert caught.value.hint


def decoder_block(dtype: type, *, native: bool) -> ModelProto:
    """One attention block with a cache of 24 slots, 6 query and 2 key heads of 32, 5 new tokens.

    native: RMSNormalization, RotaryEmbedding, TensorScatter, Attention; else the same from basic operators, with a
    cache selected by Where and double-buffered, as importers before 10.14 need it.
    """
    rng = np.random.default_rng(0)
    t = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    s, heads, kv, d, slots, width = 5, 6, 2, 32, 24, 96

    def weight(name: str, *shape: int) -> TensorProto:
        return const(name, rng.standard_normal(shape) * 0.05, dtype)

    constants = [
        const("gamma", np.ones(width), dtype), weight("wq", width, heads * d), weight("wk", width, kv * d),
        weight("wv", width, kv * d), weight("wo", heads * d, width), weight("cos", 64, d // 2),
        weight("sin", 64, d // 2), const("iota", np.arange(slots).reshape(1, 1, 1, slots)),
        const("to_q", [1, s, heads, d]), const("to_kv", [1, s, kv, d]), const("to_o", [1, s, heads * d]),
        const("to_slot", [1, 1, s, 1]),
    ]  # fmt: skip
    cache = [1, kv, slots, d]
    inputs = [info("x", [1, s, width], t), info("position_ids", [1, s], I64), info("slots", [1, s], I64)]
    inputs += [info("write_indices", [1], I64)] if native else [info("fresh", [1, 1, slots, s], t)]
    inputs += [info("past_k", cache, t), info("past_v", cache, t)]
    outputs = [info("y", [1, s, width], t), info("present_k", cache, t), info("present_v", cache, t)]
    nodes = [node("Reshape", "slots to_slot", "slot"), node("LessOrEqual", "iota slot", "mask")]
    if native:
        nodes.append(node("RMSNormalization", "x gamma", "h", axis=-1, epsilon=1e-5))
    else:
        constants += [const("eps", 1e-5, dtype), const("last", [-1]), const("scale", d**-0.5, dtype),
                      const("no", -6e4, dtype), const("group", [1, kv, heads // kv, s, d]), const("zero", 0, dtype),
                      const("flat", [1, heads, s, d]), const("kv_axis", [2])]  # fmt: skip
        nodes += [node("Mul", "x x", "xx"), node("ReduceMean", "xx last", "ms", keepdims=1),
                  node("Add", "ms eps", "me"), node("Sqrt", "me", "rms"), node("Div", "x rms", "xn"),
                  node("Mul", "xn gamma", "h")]  # fmt: skip
    for n, shape in (("q", "to_q"), ("k", "to_kv"), ("v", "to_kv")):
        nodes += [node("MatMul", f"h w{n}", f"{n}2"), node("Reshape", f"{n}2 {shape}", f"{n}3"),
                  node("Transpose", f"{n}3", f"{n}4", perm=[0, 2, 1, 3])]  # fmt: skip
    if native:
        for n in "qk":
            nodes.append(node("RotaryEmbedding", f"{n}4 cos sin position_ids", f"{n}r"))
        nodes += [node("TensorScatter", "past_k kr write_indices", "present_k", axis=-2),
                  node("TensorScatter", "past_v v4 write_indices", "present_v", axis=-2),
                  node("Attention", "qr present_k present_v mask", "a", scale=d**-0.5)]  # fmt: skip
    else:
        constants += [const("halves", [d // 2, d // 2]), const("heads_axis", [1])]
        nodes += [node("Gather", f"{n} position_ids", f"{n}g", axis=0) for n in ("cos", "sin")]
        nodes += [node("Unsqueeze", f"{n}g heads_axis", f"{n}h") for n in ("cos", "sin")]
        for n in "qk":
            nodes += [node("Split", f"{n}4 halves", f"{n}a {n}b", axis=-1),
                      node("Mul", f"{n}a cosh", f"{n}ac"), node("Mul", f"{n}b sinh", f"{n}bs"),
                      node("Sub", f"{n}ac {n}bs", f"{n}lo"), node("Mul", f"{n}b cosh", f"{n}bc"),
                      node("Mul", f"{n}a sinh", f"{n}as"), node("Add", f"{n}bc {n}as", f"{n}hi"),
                      node("Concat", f"{n}lo {n}hi", f"{n}r", axis=-1)]  # fmt: skip
        nodes += [node("ReduceMax", "fresh last", "taken", keepdims=1), node("Greater", "taken zero", "is_fresh")]
        for n, new in (("k", "kr"), ("v", "v4")):
            nodes += [node("MatMul", f"fresh {new}", f"{n}p"), node("Where", f"is_fresh {n}p past_{n}", f"present_{n}"),
                      node("Unsqueeze", f"present_{n} kv_axis", f"{n}u")]  # fmt: skip
        nodes += [node("Reshape", "qr group", "qg"), node("Transpose", "ku", "kt", perm=[0, 1, 2, 4, 3]),
                  node("MatMul", "qg kt", "raw"), node("Mul", "raw scale", "scores"),
                  node("Unsqueeze", "mask kv_axis", "mask5"), node("Where", "mask5 scores no", "masked"),
                  node("Softmax", "masked", "p", axis=-1), node("MatMul", "p vu", "ag"),
                  node("Reshape", "ag flat", "a")]  # fmt: skip
    nodes += [node("Transpose", "a", "at", perm=[0, 2, 1, 3]), node("Reshape", "at to_o", "ao"),
              node("MatMul", "ao wo", "o"), node("Add", "x o", "y")]  # fmt: skip
    return model(nodes, inputs, outputs, constants)


GOOD = {
    "block-f16-native": lambda: decoder_block(np.float16, native=True),
    "block-f32-basic": lambda: decoder_block(np.float32, native=False),
    "topk": lambda: topk(144, 577),
    "quantized": lambda: quantized([Q, DQ]),
    "attention": attention,
}


@pytest.mark.parametrize("profile", trt_ops.PROFILES)
@pytest.mark.parametrize("make", GOOD.values(), ids=GOOD.keys())
def test_good_graph_has_no_finding(make: Callable[[], ModelProto], profile: str, tmp_path: Path) -> None:
    assert lint(save(make(), tmp_path), profile) == []


def test_good_graph_with_external_weights_has_no_finding(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    m = decoder_block(np.float16, native=True)
    onnx.save(m, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert lint(path, "trt") == []
    (tmp_path / "weights.bin").write_bytes(bytes(100))  # negative control
    assert {f.rule for f in lint(path, "trt")} >= {"TRT006"}


def builds(path: Path) -> bool:
    try:
        build_engine(path, path.with_suffix(".plan"), "rtx", compute_capabilities=["86"])
    except ExportError:
        return False
    return True


@pytest.mark.parametrize("make", GOOD.values(), ids=GOOD.keys())
def test_rtx_builds_what_lint_accepts(make: Callable[[], ModelProto], tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT for RTX (pip install tensorrt_rtx; no GPU)")
    assert builds(save(make(), tmp_path))


@pytest.mark.parametrize(("rule", "make", "rtx"), [c for c in CASES if c.values[2] is not None])
def test_rtx_says_of_bad_graphs_what_we_noted(
    rule: str, make: Callable[[], ModelProto], rtx: bool, tmp_path: Path
) -> None:
    """Where RTX builds a refused graph, the rule guards results, other importers or traceability, not the build."""
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT for RTX (pip install tensorrt_rtx; no GPU)")
    assert builds(save(make(), tmp_path)) is rtx
