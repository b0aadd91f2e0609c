"""Scores of visual tokens: [B, N] float32 or wider, larger is more worth keeping.

Attention scores are recomputed from the block's own q and k, never asked from the model: fused kernels return none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...surgery.selection import Tap, TowerState


def wide(x: Tensor) -> Tensor:
    """In float32, or wider if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def attention_rows(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Attention of the given query rows over all keys, in float32 or wider.

    Args:
        q: [segments, heads, rows, head_dim]. k: [segments, kv_heads, keys, head_dim].

    Returns:
        [segments, heads, rows, keys]; each row sums to 1.
    """
    if q.shape[1] != k.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return torch.softmax(wide(q) @ wide(k).transpose(-1, -2) * scale, dim=-1)


def received(state: TowerState, tap: Tap, everyone: bool = False) -> Tensor:
    """How much attention each visual token receives in a tower block, mean over heads: [1, N].

    With a [CLS] token: its row (FasterVLM, arXiv:2412.01818). Without one, or with `everyone`: the mean over all rows,
    the community's substitute for SigLIP towers, which needs the full map of that one block. Every segment (tile,
    image) is scored by its own attention.
    """
    one = state.has_cls and not everyone
    found = []
    for q, k in tap.rows:
        rows = attention_rows(q[:, :, :1] if one else q, k, tap.scale).mean(dim=1)
        row = rows[:, 0] if one else rows.mean(dim=1)
        found.append((row[:, 1:] if state.has_cls else row).reshape(-1, 1))
    return of_tokens(state, torch.cat(found))[..., 0]


def of_tokens(state: TowerState, patches: Tensor) -> Tensor:
    """Mean over the patches of each token, 0 where it has none: [patches, c] -> [1, N, c]."""
    assert state.members is not None
    members = torch.from_numpy(state.members)
    there = members >= 0
    gathered = patches[members.clamp(min=0)] * there[..., None]
    return (gathered.sum(dim=1) / there.sum(dim=-1).clamp(min=1)[:, None])[None]


def keys(state: TowerState, tap: Tap) -> Tensor:
    """Keys of each visual token in a tower block, mean over heads and patches: [1, N, head_dim]."""
    found = [wide(k).mean(dim=1)[:, int(state.has_cls) :].flatten(0, 1) for _, k in tap.rows]
    return of_tokens(state, torch.cat(found))


def joined(tap: Tap) -> Tap:
    """The same queries and keys as one head of the full width, scaled by its root (LLaVA-PruMerge)."""
    found = []
    for q, k in tap.rows:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1) if q.shape[1] != k.shape[1] else k
        found.append(tuple(x.transpose(1, 2).flatten(2)[:, None] for x in (q, k)))
    return Tap(tap.block, tuple(found), found[0][0].shape[-1] ** -0.5)


def unit(x: Tensor) -> Tensor:
    """Rows of length 1, in float32 or wider; a row of zeros stays."""
    x = wide(x)
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-8)


def cosine_distance(x: Tensor) -> Tensor:
    """1 - cosine of every pair of rows: [B, N, d] -> [B, N, N]."""
    rows = unit(x)
    return 1 - rows @ rows.transpose(-1, -2)


def to_text(tokens: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    """Mean cosine of each token to the real columns of a question: [B, N]; 0 for an empty question.

    Args:
        tokens: [B, N, c]. text: [B, M, c]. mask: 1 on the real columns, 0 on padding, [B, M].
    """
    rows = _real(unit(text), mask).sum(dim=1, keepdim=True)  # cosines are linear in it: one product instead of M
    return (unit(tokens) @ rows.transpose(1, 2))[..., 0] / wide(mask).sum(dim=-1, keepdim=True).clamp(min=1)


def shares(rows: Tensor, tokens: Tensor, tau: float) -> Tensor:
    """How each row spreads over the tokens, softmax of cosine / tau: [B, R, c] and [B, N, c] -> [B, R, N]."""
    return torch.softmax(unit(rows) @ unit(tokens).transpose(1, 2) / tau, dim=-1)


def mean_shares(rows: Tensor, tokens: Tensor, tau: float, mask: Tensor) -> Tensor:
    """`shares` of the real rows, divided by their number; rows of padding are 0.

    Args:
        mask: 1 on the real rows, 0 on padding, [B, R].
    """
    return _real(shares(rows, tokens, tau), mask) / wide(mask).sum(dim=-1).clamp(min=1)[:, None, None]


def _real(rows: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask[..., None] > 0, rows, 0.0)  # a product would keep what padding says, were it infinite


def min_max(score: Tensor) -> Tensor:
    """Moved and scaled to (0, 1]; 1 everywhere where all are equal: [B, N]."""
    low, high = score.amin(dim=-1, keepdim=True), score.amax(dim=-1, keepdim=True)
    return (score - low + 1e-6) / (high - low + 1e-6)


def change(tokens: Tensor, before: Sequence[int]) -> Tensor:
    """1 - cosine of each token to the one at the same place of another frame: [B, F P, d] -> [B, F, P].

    As half a squared distance, which is exactly 0 where nothing moves: rounding must not choose among still tokens.

    Args:
        before: the other frame of each of the F frames.
    """
    rows = unit(tokens).unflatten(1, (len(before), -1))
    return ((rows - rows.index_select(1, torch.tensor(before))) ** 2).sum(dim=-1) / 2


def density_peaks(tokens: Tensor, there: Tensor, neighbours: int) -> Tensor:
    """How much a token is the centre of a cluster: dense, and far from every denser one.

    Density peaks with k nearest neighbours (DPC-KNN), the logarithm of density times distance: density is exp(-mean of
    the squared distances to the `neighbours` nearest, itself one of them), the distance is to the nearest denser token,
    all of them divided by sqrt(d). The densest takes the largest distance of all. Of equally dense ones, and of those
    that only rounding may tell apart, the lower index counts as denser, where the literature adds noise.

    Args:
        tokens: [B, N, d].
        there: bool [B, N], at least `neighbours` of them true; the others count for nobody.

    Returns:
        [B, N]; -inf where not there.
    """
    rows = wide(tokens)
    rows = rows - rows.mean(dim=1, keepdim=True)  # far from the origin, distances would drown in rounding
    length = (rows**2).sum(dim=-1)
    squared = length[:, :, None] + length[:, None] - 2 * rows @ rows.transpose(1, 2)
    index = torch.arange(rows.shape[1])
    squared = torch.where(index[:, None] == index, 0.0, squared.clamp(min=0) / rows.shape[-1])
    near = torch.where(there[:, None], squared, math.inf)
    density = -torch.sort(near, dim=-1, stable=True).values[..., :neighbours].mean(dim=-1)
    far = torch.where(there[:, :, None] & there[:, None], squared, 0.0).amax(dim=(1, 2))[:, None]
    rounding = 1e-5 * far  # of a squared distance, generously; twins must be taken in their order, in every runtime
    ahead = density[:, None] - density[:, :, None]
    earlier, least = index < index[:, None], rounding[..., None]
    denser = there[:, None] & ((ahead > least) | (earlier & (ahead >= -least)))
    peak = torch.minimum(torch.where(denser, squared, math.inf).amin(dim=-1), far)
    peak = torch.maximum(peak, rounding).clamp(min=1e-30)  # below, the logarithm could be anything
    return torch.where(there, 0.5 * peak.log() + density, -math.inf)
