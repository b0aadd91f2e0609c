"""What a sweep will try, by arithmetic alone: methods and baselines, each at every budget, and what does not apply."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from ..errors import PassError
from ..passes.prune_tokens import PruneTokens, kept_tokens
from ..passes.tokens.method import Method, parse
from ..passes.tokens.methods import METHODS
from ..passes.trim_tower import TrimTower
from ..surgery.anatomy import Anatomy
from ..surgery.load import describe
from ..surgery.selection import Selection, attached

ORIGINAL = "original"
BASELINES = ("random", "uniform")
DRAWS = frozenset({"random"})  # methods that differ from seed to seed
PRUNE = (0.5, 0.75, 0.9)

Keep = tuple[int, ...]  # visual tokens of an image of each bucket
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Cell:
    """One method, with its options, at one budget."""

    method: str
    keep: Keep

    def step(self, seed: int = 0) -> PruneTokens:
        """The pass that it stands for."""
        return PruneTokens(keep=self.keep, method=self.method, seed=seed)

    @property
    def row(self) -> Method:
        """The method's row in the table."""
        return METHODS[_name(self.method)]

    @property
    def draws(self) -> bool:
        """Whether it differs from seed to seed."""
        return _name(self.method) in DRAWS

    @property
    def text(self) -> str:
        """In words."""
        return f"{self.method}, {label(self.keep)} tokens"


def _name(method: str) -> str:
    return method.partition(":")[0]


@dataclass(frozen=True)
class Refused:
    """A method that does not apply, at one budget or (None) at all of them."""

    method: str
    keep: Keep | None
    reason: str


@dataclass(frozen=True)
class Design:
    """What a sweep will do, by arithmetic alone."""

    tokens: Keep  # before pruning
    keeps: tuple[Keep, ...]
    cells: tuple[Cell, ...]  # by budget, the baselines first
    refused: tuple[Refused, ...]


def design(a: Anatomy, methods: Sequence[str] = (), *, prune: Sequence[float] = (), keep: Sequence[int] = ()) -> Design:
    """What to try on a model.

    Args:
        methods: names with options; none for every method. The baselines are always among them.
        prune: fractions of the visual tokens that are removed; `PRUNE` if nothing is said.
        keep: tokens per image, instead.

    Raises:
        PassError: an unknown method or option, a budget out of range or named twice, a model that is pruned already.
    """
    for spec in methods:
        parse(spec, METHODS, "--methods")
    if a.method is not None:
        raise PassError(f"the model already keeps tokens by `{a.method}`", hint="sweep the original model")
    tokens = tuple(bucket.tokens for bucket in a.buckets)
    keeps = _keeps(a, tokens, prune, keep)
    specs = dict.fromkeys((*BASELINES, *(methods or METHODS)))
    trimmed = TrimTower().plan(a)
    cells, refused = [], []
    for budget in keeps:
        for spec in specs:
            cell = Cell(spec, budget)
            try:
                cell.step().plan(trimmed)
                cells.append(cell)
            except PassError as error:
                hint = f" ({error.hint})" if error.hint else ""
                refused.append(Refused(spec, budget, str(error).removeprefix(f"{PruneTokens.name}: ") + hint))
    return Design(tokens, keeps, tuple(cells), _joined(refused, len(keeps)))


def _keeps(a: Anatomy, tokens: Keep, prune: Sequence[float], keep: Sequence[int]) -> tuple[Keep, ...]:
    if prune and keep:
        raise PassError("--prune and --keep are both given", hint="give one of them")
    for ratio in prune:
        if not 0 < ratio < 1:
            raise PassError(
                f"--prune {ratio:g} is not a fraction of the tokens to remove",
                hint="choose 0 < R < 1, for example 0.75 to keep a quarter",
            )
    for count in keep:
        if not 1 <= count < a.visual_tokens:
            raise PassError(
                f"--keep {count}: `{a.family}` makes {a.visual_tokens} visual tokens of an image of {a.smallest.name} "
                "pixels",
                hint=f"choose 1 to {a.visual_tokens - 1}",
            )
    flag, given = ("--keep", keep) if keep else ("--prune", prune or PRUNE)
    keeps = [
        (x,) * len(tokens) if isinstance(x, int) else tuple(kept_tokens(count, x) for count in tokens) for x in given
    ]
    if len(set(keeps)) < len(keeps):
        counts = ", ".join(label(k) for k in keeps)
        raise PassError(
            f"{flag} {','.join(f'{x:g}' for x in given)} keeps {counts} tokens", hint="name each count once"
        )
    return tuple(keeps)


def _joined(refused: Sequence[Refused], budgets: int) -> tuple[Refused, ...]:
    """One entry for a method that no budget suits, for the reason at the first."""
    found: dict[str, list[Refused]] = {}
    for one in refused:
        found.setdefault(one.method, []).append(one)
    return tuple(
        one for each in found.values() for one in ([replace(each[0], keep=None)] if len(each) == budgets else each)
    )


def label(keep: Keep) -> str:
    """A budget in words: 36, or 36/72 of buckets."""
    return "/".join(map(str, keep)) if len(set(keep)) > 1 else str(keep[0])


@contextmanager
def applied(model: Any, cell: Cell | None, seed: int = 0) -> Iterator[Selection | None]:
    """While inside, a trimmed model keeps what this cell says."""
    about = attached(model)
    before = about.selection
    try:
        if cell is not None:
            cell.step(seed).apply(model, describe(model))
        yield about.selection
    finally:
        about.selection = before
