"""Visual columns that do less work: against the uncut model with hooks and masks, in eager and in graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor
from vlmcut.errors import PassError
from vlmcut.exporters import onnx
from vlmcut.exporters.components import components
from vlmcut.exporters.engines import build_engine
from vlmcut.exporters.graphs import write_graphs
from vlmcut.exporters.operators import Contrib, Operators, Standard
from vlmcut.manifest import Panel, TokenBudget
from vlmcut.passes.base import Pass
from vlmcut.passes.calibration import read_calibration
from vlmcut.passes.drop_layers import DropLayers
from vlmcut.passes.prune_inside import PruneInside
from vlmcut.passes.prune_tokens import PruneTokens
from vlmcut.passes.recipe import make, parse
from vlmcut.passes.skip_visual import WHATS, SkipVisual, visual_change
from vlmcut.passes.trim_tower import TrimTower
from vlmcut.prompt import Prompt
from vlmcut.surgery.anatomy import Anatomy, Idle
from vlmcut.surgery.costs import costs
from vlmcut.surgery.load import Loaded, describe, locate
from vlmcut.surgery.near import neighbours, repeated
from vlmcut.surgery.neurons import find_mlp
from vlmcut.surgery.selection import attached
from vlmcut.surgery.talk import Talk, see_all

from .cut_helpers import needs_rtx, said

KINDS = "llava llava-siglip-qwen2 llava_next qwen2_vl qwen2_5_vl qwen3_vl internvl smolvlm paligemma mistral3".split()
STEPS = 16
# float32: products over fewer rows, sums in another order; logits are of size 3. Measured on x86: at most 5.9e-6.
ATOL = 2e-5


WINDOW = 3  # of rasters of 2 x 2 tokens and more


def skip(what: str, layers: tuple[int, ...]) -> SkipVisual:
    return SkipVisual(what=what, count=len(layers), layers=layers, window=WINDOW if what == "near" else None)


def beside(panels: Sequence[Panel], images: int, window: int) -> Tensor:
    """Which visual tokens of some images see which, by a loop over their places: bool [N, N]."""
    places = [
        (image, number, row, column)
        for image in range(images)
        for number, panel in enumerate(panels)
        for row in range(panel.rows)
        for column in range(panel.columns + panel.line_breaks)
    ]
    near = [
        [a[:2] == b[:2] and max(abs(a[2] - b[2]), abs(a[3] - b[3])) <= (window - 1) / 2 for b in places] for a in places
    ]
    return torch.tensor(near)


@contextmanager
def whole_but_masked(loaded: Loaded, prompt: Prompt, what: str, layers: Sequence[int]) -> Iterator[None]:
    """While inside, the uncut model computes every row, and what visual rows may not have is taken away after."""
    shrunk, _ = see_all(loaded.model, prompt)
    visual = torch.from_numpy(shrunk.visual_index[0] >= 0)

    def whole(x: Tensor) -> bool:
        return x.shape[1] == len(visual)  # not a step of decode

    def mlp(module: Any, args: Any, out: Tensor) -> Tensor:
        return torch.where(visual[:, None], 0.0, out) if whole(out) else out

    def layer(module: Any, args: Any, out: Any) -> Any:
        x = out[0] if isinstance(out, tuple) else out
        if not whole(x):
            return out
        kept = torch.where(visual[:, None], args[0], x)
        return (kept, *out[1:]) if isinstance(out, tuple) else kept

    def apart(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if not whole(args[0]):
            return args, kwargs
        n = torch.arange(len(visual))
        mask = kwargs.get("attention_mask")
        seen = n[:, None] >= n if mask is None else (mask if mask.dtype == torch.bool else mask == 0)[0, 0]
        among = torch.eye(int(visual.sum()), dtype=torch.bool)
        if what == "near":  # in both directions of the raster
            among = beside(attached(loaded.model).buckets[0].panels, len(prompt.pictures), WINDOW)
        between = (visual[:, None] & visual).nonzero(as_tuple=True)
        seen = seen.index_put(between, among.flatten())
        least = torch.finfo(args[0].dtype).min
        return args, kwargs | {"attention_mask": torch.where(seen, 0.0, least)[None, None]}

    hooks = []
    for index in layers:
        block: Any = locate(loaded.model).language_layers[index]
        if what == "mlp":
            found = find_mlp(block)
            assert found is not None
            hooks.append(found.module.register_forward_hook(mlp))
        elif what == "layer":
            hooks.append(block.register_forward_hook(layer))
        else:
            hooks.append(block.register_forward_pre_hook(apart, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("what", WHATS)
@pytest.mark.parametrize("kind", KINDS)
def test_skipping_is_being_masked(kind: str, what: str, tiny, prompt) -> None:
    """Prefill and 16 decode steps."""
    cut, uncut = tiny(kind), tiny(kind)
    make([]).apply(uncut.model, None)
    before = describe(cut.model)
    layers = (0, before.language.layers - 1)  # in the last one it changes nothing: nobody reads visual columns there
    step = skip(what, layers)
    make([step]).apply(cut.model, None)
    after = describe(cut.model)
    idle = replace(Idle(window=WINDOW if what == "near" else 0), **{WHATS[what]: layers})
    assert after.idle == idle == step.plan(before).idle
    made = prompt(cut)
    tokens = [7 * i % before.language.vocabulary for i in range(1, STEPS + 1)]
    mine = said(cut, made, tokens)
    with whole_but_masked(uncut, made, what, layers):
        want = said(uncut, made, tokens)
    torch.testing.assert_close(mine, want, rtol=0, atol=ATOL)
    assert not torch.allclose(mine, said(uncut, made, tokens), atol=10 * ATOL)  # and it is another model
    flops = [sum(c.flops for c in costs(a, text_tokens=1) if c.part == "language model") for a in (before, after)]
    assert what in ("apart", "near") or flops[1] < flops[0]  # a few visual tokens gain nothing by a mask


FORMS: dict[str, Callable[[], Operators]] = {"contrib": Contrib, "standard": Standard}


def matrix_work(graph: ir.Model) -> int:
    """Multiply-adds of products with weights."""
    total = 0
    for node in graph.graph:
        weight = node.inputs[1] if node.op_type in ("MatMul", "Gemm") else None
        if weight is not None and weight.is_initializer():
            assert weight.shape is not None and node.outputs[0].shape is not None
            total += int(np.prod(node.outputs[0].shape.numpy())) * int(weight.shape.numpy()[0])
    return total


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("what", WHATS)
def test_the_graph_says_the_same_with_less_work(what: str, form: str, tiny, prompt) -> None:
    loaded = tiny("llava")
    made = prompt(loaded)
    a = describe(loaded.model)
    budget = TokenBudget(images=2, visual_tokens=a.visual_tokens, text_tokens=20, new_tokens=2)
    whole = onnx.export(components(loaded.model, budget, a.keep)[1], loaded.model, FORMS[form]())
    make([skip(what, (0, 2))]).apply(loaded.model, None)
    component = components(loaded.model, budget, a.keep)[1]
    graph = onnx.export(component, loaded.model, FORMS[form]())
    lm, rows = a.language, 2 * a.visual_tokens * 2  # of two images, in two layers
    mlp, queries = 3 * lm.hidden * lm.intermediate[0], 2 * lm.hidden * lm.heads[0] * lm.head_dim
    saved = {"mlp": mlp, "layer": mlp + queries}.get(what, 0)  # the others save products of attention alone
    assert matrix_work(whole) - matrix_work(graph) == rows * saved
    session = ort.InferenceSession(ir.serde.serialize_model(graph).SerializeToString())
    shrunk, seen = see_all(loaded.model, made)
    table = torch.cat([s.features for s in seen])
    past = {name: x.numpy() for name, x in component.inputs.items() if name.startswith("past_")}
    found = np.asarray(session.run(["logits"], shrunk.pad(budget) | {"image_features": table.numpy()} | past)[0])
    talk = Talk.read(loaded.model, [shrunk], [seen])
    # float32: other kernels and padding. Measured 3.5e-6.
    np.testing.assert_allclose(found[0], talk.logits[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@needs_rtx
def test_neighbours_are_built_by_tensorrt(dtype: torch.dtype, tiny, tmp_path) -> None:
    loaded = tiny("llava")
    make([skip("near", (0, 2))]).apply(loaded.model, None)
    loaded.model.to(dtype)
    a = describe(loaded.model)
    budget = TokenBudget(images=2, visual_tokens=a.visual_tokens, text_tokens=20, new_tokens=2)
    infos = write_graphs(loaded.model, [budget], [a.keep], Standard(), tmp_path)
    (prefill,) = [info for info in infos.values() if info.role == "prefill"]
    report = build_engine(tmp_path / prefill.file, tmp_path / "prefill.plan", "rtx")
    assert report.plan_bytes == (tmp_path / "prefill.plan").stat().st_size > 0
    assert [(t.name, t.shape) for t in report.outputs] == [(t.name, t.shape) for t in prefill.outputs]


@pytest.mark.parametrize("window", [3, 5])
def test_neighbours_are_those_of_a_loop(window: int) -> None:
    """Rasters of several shapes, one with line breaks, of two images."""
    panels = (Panel(rows=2, columns=3), Panel(rows=4, columns=1, line_breaks=True), Panel(rows=3, columns=5))
    index, there = repeated(neighbours(panels, window), 2 * sum(panel.tokens for panel in panels))
    found = np.zeros((len(index), len(index)), dtype=bool)
    for row, (columns, real) in enumerate(zip(index, there, strict=True)):
        assert len(set(columns[real])) == real.sum() and set(columns[~real]) <= {row}
        found[row, columns[real]] = True
    np.testing.assert_array_equal(found, beside(panels, 2, window).numpy())
    with pytest.raises(ValueError, match="28 visual columns are no whole images of 29 tokens"):
        repeated(neighbours(panels, window), 28)


def test_layers_are_chosen_by_what_they_do_to_visual_columns(tiny, prompt) -> None:
    """A layer whose MLP gives visual columns nothing goes first, behind the last one, which is free."""
    loaded = tiny("llava")
    block: Any = locate(loaded.model).language_layers[1]
    with torch.no_grad():
        block.mlp.down_proj.weight.mul_(1e-3)
    calibration = read_calibration(loaded, None)
    change = visual_change(loaded.model, "mlp", (0, 1, 2), calibration)
    assert change[2] == 0 < change[1] < change[0]
    recipe = make([SkipVisual(what="mlp", count=2)]).apply(loaded.model, calibration)
    assert recipe.passes[-1] == SkipVisual(what="mlp", count=2, layers=(1, 2))


def test_layers_behind_a_rung_are_measured_on_who_is_left(tiny) -> None:
    loaded = tiny("llava")
    calibration = read_calibration(loaded, None)
    whole = visual_change(loaded.model, "mlp", (0, 1), calibration)
    make([PruneInside(method="uniform", layers=(1,), share=(0.5,))]).apply(loaded.model, None)
    cut = visual_change(loaded.model, "mlp", (0, 1), calibration)
    assert cut[0] == whole[0] and cut[1] != whole[1]
    assert cut[1] == pytest.approx(whole[1], rel=0.5)  # a mean over half of the columns


def test_the_last_layer_is_free(tiny, prompt) -> None:
    """Nobody reads what becomes of visual columns there: the answer changes by rounding, and it is taken first."""
    cut, uncut = tiny("llava"), tiny("llava")
    recipe = make([SkipVisual(what="layer", count=1)]).apply(cut.model, read_calibration(cut, None))
    assert recipe.passes[-1] == SkipVisual(what="layer", count=1, layers=(2,))
    torch.testing.assert_close(said(cut, prompt(cut), [1]), said(uncut, prompt(uncut), [1]), rtol=0, atol=ATOL)


def test_neighbours_are_measured_and_written_out(tiny, prompt) -> None:
    """Layers are those that the measure names; the resolved recipe makes the same model without data."""
    loaded, again = tiny("llava"), tiny("llava")
    calibration = read_calibration(loaded, None)
    change = visual_change(loaded.model, "near", (0, 1, 2), calibration)
    step = SkipVisual(what="near", count=2, window=3)
    recipe = make([step]).apply(loaded.model, calibration)
    want = tuple(sorted(sorted(change, key=lambda i: change[i])[:2]))
    assert recipe.passes[-1] == replace(step, layers=want) and not recipe.needs_calibration
    assert parse(recipe.to_toml()) == recipe
    recipe.apply(again.model, None)
    assert describe(again.model) == describe(loaded.model)
    assert torch.equal(said(again, prompt(again), [1]), said(loaded, prompt(loaded), [1]))


def test_fewer_images_than_the_budget(tiny, prompt) -> None:
    """The visual columns of one image stand behind padding where the graph has room for three."""
    loaded = tiny("llava")
    make([skip("near", (0, 1))]).apply(loaded.model, None)
    a = describe(loaded.model)
    made = prompt(loaded)
    budget = TokenBudget(images=3, visual_tokens=a.visual_tokens, text_tokens=20, new_tokens=2)
    component = components(loaded.model, budget, a.keep)[1]
    graph = onnx.export(component, loaded.model, Standard())
    session = ort.InferenceSession(ir.serde.serialize_model(graph).SerializeToString())
    shrunk, seen = see_all(loaded.model, made)
    table = np.zeros(component.inputs["image_features"].shape, np.float32)
    table[: 2 * a.visual_tokens] = torch.cat([s.features for s in seen]).numpy()
    past = {name: x.numpy() for name, x in component.inputs.items() if name.startswith("past_")}
    found = np.asarray(session.run(["logits"], shrunk.pad(budget) | {"image_features": table} | past)[0])
    # float32: other kernels and padding. Measured 1.9e-6.
    np.testing.assert_allclose(found[0], Talk.read(loaded.model, [shrunk], [seen]).logits[0], rtol=0, atol=1e-5)


REFUSED = {
    "what": ({"what": "mpl", "count": 1}, "is called `mpl`", "did you mean `mlp`"),
    "none": ({"what": "mlp", "count": 0}, "count=0, but visual tokens can skip 3 of 3 layers", "choose 1 to 3"),
    "too many": ({"what": "layer", "count": 4}, "count=4", "choose 1 to 3"),
    "twice": ({"what": "mlp", "count": 2, "layers": (1, 1)}, r"layers=\[1, 1\] must be 2 different", "measured"),
    "another's window": ({"what": "mlp", "count": 1, "window": 3}, "window=3 says nothing of `mlp`", "near"),
    "even": ({"what": "near", "count": 1, "window": 4}, "window=4 of rasters of 4x4", "odd number from 3 to 7"),
    "one": ({"what": "near", "count": 1, "window": 1}, "window=1 of rasters of 4x4", "odd number from 3 to 7"),
    "wide": ({"what": "near", "count": 1, "window": 9}, "window=9 of rasters of 4x4", "odd number from 3 to 7"),
    "not there": ({"what": "mlp", "count": 1, "layers": (3,)}, r"must be 1 different ones of \[0, 1, 2\]", "measured"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str, tiny) -> None:
    options, cause, fix = REFUSED[name]
    with pytest.raises(PassError, match=cause) as error:
        SkipVisual(**options).plan(describe(tiny("llava").model))
    assert fix in (error.value.hint or "")


def test_order_rules(tiny) -> None:
    a = describe(tiny("llava").model)
    idle = SkipVisual(what="layer", count=1, layers=(1,)).plan(a)
    for step, fix in (
        (PruneInside(layers=(1,), share=(0.5,)), "put skip-visual last"),
        (DropLayers(part="language", count=1), "put drop-layers before skip-visual"),
    ):
        with pytest.raises(PassError, match="skip work in layers that are named by number") as error:
            step.plan(idle)
        assert error.value.hint == fix
    scored = PruneInside(method="fastv", layers=(1,), share=(0.5,)).plan(a)
    assert SkipVisual(what="layer", count=1).candidates(scored) == (2,)  # 0 and 1 say who goes on
    assert SkipVisual(what="mlp", count=1).candidates(scored) == (0, 1, 2)
    gone = PruneInside(method="exit", layers=(1,), share=(0.0,)).plan(a)
    assert SkipVisual(what="layer", count=1).candidates(gone) == (0,)  # nobody is there to skip the others
    assert SkipVisual(what="mlp", count=1).candidates(idle) == (0, 2)


def test_neighbours_need_a_whole_raster(tiny) -> None:
    near = SkipVisual(what="near", count=1, window=3)
    a = TrimTower().plan(describe(tiny("llava").model))

    def refused(b: Anatomy, cause: str, fix: str, step: Pass = near) -> None:
        with pytest.raises(PassError, match=cause) as error:
            step.plan(b)
        assert fix in (error.value.hint or "")

    refused(PruneTokens(keep=5).plan(a), "`fastervlm` keeps 5 of 16 visual tokens", "leave prune-tokens out")
    (bucket,) = a.buckets
    refused(replace(a, buckets=(replace(bucket, panels=()),)), "nobody knows where", 'what = "apart"')
    wide = replace(bucket, size=(8, 32), panels=(Panel(rows=2, columns=8),))
    two = replace(a, buckets=(bucket, wide), keep=(16, 16))
    refused(two, r"different rasters, 4x4 and 2x8", "one --image-size")
    gone = PruneInside(method="exit", layers=(1,), share=(0.0,)).plan(a)
    assert near.candidates(gone) == (0,)
    refused(gone, "from layer 1 on visual tokens have left", "choose 1 to 1", replace(near, count=2))
    refused(gone, r"ones of \[0\]; from layer 1 on", "measured", replace(near, layers=(1,)))
    once = replace(near, layers=(0,)).plan(a)
    assert once.idle == Idle(near=(0,), window=3)
    assert replace(near, layers=(2,)).plan(once).idle == Idle(near=(0, 2), window=3)
    assert SkipVisual(what="mlp", count=1, layers=(2,)).plan(once).idle == Idle(mlp=(2,), near=(0,), window=3)
    refused(once, "window=5, and other layers have 3", "choose one window", SkipVisual(what="near", count=1))
    refused(once, r"neighbours in layers \[0\], and some would go", "prune-tokens first", PruneTokens(keep=5))


def test_windows_and_convolutions_are_refused(tiny) -> None:
    for kind, cause in (("gemma3", "16 columns back"), ("lfm2_vl", "mix neighbouring columns")):
        with pytest.raises(PassError, match=cause):
            SkipVisual(what="layer", count=1).plan(describe(tiny(kind).model))
    assert SkipVisual(what="mlp", count=1).plan(describe(tiny("gemma3").model)).idle.mlp == (3,)
