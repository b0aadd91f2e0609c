"""Muse Spark: a tower with windows on pictures of any size, a mixture of experts, and scores scaled and capped."""

from __future__ import annotations

from typing import Any

import torch
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

from .base import Family, Geometry


class MuseSpark(Family):
    """The table of positions is read with rows for columns, which transformers' exporter (5.23) does not know."""

    def constants(self, model: Any, geometry: Geometry) -> dict[str, Any]:
        embedder = self.locate(model).tower.patch_embedder
        frames, rows, columns = geometry["image_grid_thw"]
        indices, weights = get_vision_interpolation_indices_and_weights(
            torch.tensor([[frames, columns, rows]]),
            num_grid_per_side=embedder.num_grid_per_side,
            mode=embedder.interpolation_mode,
            align_corners=embedder.interpolation_align_corners,
            padding=embedder.interpolation_padding,
        )
        return super().constants(model, geometry) | {"interp_indices": indices, "interp_weights": weights}
