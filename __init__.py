"""vlmcut: make a Hugging Face vision-language model small and fast, and prove that it is still the same model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .api import convert, inspect
    from .passes.folder import load
    from .runtime.adaptive import Adaptive
    from .runtime.bundle import Bundle
    from .validation.verify import verify

_HOMES = {
    "convert": ".api",
    "inspect": ".api",
    "load": ".passes.folder",
    "verify": ".validation.verify",
    "Bundle": ".runtime.bundle",
    "Adaptive": ".runtime.adaptive",
}
__all__ = ["Adaptive", "Bundle", "__version__", "convert", "inspect", "load", "verify"]


def __getattr__(name: str) -> Any:
    """Import lazily: `vlmcut.Bundle` needs no torch, `vlmcut --help` needs nothing."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module `vlmcut` has no attribute `{name}`")
