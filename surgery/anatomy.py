"""`Anatomy`: what a vision-language model is made of, as plain numbers.

A reader makes one from a model; `plan` of a pass makes the next one from it by arithmetic alone. Costs are counted
from it too, so `inspect` can predict a recipe without loading a weight.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Tower:
    """The vision tower. `heads` has one entry per layer; heads may differ between layers after a cut."""

    kind: str  # clip_vision_model, siglip_vision_model
    hidden: int
    head_dim: int
    heads: tuple[int, ...]
    intermediate: int
    image_size: int  # pixels, square
    patch_size: int  # pixels, square
    has_cls: bool
    feature_layer: int  # layers that run before the features are taken; later ones are dead weight

    @property
    def layers(self) -> int:
        return len(self.heads)

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        return self.grid**2

    @property
    def tokens(self) -> int:
        """Rows that the tower computes with: patches and [CLS]."""
        return self.patches + self.has_cls


@dataclass(frozen=True, kw_only=True)
class Language:
    """The language model. `heads` and `kv_heads` have one entry per layer."""

    kind: str  # llama, qwen2
    hidden: int
    head_dim: int
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    intermediate: int
    vocabulary: int
    tied: bool  # the input embedding is the output projection
    max_positions: int

    @property
    def layers(self) -> int:
        return len(self.heads)


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """A vision-language model of the LLaVA layout: tower, per-token projector, language model."""

    family: str
    tower: Tower
    language: Language
    image_token_id: int
    keep: int  # visual tokens per image that reach the language model
    method: str | None = None  # how they are chosen; None keeps all
    quantized: tuple[str, ...] = ()  # parts whose linears are int8: vision, language

    @property
    def visual_tokens(self) -> int:
        """Visual tokens per image before any pruning."""
        return self.tower.patches

    def to_json(self) -> dict[str, Any]:
        """As JSON knows it: lists, no tuples."""
        return asdict(self, dict_factory=lambda items: {k: list(v) if isinstance(v, tuple) else v for k, v in items})


@dataclass(frozen=True)
class Cost:
    """Work and memory of one part. FLOPs count a multiply-add as two; parameters are elements."""

    part: str
    flops: int
    parameters: int


def costs(a: Anatomy, *, images: int = 1, text_tokens: int = 32) -> list[Cost]:
    """Where the work of a first token goes, for a prompt of `images` images and `text_tokens` tokens.

    Counts matrix products only (linears and attention); norms, activations and softmax are left out.
    """
    t, lm = a.tower, a.language
    rows = t.tokens
    tower_flops = tower_parameters = 0
    for heads in t.heads[: t.feature_layer]:
        width = heads * t.head_dim
        linears = 4 * t.hidden * width + 2 * t.hidden * t.intermediate
        tower_parameters += linears
        tower_flops += 2 * rows * linears + 4 * rows * rows * width
    patch = 3 * t.patch_size**2 * t.hidden
    tower_flops += 2 * t.patches * patch
    tower_parameters += patch
    projector = t.hidden * lm.hidden + lm.hidden**2
    sequence = images * a.keep + text_tokens
    lm_flops = lm_parameters = 0
    for heads, kv_heads in zip(lm.heads, lm.kv_heads, strict=True):
        linears = lm.hidden * lm.head_dim * (2 * heads + 2 * kv_heads) + 3 * lm.hidden * lm.intermediate
        lm_parameters += linears
        lm_flops += 2 * sequence * linears + 2 * sequence * sequence * heads * lm.head_dim  # causal: half the square
    vocabulary = lm.hidden * lm.vocabulary
    return [
        Cost("vision tower", images * tower_flops, tower_parameters),
        Cost("projector", 2 * images * a.keep * projector, projector),
        Cost("language model", lm_flops, lm_parameters),
        Cost("embedding and lm_head", 2 * vocabulary, vocabulary * (1 if lm.tied else 2)),
    ]


def kv_bytes(a: Anatomy, tokens: int, element_bytes: int = 4) -> int:
    """Bytes of the KV cache for `tokens` rows."""
    return sum(2 * tokens * kv * a.language.head_dim * element_bytes for kv in a.language.kv_heads)
