"""What a method is: a row that composes pieces. Adding one is one row and at most one new piece."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from ...errors import PassError, nearest
from ...manifest import Bucket
from ...surgery.anatomy import Anatomy
from ...surgery.selection import Choice, Rows, TowerState
from .learned.weights import Learned

Options = Mapping[str, Any]  # every option of a method has a value; `seed` is always there
Refusal = tuple[str, str]  # the cause with both numbers, and the fix


@dataclass(frozen=True)
class Place:
    """Where a method is asked to work: what `plan` knows of it."""

    anatomy: Anatomy
    bucket: Bucket
    tokens: int  # that compete: of one tile with pool = "tile", without line breaks that do not compete
    keep: int  # of them
    panels: int  # rasters that they lie in
    frames: int = 1  # images that they belong to


@dataclass(frozen=True)
class Inside:
    """How tokens leave the tower between attention and MLP of its blocks."""

    leaving: Callable[[int, int, int, Options], tuple[int, ...]]  # of tokens, keep, blocks: how many in each block
    step: Callable[[Rows, int, Options], Rows]  # of rows, how many leave: what goes on


def no_row(tokens: int, keep: int, options: Options) -> int:
    """Nothing behind the projector is looked at."""
    return 0


def every_row(tokens: int, keep: int, options: Options) -> int:
    """All tokens are looked at behind the projector."""
    return tokens


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row of the table. `choose` composes pieces from what a state offers."""

    title: str  # as the paper calls it
    source: str  # arXiv number, or where it comes from
    summary: str
    choose: Callable[[TowerState, int, Options], Choice]
    inside: Inside | None = None  # for a method that works in the tower; `choose` is not asked
    options: Options = field(default_factory=dict)  # name -> default, whose type is the option's
    blocks: Callable[[Sequence[int], Options], Sequence[int]] | None = None  # tower blocks that it scores by
    grid: bool = False  # needs tokens in whole rows of a raster
    text: bool = False  # depends on the question: a new question about the same picture needs a new look at it
    frames: bool = False  # compares the frames of a clip: needs two or more
    merges: bool = False  # makes tokens of several
    projects: Callable[[int, int, Options], int] = no_row  # of tokens, keep: rows projected to be looked at
    module: type[Learned] | None = None  # what its weights make; option `weights` names their file
    refuse: Callable[[Place, Options], Refusal | None] = lambda place, options: None
    without_cls: str | None = None  # what it does on a tower without [CLS]
    differs: str = ""  # from the paper

    @property
    def compresses(self) -> bool:
        """Whether it makes tokens of the language model's width itself, in the place of the projector."""
        return self.module is not None and self.merges

    @property
    def stage(self) -> str:
        """Where it cuts."""
        if self.inside is not None:
            return "inside the tower"
        return "grid" if self.grid and self.merges else "after the encoder"


def last(scored: Sequence[int], options: Options) -> Sequence[int]:
    """The last block that runs."""
    return scored[-1:]


class _Row(Protocol):
    @property
    def options(self) -> Options: ...


Row = TypeVar("Row", bound=_Row)


def parse(spec: str, methods: Mapping[str, Row], where: str) -> tuple[Row, dict[str, Any]]:
    """`name:option=value:…` -> the row and its options, each with a value.

    Raises:
        PassError: an unknown method or option, or a value of another type.
    """
    name, *given = re.split(r":(?=[a-z_]*=|[^:/\\\\]*$)", spec)  # a value may be a path with a colon
    if name not in methods:
        raise PassError(f"{where}: no method `{name}`", hint=nearest(name, methods))
    row = methods[name]
    options = dict(row.options)
    for pair in given:
        key, equals, value = pair.partition("=")
        if key not in options:
            known = nearest(key, options) if options else f"`{name}` takes no options"
            raise PassError(f"{where}: `{name}` has no option `{key}`", hint=known)
        options[key] = _typed(value if equals else "", options[key], f"{where}: `{name}` option {key}")
    return row, options


def _typed(value: str, default: Any, where: str) -> Any:
    if isinstance(default, bool):
        if value not in ("true", "false"):
            raise PassError(f"{where} = {value!r} is not true or false", hint=f"the default is {str(default).lower()}")
        return value == "true"
    try:
        return type(default)(value)
    except ValueError as error:
        kind = type(default).__name__
        raise PassError(f"{where} = {value!r} is not of type {kind}", hint=f"the default is {default}") from error
