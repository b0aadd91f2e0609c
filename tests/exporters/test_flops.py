"""Work counted in graphs: every operator by hand, then whole exports against their prediction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from vlmcut.errors import ExportError
from vlmcut.exporters.flops import count
from vlmcut.exporters.operators import Contrib, Standard, for_target
from vlmcut.manifest import read
from vlmcut.surgery.costs import predict
from vlmcut.surgery.load import describe
from vlmcut.validation import report

MS = "com.microsoft"


def value(name: str, shape: Any, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    return ir.Value(name=name, shape=None if shape is None else ir.Shape(shape), type=ir.TensorType(dtype))


def weight(name: str, array: np.ndarray) -> ir.Value:
    return ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        const_value=ir.Tensor(array, name=name),
    )  # fmt: skip


def graph(
    op: str,
    inputs: list[Any],
    out: Any = (1,),
    attributes: dict[str, Any] | None = None,
    domain: str = "",
    name: str = "model.block/Op_0",
) -> ir.Model:
    """One node; inputs are shapes, None, or values."""
    values = [
        x if isinstance(x, ir.Value) or x is None else value(f"x{i}", None if x == "?" else x)
        for i, x in enumerate(inputs)
    ]
    node = ir.node(op, values, attributes or {}, domain=domain, name=name, outputs=[value("out", out)])
    weights = [v for v in values if v is not None and v.const_value is not None]
    given = [v for v in values if v is not None and v.const_value is None]
    made = ir.Graph(given, node.outputs, nodes=[node], initializers=weights, opset_imports={"": 24}, name="g")
    return ir.Model(made, ir_version=10)


Q, KV = (1, 6, 5, 8), (1, 2, 5, 8)  # six query heads on two key-value heads, five rows of eight
BY_HAND: dict[str, tuple[ir.Model, int]] = {
    "matrix": (graph("MatMul", [(3, 5), (5, 7)]), 2 * 3 * 5 * 7),
    "batched, spread": (graph("MatMul", [(4, 1, 3, 5), (2, 5, 7)]), 4 * 2 * 2 * 3 * 5 * 7),
    "vector": (graph("MatMul", [(5,), (5, 7)]), 2 * 5 * 7),
    "int8": (graph("MatMulInteger", [(1, 3, 5), (5, 7), ()]), 2 * 3 * 5 * 7),
    "gemm": (graph("Gemm", [(3, 5), (5, 7), (7,)]), 2 * 3 * 5 * 7),
    "gemm, both turned": (graph("Gemm", [(5, 3), (7, 5)], attributes={"transA": 1, "transB": 1}), 2 * 3 * 5 * 7),
    "convolution": (graph("Conv", [(1, 3, 8, 8), (16, 3, 4, 4)], (1, 16, 2, 2)), 2 * 16 * 2 * 2 * 3 * 4 * 4),
    "depthwise": (graph("Conv", [(1, 6, 10), (6, 1, 3)], (1, 6, 8), {"group": 6}), 2 * 6 * 8 * 3),
    "einsum": (graph("Einsum", [(2, 3, 5), (5, 7)], attributes={"equation": "bij, jk -> bik"}), 2 * 2 * 3 * 5 * 7),
    "attention": (graph("Attention", [Q, KV, KV]), 6 * 5 * 5 * (2 * 8 + 2 * 8)),
    "attention, causal": (graph("Attention", [Q, KV, KV], attributes={"is_causal": 1}), 6 * 15 * 32),
    "attention, masked": (graph("Attention", [Q, KV, KV, (5, 5)], attributes={"is_causal": 1}), 6 * 25 * 32),
    "attention behind a past": (
        graph("Attention", [Q, KV, KV, None, (1, 2, 4, 8), (1, 2, 4, 8)], attributes={"is_causal": 1}),
        6 * (5 + 6 + 7 + 8 + 9) * 32,
    ),
    "attention, columns": (
        graph("Attention", [(1, 5, 48), (1, 9, 16), (1, 9, 20)], attributes={"q_num_heads": 6, "kv_num_heads": 2}),
        6 * 5 * 9 * 2 * (8 + 10),
    ),
    "multi-head": (graph("MultiHeadAttention", [(2, 5, 48)] * 3, domain=MS), 2 * 5 * 5 * 4 * 48),
    "softmax": (graph("Softmax", [(3, 5)]), 0),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_by_hand(case: str) -> None:
    model, flops = BY_HAND[case]
    assert count(model).flops == flops


def grouped(rows: int, total: ir.Value, **attributes: Any) -> ir.Model:
    """GroupQueryAttention with a cache of 20 rows."""
    cache = (1, 2, 20, 8)
    given = [(1, rows, 48), (1, rows, 16), (1, rows, 16), cache, cache, (1,), total]
    return graph("GroupQueryAttention", given, attributes={"num_heads": 6, "kv_num_heads": 2} | attributes, domain=MS)


def test_a_prompt_is_causal_and_a_step_sees_the_cache() -> None:
    def known() -> ir.Value:
        return weight("total", np.array(5, dtype=np.int32))

    def varies() -> ir.Value:
        return value("length", (), ir.DataType.INT32)

    assert count(grouped(5, known())).flops == 4 * 48 * (1 + 2 + 3 + 4 + 5)
    assert count(grouped(5, known(), local_window_size=2)).flops == 4 * 48 * (1 + 2 + 2 + 2 + 2)
    assert count(grouped(5, known(), local_window_size=-1)).flops == 4 * 48 * 15
    assert count(grouped(1, varies())).flops == 4 * 48 * 20
    assert count(grouped(1, varies(), local_window_size=7)).flops == 4 * 48 * 7


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (graph("ConvTranspose", [(1, 3, 8, 8), (3, 4, 2, 2)]), "`model.block/Op_0`: no rule for ConvTranspose"),
        (graph("Loop", [(), ()]), "no rule for Loop"),
        (graph("Frobnicate", [(3, 3)]), "no rule for Frobnicate"),
        (graph("FusedMatMul", [(3, 5), (5, 7)], domain=MS), f"no rule for {MS}::FusedMatMul"),
        (graph("MatMul", [(3, 5), "?"]), "input 1, `x1`, has shape None"),
        (graph("MatMul", [("n", 5), (5, 7)]), "input 0, `x0`, has shape"),
        (graph("Conv", [(1, 3, 8), (4, 3, 2)], (1, 4, "n")), "its output has shape"),
        (graph("Einsum", [(2, 3)], attributes={"equation": "ij->ji"}), "Einsum of 1 operands"),
        (graph("Einsum", [(2, 3), (3, 2)], attributes={"equation": "...i,ij->...j"}), "with an ellipsis"),
        (graph("MultiHeadAttention", [(1, 5, 8)] * 3 + [(24,)], domain=MS), "with more than q, k and v"),
    ],
)
def test_what_cannot_be_counted_is_refused(model: ir.Model, message: str) -> None:
    with pytest.raises(ExportError, match="cannot count the work") as caught:
        count(model)
    assert message in str(caught.value) and caught.value.hint


def test_bytes_are_those_that_are_read() -> None:
    """A table that is only gathered from gives its rows; an unused weight, nothing; states are the inputs so named."""
    table, matrix = weight("table", np.zeros((100, 8), np.float32)), weight("w", np.zeros((8, 4), np.float16))
    ids, past = value("ids", (1, 3), ir.DataType.INT64), value("past_key_0", (1, 2, 20, 8), ir.DataType.FLOAT16)
    rows = ir.node("Gather", [table, ids], name="embed/Gather_0", outputs=[value("rows", (1, 3, 8))])
    out = ir.node("MatMul", [rows.outputs[0], matrix], name="a.0.q/MatMul_1", outputs=[value("out", (1, 3, 4))])
    unused = weight("unused", np.zeros(9, np.float32))
    made = ir.Graph([ids, past], out.outputs, nodes=[rows, out], initializers=[table, matrix, unused], name="g")
    found = count(ir.Model(made, ir_version=10))
    assert (found.weight_bytes, found.state_bytes) == (3 * 8 * 4 + 8 * 4 * 2, 2 * 20 * 8 * 2)
    assert found.modules == {"a.0.q": 2 * 3 * 8 * 4} and found.by(1) == {"a": found.flops} == {"a": 192}


# --- whole graphs ---


@pytest.mark.parametrize("form", ["contrib", "standard", "standard16"])
def test_an_export_does_what_was_predicted(kind: str, form: str, export: Callable[..., Any]) -> None:
    """Prefill and decode to the FLOP; vision but for the scores of the method."""
    made = export(kind, form)
    a = describe(made.loaded.model)
    dtype = torch.float16 if form == "standard16" else torch.float32
    causal = (Contrib if form == "contrib" else Standard).causal(dtype, a.language.head_dim)
    assert causal == (form != "standard")
    for name, info in made.infos.items():
        have = count(made.folder / info.file)
        want = predict(a, made.budget, info.role, info.bucket, causal=causal, element_bytes=dtype.itemsize)
        assert have.state_bytes == want.state_bytes and (have.state_bytes == 0) == (info.role == "vision"), name
        assert abs(want.weight_bytes / have.weight_bytes - 1) < 0.05, name  # norms, biases, constants; measured 0.03
        if info.role == "vision":
            assert 0 <= have.flops - want.flops < 0.05 * have.flops, name  # measured 0.006
        else:
            assert have.flops == want.flops, name


def test_int8_multiplies_as_often(kind: str, export: Callable[..., Any]) -> None:
    plain, small = export(kind, "contrib"), export(kind, "contrib", int8=True)
    for (_, one), (_, other) in zip(plain.infos.items(), small.infos.items(), strict=True):
        have, want = count(small.folder / other.file), count(plain.folder / one.file)
        assert have.flops == want.flops and have.weight_bytes < 0.5 * want.weight_bytes
    assert describe(small.loaded.model).outside == describe(plain.loaded.model).outside


def test_modules_add_up_and_name_layers(export: Callable[..., Any]) -> None:
    made = export("llava", "contrib")
    (name,) = [n for n, info in made.infos.items() if info.role == "decode"]
    found = count(made.folder / made.infos[name].file)
    assert sum(found.modules.values()) == sum(found.by(2).values()) == found.flops
    assert sum("down_proj" in path for path in found.modules) == describe(made.loaded.model).language.layers


def test_a_target_has_its_operators() -> None:
    assert isinstance(for_target("onnx"), Contrib)
    assert all(isinstance(for_target(target), Standard) for target in ("rtx", "trt"))
    assert Contrib.causal(torch.float32, 8)
    assert [Standard.causal(torch.float16, d) for d in (31, 32, 256, 257)] == [False, True, True, False]
    assert not Standard.causal(torch.float32, 64)


def test_a_bundle_says_its_work(bundle: Path, bundle_rtx_graphs: Path) -> None:
    for folder in (bundle, bundle_rtx_graphs):
        manifest = read(folder)
        work = manifest.anatomy["work"]
        assert set(work) == set(manifest.graphs)
        for name, graph_info in manifest.graphs.items():
            assert abs(work[name]["ratio"] - 1) < 0.05, name  # measured 0.9995
            assert work[name]["counted"]["flops"] == count(folder / graph_info.file).flops
    manifest = read(bundle)
    page = report.page(manifest, report.rows_of(manifest))
    assert "Work of one call" in page
    without = replace(manifest, anatomy={k: v for k, v in manifest.anatomy.items() if k != "work"})
    assert "Work of one call" not in report.page(without, [])
