"""LLaVA (arXiv:2304.08485): a CLIP or SigLIP tower, a per-token MLP projector, one fixed image size.

A `llava` checkpoint with a Pixtral tower takes images of any size; see `pixtral.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from ...errors import ModelError
from ...manifest import Bucket, Panel
from .base import Encoded, Family, Geometry


class Llava(Family):
    """One feature layer of the tower, [CLS] dropped where it has one."""

    rigid = None

    def encode(self, model: Any, pixel_values: Tensor, geometry: Geometry, constants: Mapping[str, Any]) -> Encoded:
        parts = self.locate(model)
        out = parts.tower(pixel_values, output_hidden_states=True, return_dict=True)
        features = out.hidden_states[model.config.vision_feature_layer][0]
        return Encoded(features[1:] if self.has_cls(model.config) else features, project=parts.projector)

    def has_cls(self, config: Any) -> bool:
        return config.vision_config.model_type == "clip_vision_model"

    def members(self, config: Any, geometry: Geometry) -> np.ndarray:
        return np.arange(self._patches(config, geometry))[:, None]

    def panels(self, config: Any, bucket: Bucket) -> tuple[Panel, ...]:
        height, width = bucket.geometry["pixel_values"][-2:]
        patch = config.vision_config.patch_size
        return (Panel(rows=height // patch, columns=width // patch),)

    def segments(self, config: Any, geometry: Geometry) -> tuple[int, ...]:
        return (self._patches(config, geometry) + self.has_cls(config),)

    def feature_layer(self, config: Any, layers: int) -> int:
        layer = config.vision_feature_layer
        # hidden_states has one entry more than layers: entry i is what i layers made.
        return layer if layer >= 0 else layers + 1 + layer

    def trim(self, model: Any) -> None:
        drop_ends(model, self.locate(model).tower)

    def check(self, config: Any) -> None:
        super().check(config)
        check_feature_layer(config)
        kind, strategy = config.vision_config.model_type, config.vision_feature_select_strategy
        if kind not in ("clip_vision_model", "siglip_vision_model"):
            raise ModelError(
                f"{config.model_type}: vision tower `{kind}` has no reader",
                hint="towers that work: clip_vision_model, siglip_vision_model, pixtral",
            )
        if (strategy == "default") != self.has_cls(config):
            raise ModelError(
                f"{config.model_type}: vision_feature_select_strategy = {strategy!r} with a `{kind}` tower, which has "
                f"{'a' if self.has_cls(config) else 'no'} [CLS] token",
                hint="use `default` with CLIP and `full` with SigLIP",
            )

    @staticmethod
    def _patches(config: Any, geometry: Geometry) -> int:
        height, width = geometry["pixel_values"][-2:]
        patch = config.vision_config.patch_size
        return (height // patch) * (width // patch)


def drop_ends(model: Any, tower: Any) -> None:
    """Remove a tower's pooling head and, for features that are hidden states, its final norm."""
    tower.post_layernorm = nn.Identity()
    if getattr(tower, "use_head", False):
        tower.use_head = False
        model.config.vision_config.vision_use_head = False
        del tower.head


def check_feature_layer(config: Any) -> None:
    """Refuse features taken from several tower layers."""
    if not isinstance(config.vision_feature_layer, int):
        raise ModelError(
            f"{config.model_type}: vision_feature_layer = {config.vision_feature_layer} names several layers",
            hint="only one feature layer is supported",
        )
