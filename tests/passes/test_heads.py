"""Heads that leave: against silenced ones, with different numbers per layer, measured by what the answers lose."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText
from vlmcut import pipeline
from vlmcut.errors import PassError
from vlmcut.manifest import TokenBudget
from vlmcut.passes.base import PARTS
from vlmcut.passes.calibration import read_calibration
from vlmcut.passes.drop_heads import DropHeads
from vlmcut.passes.drop_layers import DropLayers
from vlmcut.passes.importance import TOKENS, Answers, best_of_all, spread, without_columns
from vlmcut.passes.prune_tokens import PruneTokens
from vlmcut.passes.recipe import make
from vlmcut.pipeline import Request
from vlmcut.surgery import tiny as tiny_models
from vlmcut.surgery.anatomy import Anatomy
from vlmcut.surgery.costs import costs, kv_bytes
from vlmcut.surgery.heads import bound
from vlmcut.surgery.load import describe, locate
from vlmcut.surgery.structure import find_attention, kv_heads, output_name, query_heads
from vlmcut.surgery.talk import see_all

from .cut_helpers import MUST, answered, cut, divergence, layers_of, many_groups, read, saved_and_loaded

# float32: the same terms without the zeros, summed in another order; logits are of size 3. Measured on x86 with one
# thread: at most 1.6e-6.
ATOL = 2e-5
Keep = tuple[tuple[int, ...], ...]


def counts_of(a: Anatomy, part: str) -> tuple[int, ...]:
    return a.tower.heads if part == "vision" else a.language.kv_heads


def unequal(counts: Sequence[int]) -> Keep:
    """All heads but one in layer 0, one alone in the next that has some, and so on; never the same ones."""
    keep, turn = [], 0
    for n in counts:
        left = 0 if n == 0 else max(1, n - 1) if turn % 2 == 0 else 1
        keep.append(tuple(sorted({(turn + i) % n for i in range(left)})) if n else ())
        turn += n > 0
    if len(set(map(len, filter(None, keep)))) == 1:  # two heads a layer: the first one keeps both
        first = next(i for i, n in enumerate(counts) if n)
        keep[first] = tuple(range(counts[first]))
    return tuple(keep)


def dropping(part: str, counts: Sequence[int], keep: Keep) -> DropHeads:
    gone = sum(counts) - sum(map(len, keep))
    return DropHeads(part=part, fraction=gone / sum(counts), keep=keep, ranking="global")


@contextmanager
def silenced(model: Any, part: str, keep: Keep) -> Iterator[None]:
    """While inside, the columns of every other head in the output projections are zero."""
    before = []
    for block, kept in zip(layers_of(model, part), keep, strict=True):
        attention = find_attention(block)
        if attention is None:
            continue
        weight = getattr(attention, output_name(attention)).weight
        count = query_heads(attention) if part == "vision" else kv_heads(attention)
        width = weight.shape[1] // count
        before.append((weight, weight.data.clone()))
        for head in set(range(count)) - set(kept):
            weight.data[:, head * width : (head + 1) * width] = 0
    try:
        yield
    finally:
        for weight, data in before:
            weight.data = data


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", MUST)
def test_unequal_heads_equal_silenced_heads(kind: str, part: str, tiny, prompt) -> None:
    """Fused qkv and single projections, groups and single heads; prefill and 16 steps of decode."""
    shorter, whole = many_groups(tiny, kind), many_groups(tiny, kind)
    cut(whole)
    before, _ = read(whole, prompt(whole), steps=0)
    counts = counts_of(describe(whole.model), part)
    keep = unequal(counts)
    assert len(set(map(len, filter(None, keep)))) > 1
    cut(shorter, dropping(part, counts, keep))
    found = describe(shorter.model)
    assert counts_of(found, part) == tuple(map(len, keep)) and found != describe(whole.model)
    have, tokens = read(shorter, prompt(shorter))
    with silenced(whole.model, part, keep):
        want, _ = read(whole, prompt(whole), tokens)
    torch.testing.assert_close(have, want, rtol=0, atol=ATOL)
    assert (have[0] - before[0]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", MUST)
def test_unequal_heads_come_back_from_a_folder(kind: str, tiny, prompt, tmp_path: Path) -> None:
    """In both parts at once, to the bit; no config says such widths, so that transformers alone stops."""
    loaded = many_groups(tiny, kind)
    config = copy.deepcopy(loaded.model.config)
    a = make([]).plan(describe(loaded.model))
    steps = [dropping(part, counts_of(a, part), unequal(counts_of(a, part))) for part in PARTS]
    done = cut(loaded, *steps)
    again = saved_and_loaded(loaded, config, done, tmp_path / "cut")
    have, want = (read(one, prompt(one)) for one in (again, loaded))
    assert torch.equal(have[0], want[0]) and have[1] == want[1]
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForImageTextToText.from_pretrained(tmp_path / "cut")


@pytest.mark.parametrize("importance", ["activation", "loss"])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl", "lfm2_vl"])
def test_planted_dead_heads_go_first(kind: str, part: str, importance: str, tiny) -> None:
    """Ranked over all layers: exactly the heads that add nothing, although they fill one layer more than another."""
    loaded = many_groups(tiny, kind)
    cut(loaded)
    a = describe(loaded.model)
    counts = counts_of(a, part)
    having = [i for i, n in enumerate(counts) if n]
    dead = {(having[0], 0), (having[-1], counts[having[-1]] - 1)}
    keep = tuple(tuple(h for h in range(n) if (layer, h) not in dead) for layer, n in enumerate(counts))
    with silenced(loaded.model, part, keep):
        step = DropHeads(part=part, fraction=2 / sum(counts), ranking="global", importance=importance)
        done = step.resolve(loaded.model, a, read_calibration(loaded, None))
    assert done.keep == keep


@pytest.mark.parametrize("part", PARTS)
def test_the_loss_by_another_road(part: str, tiny) -> None:
    """What leaving a head out costs, and which is left out: against cut models that transformers runs."""
    loaded = tiny("llava")
    cut(loaded)
    a, data = describe(loaded.model), read_calibration(loaded, None)
    before, said = answered(loaded)
    answers = Answers(loaded.model, part, data)
    assert answers.moved() == 0.0 and any(map(len, said))
    counts, want, have = counts_of(a, part), {}, {}
    for layer, n in enumerate(counts):
        attention: Any = find_attention(layers_of(loaded.model, part)[layer])
        out = getattr(attention, output_name(attention))
        for head in range(n):
            one = tiny("llava")
            keep = tuple(tuple(h for h in range(m) if (i, h) != (layer, head)) for i, m in enumerate(counts))
            cut(one, dropping(part, counts, keep))
            want[layer, head] = divergence(before, answered(one, said)[0])
            width = out.in_features // n
            with without_columns(out, slice(head * width, (head + 1) * width)):
                have[layer, head] = answers.moved()
    # float64 sums of float32 logits of size 3 whose last bits differ; divergences are 0.02 to 3. Measured 2e-6.
    np.testing.assert_allclose(list(have.values()), list(want.values()), rtol=1e-3, atol=1e-5)
    step = DropHeads(part=part, fraction=1 / sum(counts), ranking="global", importance="loss")
    done = step.resolve(loaded.model, a, data)
    assert done.keep is not None
    (gone,) = ((i, h) for i, n in enumerate(counts) for h in range(n) if h not in done.keep[i])
    assert gone == min(want, key=lambda one: want[one])


@pytest.mark.parametrize("part", PARTS)
def test_the_loss_reads_as_often_as_the_note_says(part: str, tiny) -> None:
    """Once for the model as it is and once for each head; and leaves nothing behind."""
    loaded = tiny("llava")
    cut(loaded)
    a = describe(loaded.model)
    whole = read_calibration(loaded, None)
    data = replace(whole, prompts=whole.prompts[:3])
    step = DropHeads(part=part, fraction=0.5, importance="loss")
    runs = {"tower": 0, "language": 0}
    parts = locate(loaded.model)

    def count(name: str) -> Any:
        def add(*_: Any) -> None:
            runs[name] += 1

        return add

    see_all(loaded.model, data.prompts[0])  # transformers adds hooks of its own at a first run
    counters = [getattr(parts, name).register_forward_hook(count(name)) for name in runs]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in loaded.model.modules()]
    done = step.resolve(loaded.model, a, data)
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in loaded.model.modules()]
    total = 1 + sum(counts_of(a, part))
    # Asked as it is, its answer is found, then fed: one more picture where pictures are seen again.
    assert runs["tower"] == len(data.prompts) * (1 + total if part == "vision" else 1)
    assert len(data.prompts) * (1 + total) <= runs["language"] <= len(data.prompts) * (1 + total) * (1 + TOKENS)
    (note,) = (note for note in step.notes(a) if "left out" in note)
    assert f"{total} answers to each calibration prompt (32 at most)" in note
    for counter in counters:
        counter.remove()
    assert done == step.resolve(loaded.model, a, data)
    assert not any("left out" in note for note in done.notes(a))


def test_layers_of_a_global_ranking_differ(tiny) -> None:
    """A layer that one head carries loses the others; scales of layers do not count."""
    loaded = tiny("llava")
    cut(loaded)
    a = describe(loaded.model)
    first, second, _ = layers_of(loaded.model, "language")
    width = first.self_attn.o_proj.weight.shape[1] // 3
    first.self_attn.o_proj.weight.data[:, width:] *= 1e-3
    second.self_attn.o_proj.weight.data *= 1e-3
    step = DropHeads(part="language", fraction=2 / 9, ranking="global")
    recipe = cut(loaded, step)
    found = describe(loaded.model)
    assert found.language.kv_heads == (1, 3, 3) and found.language.heads == (2, 6, 6)
    planned = make([step]).plan(a)
    assert sum(planned.language.kv_heads) == 7 and recipe.plan(a).language == found.language
    twenty = TokenBudget(images=0, visual_tokens=1, text_tokens=18, new_tokens=2)
    assert costs(planned)[2] == costs(found)[2] and kv_bytes(planned, twenty) == kv_bytes(found, twenty)


def test_a_plan_of_unequal_layers_adds_up() -> None:
    for most in ((1, 1, 4), (3, 0, 2), (2, 2, 2, 2), (16,), (0, 5, 1)):
        for count in range(sum(n > 0 for n in most), sum(most) + 1):
            found = spread(count, most)
            assert sum(found) == count and all((0 < f <= n) if n else f == 0 for f, n in zip(found, most, strict=True))
    assert best_of_all([torch.ones(0), torch.tensor([1.0, 3.0]), torch.tensor([0.1, 0.2])], 3) == ((), (0, 1), (1,))


@pytest.mark.parametrize("importance", ["activation", "loss"])
@pytest.mark.parametrize("ranking", ["layer", "global"])
def test_it_goes_with_the_other_cuts(kind: str, ranking: str, importance: str, tiny, prompt) -> None:
    loaded = many_groups(tiny, kind)
    a = describe(loaded.model)
    share = {"vision": 1 / a.tower.heads[0], "language": 1 / a.language.kv_heads[0]}
    heads = [DropHeads(part=p, fraction=share[p], ranking=ranking, importance=importance) for p in PARTS]
    recipe = make(
        [
            DropLayers(part="vision", count=1),
            heads[0],
            PruneTokens(keep=5),
            heads[1],
            DropLayers(part="language", count=1),
        ]
    )
    done = recipe.apply(loaded.model, read_calibration(loaded, None))
    assert describe(loaded.model) == done.plan(a)
    assert read(loaded, prompt(loaded), steps=1)[0].isfinite().all()
    again = many_groups(tiny, kind)
    assert done.apply(again.model, None) == done
    assert torch.equal(read(again, prompt(again))[0], read(loaded, prompt(loaded))[0])


@pytest.mark.parametrize("more", [{}, {"target": "rtx", "defer_build": True}], ids=["contrib", "standard"])
def test_convert_of_unequal_heads_is_exact(more: dict[str, Any], tmp_path: Path) -> None:
    """A key and value buffer of its own size in each layer; ranked by the loss, in both parts."""
    steps = [DropHeads(part=p, fraction=1 / 3, ranking="global", importance="loss") for p in PARTS]
    (tmp_path / "recipe.toml").write_text(make([*steps, PruneTokens(keep=6)]).to_toml())
    request = Request(model="tiny:llava", recipe=tmp_path / "recipe.toml", text_tokens=24, new_tokens=20, **more)
    manifest = pipeline.convert(request, tmp_path / "out")
    assert all(row["ok"] for row in manifest.exactness["rows"])
    assert manifest.exactness["equal"] == manifest.exactness["tokens"] > 0
    a = manifest.anatomy
    assert len(set(a["tower"]["heads"])) > 1 and len(set(a["language"]["kv_heads"])) > 1
    (decode,) = (graph for graph in manifest.graphs.values() if graph.role == "decode")
    buffers = {t.name: t.shape[1] for t in decode.inputs if t.name.startswith("past_key")}
    assert list(buffers.values()) == a["language"]["kv_heads"]
    assert all(table.get("keep") for table in manifest.recipe if table["name"] == "drop-heads")


def test_heads_under_one_norm_are_refused() -> None:
    """InternViT 6B norms the queries of all heads together: another head would change them."""
    config = tiny_models.make_model("internvl").config
    config.vision_config.use_qk_norm = True
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    why = bound(layers_of(model, "vision"))
    assert (
        why == "layer 0 (`InternVLVisionAttention`) has `q_norm.weight` of [64], which does not go with one head of 32"
    )
    assert bound(layers_of(model, "language")) is None


@pytest.mark.parametrize(
    ("kind", "part", "message"),
    [
        ("gemma4", "vision", "(`Gemma4VisionAttention`) has no linear `q_proj`"),  # clipped ones
        ("kimi_k25", "language", "(`DeepseekV3Attention`) has no linear `q_proj`"),  # latent attention
        ("qwen3_5", "language", "makes 128 numbers in `q_proj` for heads of 64 together"),  # a gate beside the query
        ("exaone4_5", "vision", "makes 128 numbers in `qkv` for heads of 64 together"),  # grouped queries in one matrix
        ("muse_spark", "language", "has `gate_proj.weight` of [64, 64], which does not go with one head of 16"),
    ],
)
def test_other_attention_is_refused(kind: str, part: str, message: str) -> None:
    why = bound(layers_of(tiny_models.make_model(kind), part))
    assert why is not None and message in why


def test_a_part_whose_heads_are_bound_is_refused_in_plan(tiny) -> None:
    a = describe(tiny("llava").model)
    a = replace(a, tower=replace(a.tower, bound="layer 0 (`X`) has `q_norm`"))
    with pytest.raises(PassError, match="no head of the vision part of `llava` can go: layer 0"):
        DropHeads(part="vision", fraction=0.5).plan(a)
    assert DropHeads(part="language", fraction=1 / 3).plan(a).language.kv_heads == (2, 2, 2)
