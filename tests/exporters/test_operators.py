"""While a graph is traced the model emits our operators; afterwards nothing of ours is left anywhere."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from vlmcut.exporters import operators
from vlmcut.exporters.operators import CacheStep, Contrib, PassThrough, Standard, emitting
from vlmcut.surgery.load import locate

FORMS = [Contrib(), Standard()]


def fingerprint(model: Any) -> dict[str, Any]:
    """Everything that `emitting` touches."""
    parts = locate(model)
    modeling = sys.modules[type(parts.language).__module__]
    return {
        "registry": dict(ALL_ATTENTION_FUNCTIONS.items()),
        "configs": [c._attn_implementation for c in (parts.tower.config, parts.language.config, model.config)],
        "rotary": modeling.apply_rotary_pos_emb,
        "forwards": {n: m.__dict__.get("forward") for n, m in model.named_modules()},
    }


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.name)
def test_everything_is_restored(kind: str, tiny, logits, form: Any) -> None:
    loaded = tiny(kind)
    before, answer = fingerprint(loaded.model), logits(loaded)
    with emitting(loaded.model, form):
        inside = fingerprint(loaded.model)
    assert fingerprint(loaded.model) == before
    assert torch.equal(logits(loaded), answer)
    # Negative control: inside, all of it was different.
    assert all(inside[key] != before[key] for key in before)
    assert len(inside["registry"]) == len(before["registry"]) + 1
    norms = [n for n, f in inside["forwards"].items() if f is not None]
    assert len(norms) == 2 * len(locate(loaded.model).language_layers) + 1


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_everything_is_restored_after_an_error(kind: str, tiny, logits, error: type[BaseException]) -> None:
    loaded = tiny(kind)
    before, answer = fingerprint(loaded.model), logits(loaded)
    with pytest.raises(error), emitting(loaded.model, Standard()):
        raise error
    assert fingerprint(loaded.model) == before
    assert torch.equal(logits(loaded), answer)


def test_an_implementation_that_was_chosen_stays(tiny) -> None:
    loaded = tiny("llava")
    loaded.model.set_attn_implementation("eager")
    with emitting(loaded.model, Contrib()):
        assert locate(loaded.model).tower.config._attn_implementation == "vlmcut"
    assert fingerprint(loaded.model)["configs"][:2] == ["eager", "eager"]


@pytest.mark.parametrize(
    ("heads", "rows", "width", "dtype", "fused"),
    [
        (6, 30, 32, torch.float16, True),
        (6, 30, 256, torch.float16, True),
        (4, 1, 64, torch.float16, True),
        (3, 1, 64, torch.float16, False),  # one row needs four heads
        (3, 2, 64, torch.float16, True),
        (6, 30, 16, torch.float16, False),
        (6, 30, 257, torch.float16, False),
        (6, 30, 64, torch.float32, False),
        (6, 30, 64, torch.bfloat16, False),
    ],
)
def test_where_tensorrt_has_a_kernel(heads: int, rows: int, width: int, dtype: torch.dtype, fused: bool) -> None:
    assert Standard._fused(torch.zeros(1, heads, rows, width, dtype=dtype)) == fused


@pytest.mark.parametrize("group", [1, 3])
def test_unfused_attention_is_attention(group: int) -> None:
    """Against PyTorch's own, causal over a prompt and masked over a cache, with grouped queries."""
    rng = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 1, 2, 7, 8, generator=rng)
    attend = torch.nn.functional.scaled_dot_product_attention
    for rows in (7, 1):
        q = torch.randn(1, 2 * group, rows, 8, generator=rng)
        mask = (
            torch.ones(7, 7, dtype=torch.bool).tril()[None, None]
            if rows == 7
            else (torch.arange(7) < 5)[None, None, None]
        )
        want = attend(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True)
        got = (
            Standard()._attention(q, k, v, 0.3, causal=True)
            if rows == 7
            else Standard()._attention(q, k, v, 0.3, mask=mask)
        )
        # float32: a softmax over 7 and a sum of 7; measured 2.4e-7
        torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.name)
@pytest.mark.parametrize("prefill", [True, False])
def test_the_cache_is_appended_layer_by_layer(form: Any, prefill: bool) -> None:
    past = [torch.zeros(1, 2, 9, 32) for _ in range(4)]
    step = CacheStep(past=past, length=torch.tensor([5]), prefill=prefill)
    rows = 5 if prefill else 1
    for layer in range(2):
        out = form.cached(torch.zeros(1, 6, rows, 32), *torch.zeros(2, 1, 2, rows, 32), 0.1, layer, step)
        assert out.shape == (1, rows, 6, 32)
        assert len(step.present) == 2 * (layer + 1)
    assert [t.shape for t in step.present] == [t.shape for t in past]


def test_the_stand_in_for_a_cache_keeps_nothing() -> None:
    k, v = torch.zeros(1), torch.ones(1)
    cache = PassThrough()
    assert cache.update(k, v, 3) == (k, v) and cache.get_seq_length() == 0


def test_the_name_is_free() -> None:
    assert operators._NAME not in ALL_ATTENTION_FUNCTIONS
