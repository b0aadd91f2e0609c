"""Passes compose: a random recipe is refused by its plan, or its graphs compute what the cut model computes.

Recipes grow pass by pass, each one drawn for what the ones before it left; what a plan refuses is left out, so that
every recipe is a valid one. `heal` is not among them: a recipe does not hold what was learnt.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import vlmcut
from hypothesis import HealthCheck, Phase, event, example, given, reject, settings
from hypothesis import strategies as st
from vlmcut import pipeline
from vlmcut.errors import PassError
from vlmcut.passes import recipe as recipes
from vlmcut.passes.base import PARTS, Pass
from vlmcut.passes.bottleneck import Bottleneck
from vlmcut.passes.calibration import read_calibration
from vlmcut.passes.drop_heads import DropHeads
from vlmcut.passes.drop_layers import DropLayers
from vlmcut.passes.drop_neurons import DropNeurons
from vlmcut.passes.importance import RANKINGS
from vlmcut.passes.prune_inside import PruneInside
from vlmcut.passes.prune_tokens import PruneTokens, usual_method
from vlmcut.passes.quantize import Quantize
from vlmcut.passes.recipe import PASSES, Recipe, make
from vlmcut.passes.skip_visual import WHATS as SKIPPED
from vlmcut.passes.skip_visual import SkipVisual
from vlmcut.passes.slim_visual import WHATS as SLIMMED
from vlmcut.passes.slim_visual import SlimVisual
from vlmcut.passes.trim_vocabulary import TrimVocabulary
from vlmcut.pipeline import Request
from vlmcut.surgery.anatomy import Anatomy
from vlmcut.surgery.load import Loaded, describe

from .cut_helpers import read

KINDS = "llava llava-siglip-qwen2 qwen2_vl qwen2_5_vl qwen3_vl internvl smolvlm paligemma gemma3 lfm2_vl".split()
SMALL: dict[str, Any] = {"text_tokens": 24, "new_tokens": 20}
Draw = Callable[[st.SearchStrategy[Any]], Any]


INSIDE = ("fastv", "pyramiddrop", "sparsevlm", "fitprune", "visiondrop", "dart", "core", "vlapruner", "uniform")
PART, RANKING, SHARE = st.sampled_from(PARTS), st.sampled_from(RANKINGS), st.sampled_from((0.25, 0.5))


def _ladder(draw: Draw, a: Anatomy) -> Pass:
    first = max(1, a.language.levels)
    shares = draw(st.sampled_from([(0.5,), (0.0,), (0.5, 0.0), (0.6, 0.3)]))
    method = "exit" if shares == (0.0,) else draw(st.sampled_from(INSIDE))
    return PruneInside(method=method, layers=tuple(range(first, first + len(shares))), share=shares)


MAKERS: dict[str, Callable[[Draw, Anatomy], Pass]] = {
    "prune-tokens": lambda draw, a: PruneTokens(
        keep=draw(st.integers(1, min(a.keep))), method=draw(st.sampled_from((usual_method(a), "todre", "uniform")))
    ),
    "drop-heads": lambda draw, a: DropHeads(part=draw(PART), fraction=draw(SHARE), ranking=draw(RANKING)),
    "drop-layers": lambda draw, a: DropLayers(part=draw(PART), count=1),
    "drop-neurons": lambda draw, a: DropNeurons(
        part=draw(PART), fraction=draw(SHARE), ranking=draw(RANKING),
        importance=draw(st.sampled_from(("activation", "activity"))),
    ),
    "prune-inside": _ladder,
    "skip-visual": lambda draw, a: SkipVisual(what=draw(st.sampled_from(tuple(SKIPPED))), count=1),
    "slim-visual": lambda draw, a: SlimVisual(
        what=draw(st.sampled_from(SLIMMED)), fraction=draw(SHARE), ranking=draw(RANKING), first=0
    ),
    "bottleneck": lambda draw, a: Bottleneck(carriers=draw(st.integers(1, 2))),
    "trim-vocabulary": lambda draw, a: TrimVocabulary(
        size=a.language.vocabulary * 9 // 10, unseen="unknown", unknown=0
    ),
    "quantize": lambda draw, a: Quantize(parts=tuple(draw(st.sampled_from((PARTS, *((part,) for part in PARTS)))))),
}  # fmt: skip


@st.composite
def valid(draw: Draw) -> tuple[str, Recipe]:
    """A tiny model's kind, and a recipe of two to four passes that its plan accepts."""
    kind = draw(st.sampled_from(KINDS))
    a = make([]).plan(describe(vlmcut.load(f"tiny:{kind}").model))
    steps: list[Pass] = []
    for name in draw(st.lists(st.sampled_from(tuple(MAKERS)), min_size=4, max_size=8)):
        step = MAKERS[name](draw, a)
        try:
            make([*steps, step]).check_order()
            a = step.plan(a)
        except PassError as error:
            assert error.hint or "`" in str(error), error  # a rule that names what it is about
            continue
        steps.append(step)
        if len(steps) == 4:
            break
    if len(steps) < 2:
        reject()
    return kind, make(steps)


def test_every_pass_is_drawn() -> None:
    assert MAKERS.keys() == PASSES.keys() - {"trim-tower", "heal"}


def answer(loaded: Loaded) -> torch.Tensor:
    """Logits after a prompt with a picture of noise, and after each of 4 tokens."""
    return read(loaded, read_calibration(loaded, None).prompts[0], steps=4)[0]


@settings(  # seconds an example: recipes are short, and are not made shorter when one fails
    max_examples=12, phases=[Phase.explicit, Phase.generate], suppress_health_check=[HealthCheck.too_slow]
)
@given(drawn=valid())
@example(drawn=("qwen3_vl", make([Quantize(), PruneTokens(keep=1, method="divprune")])))  # a rare step of a few numbers
@example(drawn=("qwen2_5_vl", make([SkipVisual(what="apart", count=1), Quantize(parts=("vision",))])))  # moves a token
def test_a_random_recipe_is_exact_and_reloads(drawn: tuple[str, Recipe]) -> None:
    kind, recipe = drawn
    for step in recipe.passes:
        event(step.name)
    with TemporaryDirectory() as place:
        file, out, folder = (Path(place) / name for name in ("recipe.toml", "out", "cut"))
        file.write_text(recipe.to_toml())
        request = Request(model=f"tiny:{kind}", recipe=file, questions=0, **SMALL)
        try:
            pipeline.plan(request)
        except PassError:  # of the whole: a ladder behind a sliding window, say
            reject()
        manifest = pipeline.convert(request, out)  # ParityError, if a graph is not exact
        assert manifest.exactness["ok"]
        file.write_text(recipes.from_tables(manifest.recipe).to_toml())  # resolved: no data is needed
        pipeline.save_cut(Request(model=f"tiny:{kind}", recipe=file, **SMALL), folder)
        cut, again = vlmcut.load(f"tiny:{kind}"), vlmcut.load(folder)
        done = recipes.from_tables(manifest.recipe)
        assert not done.needs_calibration
        done.apply(cut.model, None)
        assert describe(cut.model) == describe(again.model)
        assert torch.equal(answer(cut), answer(again))
