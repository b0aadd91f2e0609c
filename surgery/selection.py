"""Which visual tokens stay: what a selector may look at, and where a model keeps its selector.

Tokens leave after the family has packed them (pixel shuffle, tiles, merges, line breaks), so one rule serves every
family; a projector that works token by token still runs on the kept ones only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..manifest import Bucket


@dataclass(frozen=True)
class TowerState:
    """What a selector may look at for one image. N visual tokens; the leading axis is 1."""

    tokens: Tensor  # features of the visual tokens, before a per-token projector, [1, N, d]
    project: Callable[[Tensor], Tensor]  # [1, N, d] -> [1, N, hidden]; the identity where they are projected already
    attention: tuple[tuple[Tensor, Tensor], ...]  # q and k of the scored tower block, [segments, heads, rows, head_dim]
    scale: float
    has_cls: bool  # row 0 of each segment is [CLS]
    members: Tensor | None  # int64 [N, u]: the patches behind each token, counted over segments; -1 for none

    @property
    def count(self) -> int:
        return self.tokens.shape[1]

    def only(self, positions: Tensor) -> TowerState:
        """The same with these tokens alone, int64 [n]."""
        members = None if self.members is None else self.members.index_select(0, positions)
        return replace(self, tokens=self.tokens.index_select(1, positions), members=members)


class Selector(Protocol):
    """Chooses tokens; composed in `passes/tokens`."""

    @property
    def method(self) -> str:
        """Its name in the table of methods."""
        ...

    def __call__(self, state: TowerState, keep: int) -> Tensor:
        """Ascending kept positions, int64 [1, keep]."""
        ...

    def scores(self, state: TowerState) -> Tensor | None:
        """What this selector ranks or measures, float32 or wider; None for a constant choice."""
        ...

    def regret(self, state: TowerState, kept: Tensor) -> Tensor:
        """By how much a given choice falls short of this selector's own, in units of its score; 0 if it does not."""
        ...


LINE_BREAKS = ("drop", "keep", "compete")  # what becomes of newline tokens; see passes/prune_tokens.py


@dataclass
class Selection:
    """A selector, how many tokens it keeps of an image of each bucket, and what it does with line breaks."""

    selector: Selector
    keep: tuple[int, ...]
    line_breaks: str = "drop"

    def choose(self, state: TowerState, keep: int, breaks: tuple[int, ...] = ()) -> Tensor:
        """Ascending positions to keep, int64 [1, keep]. `breaks` are the positions of newline tokens."""
        if keep == state.count:
            return torch.arange(keep)[None]
        others, pinned = self._split(state, breaks)
        if others is None:
            return self.selector(state, keep)
        chosen = others[self.selector(state.only(others), keep - len(pinned))]
        return torch.sort(torch.cat([chosen, pinned[None]], dim=1), dim=1).values if len(pinned) else chosen

    def regret(self, state: TowerState, kept: Tensor, breaks: tuple[int, ...] = ()) -> Tensor:
        """By how much `kept`, [1, K], falls short of the selector's own choice; infinite where no score excuses it."""
        if kept.shape[1] == state.count:
            return torch.tensor(0.0 if torch.equal(kept[0], torch.arange(state.count)) else torch.inf)
        others, pinned = self._split(state, breaks)
        if others is None:
            return self.selector.regret(state, kept)
        free = kept[0][~torch.isin(kept[0], pinned)]
        if len(free) != kept.shape[1] - len(pinned) or not torch.isin(free, others).all():
            return torch.tensor(torch.inf)
        return self.selector.regret(state.only(others), torch.searchsorted(others, free)[None])

    def scores(self, state: TowerState, breaks: tuple[int, ...] = ()) -> Tensor | None:
        """What is ranked or measured, without line breaks that do not compete."""
        others, _ = self._split(state, breaks)
        return self.selector.scores(state if others is None else state.only(others))

    def _split(self, state: TowerState, breaks: tuple[int, ...]) -> tuple[Tensor | None, Tensor]:
        """Positions that compete (None for all) and positions that stay whatever their score."""
        if not breaks or self.line_breaks == "compete":
            return None, torch.zeros(0, dtype=torch.int64)
        others = sorted(set(range(state.count)) - set(breaks))
        return torch.tensor(others), torch.tensor(breaks if self.line_breaks == "keep" else (), dtype=torch.int64)


@dataclass
class Attached:
    """What vlmcut knows about a model beside its modules; `model.vlmcut`."""

    family: Any  # surgery.families.base.Family
    buckets: tuple[Bucket, ...]
    selection: Selection | None = None

    def keep(self, bucket: int) -> int:
        """Visual tokens that an image of this bucket keeps."""
        return self.selection.keep[bucket] if self.selection else self.buckets[bucket].tokens

    def line_breaks(self, geometry: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """Positions of the newline tokens of an image of this geometry."""
        return next(bucket.line_breaks for bucket in self.buckets if bucket.geometry == geometry)


def attached(model: Any) -> Attached:
    """What vlmcut attached to a model when it was loaded."""
    return model.vlmcut
