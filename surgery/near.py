"""Which visual tokens stand next to which in the rasters of an image, as constants of a graph."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from ..manifest import Panel


@cache
def neighbours(panels: tuple[Panel, ...], window: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens in a square around each of an image's n, in its own panel; a line break is the last of its row.

    Args:
        window: side w of the square, odd.

    Returns:
        Their positions, int64 [n, w * w], the token's own where the raster ends; and where it does not, bool.
    """
    reach, found, start = window // 2, [], 0
    for panel in panels:
        shape = (panel.rows, panel.columns + panel.line_breaks)
        raster = np.full((shape[0] + 2 * reach, shape[1] + 2 * reach), -1)
        raster[reach : reach + shape[0], reach : reach + shape[1]] = start + np.arange(panel.tokens).reshape(shape)
        found.append(np.lib.stride_tricks.sliding_window_view(raster, (window, window)).reshape(-1, window**2))
        start += panel.tokens
    index = np.concatenate(found)
    return np.where(index < 0, np.arange(start)[:, None], index), index >= 0


def repeated(near: tuple[np.ndarray, np.ndarray], count: int) -> tuple[np.ndarray, np.ndarray]:
    """The same for `count` tokens of several images alike, one image after the other."""
    index, there = near
    images, more = divmod(count, len(index))
    if more:
        raise ValueError(f"{count} visual columns are no whole images of {len(index)} tokens")
    starts = len(index) * np.arange(images)[:, None, None]
    return (starts + index).reshape(count, -1), np.tile(there, (images, 1))


def side(panels: Sequence[Panel]) -> int:
    """Rows or columns of the largest raster."""
    return max(max(panel.rows, panel.columns + panel.line_breaks) for panel in panels)
