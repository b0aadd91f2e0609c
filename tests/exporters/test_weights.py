"""One weight file: every content once, whatever shares it, and nothing that no graph names."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, external_data_helper, helper, numpy_helper
from vlmcut.exporters.graphs import write_graphs
from vlmcut.exporters.operators import Contrib
from vlmcut.exporters.weights import FILE, WeightFile, tensor_digests
from vlmcut.manifest import TokenBudget
from vlmcut.passes.prune_tokens import PruneTokens
from vlmcut.passes.recipe import make
from vlmcut.surgery.load import state_dict


def budgets(*keeps: int) -> list[TokenBudget]:
    return [TokenBudget(images=1, visual_tokens=k, text_tokens=8, new_tokens=3) for k in keeps]


def tensors_of(path: Path) -> list[tuple[int, int]]:
    """The ranges of the weight file that a graph names."""
    initializers = onnx.load(path, load_external_data=False).graph.initializer
    infos = [
        external_data_helper.ExternalDataInfo(t) for t in initializers if external_data_helper.uses_external_data(t)
    ]
    return [(i.offset, i.length) for i in infos]


def tensors(folder: Path) -> dict[tuple[int, int], set[tuple[int, tuple[int, ...]]]]:
    """(offset, length) -> dtypes and shapes under which the graphs of a folder name that range."""
    found: dict[tuple[int, int], set[tuple[int, tuple[int, ...]]]] = {}
    for path in sorted(folder.glob("*.onnx")):
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            if external_data_helper.uses_external_data(tensor):
                info = external_data_helper.ExternalDataInfo(tensor)
                assert info.location == FILE
                found.setdefault((info.offset, info.length), set()).add((tensor.data_type, tuple(tensor.dims)))
            else:
                assert len(numpy_helper.to_array(tensor).tobytes()) < 1024, tensor.name
    return found


def check(folder: Path) -> dict[tuple[int, int], bytes]:
    """The contents of the file by range: distinct, aligned, without overlap or unnamed rest."""
    data = (folder / FILE).read_bytes()
    ranges = sorted(tensors(folder))
    for (offset, length), (after, _) in zip(ranges, [*ranges[1:], (len(data), 0)], strict=True):
        assert offset % 4096 == 0 and length > 0
        assert offset + length <= after < offset + length + 4096
        assert not any(data[offset + length : after])
    assert ranges[0][0] == 0 and sum(ranges[-1]) == len(data)
    contents = {r: data[r[0] : sum(r)] for r in ranges}
    digests = [hashlib.sha256(c).hexdigest() for c in contents.values()]
    assert len(set(digests)) == len(digests)
    return contents


def check_transposed(folder: Path, contents: dict[tuple[int, int], bytes]) -> None:
    """A linear may be stored as [in, out], but not both ways."""
    seen = set(contents.values())
    for place, forms in tensors(folder).items():
        for dtype, dims in forms:
            if len(dims) == 2 and dims[0] > 1 < dims[1]:
                array = np.frombuffer(contents[place], helper.tensor_dtype_to_np_dtype(dtype)).reshape(dims)
                turned = np.ascontiguousarray(array.T).tobytes()
                assert turned == contents[place] or turned not in seen


@pytest.mark.parametrize("form", ["contrib", "standard", "standard16"])
def test_nothing_is_stored_twice(kind: str, export, form: str) -> None:
    made = export(kind, form)
    contents = check(made.folder / "graphs")
    check_transposed(made.folder / "graphs", contents)
    weights = sum(t.numel() * t.element_size() for t in state_dict(made.loaded.model).values())
    assert sum(map(len, contents.values())) < 1.05 * weights


def test_two_budgets_have_one_set_of_weights(tiny, tmp_path: Path) -> None:
    loaded = tiny("llava")
    make([PruneTokens(keep=5, method="divprune")]).apply(loaded.model, None)
    write_graphs(loaded.model, budgets(5, 16), [(5,), (16,)], Contrib(), tmp_path)
    folder = tmp_path / "graphs"
    contents = check(folder)
    check_transposed(folder, contents)
    weights = sum(t.numel() * 4 for t in state_dict(loaded.model).values())
    assert sum(map(len, contents.values())) < 1.05 * weights
    assert len(list(folder.glob("*.onnx"))) == 6
    names = {path: set(tensors_of(path)) for path in folder.glob("*.onnx")}
    assert names[folder / "prefill-5.onnx"] == names[folder / "prefill-16.onnx"]


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "int8"])
def test_a_tied_embedding_is_stored_once(kind: str, export, quantized: bool) -> None:
    made = export(kind, "contrib", int8=quantized)
    model = made.loaded.model
    head, table = model.lm_head.weight.detach(), model.get_input_embeddings().weight.detach()
    contents = check(made.folder / "graphs")

    def stored(tensor: torch.Tensor) -> int:
        forms = {t.contiguous().numpy().tobytes() for t in (tensor, tensor.t())}
        return sum(c in forms for c in contents.values())

    assert stored(head) == stored(table) == 1
    assert (head.dtype == table.dtype and torch.equal(head, table)) == (kind == "llava")


def graph(**arrays: np.ndarray) -> ir.Model:
    """A graph that adds its initializers."""
    values = [numpy_helper.from_array(a, n) for n, a in arrays.items()]
    node = helper.make_node("Concat", list(arrays), ["y"], axis=0)
    out = helper.make_tensor_value_info("y", values[0].data_type, None)
    return ir.from_proto(helper.make_model(helper.make_graph([node], "g", [], [out], values)))


def test_ranges_are_shared_between_graphs(tmp_path: Path) -> None:
    big, other = np.arange(512, dtype=np.float32), np.ones(512, np.float32)
    with WeightFile(tmp_path) as weights:
        weights.save(graph(a=big, b=big.copy(), small=np.zeros(3, np.float32)), "one.onnx")
        weights.save(graph(c=big, d=other), "two.onnx")
    contents = check(tmp_path)
    assert list(contents) == [(0, 2048), (4096, 2048)]
    assert contents[0, 2048] == big.tobytes() and contents[4096, 2048] == other.tobytes()
    loaded = onnx.load(tmp_path / "two.onnx")
    np.testing.assert_array_equal(numpy_helper.to_array(loaded.graph.initializer[0]), big)
    small = onnx.load(tmp_path / "one.onnx", load_external_data=False).graph.initializer[2]
    assert small.data_type == TensorProto.FLOAT and not external_data_helper.uses_external_data(small)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8, np.int64])
def test_every_dtype_survives(tmp_path: Path, dtype: type) -> None:
    array = np.arange(2048).reshape(32, 64).astype(dtype)
    with WeightFile(tmp_path) as weights:
        weights.save(graph(a=array, b=array.T), "g.onnx")
    first, second = onnx.load(tmp_path / "g.onnx").graph.initializer
    np.testing.assert_array_equal(numpy_helper.to_array(first), array)
    np.testing.assert_array_equal(numpy_helper.to_array(second), array.T)


def test_digests_are_of_the_bytes(tmp_path: Path) -> None:
    big, small = np.arange(512, dtype=np.float32), np.arange(3, dtype=np.float32)
    with WeightFile(tmp_path) as weights:
        path = weights.save(graph(a=big, b=big.copy(), c=small), "g.onnx")
    want = [hashlib.sha256(x.tobytes()).hexdigest() for x in (big, small)]
    assert sorted(tensor_digests([path])) == sorted(want)
    # Negative control: one bit of the file.
    data = bytearray((tmp_path / FILE).read_bytes())
    data[100] ^= 1
    (tmp_path / FILE).write_bytes(data)
    assert want[0] not in set(tensor_digests([path])) and want[1] in set(tensor_digests([path]))
