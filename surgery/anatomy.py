"""`Anatomy`: what a vision-language model is made of, as plain numbers.

A reader makes one from a model; `plan` of a pass makes the next one from it by arithmetic alone. Costs are counted
from it too, so `inspect` can predict a recipe without loading a weight.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from ..manifest import Bucket, Layout


@dataclass(frozen=True, kw_only=True)
class Tower:
    """The vision tower. `heads` and `intermediate` have one entry per layer, which may differ after a cut."""

    kind: str  # clip_vision_model, siglip_vision_model, …
    hidden: int
    head_dim: int
    heads: tuple[int, ...]  # empty for a tower that is not a stack of transformer layers
    intermediate: tuple[int, ...]  # neurons of the MLP of each layer
    matrices: int  # linears of one MLP: 2, or 3 where it is gated
    patch_size: int  # pixels, square
    has_cls: bool
    feature_layer: int  # layers that run before the features are taken; later ones are dead weight
    fixed: str | None = None  # why its layers cannot be dropped
    rigid: str | None = None  # why tokens cannot merge or leave between its blocks
    solid: str | None = None  # why no neuron can leave its MLPs

    @property
    def layers(self) -> int:
        return len(self.heads)


@dataclass(frozen=True, kw_only=True)
class Language:
    """The language model. Tuples have one entry per layer; heads are 0 for a layer without attention."""

    kind: str  # llama, qwen2, …
    hidden: int
    head_dim: int
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    intermediate: tuple[int, ...]  # neurons of the MLP of each layer
    vocabulary: int  # rows of the embedding and of the output projection
    tied: bool  # the input embedding is the output projection
    max_positions: int
    solid: str | None = None  # why no neuron can leave its MLPs
    whole: str | None = None  # why no row of its vocabulary can go

    @property
    def layers(self) -> int:
        return len(self.heads)


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """A vision-language model: tower, projector, language model, and the sizes of image it is cut for."""

    family: str
    tower: Tower
    projector: int  # parameters between tower and language model
    language: Language
    layout: Layout
    buckets: tuple[Bucket, ...]
    segments: tuple[tuple[int, ...], ...]  # for each bucket, rows of each tower segment that attends to itself
    breaks: tuple[int, ...]  # for each bucket, tokens that only say that a row of tiles ends
    scored: tuple[int, ...]  # tower blocks by whose attention tokens can be scored; empty for none
    keep: tuple[int, ...]  # for each bucket, visual tokens that reach the language model
    method: str | None = None  # how they are chosen; None keeps all
    query_dependent: bool = False  # whether the choice depends on the question: features serve that question alone
    leaving: tuple[tuple[int, ...], ...] = ()  # for each bucket, tokens that leave the tower in each block; or empty
    quantized: tuple[str, ...] = ()  # parts whose linears are int8: vision, language

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of an image before any pruning, in the smallest bucket."""
        return self.smallest.tokens

    @property
    def smallest(self) -> Bucket:
        """The bucket with the fewest visual tokens."""
        return min(self.buckets, key=lambda bucket: bucket.tokens)

    def to_json(self) -> dict[str, Any]:
        """As JSON knows it: lists, no tuples."""
        return json.loads(json.dumps(asdict(self)))


@dataclass(frozen=True)
class Cost:
    """Work and memory of one part. FLOPs count a multiply-add as two; parameters are elements."""

    part: str
    flops: int
    parameters: int


def costs(a: Anatomy, *, images: int = 1, text_tokens: int = 32, bucket: int = 0) -> list[Cost]:
    """Where the work of a first token goes, for a prompt of `images` images and `text_tokens` tokens.

    Counts matrix products only (linears and attention); norms, activations, convolutions and softmax are left out.
    """
    t, lm = a.tower, a.language
    segments = a.segments[bucket]
    rows = sum(segments)
    tower_flops = tower_parameters = left = 0
    leaving = a.leaving[bucket] if a.leaving else (0,) * t.layers
    for heads, neurons, leave in zip(t.heads[: t.feature_layer], t.intermediate, leaving, strict=False):
        width = heads * t.head_dim
        attention, mlp = 4 * t.hidden * width, t.matrices * t.hidden * neurons
        tower_parameters += attention + mlp
        # Tokens leave one segment only, between attention and MLP; what says which is not counted.
        tower_flops += 2 * (rows - left) * attention + 4 * sum((n - left) ** 2 for n in segments) * width
        left += leave
        tower_flops += 2 * (rows - left) * mlp
    patch = 3 * t.patch_size**2 * t.hidden
    tower_flops += 2 * (rows - t.has_cls * len(segments)) * patch
    tower_parameters += patch
    sequence = images * a.keep[bucket] + text_tokens
    lm_flops = lm_parameters = 0
    for heads, kv_heads, neurons in zip(lm.heads, lm.kv_heads, lm.intermediate, strict=True):
        linears = lm.hidden * lm.head_dim * (2 * heads + 2 * kv_heads) + 3 * lm.hidden * neurons
        lm_parameters += linears
        lm_flops += 2 * sequence * linears + 2 * sequence * sequence * heads * lm.head_dim  # causal: half the square
    vocabulary = lm.hidden * lm.vocabulary
    return [
        Cost("vision tower", images * tower_flops, tower_parameters),
        Cost("projector", 2 * images * a.keep[bucket] * a.projector, a.projector),
        Cost("language model", lm_flops, lm_parameters),
        Cost("embedding and lm_head", 2 * vocabulary, vocabulary * (1 if lm.tied else 2)),
    ]


def kv_bytes(a: Anatomy, tokens: int, element_bytes: int = 4) -> int:
    """Bytes of the KV cache for `tokens` rows."""
    return sum(2 * tokens * kv * a.language.head_dim * element_bytes for kv in a.language.kv_heads)
