"""FastVLM (arXiv:2412.13303): a convolutional tower (timm's FastViTHD), a per-token projector, one fixed image size.

The tower mixes convolutions and attention and has no stack of equal layers: its heads and layers stay, and methods that
score tokens by attention in the tower are refused.
"""

from __future__ import annotations

from typing import Any

from ...errors import ModelError
from ...manifest import Bucket, Panel
from .base import Family


class FastVlm(Family):
    """A square of visual tokens, in raster order."""

    also = frozenset({"global_pool", "hidden_size", "num_classes", "num_features", "pretrained_cfg", "label_names"})

    def panels(self, config: Any, bucket: Bucket) -> tuple[Panel, ...]:
        side = round(bucket.tokens**0.5)
        return (Panel(rows=side, columns=side),) if side * side == bucket.tokens else ()

    def scored(self, model: Any) -> dict[int, Any]:
        """None: its attention blocks see a coarser grid than one patch per token would need."""
        return {}

    def check(self, config: Any) -> None:
        super().check(config)
        if config.vision_feature_layer != -1 or config.vision_feature_select_strategy != "full":
            raise ModelError(
                f"fast_vlm: vision_feature_layer = {config.vision_feature_layer}, vision_feature_select_strategy = "
                f"{config.vision_feature_select_strategy!r}",
                hint="transformers reads only -1 and `full`",
            )
