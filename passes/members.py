"""What `drop-heads` and `drop-neurons` have in common: of the members of every layer of a part, the least important go.

Layers are ranked one by one, or together: by numbers that mean the same in every layer as they are, by others over the
layer's mean.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import Tensor

from ..errors import PassError, nearest
from ..surgery.anatomy import Anatomy
from .base import Pass, check_part, rounding
from .calibration import MEASURED, Calibration
from .importance import RANKINGS, best_of_all, best_of_each, over_mean, spread


@dataclass(frozen=True, kw_only=True)
class DropMembers(Pass):
    """Drop a fraction of the members of one part, or keep exactly the listed ones."""

    importances: ClassVar[Mapping[str, bool]]  # how they may be measured, and whether that compares between layers
    numbered: ClassVar[str]  # the field of `Idle` that names them by number

    part: str  # vision or language
    fraction: float  # of the members removed, 0 <= fraction < 1; rounded to whole ones
    keep: tuple[tuple[int, ...], ...] | None = None  # kept members per layer; measured when absent
    ranking: str = "layer"  # layer: every layer loses the same fraction; global: layers are ranked together
    importance: str = "activation"  # how it is measured

    @property
    @abstractmethod
    def _kind(self) -> str:
        """What its members are called, in the plural."""

    @abstractmethod
    def _members(self, a: Anatomy) -> tuple[int, ...]:
        """How many each layer has; 0 where it has none."""

    @abstractmethod
    def _why_none(self, a: Anatomy) -> str | None:
        """Why no member of this part can go; None if any can."""

    @abstractmethod
    def _with(self, a: Anatomy, left: tuple[int, ...]) -> Anatomy:
        """The anatomy with so many in each layer."""

    @abstractmethod
    def _left_out(self, a: Anatomy) -> tuple[int, str]:
        """What `loss` leaves out one by one: how many, and what they are called."""

    @abstractmethod
    def _measure(self, model: Any, a: Anatomy, calibration: Calibration) -> list[Tensor]:
        """The importance of each member, float64 [members] for each layer."""

    def plan(self, a: Anatomy) -> Anatomy:
        check_part(self.name, self.part)
        for what, given, known in (
            ("ranking", self.ranking, RANKINGS),
            ("importance", self.importance, self.importances),
        ):
            if given not in known:
                raise PassError(f"{self.name}: no {what} `{given}`", hint=nearest(given, known))
        if (why := self._why_none(a)) is not None:
            raise PassError(f"{self.name}: {why}")
        if self.part in a.quantized:  # its scales, one per row, would not follow
            raise PassError(f"{self.name}: {self.part} is int8 already", hint="put quantize last")
        if self.part == "language" and (numbered := getattr(a.idle, self.numbered)):
            raise PassError(
                f"{self.name}: visual tokens use {self.numbered} of {len(numbered)} layers that are named by number",
                hint=f"put {self.name} before slim-visual",
            )
        if not 0 <= self.fraction < 1:
            raise PassError(
                f"{self.name}: fraction={self.fraction} of the {self.part} {self._kind}",
                hint="choose 0 <= fraction < 1",
            )
        left = self._left(self._members(a))
        return self._with(a, left if self.keep is None else self._kept(self.keep, self._members(a), left))

    def _left(self, members: tuple[int, ...]) -> tuple[int, ...]:
        """How many stay in each layer; where only their sum is known before they are measured, spread evenly."""
        some = [n for n in members if n]
        total, least = (sum(some), len(some)) if self.ranking == "global" else (min(some), 1)
        left = total - round(total * self.fraction)
        if left < least:
            layers = f" for {least} layers" if self.ranking == "global" else ""
            raise PassError(
                f"{self.name}: fraction={self.fraction} leaves {left} of {total} {self.part} {self._kind}{layers}",
                hint=f"choose at most {math.floor((total - least) / total * 1e4) / 1e4}",
            )
        if self.ranking == "global":
            return spread(left, members)
        return tuple(n - round(n * self.fraction) for n in members)

    def _kept(
        self, keep: tuple[tuple[int, ...], ...], members: tuple[int, ...], left: tuple[int, ...]
    ) -> tuple[int, ...]:
        """How many `keep` names in each layer."""
        counts = tuple(len(k) for k in keep)
        legal = len(counts) == len(members) and all(
            len(set(k)) == len(k) and set(k) <= set(range(n)) and bool(k) == (n > 0)
            for k, n in zip(keep, members, strict=True)
        )
        if not legal or (counts != left if self.ranking == "layer" else sum(counts) != sum(left)):
            stay = list(left) if self.ranking == "layer" else f"{sum(left)} in all"
            raise PassError(
                f"{self.name}: keep lists {list(counts)} {self._kind} per layer, fraction={self.fraction} of "
                f"{list(members)} leaves {stay}",
                hint="leave `keep` out to have it measured",
            )
        return counts

    def notes(self, a: Anatomy) -> list[str]:
        found = []
        if self.ranking == "layer":
            found += rounding(self.part, self.fraction, max(self._members(a), default=0), self._kind)
        else:
            found.append(
                f"{self.part}: layers keep different numbers of {self._kind}, which only vlmcut.load reads back"
            )
            if self.keep is None:
                found.append(f"{self.part}: which layer loses how many is measured; the plan spreads them evenly")
        if self.importance == "loss" and self.keep is None:
            count, what = self._left_out(a)
            found.append(
                f"{self.part}: each of {count} {what} is left out once: {count + 1} answers to each calibration prompt "
                f"({MEASURED} at most)"
            )
        return found

    @property
    def needs_calibration(self) -> bool:
        return self.keep is None

    def resolve(self, model: Any, a: Anatomy, calibration: Calibration) -> Self:
        if self.keep is not None:
            return self
        importance = self._measure(model, a, calibration)
        left = self._members(self.plan(a))
        if self.ranking == "layer":
            return replace(self, keep=best_of_each(importance, left))
        comparable = importance if self.importances[self.importance] else over_mean(importance)
        return replace(self, keep=best_of_all(comparable, sum(left)))
