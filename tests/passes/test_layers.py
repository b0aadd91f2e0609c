"""Layers that leave: against skipped ones; those that something names by number; the loss of one after the other."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText
from vlmcut import pipeline
from vlmcut.errors import PassError
from vlmcut.passes import drop_layers
from vlmcut.passes.base import PARTS
from vlmcut.passes.calibration import read_calibration
from vlmcut.passes.drop_layers import DropLayers
from vlmcut.passes.importance import Answers
from vlmcut.passes.prune_tokens import PruneTokens
from vlmcut.passes.recipe import make
from vlmcut.pipeline import Request
from vlmcut.surgery import tiny as tiny_models
from vlmcut.surgery.anatomy import Anatomy
from vlmcut.surgery.families import family_of
from vlmcut.surgery.load import Loaded, attach, describe
from vlmcut.surgery.numbered import follow, pinned_tower
from vlmcut.surgery.selection import attached

from .cut_helpers import MUST, answered, cut, divergence, layers_of, read, saved_and_loaded

FEEDS = "the projector reads its output"
SCORES = "no later layer can score tokens by attention"
TAP = "its output is a DeepStack feature"
ADDED = "a DeepStack feature is added behind it"


def free(a: Anatomy, part: str) -> list[int]:
    """Layers that may go, one of the language model's left over."""
    tower = part == "vision"
    stay = {layer for layer, _ in (a.tower.pinned if tower else a.language.pinned)}
    found = [i for i in range(a.tower.layers if tower else a.language.layers) if i not in stay]
    return found if stay else found[:-1]


@contextmanager
def skipped(model: Any, part: str, drop: Sequence[int]) -> Iterator[None]:
    """While inside, these layers give back what they are given. They run: from their cache the length is taken."""
    layers = layers_of(model, part)
    hooks = [layers[i].register_forward_hook(lambda _, args, out: args[0]) for i in drop]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", MUST)
def test_layers_equal_skipped_layers(kind: str, part: str, tiny, prompt) -> None:
    """The first that may go and, where there are more, the last: prefill and 16 steps of decode, to the bit."""
    shorter, whole = tiny(kind), tiny(kind)
    cut(whole)
    before, _ = read(whole, prompt(whole), steps=0)
    can = free(describe(whole.model), part)
    assert can
    for drop in {(can[0],), (can[-1],), tuple(can)}:
        shorter = tiny(kind)
        cut(shorter, DropLayers(part=part, count=len(drop), drop=drop))
        have, tokens = read(shorter, prompt(shorter))
        with skipped(whole.model, part, drop):
            want, _ = read(whole, prompt(whole), tokens)
        # The layers that are left compute the same products in the same order.
        assert torch.equal(have, want)
        assert (have[0] - before[0]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", MUST)
def test_shorter_models_come_back_from_a_folder(kind: str, tiny, prompt, tmp_path: Path) -> None:
    """With vlmcut.load and, layers being all that left, with transformers alone; it generates the same."""
    loaded = tiny(kind)
    config = copy.deepcopy(loaded.model.config)
    a = make([]).plan(describe(loaded.model))
    steps = [DropLayers(part=p, count=1, drop=(free(a, p)[0],)) for p in PARTS]
    done = cut(loaded, *steps)
    again = saved_and_loaded(loaded, config, done, tmp_path / "cut")
    want, tokens = read(loaded, prompt(loaded))
    have, said = read(again, prompt(again))
    assert torch.equal(have, want) and said == tokens
    opened: Any = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "cut", attn_implementation="sdpa", output_loading_info=True
    )
    plain, report = opened
    assert all("post_layernorm" in key or "vision_model.head" in key for key in report["missing_keys"])
    assert not report["mismatched_keys"] and not report["unexpected_keys"]
    for weight in plain.parameters():  # where they lie in the file products may be summed in another order
        weight.data = weight.data.clone()
    theirs = attach(plain.eval(), attached(loaded.model).buckets)
    have, said = read(Loaded(theirs, loaded.processor, {}), prompt(loaded))
    assert torch.equal(have, want) and said == tokens


# kind -> layers of the tower that stay, layers of the language model that stay
PINNED: dict[str, tuple[dict[int, str], dict[int, str]]] = {
    "llava": ({3: FEEDS}, {}),
    "qwen2_vl": ({3: FEEDS}, {}),
    "qwen2_5_vl": ({3: SCORES, 4: FEEDS}, {}),
    "qwen3_vl": ({1: TAP, 3: TAP, 4: FEEDS}, {0: ADDED, 1: ADDED}),
    "internvl": ({2: FEEDS}, {}),
    "pixtral": ({2: FEEDS}, {}),
}


@pytest.mark.parametrize("kind", PINNED)
def test_layers_that_must_stay_are_refused_by_name(kind: str, tiny) -> None:
    a = make([]).plan(describe(tiny(kind).model))
    for part, stay in zip(PARTS, PINNED[kind], strict=True):
        layers = a.tower.layers if part == "vision" else a.language.layers
        assert (a.tower if part == "vision" else a.language).pinned == tuple(stay.items())
        can = [i for i in range(layers) if i not in stay]
        most = min(len(can), layers - 1)
        for layer, why in stay.items():
            with pytest.raises(PassError) as caught:
                DropLayers(part=part, count=1, drop=(layer,)).plan(a)
            said = f"drop-layers: drop=[{layer}] names {part} layer {layer}, which must stay: {why}"
            assert str(caught.value) == said and caught.value.hint == f"choose from {can}"
        with pytest.raises(PassError) as caught:
            DropLayers(part=part, count=most + 1).plan(a)
        assert f"{part} has {layers} layers of which {most} can go" in str(caught.value)
        after = DropLayers(part=part, count=most).plan(a)
        assert len((after.tower if part == "vision" else after.language).pinned) == len(stay)


@pytest.mark.parametrize(
    ("kind", "name", "drop", "left", "scored"),
    [
        ("qwen2_5_vl", "fullatt_block_indexes", (0,), [0, 2], (0, 2)),
        ("qwen2_5_vl", "fullatt_block_indexes", (1,), [2], (2,)),
        ("qwen2_5_vl", "fullatt_block_indexes", (0, 2), [0, 1], (0, 1)),
        ("qwen3_vl", "deepstack_visual_indexes", (0,), [0, 2], (0, 1, 2, 3)),
        ("qwen3_vl", "deepstack_visual_indexes", (0, 2), [0, 1], (0, 1, 2)),
    ],
)
def test_numbers_follow(kind: str, name: str, drop: Any, left: list[int], scored: Any, tiny) -> None:
    """In the tower, its config and the model's; scores come from the same blocks."""
    loaded = tiny(kind)
    cut(loaded, DropLayers(part="vision", count=len(drop), drop=drop))
    tower = family_of(loaded.model.config).locate(loaded.model).tower
    for holder in (tower, tower.config, loaded.model.config.vision_config):
        assert list(getattr(holder, name)) == left
    assert describe(loaded.model).scored == scored
    make([PruneTokens(keep=2)]).apply(loaded.model, None)  # by the attention of the last of them


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_numbers_that_stay_behind_would_be_noticed(kind: str, tiny, prompt, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: with the old numbers other blocks see everything, or other features are taken."""
    right, wrong = tiny(kind), tiny(kind)
    step = DropLayers(part="vision", count=1, drop=(0,))
    cut(right, step)
    monkeypatch.setattr(drop_layers, "follow", lambda *_: None)
    a = describe(wrong.model)
    step.apply(wrong.model, a)
    assert describe(wrong.model) != step.plan(a)
    assert (read(right, prompt(right))[0] - read(wrong, prompt(wrong))[0]).abs().max() > 1e-2


def test_kinds_of_layers_follow() -> None:
    """One list for each layer, in a config that two hold; one of another length says something else."""
    kinds = ["full", "sliding", "full", "sliding"]
    config = SimpleNamespace(layer_types=kinds, mlp_layer_types=["a", "b"], global_attn_indexes=(1, 3))
    follow(None, [config, config], 4, [0, 2, 3])
    assert config.layer_types == ["full", "full", "sliding"] and kinds[1] == "sliding"
    assert config.mlp_layer_types == ["a", "b"] and config.global_attn_indexes == [2]


@pytest.mark.parametrize(
    ("given", "after", "stay"),
    [
        (-1, -1, [4]),
        (-2, -2, [3, 4]),
        (5, 4, [4]),
        ([-1, -4, 3], [-1, -4, 2], [1, 2, 4]),  # without layer 0
        ([-1, 2, -5], [-1, 2, -4], [0, 1, 4]),  # without layer 2, which comes behind
        ([0, -1], [0, -1], [4]),
    ],
)
def test_hidden_states_are_named_anew(given: Any, after: Any, stay: list[int]) -> None:
    """VipLlava takes several; entry i of the hidden states is what i layers made, -1 what all made."""
    config = SimpleNamespace(vision_feature_layer=given)
    tower = SimpleNamespace(config=SimpleNamespace())
    assert [layer for layer, _ in pinned_tower(config, tower, 5, 5, [])] == stay
    follow(config, [], 5, [0, 1, 3, 4] if 0 in stay else [1, 2, 3, 4])
    assert config.vision_feature_layer == after


def test_every_hidden_state_that_is_read_is_pinned() -> None:
    model = tiny_models.make_model("vipllava")
    family = family_of(model.config)
    tower = family.tower(model, family.locate(model))
    assert tower.pinned == tuple((i, FEEDS) for i in range(4)) == tuple((i, FEEDS) for i in range(tower.layers))


@pytest.mark.parametrize("part", PARTS)
def test_the_loss_takes_one_after_the_other(part: str, kind: str, tiny) -> None:
    """Each time the layer without which a cut model, run by transformers, is nearest to the original."""
    loaded = tiny(kind)
    cut(loaded)
    before, said = answered(loaded)
    a, gone = describe(loaded.model), []
    count = len(free(a, part))
    candidates = range(a.tower.layers - 1 if part == "vision" else a.language.layers)
    for _ in range(count):
        losses = {}
        for i in (i for i in candidates if i not in gone):
            one = tiny(kind)
            cut(one, DropLayers(part=part, count=len(gone) + 1, drop=tuple(sorted([*gone, i]))))
            losses[i] = divergence(before, answered(one, said)[0])
        gone.append(min(losses, key=lambda i: losses[i]))
    step = DropLayers(part=part, count=count, importance="loss")
    data = read_calibration(loaded, None)
    assert step.resolve(loaded.model, a, data).drop == tuple(sorted(gone))
    if count > 1:
        assert replace(step, count=1).resolve(loaded.model, a, data).drop == (gone[0],)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl", "lfm2_vl", "gemma3"])
@pytest.mark.parametrize("part", PARTS)
def test_the_loss_measures_every_family(part: str, kind: str, tiny) -> None:
    """What it leaves out is the best of what it may; nothing stays switched off."""
    loaded = tiny(kind)
    cut(loaded)
    a, data = describe(loaded.model), read_calibration(loaded, None)
    answers = Answers(loaded.model, part, data)
    losses = {}
    for i in free(a, part) if part == "vision" else sorted({*free(a, part), a.language.layers - 1}):
        with skipped(loaded.model, part, (i,)):
            losses[i] = answers.moved()
    done = DropLayers(part=part, count=1, importance="loss").resolve(loaded.model, a, data)
    least = min(losses, key=lambda i: losses[i])
    assert done.drop == (least,) and losses[least] > 0
    assert answers.moved() == 0


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_convert_of_a_shorter_tower_is_exact(kind: str, tmp_path: Path) -> None:
    """Windows and DeepStack features of the blocks that are left, and tokens chosen by their attention."""
    steps = [DropLayers(part=p, count=1, importance="loss") for p in PARTS]
    (tmp_path / "recipe.toml").write_text(make([*steps, PruneTokens(keep=3)]).to_toml())
    request = Request(model=f"tiny:{kind}", recipe=tmp_path / "recipe.toml", text_tokens=24, new_tokens=20)
    manifest = pipeline.convert(request, tmp_path / "out")
    assert all(row["ok"] for row in manifest.exactness["rows"])
    assert manifest.exactness["equal"] == manifest.exactness["tokens"] > 0
    assert len(manifest.anatomy["tower"]["heads"]) == 4
