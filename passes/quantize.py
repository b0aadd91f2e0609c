"""Dynamic int8: every linear of a part computes in int8, in eager exactly as at run time.

Smaller (a quarter of float32) and, on CPUs with VNNI or AMX, several times faster. Norms, softmax, positions and the
scores that choose tokens stay in float. Where the language model ties its embedding to the output projection, both
share one int8 table.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn

from ..errors import PassError, nearest
from ..surgery.anatomy import Anatomy
from ..surgery.load import locate
from ..surgery.selection import attached
from ..surgery.vocabulary import find_rows, spread_scores
from .base import PARTS, Pass, check_part
from .int8 import Int8Embedding, Int8Linear

SCHEMES = ("int8",)


@dataclass(frozen=True, kw_only=True)
class Quantize(Pass):
    """Replace the linears of `parts` by dynamic int8 ones."""

    name: ClassVar[str] = "quantize"
    summary: ClassVar[str] = "dynamic int8 linears: signed weights per channel, activations scaled at run time"
    source: ClassVar[str] = "ONNX DynamicQuantizeLinear and MatMulInteger"

    scheme: str = "int8"
    parts: tuple[str, ...] = PARTS

    def plan(self, a: Anatomy) -> Anatomy:
        if self.scheme not in SCHEMES:
            raise PassError(f"{self.name}: no scheme `{self.scheme}`", hint=nearest(self.scheme, SCHEMES))
        for part in self.parts:
            check_part(self.name, part)
            if part in a.quantized:
                raise PassError(f"{self.name}: {part} is int8 already", hint="quantize once, as the last pass")
            if part == "vision" and a.leaving:  # half of the pictures, on examples/scenes
                raise PassError(
                    f"{self.name}: tokens leave inside the tower by `{a.method}`; int8 steps move which ones, and no "
                    "gate could tell that from a fault",
                    hint='quantize parts = ["language"], or choose a method that works after the encoder',
                )
        return replace(a, quantized=tuple(p for p in PARTS if p in self.parts or p in a.quantized))

    def apply(self, model: Any, a: Anatomy) -> None:
        parts = locate(model)
        if "vision" in self.parts:
            for layer in parts.tower_layers:
                quantize_linears(layer)
            if parts.projector is not None:
                quantize_linears(parts.projector)
        if "language" in self.parts:
            for layer in parts.language_layers:
                quantize_linears(layer)
            model.lm_head = Int8Linear.of(model.lm_head)
            vocabulary = attached(model).vocabulary
            if vocabulary is not None:
                spread_scores(model.lm_head, vocabulary)
            if a.language.tied:
                head = model.lm_head
                times = getattr(parts.language.get_input_embeddings(), "scalar_embed_scale", 1.0)
                table = Int8Embedding(head.weight, head.weight_scale, model.dtype, times)
                parts.language.set_input_embeddings(table)
                if vocabulary is not None:
                    find_rows(table, vocabulary)


def quantize_linears(root: nn.Module) -> None:
    """Replace every linear below `root` in place."""
    for module in list(root.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear.of(child))
