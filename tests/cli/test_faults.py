"""Negative controls: a fault planted after the real export must stop a conversion, and later a verification.

A conversion's export is replaced by a copy of the session bundle's graphs with one fault; everything else is real.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from vlmcut.errors import BundleError, ParityError
from vlmcut.exporters import graphs as exported
from vlmcut.exporters.build import seal
from vlmcut.manifest import GraphInfo, TokenBudget, read
from vlmcut.passes.tokens.methods import TableSelector
from vlmcut.pipeline import Request, convert
from vlmcut.runtime.sessions import Graphs
from vlmcut.surgery.selection import attached
from vlmcut.validation import complete

CONVERT = ("convert", "tiny:llava", "--prune", "0.7", "--images", "2", "--text-tokens", "24", "--new-tokens", "20")
REQUEST = Request(model="tiny:llava", prune=0.7, images=2, text_tokens=24, new_tokens=20)
Damage = Callable[[Path], None]
Edit = Callable[[onnx.ModelProto], None]


def edited(graph: str, edit: Edit) -> Damage:
    """Edit one graph; its weights move into the file, the others keep theirs."""

    def damage(folder: Path) -> None:
        path = folder / f"{graph}-5.onnx"
        model = onnx.load(path)
        edit(model)
        path.write_bytes(model.SerializeToString())

    return damage


def _node(model: onnx.ModelProto, scope: str, kind: str) -> onnx.NodeProto:
    found = [n for n in model.graph.node if scope in n.name and n.op_type == kind]
    assert len(found) == 1, [n.name for n in found]
    return found[0]


def _initializer(model: onnx.ModelProto, names: Sequence[str]) -> onnx.TensorProto:
    found = [t for t in model.graph.initializer if t.name in names]
    assert len(found) == 1
    return found[0]


def _put(tensor: onnx.TensorProto, value: np.ndarray) -> None:
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), tensor.name))


def swap_heads(model: onnx.ModelProto) -> None:
    """Query heads 0 and 2 of language layer 1, which look at different KV groups."""
    weight = _initializer(model, _node(model, "layers.1.self_attn.q_proj", "MatMul").input)
    value = numpy_helper.to_array(weight).copy()  # [hidden, heads * 32]
    value[:, [*range(32), *range(64, 96)]] = value[:, [*range(64, 96), *range(32)]]
    _put(weight, value)


def shift_positions(model: onnx.ModelProto) -> None:
    """The graph counts positions from 1."""
    model.graph.initializer.append(numpy_helper.from_array(np.array(1, np.int64), "one"))
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == "position_ids":
                node.input[index] = "shifted"
    model.graph.node.insert(0, helper.make_node("Add", ["position_ids", "one"], ["shifted"]))


def nudge(scope: str, relative: float) -> Edit:
    """Every element of one weight is larger by a fraction."""

    def edit(model: onnx.ModelProto) -> None:
        weight = _initializer(model, _node(model, scope, "MatMul").input)
        _put(weight, numpy_helper.to_array(weight) * np.float32(1 + relative))

    return edit


def zero_bias(model: onnx.ModelProto) -> None:
    bias = _initializer(model, _node(model, "multi_modal_projector.linear_1", "Add").input)
    _put(bias, np.zeros_like(numpy_helper.to_array(bias)))


def skip_bias(model: onnx.ModelProto) -> None:
    """The addition is gone, the bias is still in the file."""
    node = _node(model, "layers.2.mlp.fc1", "Add")
    bias = _initializer(model, node.input)
    before = next(name for name in node.input if name != bias.name)
    node.CopyFrom(helper.make_node("Sum", [before], list(node.output), name=node.name))


def keep_others(model: onnx.ModelProto) -> None:
    """The tokens of least attention are kept."""
    topk = [n for n in model.graph.node if n.op_type == "TopK"]
    (largest,) = (a for a in topk[0].attribute if a.name == "largest")
    largest.i = 0


def drop_output(name: str) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        model.graph.output.remove(next(o for o in model.graph.output if o.name == name))

    return edit


def spoil_output(name: str, value: float) -> Edit:
    """One number of an output is NaN or infinite; what the graph itself computes with is not touched."""

    def edit(model: onnx.ModelProto) -> None:
        output = next(o for o in model.graph.output if o.name == name)
        shape = [d.dim_value for d in output.type.tensor_type.shape.dim]
        spot = np.zeros(shape, np.float32)
        spot.flat[0] = value
        model.graph.initializer.append(numpy_helper.from_array(spot, "spot"))
        for node in model.graph.node:
            for index, made in enumerate(node.output):
                if made == name:
                    node.output[index] = "sound"
            for index, used in enumerate(node.input):
                if used == name:
                    node.input[index] = "sound"
        model.graph.node.append(helper.make_node("Add", ["sound", "spot"], [name]))

    return edit


@dataclass(frozen=True)
class Fault:
    """A damage, and what a conversion and a verification must say about it."""

    damage: Damage
    convert: str
    verify: str
    error: type[Exception] = ParityError


def _fault(graph: str, edit: Edit, row: str) -> Fault:
    return Fault(edited(graph, edit), f"FAIL {row}", f"FAIL {row}")


FAULTS = {
    "nothing": Fault(lambda _: None, "", ""),
    "swapped heads in prefill": _fault("prefill", swap_heads, "prefill.logits"),
    "swapped heads in decode": _fault("decode", swap_heads, "decode.logits"),
    "positions from 1 in prefill": _fault("prefill", shift_positions, "prefill.present_key"),
    "positions from 1 in decode": _fault("decode", shift_positions, "decode.logits"),
    "weight 1e-3 larger in prefill": _fault("prefill", nudge("layers.0.mlp.up_proj", 1e-3), "prefill.logits"),
    "weight 1e-3 larger in decode": _fault("decode", nudge("layers.2.self_attn.v_proj", 1e-3), "decode.present_value"),
    "bias skipped": _fault("vision", skip_bias, "vision.image_features"),
    "other tokens kept": _fault("vision", keep_others, "vision.kept"),
    "NaN in logits": _fault("prefill", spoil_output("logits", np.nan), "prefill.logits"),
    "NaN in the first cache": _fault("prefill", spoil_output("present_key_0", np.nan), "prefill.present_key"),
    "NaN in the last cache": _fault("prefill", spoil_output("present_value_2", np.nan), "prefill.present_value"),
    "infinity in features": _fault("vision", spoil_output("image_features", np.inf), "vision.image_features"),
    "weight 1e-3 larger, in one graph": Fault(
        edited("vision", nudge("layers.1.mlp.fc1", 1e-3)),
        "1 weights of the cut model are in no graph, first `model.vision_tower.encoder.layers.1.mlp.fc1.weight`",
        "FAIL vision.image_features",
    ),
    "bias of zeros": Fault(
        edited("vision", zero_bias),
        "in no graph, first `model.multi_modal_projector.linear_1.bias`",
        "FAIL vision.image_features",
    ),
    "missing output": Fault(
        edited("decode", drop_output("present_value_0")), "differing: present_value_0", "differing: present_value_0",
        BundleError,
    ),
    "missing logits": Fault(
        edited("prefill", drop_output("logits")), "differing: logits", "differing: logits", BundleError
    ),
}  # fmt: skip
REAL = [name for name in FAULTS if name != "nothing"]


@pytest.fixture
def planted(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Damage], None]:
    def plant(damage: Damage) -> None:
        def write_graphs(model: Any, budgets: Any, keeps: Any, forms: Any, folder: Path, _: Any) -> Any:
            shutil.copytree(bundle / "graphs", folder / "graphs")
            damage(folder / "graphs")
            return read(bundle).graphs

        monkeypatch.setattr("vlmcut.pipeline.write_graphs", write_graphs)

    return plant


def test_control_without_a_fault(planted: Any, run: Any, tmp_path: Path) -> None:
    planted(FAULTS["nothing"].damage)
    result = run(*CONVERT, "-o", tmp_path / "out")
    assert result.code == 0 and "64 of 64 greedy tokens equal" in result.out
    assert run("verify", tmp_path / "out").code == 0


@pytest.mark.parametrize("name", REAL)
def test_convert_stops(name: str, planted: Any, refuses: Any) -> None:
    planted(FAULTS[name].damage)
    result = refuses(*CONVERT, "-o", "out", says=(FAULTS[name].convert,))
    assert "publishing" not in result.err


@pytest.mark.parametrize("name", REAL)
def test_verify_stops(name: str, bundle: Path, copied: Any, refuses: Any) -> None:
    """The manifest's hashes fit the damaged files, so only running the graphs can tell."""
    folder = copied(bundle)
    FAULTS[name].damage(folder / "graphs")
    seal(read(folder), folder)
    result = refuses("verify", folder, says=() if "FAIL" in FAULTS[name].verify else (FAULTS[name].verify,))
    assert FAULTS[name].verify in result.out + result.err
    if "FAIL" in FAULTS[name].verify:
        assert "rows are beyond their tolerance" in result.err


AGAINST = ("swapped heads in decode", "other tokens kept", "bias of zeros", "weight 1e-3 larger in prefill")


@pytest.mark.parametrize("name", AGAINST)
def test_verify_against_the_model_stops(name: str, bundle: Path, copied: Any, refuses: Any) -> None:
    folder = copied(bundle)
    FAULTS[name].damage(folder / "graphs")
    seal(read(folder), folder)
    result = refuses("verify", folder, "--against", "tiny:llava", says=("rows are beyond their tolerance",))
    assert FAULTS[name].verify in result.out


@pytest.mark.parametrize("name", ["swapped heads in decode", "bias of zeros", "missing output"])
def test_api_raises_what_it_says(name: str, planted: Any, tmp_path: Path) -> None:
    planted(FAULTS[name].damage)
    with pytest.raises(FAULTS[name].error) as caught:
        convert(REQUEST, tmp_path / "out")
    assert FAULTS[name].convert in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_changed_weight_is_named_even_if_it_is_tiny(bundle: Path, copied: Any, tiny: Any) -> None:
    """One bit of one element; the numbers of the graphs hardly move."""
    from vlmcut.passes import recipe

    model = tiny("llava").model
    recipe.read(bundle / "recipe.toml").apply(model, None)
    graphs = [bundle / g.file for g in read(bundle).graphs.values()]
    assert complete.missing_weights(model, graphs) == []
    weight = model.model.language_model.layers[1].mlp.gate_proj.weight
    weight.data[3, 4] = torch.nextafter(weight.data[3, 4], torch.tensor(torch.inf))
    name = "model.language_model.layers.1.mlp.gate_proj.weight"
    assert complete.missing_weights(model, graphs) == [name]


def test_wrong_position_at_run_time(planted: Any, refuses: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graphs are sound, the runner feeds decode the position after its token's."""
    planted(FAULTS["nothing"].damage)
    step = Graphs._step

    def late(self: Graphs, role: str, inputs: dict[str, np.ndarray]) -> np.ndarray:
        shift = role == "decode"
        return step(self, role, inputs | {"position_ids": inputs["position_ids"] + shift})

    monkeypatch.setattr(Graphs, "_step", late)
    refuses(*CONVERT, "-o", "out", says=("FAIL decode.present_key",))


def test_other_selection_at_export(refuses: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real exporter with a selector of another method: every weight is there, every operator is right."""
    write = exported.write_graphs

    def write_graphs(model: Any, budgets: Sequence[TokenBudget], *rest: Any) -> dict[str, GraphInfo]:
        selection = attached(model).selection
        assert selection is not None
        own, selection.selector = selection.selector, TableSelector("uniform")
        try:
            return write(model, budgets, *rest)
        finally:
            selection.selector = own

    monkeypatch.setattr("vlmcut.pipeline.write_graphs", write_graphs)
    refuses(*CONVERT, "-o", "out", says=("FAIL vision.kept",))
