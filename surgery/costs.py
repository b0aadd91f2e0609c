"""Work and memory predicted from an `Anatomy` alone, by the rules by which `exporters/flops.py` counts them in a graph.

A multiply-add is two FLOPs; products alone count (linears, convolutions, attention). What chooses tokens is left out
(docs/selection-cost.md), and of weights norms, biases and the constants of a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..manifest import TokenBudget, visual_hidden, visual_left
from .anatomy import Anatomy, Idle


@dataclass(frozen=True)
class Cost:
    """Work and memory of one part. FLOPs count a multiply-add as two; parameters are elements."""

    part: str
    flops: int
    parameters: int


@dataclass(frozen=True)
class Work:
    """What one call of a graph does."""

    flops: int  # a multiply-add is two
    weight_bytes: int  # read; of a table that is only gathered from, the rows that are taken
    state_bytes: int  # of the KV cache and other states that it takes


def rows(a: Anatomy, tokens: int, counts: Sequence[int]) -> tuple[int, ...]:
    """Rows in each language layer when `tokens` columns enter the first, `counts` of each image among them."""
    return tuple(tokens - visual_left(a.ladder, counts, layer) for layer in range(a.language.layers))


def cached(a: Anatomy, budget: TokenBudget) -> tuple[int, ...]:
    """Rows that each language layer caches at a full budget."""
    counts = _counts(budget)
    return rows(a, budget.positions - visual_hidden(a.carriers, counts), counts)


def pairs(count: int, seen: int, window: int = 0) -> int:
    """Pairs of the last `count` of `seen` rows with themselves and those before, at most `window` a row (0: all)."""
    first = seen - count + 1  # what the first of them sees
    whole = count * (first + seen) // 2
    if not window or window >= seen:
        return whole
    short = max(0, window - first)  # rows that see less than the window
    return short * (first + first + short - 1) // 2 + (count - short) * window


def costs(a: Anatomy, *, images: int = 1, text_tokens: int = 32, bucket: int = 0) -> list[Cost]:
    """Where the work of a first token goes, for a prompt of `images` images and `text_tokens` tokens, causal graphs."""
    outside = a.outside[bucket]
    tower = images * (_tower(a, bucket) + outside.tower)
    projector = images * (outside.projector + outside.token * a.projected[bucket])
    budget = TokenBudget(images=images, visual_tokens=a.keep[bucket], text_tokens=text_tokens, new_tokens=0)
    head = a.language.hidden * a.language.vocabulary
    return [
        Cost("vision tower", tower, _tower_weights(a) + a.tower.others),
        Cost("projector", projector, a.projector),
        Cost("language model", _language(a, budget, prefill=True, causal=True), sum(_layer_weights(a))),
        Cost("embedding and lm_head", 2 * head, head * (1 if a.language.tied else 2)),
    ]


def predict(
    a: Anatomy, budget: TokenBudget, role: str, bucket: int = 0, *, causal: bool = True, element_bytes: int = 4
) -> Work:
    """One call of a graph: vision sees one image (or clip), prefill a whole prompt, decode the last token of a budget.

    Args:
        role: vision, prefill or decode.
        bucket: of the vision graph.
        causal: whether the target's attention is causal by itself; else its graphs multiply every pair of a prompt.
        element_bytes: of a float of the graphs.
    """
    if role == "vision":
        outside = a.outside[bucket]
        flops = _tower(a, bucket) + outside.tower + outside.projector + outside.token * a.projected[bucket]
        weights = (_tower_weights(a) + a.projector) * _bytes(a, "vision", element_bytes)
        return Work(flops, weights + a.tower.others * element_bytes, 0)
    columns = budget.sequence if role == "prefill" else 1
    lm, each = a.language, _bytes(a, "language", element_bytes)
    head = lm.hidden * lm.vocabulary
    taken = 0 if lm.tied else min(head, columns * lm.hidden)  # rows of the input table
    read = sum(_layer_weights(a)) + (_slim_weights(a) if role == "prefill" else 0)
    return Work(
        _language(a, budget, role == "prefill", causal) + 2 * head,
        (read + head) * each + taken * element_bytes,
        kv_bytes(a, budget, element_bytes),
    )


def kv_bytes(a: Anatomy, budget: TokenBudget, element_bytes: int = 4) -> int:
    """Bytes of the KV cache; what short convolutions remember is left out."""
    kept = zip(cached(a, budget), a.language.kv_heads, strict=True)
    return sum(2 * n * kv * a.language.head_dim * element_bytes for n, kv in kept)


def _counts(budget: TokenBudget) -> tuple[int, ...]:
    return (budget.visual_tokens,) * budget.images


def _bytes(a: Anatomy, part: str, element_bytes: int) -> int:
    """Of a weight of a part's linears."""
    return 1 if part in a.quantized else element_bytes


def _tower(a: Anatomy, bucket: int) -> int:
    """FLOPs of the tower's layers for one image, or clip."""
    t, segments = a.tower, a.segments[bucket]
    count, flops, left = sum(segments), 0, 0
    leaving = a.leaving[bucket] if a.leaving else (0,) * t.layers
    layers = zip(t.heads[: t.feature_layer], t.intermediate, t.windowed, leaving, strict=False)
    for heads, neurons, windowed, leave in layers:
        width = heads * t.head_dim
        seen = a.windows[bucket] if windowed else segments
        # Tokens leave one segment only, between attention and MLP.
        flops += 2 * (count - left) * 4 * t.hidden * width + 4 * sum((n - left) ** 2 for n in seen) * width
        left += leave
        flops += 2 * (count - left) * t.matrices * t.hidden * neurons
    return flops


def _tower_weights(a: Anatomy) -> int:
    """Weights of the tower's layers that run."""
    t = a.tower
    layers = zip(t.heads[: t.feature_layer], t.intermediate, strict=False)
    return sum(t.hidden * (4 * heads * t.head_dim + t.matrices * neurons) for heads, neurons in layers)


def _layer_weights(a: Anatomy) -> list[int]:
    """Weights of the products of each language layer."""
    return [keys + queries + mlp for keys, queries, mlp in _products(a)]


def _slim_weights(a: Anatomy) -> int:
    """Weights of the heads and neurons that visual columns use where they use some: read beside the whole ones."""
    lm = a.language
    heads = sum(2 * lm.hidden * lm.head_dim * kept for _, kept in a.idle.heads)
    return heads + sum(lm.matrices * lm.hidden * kept for _, kept in a.idle.neurons)


def _products(a: Anatomy) -> list[tuple[int, int, int]]:
    """Weights of each language layer: keys and values, queries and output, and the rest."""
    lm = a.language
    layers = zip(lm.heads, lm.kv_heads, lm.intermediate, lm.others, strict=True)
    head = 2 * lm.hidden * lm.head_dim
    return [
        (head * kv_heads, head * heads, lm.hidden * lm.matrices * neurons + others)
        for heads, kv_heads, neurons, others in layers
    ]


def _language(a: Anatomy, budget: TokenBudget, prefill: bool, causal: bool) -> int:
    """FLOPs of the language model's layers for a whole prompt, or for the last token of a budget."""
    lm, flops, counts = a.language, 0, _counts(budget)
    columns = rows(a, budget.sequence, counts) if prefill else (1,) * lm.layers
    remembered = columns if prefill else cached(a, budget)
    idle = a.idle if prefill else Idle()
    asks, works = dict(idle.heads), dict(idle.neurons)
    layers = zip(columns, remembered, _products(a), lm.heads, lm.windows, lm.masked, strict=True)
    for layer, (count, seen, (keys, queries, mlp), heads, window, masked) in enumerate(layers):
        text = budget.text_tokens
        asking = text if layer in idle.layers else count
        working = text if layer in (*idle.mlp, *idle.layers) else count
        # A mask is for the columns of a prompt; one column sees all rows of its cache, or its window.
        every = (count > 1 and masked) or not causal
        multiplied = count * seen if every else pairs(count, seen, window)
        if layer in idle.layers:  # text alone asks
            multiplied = text * seen
        elif layer in (*idle.apart, *idle.near):  # and visual tokens ask text, and their neighbours
            beside = idle.window**2 if layer in idle.near else 0
            multiplied = text * seen + (count - text) * (text + beside)
        elif prefill and a.carriers:  # text and carriers ask each other, visual tokens what they asked before
            few = count - visual_hidden(a.carriers, counts)
            multiplied = few * few + sum(counts) * count if every else pairs(few, few) + multiplied
        met = multiplied * heads  # by the heads together
        visual, less = count - text, 0  # weights that visual tokens do not use
        if layer in asks:
            met = text * seen * heads + visual * seen * asks[layer]
            less += 2 * lm.hidden * lm.head_dim * (heads - asks[layer])
        if layer in works:
            less += lm.matrices * lm.hidden * (lm.intermediate[layer] - works[layer])
        flops += 2 * (count * keys + asking * queries + working * mlp - visual * less) + 4 * met * lm.head_dim
    return flops
