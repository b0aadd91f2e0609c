"""How positions are picked by score, and how somebody else's pick is judged.

A selector asks its state to pick (`TowerState.top`), so that one rule finds what a method keeps and the same rule,
confined to what a runtime kept, finds by how much that falls short: no method brings code of its own to judge it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


def topk(score: Tensor, count: int) -> Tensor:
    """The `count` largest, best first; equal values lower index first, in PyTorch and in ONNX: [B, N] -> [B, count]."""
    if count == 1:
        return score.argmax(dim=-1, keepdim=True)
    return torch.sort(score, dim=-1, descending=True, stable=True).indices[:, :count]


class Picker:
    """Picks the best."""

    def top(self, score: Tensor, count: int) -> Tensor:
        """Positions of the `count` largest scores, int64 [B, count], best first."""
        return topk(score, count)

    def only(self, positions: Tensor) -> Picker:
        """The same among these positions, int64 [n], counted from 0."""
        return self


@dataclass(frozen=True)
class Call:
    """One pick: the scores it saw, what it took, and by how much that fell short of the best."""

    score: Tensor
    chosen: Tensor
    shortfall: float


@dataclass
class Judge(Picker):
    """Picks the best among given positions, and writes down what the others would have been worth."""

    allowed: Tensor  # bool [1, N]
    calls: list[Call] = field(default_factory=list)

    def top(self, score: Tensor, count: int) -> Tensor:
        chosen = topk(score.masked_fill(~self.allowed, -math.inf), count)
        taken = torch.zeros_like(self.allowed).scatter(1, chosen, True)
        worst = float(score.masked_fill(~taken, math.inf).amin())
        best = float(score.masked_fill(taken, -math.inf).amax())
        shortfall = 0.0 if best == -math.inf or best <= worst else best - worst
        self.calls.append(Call(score, chosen, math.inf if (taken & ~self.allowed).any() else shortfall))
        return chosen

    def only(self, positions: Tensor) -> Judge:
        return Judge(self.allowed.index_select(1, positions), self.calls)


@dataclass
class Follow(Picker):
    """Picks what was picked before, and writes down how far the scores are from those: `noise`, one for each call."""

    calls: list[Call]
    noise: list[float] = field(default_factory=list)

    def top(self, score: Tensor, count: int) -> Tensor:
        call = self.calls[len(self.noise)]
        both = score.isfinite() & call.score.isfinite()
        far = (score.double() - call.score.double()).abs()[both]
        self.noise.append(float(far.max()) if far.numel() else 0.0)
        return call.chosen
