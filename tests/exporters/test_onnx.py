"""The graphs themselves: which operators, which shapes, which names, and nothing of the machine that made them."""

from __future__ import annotations

import getpass
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from vlmcut.exporters import onnx as exporter
from vlmcut.exporters.components import Component, components
from vlmcut.exporters.graphs import keeping
from vlmcut.exporters.operators import OPSET, Standard
from vlmcut.manifest import TokenBudget
from vlmcut.passes.prune_tokens import PruneTokens
from vlmcut.passes.recipe import make
from vlmcut.surgery.load import Loaded, describe
from vlmcut.surgery.selection import attached

FORMS = ("contrib", "standard", "standard16")


def graphs(made: Any) -> dict[str, onnx.ModelProto]:
    """By role, without weights."""
    return {i.role: onnx.load(made.folder / i.file, load_external_data=False) for i in made.infos.values()}


def vision(loaded: Loaded, keep: int) -> onnx.ModelProto:
    """The vision graph alone, in standard operators."""
    budget = TokenBudget(images=1, visual_tokens=keep, text_tokens=8, new_tokens=2)
    (component,) = (c for c in components(loaded.model, budget, (keep,)) if c.role == "vision")
    return ir.to_proto(exporter.export(component, loaded.model, Standard()))


def ops(model: onnx.ModelProto) -> Counter[str]:
    return Counter(n.op_type for n in model.graph.node)


@pytest.mark.parametrize("form", FORMS)
def test_only_known_operators(kind: str, export, form: str) -> None:
    made = export(kind, form)
    for info in made.infos.values():
        onnx.checker.check_model(made.folder / info.file)
    for role, model in graphs(made).items():
        domains = {n.domain for n in model.graph.node}
        if form == "contrib":
            assert domains == {"", "com.microsoft"}, role
        else:
            assert domains == {""}, role
            assert [(o.domain, o.version) for o in model.opset_import] == [("", OPSET)]
        assert not model.functions
        for node in model.graph.node:
            assert not any(a.type in (a.GRAPH, a.GRAPHS) for a in node.attribute)
            if node.domain == "":
                schema = onnx.defs.get_schema(node.op_type, OPSET, "")  # raises for an operator that is not of it
                assert not schema.deprecated and schema.since_version <= OPSET
            else:
                assert (role, node.op_type) in {
                    ("vision", "MultiHeadAttention"),
                    ("prefill", "GroupQueryAttention"),
                    ("decode", "GroupQueryAttention"),
                }


@pytest.mark.parametrize("form", FORMS)
def test_one_attention_for_each_layer(kind: str, export, form: str) -> None:
    made = export(kind, form)
    a = describe(made.loaded.model)
    count = {role: ops(model) for role, model in graphs(made).items()}
    layers = {"vision": a.tower.layers, "prefill": a.language.layers, "decode": a.language.layers}
    for role, n in layers.items():
        found = count[role]
        if form == "contrib":
            name = "MultiHeadAttention" if role == "vision" else "GroupQueryAttention"
            assert found[name] == n and found["Attention"] == 0
            # one Softmax in the vision graph scores the tokens
            assert found["Softmax"] == (1 if role == "vision" else 0)
        else:
            fused = form == "standard16" and (role != "decode" or a.language.heads[0] >= 4)
            assert found["Attention"] == (n if fused else 0), (role, found)
            # Without [CLS] a token's score is what the last block's own weights say, which the graph then shares.
            scored = role == "vision" and (fused or a.tower.has_cls)
            assert found["Softmax"] == (0 if fused else n) + scored
            assert found["TensorScatter"] == (0 if role == "vision" else 2 * n)
        if role != "vision":
            assert found["RotaryEmbedding"] == 2 * n
            assert found["RMSNormalization"] == 2 * n + 1
            assert found["Pow"] + found["ReduceMean"] == 0  # no second norm in pieces


@pytest.mark.parametrize("form", FORMS)
def test_shapes_are_constant_and_named(kind: str, export, form: str) -> None:
    made = export(kind, form)
    a, budget = describe(made.loaded.model), made.budget
    wanted = {c.role: c for c in components(made.loaded.model, budget, a.keep)}
    for info in made.infos.values():
        component = wanted[info.role]
        assert {t.name: t.shape for t in info.inputs} == {n: tuple(t.shape) for n, t in component.inputs.items()}
        assert [t.name for t in info.inputs] == list(component.inputs)
        assert tuple(t.name for t in info.outputs) == component.outputs
        model = onnx.load(made.folder / info.file, load_external_data=False)
        for value in (*model.graph.input, *model.graph.output):
            assert all(d.HasField("dim_value") for d in value.type.tensor_type.shape.dim), value.name
        shapes = {t.name: t.shape for t in info.outputs}
        if info.role == "vision":
            assert shapes == {"image_features": (5, a.language.hidden), "kept": (1, 5)}
        else:
            assert shapes["logits"] == (1, a.language.vocabulary)
            cache = (1, a.language.kv_heads[0], budget.cache, a.language.head_dim)
            assert {s for n, s in shapes.items() if n != "logits"} == {cache}
    assert budget.sequence == 2 * 5 + 9 and budget.cache == budget.sequence + 4


def test_int8_is_the_pattern_that_the_runtime_fuses(kind: str, export) -> None:
    made = export(kind, "contrib", int8=True)
    a = describe(made.loaded.model)
    found = {role: ops(model) for role, model in graphs(made).items()}
    linears = {"vision": 6 * a.tower.layers + 2, "prefill": 7 * a.language.layers + 1}
    linears["decode"] = linears["prefill"]
    for role, n in linears.items():
        # FasterVLM scores with the block's own q and k, which the trace shares or repeats.
        assert n <= found[role]["MatMulInteger"] <= n + 2 * (role == "vision")
        assert 0 < found[role]["DynamicQuantizeLinear"] <= found[role]["MatMulInteger"]
        assert found[role]["Gemm"] == 0


@pytest.mark.parametrize("form", FORMS)
def test_nodes_tell_their_module(kind: str, export, form: str) -> None:
    made = export(kind, form)
    for role, model in graphs(made).items():
        names = [n.name for n in model.graph.node]
        assert len(set(names)) == len(names)
        assert all(
            n.rpartition("/")[2].startswith(f"{node.op_type}_") for n, node in zip(names, model.graph.node, strict=True)
        )
        part = "vision_tower" if role == "vision" else "language_model"
        assert sum(part in n for n in names) > len(names) / 2
    norms = [n.name for n in graphs(made)["decode"].graph.node if n.op_type == "RMSNormalization"]
    assert any("layers.1.input_layernorm" in n for n in norms)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_of_this_machine(kind: str, export, form: str, tmp_path: Path) -> None:
    made = export(kind, form)
    own = [str(Path.home()), str(Path.cwd()), str(tmp_path.parent), "site-packages", ".py", torch.__version__]
    own += [getpass.getuser() + "@", "/usr/", "/opt/", "torch.fx", "pkg.torch"]
    for info in made.infos.values():
        path = made.folder / info.file
        data = path.read_bytes()
        assert not [text for text in own if len(text) > 2 and text.encode() in data]
        model = onnx.load(path, load_external_data=False)
        assert model.producer_name == "vlmcut" and not model.producer_version
        assert not model.doc_string and not model.graph.doc_string and not model.metadata_props
        assert not model.graph.metadata_props
        for item in (*model.graph.node, *model.graph.input, *model.graph.initializer, *model.graph.value_info):
            assert not item.doc_string and not item.metadata_props


@pytest.mark.parametrize(("kind", "form"), [("llava", "contrib"), ("llava-siglip-qwen2", "standard16")])
def test_same_bytes_twice(export, kind: str, form: str) -> None:
    """Another model object, another folder: the same files, byte for byte."""
    one, other = export(kind, form), export(kind, form, fresh=True)
    assert one.infos == other.infos and one.folder != other.folder
    first, second = ({p.name: p.read_bytes() for p in (m.folder / "graphs").iterdir()} for m in (one, other))
    assert first.keys() == second.keys() == {"vision-5.onnx", "prefill-5.onnx", "decode-5.onnx", "weights.bin"}
    assert [name for name in first if first[name] != second[name]] == []


@pytest.mark.parametrize("form", FORMS)
def test_exporting_leaves_the_model_alone(kind: str, export, form: str) -> None:
    assert export(kind, form).untouched


def test_keeping_comes_back(tiny) -> None:
    loaded = tiny("llava")
    make([PruneTokens(keep=5)]).apply(loaded.model, None)
    selection = attached(loaded.model).selection
    assert selection is not None
    with keeping(loaded.model, (9,)):
        assert selection.keep == describe(loaded.model).keep == (9,)
    assert selection.keep == (5,)
    with pytest.raises(ValueError), keeping(loaded.model, [9]):
        raise ValueError
    assert selection.keep == (5,)


def test_an_unpruned_model_has_a_kept_too(tiny) -> None:
    loaded = tiny("llava")
    make([]).apply(loaded.model, None)
    outputs = vision(loaded, 16).graph.output
    shapes = {o.name: [d.dim_value for d in o.type.tensor_type.shape.dim] for o in outputs}
    assert shapes == {"image_features": [16, 48], "kept": [1, 16]}


class Few(torch.nn.Module):
    """The first so many of a sort, twice; of another sort also the rest."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        few = torch.sort(x, dim=-1, descending=True, stable=True)
        other = torch.sort(-x, dim=-1, descending=True, stable=True).indices
        return few.indices[:, :3] + 0, few.values[:, :3] + 0, other[:, :3] + 0, other[:, 1:4] + 0


def test_a_sort_of_which_few_are_read_sorts_few(tiny: Any) -> None:
    """TopK takes the count that is read; a sort that is read elsewhere too stays whole. Ties go to the lower index."""
    x = torch.tensor([[1.0, 3, 3, 0, 2, 3, 1, 2]])
    names = ("places", "values", "others", "rest")
    component = Component(role="vision", module=Few(), inputs={"x": x}, outputs=names)
    graph = exporter.export(component, tiny("llava").model, Standard())
    sorts = [node for node in graph.graph if node.op_type == "TopK"]
    counts = [int(np.asarray(node.inputs[1].const_value.numpy()).item()) for node in sorts]
    assert sorted(counts) == [3, 8]
    session = ort.InferenceSession(ir.to_proto(graph).SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(list(names), {"x": x.numpy()})
    for have, want in zip(found, Few()(x), strict=True):
        np.testing.assert_array_equal(have, want.numpy())
    assert found[0].tolist() == [[1, 2, 5]]
