"""Every cut against the same thing done by another road: zeroed columns, skipped layers, gathered features, loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import vlmcut
from PIL import Image
from vlmcut.passes.calibration import read_calibration
from vlmcut.passes.drop_heads import DropHeads, head_contributions
from vlmcut.passes.drop_layers import DropLayers, block_influence
from vlmcut.passes.prune_tokens import PruneTokens
from vlmcut.passes.recipe import make
from vlmcut.passes.tokens.methods import METHODS
from vlmcut.passes.tokens.scores import received
from vlmcut.prompt import Prompter
from vlmcut.surgery.load import Loaded, describe, locate
from vlmcut.surgery.selection import attached
from vlmcut.surgery.talk import Talk, see_all
from vlmcut.surgery.vision import look, prepare, see

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


def test_dropped_layers_renumber_the_cache(trimmed, stock) -> None:
    """Decoding step by step with a KV cache equals one pass over all columns; a stale layer_idx would not."""
    cut = trimmed()
    a = describe(cut.model)
    DropLayers(part="language", count=1, drop=(0,)).apply(cut.model, a)
    inputs = stock(cut)
    with torch.no_grad():
        first = cut.model(**inputs, use_cache=True)
        token = first.logits[:, -1:].argmax(dim=-1)
        step = cut.model(input_ids=token, past_key_values=first.past_key_values, use_cache=True)
        ids = torch.cat([inputs["input_ids"], token], dim=1)
        whole = cut.model(input_ids=ids, pixel_values=inputs["pixel_values"])
    close(step.logits[:, -1], whole.logits[:, -1], ATOL)  # float32: one row against many rows of the same product


CHOOSERS = [
    name
    for name, row in METHODS.items()
    if not (row.merges or row.grid or row.frames) and row.module is None and row.inside is None
]


@pytest.mark.parametrize("method", CHOOSERS)
def test_pruned_tokens_equal_gathered_features(trimmed, logits, stock, prompt, method: str) -> None:
    """transformers' own features of both images, the kept rows of which are put into its own language model."""
    cut, other = trimmed(), trimmed()
    a = describe(cut.model)
    PruneTokens(keep=5, method=method, seed=3).apply(cut.model, a)
    shrunk, seen = see_all(cut.model, prompt(cut))
    kept = [s.kept for s in seen]
    assert [tuple(k.shape) for k in kept] == [(5,), (5,)]
    with torch.no_grad():
        full = other.model.get_image_features(stock(other)["pixel_values"], return_dict=True).pooler_output
        gathered = torch.cat([rows[places] for rows, places in zip(full, kept, strict=True)])
        ids = torch.from_numpy(shrunk.input_ids)
        x = other.model.get_input_embeddings()(ids)
        x[ids == a.layout.image_token_id] = gathered
        hidden = other.model.model.language_model(inputs_embeds=x).last_hidden_state
        want = other.model.lm_head(hidden)
    close(logits(cut), want, ATOL)  # float32: the projector's product over 5 rows or 16, the tower's over 1 image or 2
    talk = Talk.read(cut.model, [shrunk], [seen])
    close(talk.logits[0], want[0, -1], ATOL)  # float32: one row of the output projection or all


def test_attention_received_is_the_models_own_map(trimmed, prompt) -> None:
    cut, eager = trimmed(), trimmed()
    a = describe(cut.model)
    PruneTokens(keep=5).apply(cut.model, a)
    tower = locate(eager.model).tower
    tower.set_attn_implementation("eager")
    for picture in prompt(cut).pictures:
        pixels = torch.from_numpy(picture.pixel_values)
        with torch.no_grad():
            state = look(cut.model, pixels, prepare(cut.model, picture.geometry))[1]
            score = received(state, state.taps[-1])
            last = tower(pixels, output_attentions=True, return_dict=True).attentions[-1]
        (rows,) = a.segments[0]
        assert last.shape == (1, a.tower.heads[-1], rows, rows)
        mean = last.mean(dim=1)
        want = mean[:, 0, 1:] if a.tower.has_cls else mean.mean(dim=1)
        assert score.shape == want.shape == (1, a.visual_tokens)
        # float32: softmax of the same products, one row at a time; scores are about 1/16. Measured 1.5e-8.
        close(score, want, 1e-6)
        if not a.tower.has_cls:
            close(score.sum(dim=-1), torch.ones(1), 1e-6)  # a mean of rows that sum to 1; measured 1.2e-7


def merged(patches: torch.Tensor, rows: int, columns: int, factor: int) -> torch.Tensor:
    """Mean over squares of factor x factor patches of a raster, square by square."""
    squares = patches.reshape(rows // factor, factor, columns // factor, factor)
    return squares.permute(0, 2, 1, 3).reshape(-1, factor * factor).mean(dim=-1)


# Of LLaVA-NeXT: pixels of the picture, tiles down and across, and the columns of patches that are not padding.
STITCHED = {(32, 32): (1, 2, slice(2, 6)), (64, 64): (2, 2, slice(0, 8))}


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        *(("llava_next", size) for size in STITCHED),
        *((k, None) for k in ("idefics3", "internvl", "gemma3", "paligemma", "mistral3")),
    ],
)
def test_attention_received_of_tiles_and_merged_patches(kind: str, size: tuple[int, int] | None) -> None:
    """Every other way from patches to tokens, against the maps that the tower itself returns in eager attention."""
    cut, eager = (vlmcut.load(f"tiny:{kind}", sizes=(size,) if size else ()) for _ in range(2))
    for loaded in (cut, eager):
        make([]).apply(loaded.model, None)
    a = describe(cut.model)
    PruneTokens(keep=2).apply(cut.model, a)
    about = attached(cut.model)
    rng = np.random.default_rng(5)
    image = Image.fromarray(rng.integers(0, 256, (*a.buckets[0].size, 3), dtype=np.uint8))
    picture, count = Prompter(cut.processor, a.layout).look(image)
    pixels = torch.from_numpy(picture.pixel_values)
    prepared = prepare(cut.model, picture.geometry)
    maps: list[torch.Tensor] = []
    parts = locate(eager.model)
    parts.tower.set_attn_implementation("eager")
    last = max(about.family.scored(eager.model).items())[1]
    hook = last.register_forward_hook(lambda _, args, out: maps.append(out[1]))
    with torch.no_grad():
        state = look(cut.model, pixels, prepared)[1]
        score = received(state, state.taps[-1])
        encoded = about.family.encode(
            eager.model, pixels, picture.geometry, prepare(eager.model, picture.geometry).constants
        )
    hook.remove()
    assert encoded.tokens.shape[0] == count and all(m is not None and m.dim() == 4 for m in maps)
    means = [m.mean(dim=1) for m in maps]
    patches = torch.cat([(m[:, 0, 1:] if a.tower.has_cls else m.mean(dim=1)).flatten() for m in means])
    side = math.isqrt(a.segments[0][0] - a.tower.has_cls)
    if size is not None:
        # Thumbnail first, then one raster over all tiles, cut to the picture, a newline behind each row.
        high, wide, columns = STITCHED[size]
        tiles = (
            patches[side * side :].reshape(high, wide, side, side).permute(0, 2, 1, 3).reshape(high * side, wide * side)
        )
        rows = torch.nn.functional.pad(tiles[:, columns], (0, 1))  # nobody attends to a newline
        want = torch.cat([patches[: side * side], rows.flatten()])
    else:
        factor = math.isqrt(len(patches) // count)
        assert len(patches) == count * factor * factor
        want = torch.cat([merged(tile, side, side, factor) for tile in patches.split(side * side)])
    assert score.shape == (1, count) and want.std() > 1e-4
    close(score[0], want, 1e-6)  # float32: softmax of the same products; scores are at most 0.2


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_attention_received_follows_the_patches_of_a_merger(kind: str, tiny) -> None:
    """The tower may reorder its patches: a token's score is that of the patches that make the token.

    Asked of the model itself: which patches, by their place in the scored block, move a token of the output.
    """
    loaded = tiny(kind)
    about, parts = attached(loaded.model), locate(loaded.model)
    (bucket,) = about.buckets
    members = about.family.members(loaded.model.config, bucket.geometry)
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randn(bucket.geometry["pixel_values"], generator=rng)
    constants = prepare(loaded.model, bucket.geometry).constants
    index = max(about.family.scored(loaded.model))
    for block in parts.tower_layers[index + 1 :]:  # what comes later mixes patches, in another way
        block.register_forward_hook(lambda _, args, out: args[0])
    moved = {"row": -1}

    def nudge(_: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        out = out.clone()
        if moved["row"] >= 0:
            out[moved["row"]] += torch.linspace(-1, 2, out.shape[-1])
        return out

    parts.tower_layers[index].register_forward_hook(nudge)

    def tokens() -> torch.Tensor:
        with torch.no_grad():
            return about.family.encode(loaded.model, pixels, bucket.geometry, constants).tokens

    before = tokens()
    for moved["row"] in range(0, members.size, 5):
        (changed,) = torch.nonzero((tokens() - before).abs().amax(dim=-1) > 1e-4).T
        assert changed.tolist() == np.flatnonzero((members == moved["row"]).any(axis=1)).tolist() != []


def test_features_are_copied_exactly(trimmed, prompt) -> None:
    """Kept rows are rows of the uncut tower, bit by bit."""
    cut, other = trimmed(), trimmed()
    a = describe(cut.model)
    PruneTokens(keep=5).apply(cut.model, a)
    cls = int(a.tower.has_cls)
    for picture in prompt(cut).pictures:
        pixels = torch.from_numpy(picture.pixel_values)
        with torch.no_grad():
            encoded, state = look(cut.model, pixels, prepare(cut.model, picture.geometry))
            whole = locate(other.model).tower(pixels, output_hidden_states=True).hidden_states[-1]
            seen = see(cut.model, pixels, prepare(cut.model, picture.geometry), 5)
            assert encoded.project is not None
            projected = encoded.project(whole[:, cls:][:, seen.kept])[0]
        assert torch.equal(encoded.tokens, whole[0, cls:]) and torch.equal(state.tokens[0], whole[0, cls:])
        assert seen.features.shape[0] == 5 and torch.equal(seen.features, projected)


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
