"""What a selection keeps: rows of the features that transformers makes, whole rows, the same for every caller."""

from __future__ import annotations

import inspect
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import vlmcut
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_timm_available, is_torchvision_available
from vlmcut.errors import BundleError, ModelError, PassError
from vlmcut.passes.prune_tokens import PruneTokens
from vlmcut.passes.recipe import make
from vlmcut.passes.tokens.methods import METHODS, TableSelector
from vlmcut.prompt import Prompter
from vlmcut.surgery import tiny as tiny_models
from vlmcut.surgery.families import FAMILIES
from vlmcut.surgery.load import Loaded, attach, describe, state_dict
from vlmcut.surgery.selection import Selection, Tap, TowerState, attached, judge
from vlmcut.surgery.talk import see_all, see_picture
from vlmcut.surgery.vision import look, prepare, see

TIMM = is_timm_available() and is_torchvision_available()
# Every family with a tiny processor; the others differ from one of these by name, or are tested without pictures.
EVERY = [
    pytest.param(name, marks=[pytest.mark.skipif(name == "fast_vlm" and not TIMM, reason="needs timm")])
    for name in sorted(set(FAMILIES) & set(tiny_models.families.FAMILIES))
]


SIMPLE = ("fastervlm", "divprune", "random", "uniform")  # one of each kind; the others have tests of their own


def cut(loaded: Loaded, keep: int, method: str = "fastervlm", line_breaks: str = "drop") -> Loaded:
    make([PruneTokens(keep=keep, method=method, line_breaks=line_breaks)]).apply(loaded.model, None)
    return loaded


def flat(features: Any) -> torch.Tensor:
    """One image's features as transformers hands them out: a tuple of images, or a tensor with leading axes."""
    rows = torch.cat([*features]) if isinstance(features, (list, tuple)) else features
    return rows.flatten(0, -2)


@torch.no_grad()
def transformers_features(loaded: Loaded) -> tuple[Any, torch.Tensor, list[torch.Tensor]]:
    """A picture of noise, its features by `get_image_features` as users call it, and its DeepStack features."""
    about = attached(loaded.model)
    rng = np.random.default_rng(3)
    image = Image.fromarray(rng.integers(0, 256, (*about.buckets[0].size, 3), dtype=np.uint8))
    prompter = Prompter(loaded.processor, about.family.layout(loaded.model.config))
    picture, _ = prompter.look(image)
    raw = prompter.raw([image], "")
    features = loaded.model.base_model.get_image_features
    names = set(inspect.signature(features).parameters) & set(raw)
    given = {name: torch.as_tensor(np.asarray(raw[name])) for name in names}
    out = features(**given, return_dict=True)
    return picture, flat(out.pooler_output), [flat(d) for d in getattr(out, "deepstack_features", None) or ()]


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("method", ["divprune", "fastervlm", "uniform"])
def test_selection_is_gathered_stock_features(family: str, method: str, tiny) -> None:
    """For every family: what is kept of an image are rows of transformers' own features, and of every level."""
    loaded, plain = tiny(family), tiny(family)
    if METHODS[method].blocks is not None and not describe(loaded.model).scored:
        with pytest.raises(PassError, match="does not know which attention"):
            cut(loaded, 1, method)
        pytest.skip("this family's attention is not known")
    picture, whole, levels = transformers_features(plain)
    breaks = attached(loaded.model).buckets[0].line_breaks
    keep = max(1, (whole.shape[0] - len(breaks)) // 2)
    cut(loaded, keep, method)
    found = see_picture(loaded.model, picture)
    kept = found.kept.tolist()
    assert len(kept) == keep < whole.shape[0] and all(a < b for a, b in pairwise(kept))
    assert not set(kept) & set(breaks)
    with torch.no_grad():
        encoded, _ = look(loaded.model, torch.from_numpy(picture.pixel_values), prepare(loaded.model, picture.geometry))
    # Rows are copied, to the bit. Only a per-token projector runs on fewer rows, whose products may be summed in
    # another order: float32, features below 2, whose last bit is 1.2e-7. Measured on x86 with one thread: 0.0 too.
    atol = 0 if encoded.project is None else 2e-6
    torch.testing.assert_close(found.features, whole[found.kept], rtol=0, atol=atol)
    assert len(found.levels) == len(levels) == attached(plain.model).family.levels(plain.model.config)
    for mine, theirs in zip(found.levels, levels, strict=True):
        assert torch.equal(mine, theirs[found.kept])


def test_some_family_has_levels_and_some_line_breaks(tiny) -> None:
    """Negative control: the test above does see DeepStack and newline tokens."""
    assert attached(tiny("qwen3_vl").model).family.levels(tiny("qwen3_vl").model.config) > 0
    assert attached(tiny("llava_next").model).buckets[0].line_breaks


@pytest.mark.parametrize("method", SIMPLE)
def test_every_image_keeps_its_own(kind: str, tiny, prompt, method: str) -> None:
    """One image alone gives what it gives beside another, to the bit: each is seen by itself."""
    loaded = cut(tiny(kind), 5, method)
    whole = prompt(loaded)
    shrunk, both = see_all(loaded.model, whole)
    assert [tuple(s.kept.shape) for s in both] == [(5,), (5,)] and shrunk.counts == (5, 5)
    for picture, one in zip(whole.pictures, both, strict=True):
        alone = see_picture(loaded.model, picture)
        assert torch.equal(alone.kept, one.kept) and torch.equal(alone.features, one.features)


def test_content_decides(kind: str, tiny, prompt) -> None:
    """Two different images keep different tokens; a constant choice does not look."""
    for method in SIMPLE:
        loaded = cut(tiny(kind), 5, method)
        one, other = see_all(loaded.model, prompt(loaded))[1]
        assert torch.equal(one.kept, other.kept) == (method in ("random", "uniform")), method


def test_pruning_adds_no_module(kind: str, tiny) -> None:
    """No weight moves, none is registered twice, and names on disk are Hugging Face's."""
    loaded = tiny(kind)
    make([]).apply(loaded.model, None)
    names, modules = set(state_dict(loaded.model)), [name for name, _ in loaded.model.named_modules()]
    count = sum(p.numel() for p in loaded.model.parameters())
    PruneTokens(keep=5).apply(loaded.model, describe(loaded.model))
    assert attached(loaded.model).selection is not None
    assert set(state_dict(loaded.model)) == names and [name for name, _ in loaded.model.named_modules()] == modules
    assert sum(p.numel() for p in loaded.model.parameters()) == count


def test_a_prompt_with_the_wrong_number_of_placeholders_is_refused(tiny, stock, seen) -> None:
    """transformers itself checks; a silent misalignment would be worse than any error."""
    loaded = cut(tiny("llava"), 5)
    wrong = seen(loaded) | {"input_ids": stock(loaded)["input_ids"]}
    with pytest.raises(ValueError, match="Image features and image tokens do not match, tokens: 32"):
        loaded.model(**wrong)


def test_looking_leaves_the_model_alone(kind: str, tiny, prompt) -> None:
    """The tap on the scored attention is gone after a look, and after an error inside one."""
    loaded = cut(tiny(kind), 5)
    attention = max(attached(loaded.model).family.scored(loaded.model).items())[1]
    picture = prompt(loaded).pictures[0]
    pixels, prepared = torch.from_numpy(picture.pixel_values), prepare(loaded.model, picture.geometry)
    before, names = attention.config._attn_implementation, set(ALL_ATTENTION_FUNCTIONS.valid_keys())
    with torch.no_grad():
        _, state = look(loaded.model, pixels, prepared)
    assert len(state.taps) == 1 and len(state.taps[0].rows) == 1  # of the last block, not of all of them
    with pytest.raises((ValueError, RuntimeError)), torch.no_grad():  # each tower says it in its own way
        look(loaded.model, pixels[..., :-3], prepared)
    assert attention.config._attn_implementation == before
    assert set(ALL_ATTENTION_FUNCTIONS.valid_keys()) == names
    with torch.no_grad():
        assert torch.equal(look(loaded.model, pixels, prepared)[1].tokens, state.tokens)


@pytest.mark.parametrize("family", EVERY)
def test_a_tap_changes_no_bit(family: str, tiny) -> None:
    """Features of a model that scores its tokens are those of one that does not: a tower keeps its masks, too."""
    loaded = tiny(family)
    if not attached(loaded.model).family.scored(loaded.model):
        pytest.skip("this family's tower has no attention to tap")
    picture, _, _ = transformers_features(loaded)
    prepared = prepare(loaded.model, picture.geometry)
    tables = {**ALL_ATTENTION_FUNCTIONS}, {**ALL_MASK_ATTENTION_FUNCTIONS}
    found = []
    for selection in (None, Selection(TableSelector("fastervlm"), (1,))):
        attached(loaded.model).selection = selection
        with torch.no_grad():
            found.append(look(loaded.model, torch.from_numpy(picture.pixel_values), prepared))
    (plain, untapped), (scored, tapped) = found
    assert not untapped.taps and tapped.taps[0].rows
    assert torch.equal(plain.tokens, scored.tokens)
    assert all(torch.equal(one, other) for one, other in zip(plain.levels, scored.levels, strict=True))
    assert tables == ({**ALL_ATTENTION_FUNCTIONS}, {**ALL_MASK_ATTENTION_FUNCTIONS})


def test_an_uncut_model_keeps_all_in_order(kind: str, tiny, prompt) -> None:
    loaded = tiny(kind)
    whole = prompt(loaded)
    shrunk, found = see_all(loaded.model, whole)
    assert shrunk.counts == whole.counts and np.array_equal(shrunk.input_ids, whole.input_ids)
    assert all(s.kept.tolist() == list(range(16)) for s in found)


def test_each_bucket_keeps_its_own_number() -> None:
    """Two sizes, two numbers; a picture of neither is refused with what it is and what there is."""
    loaded = vlmcut.load("tiny:qwen2_vl", sizes=((64, 64), (96, 64)))
    make([PruneTokens(keep=(3, 7), method="divprune")]).apply(loaded.model, None)
    assert describe(loaded.model).keep == (3, 7)
    prompter = Prompter(loaded.processor, describe(loaded.model).layout)
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in ((96, 64), (64, 64))]
    shrunk, found = see_all(loaded.model, prompter(images, "What?"))
    assert shrunk.counts == tuple(len(s.kept) for s in found) == (7, 3)
    with pytest.raises(BundleError, match=r"which no bucket has \(64x64: .*; 96x64: "):
        see_all(loaded.model, prompter([Image.new("RGB", (64, 128))], "What?"))


# --- line breaks


ROWS, COLUMNS = 3, 4  # of tokens; a newline ends each row
BREAKS = tuple((COLUMNS + 1) * (row + 1) - 1 for row in range(ROWS))
COUNT = ROWS * (COLUMNS + 1)


def raster(seed: int = 0) -> TowerState:
    """Tokens in rows, each followed by a newline that no patch stands behind."""
    rng = torch.Generator().manual_seed(seed)
    patches = iter(range(ROWS * COLUMNS))
    members = np.array([[-1 if i in BREAKS else next(patches)] for i in range(COUNT)])
    q, k = torch.randn(2, 1, 2, ROWS * COLUMNS, 4, generator=rng)
    tokens = torch.randn(1, COUNT, 6, generator=rng)
    return TowerState(tokens, lambda x: x, (Tap(0, ((q, k),), 0.5),), has_cls=False, members=members)


def regret(selection: Selection, state: TowerState, kept: torch.Tensor, breaks: tuple[int, ...] = BREAKS) -> float:
    """By how much `kept` falls short of the best at some pick; infinite where no score excuses it."""
    judged = judge(kept, state.count)
    again = selection.choose(replace(state, pick=judged), kept.shape[1], breaks).kept
    return max((c.shortfall for c in judged.calls), default=0.0) if torch.equal(again, kept) else torch.inf


def choice(policy: str, method: str, keep: int, state: TowerState) -> tuple[Selection, list[int], torch.Tensor]:
    selection = Selection(TableSelector(method, seed=1), (keep,), policy)
    kept = selection.choose(state, keep, BREAKS).kept
    assert kept.shape == (1, keep) and kept.dtype == torch.int64
    places = kept[0].tolist()
    assert places == sorted(set(places)) and set(places) <= set(range(COUNT))
    return selection, places, kept


@given(st.sampled_from(SIMPLE), st.integers(1, ROWS * COLUMNS), st.integers(0, 9))
def test_dropped_line_breaks(method: str, keep: int, seed: int) -> None:
    state = raster(seed)
    selection, places, kept = choice("drop", method, keep, state)
    others = [i for i in range(COUNT) if i not in BREAKS]
    assert not set(places) & set(BREAKS)
    # As if they had never been there.
    alone = TableSelector(method, seed=1)(state.only(others), keep).kept[0].tolist()
    assert places == [others[i] for i in alone]
    assert regret(selection, state, kept) == 0
    # Negative control: a newline in the place of a token is no near tie.
    planted = torch.tensor([sorted([BREAKS[1], *places[1:]])])
    assert regret(selection, state, planted) == torch.inf


@given(st.sampled_from(SIMPLE), st.integers(ROWS + 1, COUNT - 1), st.integers(0, 9))
def test_kept_line_breaks(method: str, keep: int, seed: int) -> None:
    """All of them stay and count; the rest are the best of the others."""
    state = raster(seed)
    selection, places, kept = choice("keep", method, keep, state)
    assert set(BREAKS) <= set(places)
    _, without, _ = choice("drop", method, keep - ROWS, state)
    assert [p for p in places if p not in BREAKS] == without
    assert regret(selection, state, kept) == 0
    # Negative control: without one of them, whatever came in its place.
    free = next(i for i in range(COUNT) if i not in places)
    planted = torch.tensor([sorted([free, *(p for p in places if p != BREAKS[0])])])
    assert regret(selection, state, planted) == torch.inf


@given(st.sampled_from(SIMPLE), st.integers(1, COUNT - 1), st.integers(0, 9))
def test_competing_line_breaks(method: str, keep: int, seed: int) -> None:
    """A newline is a token as any other."""
    state = raster(seed)
    selection, places, kept = choice("compete", method, keep, state)
    assert places == TableSelector(method, seed=1)(state, keep).kept[0].tolist()
    assert regret(selection, state, kept) == 0


def test_a_newline_can_win_and_can_lose() -> None:
    """Negative control of the three above: `compete` does keep newlines, and differs from both other policies."""
    kept = [choice("compete", "divprune", 6, raster(seed))[1] for seed in range(10)]
    breaks = {len(set(places) & set(BREAKS)) for places in kept}
    assert len(breaks) > 1 and max(breaks) > 0
    # No patch stands behind a newline, so that attention gives it nothing.
    assert not set(choice("compete", "fastervlm", 12, raster())[1]) & set(BREAKS)


@pytest.mark.parametrize("policy", ["drop", "keep"])
@pytest.mark.parametrize("method", SIMPLE)
def test_regret_is_the_selectors_own_among_what_competes(policy: str, method: str) -> None:
    """A worse choice among real tokens costs what it costs without newlines."""
    state = raster(4)
    keep = 5 + (ROWS if policy == "keep" else 0)
    selection, places, _ = choice(policy, method, keep, state)
    others = [i for i in range(COUNT) if i not in BREAKS]
    free = [p for p in places if p not in BREAKS]
    worse = [i for i in others if i not in free][:5]
    planted = torch.tensor([sorted([*worse, *(BREAKS if policy == "keep" else ())])])
    alone = Selection(TableSelector(method, seed=1), (5,))
    want = regret(alone, state.only(others), torch.tensor([[others.index(i) for i in worse]]), ())
    assert regret(selection, state, planted) == want > 0


@pytest.mark.parametrize("policy", ["drop", "keep", "compete"])
def test_keeping_all_keeps_line_breaks_too(policy: str) -> None:
    selection, places, kept = choice(policy, "fastervlm", COUNT, raster())
    assert places == list(range(COUNT)) and regret(selection, raster(), kept) == 0


@pytest.mark.parametrize("policy", ["drop", "keep", "compete"])
@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_line_breaks_of_a_family(family: str, policy: str, tiny) -> None:
    """The policy reaches the model: newlines stand where the family says, and their row is the model's own."""
    loaded = tiny(family)
    breaks = attached(loaded.model).buckets[0].line_breaks
    assert len(breaks) == describe(loaded.model).breaks[0] > 0
    picture, whole, _ = transformers_features(loaded)
    # The newline is one parameter, the same row each time; no other token is equal to it.
    newline = loaded.model.base_model.image_newline
    assert [i for i in range(len(whole)) if torch.equal(whole[i], newline)] == list(breaks)
    kept = set(see_picture(cut(loaded, len(breaks) + 3, "divprune", policy).model, picture).kept.tolist())
    if policy != "compete":
        assert len(kept & set(breaks)) == (0 if policy == "drop" else len(breaks))


def test_see_wants_a_number(tiny, prompt) -> None:
    """`keep` is a Python int, so that a traced graph has constant shapes; each number gives that many rows."""
    loaded = cut(tiny("llava"), 5)
    picture = prompt(loaded).pictures[0]
    with torch.no_grad():
        for keep in (1, 8, 16):
            found = see(
                loaded.model, torch.from_numpy(picture.pixel_values), prepare(loaded.model, picture.geometry), keep
            )
            assert found.features.shape == (keep, 48) and found.kept.shape == (keep,)


def test_a_model_is_attached_once_loaded(kind: str, tiny) -> None:
    loaded = tiny(kind)
    about = attached(loaded.model)
    assert about.selection is None and about.keep(0) == about.buckets[0].tokens == 16
    again = attach(loaded.model, about.buckets, Selection(TableSelector("uniform"), (4,)))
    assert again is loaded.model and attached(again).keep(0) == 4 and attached(again).family is about.family


def test_two_sizes_that_become_the_same_are_refused() -> None:
    with pytest.raises(ModelError, match="images of 32x32 and 64x64 pixels become the same"):
        vlmcut.load("tiny:llava", sizes=((32, 32), (64, 64)))
