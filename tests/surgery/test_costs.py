"""Predicted work against the modules themselves, PyTorch's counter and loops."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import vlmcut
from torch.utils.flop_counter import FlopCounterMode
from vlmcut.manifest import Rung, TokenBudget
from vlmcut.passes.prune_tokens import PruneTokens
from vlmcut.passes.recipe import make
from vlmcut.passes.tokens.methods import METHODS
from vlmcut.passes.trim_tower import TrimTower
from vlmcut.surgery.costs import costs, kv_bytes, pairs, predict, rows
from vlmcut.surgery.load import attach, describe, locate, skeleton
from vlmcut.surgery.measure import measured
from vlmcut.surgery.selection import attached
from vlmcut.surgery.talk import see_all
from vlmcut.surgery.vision import prepare, see

BUDGET = TokenBudget(images=2, visual_tokens=16, text_tokens=9, new_tokens=4)


@pytest.mark.parametrize("window", [0, 1, 3, 7, 20])
def test_pairs_are_those_of_a_loop(window: int) -> None:
    for seen in range(1, 12):
        for count in range(1, seen + 1):
            column, row = np.arange(seen), np.arange(seen - count, seen)[:, None]
            near = (column <= row) & ((row - column < window) | (window == 0))
            assert pairs(count, seen, window) == near.sum(), (count, seen)


def test_parameters_are_the_modules(kind: str, tiny) -> None:
    loaded = tiny(kind)
    make([]).apply(loaded.model, None)
    parts = locate(loaded.model)
    a = describe(loaded.model)
    found = {c.part: c.parameters for c in costs(a)}

    def weights(*kinds: type[torch.nn.Module]) -> dict[str, int]:
        return {
            name: sum(m.weight.numel() for m in module.modules() if isinstance(m, kinds))  # type: ignore[misc]
            for name, module in (("tower", parts.tower), ("projector", parts.projector), ("language", parts.language))
        }

    linears, tables = weights(torch.nn.Linear, torch.nn.Conv2d), weights(torch.nn.Embedding)
    assert found["vision tower"] == linears["tower"] + tables["tower"]
    assert found["projector"] == linears["projector"]
    assert found["language model"] == linears["language"]
    head = loaded.model.lm_head.weight
    assert found["embedding and lm_head"] == head.numel() * (1 if kind == "llava" else 2)


def test_tower_flops_are_counted(kind: str, tiny) -> None:
    """PyTorch's own counter on the tower and the projector; exactly the matrix products."""
    loaded = tiny(kind)
    make([]).apply(loaded.model, None)
    a = describe(loaded.model)
    parts = locate(loaded.model)
    parts.tower.set_attn_implementation("eager")
    pixels = torch.zeros(3, 3, *a.buckets[0].size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        parts.tower(pixels)
    found = {c.part: c.flops for c in costs(a, images=3)}
    assert found["vision tower"] == counter.get_total_flops()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        parts.projector(torch.zeros(3, a.keep[0], a.tower.hidden))
    assert found["projector"] == counter.get_total_flops()


def test_language_flops_are_counted(kind: str, tiny) -> None:
    """Eager attention computes the whole square; a causal one what a row and those before it make."""
    loaded = tiny(kind)
    a = describe(loaded.model)
    language = locate(loaded.model).language
    language.set_attn_implementation("eager")
    rows = a.keep[0] + 7
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        language(inputs_embeds=torch.zeros(1, rows, a.language.hidden))
    unseen = rows * (rows - 1) // 2
    counted = counter.get_total_flops() - sum(4 * unseen * h * a.language.head_dim for h in a.language.heads)
    assert {c.part: c.flops for c in costs(a, text_tokens=7)}["language model"] == counted


def text(tokens: int) -> TokenBudget:
    """A budget of a prompt of so many columns."""
    return TokenBudget(images=0, visual_tokens=1, text_tokens=tokens, new_tokens=0)


def test_kv_bytes_are_the_caches(kind: str, tiny, stock) -> None:
    loaded = tiny(kind)
    inputs = stock(loaded)
    with torch.no_grad():
        cache = loaded.model(**inputs, use_cache=True).past_key_values
    stored = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert kv_bytes(describe(loaded.model), text(inputs["input_ids"].shape[1])) == stored


def test_pruning_makes_everything_after_the_tower_cheaper(kind: str, tiny) -> None:
    a = TrimTower().plan(describe(tiny(kind).model))
    pruned = PruneTokens(keep=4).plan(a)
    before, after = ({c.part: c.flops for c in costs(x, images=2, text_tokens=10)} for x in (a, pruned))
    assert after["vision tower"] == before["vision tower"]
    assert after["projector"] * 4 == before["projector"]
    assert after["language model"] < before["language model"]
    assert pruned.visual_tokens == a.visual_tokens == 16


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_dead_layers_cost_nothing(tiny, layers: int) -> None:
    a = describe(tiny("llava").model)
    short = replace(a, tower=replace(a.tower, feature_layer=layers))
    longer = replace(short, tower=replace(short.tower, heads=(*short.tower.heads, 2)))
    assert costs(short)[0] == costs(longer)[0]


def test_graphs_add_up_to_a_first_token(kind: str, tiny) -> None:
    """Both ways to say the same: by part of a prompt, and by call of a graph."""
    a = TrimTower().plan(describe(tiny(kind).model))
    parts = {c.part: c.flops for c in costs(a, images=2, text_tokens=9)}
    assert 2 * predict(a, BUDGET, "vision").flops == parts["vision tower"] + parts["projector"]
    assert predict(a, BUDGET, "prefill").flops == parts["language model"] + parts["embedding and lm_head"]


def test_a_prompt_without_a_causal_operator_multiplies_every_pair(kind: str, tiny) -> None:
    a = describe(tiny(kind).model)
    one, other = (predict(a, BUDGET, "prefill", causal=causal).flops for causal in (True, False))
    n = BUDGET.sequence
    assert other - one == sum(4 * h * a.language.head_dim for h in a.language.heads) * (n * n - n * (n + 1) // 2)
    assert predict(a, BUDGET, "decode", causal=False) == predict(a, BUDGET, "decode")


def test_a_masked_layer_and_a_window_count_as_they_run(tiny) -> None:
    a = describe(tiny("llava").model)
    lm, n, c = a.language, BUDGET.sequence, BUDGET.cache
    unit = 4 * lm.heads[0] * lm.head_dim
    first, others = replace(lm, masked=(True, False, False)), replace(lm, windows=(5, 0, 0))
    base = predict(a, BUDGET, "prefill").flops
    assert predict(replace(a, language=first), BUDGET, "prefill").flops - base == unit * (n * n - n * (n + 1) // 2)
    windowed = replace(a, language=others)
    assert base - predict(windowed, BUDGET, "prefill").flops == unit * (n * (n + 1) // 2 - pairs(n, n, 5))
    assert predict(a, BUDGET, "decode").flops - predict(windowed, BUDGET, "decode").flops == unit * (c - 5)
    assert rows(a, 70, (16,)) == (70, 70, 70)
    assert rows(replace(a, ladder=(Rung(1, 0.5), Rung(2, 0.0))), 70, (16, 10)) == (70, 57, 44)


def test_int8_reads_a_byte_for_each_weight(kind: str, tiny) -> None:
    a = describe(tiny(kind).model)
    b = replace(a, quantized=("vision", "language"))
    for role in ("vision", "prefill", "decode"):
        before, after = predict(a, BUDGET, role), predict(b, BUDGET, role)
        assert before.flops == after.flops and before.state_bytes == after.state_bytes
        assert 1 < before.weight_bytes / after.weight_bytes <= 4
    same = predict(a, BUDGET, "decode", element_bytes=2)
    assert 2 * same.weight_bytes == predict(a, BUDGET, "decode").weight_bytes


# --- measured ---


def test_an_unset_model_measures_the_same(tiny) -> None:
    for kind in ("llava", "qwen2_5_vl", "idefics3", "lfm2_vl"):  # the third asks its own tables for positions
        model = tiny(kind).model
        with torch.device("meta"):
            bare = attach(skeleton(model.config), attached(model).buckets)
        assert describe(bare) == describe(model)
        assert all(t.device.type == "cpu" and not t.is_meta for t in model.parameters())  # nothing fake is left behind


def test_a_clip_is_as_many_images() -> None:
    one, clip = (vlmcut.load("tiny:llava", frames=frames).model for frames in (1, 3))
    (a,), (b,) = measured(one), measured(clip)
    assert b.segments == 3 * a.segments
    assert (b.outside.tower, b.outside.token) == (3 * a.outside.tower, a.outside.token)


def test_what_nobody_reads_is_not_counted(tiny) -> None:
    """Dead layers and the pooling head of SigLIP run before they are trimmed; the numbers are those of after."""
    loaded = tiny("llava-siglip-qwen2")
    whole = describe(loaded.model)
    assert hasattr(locate(loaded.model).tower, "head")
    make([]).apply(loaded.model, None)
    attached(loaded.model).measured = None
    assert describe(loaded.model).outside == whole.outside and whole.outside[0].tower > 0


def test_windows_are_the_towers(tiny) -> None:
    """Qwen2.5-VL: every patch is in one window, and the tower's own segments say the same."""
    loaded = vlmcut.load("tiny:qwen2_5_vl", sizes=((64, 96), (160, 64)))
    a = describe(loaded.model)
    full = loaded.model.config.vision_config.fullatt_block_indexes
    assert a.tower.windowed == tuple(i not in full for i in range(a.tower.layers)) and any(a.tower.windowed)
    for bucket, windows, segments in zip(a.buckets, a.windows, a.segments, strict=True):
        assert sum(windows) == sum(segments) and len(windows) > 1
        constants = attached(loaded.model).family.constants(loaded.model, bucket.geometry)
        ends = np.asarray(constants["cu_window_seqlens"])
        assert windows == tuple(n for n in np.diff(ends).tolist() if n)


def _rows_projected(model: Any, see_it: Any) -> int:
    """Rows that go through the projector."""
    found: list[int] = []
    hook = locate(
        model
    ).projector.register_forward_pre_hook(  # type: ignore[union-attr]
        lambda _, args: found.append(math.prod(args[0].shape[:-1]))
    )
    try:
        see_it()
    finally:
        hook.remove()
    return sum(found)


@pytest.mark.parametrize("method", [n for n, m in METHODS.items() if m.module is None and not m.frames])
def test_methods_say_which_rows_they_project(method: str, tiny, prompt) -> None:
    loaded = tiny("llava")
    spec = {"mustdrop-vision": "mustdrop-vision:window=2"}.get(method, method)  # of 4 x 4 tokens
    make([PruneTokens(keep=4, method=spec)]).apply(loaded.model, None)
    a = describe(loaded.model)
    found = _rows_projected(loaded.model, lambda: see_all(loaded.model, prompt(loaded)))
    assert found == 2 * a.projected[0]  # two pictures
    assert a.projected[0] in (4, 20)


@pytest.mark.parametrize("method", [n for n, m in METHODS.items() if m.module is None and m.frames])
def test_methods_of_clips_say_which_rows_they_project(method: str) -> None:
    loaded = vlmcut.load("tiny:llava", frames=4)
    make([PruneTokens(keep=28, method=method)]).apply(loaded.model, None)
    a = describe(loaded.model)
    (bucket,) = a.buckets
    pixels = torch.randn(bucket.pixels, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = _rows_projected(
            loaded.model, lambda: see(loaded.model, pixels, prepare(loaded.model, bucket.geometry), 28)
        )
    assert found == a.projected[0] and found in (28, 28 + 64)


def test_keeping_all_projects_each_once(tiny) -> None:
    a = TrimTower().plan(describe(tiny("llava").model))
    assert a.projected == PruneTokens(keep=16, method="divprune").plan(a).projected == (16,)
    prefiltered = PruneTokens(keep=4, method="todre:prefilter=2").plan(a)
    assert prefiltered.projected == (4 * 2 + 4,)
