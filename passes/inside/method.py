"""What a method inside the language model is: a row that composes pieces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ...surgery.inside import Going, LayerState
from ..tokens.method import Options

Usual = tuple[tuple[float, float], ...]  # depth, as a fraction of the layers, and share of the tokens that stay


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row of the table. `choose` composes pieces from what a state offers; a method without it keeps no token."""

    title: str  # as the paper calls it
    source: str  # arXiv number, or where it comes from
    summary: str
    choose: Callable[[LayerState, int, Options], Going] | None
    usual: Usual  # where nobody gives a ladder: the paper's, scaled to the depth
    options: Options = field(default_factory=dict)  # name -> default, whose type is the option's
    before: bool = False  # whether it wants queries and keys of the layer before the rung
    ranked: bool = True  # its choice of few is the head of its choice of many; if not, prompts have one image
    differs: str = ""  # from the paper
