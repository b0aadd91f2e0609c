"""int8 arithmetic against a transcription of the ONNX specification, and against ONNX Runtime itself."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper
from vlmcut.passes.int8 import (
    Int8Embedding,
    Int8Linear,
    dynamic_int8_linear,
    quantize_activation,
    quantize_weight,
)
from vlmcut.passes.quantize import Quantize, quantize_linears
from vlmcut.passes.recipe import make
from vlmcut.surgery.load import locate

F32 = np.float32


def finite(limit: float) -> st.SearchStrategy[float]:
    return st.floats(-limit, limit, width=32, allow_subnormal=False)


def arrays(rows: int, columns: int, limit: float = 100.0) -> st.SearchStrategy[np.ndarray]:
    shape = st.tuples(st.integers(1, rows), st.integers(1, columns))
    return hnp.arrays(np.float32, shape, elements=finite(limit))


def reference(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """DynamicQuantizeLinear as the ONNX specification states it, in float32; rounds half to even."""
    high, low = max(F32(0), x.max()), min(F32(0), x.min())
    scale = F32(high - low) / F32(255)
    if scale == 0:
        scale = F32(1)
    zero = np.clip(np.round((F32(0) - low) / scale), 0, 255).astype(np.uint8)
    y = np.clip(np.round(x / scale) + zero, 0, 255).astype(np.uint8)
    return y, scale, zero


@given(arrays(6, 9))
def test_activation_is_the_specification(x: np.ndarray) -> None:
    y, scale, zero = reference(x)
    got, got_scale, got_zero = quantize_activation(torch.from_numpy(x)[None])
    assert got_scale.item() == scale and got_zero.item() == zero
    np.testing.assert_array_equal(got[0].numpy().astype(np.uint8), y)


@given(arrays(6, 9))
def test_weight_is_symmetric_per_row(w: np.ndarray) -> None:
    q, scale = quantize_weight(torch.from_numpy(w))
    assert q.dtype == torch.int8 and q.shape == w.shape and scale.shape == (len(w),)
    for row, got, s in zip(w, q.numpy(), scale.numpy(), strict=True):
        want = F32(np.abs(row).max() / F32(127)) or F32(1)
        assert s == want
        np.testing.assert_array_equal(got, np.clip(np.round(row / want), -127, 127).astype(np.int8))
        if want > 1e-30:
            # half a step, and the rounding of one float32 product
            assert np.abs(got * np.float64(s) - row).max() <= s * 0.5 * (1 + 1e-5)
            assert np.abs(got).max() in (0, 127)


def session(w: np.ndarray) -> ort.InferenceSession:
    """x -> quantized, scale, zero point, int32 product."""
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("MatMulInteger", ["q", "w", "z"], ["p"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, w.shape[0]])
    outs = [
        helper.make_tensor_value_info("q", TensorProto.UINT8, [None, w.shape[0]]),
        helper.make_tensor_value_info("s", TensorProto.FLOAT, []),
        helper.make_tensor_value_info("z", TensorProto.UINT8, []),
        helper.make_tensor_value_info("p", TensorProto.INT32, [None, w.shape[1]]),
    ]
    graph = helper.make_graph(nodes, "g", [x], outs, [numpy_helper.from_array(w, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def test_integers_are_onnx_runtimes() -> None:
    """Bit-equal integers: the same quantization, the same products."""
    rng = np.random.default_rng(0)
    weight = torch.from_numpy(rng.standard_normal((24, 40)).astype(F32))
    q_weight, w_scale = quantize_weight(weight)
    graph = session(np.ascontiguousarray(q_weight.numpy().T))
    for scale, shift in ((1, 0), (1e-3, 0), (50, 20), (3, -30), (1, 1000)):
        x = (rng.standard_normal((17, 40)) * scale + shift).astype(F32)
        q, s, z, product = graph.run(None, {"x": x})
        got, got_s, got_z = quantize_activation(torch.from_numpy(x)[None])
        np.testing.assert_array_equal(got[0].numpy().astype(np.uint8), q)
        assert (got_s.item(), got_z.item()) == (s, z)
        out = dynamic_int8_linear(torch.from_numpy(x)[None], q_weight, w_scale)
        # The float product is exact here: int32 below 2^24 times one rounded float32 factor, in the runtime's order.
        assert np.abs(product).max() < 2**24
        np.testing.assert_array_equal(out[0].numpy(), product.astype(F32) * (F32(s) * w_scale.numpy()))


def test_a_zero_input() -> None:
    linear = Int8Linear.of(torch.nn.Linear(32, 24))
    zeros = torch.zeros(2, 17, 32)
    q, scale, zero = quantize_activation(zeros)
    assert scale.tolist() == [[[1.0]]] * 2 and zero.abs().sum() == 0 and q.abs().sum() == 0
    assert torch.equal(linear(zeros), linear.bias.expand(2, 17, 24))
    q, scale = quantize_weight(torch.zeros(3, 8))
    assert q.abs().sum() == 0 and scale.tolist() == [1.0] * 3


def test_items_are_independent() -> None:
    """An image's answer does not depend on its neighbour in the batch."""
    torch.manual_seed(0)
    linear = Int8Linear.of(torch.nn.Linear(32, 24))
    x = torch.randn(3, 17, 32) * torch.tensor([1.0, 100.0, 0.01]).reshape(3, 1, 1)
    assert torch.equal(linear(x), torch.cat([linear(x[i : i + 1]) for i in range(3)]))


def test_zero_rows_change_nothing() -> None:
    """Padding of zeros stays out of the scale: the range always holds 0."""
    torch.manual_seed(0)
    linear = Int8Linear.of(torch.nn.Linear(32, 24))
    for shift in (0.0, 5.0, -5.0):
        x = torch.randn(1, 17, 32) + shift
        padded = torch.cat([x, torch.zeros(1, 7, 32)], dim=1)
        assert torch.equal(linear(padded)[:, :17], linear(x))
    # Negative control: padding that is not zero is seen.
    assert not torch.equal(linear(torch.cat([x, torch.full((1, 1, 32), 99.0)], dim=1))[:, :17], linear(x))


def test_near_the_float_linear() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 48)
    x = torch.randn(2, 20, 64)
    with torch.no_grad():
        exact = linear(x)
        error = (Int8Linear.of(linear)(x) - exact).abs().max() / exact.abs().max()
    # int8: half a step of about 7/255 and of 1/127 of the weights, summed over 64 terms; measured 0.0060.
    assert 1e-4 < float(error) < 0.02


@pytest.mark.parametrize("tied_kind", ["llava"])
def test_a_tied_table_is_shared(tiny, tied_kind: str) -> None:
    loaded = tiny(tied_kind)
    make([Quantize()]).apply(loaded.model, None)
    table = locate(loaded.model).language.embed_tokens
    assert isinstance(table, Int8Embedding) and isinstance(loaded.model.lm_head, Int8Linear)
    assert table.weight.data_ptr() == loaded.model.lm_head.weight.data_ptr()
    ids = torch.tensor([[0, 3, 319]])
    want = loaded.model.lm_head.weight[ids[0]].float() * loaded.model.lm_head.weight_scale[ids[0], None]
    assert torch.equal(table(ids)[0], want)


def test_no_linear_is_forgotten(kind: str, tiny) -> None:
    loaded = tiny(kind)
    make([Quantize()]).apply(loaded.model, None)
    left = [n for n, m in loaded.model.named_modules() if isinstance(m, torch.nn.Linear)]
    assert left == []
    made = sum(isinstance(m, Int8Linear) for m in loaded.model.modules())
    # tower: 6 per layer of 4; projector: 2; language: 7 per layer; lm_head: 1
    assert made == 4 * 6 + 2 + 7 * len(locate(loaded.model).language_layers) + 1


def test_quantize_linears_goes_deep() -> None:
    root = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(4, 5)))
    quantize_linears(root)
    assert [type(m) for m in (root[0], root[1][1])] == [Int8Linear, Int8Linear]


def test_the_operator_traces() -> None:
    """Its fake form has the real one's shape and dtype, or an exported graph would not."""
    q, scale = quantize_weight(torch.randn(24, 32))
    torch.library.opcheck(
        dynamic_int8_linear, (torch.randn(2, 17, 32), q, scale), test_utils=("test_schema", "test_faketensor")
    )
