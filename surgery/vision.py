"""One image through the tower, the projector and the selection: the same code in eager and under the exporter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .families.base import Encoded, Family
from .selection import TowerState, attached

_TAP = "vlmcut_tap"


@dataclass(frozen=True)
class Seen:
    """What one image became."""

    features: Tensor  # [K, hidden]
    kept: Tensor  # int64 [K], ascending
    levels: tuple[Tensor, ...] = ()  # DeepStack: added behind language layer 0, 1, …; [K, hidden] each


@dataclass
class _Tap:
    rows: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # q and k of each call
    scale: float = 1.0


@contextmanager
def _tapping(attention: Any) -> Iterator[_Tap]:
    """While inside, keep the q and k of this tower attention: they are what its scores are made of.

    They are taken where the block hands them to its attention function, so norms, rotary embeddings and a fused qkv
    need no code of ours, and nothing is computed twice.
    """
    tap = _Tap()
    if attention is None:
        yield tap
        return
    config = attention.config
    before = config._attn_implementation
    inner = ALL_ATTENTION_FUNCTIONS[before]

    def function(module: Any, q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Any:
        if module is attention:
            tap.rows.append((q, k))
            tap.scale = kwargs.get("scaling") or q.shape[-1] ** -0.5
        return inner(module, q, k, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS[_TAP] = function
    # Without one of its name a mask is dropped silently. transformers asks the global table: only `register` fills it.
    masks = ALL_MASK_ATTENTION_FUNCTIONS._global_mapping
    if before in masks:
        ALL_MASK_ATTENTION_FUNCTIONS.register(_TAP, ALL_MASK_ATTENTION_FUNCTIONS[before])
    # `_attn_implementation` would set the masks of all parts of a composite config too.
    config._attn_implementation_internal = _TAP
    try:
        yield tap
    finally:
        config._attn_implementation_internal = before
        del ALL_ATTENTION_FUNCTIONS[_TAP]
        masks.pop(_TAP, None)


@dataclass(frozen=True)
class Prepared:
    """What depends on the geometry alone; a trace gets it, and must not make it."""

    geometry: Mapping[str, tuple[int, ...]]
    constants: Mapping[str, Any]
    members: Tensor | None


def prepare(model: Any, geometry: Mapping[str, tuple[int, ...]]) -> Prepared:
    """Everything about an image of this geometry that needs no pixel."""
    family: Family = attached(model).family
    members = family.members(model.config, geometry)
    return Prepared(geometry, family.constants(model, geometry), None if members is None else torch.from_numpy(members))


def look(model: Any, pixel_values: Tensor, prepared: Prepared) -> tuple[Encoded, TowerState]:
    """Encode one image, whole, and gather what a selector may look at.

    Args:
        pixel_values: as the family's processor gives it for one image, in the model's dtype.
    """
    family: Family = attached(model).family
    attention = family.scored_attention(model) if attached(model).selection else None
    with _tapping(attention) as tap:
        encoded = family.encode(model, pixel_values, prepared.geometry, prepared.constants)
    state = TowerState(
        tokens=encoded.tokens[None],
        project=encoded.project or (lambda x: x),
        attention=tuple(tap.rows),
        scale=tap.scale,
        has_cls=family.has_cls(model.config),
        members=prepared.members,
    )
    return encoded, state


def see(model: Any, pixel_values: Tensor, prepared: Prepared, keep: int) -> Seen:
    """Encode one image and keep `keep` of its tokens, a Python int."""
    encoded, state = look(model, pixel_values, prepared)
    tokens, levels = encoded.tokens, encoded.levels
    kept = torch.arange(tokens.shape[0])
    selection = attached(model).selection
    if selection is not None:
        kept = selection.choose(state, keep, attached(model).line_breaks(prepared.geometry))[0]
        tokens = tokens.index_select(0, kept)
        levels = tuple(level.index_select(0, kept) for level in levels)
    features = tokens if encoded.project is None else encoded.project(tokens[None])[0]
    return Seen(features, kept, levels)
