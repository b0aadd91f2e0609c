"""`Anatomy`: what a vision-language model is made of, as plain numbers.

A reader makes one from a model; `plan` of a pass makes the next one from it by arithmetic alone. `surgery/costs.py`
predicts work and memory from it, so `inspect` can say what a recipe saves without loading a weight.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from ..manifest import Bucket, Layout, Rung

Pinned = tuple[tuple[int, str], ...]  # layers that cannot be dropped, ascending, and why
Slim = tuple[tuple[int, int], ...]  # layers, ascending, and how many heads or neurons of each are used


@dataclass(frozen=True, kw_only=True)
class Tower:
    """The vision tower. `heads` and `intermediate` have one entry per layer, which may differ after a cut."""

    kind: str  # clip_vision_model, siglip_vision_model, …
    hidden: int
    head_dim: int
    heads: tuple[int, ...]  # empty for a tower that is not a stack of transformer layers
    intermediate: tuple[int, ...]  # neurons of the MLP of each layer
    matrices: int  # linears of one MLP: 2, or 3 where it is gated
    others: int  # weights outside the layers: patch embedding, positions, mergers
    windowed: tuple[bool, ...]  # layers whose rows see only their window
    patch_size: int  # pixels, square
    has_cls: bool
    feature_layer: int  # layers that run before the features are taken; later ones are dead weight
    pinned: Pinned = ()
    rigid: str | None = None  # why tokens cannot merge or leave between its blocks
    solid: str | None = None  # why no neuron can leave its MLPs
    bound: str | None = None  # why no head can leave its attention

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
    matrices: int  # linears of one MLP: 3, or 2 where it is not gated; 0 where a layer has not one MLP but experts
    others: tuple[int, ...]  # weights of the products of each layer beside heads and MLP: convolutions, experts
    windows: tuple[int, ...]  # columns that a layer sees at most, itself included; 0 for all
    masked: tuple[bool, ...]  # layers that read a prompt with a mask, not causally: graphs multiply every pair
    vocabulary: int  # rows of the embedding and of the output projection
    tied: bool  # the input embedding is the output projection
    max_positions: int
    pinned: Pinned = ()
    solid: str | None = None  # why no neuron can leave its MLPs
    levels: int = 0  # DeepStack features, added behind the first so many layers
    window: int | None = None  # of its sliding layers, in columns; None if every layer sees all
    stiff: str | None = None  # why visual tokens cannot leave between its layers
    bound: str | None = None  # why no head can leave its attention
    whole: str | None = None  # why no row of its vocabulary can go

    @property
    def layers(self) -> int:
        return len(self.heads)


@dataclass(frozen=True, kw_only=True)
class Idle:
    """Language layers in which visual tokens of a prompt do less work than text."""

    mlp: tuple[int, ...] = ()  # they skip the MLP
    layers: tuple[int, ...] = ()  # they go by, and only give keys and values
    apart: tuple[int, ...] = ()  # they attend to text and themselves, not to each other
    near: tuple[int, ...] = ()  # they attend to text and to those next to them in the raster, on all sides
    window: int = 0  # of `near`: side of the square that they see, in tokens
    heads: Slim = ()  # they use some heads
    neurons: Slim = ()  # they use some neurons of the MLP

    @property
    def origin(self) -> str:
        """The pass behind it, for a hint: the first of a recipe's."""
        return "skip-visual" if self.mlp or self.layers or self.apart or self.near else "slim-visual"

    @property
    def slim(self) -> set[int]:
        """Layers of which they use some heads or neurons."""
        return {layer for layer, _ in (*self.heads, *self.neurons)}


@dataclass(frozen=True, kw_only=True)
class Outside:
    """FLOPs of the vision graph outside the tower's layers for one image, or clip; see `surgery/measure.py`."""

    tower: int  # patch embedding, mergers
    projector: int  # where it runs on the whole image; 0 where it runs token by token on those that are kept
    token: int  # of one token in the latter case, else 0


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
    windows: tuple[tuple[int, ...], ...]  # the same for layers that are windowed
    outside: tuple[Outside, ...]  # for each bucket
    breaks: tuple[int, ...]  # for each bucket, tokens that only say that a row of tiles ends
    scored: tuple[int, ...]  # tower blocks by whose attention tokens can be scored; empty for none
    keep: tuple[int, ...]  # for each bucket, visual tokens that reach the language model
    projected: tuple[
        int, ...
    ]  # for each bucket, rows through a token-by-token projector: kept, or looked at by a method
    method: str | None = None  # how they are chosen; None keeps all
    query_dependent: bool = False  # whether the choice depends on the question: features serve that question alone
    leaving: tuple[tuple[int, ...], ...] = ()  # for each bucket, tokens that leave the tower in each block; or empty
    inside: str | None = None  # how those are chosen that go on inside the language model; None keeps all
    ladder: tuple[Rung, ...] = ()  # at which of its layers how many do
    idle: Idle = Idle()
    carriers: int = 0  # visual tokens of an image through which text sees it; 0: it sees all
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
