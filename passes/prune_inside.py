"""Visual tokens leave inside the language model: at some layers fewer of them go on, or none.

Earlier layers still see and cache all tokens that entered; later ones are cheaper in prefill, in decode and in memory.
Tokens keep their positions, so that leaving at a layer is the same as being masked from that layer on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Self

from ..errors import PassError
from ..manifest import Rung
from ..surgery.anatomy import Anatomy, Idle
from ..surgery.inside import Inside
from ..surgery.selection import attached
from .base import Pass
from .calibration import Calibration
from .inside.method import Measured, Method, usual_ladder
from .inside.methods import METHODS, TableLeaver
from .tokens.method import Options, parse


@dataclass(frozen=True, kw_only=True)
class PruneInside(Pass):
    """From `layers[i]` on, `share[i]` of an image's visual tokens go on, chosen by `method`; 0 for none."""

    name: ClassVar[str] = "prune-inside"
    summary: ClassVar[str] = "visual tokens leave inside the language model, at a layer or at several"
    source: ClassVar[str] = "see the methods"

    method: str = "fastv"  # with options as name:option=value:…
    layers: tuple[int, ...] | None = None  # at whose entry tokens leave, ascending; if absent the method's, or measured
    share: tuple[float, ...] | None = None  # of those that entered the language model: what goes on; goes with `layers`

    def ladder(self, a: Anatomy) -> tuple[Rung, ...]:
        """Where how many leave, written out."""
        row, _ = parse(self.method, METHODS, self.name)
        if self.layers is None and self.share is None:
            if (measured := self._measured) is not None:
                return measured.expect(a, self._options)
            return usual_ladder(row.usual, a.language.layers, a.language.levels)
        layers, share = self.layers or (), self.share or ()
        if len(layers) != len(share) or not layers:
            raise PassError(
                f"{self.name}: layers names {len(layers)} layers, share {len(share)} numbers",
                hint="give one share for each layer, or neither for the method's own ladder",
            )
        return tuple(Rung(layer, float(one)) for layer, one in zip(layers, share, strict=True))

    def plan(self, a: Anatomy) -> Anatomy:
        row, _ = parse(self.method, METHODS, self.name)
        language = a.language
        if a.ladder:
            raise PassError(f"{self.name}: tokens leave already, by `{a.inside}`", hint="put all rungs into one pass")
        if a.idle != Idle():
            raise PassError(
                f"{self.name}: visual tokens skip work in layers that are named by number",
                hint=f"put {a.idle.origin} last",
            )
        if a.carriers:
            raise PassError(
                f"{self.name}: text sees {a.carriers} carriers of each image alone, by `bottleneck`",
                hint="leave one of the two passes out",
            )
        if language.stiff is not None:
            raise PassError(f"{self.name}: no token can leave inside `{a.family}`: {language.stiff}")
        if row.neurons and language.solid is not None:
            raise PassError(
                f"{self.name}: `{self.method}` looks at neurons of `{a.family}`: {language.solid}",
                hint="choose a method that looks at attention, fastv for one",
            )
        ladder = self.ladder(a)
        self._check_layers(ladder, language.levels, language.layers)
        self._check_shares(row, ladder)
        for keep, bucket in zip(a.keep, a.buckets, strict=True):
            before = keep
            for rung in ladder:
                if (stay := rung.stay(keep)) >= before:
                    raise PassError(
                        f"{self.name}: share={rung.share:g} of {keep} tokens of an image of {bucket.name} pixels "
                        f"leaves {stay} behind layer {rung.layer}, where {before} arrive",
                        hint=f"choose less {self._measured.option}"
                        if self._measured
                        else f"choose a share of at most {(before - 1) / keep:.3f}, or leave this layer out",
                    )
                before = stay
        return replace(a, inside=self.method, ladder=ladder)

    def _check_layers(self, ladder: Sequence[Rung], levels: int, count: int) -> None:
        layers, least = [rung.layer for rung in ladder], max(1, levels)
        why = f"features of {levels} tower blocks enter behind layers 0 to {levels - 1}" if levels else (
            "before layer 0 is prune-tokens' place"
        )  # fmt: skip
        for layer in layers:
            if not least <= layer < count:
                raise PassError(
                    f"{self.name}: tokens cannot leave at layer {layer} of {count}: {why}"
                    if layer < least
                    else f"{self.name}: there is no layer {layer}, the language model has {count}",
                    hint=f"choose {least} to {count - 1}" if least < count else "this model is too shallow",
                )
        if layers != sorted(set(layers)):
            raise PassError(f"{self.name}: layers={layers} do not ascend", hint="name each layer once, in order")

    def _check_shares(self, row: Method, ladder: Sequence[Rung]) -> None:
        shares = [rung.share for rung in ladder]
        if any(not 0 <= share < 1 for share in shares):
            raise PassError(f"{self.name}: share={shares}: what goes on is a fraction", hint="choose 0 <= share < 1")
        for one, other in pairwise(shares):
            if other >= one:
                raise PassError(
                    f"{self.name}: a ladder cannot grow: share {other:g} after {one:g}",
                    hint=f"choose less than {one:g}, or leave that layer out",
                )
        if row.choose is None and shares != [0.0]:
            raise PassError(
                f"{self.name}: `{self.method}` chooses nobody, share={shares}",
                hint="give one layer with share 0, or a method that chooses",
            )

    @property
    def _options(self) -> Options:
        return parse(self.method, METHODS, self.name)[1]

    @property
    def _measured(self) -> Measured | None:
        """How the ladder is found, where nobody gave it and the method's option asks for it."""
        row, options = parse(self.method, METHODS, self.name)
        given = self.layers is not None or self.share is not None
        return row.measured if row.measured and not given and options[row.measured.option] else None

    @property
    def needs_calibration(self) -> bool:
        return self._measured is not None

    def resolve(self, model: Any, a: Anatomy, calibration: Calibration) -> Self:
        if self._measured is None:
            return self
        ladder = self._measured.find(model, a, calibration, self._options)
        return replace(self, layers=tuple(r.layer for r in ladder), share=tuple(r.share for r in ladder))

    @property
    def ranked(self) -> bool:
        """Whether prompts may have fewer images than their budget has room for."""
        return parse(self.method, METHODS, self.name)[0].ranked

    def notes(self, a: Anatomy) -> list[str]:
        ladder = self.ladder(a)
        steps = ", ".join(f"{rung.stay(max(a.keep))} from layer {rung.layer}" for rung in ladder)
        found = [f"{self.method}: of {max(a.keep)} visual tokens go on {steps} of {a.language.layers}"]
        if self.needs_calibration:
            found.append(f"{self.method}: where how many leave is measured; the plan says what it expects")
        if any(rung.share for rung in ladder):
            found.append(
                f"{self.method} depends on the prompt: later turns of a conversation see what the first one left"
            )
        return found

    def apply(self, model: Any, a: Anatomy) -> None:
        attached(model).inside = Inside(TableLeaver(self.method), self.plan(a).ladder)


def from_flags(
    method: str | None, ladder: Sequence[tuple[int, float]], exit_layer: int | None, layers: int, levels: int
) -> PruneInside:
    """What `--inside`, `--ladder` and `--exit` stand for together.

    Args:
        layers: of the language model; levels: of DeepStack.
    """
    rungs = list(ladder)
    if method is None:
        if any(share for _, share in rungs):
            raise PassError("--ladder keeps tokens, and nothing says which", hint="add --inside fastv")
        method = "exit"
    row, options = parse(method, METHODS, "--inside")
    if row.measured and options[row.measured.option] and (rungs or exit_layer is not None):
        raise PassError(
            f"--inside {method}: {row.measured.option} asks for a measured ladder, and --ladder or --exit gives one",
            hint=f"leave one of them out; {method.partition(':')[0]} alone takes a ladder that is given",
        )
    if exit_layer is not None and not rungs and row.choose is not None:
        usual = usual_ladder(row.usual, layers, levels)
        rungs = [(rung.layer, rung.share) for rung in usual if rung.layer < exit_layer]
    if exit_layer is not None:
        rungs.append((exit_layer, 0.0))
    if not rungs:
        return PruneInside(method=method)
    return PruneInside(method=method, layers=tuple(n for n, _ in rungs), share=tuple(share for _, share in rungs))
