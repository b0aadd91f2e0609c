"""Text sees an image through a few of its visual tokens, and the KV cache keeps no others of it.

The carriers, the last visual tokens of each image, attend to all of it as ever; text attends to text and carriers. In
every layer the cache holds text + carriers: it, and what decode multiplies with it, no longer depends on how many
visual tokens an image has. In prefill all of them still run through all layers.

Source: VoCo-LLaMA, "Towards Vision Compression with Large Language Models" (arXiv:2406.12275). We differ: the paper
puts new tokens with embeddings of their own behind an image, so a prompt gets longer; here its last visual tokens do
that, so there are neither new columns nor new weights. The paper trains for it in two stages; untrained it loses the
image, and so it does here: `heal` is the short way.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

from ..errors import PassError
from ..surgery.anatomy import Anatomy
from ..surgery.selection import attached
from .base import Pass

_WITHOUT_HARM = ("mlp", "neurons", "window")  # fields of `Idle` that leave attention as it is


@dataclass(frozen=True, kw_only=True)
class Bottleneck(Pass):
    """Text sees the last `carriers` visual tokens of each image alone; those see all of it."""

    name: ClassVar[str] = "bottleneck"
    summary: ClassVar[str] = "text sees an image through a few of its visual tokens; the cache keeps no others"
    source: ClassVar[str] = "VoCo-LLaMA, arXiv:2406.12275"

    carriers: int  # of each image

    def plan(self, a: Anatomy) -> Anatomy:
        language = a.language
        if a.carriers:
            raise PassError(
                f"{self.name}: text sees {a.carriers} carriers of each image already", hint="put one of the two away"
            )
        if a.ladder:
            raise PassError(
                f"{self.name}: visual tokens leave inside the language model, by `{a.inside}`, and carriers see all "
                "of an image in every layer",
                hint="leave one of the two passes out",
            )
        if other := [
            what for what, layers in asdict(a.idle).items() if layers and what not in ("mlp", "neurons", "window")
        ]:
            raise PassError(
                f"{self.name}: visual tokens do less than attend as ever in some layers ({', '.join(other)}), and "
                "carriers see all of an image in every layer",
                hint='leave one of the two passes out, or use skip-visual with what = "mlp"',
            )
        if language.stiff is not None:
            raise PassError(f"{self.name}: columns of `{a.family}` cannot be told apart: {language.stiff}")
        if language.window is not None:
            raise PassError(
                f"{self.name}: some layers of `{a.family}` see {language.window} columns back, and behind a "
                "bottleneck columns are no longer counted as they were",
                hint="leave this pass out",
            )
        least = min(a.keep)
        if not 1 <= self.carriers < least:
            raise PassError(
                f"{self.name}: carriers={self.carriers} of an image that has {least} visual tokens in the language "
                "model",
                hint=f"choose 1 to {least - 1}" if least > 1 else "leave this pass out",
            )
        return replace(a, carriers=self.carriers)

    def notes(self, a: Anatomy) -> list[str]:
        return [
            f"{self.name}: of {max(a.keep)} visual tokens the cache keeps {self.carriers}; without training the image "
            "is as good as lost, put heal behind it"
        ]

    def apply(self, model: Any, a: Anatomy) -> None:
        attached(model).carriers = self.carriers
