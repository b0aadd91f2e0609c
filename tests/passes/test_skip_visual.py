"""Visual columns that do less work: against the uncut model with hooks and masks, in eager and in graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from vlmcut.exporters.operators import Contrib, Operators, Standard
from vlmcut.manifest import TokenBudget
from vlmcut.passes.calibration import read_calibration
from vlmcut.passes.drop_layers import DropLayers
from vlmcut.passes.prune_inside import PruneInside
from vlmcut.passes.recipe import make
from vlmcut.passes.skip_visual import WHATS, SkipVisual, visual_change
from vlmcut.prompt import Prompt
from vlmcut.surgery.anatomy import Idle
from vlmcut.surgery.costs import costs
from vlmcut.surgery.load import Loaded, describe, locate
from vlmcut.surgery.neurons import find_mlp
from vlmcut.surgery.talk import Talk, see_all

KINDS = "llava llava-siglip-qwen2 llava_next qwen2_vl qwen2_5_vl qwen3_vl internvl smolvlm paligemma mistral3".split()
STEPS = 16
# float32: products over fewer rows, sums in another order; logits are of size 3. Measured on x86: at most 5.9e-6.
ATOL = 2e-5


def said(loaded: Loaded, prompt: Prompt, tokens: Sequence[int]) -> Tensor:
    """Logits after a prompt and after each token, [1 + T, V]."""
    shrunk, seen = see_all(loaded.model, prompt)
    talk = Talk.read(loaded.model, [shrunk], [seen])
    rows = [talk.logits[0]]
    for token in tokens:
        talk = talk.say(torch.tensor([token]))
        rows.append(talk.logits[0])
    return torch.stack(rows)


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
        seen = seen & ~(visual[:, None] & visual & (n[:, None] != n))
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
    step = SkipVisual(what=what, count=len(layers), layers=layers)
    make([step]).apply(cut.model, None)
    after = describe(cut.model)
    assert after.idle == Idle(**{WHATS[what]: layers}) == step.plan(before).idle
    made = prompt(cut)
    tokens = [7 * i % before.language.vocabulary for i in range(1, STEPS + 1)]
    mine = said(cut, made, tokens)
    with whole_but_masked(uncut, made, what, layers):
        want = said(uncut, made, tokens)
    torch.testing.assert_close(mine, want, rtol=0, atol=ATOL)
    assert not torch.allclose(mine, said(uncut, made, tokens), atol=10 * ATOL)  # and it is another model
    flops = [sum(c.flops for c in costs(a, text_tokens=1) if c.part == "language model") for a in (before, after)]
    assert what == "apart" or flops[1] < flops[0]  # a few visual tokens gain nothing by a mask


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
    make([SkipVisual(what=what, count=2, layers=(0, 2))]).apply(loaded.model, None)
    component = components(loaded.model, budget, a.keep)[1]
    graph = onnx.export(component, loaded.model, FORMS[form]())
    lm, rows = a.language, 2 * a.visual_tokens * 2  # of two images, in two layers
    mlp, queries = 3 * lm.hidden * lm.intermediate[0], 2 * lm.hidden * lm.heads[0] * lm.head_dim
    saved = {"mlp": mlp, "layer": mlp + queries, "apart": 0}[what]  # `apart` saves products of attention alone
    assert matrix_work(whole) - matrix_work(graph) == rows * saved
    session = ort.InferenceSession(ir.serde.serialize_model(graph).SerializeToString())
    shrunk, seen = see_all(loaded.model, made)
    table = torch.cat([s.features for s in seen])
    past = {name: x.numpy() for name, x in component.inputs.items() if name.startswith("past_")}
    found = session.run(["logits"], shrunk.pad(budget) | {"image_features": table.numpy()} | past)[0]
    talk = Talk.read(loaded.model, [shrunk], [seen])
    # float32: other kernels and padding. Measured 3.5e-6.
    np.testing.assert_allclose(found[0], talk.logits[0], rtol=0, atol=1e-5)


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


REFUSED = {
    "what": ({"what": "mpl", "count": 1}, "is called `mpl`", "did you mean `mlp`"),
    "none": ({"what": "mlp", "count": 0}, "count=0, but visual tokens can skip 3 of 3 layers", "choose 1 to 3"),
    "too many": ({"what": "layer", "count": 4}, "count=4", "choose 1 to 3"),
    "twice": ({"what": "mlp", "count": 2, "layers": (1, 1)}, r"layers=\[1, 1\] must be 2 different", "measured"),
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


def test_windows_and_convolutions_are_refused(tiny) -> None:
    for kind, cause in (("gemma3", "16 columns back"), ("lfm2_vl", "mix neighbouring columns")):
        with pytest.raises(PassError, match=cause):
            SkipVisual(what="layer", count=1).plan(describe(tiny(kind).model))
    assert SkipVisual(what="mlp", count=1).plan(describe(tiny("gemma3").model)).idle.mlp == (3,)
