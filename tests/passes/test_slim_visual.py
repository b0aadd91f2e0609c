"""Visual columns that use fewer heads and neurons: against the uncut model with hooks, in eager and in graphs."""

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
import vlmcut
from torch import Tensor
from transformers import DynamicCache
from vlmcut.errors import PassError
from vlmcut.exporters import onnx
from vlmcut.exporters.components import components
from vlmcut.exporters.engines import build_engine
from vlmcut.exporters.flops import count
from vlmcut.exporters.operators import Contrib, Operators, Standard
from vlmcut.manifest import TokenBudget
from vlmcut.passes import folder
from vlmcut.passes.calibration import read_calibration
from vlmcut.passes.drop_heads import DropHeads
from vlmcut.passes.drop_layers import DropLayers
from vlmcut.passes.drop_neurons import DropNeurons
from vlmcut.passes.prune_inside import PruneInside
from vlmcut.passes.quantize import Quantize
from vlmcut.passes.recipe import make, parse
from vlmcut.passes.skip_visual import SkipVisual
from vlmcut.passes.slim_visual import WHATS, SlimVisual, head_ratio, head_ratios, visual_importance
from vlmcut.prompt import Prompt
from vlmcut.surgery.anatomy import Anatomy, Idle
from vlmcut.surgery.costs import costs, predict
from vlmcut.surgery.inside import Columns, Passage, passing
from vlmcut.surgery.load import Loaded, describe, locate
from vlmcut.surgery.neurons import find_mlp
from vlmcut.surgery.selection import attached
from vlmcut.surgery.structure import find_attention, head_dim, output_name
from vlmcut.surgery.talk import Talk, see_all
from vlmcut.surgery.taps import Calls

from .cut_helpers import needs_rtx, said

KINDS = "llava llava-siglip-qwen2 llava_next qwen2_vl qwen2_5_vl qwen3_vl internvl smolvlm paligemma mistral3".split()
STEPS = 16
# float32: products over fewer rows and columns end in another order; logits are of size 3. Measured on x86: 4.9e-6.
ATOL = 2e-5


def whole(a: Anatomy, what: str) -> tuple[int, ...]:
    return a.language.heads if what == "heads" else a.language.intermediate


def some(a: Anatomy, what: str) -> SlimVisual:
    """Every other head of layer 0 and one of the last layer, or neurons of both; nothing out of those between."""
    numbers = whole(a, what)
    keep = [tuple(range(n)) for n in numbers]
    keep[0], keep[-1] = keep[0][1::2], keep[-1][1:]
    gone = sum(numbers) - sum(map(len, keep))
    return SlimVisual(what=what, fraction=gone / sum(numbers), keep=tuple(keep), ranking="global", first=0)


def nothing(a: Anatomy, what: str) -> SlimVisual:
    """Nothing is left for visual columns in layer 0."""
    numbers = whole(a, what)
    keep = [tuple(range(n)) for n in numbers]
    keep[0] = ()
    return SlimVisual(what=what, fraction=numbers[0] / sum(numbers), keep=tuple(keep), ranking="global", first=0)


@contextmanager
def without(loaded: Loaded, prompt: Prompt, what: str, keep: Sequence[Sequence[int]]) -> Iterator[None]:
    """While inside, the uncut model computes everything, and what visual rows may not use is zero where it is read."""
    shrunk, _ = see_all(loaded.model, prompt)
    visual = torch.from_numpy(shrunk.visual_index[0] >= 0)

    def silence(linear: Any, kept: Sequence[int], width: int) -> Any:
        gone = torch.ones(linear.in_features // width, dtype=torch.bool)
        gone[list(kept)] = False
        columns = gone.repeat_interleave(width)

        def hook(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            (x,) = args
            if x.shape[1] != len(visual):  # a step of decode
                return args
            return (x.masked_fill(visual[:, None] & columns, 0),)

        return linear.register_forward_pre_hook(hook)

    hooks = []
    for block, kept in zip(locate(loaded.model).language_layers, keep, strict=True):
        if what == "heads":
            attention: Any = find_attention(block)
            hooks.append(silence(getattr(attention, output_name(attention)), kept, head_dim(attention)))
        else:
            mlp = find_mlp(block)
            assert mlp is not None
            hooks.append(silence(mlp.reads, kept, 1))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("maker", [some, nothing])
@pytest.mark.parametrize("what", WHATS)
@pytest.mark.parametrize("kind", KINDS)
def test_fewer_are_the_others_silent(kind: str, what: str, maker: Callable[..., SlimVisual], tiny, prompt) -> None:
    """Prefill and 16 decode steps."""
    cut, uncut = tiny(kind), tiny(kind)
    make([]).apply(uncut.model, None)
    before = describe(cut.model)
    step = maker(before, what)
    make([step]).apply(cut.model, None)
    after = describe(cut.model)
    assert step.keep is not None
    fewer = [
        (i, len(kept)) for i, (kept, n) in enumerate(zip(step.keep, whole(before, what), strict=True)) if len(kept) < n
    ]
    assert after.idle == replace(Idle(), **{what: tuple(fewer)}) == step.plan(before).idle
    made = prompt(cut)
    tokens = [7 * i % before.language.vocabulary for i in range(1, STEPS + 1)]
    mine = said(cut, made, tokens)
    with without(uncut, made, what, step.keep):
        want = said(uncut, made, tokens)
    torch.testing.assert_close(mine, want, rtol=0, atol=ATOL)
    assert not torch.allclose(mine, said(uncut, made, tokens), atol=10 * ATOL)  # and it is another model
    flops = [sum(c.flops for c in costs(a, text_tokens=1) if c.part == "language model") for a in (before, after)]
    assert flops[1] < flops[0]


FORMS: dict[str, Callable[[], Operators]] = {"contrib": Contrib, "standard": Standard}


def prefill(loaded: Loaded, budget: TokenBudget, form: str) -> tuple[Any, ir.Model]:
    """The component and its graph."""
    a = describe(loaded.model)
    component = components(loaded.model, budget, a.keep, a.quantized)[1]
    return component, onnx.export(component, loaded.model, FORMS[form]())


def answer(loaded: Loaded, made: Prompt, budget: TokenBudget, component: Any, graph: ir.Model) -> tuple[Any, Any]:
    """Logits of a prompt in ONNX Runtime and in eager, [V] each."""
    session = ort.InferenceSession(ir.serde.serialize_model(graph).SerializeToString())
    shrunk, seen = see_all(loaded.model, made)
    table = torch.zeros_like(component.inputs["image_features"])
    table[: sum(shrunk.counts)] = torch.cat([s.features for s in seen])
    past = {name: x.numpy() for name, x in component.inputs.items() if name.startswith("past_")}
    found: Any = session.run(["logits"], shrunk.pad(budget) | {"image_features": table.numpy()} | past)[0]
    return found[0], Talk.read(loaded.model, [shrunk], [seen]).logits[0].numpy()


def constants(graph: ir.Model) -> tuple[int, int]:
    """Bytes of all initializers, and of those that are no float."""
    tensors = [one.const_value for one in graph.graph.initializers.values()]
    sizes = [(t.dtype, t.nbytes) for t in tensors if t is not None]
    return sum(n for _, n in sizes), sum(n for dtype, n in sizes if dtype != ir.DataType.FLOAT)


@pytest.mark.parametrize("maker", [some, nothing])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("what", WHATS)
def test_the_graph_says_the_same_with_less_work(what: str, form: str, maker: Any, tiny, prompt) -> None:
    """FLOPs and weights to the number; the file holds no weight twice."""
    loaded = tiny("llava")
    a = describe(loaded.model)
    budget = TokenBudget(images=2, visual_tokens=a.visual_tokens, text_tokens=20, new_tokens=2)
    _, uncut = prefill(loaded, budget, form)
    step = maker(a, what)
    make([step]).apply(loaded.model, None)
    component, graph = prefill(loaded, budget, form)
    lm, columns, visual = a.language, budget.sequence, 2 * a.visual_tokens
    saved = slices = 0
    for kept, number in zip(step.keep, whole(a, what), strict=True):
        gone = number - len(kept)
        if gone and what == "heads":  # q and o; attention of every pair, where it was causal in one form
            pairs = columns * (columns + 1) // 2 if form == "contrib" else columns**2
            met = (columns - visual) * columns * number + visual * columns * len(kept)
            saved += 2 * visual * 2 * lm.hidden * lm.head_dim * gone + 4 * lm.head_dim * (pairs * number - met)
            slices += 2 * lm.hidden * lm.head_dim * len(kept)
        elif gone:
            saved += 2 * visual * 3 * lm.hidden * gone
            slices += 3 * lm.hidden * len(kept)
    before, after = count(uncut), count(graph)
    assert before.flops - after.flops == saved
    causal = FORMS[form]().causal(torch.float32, lm.head_dim)
    planned = predict(describe(loaded.model), budget, "prefill", causal=causal)
    assert planned.flops == after.flops
    assert planned.weight_bytes - predict(a, budget, "prefill", causal=causal).weight_bytes == 4 * slices
    floats = [every - other for every, other in map(constants, (uncut, graph))]
    assert 0 <= floats[1] - floats[0] < 64  # float constants of a softmax, no weight
    indices = constants(graph)[1] - constants(uncut)[1]
    assert after.weight_bytes - before.weight_bytes == 4 * slices + indices + floats[1] - floats[0]
    have, want = answer(loaded, prompt(loaded), budget, component, graph)
    # float32: other kernels and padding. Measured 3.4e-6.
    np.testing.assert_allclose(have, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("what", WHATS)
def test_fewer_images_than_there_is_room_for(what: str, form: str, tiny, prompt) -> None:
    """Padding is among the visual columns of the graph, and there is none in eager."""
    loaded = tiny("llava")
    a = describe(loaded.model)
    make([some(a, what)]).apply(loaded.model, None)
    budget = TokenBudget(images=4, visual_tokens=a.visual_tokens, text_tokens=20, new_tokens=2)
    # float32: other kernels and padding. Measured 3.4e-6.
    np.testing.assert_allclose(
        *answer(loaded, prompt(loaded), budget, *prefill(loaded, budget, form)), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("what", WHATS)
def test_int8_does_not_see_padding(what: str, tiny, prompt) -> None:
    """Graphs with room for the prompt alone and for two images more say the same."""
    loaded = tiny("llava")
    a = describe(loaded.model)
    make([some(a, what), Quantize(parts=("language",))]).apply(loaded.model, None)
    made = prompt(loaded)
    shrunk, _ = see_all(loaded.model, made)
    found = []
    for images, text in ((2, shrunk.length - sum(shrunk.counts)), (4, 24)):
        budget = TokenBudget(images=images, visual_tokens=a.visual_tokens, text_tokens=text, new_tokens=2)
        have, want = answer(loaded, made, budget, *prefill(loaded, budget, "contrib"))
        # int8: a sum that ends in another order moves a rounding. Measured 0.034 (heads) and 0 (neurons).
        np.testing.assert_allclose(have, want, rtol=0, atol=0.1)
        found.append(have)
    assert np.array_equal(*found)


@pytest.mark.parametrize("step", ["heads", "apart"])
def test_padding_among_visual_columns_stays_zero(step: str, tiny) -> None:
    """As in the whole model; or the scales of int8 would see it."""
    loaded = tiny("llava")
    a = describe(loaded.model)
    cut = SkipVisual(what="apart", count=1, layers=(0,)) if step == "apart" else some(a, "heads")
    make([cut]).apply(loaded.model, None)
    parts = locate(loaded.model)
    visual = torch.zeros(1, 12, dtype=torch.bool)
    visual[:, 2:6] = True
    x = torch.randn(1, 12, a.language.hidden, generator=torch.Generator().manual_seed(0))
    columns = Columns(torch.arange(12)[None], visual, torch.tensor([9]))  # room for 2 visual columns more, and for 1
    passage = Passage(loaded.model, x, columns, 6, [])
    given: list[Tensor] = []
    attention: Any = find_attention(parts.language_layers[0])
    hook = attention.o_proj.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    with torch.no_grad(), passing(loaded.model, passage):
        parts.language(inputs_embeds=x, past_key_values=DynamicCache(), use_cache=True)
    hook.remove()
    (mine,) = [one[0] for one in given if one.shape[1] == 6 and one is given[-1]]
    places = passage.split.visual[0]
    assert places.tolist() == [9, 10, 2, 3, 4, 5] or places.tolist() == [10, 11, 2, 3, 4, 5]
    assert (mine[:2] == 0).all() and (mine[2:].abs().amax(dim=-1) > 0).all()


def test_text_and_what_works_together(tiny, prompt) -> None:
    """Both in one layer, beside skipped MLPs and behind a rung, and the whole prompt where nothing is left out."""
    loaded, uncut = tiny("llava"), tiny("llava")
    a = describe(loaded.model)
    make([]).apply(uncut.model, None)
    heads, neurons = some(a, "heads"), some(a, "neurons")
    make([heads, neurons]).apply(loaded.model, None)
    assert describe(loaded.model).idle == Idle(heads=((0, 3), (2, 5)), neurons=((0, 40), (2, 79)))
    made = prompt(loaded)
    with without(uncut, made, "heads", heads.keep or ()), without(uncut, made, "neurons", neurons.keep or ()):
        want = said(uncut, made, [1, 2])
    torch.testing.assert_close(said(loaded, made, [1, 2]), want, rtol=0, atol=ATOL)
    words = Prompt(np.arange(5)[None] + 3, np.full((1, 5), -1), np.arange(5)[None], 5, (), (), a.layout)
    assert torch.equal(said(loaded, words, [1]), said(uncut, words, [1]))  # a prompt of text does all work


STEPS_BEFORE = {
    "a rung": [PruneInside(method="fastv", layers=(1,), share=(0.5,))],
    "an exit": [PruneInside(method="exit", layers=(2,), share=(0.0,))],
    "fewer heads and neurons": [
        DropHeads(part="language", fraction=1 / 3, keep=((0, 1), (0, 2), (1, 2))),
        DropNeurons(part="language", fraction=0.5, keep=(tuple(range(40)),) * 3),
    ],
    "skipped MLPs": [SkipVisual(what="mlp", count=1, layers=(1,))],
}


@pytest.mark.parametrize("what", WHATS)
@pytest.mark.parametrize("before", STEPS_BEFORE)
def test_behind_other_cuts(before: str, what: str, tiny, prompt) -> None:
    """Measured on what they left, and the graph says the same with the work that was predicted."""
    loaded = tiny("llava")
    recipe = make([*STEPS_BEFORE[before], SlimVisual(what=what, fraction=0.5, ranking="global", first=0)])
    done = recipe.apply(loaded.model, read_calibration(loaded, None))
    a = describe(loaded.model)
    assert getattr(a.idle, what)
    budget = TokenBudget(images=2, visual_tokens=16, text_tokens=20, new_tokens=2, ladder=a.ladder)
    _, graph = prefill(loaded, budget, "standard")
    assert predict(a, budget, "prefill", causal=False).flops == pytest.approx(count(graph).flops, rel=0.05)
    again = tiny("llava")
    parse(done.to_toml()).apply(again.model, None)
    assert attached(again.model).slim == attached(loaded.model).slim
    made = prompt(loaded)
    assert torch.equal(said(again, made, [1]), said(loaded, made, [1]))


def test_the_head_that_sees_the_picture_stays(tiny) -> None:
    """In one head text sees visual columns most; the others look at all columns alike."""
    loaded = tiny("llava")
    calibration = read_calibration(loaded, None)
    found = head_ratios(loaded.model, (0, 1, 2), calibration)
    assert [len(one) for one in found.values()] == [6, 6, 6]
    planted = int(found[1].argmin())
    attention: Any = find_attention(locate(loaded.model).language_layers[1])
    q = attention.q_proj
    with torch.no_grad():  # scores of the others are all alike: as much for a visual column as for one of text
        weight = q.weight.unflatten(0, (6, 32))
        weight[[h for h in range(6) if h != planted]] = 0
        weight[planted] *= -1  # it saw visual columns least, and now it sees them most
    after = head_ratios(loaded.model, (1,), calibration)[1]
    others = torch.cat([after[:planted], after[planted + 1 :]])
    # float64: the number of visual columns over that of text, row by row. Measured 0.
    torch.testing.assert_close(others, others[:1].expand(5), rtol=1e-9, atol=0)
    step = SlimVisual(what="heads", fraction=5 / 6, first=1)
    assert after[planted] > others.max()  # 1.51 and 1.44
    done = make([step]).apply(loaded.model, calibration).passes[-1]
    assert isinstance(done, SlimVisual) and done.keep is not None
    assert done.keep[0] == tuple(range(6)) and done.keep[1] == (planted,)


def test_a_ratio_is_what_numpy_says() -> None:
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(1, 4, 9, 8)), rng.normal(size=(1, 2, 9, 8))
    visual = np.array([0, 1, 1, 1, 0, 1, 0, 0, 0], dtype=bool)
    tap = Calls([(torch.from_numpy(q), torch.from_numpy(k))], scale=0.3)
    columns = Columns(torch.arange(9)[None], torch.from_numpy(visual)[None], torch.tensor([9]))
    found = head_ratio(tap, columns, torch.from_numpy(visual))
    for head in range(4):
        seen = text = 0.0
        for row in (6, 7, 8):
            score = np.exp(0.3 * k[0, head // 2, : row + 1] @ q[0, head, row])
            score /= score.sum()
            seen, text = seen + score[visual[: row + 1]].sum(), text + score[~visual[: row + 1]].sum()
        assert found[head] == pytest.approx(seen / text, rel=1e-12)
    late = torch.from_numpy(np.roll(visual, 3))
    with pytest.raises(PassError, match="of 9 columns ends in an image") as error:
        head_ratio(tap, columns, late)
    assert error.value.hint == "put the question behind the image"


def test_neurons_that_visual_columns_use_stay(tiny) -> None:
    """Ranked by visual columns alone, against hooks; a neuron that nobody reads goes first."""
    loaded = tiny("llava")
    calibration = read_calibration(loaded, None)
    mlp = find_mlp(locate(loaded.model).language_layers[1])
    assert mlp is not None
    dead = [3, 17, 60]
    with torch.no_grad():
        mlp.reads.weight[:, dead] = 0
    sums, rows = torch.zeros(80, dtype=torch.float64), 0
    for made in calibration.prompts:
        shrunk, seen = see_all(loaded.model, made)
        given: list[Tensor] = []
        hook = mlp.reads.register_forward_pre_hook(lambda _, args, given=given: given.append(args[0]))
        Talk.read(loaded.model, [shrunk], [seen])
        hook.remove()
        visual = given[0][0, shrunk.visual_index[0] >= 0].double()
        sums, rows = sums + visual.abs().sum(dim=0), rows + len(visual)
    want = sums / rows * mlp.reads.weight.double().norm(dim=0)
    found = visual_importance(loaded.model, (1,), calibration)[1]
    # float64: the same sums. Measured 0.
    torch.testing.assert_close(found, want, rtol=1e-12, atol=0)
    done = make([SlimVisual(what="neurons", fraction=3 / 80)]).apply(loaded.model, calibration).passes[-1]
    assert isinstance(done, SlimVisual) and done.keep is not None
    assert done.keep[1] == tuple(i for i in range(80) if i not in dead)


def test_the_last_layer_is_free(tiny, prompt) -> None:
    """Nobody reads what becomes of visual columns there: it gives all that it can first, and the answer stays."""
    for what in WHATS:
        cut, uncut = tiny("llava"), tiny("llava")
        step = SlimVisual(what=what, fraction=1 / 3, ranking="global", first=0)
        done = make([step]).apply(cut.model, read_calibration(cut, None)).passes[-1]
        assert isinstance(done, SlimVisual) and done.keep is not None
        assert [len(k) for k in done.keep] == [6, 6, 0] if what == "heads" else [80, 80, 0]
        torch.testing.assert_close(said(cut, prompt(cut), [1]), said(uncut, prompt(uncut), [1]), rtol=0, atol=ATOL)


ALL = tuple(range(6))
REFUSED = {
    "what": ({"what": "head", "fraction": 0.5}, "no what `head`", "did you mean `heads`"),
    "ranking": ({"what": "heads", "fraction": 0.5, "ranking": "globl"}, "no ranking `globl`", "did you mean `global`"),
    "all": ({"what": "heads", "fraction": 1.0}, "fraction=1.0 of the heads", "0 <= fraction < 1"),
    "none stays": ({"what": "heads", "fraction": 0.95}, "fraction=0.95 leaves 0 of 6 heads", "choose at most 0.8333"),
    "first": ({"what": "heads", "fraction": 0.5, "first": 3}, "first=3, but the language model has 3", "0 to 2"),
    "another number": (
        {"what": "heads", "fraction": 0.5, "keep": (ALL, ALL, (0, 1))},
        r"keep lists \[6, 6, 2\] heads per layer, fraction=0.5 of \[6, 6, 6\] leaves \[6, 6, 3\]",
        "measured",
    ),
    "before first": (
        {"what": "heads", "fraction": 0.5, "ranking": "global", "keep": ((0, 1, 2), ALL, ALL)},
        r"leaves 15 in all; some may be left out of layers \[2\]",
        "measured",
    ),
    "twice": ({"what": "heads", "fraction": 0.5, "keep": (ALL, ALL, (1, 1, 2))}, r"keep lists \[6, 6, 3\]", "measured"),
    "not there": (
        {"what": "heads", "fraction": 0.5, "keep": (ALL, ALL, (4, 5, 6))},
        r"keep lists \[6, 6, 3\]",
        "measured",
    ),
    "too few layers": ({"what": "heads", "fraction": 0.5, "keep": (ALL, ALL)}, r"keep lists \[6, 6\]", "measured"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str, tiny) -> None:
    options, cause, fix = REFUSED[name]
    with pytest.raises(PassError, match=cause) as error:
        SlimVisual(**options).plan(describe(tiny("llava").model))
    assert fix in (error.value.hint or "")


def test_families_that_are_refused(tiny) -> None:
    for kind, what, cause in (
        ("gemma3", "heads", "16 columns back"),
        ("lfm2_vl", "heads", "mix neighbouring columns"),
    ):
        with pytest.raises(PassError, match=cause):
            SlimVisual(what=what, fraction=0.5, first=0).plan(describe(tiny(kind).model))
    assert SlimVisual(what="neurons", fraction=0.5).plan(describe(tiny("gemma3").model)).idle.neurons


def test_heads_and_neurons_that_depend_on_each_other_are_refused(tiny) -> None:
    a = describe(tiny("llava").model)
    bound = Anatomy(**{**vars(a), "language": type(a.language)(**{**vars(a.language), "bound": "it is fused"})})
    with pytest.raises(PassError, match="no head of `llava` can be left out: it is fused"):
        SlimVisual(what="heads", fraction=0.5).plan(bound)
    solid = Anatomy(**{**vars(a), "language": type(a.language)(**{**vars(a.language), "solid": "it is experts"})})
    with pytest.raises(PassError, match="no neuron of `llava` can be left out: it is experts"):
        SlimVisual(what="neurons", fraction=0.5).plan(solid)


def test_order_rules(tiny) -> None:
    a = describe(tiny("llava").model)
    heads = SlimVisual(what="heads", fraction=0.5, first=0).plan(a)
    neurons = SlimVisual(what="neurons", fraction=0.5).plan(a)
    for cut, step, cause, fix in (
        (heads, PruneInside(layers=(1,), share=(0.5,)), "named by number", "put slim-visual last"),
        (neurons, DropLayers(part="language", count=1), "named by number", "put drop-layers before slim-visual"),
        (heads, DropHeads(part="language", fraction=1 / 3), "heads of 3 layers", "put drop-heads before slim-visual"),
        (neurons, DropNeurons(part="language", fraction=0.5), "neurons of 3", "put drop-neurons before slim-visual"),
        (Quantize(parts=("language",)).plan(a), SlimVisual(what="heads", fraction=0.5), "int8", "put quantize last"),
        (heads, SlimVisual(what="heads", fraction=0.5, first=0), "of 3 layers, from layer 0 on", "leave this pass out"),
        (heads, SlimVisual(what="heads", fraction=0.5), "of 3 layers, from layer 2 on", "give a lower `first`"),
    ):
        with pytest.raises(PassError, match=cause) as error:
            step.plan(cut)
        assert fix in (error.value.hint or "")
    assert DropHeads(part="vision", fraction=0.25).plan(heads).idle == heads.idle
    assert DropNeurons(part="language", fraction=0.5).plan(heads).idle == heads.idle
    assert SkipVisual(what="mlp", count=1).candidates(heads) == ()  # they do less there already
    free = SlimVisual(what="heads", fraction=0.5, first=0).free
    assert free(neurons) == (0, 1, 2)
    assert free(SkipVisual(what="mlp", count=1, layers=(1,)).plan(a)) == (0, 1, 2)
    assert free(SkipVisual(what="layer", count=1, layers=(1,)).plan(a)) == (0, 2)
    assert free(PruneInside(method="fastv", layers=(1,), share=(0.5,)).plan(a)) == (2,)  # 0 and 1 say who goes on
    assert free(PruneInside(method="exit", layers=(1,), share=(0.0,)).plan(a)) == (0,)  # nobody is there
    mlps = SlimVisual(what="neurons", fraction=0.5).free
    assert mlps(SkipVisual(what="mlp", count=1, layers=(1,)).plan(a)) == (0, 2)
    assert mlps(PruneInside(method="core", layers=(1,), share=(0.5,)).plan(a)) == (1, 2)  # neurons of 0 say it


def test_notes_say_what_is_measured(tiny) -> None:
    a = describe(tiny("llava").model)
    notes = SlimVisual(what="heads", fraction=0.5, ranking="global").notes(a)
    assert notes[0] == "which heads visual tokens use is measured" and notes[1] == "before layer 2 they use all"
    assert "spreads them evenly" in notes[2]
    assert SlimVisual(what="neurons", fraction=0.5).notes(a) == ["which neurons visual tokens use is measured"]
    assert some(a, "heads").notes(a) == []


@pytest.mark.parametrize("what", WHATS)
def test_a_cut_folder_reloads(what: str, tiny, prompt, tmp_path) -> None:
    loaded = tiny("llava")
    source = loaded.model.config
    recipe = make([SlimVisual(what=what, fraction=0.5, first=0)]).apply(loaded.model, read_calibration(loaded, None))
    folder.save(loaded, tmp_path / "cut", source, recipe)
    again = folder.load(tmp_path / "cut")
    assert describe(again.model).idle == describe(loaded.model).idle
    assert attached(again.model).slim == attached(loaded.model).slim
    made = prompt(loaded)
    assert torch.equal(said(again, made, [1]), said(loaded, made, [1]))


@needs_rtx
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("what", WHATS)
def test_tensorrt_builds_it(what: str, dtype: torch.dtype, tmp_path) -> None:
    loaded = vlmcut.load("tiny:llava", dtype=dtype)
    a = describe(loaded.model)
    make([some(a, what)]).apply(loaded.model, None)
    budget = TokenBudget(images=1, visual_tokens=a.visual_tokens, text_tokens=20, new_tokens=2)
    _, graph = prefill(loaded, budget, "standard")
    ir.save(graph, tmp_path / "prefill.onnx")
    assert build_engine(tmp_path / "prefill.onnx", tmp_path / "prefill.plan", "rtx").plan_bytes > 10_000
