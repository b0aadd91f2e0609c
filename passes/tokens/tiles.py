"""Methods that share a budget among the tiles of a picture by what each holds.

A tile is what the tower looks at as one picture: a segment. LLaVA-NeXT stitches its tiles into one panel, and there the
tile of a token follows from the patches behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...surgery.picking import topk
from ...surgery.selection import Choice, TowerState
from .budgets import proportional, quota_select
from .method import Method, Options, Place, Refusal, last
from .scores import received
from .select import ascending, mark


@dataclass(frozen=True)
class Tiles:
    """The tokens of a picture in tiles; all of it is constant in a graph."""

    units: np.ndarray  # int64 [N]: 0 is the thumbnail, 1 to G - 1 the crops
    places: np.ndarray  # float [N, 2]: row and column of each token's middle, in parts of the picture
    grid: tuple[int, int]  # rows and columns of the thumbnail

    @property
    def thumbnail(self) -> np.ndarray:
        """Its tokens, by row and column."""
        return np.flatnonzero(self.units == 0)

    @property
    def crops(self) -> np.ndarray:
        """All other tokens."""
        return np.flatnonzero(self.units)

    @property
    def sizes(self) -> np.ndarray:
        """Tokens of each unit, int64 [G]."""
        return np.bincount(self.units)


def tiles(state: TowerState) -> Tiles | None:
    """The thumbnail and the crops of a picture; None where there is one panel alone."""
    assert state.places is not None and state.members is not None
    panel, row, column = state.places.T
    if len(np.unique(panel)) < 2:
        return None
    rows = state.taps[-1].rows
    lengths = [k.shape[2] - state.has_cls for _, k in rows for _ in range(k.shape[0])]
    segment = np.searchsorted(np.cumsum(lengths), state.members[:, 0], side="right")
    whole = [p for p, one in enumerate(state.panels) if one.box == (0.0, 0.0, 1.0, 1.0)]
    # Stitched crops show the whole picture too, in several segments.
    chosen = min(whole, key=lambda p: (len(np.unique(segment[panel == p])), -p))
    crop = panel != chosen
    units = np.zeros(state.count, dtype=np.int64)
    units[crop] = np.unique(segment[crop] * len(state.panels) + panel[crop], return_inverse=True)[1] + 1
    box = np.array([one.box for one in state.panels])[panel]
    shape = np.array([(one.rows, one.columns) for one in state.panels])[panel]
    middle = box[:, :2] + (np.stack([row, column], axis=1) + 0.5) / shape * (box[:, 2:] - box[:, :2])
    return Tiles(units, middle, (state.panels[chosen].rows, state.panels[chosen].columns))


def areas(seen: Tiles) -> np.ndarray:
    """Which crop shows each token of the thumbnail: that of the nearest middle; [thumbnail, G - 1] of 0 and 1."""
    away = seen.places[seen.thumbnail][:, None] - seen.places[seen.crops][None]
    nearest = seen.crops[(away**2).sum(axis=-1).argmin(axis=1)]
    return np.eye(len(seen.sizes) - 1, dtype=np.float32)[seen.units[nearest] - 1]


def resized(seen: Tiles, score: Tensor) -> Tensor:
    """A score of the thumbnail's tokens at the middles of the crops' tokens, bilinear: [1, thumbnail] -> [1, crops]."""
    grid = np.array(seen.grid)
    at = np.clip(seen.places[seen.crops] * grid - 0.5, 0, grid - 1)
    low = np.minimum(at.astype(np.int64), np.maximum(grid - 2, 0))
    part, high = at - low, np.minimum(low + 1, grid - 1)
    found = torch.zeros(1, len(seen.crops), dtype=score.dtype)
    for y, share_y in ((low[:, 0], 1 - part[:, 0]), (high[:, 0], part[:, 0])):
        for x, share_x in ((low[:, 1], 1 - part[:, 1]), (high[:, 1], part[:, 1])):
            corner = score.index_select(1, torch.from_numpy(y * grid[1] + x))
            found = found + corner * torch.from_numpy(share_y * share_x).to(score.dtype)
    return found


def _unit_rows(score: Tensor, units: np.ndarray) -> Tensor:
    """Each unit's part of a score divided by its length: [1, n]."""
    member = torch.from_numpy(np.eye(units.max() + 1, dtype=np.float32)[units]).to(score.dtype)
    return score / ((score**2 @ member).sqrt() @ member.T).clamp(min=1e-12)


def _share(state: TowerState, seen: Tiles, score: Tensor, thumbnail: int, weights: Tensor, keep: int) -> Choice:
    """So many tokens of the thumbnail, and of the crops in proportion to their weights."""
    crops = proportional(weights, keep - thumbnail, seen.sizes[1:])
    counts = torch.cat([torch.tensor([[thumbnail]]), crops], dim=1)
    return Choice(quota_select(state, score, seen.units, counts, keep))


# --- HiRED


def _hired(state: TowerState, keep: int, o: Options) -> Choice:
    score, seen = received(state, state.taps[-1]), tiles(state)
    if seen is None:
        return Choice(ascending(state.top(score, keep)))
    content = received(state, state.taps[0]).index_select(1, torch.from_numpy(seen.thumbnail))
    marked = int(seen.sizes[0] * (1 - o["alpha"]))
    weights = torch.zeros(1, len(seen.sizes) - 1)
    if marked:
        weights = mark(topk(content, marked), content.shape[1]).to(torch.float32) @ torch.from_numpy(areas(seen))
    most, least = int(seen.sizes[0]), keep - int(seen.sizes[1:].sum())
    thumbnail = max(min(int(keep * o["alpha"]), most), least)
    return _share(state, seen, score, thumbnail, weights, keep)


def _first_and_last(scored: Sequence[int], options: Options) -> Sequence[int]:
    return tuple(dict.fromkeys((scored[0], scored[-1])))


def _refuse_hired(place: Place, options: Options) -> Refusal | None:
    if not 0 <= options["alpha"] <= 1:
        return f"alpha={options['alpha']}, and a share lies between 0 and 1", "choose 0 to 1"
    return _refuse_tiles(place, options)


# --- GlobalCom2


def _globalcom2(state: TowerState, keep: int, o: Options) -> Choice:
    score, seen = received(state, state.taps[-1]), tiles(state)
    if seen is None:
        return Choice(ascending(state.top(score, keep)))
    whole = score.index_select(1, torch.from_numpy(seen.thumbnail))
    local = score.index_select(1, torch.from_numpy(seen.crops))
    richness = torch.softmax(whole @ torch.from_numpy(areas(seen)).to(whole.dtype) / o["tau"], dim=-1)
    rate = 1 + richness - richness.mean(dim=-1, keepdim=True)  # times keep / N; none takes more than a tile has
    weights = rate * torch.from_numpy(seen.sizes[1:]).to(rate.dtype)
    units = seen.units[seen.crops] - 1
    both = _unit_rows(local, units) + _unit_rows(resized(seen, whole), units)
    back = np.argsort(np.concatenate([seen.thumbnail, seen.crops]))
    score = torch.cat([whole, both], dim=1).index_select(1, torch.from_numpy(back))
    return _share(state, seen, score, keep * int(seen.sizes[0]) // state.count, weights, keep)


def _refuse_globalcom2(place: Place, options: Options) -> Refusal | None:
    if not options["tau"] > 0:
        return f"tau={options['tau']}", "choose more than 0"
    return _refuse_tiles(place, options)


def _refuse_tiles(place: Place, options: Options) -> Refusal | None:
    if place.panels < 2:
        return None
    if place.frames > 1:
        return f"{place.frames} images are seen together, and a thumbnail is of one", "choose a method for clips"
    if not any(panel.box == (0.0, 0.0, 1.0, 1.0) for panel in place.bucket.panels):
        return f"none of {place.panels} tiles shows the whole picture", 'use fastervlm, or pool = "tile"'
    return None


ROWS = {
    "hired": Method(
        title="HiRED",
        source="arXiv:2408.10945",
        summary="a share for the thumbnail; the rest for the best tokens of tiles, by where its first block looks",
        choose=_hired,
        options={"alpha": 0.5},
        blocks=_first_and_last,
        grid=True,
        refuse=_refuse_hired,
        without_cls="the mean attention received in the first block says what a tile holds, a poor proxy; in the last, "
        "what a token is worth",
        differs="the areas of tiles are true areas, not rows of a flattened mask; counts are completed to keep by "
        "largest remainder, where the paper leaves a few unused, and what tiles have no room for goes to others",
    ),
    "globalcom2": Method(
        title="GlobalCom2",
        source="arXiv:2501.05179",
        summary="tiles keep more where the thumbnail attends more, by their own attention and the thumbnail's together",
        choose=_globalcom2,
        options={"tau": 10.0},
        blocks=last,
        grid=True,
        refuse=_refuse_globalcom2,
        without_cls="the mean attention received from all tokens takes the place of [CLS]'s",
        differs="the thumbnail's tokens stay in spatial order; scores of padded pictures keep their place; counts are "
        "completed to keep by largest remainder; the rate is keep over all tokens",
    ),
}
