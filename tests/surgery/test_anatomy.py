"""The numbers of `Anatomy` and its costs against the modules themselves."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import vlmcut
from torch.utils.flop_counter import FlopCounterMode
from vlmcut.passes.prune_tokens import PruneTokens
from vlmcut.passes.recipe import make
from vlmcut.passes.trim_tower import TrimTower
from vlmcut.surgery.anatomy import costs, kv_bytes
from vlmcut.surgery.load import describe, locate


def test_describe_reads_the_modules(tiny) -> None:
    a = describe(tiny("llava").model)
    t, lm = a.tower, a.language
    assert (t.layers, t.feature_layer, t.patch_size, t.matrices, t.has_cls) == (5, 4, 8, 2, True)
    assert (a.segments, a.breaks, a.scored) == (((17,),), (0,), (0, 1, 2, 3, 4))  # 16 patches and [CLS]
    assert [(b.size, b.tokens, b.line_breaks) for b in a.buckets] == [((32, 32), 16, ())]
    assert (lm.layers, lm.heads[0], lm.kv_heads[0], lm.head_dim, lm.tied) == (3, 6, 3, 32, True)
    assert (*a.keep, a.visual_tokens) == (16, 16) and a.method is None and a.quantized == ()
    b = describe(tiny("llava-siglip-qwen2").model)
    assert (b.tower.layers, b.tower.feature_layer, b.segments, b.tower.has_cls) == (4, 4, ((16,),), False)
    assert (b.language.layers, b.language.kv_heads[0], b.language.tied) == (2, 1, False)
    assert json.loads(json.dumps(a.to_json())) == a.to_json() and a.to_json()["tower"]["hidden"] == 64


def test_two_sizes_are_two_buckets() -> None:
    """Everything that depends on the picture's size has one entry for each; the smallest is not always the first."""
    loaded = vlmcut.load("tiny:qwen2_vl", sizes=((96, 64), (64, 64)))
    a = describe(loaded.model)
    patch, merge = loaded.model.config.vision_config.patch_size, a.layout.merge
    patches = [height // patch * (width // patch) for height, width in ((96, 64), (64, 64))]
    assert patches[0] * 2 == patches[1] * 3
    assert a.segments == tuple((n,) for n in patches)
    assert a.keep == tuple(b.tokens for b in a.buckets) == tuple(n // merge**2 for n in patches)
    assert a.smallest is a.buckets[1] and a.visual_tokens == a.keep[1] < a.keep[0]
    large, small = ({c.part: c.flops for c in costs(a, bucket=bucket)} for bucket in (0, 1))
    assert large["vision tower"] > small["vision tower"] and large["language model"] > small["language model"]


def test_layers_without_attention_are_no_heads(tiny) -> None:
    """LFM2's short convolutions remember no key and no value."""
    a = describe(tiny("lfm2_vl").model)
    kinds = tiny("lfm2_vl").model.config.text_config.layer_types
    assert [h > 0 for h in a.language.heads] == [k > 0 for k in a.language.kv_heads]
    assert [k > 0 for k in a.language.kv_heads] == [kind == "full_attention" for kind in kinds]
    assert 0 in a.language.kv_heads and any(a.language.kv_heads)
    assert kv_bytes(a, 10, element_bytes=2) == sum(2 * 10 * k * a.language.head_dim * 2 for k in a.language.kv_heads)


def test_gated_towers_have_three_matrices(tiny) -> None:
    for kind, matrices in (("pixtral", 3), ("qwen2_5_vl", 3), ("qwen2_vl", 2), ("idefics3", 2)):
        assert describe(tiny(kind).model).tower.matrices == matrices, kind


def test_parameters_are_the_modules(kind: str, tiny) -> None:
    loaded = tiny(kind)
    make([]).apply(loaded.model, None)
    parts = locate(loaded.model)
    a = describe(loaded.model)
    found = {c.part: c.parameters for c in costs(a)}

    def linears(module: torch.nn.Module) -> int:
        return sum(m.weight.numel() for m in module.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d))

    assert found["vision tower"] == linears(parts.tower)
    assert found["projector"] == linears(parts.projector)
    assert found["language model"] == linears(parts.language)
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
    """Eager attention computes the whole square; a causal one needs half of it, and that is what is counted."""
    loaded = tiny(kind)
    a = describe(loaded.model)
    language = locate(loaded.model).language
    language.set_attn_implementation("eager")
    rows = a.keep[0] + 7
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        language(inputs_embeds=torch.zeros(1, rows, a.language.hidden))
    square = sum(4 * rows * rows * h * a.language.head_dim for h in a.language.heads)
    counted = counter.get_total_flops() - square // 2
    assert {c.part: c.flops for c in costs(a, text_tokens=7)}["language model"] == counted


def test_kv_bytes_are_the_caches(kind: str, tiny, stock) -> None:
    loaded = tiny(kind)
    inputs = stock(loaded)
    with torch.no_grad():
        cache = loaded.model(**inputs, use_cache=True).past_key_values
    stored = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert kv_bytes(describe(loaded.model), inputs["input_ids"].shape[1]) == stored


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
