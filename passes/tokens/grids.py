"""Grid transforms: a regular grid of tokens becomes a smaller regular grid.

Both axes of a panel are resized by a constant matrix each, so a transform is one constant matrix over its tokens. What
a method does with the picture does not matter here: nothing depends on it, and nothing is chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from itertools import islice

import numpy as np
import torch

from ...surgery.selection import Choice, TowerState
from .method import Method, Options, Place, Refusal

Axis = Callable[[int, int], np.ndarray]  # n, m -> [m, n]: makes m places of n


def average_bins(n: int, m: int) -> np.ndarray:
    """Adaptive average pooling of one axis: place i is the mean of floor(i n / m) up to ceil((i + 1) n / m), [m, n]."""
    bins = np.zeros((m, n))
    for i in range(m):
        start, end = i * n // m, -(-(i + 1) * n // m)
        bins[i, start:end] = 1 / (end - start)
    return bins


def cosines(n: int) -> np.ndarray:
    """The orthonormal DCT-II of one axis, [n, n]; row 0 is the constant."""
    frequency, place = np.indices((n, n))
    waves = np.sqrt(2 / n) * np.cos(np.pi * (2 * place + 1) * frequency / (2 * n))
    waves[0] = np.sqrt(1 / n)
    return waves


def lowpass(n: int, m: int, clean: bool = True) -> np.ndarray:
    """Keep the lowest m of n frequencies of one axis, and sample them at m places: [m, n].

    Args:
        clean: a constant stays what it is. Otherwise it grows by sqrt(n / m), as two orthonormal transforms have it.
    """
    kept = cosines(m).T @ cosines(n)[:m]
    return kept * np.sqrt(m / n) if clean else kept


def grid_linear(along_rows: np.ndarray, along_columns: np.ndarray) -> np.ndarray:
    """Y = A_h X A_w^T on tokens in raster order: [h', h] and [w', w] -> [h' w', h w]."""
    return np.kron(along_rows, along_columns)


def centres(n: int, m: int) -> np.ndarray:
    """The place of n in the middle of each of m equal cells: int64 [m], ascending, distinct for m <= n."""
    return (2 * np.arange(m) + 1) * n // (2 * m)


def smaller(rows: int, columns: int, count: int) -> tuple[int, int] | None:
    """The grid of `count` places that fits into rows x columns and is most like it in shape; None if none fits."""
    fitting = [(h, count // h) for h in range(1, min(rows, count) + 1) if not count % h and count // h <= columns]

    def stretch(grid: tuple[int, int]) -> Fraction:
        ratio = Fraction(grid[0] * columns, grid[1] * rows)
        return max(ratio, 1 / ratio)

    return min(fitting, key=lambda grid: (stretch(grid), grid[0]), default=None)  # of two equally like, the wider


def shrink(state: TowerState, keep: int, axis: Axis) -> Choice:
    """Every panel on a smaller grid; panels share `keep` in proportion to their sizes. All of it is constant."""
    assert state.places is not None
    kept, mix = [], np.zeros((keep, state.count))
    for panel in np.unique(state.places[:, 0]):
        tokens = np.flatnonzero(state.places[:, 0] == panel)
        rows, columns = state.places[tokens, 1:].max(axis=0) + 1
        assert len(tokens) == rows * columns, "a grid in raster order"
        grid = smaller(int(rows), int(columns), keep * len(tokens) // state.count)
        assert grid is not None, "`refuse` has seen to that"
        middle = centres(rows, grid[0])[:, None] * columns + centres(columns, grid[1])
        made = slice(len(kept), len(kept) + middle.size)
        mix[made, tokens] = grid_linear(axis(rows, grid[0]), axis(columns, grid[1]))
        kept += tokens[middle.reshape(-1)].tolist()
    dtype = torch.promote_types(state.tokens.dtype, torch.float32)
    return Choice(torch.tensor([kept]), torch.from_numpy(mix).to(dtype)[None])


def _refuse(place: Place, options: Options) -> Refusal | None:
    if options.get("gain", "clean") not in ("clean", "code"):
        return f"gain={options['gain']}", "choose clean or code"
    shapes = sorted({(panel.rows, panel.columns) for panel in place.bucket.panels})
    if _reachable(shapes, place.tokens, place.keep):
        return None
    outward = (k for step in range(1, place.tokens) for k in (place.keep - step, place.keep + step))
    near = islice((k for k in outward if 0 < k <= place.tokens and _reachable(shapes, place.tokens, k)), 3)
    named = " and ".join(f"{rows}x{columns}" for rows, columns in shapes)
    return (
        f"{place.keep} of {place.tokens} tokens, in {place.panels} raster{'s' * (place.panels > 1)} of {named}, make "
        "no smaller grid of each",
        f"the nearest that do: {', '.join(map(str, sorted(near)))}",
    )


def _reachable(shapes: list[tuple[int, int]], tokens: int, keep: int) -> bool:
    return all(
        not keep * rows * columns % tokens and smaller(rows, columns, keep * rows * columns // tokens)
        for rows, columns in shapes
    )


_PLACE = "each new token takes the place of the one in the middle of its cell; no position is computed anew"

ROWS = {
    "pool": Method(
        title="grid pooling",
        source="baseline; LLaVA-OneVision and LLaVA-Video pool frames like this",
        summary="the mean of each cell of a smaller grid, the baseline for every transform",
        choose=lambda s, keep, o: shrink(s, keep, average_bins),
        grid=True,
        merges=True,
        refuse=_refuse,
        differs=_PLACE,
    ),
    "fourier": Method(
        title="Fourier-VLM",
        source="arXiv:2508.06038",
        summary="the low frequencies of a two-dimensional cosine transform, sampled on a smaller grid",
        choose=lambda s, keep, o: shrink(s, keep, lambda n, m: lowpass(n, m, o["gain"] == "clean")),
        options={"gain": "clean"},
        grid=True,
        merges=True,
        refuse=_refuse,
        differs=f"gain=clean keeps a constant picture as it is, for models that were not trained for the transform; "
        f"gain=code leaves it sqrt(tokens / keep) times as large, as the paper's code does and trains for. {_PLACE}",
    ),
}
