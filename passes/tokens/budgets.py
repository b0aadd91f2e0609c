"""Budgets of units (tiles, frames, segments): how many tokens each may keep, as data decide, of a constant sum."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...surgery.selection import TowerState
from .scores import wide
from .select import ascending


def proportional(weights: Tensor, total: int, caps: np.ndarray) -> Tensor:
    """Whole shares of `total` in proportion to the weights, by largest remainder; int64 [B, G].

    A unit gets its cap at most, and what is above goes to the others in proportion. Equal remainders go to the lower
    index first. Units without weight get what all others cannot take.

    Args:
        weights: not negative, [B, G].
        caps: tokens of each unit, int64 [G], `total` or more together.

    Returns:
        Counts whose sum is `total`.
    """
    assert 0 <= total <= caps.sum()
    weights = wide(weights)
    weights = torch.maximum(weights, weights.amax(dim=-1, keepdim=True) * 1e-6).clamp(min=1e-30)
    most = torch.from_numpy(caps).to(weights.dtype)
    # Shares are min(cap, level * weight) with one level for all. At the level where unit g is full, [B, g, units]:
    full = most / weights
    filled = torch.minimum(most, full[..., None] * weights[:, None]).sum(dim=-1)
    capped = filled <= total
    rest = total - torch.where(capped, most, 0.0).sum(dim=-1, keepdim=True)
    level = rest / torch.where(capped, 0.0, weights).sum(dim=-1, keepdim=True).clamp(min=1e-30)
    share = torch.where(capped, most, torch.minimum(most, level * weights))
    whole = share.floor()
    left = total - whole.sum(dim=-1, keepdim=True)
    return (whole + (_rank(torch.where(whole < most, share - whole, -1.0)) < left)).to(torch.int64)


def quota_select(state: TowerState, score: Tensor, units: np.ndarray, counts: Tensor, keep: int) -> Tensor:
    """The best of each unit, as many as `counts` says: int64 [1, keep], ascending.

    Args:
        score: [1, N]. units: see `quota_key`.
        counts: int64 [1, G], of sum `keep`.
    """
    return ascending(state.top(quota_key(score, units, counts), keep))


def quota_key(score: Tensor, units: np.ndarray, counts: Tensor) -> Tensor:
    """A score whose largest are the best of each unit, as many as `counts` says: [B, N].

    It is the distance to the middle between the last that its unit keeps and the first that it drops: a near tie in a
    unit stays a near tie, and a count that is one off costs no more than the step between two tokens.

    Args:
        units: the unit of each token, int64 [N], 0 to G - 1, none without tokens.
        counts: int64 [B, G], each at most the tokens of its unit.
    """
    sizes = np.bincount(units)
    order = np.argsort(units, kind="stable")
    column = np.empty_like(order)  # of each token in the row of its unit
    column[order] = np.concatenate([np.arange(size) for size in sizes])
    table = np.zeros((len(sizes), sizes.max()), dtype=np.int64)
    table[units, column] = np.arange(len(units))
    there = torch.from_numpy(np.arange(sizes.max()) < sizes[:, None])
    rows = torch.where(there, score[:, torch.from_numpy(table.reshape(-1))].unflatten(-1, table.shape), -torch.inf)
    best, at = torch.sort(rows, dim=-1, descending=True, stable=True)
    rank = torch.sort(at, dim=-1, stable=True).indices
    ends = torch.stack([(counts - 1).clamp(min=0), torch.minimum(counts, torch.from_numpy(sizes - 1))], dim=-1)
    middle = best.gather(-1, ends).mean(dim=-1, keepdim=True)
    # Exact ties at the cut are on neither side of the middle: lower index first decides.
    step = ((score.amax(dim=-1) - score.amin(dim=-1)) * 1e-6).clamp(min=1e-30)[:, None, None]
    key = rows - middle + torch.where(rank < counts[..., None], step, -step)
    return key.flatten(1)[:, torch.from_numpy(units * table.shape[1] + column)]


def _rank(score: Tensor) -> Tensor:
    """How many are before each, the largest first, equal ones lower index first: [B, G] -> int64 [B, G]."""
    index = torch.arange(score.shape[-1])
    one, other = score[..., None], score[:, None]
    return ((other > one) | ((other == one) & (index < index[:, None]))).sum(dim=-1)
