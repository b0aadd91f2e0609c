"""Which token ids a model has rows for: what the planner counts, the graphs look up and the torch-free runner checks.

Ids outside the model never change. Row i of a cut model belongs to the i-th kept id.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .errors import BundleError

LOW = -1e4  # the logit of an id without a row; the same number in float16, float32 and float64
_RUN = re.compile(r"[0-9]{1,12}(-[0-9]{1,12})?")


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The ids that kept their row."""

    size: int  # ids before the cut, V: the width of the logits, which does not change
    kept: str  # the V' ids that have a row, ascending, as runs: "0-511,600"
    unknown: int | None = None  # the id whose row serves those without one; None: a prompt that has one is refused

    @cached_property
    def ids(self) -> np.ndarray:
        """The kept ids in row order, int64 [V'].

        Raises:
            ValueError: `kept` is not ascending runs of ids below `size`, or `unknown` is none of them.
        """
        ids = read_runs(self.kept, self.size)
        if self.unknown is not None and self.unknown not in ids:
            raise ValueError(f"token {self.unknown} stands for unknown ones and is not kept")
        return ids

    @cached_property
    def rows(self) -> np.ndarray:
        """The row of each id, int64 [V]; V', one behind the last row, for an id that has none."""
        rows = np.full(self.size, len(self.ids), np.int64)
        rows[self.ids] = np.arange(len(self.ids))
        return rows

    @property
    def readable(self) -> np.ndarray:
        """The ids that a prompt may have, int64: the kept ones, or all where one of them serves the others."""
        return self.ids if self.unknown is None else np.arange(self.size)

    def check(self, ids: np.ndarray, text: Callable[[int], str] | None = None) -> None:
        """Refuse ids that the model cannot read, int64 of any shape.

        Args:
            text: what an id says, for the message.

        Raises:
            BundleError: naming the first one.
        """
        missing = ids[~np.isin(ids, self.readable)]
        if len(missing):
            first = int(missing[0])
            says = "" if text is None else f" {text(first)!r}"
            raise BundleError(
                f"{len(missing)} of the prompt's tokens have no row in this model, first{says} (id {first}); "
                f"{len(self.ids):,} of {self.size:,} ids have one",
                hint="word it otherwise, or cut again: a larger size, a corpus with these words, "
                'or unseen = "unknown" (docs/recipes.md, trim-vocabulary)',
            )


def write_runs(ids: Sequence[int] | np.ndarray) -> str:
    """Ascending ids as text, neighbours as a run: [0, 1, 2, 5] is "0-2,5"."""
    found = np.asarray(ids, np.int64)
    runs = np.split(found, np.flatnonzero(np.diff(found) != 1) + 1)
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def read_runs(text: str, size: int) -> np.ndarray:
    """The ids that `write_runs` wrote, int64.

    Args:
        size: ids are below it.

    Raises:
        ValueError: another form, ids that do not ascend, or one that is too large.
    """
    last, found = -1, []
    for run in text.split(","):
        if not _RUN.fullmatch(run):
            raise ValueError(f"`{run}` is no id and no run of ids such as 0-511")
        start, end = (int(run.split("-")[0]), int(run.split("-")[-1]))
        if not last < start <= end:
            raise ValueError(f"`{run}` stands behind {last}: ids ascend")
        if end >= size:
            raise ValueError(f"`{run}` is not below the {size} ids that there are")
        found.append(np.arange(start, end + 1))
        last = end
    return np.concatenate(found)
