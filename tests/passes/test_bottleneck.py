"""Text that sees a picture through its last tokens: against the uncut model with a mask, in eager and in graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vlmcut
from PIL import Image
from torch import Tensor
from vlmcut import pipeline, tables
from vlmcut.errors import BundleError, PassError
from vlmcut.exporters import onnx
from vlmcut.exporters.components import components
from vlmcut.exporters.flops import count
from vlmcut.exporters.graphs import write_graphs
from vlmcut.exporters.operators import Contrib, Operators, Standard
from vlmcut.manifest import Manifest, Rung, TokenBudget
from vlmcut.passes.bottleneck import Bottleneck
from vlmcut.passes.calibration import read_calibration
from vlmcut.passes.heal import Heal
from vlmcut.passes.prune_inside import PruneInside
from vlmcut.passes.prune_tokens import PruneTokens
from vlmcut.passes.quantize import Quantize
from vlmcut.passes.recipe import make
from vlmcut.passes.skip_visual import SkipVisual
from vlmcut.passes.slim_visual import SlimVisual
from vlmcut.pipeline import Request
from vlmcut.prompt import Prompt
from vlmcut.runtime import sessions
from vlmcut.runtime.sessions import Graphs
from vlmcut.surgery.anatomy import Anatomy
from vlmcut.surgery.costs import kv_bytes, predict
from vlmcut.surgery.load import Loaded, describe, locate
from vlmcut.surgery.talk import Talk, greedy, see_all
from vlmcut.validation import exactness

KINDS = "llava llava-siglip-qwen2 llava_next qwen2_vl qwen2_5_vl qwen3_vl internvl smolvlm paligemma mistral3".split()
STEPS = 16
# float32: fewer keys or masked ones, sums in another order; logits are of size 5. Measured on x86: at most 1.1e-5.
ATOL = 2e-5


def said(loaded: Loaded, prompt: Prompt, tokens: Sequence[int]) -> tuple[Tensor, Talk]:
    """Logits after a prompt and after each token, [1 + T, V], and the last step."""
    shrunk, seen = see_all(loaded.model, prompt)
    talk = Talk.read(loaded.model, [shrunk], [seen])
    rows = [talk.logits[0]]
    for token in tokens:
        talk = talk.say(torch.tensor([token]))
        rows.append(talk.logits[0])
    return torch.stack(rows), talk


def hidden_columns(prompt: Prompt, carriers: int) -> np.ndarray:
    """Visual columns of a shrunk prompt that are no carriers, bool [S]; picture by picture."""
    index, hidden, start = prompt.visual_index[0], np.zeros(prompt.length, dtype=bool), 0
    for tokens in prompt.counts:
        for token in range(start, start + tokens - carriers):
            hidden[np.flatnonzero(index == token)] = True
        start += tokens
    return hidden


@contextmanager
def masked(loaded: Loaded, prompt: Prompt, carriers: int) -> Iterator[None]:
    """While inside, text rows of the uncut model are forbidden to see visual columns that are no carriers."""
    shrunk, _ = see_all(loaded.model, prompt)
    visual = torch.from_numpy(shrunk.visual_index[0] >= 0)
    hidden = torch.from_numpy(hidden_columns(shrunk, carriers))

    def hide(layer: int, args: Any, kwargs: dict[str, Any]) -> Any:
        n = torch.arange(len(visual))
        if args[0].shape[1] == len(visual):
            mask = kwargs.get("attention_mask")
            seen = n[:, None] >= n if mask is None else (mask if mask.dtype == torch.bool else mask == 0)[0, 0]
            seen = seen & (visual[:, None] | ~hidden)
        else:
            said = kwargs["past_key_values"].get_seq_length(layer) + 1 - len(visual)
            seen = torch.cat([~hidden, torch.ones(said, dtype=torch.bool)])[None]
        least = torch.finfo(args[0].dtype).min
        return args, kwargs | {"attention_mask": torch.where(seen, 0.0, least)[None, None]}

    hooks = [
        layer.register_forward_pre_hook(lambda _, args, kwargs, i=i: hide(i, args, kwargs), with_kwargs=True)
        for i, layer in enumerate(locate(loaded.model).language_layers)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("carriers", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bottleneck_is_a_mask(kind: str, carriers: int, tiny, prompt) -> None:
    """Prefill and 16 decode steps, two pictures, one of them inside the text."""
    cut, uncut = tiny(kind), tiny(kind)
    make([]).apply(uncut.model, None)
    before = describe(cut.model)
    step = Bottleneck(carriers=carriers)
    make([step]).apply(cut.model, None)
    assert describe(cut.model).carriers == carriers == step.plan(before).carriers
    made = prompt(cut)
    tokens = [7 * i % before.language.vocabulary for i in range(1, STEPS + 1)]
    mine, talk = said(cut, made, tokens)
    with masked(uncut, made, carriers):
        want, _ = said(uncut, made, tokens)
    torch.testing.assert_close(mine, want, rtol=0, atol=ATOL)
    assert not torch.allclose(mine, said(uncut, made, tokens)[0], atol=10 * ATOL)  # and it is another model
    text = int((made.visual_index < 0).sum())
    for entry in talk.cache.layers:
        assert entry.keys.shape[2] == entry.values.shape[2] == text + 2 * carriers + STEPS


FORMS: dict[str, Callable[[], Operators]] = {"contrib": Contrib, "standard": Standard}


def proven(loaded: Loaded, tmp_path: Path, operators: Operators) -> exactness.Exactness:
    """Judged on a full budget of two images, one image, none, and one at the end."""
    a = describe(loaded.model)
    budget = TokenBudget(images=2, visual_tokens=max(a.keep), text_tokens=16, new_tokens=18, carriers=a.carriers)
    infos = write_graphs(loaded.model, [budget], [a.keep], operators, tmp_path)
    manifest = Manifest(
        source={}, recipe=[], target="onnx", dtype="float32", layout=a.layout, buckets=a.buckets, budgets=(budget,),
        graphs=infos,
    )  # fmt: skip
    return exactness.measure(loaded.model, a, budget, Graphs(tmp_path, manifest, 0))[0]


@pytest.mark.parametrize(
    ("kind", "form"),
    [("llava", "contrib"), ("llava", "standard"), ("llava_next", "contrib"), ("paligemma", "contrib")],
)
def test_graphs_say_the_same(kind: str, form: str, tiny, tmp_path: Path) -> None:
    """All graphs against float64, caches and 16 tokens of each prompt; LLaVA-NeXT's pictures have unequal sizes."""
    loaded = tiny(kind)
    make([Bottleneck(carriers=2)]).apply(loaded.model, None)
    verdict = proven(loaded, tmp_path, FORMS[form]())
    assert verdict.ok and verdict.equal == verdict.tokens == 64, verdict.worst()


def test_graphs_behind_pruned_tokens_without_mlps_in_int8(tiny, tmp_path: Path) -> None:
    """Carriers are the last of those that are kept; visual columns may skip MLPs as well; padding scales no int8."""
    loaded = tiny("llava")
    steps = [PruneTokens(keep=9), SkipVisual(what="mlp", count=1, layers=(1,)), Bottleneck(carriers=2), Quantize()]
    make(steps).apply(loaded.model, None)
    verdict = proven(loaded, tmp_path, Contrib())
    assert verdict.ok and verdict.equal + len(verdict.near_ties) == verdict.tokens == 64, verdict.worst()


def test_a_graph_with_other_carriers_is_caught(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the runner says that the cache holds one row more than it does."""
    loaded = tiny("llava")
    make([Bottleneck(carriers=2)]).apply(loaded.model, None)
    monkeypatch.setattr(sessions, "visual_hidden", lambda carriers, counts: sum(counts) - 3 * len(counts))
    verdict = proven(loaded, tmp_path, Contrib())
    assert not verdict.ok and any(r.graph == "decode" and r.output == "logits" and not r.ok for r in verdict.rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["llava", "paligemma"])
def test_work_is_predicted(kind: str, form: str, dtype: torch.dtype, tiny) -> None:
    """FLOPs and cache bytes of prefill and decode as planned are those of the graph, and fall as they should."""
    loaded, operators = tiny(kind), FORMS[form]()
    uncut = describe(loaded.model)
    make([Bottleneck(carriers=2)]).apply(loaded.model, None)
    loaded.model.to(dtype)
    a, size = describe(loaded.model), dtype.itemsize
    budget = TokenBudget(images=2, visual_tokens=16, text_tokens=24, new_tokens=8, carriers=2)
    causal = operators.causal(dtype, a.language.head_dim)
    for role, place in (("prefill", 1), ("decode", 2)):
        graph = count(onnx.export(components(loaded.model, budget, a.keep)[place], loaded.model, operators))
        want = predict(a, budget, role, causal=causal, element_bytes=size)
        before = predict(uncut, budget, role, causal=causal, element_bytes=size)
        assert want.flops == graph.flops and want.state_bytes == graph.state_bytes
        # Every pair multiplied: text rows ask fewer. Causally: text and carriers are asked once more, and no more.
        each = 4 * a.language.head_dim * sum(a.language.heads)
        few, whole = 24 + 2 * 2, 2 * 16 + 24
        if role == "decode":
            assert before.flops - want.flops == each * 2 * 14
        elif causal and not any(a.language.masked):
            assert want.flops - before.flops == each * few * (few + 1) // 2
        else:
            assert before.flops - want.flops == each * (24 * whole - few**2) > 0
        assert want.state_bytes * (whole + 8) == before.state_bytes * (few + 8)
    assert kv_bytes(a, budget) * 64 == kv_bytes(uncut, budget) * 36


def test_prompts_are_read_together_as_alone(tiny, prompt) -> None:
    """A batch of two prompts whose pictures stand in other places."""
    loaded = tiny("llava")
    make([Bottleneck(carriers=2)]).apply(loaded.model, None)
    one = prompt(loaded)
    order = np.argsort(one.visual_index[0] < 0, kind="stable")  # pictures first
    other = replace(one, input_ids=one.input_ids[:, order], visual_index=one.visual_index[:, order])
    looked = [see_all(loaded.model, made) for made in (one, other)]
    both = Talk.read(loaded.model, [p for p, _ in looked], [s for _, s in looked]).say(torch.tensor([5, 6]))
    for row, (made, seen) in enumerate(looked):
        alone = Talk.read(loaded.model, [made], [seen]).say(torch.tensor([5 + row]))
        # float32: a batch of two is summed in another order.
        torch.testing.assert_close(both.logits[row], alone.logits[0], rtol=0, atol=ATOL)


def text_alone(a: Anatomy, tokens: int) -> Prompt:
    places = np.arange(tokens)[None]
    return Prompt(places % 9 + 3, np.full((1, tokens), -1), places, tokens, (), (), a.layout)


def test_a_prompt_of_text_is_read_whole(tiny) -> None:
    cut, uncut = tiny("llava"), tiny("llava")
    make([Bottleneck(carriers=2)]).apply(cut.model, None)
    made = text_alone(describe(uncut.model), 5)
    assert torch.equal(said(cut, made, [1])[0], said(uncut, made, [1])[0])


def test_text_does_not_take_the_room_of_pictures(tiny) -> None:
    """Behind a bottleneck or a ladder, and where columns are parted, there is room for the budget's text alone."""
    a = describe(tiny("llava").model)
    whole = TokenBudget(images=1, visual_tokens=16, text_tokens=8, new_tokens=2)
    made = text_alone(a, 9)
    assert made.pad(whole)["length"] == 9
    for narrow in (replace(whole, carriers=2), replace(whole, ladder=(Rung(1, 0.0),)), replace(whole, idle=True)):
        with pytest.raises(BundleError, match="9 tokens of text, the budget holds 8") as error:
            made.pad(narrow)
        assert "--text-tokens 9" in (error.value.hint or "")


REFUSED: dict[str, tuple[int, list[Any], str, str]] = {
    "none": (0, [], "carriers=0 of an image that has 16", "choose 1 to 15"),
    "all": (16, [], "carriers=16 of an image that has 16", "choose 1 to 15"),
    "all that are kept": (4, [PruneTokens(keep=4)], "carriers=4 of an image that has 4", "choose 1 to 3"),
    "one is left": (1, [PruneTokens(keep=1)], "carriers=1 of an image that has 1", "leave this pass out"),
    "twice": (2, [Bottleneck(carriers=2)], "2 carriers of each image already", "one of the two"),
    "a ladder": (2, [PruneInside(layers=(1,), share=(0.5,))], "leave inside the language model, by `fastv`", "out"),
    "layers": (2, [SkipVisual(what="layer", count=1, layers=(1,))], r"in some layers \(layers\)", 'what = "mlp"'),
    "apart": (2, [SkipVisual(what="apart", count=1, layers=(0,))], r"in some layers \(apart\)", 'what = "mlp"'),
    "heads": (2, [SlimVisual(what="heads", fraction=0.5, first=1)], r"in some layers \(heads\)", 'what = "mlp"'),
    "near": (2, [SkipVisual(what="near", count=1, layers=(0,))], r"in some layers \(near\)", 'what = "mlp"'),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str, tiny) -> None:
    carriers, before, cause, fix = REFUSED[name]
    a = make(before).plan(describe(tiny("llava").model))
    with pytest.raises(PassError, match=cause) as error:
        Bottleneck(carriers=carriers).plan(a)
    assert fix in (error.value.hint or "")


def test_order_rules(tiny) -> None:
    a = Bottleneck(carriers=2).plan(describe(tiny("llava").model))
    for step, cause, fix in (
        (PruneTokens(keep=4), "through 2 of the 16 tokens", "put prune-tokens before bottleneck"),
        (PruneInside(layers=(1,), share=(0.5,)), "text sees 2 carriers", "leave one of the two"),
        (SkipVisual(what="layer", count=1), "2 carriers of each image", 'use what = "mlp"'),
        (SkipVisual(what="apart", count=1), "2 carriers of each image", 'use what = "mlp"'),
        (SlimVisual(what="heads", fraction=0.5), "2 carriers of each image", 'use what = "neurons"'),
    ):
        with pytest.raises(PassError, match=cause) as error:
            step.plan(a)
        assert fix in (error.value.hint or "")
    for step in (SkipVisual(what="mlp", count=1), SlimVisual(what="neurons", fraction=0.5)):
        assert step.plan(a).carriers == 2


def test_windows_and_convolutions_are_refused(tiny) -> None:
    for kind, cause in (("gemma3", "16 columns back"), ("lfm2_vl", "mix neighbouring columns")):
        with pytest.raises(PassError, match=cause):
            Bottleneck(carriers=1).plan(describe(tiny(kind).model))


def test_a_budget_with_too_few_tokens_is_refused(tmp_path: Path) -> None:
    """`--keep` of the smallest budget decides: its pictures must have more tokens than carriers."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(make([PruneTokens(keep=4), Bottleneck(carriers=2)]).to_toml())
    planned = pipeline.plan(Request(model="tiny:llava", recipe=recipe, text_tokens=24, new_tokens=20))
    assert [(b.visual_tokens, b.carriers, b.positions, b.cache) for b in planned.budgets] == [(4, 2, 48, 46)]
    with pytest.raises(PassError, match="carriers=2 of an image that has 2"):
        planned.recipe.keeping((2,)).plan(planned.before)


def test_it_goes_the_whole_way(tmp_path: Path) -> None:
    """Plan, bundle, runner without torch; the cut folder reloads, and its eager model says the same."""
    recipe, out, cut = tmp_path / "recipe.toml", tmp_path / "out", tmp_path / "cut"
    recipe.write_text('[[pass]]\nname = "bottleneck"\ncarriers = 3\n')
    request = Request(model="tiny:llava", recipe=recipe, images=2, text_tokens=40, new_tokens=6)
    said = tables.plan(request.model, pipeline.plan(request))
    assert "text sees each image through 3 of its visual tokens" in said
    assert "= 78 positions, 52 cache rows behind the bottleneck" in said
    pipeline.convert(request, out)
    bundle = vlmcut.Bundle(out)
    assert bundle.budget.carriers == 3 and bundle.budget.cache == 40 + 2 * 3 + 6
    work = bundle.manifest.anatomy["work"]
    assert [work[name]["ratio"] for name, graph in bundle.manifest.graphs.items() if graph.role != "vision"] == [1, 1]
    pipeline.save_cut(request, cut)
    again = vlmcut.load(cut)
    assert describe(again.model).carriers == 3
    prompt = bundle.prompt([Image.new("RGB", describe(again.model).smallest.size, (200, 30, 30))], "Is it red?")
    shrunk, seen = see_all(again.model, prompt)
    tokens = [token for token, _ in bundle.steps(prompt, 6)]
    assert tokens == greedy(Talk.read(again.model, [shrunk], [seen]), len(tokens))[0]


def test_healing_lowers_the_loss(tiny) -> None:
    """Gradients flow through the carriers: what text is told of a picture can be learnt."""
    loaded = tiny("llava")
    calibration = read_calibration(loaded, None)
    done = make([Bottleneck(carriers=2), Heal(steps=6, rank=4)]).apply(loaded.model, calibration)
    healed = done.passes[-1]
    assert isinstance(healed, Heal) and healed.healed is not None
    before, after = healed.healed.loss
    assert after < before and describe(loaded.model).carriers == 2
