"""The table of methods, and a row of it made callable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ...surgery.selection import Choice, Rows, TowerState
from . import after, baselines, diversity, frames, grids, text, tiles, tower, trained
from .method import Method, parse

METHODS: dict[str, Method] = (
    baselines.ROWS
    | after.ROWS
    | diversity.ROWS
    | tiles.ROWS
    | grids.ROWS
    | text.ROWS
    | frames.ROWS
    | tower.ROWS
    | trained.ROWS
)

POOLS = ("image", "tile")  # who shares a budget


@dataclass(frozen=True)
class TableSelector:
    """A row of the table made callable; see `surgery.selection.Selector`.

    Args:
        method: its name, with options as `name:option=value:…`.
        seed: of methods that draw.
        pool: `image` keeps the best of all tiles of an image, `tile` as many of each.
        module: of a method with weights.
    """

    method: str
    seed: int = 0
    pool: str = "image"
    module: Any = None  # with weights; the model holds it too

    @cached_property
    def _parsed(self) -> tuple[Method, dict[str, Any]]:
        row, options = parse(self.method, METHODS, "method")
        return row, options | {"seed": self.seed, "module": self.module}

    @property
    def outputs(self) -> Sequence[int]:
        return () if self.module is None else self.module.blocks

    @property
    def text(self) -> bool:
        return self._parsed[0].text

    def blocks(self, scored: Sequence[int]) -> Sequence[int]:
        row, options = self._parsed
        return () if row.blocks is None else row.blocks(scored, options)

    def leaving(self, tokens: int, keep: int, blocks: int) -> tuple[int, ...]:
        row, options = self._parsed
        return () if row.inside is None else row.inside.leaving(tokens, keep, blocks, options)

    def projected(self, tokens: int, keep: int) -> int:
        row, options = self._parsed
        return row.projects(tokens, keep, options) + (0 if row.compresses else keep)

    def inside(self, rows: Rows, leave: int) -> Rows:
        row, options = self._parsed
        assert row.inside is not None
        return row.inside.step(rows, leave, options)

    def __call__(self, state: TowerState, keep: int) -> Choice:
        row, options = self._parsed
        if keep == state.count:
            return Choice(torch.arange(keep)[None])
        if self.pool == "image" or len(state.panels) < 2:
            return row.choose(state, keep, options)
        assert state.places is not None
        tiles = [np.flatnonzero(state.places[:, 0] == tile) for tile in range(len(state.panels))]
        each = [row.choose(state.only(t), keep // len(tiles), options).within(t, state.count) for t in tiles]
        mixes = [choice.mix for choice in each if choice.mix is not None]
        kept = torch.cat([choice.kept for choice in each], dim=1)
        return Choice(kept, torch.cat(mixes, dim=1) if mixes else None)
