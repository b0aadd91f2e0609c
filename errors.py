"""The errors a user can meet; each says what, where, both numbers, and the fix as a hint."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VlmcutError(Exception):
    """An expected failure: bad input, an unsupported model, or numbers that do not agree. Exit code 1."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class ModelError(VlmcutError):
    """A model folder that cannot be read, or whose layout no reader understands."""


class PassError(VlmcutError):
    """A recipe or a pass that cannot do what it was asked."""


class ExportError(VlmcutError):
    """A graph or an engine that could not be made."""


class BundleError(VlmcutError):
    """A bundle that is incomplete, damaged or asked for more than its budgets hold."""


class ParityError(VlmcutError):
    """The exported graphs do not compute what the cut eager model computes."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt `name`: the closest of `known`, or all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean `{close[0]}`?" if close else f"known: {', '.join(names)}"
