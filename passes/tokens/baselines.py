"""What every method has to beat."""

from __future__ import annotations

import numpy as np
import torch

from ...surgery.selection import Choice
from .method import Method


def random_positions(n: int, keep: int, seed: int) -> list[int]:
    """`keep` of `n` positions, the first of a seeded permutation, ascending; nested over `keep` for one seed."""
    # NumPy, so that a trace sees numbers; the stream of a bit generator is the same in every version.
    order = np.argsort(np.random.PCG64(seed).random_raw(n), kind="stable")
    return sorted(order[:keep].tolist())


def uniform_positions(n: int, keep: int) -> list[int]:
    """Evenly spaced positions, floor((i + 0.5) n / keep): every part of the picture, seen as one raster line."""
    return [int((i + 0.5) * n / keep) for i in range(keep)]


ROWS = {
    "random": Method(
        title="random",
        source="baseline",
        summary="a fixed random choice, the baseline to beat",
        choose=lambda s, keep, o: Choice(torch.tensor([random_positions(s.count, keep, o["seed"])])),
    ),
    "uniform": Method(
        title="uniform",
        source="baseline",
        summary="evenly spaced tokens, the other baseline",
        choose=lambda s, keep, o: Choice(torch.tensor([uniform_positions(s.count, keep)])),
    ),
}
