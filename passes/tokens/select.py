"""Selectors: from scores or distances to `keep` ascending positions, int64 [images, keep].

`keep` is a Python int, so every shape in the exported graph is constant. Equal values go to the lower index, in
PyTorch and in ONNX alike. Each selector has a `*_regret`: by how much a given choice falls short of its own, in units
of the score; it judges a runtime's choice when rounding alone could have changed it.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def topk_select(score: Tensor, keep: int) -> Tensor:
    """The `keep` largest scores: [images, N] -> ascending positions [images, keep]."""
    order = torch.sort(score, dim=-1, descending=True, stable=True).indices
    return torch.sort(order[:, :keep], dim=-1).values


def topk_regret(score: Tensor, kept: Tensor) -> Tensor:
    """Best dropped score minus worst kept one, at least 0: scalar."""
    chosen = torch.zeros_like(score, dtype=torch.bool).scatter(1, kept, True)
    worst_kept = score.masked_fill(~chosen, math.inf).amin(dim=-1)
    best_dropped = score.masked_fill(chosen, -math.inf).amax(dim=-1)
    return (best_dropped - worst_kept).clamp(min=0).amax()


def max_min_select(distance: Tensor, keep: int) -> Tensor:
    """Farthest-point greedy: each step takes the token farthest from its nearest taken one.

    The first is the token whose nearest other is farthest away. Unrolled: `keep` steps of five small operators.

    Args:
        distance: symmetric, [images, N, N].

    Source: DivPrune, arXiv:2503.02175, algorithm 1. We differ: taken tokens are masked out instead of relying on a
    distance of 0, so duplicates cannot be taken twice.
    """
    n = distance.shape[-1]
    position = torch.arange(n, device=distance.device)
    far = torch.where(position[:, None] == position, math.inf, distance).amin(dim=-1)
    taken = [far.argmax(dim=-1, keepdim=True)]
    gain = torch.full_like(far, math.inf)
    for _ in range(keep - 1):
        last = taken[-1]
        row = distance.gather(1, last.unsqueeze(-1).expand(-1, 1, n)).squeeze(1)
        gain = torch.where(position == last, -math.inf, torch.minimum(gain, row))
        taken.append(gain.argmax(dim=-1, keepdim=True))
    return torch.sort(torch.cat(taken, dim=-1), dim=-1).values


def max_min_regret(distance: Tensor, kept: Tensor) -> Tensor:
    """Worst shortfall of a greedy run confined to `kept` against a free choice at each of its steps: scalar."""
    n = distance.shape[-1]
    position = torch.arange(n, device=distance.device)
    allowed = torch.zeros(distance.shape[:2], dtype=torch.bool).scatter(1, kept, True)
    gain = torch.where(position[:, None] == position, math.inf, distance).amin(dim=-1)
    worst = torch.zeros(distance.shape[0], dtype=distance.dtype)
    row_gain = torch.full_like(gain, math.inf)
    for _ in range(kept.shape[1]):
        best = gain.masked_fill(~allowed, -math.inf)
        chosen = best.argmax(dim=-1, keepdim=True)
        worst = torch.maximum(worst, gain.amax(dim=-1) - best.amax(dim=-1))
        row = distance.gather(1, chosen.unsqueeze(-1).expand(-1, 1, n)).squeeze(1)
        row_gain = torch.where(position == chosen, -math.inf, torch.minimum(row_gain, row))
        allowed = allowed & (position != chosen)
        gain = row_gain
    return worst.amax()


def random_positions(n: int, keep: int, seed: int) -> list[int]:
    """`keep` of `n` positions, the first of a seeded permutation, ascending; nested over `keep` for one seed."""
    # NumPy, so that a trace sees numbers; the stream of a bit generator is the same in every version.
    order = np.argsort(np.random.PCG64(seed).random_raw(n), kind="stable")
    return sorted(order[:keep].tolist())


def uniform_positions(n: int, keep: int) -> list[int]:
    """Evenly spaced positions, floor((i + 0.5) n / keep): every part of the picture, seen as one raster line."""
    return [int((i + 0.5) * n / keep) for i in range(keep)]


def same_for_all(positions: list[int], kept: Tensor) -> Tensor:
    """0 if every image kept exactly `positions`, infinite otherwise: a constant choice has no near ties."""
    want = torch.tensor(positions, device=kept.device)
    return torch.tensor(0.0 if bool((kept == want).all()) else math.inf, dtype=torch.float64)
