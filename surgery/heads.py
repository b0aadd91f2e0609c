"""Whether the heads of an attention are separate: one can leave without another noticing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from .structure import find_attention, head_dim, output_name


def bound(blocks: Sequence[nn.Module]) -> str | None:
    """Why no head can leave the attention of these blocks; None if any can. Works on the meta device."""
    for index, block in enumerate(blocks):
        attention = find_attention(block)
        why = None if attention is None else _bound(attention)
        if why is not None:
            return f"layer {index} (`{type(attention).__name__}`) {why}"
    return None


def _bound(attention: Any) -> str | None:
    inner = ("qkv",) if hasattr(attention, "qkv") else ("q_proj", "k_proj", "v_proj")
    names = (*inner, output_name(attention))
    for name in names:
        if not hasattr(getattr(attention, name, None), "in_features"):
            return f"has no linear `{name}`"
    rows = [getattr(attention, name).out_features for name in inner]
    width = getattr(attention, names[-1]).in_features
    if rows[0] != width * (3 if len(inner) == 1 else 1):
        return f"makes {rows[0]} numbers in `{inner[0]}` for heads of {width} together"
    if len(set(rows[1:])) > 1:
        return f"makes {rows[1]} keys and {rows[2]} values"
    for key, tensor in attention.state_dict().items():
        if key.partition(".")[0] in names or tensor.numel() == 1:
            continue
        if tensor.shape[-1] != head_dim(attention):  # a norm of all heads together, a number for each head
            return f"has `{key}` of {list(tensor.shape)}, which does not go with one head of {head_dim(attention)}"
    return None
