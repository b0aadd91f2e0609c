"""Keep a fixed number of visual tokens per image: the pass that makes prefill, KV cache and decode smaller.

The choice lives in the vision graph with a constant k, so every later shape is static. Positions are those of a shorter
prompt, as in every method that cuts before the language model; with M-RoPE (Qwen) they are gathered from the full one,
so that a token keeps its place in the picture.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..errors import PassError, nearest
from ..surgery.anatomy import Anatomy
from ..surgery.selection import LINE_BREAKS, Selection, attached
from .base import Pass
from .tokens.methods import METHODS, TableSelector


def kept_tokens(tokens: int, ratio: float) -> int:
    """Tokens left when `ratio` of them are removed: max(1, round(tokens (1 - ratio)))."""
    return max(1, round(tokens * (1 - ratio)))


@dataclass(frozen=True, kw_only=True)
class PruneTokens(Pass):
    """Keep `keep` visual tokens of each image, chosen by `method`.

    `line_breaks` says what becomes of the newline tokens that LLaVA-NeXT and LLaVA-OneVision put behind each row of
    tiles: `drop` them (HiRED, arXiv:2408.10945, and most ports), `keep` them all, counted in `keep` (FasterVLM,
    arXiv:2412.01818, which does not count them), or let them `compete` as any other token.
    """

    name: ClassVar[str] = "prune-tokens"
    summary: ClassVar[str] = "keep a fixed number of visual tokens per image, before they enter the language model"
    source: ClassVar[str] = "see the methods"

    keep: int | tuple[int, ...]  # tokens per image; one number for every bucket, or one for each
    method: str = "fastervlm"
    seed: int = 0  # of method `random`
    line_breaks: str = "drop"

    def plan(self, a: Anatomy) -> Anatomy:
        if self.method not in METHODS:
            raise PassError(f"{self.name}: no method `{self.method}`", hint=nearest(self.method, METHODS))
        if self.line_breaks not in LINE_BREAKS:
            raise PassError(
                f"{self.name}: no policy `{self.line_breaks}` for line breaks",
                hint=nearest(self.line_breaks, LINE_BREAKS),
            )
        if self.seed < 0:
            raise PassError(f"{self.name}: seed={self.seed}", hint="choose 0 or more")
        if a.method is not None:
            raise PassError(
                f"{self.name}: the model already keeps {_counts(a.keep)} of {_counts(b.tokens for b in a.buckets)} "
                f"tokens by `{a.method}`",
                hint="prune tokens once, from the original model",
            )
        if METHODS[self.method].attention and not a.scored:
            raise PassError(
                f"{self.name}: `{self.method}` scores tokens by attention in the vision tower, and vlmcut does not "
                f"know which attention of `{a.family}` belongs to which token",
                hint="use divprune, random or uniform",
            )
        keeps = (self.keep,) * len(a.buckets) if isinstance(self.keep, int) else self.keep
        if len(keeps) != len(a.buckets):
            raise PassError(
                f"{self.name}: keep names {len(keeps)} numbers for {len(a.buckets)} image sizes",
                hint="give one number, or one for each --image-size",
            )
        for keep, bucket, breaks in zip(keeps, a.buckets, a.breaks, strict=True):
            self._check(a, keep, bucket.tokens, breaks)
        if a.tower.layers != a.tower.feature_layer:  # tokens are scored in the last layer
            raise PassError(
                f"{self.name}: the tower still has {a.tower.layers} layers of which {a.tower.feature_layer} are used",
                hint="put trim-tower first",
            )
        return replace(a, keep=keeps, method=self.method)

    def _check(self, a: Anatomy, keep: int, tokens: int, breaks: int) -> None:
        if not 1 <= keep <= tokens:
            raise PassError(
                f"{self.name}: keep={keep}, but `{a.family}` makes {tokens} visual tokens per image",
                hint=f"choose 1 to {tokens}",
            )
        if keep == tokens:
            return
        least, most = (breaks + 1, tokens) if self.line_breaks == "keep" else (1, tokens)
        if self.line_breaks == "drop":
            most -= breaks
        if not least <= keep <= most:
            raise PassError(
                f"{self.name}: keep={keep} of {tokens} tokens, {breaks} of them line breaks, cannot be met with "
                f'line_breaks="{self.line_breaks}"',
                hint=f"choose {least} to {most}, or {tokens} for all",
            )

    def notes(self, a: Anatomy) -> list[str]:
        substitute = METHODS[self.method].without_cls
        found = [f"{self.method}: {substitute}"] if substitute and not a.tower.has_cls else []
        if any(a.breaks):
            found.append(f"line breaks between rows of tiles: {self.line_breaks}")
        return found

    def apply(self, model: Any, a: Anatomy) -> None:
        keep = self.plan(a).keep
        attached(model).selection = Selection(TableSelector(self.method, self.seed), keep, self.line_breaks)


def _counts(numbers: Iterable[int]) -> str:
    return "/".join(map(str, numbers))
