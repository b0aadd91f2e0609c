"""What a method inside the language model is: a row that composes pieces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ...manifest import Rung
from ...surgery.anatomy import Anatomy
from ...surgery.inside import Going, LayerState
from ..calibration import Calibration
from ..tokens.method import Options

Usual = tuple[tuple[float, float], ...]  # depth, as a fraction of the layers, and share of the tokens that stay


def usual_ladder(usual: Usual, layers: int, levels: int = 0) -> tuple[Rung, ...]:
    """The ladder of a method where nobody gives one: the paper's, scaled to the depth, behind the last DeepStack level.

    Where two rungs meet in a shallow model, the later one stands a layer higher.
    """
    found: list[Rung] = []
    for depth, share in usual:
        least = max(1, levels, found[-1].layer + 1 if found else 0)
        found.append(Rung(max(least, round(depth * layers)), share))
    return tuple(found)


@dataclass(frozen=True)
class Measured:
    """How a method finds its ladder on calibration prompts, where nobody gives one and an option is not 0."""

    option: str
    expect: Callable[[Anatomy, Options], tuple[Rung, ...]]  # by arithmetic, before it is measured; refuses
    find: Callable[[Any, Anatomy, Calibration, Options], tuple[Rung, ...]]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row of the table. `choose` composes pieces from what a state offers; a method without it keeps no token."""

    title: str  # as the paper calls it
    source: str  # arXiv number, or where it comes from
    summary: str
    choose: Callable[[LayerState, int, Options], Going] | None
    usual: Usual  # where nobody gives a ladder: the paper's, scaled to the depth
    options: Options = field(default_factory=dict)  # name -> default, whose type is the option's
    measured: Measured | None = None
    before: bool = False  # whether it wants queries and keys of the layer before the rung
    neurons: bool = False  # whether it wants the neurons of that layer's MLP
    ranked: bool = True  # its choice of few is the head of its choice of many; if not, prompts have one image
    differs: str = ""  # from the paper
