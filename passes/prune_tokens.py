"""Keep a fixed number of visual tokens per image: the pass that makes prefill, KV cache and decode smaller.

The choice lives in the vision graph with a constant k, so every later shape is static. Positions are compact: the
language model sees a shorter image, as in every method that cuts before it (methods.md 1.4).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..errors import PassError, nearest
from ..surgery.anatomy import Anatomy
from ..surgery.load import locate
from ..surgery.selection import TokenSelection
from .base import Pass
from .tokens.methods import METHODS, TableSelector


def kept_tokens(tokens: int, ratio: float) -> int:
    """Tokens left when `ratio` of them are removed: max(1, round(tokens (1 - ratio)))."""
    return max(1, round(tokens * (1 - ratio)))


@dataclass(frozen=True, kw_only=True)
class PruneTokens(Pass):
    """Keep `keep` visual tokens of each image, chosen by `method`."""

    name: ClassVar[str] = "prune-tokens"
    summary: ClassVar[str] = "keep a fixed number of visual tokens per image, between vision tower and projector"
    source: ClassVar[str] = "see the methods"

    keep: int  # tokens per image
    method: str = "fastervlm"
    seed: int = 0  # of method `random`

    def plan(self, a: Anatomy) -> Anatomy:
        if self.method not in METHODS:
            raise PassError(f"{self.name}: no method `{self.method}`", hint=nearest(self.method, METHODS))
        if self.seed < 0:
            raise PassError(f"{self.name}: seed={self.seed}", hint="choose 0 or more")
        if a.method is not None:
            raise PassError(
                f"{self.name}: the model already keeps {a.keep} of {a.visual_tokens} tokens by `{a.method}`",
                hint="prune tokens once, from the original model",
            )
        if not 1 <= self.keep <= a.visual_tokens:
            raise PassError(
                f"{self.name}: keep={self.keep}, but `{a.family}` makes {a.visual_tokens} visual tokens per image",
                hint=f"choose 1 to {a.visual_tokens}",
            )
        if a.tower.layers != a.tower.feature_layer:  # the selection stands behind the last layer
            raise PassError(
                f"{self.name}: the tower has {a.tower.layers} layers, its features come after {a.tower.feature_layer}",
                hint="put trim-tower first",
            )
        return replace(a, keep=self.keep, method=self.method)

    def notes(self, a: Anatomy) -> list[str]:
        substitute = METHODS[self.method].without_cls
        return [f"{self.method}: {substitute}"] if substitute and not a.tower.has_cls else []

    def apply(self, model: Any, a: Anatomy) -> None:
        parts = locate(model)
        model.model.vision_tower = TokenSelection(
            parts.tower, parts.projector, TableSelector(self.method, self.seed), self.keep, a.tower.has_cls
        )
