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
from ..manifest import Bucket
from ..surgery.anatomy import Anatomy
from ..surgery.load import locate
from ..surgery.merging import prove
from ..surgery.selection import LINE_BREAKS, Selection, attached, leaving, projected
from .base import Pass
from .tokens.learned import weights
from .tokens.method import Method, Options, Place, parse
from .tokens.methods import METHODS, POOLS, TableSelector


def kept_tokens(tokens: int, ratio: float) -> int:
    """Tokens left when `ratio` of them are removed: max(1, round(tokens (1 - ratio)))."""
    return max(1, round(tokens * (1 - ratio)))


def usual_method(a: Anatomy) -> str:
    """The method where nobody names one: [CLS] attention where there is [CLS], diversity elsewhere.

    Attention received from all tokens, the substitute for [CLS], did worse than random on examples/scenes-smol.
    """
    return "fastervlm" if a.tower.has_cls and a.scored else "divprune"


@dataclass(frozen=True, kw_only=True)
class PruneTokens(Pass):
    """Keep `keep` visual tokens of each image, chosen by `method`.

    `line_breaks` says what becomes of the newline tokens that LLaVA-NeXT and LLaVA-OneVision put behind each row of
    tiles: `drop` them (HiRED, arXiv:2408.10945, and most ports), `keep` them all, counted in `keep` (FasterVLM,
    arXiv:2412.01818, which does not count them), or let them `compete` as any other token.

    `pool` says who shares the budget of an image in tiles: all of them together (`image`), or each its own share of
    the same size (`tile`).
    """

    name: ClassVar[str] = "prune-tokens"
    summary: ClassVar[str] = "keep a fixed number of visual tokens per image, before they enter the language model"
    source: ClassVar[str] = "see the methods"

    keep: int | tuple[int, ...]  # tokens per image; one number for every bucket, or one for each
    method: str = "fastervlm"  # with options as name:option=value:…
    seed: int = 0  # of methods that draw
    line_breaks: str = "drop"
    pool: str = "image"

    def plan(self, a: Anatomy) -> Anatomy:
        row, options = parse(self.method, METHODS, self.name)
        for key, value, known in (("line_breaks", self.line_breaks, LINE_BREAKS), ("pool", self.pool, POOLS)):
            if value not in known:
                raise PassError(f"{self.name}: no policy `{value}` for {key}", hint=nearest(value, known))
        if self.seed < 0:
            raise PassError(f"{self.name}: seed={self.seed}", hint="choose 0 or more")
        if a.carriers:
            raise PassError(
                f"{self.name}: text sees each image through {a.carriers} of the {_counts(a.keep)} tokens that it has",
                hint="put prune-tokens before bottleneck",
            )
        if a.method is not None:
            raise PassError(
                f"{self.name}: the model already keeps {_counts(a.keep)} of {_counts(b.tokens for b in a.buckets)} "
                f"tokens by `{a.method}`",
                hint="prune tokens once, from the original model",
            )
        if a.idle.near:
            raise PassError(
                f"{self.name}: visual tokens look at their neighbours in layers {list(a.idle.near)}, and some would go",
                hint='put prune-tokens first, and take what = "apart"',
            )
        if row.frames and a.layout.frames == 1:
            raise PassError(
                f"{self.name}: `{self.method}` compares the frames of a clip, and here each of 1 image is seen alone",
                hint="add --frames F, the images in a row that are one clip",
            )
        if row.blocks is not None and not a.scored:
            raise PassError(
                f"{self.name}: `{self.method}` scores tokens by attention in the vision tower, and vlmcut does not "
                f"know which attention of `{a.family}` belongs to which token",
                hint="use divprune, random or uniform",
            )
        if row.blocks is not None and a.tower.layers != a.tower.feature_layer:  # the last block must be one that runs
            raise PassError(
                f"{self.name}: the tower still has {a.tower.layers} layers of which {a.tower.feature_layer} are used",
                hint="put trim-tower first",
            )
        keeps = (self.keep,) * len(a.buckets) if isinstance(self.keep, int) else self.keep
        if len(keeps) != len(a.buckets):
            raise PassError(
                f"{self.name}: keep names {len(keeps)} numbers for {len(a.buckets)} image sizes",
                hint="give one number, or one for each --image-size",
            )
        for keep, bucket in zip(keeps, a.buckets, strict=True):
            self._check(a, row, options, keep, bucket)
        selector = self._selector()
        return replace(
            a,
            keep=keeps,
            projected=projected(selector, a.buckets, keeps),
            method=self.method,
            query_dependent=row.text,
            leaving=leaving(selector, a.buckets, keeps, a.tower.layers),
        )

    def _selector(self) -> TableSelector:
        return TableSelector(self.method, self.seed, self.pool)

    def _check(self, a: Anatomy, row: Method, options: Options, keep: int, bucket: Bucket) -> None:
        tokens, breaks = bucket.tokens, len(bucket.line_breaks)
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
        if (row.grid or self.pool == "tile") and not bucket.panels:
            raise PassError(
                f"{self.name}: `{self.method}` needs tokens in rows, and vlmcut does not know where the tokens of "
                f"`{a.family}` lie",
                hint="choose a method that needs no grid; see `vlmcut inspect`",
            )
        competing = self.line_breaks == "compete"
        if row.grid and breaks and competing:
            raise PassError(
                f"{self.name}: `{self.method}` needs whole rows, and {breaks} line breaks compete with {tokens} tokens",
                hint='use line_breaks = "drop" or "keep"',
            )
        panels = max(1, len(bucket.panels))
        free = tokens if competing else tokens - breaks
        chosen = keep - breaks if self.line_breaks == "keep" else keep
        if self.pool == "tile":
            sizes = {panel.rows * panel.columns for panel in bucket.panels}
            if len(sizes) > 1 or chosen % panels:
                raise PassError(
                    f"{self.name}: {chosen} tokens cannot be shared by {panels} tiles of "
                    f"{' and '.join(map(str, sorted(sizes)))} tokens alike",
                    hint=f"choose a multiple of {panels}" if len(sizes) == 1 else 'use pool = "image"',
                )
            free, chosen, panels = free // panels, chosen // panels, 1
        if refused := row.refuse(Place(a, bucket, free, chosen, panels, bucket.frames), options):
            raise PassError(f"{self.name}: {refused[0]}", hint=refused[1])

    def notes(self, a: Anatomy) -> list[str]:
        row, _ = parse(self.method, METHODS, self.name)
        found = [f"{self.method}: {row.without_cls}"] if row.without_cls and not a.tower.has_cls else []
        if row.text:
            found.append(
                f"{self.method} depends on the question: another question needs another look at the picture, and later "
                "turns of a conversation see what the first question chose"
            )
        if row.inside is not None:
            found.append(
                f"{self.method} chooses inside the tower, where near ties cannot be judged: graphs must keep the very "
                "same tokens, which float16 may miss"
            )
        if any(a.breaks):
            found.append(f"line breaks between rows of tiles: {self.line_breaks}")
        return found

    @property
    def weights(self) -> str:
        """The file of a method that has weights, as the recipe names it; empty for the others."""
        return parse(self.method, METHODS, self.name)[1].get("weights", "")

    def reading(self, path: str) -> PruneTokens:
        """The same with its weights elsewhere."""
        return replace(self, method=self.method.replace(f"weights={self.weights}", f"weights={path}"))

    def apply(self, model: Any, a: Anatomy) -> None:
        planned = self.plan(a)
        if planned.leaving:
            prove(locate(model).tower_layers)
        selector, (row, _) = self._selector(), parse(self.method, METHODS, self.name)
        if row.module is not None:
            module = weights.read(row.module, self.weights).exported().to(model.dtype)
            model.add_module(weights.ATTRIBUTE, module)  # a part of the model: graphs, casts, folders carry it
            selector = replace(selector, module=module)
        attached(model).selection = Selection(selector, planned.keep, self.line_breaks)


def _counts(numbers: Iterable[int]) -> str:
    return "/".join(map(str, numbers))
