"""Scores of visual tokens: [images, N] float32, larger is more worth keeping.

Attention scores are recomputed from the block's own q and k, never asked from the model: fused kernels return none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...surgery.selection import TowerState


def attention_rows(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Attention of the given query rows over all keys, in float32 or wider.

    Args:
        q: [images, heads, rows, head_dim]. k: [images, heads, keys, head_dim].

    Returns:
        [images, heads, rows, keys]; each row sums to 1.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    return torch.softmax(q.to(wide) @ k.to(wide).transpose(-1, -2) * scale, dim=-1)


def attention_received(state: TowerState) -> Tensor:
    """How much attention each visual token receives in the scored tower block, mean over heads: [1, N].

    With a [CLS] token: its row (FasterVLM, arXiv:2412.01818). Without one: the mean over all rows, the community's
    substitute for SigLIP towers, which needs the full map of that one block. A token made of several patches has their
    mean. Every segment (tile, image) is scored by its own attention.
    """
    assert state.attention and state.members is not None
    patches = torch.cat([_received(q, k, state.scale, state.has_cls) for q, k in state.attention])
    there = state.members >= 0
    gathered = patches[state.members.clamp(min=0)] * there
    return (gathered.sum(dim=-1) / there.sum(dim=-1).clamp(min=1))[None]


def _received(q: Tensor, k: Tensor, scale: float, has_cls: bool) -> Tensor:
    """Of segments of one length, [segments, heads, rows, head_dim] twice -> [segments * rows], without [CLS]."""
    if q.shape[1] != k.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    received = attention_rows(q[:, :, :1] if has_cls else q, k, scale).mean(dim=1)
    return (received[:, 0, 1:] if has_cls else received.mean(dim=1)).reshape(-1)


def cosine_distance(x: Tensor) -> Tensor:
    """1 - cosine of every pair of rows: [images, N, d] -> [images, N, N], float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    unit = wide / wide.norm(dim=-1, keepdim=True).clamp(min=1e-8)
    return 1 - unit @ unit.transpose(-1, -2)
