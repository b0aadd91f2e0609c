"""Three laws for every pass and every family: `describe` equals `plan`; neutral changes no bit; a real cut does.

A new pass joins by a row in both tables; without one, the first test fails. Here every method, ranking and importance
is cut on two families and seen by transformers' own forward; test_family_laws.py has every pass on every must family.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from vlmcut.errors import PassError
from vlmcut.passes.base import Pass
from vlmcut.passes.calibration import read_calibration
from vlmcut.passes.drop_heads import DropHeads
from vlmcut.passes.drop_layers import IMPORTANCES, DropLayers
from vlmcut.passes.drop_neurons import DropNeurons
from vlmcut.passes.importance import RANKINGS
from vlmcut.passes.prune_tokens import PruneTokens, kept_tokens
from vlmcut.passes.quantize import Quantize
from vlmcut.passes.recipe import PASSES, make
from vlmcut.passes.slim_visual import WHATS, SlimVisual
from vlmcut.passes.tokens.methods import METHODS
from vlmcut.passes.trim_tower import TrimTower
from vlmcut.passes.trim_vocabulary import TrimVocabulary
from vlmcut.surgery.anatomy import Anatomy
from vlmcut.surgery.load import Loaded, describe

Maker = Callable[[Anatomy], Pass]


def one_head(part: str, ranking: str = "layer") -> Maker:
    """One of each layer, or one of all."""

    def make(a: Anatomy) -> Pass:
        heads = a.tower.heads if part == "vision" else a.language.kv_heads
        if ranking == "global":
            return DropHeads(part=part, fraction=1 / sum(heads), ranking=ranking, importance="loss")
        return DropHeads(part=part, fraction=1 / heads[0])

    return make


def neurons(fraction: float) -> dict[str, Maker]:
    return {
        f"{part} {ranking}": lambda a, part=part, ranking=ranking: DropNeurons(
            part=part, fraction=fraction, ranking=ranking
        )
        for part in ("vision", "language")
        for ranking in RANKINGS
    }


def all_tokens(method: str) -> Maker:
    return lambda a: PruneTokens(keep=a.visual_tokens, method=method)


# Clips and weights of one's own need more than a model: those methods have tests of their own.
PLAIN = [name for name, row in METHODS.items() if not row.frames and row.module is None]
PLAIN[PLAIN.index("mustdrop-vision")] += ":window=2"  # which divides the 4 x 4 tokens of tiny models


def some_tokens(method: str) -> Maker:
    """As many as the method can keep without keeping all."""

    def make(a: Anatomy) -> Pass:
        for keep in range(a.visual_tokens - 1, 0, -1):
            try:
                PruneTokens(keep=keep, method=method).plan(a)
            except PassError:
                continue
            return PruneTokens(keep=keep, method=method)
        raise AssertionError(f"{method} can keep no number of {a.visual_tokens} tokens")

    return make


# name of a pass -> (label, how to make it for an anatomy): settings that change nothing, settings that do.
NEUTRAL: dict[str, dict[str, Maker]] = {
    "trim-tower": {"again": lambda a: TrimTower()},  # every model here is trimmed first
    "drop-heads": {
        f"{p} {r}": lambda a, p=p, r=r: DropHeads(part=p, fraction=0.0, ranking=r)
        for p in ("vision", "language")
        for r in RANKINGS
    },
    "drop-neurons": neurons(0.0),
    "drop-layers": {},  # a count of 0 is refused: see test_refusals
    "prune-tokens": {method: all_tokens(method) for method in PLAIN},
    "prune-inside": {},  # a ladder that keeps everyone is refused; test_family_laws.py makes one by hand
    "skip-visual": {},  # a count of 0 is refused; test_family_laws.py asks without a picture
    "bottleneck": {},  # as many carriers as tokens are refused; test_family_laws.py asks without a picture
    "slim-visual": {w: lambda a, w=w: SlimVisual(what=w, fraction=0.0, first=0) for w in WHATS},
    "heal": {},  # 0 steps are refused: see tests/passes/test_heal.py
    "trim-vocabulary": {"all": lambda a: TrimVocabulary(size=a.language.vocabulary)},
    "quantize": {"no part": lambda a: Quantize(parts=())},
}
REAL: dict[str, dict[str, Maker]] = {
    "trim-tower": {},  # never changes a bit: test_trim_tower_is_exact
    "drop-heads": {f"{p} {r}": one_head(p, r) for p in ("vision", "language") for r in RANKINGS},
    "drop-neurons": neurons(0.3),
    "drop-layers": {
        f"{p} {i}": lambda a, p=p, i=i: DropLayers(part=p, count=1, importance=i)
        for p in ("vision", "language")
        for i in IMPORTANCES
    },
    "prune-tokens": {method: some_tokens(method) for method in PLAIN},
    "prune-inside": {},  # not seen by transformers' own forward: test_family_laws.py
    "skip-visual": {},  # nor this
    "bottleneck": {},  # nor this
    "slim-visual": {},  # nor this
    "heal": {},  # learns of the uncut model, so no law of one pass alone: see tests/passes/test_heal.py
    "trim-vocabulary": {
        "half": lambda a: TrimVocabulary(size=a.language.vocabulary // 2, unseen="unknown", unknown=0),
    },
    "quantize": {p: lambda a, p=p: Quantize(parts=(p,)) for p in ("vision", "language")},
}
# A Qwen2 with a single KV head per layer cannot lose one; the only refusals that these models earn.
NONE_TO_SPARE = [("llava-siglip-qwen2", REAL["drop-heads"][f"language {r}"]) for r in RANKINGS]


def rows(table: dict[str, dict[str, Maker]]) -> list[object]:
    return [
        pytest.param(maker, id=f"{name} {label}") for name, found in table.items() for label, maker in found.items()
    ]


def cut(loaded: Loaded, maker: Maker) -> tuple[Pass, Anatomy, Anatomy]:
    """Trim, then apply one pass; the pass as resolved, its plan, and what `describe` finds."""
    make([]).apply(loaded.model, None)
    a = describe(loaded.model)
    step = maker(a)
    if step.needs_calibration:
        step = step.resolve(loaded.model, a, read_calibration(loaded, None))
    assert not step.needs_calibration
    planned = step.plan(a)
    step.apply(loaded.model, a)
    return step, planned, describe(loaded.model)


def test_every_pass_has_examples() -> None:
    assert set(NEUTRAL) == set(REAL) == set(PASSES)


@pytest.mark.parametrize("maker", rows(NEUTRAL))
def test_neutral_changes_no_bit(kind: str, maker: Maker, tiny, logits) -> None:
    loaded = tiny(kind)
    before = logits(loaded)
    _, planned, found = cut(loaded, maker)
    assert found == planned
    assert torch.equal(logits(loaded), before)


@pytest.mark.parametrize("maker", rows(REAL))
def test_real_does_what_it_plans(kind: str, maker: Maker, tiny, logits) -> None:
    loaded = tiny(kind)
    before, full = logits(loaded), describe(loaded.model)
    if (kind, maker) in NONE_TO_SPARE:
        with pytest.raises(
            PassError, match=r"fraction=1.0 of the language KV heads|leaves 1 of 2 language KV heads for 2"
        ):
            maker(full).plan(full)
        return
    step, planned, found = cut(loaded, maker)
    assert found == planned != full
    after = logits(loaded)
    assert after.isfinite().all()
    if isinstance(step, PruneTokens):
        assert before.shape[1] - after.shape[1] == 2 * (full.visual_tokens - found.keep[0]) > 0  # two images
    else:
        assert after.shape == before.shape and not torch.equal(after, before)


@pytest.mark.parametrize("maker", rows({n: found for n, found in REAL.items() if n != "quantize"}))
def test_parameters_leave(kind: str, maker: Maker, tiny) -> None:
    """A cut that leaves every weight in place has cut nothing; token pruning alone takes none."""
    loaded = tiny(kind)
    make([]).apply(loaded.model, None)
    before = sum(p.numel() for p in loaded.model.parameters())
    if (kind, maker) in NONE_TO_SPARE:
        return  # test_real_does_what_it_plans holds the refusal
    step, _, _ = cut(loaded, maker)
    after = sum(p.numel() for p in loaded.model.parameters())
    assert after == before if isinstance(step, PruneTokens) else after < before


def test_trim_tower_is_exact(kind: str, tiny, logits) -> None:
    loaded = tiny(kind)
    before, full = logits(loaded), describe(loaded.model)
    parameters = sum(p.numel() for p in loaded.model.parameters())
    planned = TrimTower().plan(full)
    TrimTower().apply(loaded.model, full)
    assert describe(loaded.model) == planned
    assert planned.tower.layers == planned.tower.feature_layer == 4
    assert full.tower.layers - planned.tower.layers == (1 if kind == "llava" else 0)  # SigLIP reads its last layer
    assert sum(p.numel() for p in loaded.model.parameters()) < parameters  # the last layer, or the pooling head
    assert torch.equal(logits(loaded), before)


def test_resolving_measures_once(kind: str, tiny) -> None:
    """A resolved pass needs no data, and resolving it again gives it back."""
    loaded = tiny(kind)
    make([]).apply(loaded.model, None)
    a = describe(loaded.model)
    calibration = read_calibration(loaded, None)
    steps: list[Pass] = [
        DropLayers(part="language", count=1),
        DropLayers(part="vision", count=2, importance="loss"),
        DropHeads(part="vision", fraction=1 / a.tower.heads[0]),
        DropHeads(part="vision", fraction=1 / a.tower.heads[0], ranking="global", importance="loss"),
        DropNeurons(part="vision", fraction=0.3),
        DropNeurons(part="language", fraction=0.3, ranking="global"),
        TrimVocabulary(size=200),
    ]
    for step in steps:
        done = step.resolve(loaded.model, a, calibration)
        assert step.needs_calibration and not done.needs_calibration
        assert done.resolve(loaded.model, a, calibration) is done
        assert step.resolve(loaded.model, a, calibration) == done  # deterministic
    assert describe(loaded.model) == a


def test_resolving_leaves_no_hooks(tiny, logits) -> None:
    loaded = tiny("llava")
    before = logits(loaded)
    hooks = [len(m._forward_hooks) for m in loaded.model.modules()]  # transformers has some of its own
    a = describe(loaded.model)
    DropLayers(part="language", count=1).resolve(loaded.model, a, read_calibration(loaded, None))
    assert [len(m._forward_hooks) for m in loaded.model.modules()] == hooks
    assert torch.equal(logits(loaded), before)


def test_a_recipe_of_everything(kind: str, tiny, logits) -> None:
    """All passes one after the other: the whole is planned before, and found after."""
    loaded = tiny(kind)
    full = describe(loaded.model)
    steps: list[Pass] = [
        DropLayers(part="vision", count=1),
        DropHeads(part="vision", fraction=1 / full.tower.heads[0]),
        DropNeurons(part="vision", fraction=0.3),
        PruneTokens(keep=5),
        DropLayers(part="language", count=1),
        DropNeurons(part="language", fraction=0.3),
        TrimVocabulary(size=200, tokens="0-199", unseen="unknown", unknown=0),
    ]
    if full.language.kv_heads[0] > 1:
        steps.append(DropHeads(part="language", fraction=0.3))
    recipe = make([*steps, Quantize()])
    planned = recipe.plan(full)
    done = recipe.apply(loaded.model, read_calibration(loaded, None))
    assert describe(loaded.model) == planned == done.plan(full)
    assert logits(loaded).isfinite().all()
    # The resolved recipe makes the same model again, without data.
    again = tiny(kind)
    assert done.apply(again.model, None) == done
    assert torch.equal(logits(again), logits(loaded))


def test_apply_notices_a_pass_that_did_nothing(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: law 1 is enforced at run time too."""
    loaded = tiny("llava")
    monkeypatch.setattr(PruneTokens, "apply", lambda self, model, a: None)
    with pytest.raises(PassError, match="not what was planned"):
        make([PruneTokens(keep=4)]).apply(loaded.model, None)


@pytest.mark.parametrize(("ratio", "left"), [(0.0, 16), (0.5, 8), (0.75, 4), (0.7, 5), (0.99, 1), (0.9999, 1)])
def test_kept_tokens(ratio: float, left: int) -> None:
    assert kept_tokens(16, ratio) == left


def test_notes_name_the_substitute_and_the_rounding(tiny) -> None:
    cls, none = describe(tiny("llava").model), describe(tiny("llava-siglip-qwen2").model)
    assert PruneTokens(keep=4).notes(cls) == []
    assert "no [CLS]" in PruneTokens(keep=4).notes(none)[0]
    assert DropHeads(part="vision", fraction=0.5).notes(cls) == []
    (note,) = DropHeads(part="language", fraction=0.5).notes(cls)
    assert "1.5" in note and "2 are removed" in note
    assert DropNeurons(part="vision", fraction=0.25).notes(cls) == []
    (note,) = DropNeurons(part="language", fraction=0.33).notes(cls)
    assert "0.33 of 80 neurons is 26.4" in note and "26 are removed" in note
    different, even = DropHeads(part="language", fraction=1 / 3, ranking="global").notes(cls)
    assert "only vlmcut.load reads back" in different and "spreads them evenly" in even
    (note,) = DropLayers(part="language", count=2, importance="loss").notes(cls)
    assert "2 of 3 layers leave one after the other" in note and "6 answers to each" in note  # 1 + 3 + 2
    assert DropLayers(part="language", count=2).notes(cls) == []
    different, even = DropNeurons(part="language", fraction=0.25, ranking="global").notes(cls)
    assert "only vlmcut.load reads back" in different and "spreads them evenly" in even
    assert replace(cls, keep=(4,)).visual_tokens == 16
    rows = PruneTokens(keep=4, line_breaks="keep").notes(replace(cls, breaks=(3,)))
    assert rows == ["line breaks between rows of tiles: keep"]
