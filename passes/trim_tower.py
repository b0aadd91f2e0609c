"""Remove what the language model never sees: tower layers after the feature layer, pooling head, final norm.

LLaVA takes its features before the last tower layer, so that layer is dead weight. Outputs do not change by a bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..surgery.anatomy import Anatomy
from ..surgery.cuts import count_layers, take_layers
from ..surgery.load import locate
from ..surgery.selection import attached
from .base import Pass


@dataclass(frozen=True, kw_only=True)
class TrimTower(Pass):
    """Drop the dead end of the vision tower; always first, always exact."""

    name: ClassVar[str] = "trim-tower"
    summary: ClassVar[str] = "remove tower layers after the feature layer, the pooling head and the final norm"
    source: ClassVar[str] = "vlmcut; exact"

    def plan(self, a: Anatomy) -> Anatomy:
        kept = a.tower.feature_layer
        scored = tuple(block for block in a.scored if block < kept)
        tower = replace(
            a.tower,
            heads=a.tower.heads[:kept],
            intermediate=a.tower.intermediate[:kept],
            windowed=a.tower.windowed[:kept],
        )
        return replace(a, tower=tower, scored=scored)

    def apply(self, model: Any, a: Anatomy) -> None:
        parts = locate(model)
        if parts.tower_stack is not None and a.tower.layers != a.tower.feature_layer:
            keep = range(a.tower.feature_layer)
            parts.tower_stack.replace(take_layers(parts.tower_stack.modules, keep))
            # Hidden state -1 is the output of the last layer: the final norm comes after it.
            model.config.vision_feature_layer = -1
            count_layers(parts.tower.config, len(keep))
        attached(model).family.trim(model)
