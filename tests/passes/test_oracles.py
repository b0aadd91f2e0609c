"""Every cut against the same thing done by another road: zeroed columns, skipped layers, gathered features, loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from vlmcut.passes.calibration import read_calibration
from vlmcut.passes.drop_heads import DropHeads, head_contributions
from vlmcut.passes.drop_layers import DropLayers, block_influence
from vlmcut.passes.prune_tokens import PruneTokens
from vlmcut.passes.recipe import make
from vlmcut.passes.tokens.methods import METHODS
from vlmcut.passes.tokens.scores import attention_received
from vlmcut.surgery.load import Loaded, describe, locate

# float32: the same terms without the zeros, or with other rows beside them, may be summed in another order; logits are
# of size 3, the last bit of which is 2.4e-7. Measured on x86 with one thread: 0.0 for heads, 0.0 for gathered features,
# 2.4e-6 for a decode step.
ATOL = 2e-5


def close(cut: torch.Tensor, other: torch.Tensor, atol: float) -> None:
    torch.testing.assert_close(cut, other, rtol=0, atol=atol)


@pytest.fixture
def trimmed(tiny: Callable[[str], Loaded], kind: str) -> Callable[[], Loaded]:
    def fresh() -> Loaded:
        loaded = tiny(kind)
        make([]).apply(loaded.model, None)
        return loaded

    return fresh


def zero_heads(projection: Any, dead: list[int], width: int) -> None:
    """Zero the input columns of `dead` heads, `width` columns each."""
    for head in dead:
        projection.weight.data[:, head * width : (head + 1) * width] = 0


def test_vision_heads_equal_zeroed_columns(trimmed, logits) -> None:
    cut, other = trimmed(), trimmed()
    a = describe(cut.model)
    total = a.tower.heads[0]
    keep = tuple((layer % total,) if total == 2 else (0, 1 + layer % 2) for layer in range(a.tower.layers))
    step = DropHeads(part="vision", fraction=1 / total, keep=keep)
    step.plan(a)
    step.apply(cut.model, a)
    for block, kept in zip(locate(other.model).tower_layers, keep, strict=True):
        zero_heads(block.self_attn.out_proj, [h for h in range(total) if h not in kept], a.tower.head_dim)
    close(logits(cut), logits(other), ATOL)


def test_language_groups_equal_zeroed_columns(tiny, logits) -> None:
    cut, other = tiny("llava"), tiny("llava")
    a = describe(cut.model)
    group = a.language.heads[0] // a.language.kv_heads[0]
    keep = ((0, 2), (1, 2), (0, 1))
    step = DropHeads(part="language", fraction=1 / 3, keep=keep)
    step.plan(a)
    step.apply(cut.model, a)
    for block, kept in zip(locate(other.model).language_layers, keep, strict=True):
        dead = [g for g in range(3) if g not in kept]
        zero_heads(block.self_attn.o_proj, dead, group * a.language.head_dim)
    close(logits(cut), logits(other), ATOL)


@pytest.mark.parametrize(
    ("part", "drop"), [("vision", (0,)), ("vision", (1, 2)), ("language", (0,)), ("language", (1,))]
)
def test_dropped_layers_equal_skipped_layers(trimmed, logits, part: str, drop: tuple[int, ...]) -> None:
    cut, other = trimmed(), trimmed()
    a = describe(cut.model)
    step = DropLayers(part=part, count=len(drop), drop=drop)
    step.plan(a)
    step.apply(cut.model, a)
    parts = locate(other.model)
    layers = parts.tower_layers if part == "vision" else parts.language_layers
    for index in drop:
        layers[index].register_forward_hook(lambda _, args, out: args[0])
    # Bit-equal: the layers that are left compute the same products in the same order.
    assert torch.equal(logits(cut), logits(other))


def test_dropped_layers_renumber_the_cache(trimmed, prompt) -> None:
    """Decoding step by step with a KV cache equals one pass over all columns; a stale layer_idx would not."""
    cut = trimmed()
    a = describe(cut.model)
    DropLayers(part="language", count=1, drop=(0,)).apply(cut.model, a)
    inputs = prompt(cut)
    with torch.no_grad():
        first = cut.model(**inputs, use_cache=True)
        token = first.logits[:, -1:].argmax(dim=-1)
        step = cut.model(input_ids=token, past_key_values=first.past_key_values, use_cache=True)
        ids = torch.cat([inputs["input_ids"], token], dim=1)
        whole = cut.model(input_ids=ids, pixel_values=inputs["pixel_values"])
    close(step.logits[:, -1], whole.logits[:, -1], ATOL)  # float32: one row against many rows of the same product


@pytest.mark.parametrize("method", METHODS)
def test_pruned_tokens_equal_gathered_features(trimmed, logits, prompt, method: str) -> None:
    cut, other = trimmed(), trimmed()
    a = describe(cut.model)
    PruneTokens(keep=5, method=method, seed=3).apply(cut.model, a)
    inputs = prompt(cut)
    with torch.no_grad():
        kept = cut.model.get_image_features(inputs["pixel_values"], return_dict=True).kept
        assert kept.shape == (2, 5)
        full = other.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
        gathered = torch.cat([rows[torch.tensor(list(places))] for rows, places in zip(full, kept, strict=True)])
        x = other.model.get_input_embeddings()(inputs["input_ids"])
        x[inputs["input_ids"] == a.image_token_id] = gathered
        hidden = other.model.model.language_model(inputs_embeds=x).last_hidden_state
        want = other.model.lm_head(hidden)
    close(logits(cut), want, ATOL)  # float32: the projector's product over 5 rows or 16


def states(loaded: Loaded, pixels: torch.Tensor) -> Any:
    """The state that selectors see, of a model that is cut to keep some tokens."""
    selection = locate(loaded.model).selection
    assert selection is not None
    with torch.no_grad():
        return selection.state(pixels)[0]


def test_attention_received_is_the_models_own_map(trimmed, prompt) -> None:
    cut, eager = trimmed(), trimmed()
    a = describe(cut.model)
    PruneTokens(keep=5).apply(cut.model, a)
    pixels = prompt(cut)["pixel_values"]
    with torch.no_grad():
        score = attention_received(states(cut, pixels))
        tower = locate(eager.model).tower
        tower.set_attn_implementation("eager")
        last = tower(pixels, output_attentions=True, return_dict=True).attentions[-1]
    assert last.shape == (2, a.tower.heads[-1], a.tower.tokens, a.tower.tokens)
    mean = last.mean(dim=1)
    want = mean[:, 0, 1:] if a.tower.has_cls else mean.mean(dim=1)
    assert score.shape == want.shape == (2, a.visual_tokens)
    # float32: softmax of the same products, one row at a time; scores are about 1/16. Measured 1.5e-8.
    close(score, want, 1e-6)
    if not a.tower.has_cls:
        close(score.sum(dim=-1), torch.ones(2), 1e-6)  # a mean of rows that sum to 1; measured 1.2e-7


def test_features_are_copied_exactly(trimmed, prompt) -> None:
    """Kept rows are rows of the uncut tower, bit by bit."""
    cut, other = trimmed(), trimmed()
    a = describe(cut.model)
    PruneTokens(keep=5).apply(cut.model, a)
    pixels = prompt(cut)["pixel_values"]
    with torch.no_grad():
        out = locate(cut.model).selection(pixels)
        whole = locate(other.model).tower(pixels, output_hidden_states=True).hidden_states[-1]
    cls = int(a.tower.has_cls)
    assert out.hidden_states[-1].shape[1] == 5 + cls
    for image in range(2):
        assert torch.equal(out.hidden_states[-1][image, cls:], whole[image, cls:][out.kept[image]])
        assert torch.equal(out.hidden_states[-1][image, :cls], whole[image, :cls])


def test_block_influence_by_a_loop() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 3, 5, 7)).astype(np.float32)
    cosines = []
    for a, b in zip(x.reshape(-1, 7).astype(np.float64), y.reshape(-1, 7).astype(np.float64), strict=True):
        cosines.append(a @ b / math.sqrt(a @ a) / math.sqrt(b @ b))
    # float64 both: 1e-12 is a thousand times its rounding; measured 2e-16.
    assert float(block_influence(torch.from_numpy(x), torch.from_numpy(y))) == pytest.approx(
        1 - np.mean(cosines), abs=1e-12
    )
    assert float(block_influence(torch.from_numpy(x), torch.from_numpy(x))) == pytest.approx(0, abs=1e-12)


def test_head_contributions_by_a_loop() -> None:
    rng = np.random.default_rng(0)
    heads, width, hidden = 3, 4, 5
    x = rng.standard_normal((2, 6, heads * width)).astype(np.float32)
    w = rng.standard_normal((hidden, heads * width)).astype(np.float32)
    want = []
    for head in range(heads):
        columns = slice(head * width, (head + 1) * width)
        norms = [
            np.linalg.norm(w[:, columns].astype(np.float64) @ row[columns].astype(np.float64))
            for row in x.reshape(-1, heads * width)
        ]
        want.append(np.mean(norms))
    got = head_contributions(torch.from_numpy(x), torch.from_numpy(w), heads)
    # float64 both: measured 4e-16.
    np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("part", ["vision", "language"])
def test_a_planted_dead_head_is_dropped(trimmed, kind: str, part: str) -> None:
    loaded = trimmed()
    a = describe(loaded.model)
    total = a.tower.heads[0] if part == "vision" else a.language.kv_heads[0]
    if total == 1:
        assert (kind, part) == ("llava-siglip-qwen2", "language")
        return
    parts = locate(loaded.model)
    layers = parts.tower_layers if part == "vision" else parts.language_layers
    width = a.tower.head_dim if part == "vision" else a.language.head_dim * a.language.heads[0] // total
    dead = [(layer * 2 + 1) % total for layer in range(len(layers))]
    for block, head in zip(layers, dead, strict=True):
        zero_heads(getattr(block.self_attn, "out_proj", None) or block.self_attn.o_proj, [head], width)
    step = DropHeads(part=part, fraction=1 / total).resolve(loaded.model, a, read_calibration(loaded, None))
    assert step.keep == tuple(tuple(h for h in range(total) if h != head) for head in dead)


@pytest.mark.parametrize("part", ["vision", "language"])
def test_a_planted_idle_layer_is_dropped(trimmed, part: str) -> None:
    for planted in (0, 1):
        loaded = trimmed()
        a = describe(loaded.model)
        parts = locate(loaded.model)
        layer = (parts.tower_layers if part == "vision" else parts.language_layers)[planted]
        last = (
            (layer.self_attn.out_proj, layer.mlp.fc2)
            if part == "vision"
            else (layer.self_attn.o_proj, layer.mlp.down_proj)
        )
        for linear in last:
            linear.weight.data *= 1e-3
            if linear.bias is not None:
                linear.bias.data *= 1e-3
        step = DropLayers(part=part, count=1).resolve(loaded.model, a, read_calibration(loaded, None))
        assert step.drop == (planted,)


def test_the_layer_that_feeds_the_projector_stays(trimmed) -> None:
    loaded = trimmed()
    a = describe(loaded.model)
    last = locate(loaded.model).tower_layers[-1]
    for linear in (last.self_attn.out_proj, last.mlp.fc2):
        linear.weight.data.zero_()
        linear.bias.data.zero_()
    step = DropLayers(part="vision", count=1).resolve(loaded.model, a, read_calibration(loaded, None))
    assert step.drop and a.tower.layers - 1 not in step.drop
