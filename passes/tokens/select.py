"""Selectors: from scores or distances to `keep` ascending positions, int64 [B, keep].

`keep` is a Python int, so every shape in the exported graph is constant. Greedy loops are unrolled.

`greedy(state, gain, keep, block)` is the loop of all greedy papers. A gain, one of `max_min(distance, first)`,
`max_sum(distance, first)`, `coverage(cover)` and `dpp(kernel)`, is a generator: it yields what each token would add,
[B, N] with -inf for those taken, is sent those taken next, int64 [B, b], and yields again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding

from ...surgery.picking import topk
from ...surgery.selection import TowerState

Gain = Generator[Tensor, Tensor, None]


def ascending(positions: Tensor) -> Tensor:
    """Back in the order of the picture."""
    return torch.sort(positions, dim=-1).values


def mark(positions: Tensor, count: int) -> Tensor:
    """Which of `count` tokens these are: int64 [B, T] -> bool [B, count]."""
    return torch.zeros(positions.shape[0], count).scatter(1, positions, 1.0) > 0


def derived(state: TowerState, wanted: Tensor, taken: Tensor, count: int) -> Tensor:
    """The wanted tokens, which follow from those taken: int64 [1, count], ascending.

    They are picked all the same, so that who is told what to keep (`Selection.forced`) keeps that.

    Args:
        wanted: `count` tokens, bool [1, N], none of them taken. taken: bool [1, N].
    """
    return ascending(state.top(torch.where(taken, -math.inf, wanted.to(torch.float32)), count))


_NOTHING = 1e-5  # of the largest: less than this is float32 rounding


def greedy(state: TowerState, gain: Gain, keep: int, block: int = 1) -> Tensor:
    """One token after another, each the one that adds most to those already taken: int64 [1, keep], ascending.

    All greedy papers share this loop and differ in the gain. A gain over [groups, n] instead of [1, N] runs on
    contiguous groups of n tokens side by side, each to keep / groups tokens.

    Args:
        gain: see `max_min`, `max_sum`, `coverage`, `dpp`; used up.
        block: so many are taken in a step, by what each would add alone; divides keep / groups.
    """
    value = next(gain)
    groups, n = value.shape
    steps, uneven = divmod(keep, groups * block)
    assert not uneven and groups * n == state.count
    parts = [state.pick.only(torch.arange(g * n, (g + 1) * n)) for g in range(groups)]
    taken: list[Tensor] = []
    for step in range(steps):
        if step:
            value = gain.send(taken[-1])
        if groups == 1:
            taken.append(state.top(value, block))
        else:
            taken.append(torch.cat([part.top(one, block) for part, one in zip(parts, value.split(1), strict=True)]))
    return ascending(_through(torch.cat(taken, dim=-1), n).reshape(1, keep))


def among(state: TowerState, score: Tensor, count: int, choose: Callable[[TowerState, Tensor], Tensor]) -> Tensor:
    """Choose among the `count` tokens of the largest score alone: the `prefilter` of a costly choice.

    Args:
        score: a cheap one, [1, N].
        choose: gets those tokens as a state without places and taps, and their positions, int64 [1, count], ascending;
            gives positions among them, ascending.

    Returns:
        Positions among all tokens, int64 [1, keep], ascending.
    """
    near = ascending(topk(score, count))
    tokens, pick = state.tokens.index_select(1, near[0]), state.pick.only(near[0])
    few = replace(state, tokens=tokens, taps=(), members=None, panels=(), places=None, pick=pick)
    return near.gather(1, choose(few, near))


def max_min(distance: Tensor, first: Tensor | None = None) -> Gain:
    """Distance to the nearest taken token: farthest-point greedy, k-center.

    Args:
        distance: symmetric, [B, N, N].
        first: scores of the first pick, [B, N]; without them the token whose nearest other is farthest away.
    """
    own = _diagonal(distance.shape[-1])
    latest = yield torch.where(own, math.inf, distance).amin(dim=-1) if first is None else first
    # -inf from itself: the minimum that updates the gain marks what is taken, duplicates of it stay free.
    rows = torch.where(own, -math.inf, distance)
    value = _of(rows, latest, torch.amin)
    while True:
        latest = yield value
        value = torch.minimum(value, _of(rows, latest, torch.amin))


def max_sum(distance: Tensor, first: Tensor) -> Gain:
    """Sum of the distances to all taken tokens.

    Args:
        distance: symmetric, [B, N, N].
        first: scores of the first pick, [B, N].
    """
    rows = torch.where(_diagonal(distance.shape[-1]), -math.inf, distance)
    latest = yield first
    value = _of(rows, latest, torch.sum)
    while True:
        latest = yield value
        value = value + _of(rows, latest, torch.sum)


def coverage(cover: Tensor) -> Gain:
    """By how much a token improves the best cover of every row, summed: facility location.

    Args:
        cover: how well token n covers row r, not negative, [B, R, N].
    """
    columns = cover.transpose(1, 2).contiguous()
    best = torch.zeros_like(columns[:, 0])
    free = torch.zeros_like(cover[:, 0])  # -inf where taken
    while True:
        latest = yield (columns - best[:, None]).relu().sum(dim=-1) + free
        free = free.scatter(1, latest, -math.inf)
        best = torch.maximum(best, _of(columns, latest, torch.amax))


def dpp(kernel: Tensor) -> Gain:
    """Growth of the kernel's determinant over the taken tokens: greedy MAP of a determinantal point process.

    More tokens than the kernel has rank leave rounding alone to rank the rest; then its diagonal does.

    Args:
        kernel: symmetric, positive semidefinite, float32 or wider, [B, N, N].
    """
    value = kernel.diagonal(dim1=-2, dim2=-1)[:, None]  # what taken tokens leave of each, squared; -inf: is taken
    rest = value * _NOTHING  # what a token counts of which they leave nothing
    floor = rest.amax(dim=-1, keepdim=True)
    factor: Tensor | None = None  # Cholesky factor of the kernel over the taken tokens: a row for each, [B, t, N]
    while True:
        latest = yield torch.where(value > floor, value, rest).squeeze(1)
        for one in latest.split(1, dim=-1) if latest.shape[1] > 1 else (latest,):
            row, at = _rows(kernel, one), one[:, None]
            if factor is not None:
                row = row - factor.gather(2, at.expand(-1, factor.shape[1], -1)).transpose(1, 2) @ factor
            left = value.gather(2, at)
            row = torch.where(left > floor, row / left.clamp(min=1e-30).sqrt(), 0.0)
            factor = row if factor is None else torch.cat([factor, row], dim=1)
            value, rest = (value - row * row).scatter(2, at, -math.inf), rest.scatter(2, at, -math.inf)


def _rows(rows: Tensor, latest: Tensor) -> Tensor:
    """The rows of the tokens just taken: [B, N, M] and [B, b] -> [B, b, M]."""
    return embedding(_through(latest, rows.shape[1]), rows.flatten(0, 1))


def _of(rows: Tensor, latest: Tensor, merge: Callable[..., Tensor]) -> Tensor:
    """The same merged into one, [B, M]."""
    found = _rows(rows, latest)
    return found.squeeze(1) if latest.shape[1] == 1 else merge(found, dim=1)


def _through(positions: Tensor, n: int) -> Tensor:
    """Positions within each of B groups of n, [B, b], counted through all of them."""
    groups = positions.shape[0]
    return positions if groups == 1 else positions + torch.arange(0, groups * n, n)[:, None]


def _diagonal(n: int) -> Tensor:
    position = torch.arange(n)
    return position[:, None] == position


def strided(state: TowerState, taken: Tensor, free: int, count: int) -> Tensor:
    """Evenly spaced tokens of those that are not taken, from the first one on: int64 [1, count], ascending.

    Args:
        taken: bool [1, N], all but `free` of them.
    """
    step = free // count
    rank = torch.cumsum((~taken).to(torch.int64), dim=-1) - 1
    return derived(state, ~taken & (rank % step == 0) & (rank < step * count), taken, count)


def with_stride(state: TowerState, score: Tensor, count: int, stride: int) -> Tensor:
    """The `stride` evenly spaced tokens and the best of the others: int64 [1, count], the evenly spaced ones first."""
    fixed = np.zeros((1, state.count), dtype=bool)
    fixed[0, [i * (state.count // stride) for i in range(stride)]] = True
    return state.top(torch.where(torch.from_numpy(fixed), math.inf, score), count)


def best_rows(state: TowerState, score: Tensor, count: int) -> Tensor:
    """Whole rows of the raster, those of the largest mean score: int64 [1, count], ascending.

    Args:
        count: tokens, a multiple of the columns, which all panels share.
    """
    table = rows(_places(state))
    index = torch.from_numpy(table)
    mean = score[:, index].mean(dim=-1)
    best = state.only(table[:, 0]).top(mean, count // table.shape[1])
    return index[ascending(best)].flatten(1)


def anchors_and_more(state: TowerState, first: Tensor, then: Tensor, anchors: int, keep: int) -> Tensor:
    """Anchors of the best `first` score, their neighbours in the raster, and the best others by `then`.

    Args:
        anchors: 5 for each fit into `keep`.

    Returns:
        int64 [1, keep], ascending.
    """
    if anchors:
        anchored = mark(state.top(first, anchors), state.count)
        then = torch.where(dilated(anchored, crosses(_places(state))), math.inf, then)
    return ascending(state.top(then, keep))


def dilated(marked: Tensor, neighbours: np.ndarray) -> Tensor:
    """Marked tokens and their neighbours: bool [B, N]; neighbours int64 [N, m], -1 for none."""
    index = torch.from_numpy(neighbours)
    there = marked.to(torch.float32)[:, index.clamp(min=0)] * (index >= 0)
    return there.amax(dim=-1) > 0


def without_twins(ranked: Tensor, similarity: Tensor, count: int, step: int) -> Tensor:
    """Thin a list out until `count` are left: int64 [B, R] -> [B, count], in the order of the list.

    In each round every second one, from the first, is compared with all between, and the `step` that have the most
    similar partner leave (VisPruner). Unrolled: (R - count) / step rounds of a dozen operators.

    Args:
        similarity: of all tokens, symmetric, [B, N, N].
    """
    n = similarity.shape[-1]
    rows = similarity.flatten(0, 1)
    while (length := ranked.shape[1]) > count:
        even, odd = ranked[:, ::2], ranked[:, 1::2]
        partners = torch.where(mark(odd, n)[:, None], embedding(_through(even, n), rows), -math.inf)
        gone = topk(partners.amax(dim=-1), min(step, length - count, even.shape[1]))
        stay = (~mark(2 * gone, length)).to(torch.float32)
        ranked = ranked.gather(1, topk(stay, length - gone.shape[1]))  # of equals the first: in order
    return ranked


# --- the raster: numbers that are known when a graph is made


def _places(state: TowerState) -> np.ndarray:
    assert state.places is not None
    return state.places


def rows(places: np.ndarray) -> np.ndarray:
    """The tokens of each row, from panel, row and column [N, 3]: int64 [rows, columns]."""
    return np.lexsort(places.T[::-1]).reshape(len(np.unique(places[:, :2], axis=0)), -1)


def crosses(places: np.ndarray) -> np.ndarray:
    """Each token and its neighbours left, right, above and below on its panel; -1 beyond a border: int64 [N, 5]."""
    at = {tuple(place): token for token, place in enumerate(places.tolist())}
    moves = ((0, 0), (0, -1), (0, 1), (-1, 0), (1, 0))
    found = [[at.get((panel, row + down, column + right), -1) for down, right in moves] for panel, row, column in at]
    return np.array(found, dtype=np.int64)


def windows(places: np.ndarray, side: int) -> np.ndarray:
    """The tokens of each window of side x side, row by row: int64 [windows, side * side]; panels divide by `side`."""
    panel, row, column = places.T
    order = np.lexsort((column, row, column // side, row // side, panel))
    return order.reshape(-1, side * side)
