"""Mergers: what the tokens that go on are made of, as weights of all tokens, [B, T, N] float32 or wider.

A merge is one product with such a matrix, so that every shape is constant and nothing is scattered and added.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...surgery.picking import topk
from ...surgery.selection import Choice
from .scores import unit
from .select import mark


def one_hot(positions: Tensor, count: int) -> Tensor:
    """Each token as it is: int64 [B, T] -> [B, T, count]."""
    return (positions[..., None] == torch.arange(count)).to(torch.float32)


def in_order(places: Tensor, mix: Tensor) -> Choice:
    """Tokens in the order of the places that they take, int64 [B, T]."""
    kept, order = torch.sort(places, dim=1)
    return Choice(kept, mix.gather(1, order[..., None].expand(-1, -1, mix.shape[-1])))


def assign(centres: Tensor, members: Tensor, metric: Tensor, variant: str = "clean") -> Tensor:
    """Every member joins the centre that it is most like by cosine; of equals the first.

    Args:
        centres: int64 [B, C].
        members: those that join, no centre among them, bool [B, N].
        metric: what is compared, [B, N, c].
        variant: `clean` is the mean of a centre and those that join it; `code` adds the mean of those that join to the
            centre, as VisionZip's code does, so that a centre of many likes comes out twice as long.
    """
    rows = unit(metric)
    own = one_hot(centres, rows.shape[1]).to(rows.dtype)
    nearest = ((own @ rows) @ rows.transpose(-1, -2)).argmax(dim=1)  # [B, N]
    joins = (nearest[:, None] == torch.arange(centres.shape[1])[:, None]) & members[:, None]
    joined = joins.to(rows.dtype)
    count = joined.sum(dim=-1, keepdim=True)
    if variant == "code":
        return own + joined / count.clamp(min=1)
    return (own + joined) / (1 + count)


def absorb(kept: Tensor, metric: Tensor, weight: Tensor, neighbours: int) -> Tensor:
    """Each kept token plus those most like it by cosine, times their weights: x_i + sum of a_j x_j.

    Args:
        kept: int64 [B, T].
        metric: what is compared, [B, N, c].
        weight: a, [B, N].
        neighbours: so many for each, among all other tokens, kept or not; less than N.
    """
    rows = unit(metric)
    own = one_hot(kept, rows.shape[1]).to(rows.dtype)
    like = (own @ rows) @ rows.transpose(-1, -2)
    like = torch.where(own > 0, -math.inf, like).flatten(0, 1)
    near = mark(topk(like, neighbours), rows.shape[1]).unflatten(0, kept.shape)
    return own + torch.where(near, weight[:, None], 0.0)


def residual(kept: Tensor, weight: Tensor) -> Tensor:
    """One token of all that were not kept, times their weights: [B, T] and [B, N] -> [B, 1, N]."""
    return torch.where(mark(kept, weight.shape[1]), 0.0, weight)[:, None]


def groups(kept: Tensor, group: Tensor, merged: Tensor) -> Tensor:
    """The mean of its group where that is merged, the token as it is elsewhere.

    Args:
        kept: int64 [B, T], one token of each merged group.
        group: of each token, int64 [N].
        merged: bool [B, N], the same throughout a group.
    """
    same = (group[kept][..., None] == group).to(torch.float32)
    mean = same / same.sum(dim=-1, keepdim=True)
    return torch.where(merged.gather(1, kept)[..., None], mean, one_hot(kept, group.shape[0]))
