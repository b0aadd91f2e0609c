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
    """How much attention each patch receives in the last tower block, mean over heads: [images, N].

    With a [CLS] token: its row (FasterVLM, arXiv:2412.01818). Without one: the mean over all rows, the community's
    substitute for SigLIP towers, which needs the full map of that one block.
    """
    attention = state.block.self_attn
    x = state.block.layer_norm1(state.block_input)
    q = attention.q_proj(x)
    k = attention.k_proj(x)
    # q is projected for all rows, as the block does: an int8 linear's scale depends on every row.
    rows = q[:, :1] if state.has_cls else q

    def heads(t: Tensor) -> Tensor:
        return t.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    received = attention_rows(heads(rows), heads(k), attention.scale).mean(dim=1)
    return received[:, 0, 1:] if state.has_cls else received.mean(dim=1)


def cosine_distance(x: Tensor) -> Tensor:
    """1 - cosine of every pair of rows: [images, N, d] -> [images, N, N], float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    unit = wide / wide.norm(dim=-1, keepdim=True).clamp(min=1e-8)
    return 1 - unit @ unit.transpose(-1, -2)
