"""Remove what the language model never sees: tower layers after the feature layer, pooling head, final norm.

LLaVA takes its features before the last tower layer, so that layer is dead weight. Outputs do not change by a bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn

from ..surgery.anatomy import Anatomy
from ..surgery.cuts import take_layers
from ..surgery.load import locate
from .base import Pass


@dataclass(frozen=True, kw_only=True)
class TrimTower(Pass):
    """Drop the dead end of the vision tower; always first, always exact."""

    name: ClassVar[str] = "trim-tower"
    summary: ClassVar[str] = "remove tower layers after the feature layer, the pooling head and the final norm"
    source: ClassVar[str] = "vlmcut; exact"

    def plan(self, a: Anatomy) -> Anatomy:
        return replace(a, tower=replace(a.tower, heads=a.tower.heads[: a.tower.feature_layer]))

    def apply(self, model: Any, a: Anatomy) -> None:
        parts = locate(model)
        keep = range(a.tower.feature_layer)
        parts.tower.encoder.layers = take_layers(parts.tower_layers, keep)
        # Hidden state -1 is the output of the last layer: the final norm comes after it.
        model.config.vision_feature_layer = -1
        model.config.vision_config.num_hidden_layers = parts.tower.config.num_hidden_layers = len(keep)
        parts.tower.post_layernorm = nn.Identity()
        if getattr(parts.tower, "use_head", False):
            parts.tower.use_head = False
            model.config.vision_config.vision_use_head = False
            del parts.tower.head
