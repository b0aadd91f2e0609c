"""The numbers of `Anatomy` against the modules themselves."""

from __future__ import annotations

import json

import vlmcut
from vlmcut.manifest import TokenBudget
from vlmcut.surgery.costs import costs, kv_bytes
from vlmcut.surgery.load import describe


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
    ten = TokenBudget(images=0, visual_tokens=1, text_tokens=8, new_tokens=2)
    assert kv_bytes(a, ten, element_bytes=2) == sum(2 * 10 * k * a.language.head_dim * 2 for k in a.language.kv_heads)


def test_gated_towers_have_three_matrices(tiny) -> None:
    for kind, matrices in (("pixtral", 3), ("qwen2_5_vl", 3), ("qwen2_vl", 2), ("idefics3", 2)):
        assert describe(tiny(kind).model).tower.matrices == matrices, kind
