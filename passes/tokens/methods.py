"""The table of methods: each is a composition of pieces. Adding one is one row and at most one new piece."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...surgery.selection import TowerState
from . import scores, select


@dataclass(frozen=True)
class Method:
    """A row of the table. `score` gives what `choose` ranks, from the state of the tower."""

    summary: str
    source: str
    score: Callable[[TowerState], Tensor] | None
    choose: Callable[[Tensor, int], Tensor] | None
    regret: Callable[[Tensor, Tensor], Tensor] | None
    attention: bool = False  # whether it scores by attention in the vision tower
    constant: Callable[[int, int, int], list[int]] | None = None  # (tokens, keep, seed) -> positions
    without_cls: str | None = None  # what it does on a tower without [CLS]


METHODS: dict[str, Method] = {
    "fastervlm": Method(
        summary="tokens that [CLS] attends to most in the last block that runs",
        source="FasterVLM, arXiv:2412.01818",
        score=scores.attention_received,
        choose=select.topk_select,
        regret=select.topk_regret,
        attention=True,
        without_cls="this tower has no [CLS] token: the mean attention received from all tokens takes its place, "
        "which did worse than random on examples/scenes-smol; compare `divprune`",
    ),
    "divprune": Method(
        summary="the most diverse tokens, by greedy max-min cosine distance after the projector",
        source="DivPrune, arXiv:2503.02175",
        score=lambda state: scores.cosine_distance(state.project(state.tokens)),
        choose=select.max_min_select,
        regret=select.max_min_regret,
    ),
    "random": Method(
        summary="a fixed random choice, the baseline to beat",
        source="baseline",
        score=None,
        choose=None,
        regret=None,
        constant=lambda n, keep, seed: select.random_positions(n, keep, seed),
    ),
    "uniform": Method(
        summary="evenly spaced tokens, the other baseline",
        source="baseline",
        score=None,
        choose=None,
        regret=None,
        constant=lambda n, keep, seed: select.uniform_positions(n, keep),
    ),
}


@dataclass(frozen=True)
class TableSelector:
    """A row of the table made callable; see `surgery.selection.Selector`."""

    method: str
    seed: int = 0

    def __call__(self, state: TowerState, keep: int) -> Tensor:
        row = METHODS[self.method]
        if row.constant is not None:
            return torch.tensor(row.constant(state.count, keep, self.seed))[None]
        assert row.score is not None and row.choose is not None
        return row.choose(row.score(state), keep)

    def scores(self, state: TowerState) -> Tensor | None:
        """What the method ranks; None for a constant choice."""
        row = METHODS[self.method]
        return None if row.score is None else row.score(state)

    def regret(self, state: TowerState, kept: Tensor) -> Tensor:
        row = METHODS[self.method]
        if row.constant is not None:
            return select.same_for_all(row.constant(state.count, kept.shape[1], self.seed), kept)
        assert row.score is not None and row.regret is not None
        return row.regret(row.score(state), kept)
