"""Pixtral (arXiv:2410.07073) and Mistral 3: pictures of any size in raster order, rotary positions in two dimensions.

The row breaks are text tokens of the prompt and stay; Mistral 3 merges 2 x 2 patches in its projector.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from ...manifest import Bucket, Panel
from .base import Encoded, Family, Geometry, grid_members
from .llava import check_feature_layer


class Pixtral(Family):
    """A `llava` model with a Pixtral tower; features of one layer, a per-token projector."""

    tower_mask = False  # it keeps images of one call apart; here a call has one

    def encode(self, model: Any, pixel_values: Tensor, geometry: Geometry, constants: Mapping[str, Any]) -> Encoded:
        parts = self.locate(model)
        sizes = [tuple(geometry["image_sizes"])]
        out = parts.tower(pixel_values, image_sizes=sizes, output_hidden_states=True, return_dict=True)
        features = out.hidden_states[model.config.vision_feature_layer]
        return self._project(parts.projector, features, sizes)

    def _project(self, projector: Any, features: Tensor, sizes: Any) -> Encoded:
        return Encoded(features[0], project=projector)

    def constants(self, model: Any, geometry: Geometry) -> dict[str, Any]:
        return {}

    def members(self, config: Any, geometry: Geometry) -> np.ndarray:
        rows, columns = self._grid(config, geometry)
        return grid_members(rows, columns, self.merge(config))

    def merge(self, config: Any) -> int:
        """Patches along one side of a visual token."""
        return 1

    def panels(self, config: Any, bucket: Bucket) -> tuple[Panel, ...]:
        rows, columns = self._grid(config, bucket.geometry)
        return (Panel(rows=rows // self.merge(config), columns=columns // self.merge(config)),)

    def segments(self, config: Any, geometry: Geometry) -> tuple[int, ...]:
        rows, columns = self._grid(config, geometry)
        return (rows * columns,)

    def feature_layer(self, config: Any, layers: int) -> int:
        layer = config.vision_feature_layer
        return layer if layer >= 0 else layers + 1 + layer

    def check(self, config: Any) -> None:
        super().check(config)
        check_feature_layer(config)

    @staticmethod
    def _grid(config: Any, geometry: Geometry) -> tuple[int, int]:
        height, width = geometry["image_sizes"]
        patch = config.vision_config.patch_size
        return height // patch, width // patch


class Mistral3(Pixtral):
    """The projector norms, merges and projects."""

    def _project(self, projector: Any, features: Tensor, sizes: Any) -> Encoded:
        out = projector(features.squeeze(0), sizes)
        return Encoded(out.reshape(-1, out.shape[-1]))

    def merge(self, config: Any) -> int:
        return config.spatial_merge_size
