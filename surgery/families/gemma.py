"""Gemma 3 (arXiv:2503.19786) and PaliGemma (arXiv:2407.07726): SigLIP towers, prompts that are not all causal."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers.models.gemma3.modeling_gemma3 import create_masks_for_vision_model

from ...manifest import Bucket, Panel
from .base import Family, Geometry, grid_members


class PaliGemma(Family):
    """The whole prompt sees itself; positions start at 1; a token for each patch."""

    prefix = "whole"
    first_position = 1
    rigid = None

    def merge(self, config: Any) -> int:
        """Patches along one side of a visual token."""
        return 1

    def members(self, config: Any, geometry: Geometry) -> np.ndarray:
        side = self._side(config)
        return grid_members(side, side, self.merge(config))

    def panels(self, config: Any, bucket: Bucket) -> tuple[Panel, ...]:
        side = self._side(config) // self.merge(config)
        return (Panel(rows=side, columns=side),)

    def segments(self, config: Any, geometry: Geometry) -> tuple[int, ...]:
        return (self._side(config) ** 2,)

    @staticmethod
    def _side(config: Any) -> int:
        return config.vision_config.image_size // config.vision_config.patch_size


class Gemma3(PaliGemma):
    """Each image sees itself, within the window in sliding layers; patches are averaged to a fixed number of tokens."""

    prefix = "image"
    window_over_blocks = True
    first_position = 0
    rigid = Family.rigid

    def masks(self, **given: Any) -> Any:
        return create_masks_for_vision_model(attention_mask=None, **given)

    def merge(self, config: Any) -> int:
        return self._side(config) // round(config.mm_tokens_per_image**0.5)
