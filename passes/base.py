"""What every pass is: a frozen dataclass whose fields are its recipe keys."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from ..errors import PassError
from ..surgery.anatomy import Anatomy
from .calibration import Calibration


@dataclass(frozen=True, kw_only=True)
class Pass(ABC):
    """One cut. `plan` is arithmetic and refuses; `resolve` measures; `apply` is dumb."""

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]  # paper or origin

    @abstractmethod
    def plan(self, a: Anatomy) -> Anatomy:
        """The anatomy after this pass. Raises PassError with both numbers if it cannot be done."""

    @property
    def needs_calibration(self) -> bool:
        """Whether `resolve` must look at data; False once it has."""
        return False

    def resolve(self, model: Any, a: Anatomy, calibration: Calibration) -> Self:
        """The same pass with every decision written out, so that `apply` needs no data. Neutral by default."""
        return self

    @abstractmethod
    def apply(self, model: Any, a: Anatomy) -> None:
        """Edit the model in place; `describe` must then equal `plan`."""

    def notes(self, a: Anatomy) -> list[str]:
        """What the user should know about this pass on this model."""
        return []


def keys(kind: type[Pass]) -> tuple[str, ...]:
    """What a recipe says of a pass: the fields that tell two of them apart."""
    return tuple(f.name for f in fields(kind) if f.compare)


PARTS = ("vision", "language")


def rounding(part: str, fraction: float, most: int, kind: str) -> list[str]:
    """What the user should know of a fraction that is no whole number of heads or neurons; nothing if it is one."""
    removed, exact = round(most * fraction), most * fraction
    if removed == exact:
        return []
    return [f"{part}: {fraction} of {most} {kind} is {exact:g}; {removed} are removed in every layer"]


def check_part(name: str, part: str) -> None:
    """Refuse a part that is not vision or language."""
    if part not in PARTS:
        raise PassError(f"{name}: part={part!r} is not a part", hint="choose `vision` or `language`")
