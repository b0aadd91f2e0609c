"""The three laws for every pass and every must family, as the model talks to itself: what is cut inside it is seen too.

Described equals planned; a neutral form changes no bit; a real cut changes the answer. What a plan refuses, and why,
is in the table of `benchmarks/builds.py`, whose settings these are. Every method and ranking has its laws in
test_laws.py, on two families.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor
from vlmcut.errors import PassError
from vlmcut.manifest import Rung
from vlmcut.passes.base import Pass
from vlmcut.passes.calibration import Calibration
from vlmcut.passes.drop_heads import DropHeads
from vlmcut.passes.drop_neurons import DropNeurons
from vlmcut.passes.prune_inside import PruneInside, TableLeaver
from vlmcut.passes.prune_tokens import PruneTokens
from vlmcut.passes.quantize import Quantize
from vlmcut.passes.recipe import PASSES, make
from vlmcut.passes.slim_visual import SlimVisual
from vlmcut.passes.trim_vocabulary import TrimVocabulary
from vlmcut.prompt import Prompter
from vlmcut.surgery.anatomy import Anatomy
from vlmcut.surgery.inside import Inside
from vlmcut.surgery.load import Loaded, describe
from vlmcut.surgery.selection import attached
from vlmcut.surgery.talk import Talk, see_all

from .cut_helpers import script
from .test_inside import wide_window

builds = script("builds")
families = script("families")
SETTINGS: dict[str, Callable[[Anatomy], Pass]] = builds.SETTINGS | {"quantize": lambda a: Quantize()}

# Passes that change nothing. A count of 0 is refused by drop-layers and skip-visual, a share of 1 by prune-inside, 0
# steps by heal. What goes inside the language model is neutral to a prompt of text, and with a ladder made by hand.
NEUTRAL: tuple[Callable[[Anatomy], Pass], ...] = (
    lambda a: DropHeads(part="vision", fraction=0.0),
    lambda a: DropNeurons(part="vision", fraction=0.0),
    lambda a: PruneTokens(keep=tuple(bucket.tokens for bucket in a.buckets), method="uniform"),
    lambda a: DropHeads(part="language", fraction=0.0),
    lambda a: DropNeurons(part="language", fraction=0.0, ranking="global"),
    lambda a: SlimVisual(what="neurons", fraction=0.0),
    lambda a: TrimVocabulary(size=a.language.vocabulary),
    lambda a: Quantize(parts=()),
)


@cache
def sizes(kind: str) -> tuple[tuple[int, int], ...]:
    return families.buckets(kind)


def original(kind: str, name: str) -> Loaded:
    """The model that a setting cuts; who leaves inside must fit into a sliding window before, as plans demand."""
    loaded = builds.original(kind, name, sizes(kind))
    return wide_window(loaded) if name in builds.INSIDE else loaded


def refusal(kind: str, name: str) -> str | None:
    """Why a plan refuses; pictures of two sizes have two rasters, whose neighbours one graph cannot have."""
    rasters = "have different rasters" if name == "skip-visual near" and len(sizes(kind)) > 1 else None
    return builds.refusal(name, kind) or rasters


def answer(loaded: Loaded, pictures: int = 2) -> Tensor:
    """Logits after a prompt of two pictures, of two sizes where there are, or of none, and after one token, [2, V]."""
    prompter = Prompter(loaded.processor, describe(loaded.model).layout)
    images = families.pictures(loaded.source["id"].removeprefix("tiny:"))[:pictures]
    shrunk, seen = see_all(loaded.model, prompter(images, families.PROMPT if pictures else families.ALONE))
    talk = Talk.read(loaded.model, [shrunk], [seen])
    return torch.cat([talk.logits, talk.say(torch.tensor([5])).logits])


def trimmed(kind: str, name: str) -> Loaded:
    """The same without its tower's dead end."""
    loaded = original(kind, name)
    make([]).apply(loaded.model, None)
    return loaded


@cache
def before(kind: str, variant: str, pictures: int = 2) -> Tensor:
    """What a model answers that nothing was cut of, not even the tower's dead end."""
    return answer(original(kind, variant), pictures)


def variant(name: str) -> str:
    """A setting that cuts the same model."""
    return next(one for one in SETTINGS if builds.variant(one) == builds.variant(name))


def test_every_pass_is_a_setting() -> None:
    """Trimming the tower is in every one, and `heal` follows other cuts: see test_heal.py."""
    a = describe(trimmed("llava", "exit").model)
    assert {step(a).name for step in SETTINGS.values()} == set(PASSES) - {"trim-tower", "heal"}
    cells = {cell for found in builds.REFUSED.values() for cell in found}
    assert cells <= {(name, kind) for name in SETTINGS for kind in builds.NAMES}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("kind", builds.NAMES)
def test_a_cut_is_as_planned_and_answers_otherwise(kind: str, name: str) -> None:
    loaded = original(kind, name)
    full = describe(loaded.model)
    a = make([]).plan(full)
    recipe = make([SETTINGS[name](a)])
    if reason := refusal(kind, name):
        with pytest.raises(PassError, match=reason):
            recipe.plan(full)
        return
    expected = recipe.plan(full)
    data = Calibration((builds.asked(loaded, kind),), "one picture of noise", loaded.processor.tokenizer)
    done = recipe.apply(loaded.model, data)
    found = describe(loaded.model)
    assert found == done.plan(full) != a
    assert (found.keep, found.ladder) == (expected.keep, expected.ladder)  # what needs no data
    after = answer(loaded)
    assert after.isfinite().all()
    assert (after - before(kind, variant(name))).abs().max() > 1e-3
    if name in builds.INSIDE or name.startswith(("skip-visual", "slim-visual", "bottleneck")):  # all but its pictures
        assert torch.equal(answer(loaded, 0), before(kind, variant(name), 0))


@pytest.mark.parametrize("kind", builds.NAMES)
def test_neutral_settings_change_no_bit(kind: str) -> None:
    """All in one recipe: two changes that undo each other to the bit would be a wonder."""
    loaded = original(kind, "prune-tokens")
    steps = [step(describe(loaded.model)) for step in NEUTRAL]
    data = Calibration((builds.asked(loaded, kind),), "one picture of noise", loaded.processor.tokenizer)
    done = make(steps).apply(loaded.model, data)
    assert len(done.passes) == 1 + len(NEUTRAL)
    assert torch.equal(answer(loaded), before(kind, variant("prune-tokens")))


@pytest.mark.parametrize("name", [name for name in builds.INSIDE if name != "exit"])  # which chooses nobody
@pytest.mark.parametrize("kind", builds.NAMES)
def test_a_ladder_that_keeps_everyone_changes_no_bit(kind: str, name: str) -> None:
    """A recipe cannot say it, for it would do work for nothing; what it would do is made by hand."""
    loaded = trimmed(kind, name)
    a = describe(loaded.model)
    if (reason := builds.refusal(name, kind)) is not None:
        assert a.language.stiff is not None and reason in a.language.stiff
        return
    step = SETTINGS[name](a)
    assert isinstance(step, PruneInside) and step.layers is not None
    attached(loaded.model).inside = Inside(TableLeaver(step.method), tuple(Rung(layer, 1.0) for layer in step.layers))
    assert torch.equal(answer(loaded), before(kind, variant(name)))
