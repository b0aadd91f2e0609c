"""The cheapest combination of cuts that keeps the answers: singles first, then a beam over combinations.

1. Every axis alone, mild to strong, until a level fails; what passed is measured, all in turn.
2. A beam of `width` recipes grows by one level of one axis at a time. A child is not asked if a part of it failed alone
   (a stronger cut is taken to answer no better) or if it is not predicted to cost less than its parent. Predicted: the
   parts of the original's cost, each times what the single cuts left of it. Of the children that keep the answers the
   beam takes the cheapest and those that saved most for each question lost; these are measured, in turn with the best
   so far.
3. What passed unmeasured and is predicted to beat the best is measured; then the cheapest few combinations and the
   cheapest few single cuts meet in longer rounds of their own: the best of either is what came first there.

Nothing here knows a model: a `Judge` answers and measures. Apart from measured times everything is deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from ..errors import VlmcutError
from .search_axes import Axis, Choice, text
from .sweep_plan import Progress


@dataclass(frozen=True)
class Cost:
    """What a recipe costs, beside the original in the same rounds."""

    ratio: float  # of the original's
    parts: tuple[float, ...]  # of each graph, as a fraction of the original's whole cost; they add up to the ratio
    value: float  # ms, bytes or FLOPs


class Judge(Protocol):
    """Answers questions with a recipe and measures what it costs."""

    @property
    def whole(self) -> tuple[float, ...]:
        """The parts of the original's cost, which add up to 1, from the rounds that were measured first."""
        ...

    @property
    def grain(self) -> float:
        """One question, as a fraction of all that the original answers right."""
        ...

    def refusal(self, choice: Choice) -> str | None:
        """Why a recipe cannot be planned, or None."""
        ...

    def quality(self, choice: Choice) -> float:
        """Questions answered right, as a fraction of the original's."""
        ...

    def costs(self, choices: Sequence[Choice], *, final: bool = False) -> list[Cost]:
        """Measure recipes in turn with the original; `final` with more rounds."""
        ...


@dataclass(frozen=True)
class Point:
    """A recipe that was asked."""

    choice: Choice
    quality: float  # of the original's right answers
    cost: Cost | None = None  # as it was measured last
    predicted: float | None = None  # ratio, of a combination

    @property
    def ratio(self) -> float:
        """Cost as a fraction of the original's: measured, or else predicted; infinite if neither is known."""
        if self.cost is not None:
            return self.cost.ratio
        return math.inf if self.predicted is None else self.predicted


@dataclass(frozen=True)
class Outcome:
    """What a search found, and what it did not try."""

    points: dict[Choice, Point]  # in the order of asking
    single: Choice  # the cheapest single cut that keeps the answers
    winner: Choice  # the cheapest of all; may be the single one
    final: dict[Choice, Cost]  # of the last rounds, single and winner among them
    refused: dict[Choice, str]  # by a plan, with the reason
    beyond: tuple[Choice, ...]  # not asked: a part of it failed
    dear: tuple[Choice, ...]  # not asked: not predicted to cost less than what it grew from
    left: tuple[Choice, ...]  # not asked: the time was over

    @property
    def gain(self) -> float:
        """Cost of the winner as a fraction of the single cut's, from the same rounds."""
        return self.final[self.winner].ratio / self.final[self.single].ratio


def search(
    axes: Sequence[Axis],
    judge: Judge,
    *,
    least: float,
    width: int,
    over: Callable[[], bool] = lambda: False,
    progress: Progress = lambda _: None,
) -> Outcome:
    """Find the cheapest recipe that answers at least `least` of what the original answers.

    Args:
        least: the constraint, 0 < least <= 1.
        width: recipes in the beam.
        over: whether the time is over. Checked before a recipe is asked; what was asked is measured all the same.

    Raises:
        VlmcutError: no cut keeps the answers, or none that does costs less than the original.
    """
    return _Search(axes, judge, least, width, over, progress).run()


def within(choice: Choice, part: Choice) -> bool:
    """Whether a recipe cuts all that `part` cuts, as strongly or more."""
    mine = dict(choice)
    return all(mine.get(axis, -1) >= level for axis, level in part)


class _Search:
    def __init__(
        self,
        axes: Sequence[Axis],
        judge: Judge,
        least: float,
        width: int,
        over: Callable[[], bool],
        progress: Progress,
    ) -> None:
        self.axes, self.judge, self.least, self.width = axes, judge, least, width
        self.over, self.progress = over, progress
        self.points: dict[Choice, Point] = {}
        self.alone: dict[Choice, Cost] = {}  # what single cuts cost in the first rounds, all together
        self.rungs: dict[int, list[int]] = {}  # levels of each axis that keep the answers alone and cost less
        self.refused: dict[Choice, str] = {}
        self.failed: list[Choice] = []
        self.beyond: dict[Choice, None] = {}
        self.dear: dict[Choice, None] = {}
        self.left: dict[Choice, None] = {}

    def run(self) -> Outcome:
        final = self._final(self._combine(self._singles()))
        winner, single = (
            min((c for c in final if len(c) <= most), key=lambda c: (final[c].ratio, len(c), c))
            for most in (len(self.axes), 1)
        )
        dear = tuple(c for c in self.dear if c not in self.points)  # another parent may have paid for it
        return Outcome(self.points, single, winner, final, self.refused, tuple(self.beyond), dear, tuple(self.left))

    def _singles(self) -> Choice:
        every: list[Choice] = [
            ((axis, level),) for axis, one in enumerate(self.axes) for level in range(len(one.levels))
        ]
        for number, choice in enumerate(every, start=1):
            self._ask(choice, f"single {number}/{len(every)}")
        cuts = [c for c in self.points if not self._baseline(c)]
        passed = [c for c in cuts if self._passes(c)]
        if not passed:
            raise self._nothing(cuts)
        self._measure([*passed, *(c for c in self.points if self._baseline(c))])
        self.alone = {c: cost for c in passed if (cost := self.points[c].cost) is not None}
        paying = [c for c in passed if self.points[c].ratio < 1]
        best = self._cheapest(paying or passed)
        if not paying:
            raise VlmcutError(
                f"no single cut that keeps {self.least:g} of the original's right answers costs less than the "
                f"original; the cheapest, {text(self.axes, best)}, costs {self.points[best].ratio:.3f} of it",
                hint="lower --min-quality, or choose another --objective",
            )
        for ((axis, level),) in paying:
            self.rungs.setdefault(axis, []).append(level)
        return best

    def _nothing(self, cuts: Sequence[Choice]) -> VlmcutError:
        best = max(cuts, key=lambda c: self.points[c].quality, default=None)
        if best is None:
            return VlmcutError(
                f"nothing was asked: {len(self.refused)} cuts do not apply, and the time was over for {len(self.left)}",
                hint="give more --minutes, or other --methods",
            )
        late = f" (the time was over before {len(self.left)} others were asked)" if self.left else ""
        return VlmcutError(
            f"no single cut keeps {self.least:g} of the original's right answers; the best, {text(self.axes, best)}, "
            f"keeps {self.points[best].quality:.4f}{late}",
            hint=f"choose --min-quality {math.floor(self.points[best].quality * 1e4) / 1e4:g} or less",
        )

    def _combine(self, best: Choice) -> Choice:
        front = self._few([((axis, level),) for axis, levels in self.rungs.items() for level in levels])
        depth = 1
        while front:
            depth += 1
            children = dict.fromkeys(c for parent in front for c in self._grown(parent))
            order = sorted((c for c in children if c not in self.points), key=lambda c: (self._predict(c), c))
            for number, choice in enumerate(order, start=1):
                self._ask(choice, f"combining, round {depth - 1}, {number}/{len(order)}")
            front = self._few([c for c in order if c in self.points and self._passes(c)])
            if front:
                self._measure([best, *front])
                best = self._cheapest([best, *front])
        return best

    def _final(self, best: Choice) -> dict[Choice, Cost]:
        """The cheapest combinations and the cheapest single cuts, measured together once more."""
        passed = [c for c in self.points if self._passes(c) and not self._baseline(c)]
        hopeful = [c for c in passed if self.points[c].cost is None and self.points[c].ratio < self.points[best].ratio]
        hopeful = sorted(hopeful, key=self._order)[: self.width]
        if hopeful:
            self._measure([best, *hopeful])
        measured = sorted((c for c in passed if self.points[c].cost is not None), key=self._order)
        alone, combined = ([c for c in measured if (len(c) == 1) == one][: self.width] for one in (True, False))
        finalists = [*alone, *combined]
        self.progress(f"the best {len(finalists)} once more, in longer rounds")
        found = dict(zip(finalists, self.judge.costs(finalists, final=True), strict=True))
        for choice, cost in found.items():
            self.points[choice] = replace(self.points[choice], cost=cost)
        return found

    def _grown(self, parent: Choice) -> Iterable[Choice]:
        """One level more of one axis, of those that keep the answers alone."""
        has = dict(parent)
        slots = {self.axes[axis].slot for axis in has} - {""}
        for axis, levels in self.rungs.items():
            higher = [level for level in levels if level > has.get(axis, -1)]
            if not higher or (axis not in has and self.axes[axis].slot in slots):
                continue
            child = tuple(sorted((has | {axis: higher[0]}).items()))
            if self._predict(child) < self._predict(parent):
                yield child
            else:
                self.dear[child] = None

    def _ask(self, choice: Choice, where: str) -> None:
        reason = self.judge.refusal(choice)
        if reason is not None:
            self.refused[choice] = reason
        elif any(within(choice, bad) for bad in self.failed):
            self.beyond[choice] = None
        elif self.over():
            self.left[choice] = None
        else:
            self.progress(f"{where}: {text(self.axes, choice)}")
            quality = self.judge.quality(choice)
            self.points[choice] = Point(choice, quality, None, self._predict(choice) if len(choice) > 1 else None)
            if not self._passes(choice) and not self._baseline(choice):
                self.failed.append(choice)

    def _measure(self, choices: Sequence[Choice]) -> None:
        for choice, cost in zip(choices, self.judge.costs(choices), strict=True):
            self.points[choice] = replace(self.points[choice], cost=cost)

    def _predict(self, choice: Choice) -> float:
        """Ratio, from what each cut alone left of each part of the original's cost."""
        parts = list(self.judge.whole)
        for cut in choice:
            left = self.alone[(cut,)].parts
            parts = [p * c / w for p, c, w in zip(parts, left, self.judge.whole, strict=True)]
        return sum(parts)

    def _few(self, choices: Sequence[Choice]) -> list[Choice]:
        """The cheapest, and those that saved most for each question lost: `width` together."""
        found = dict.fromkeys([self._cheapest(choices)] if choices else [])
        for choice in sorted(choices, key=lambda c: (-self._saved(c), *self._order(c))):
            if len(found) < self.width:
                found[choice] = None
        return list(found)

    def _saved(self, choice: Choice) -> float:
        point = self.points[choice]
        return (1 - point.ratio) / (max(0.0, 1 - point.quality) + self.judge.grain)

    def _cheapest(self, choices: Sequence[Choice]) -> Choice:
        return min(choices, key=self._order)

    def _order(self, choice: Choice) -> tuple[float, int, Choice]:
        return self.points[choice].ratio, len(choice), choice

    def _passes(self, choice: Choice) -> bool:
        return self.points[choice].quality >= self.least

    def _baseline(self, choice: Choice) -> bool:
        return any(self.axes[axis].baseline for axis, _ in choice)
