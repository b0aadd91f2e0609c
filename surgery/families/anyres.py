"""LLaVA-NeXT and LLaVA-OneVision: a thumbnail and a grid of tiles, stitched, cut to the picture, a newline per row.

LLaVA-NeXT: llava-vl.github.io/blog/2024-01-30-llava-next. LLaVA-OneVision: arXiv:2408.03326, section 3.2; grids of too
many patches are interpolated down, and a token is then scored by the patch nearest to its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from ...manifest import Bucket, Panel
from .base import Encoded, Family, Geometry
from .llava import Llava


class LlavaNext(Llava):
    """Tiles of the tower's own size; which grid follows from the picture's shape."""

    rigid = Family.rigid

    def encode(self, model: Any, pixel_values: Tensor, geometry: Geometry, constants: Mapping[str, Any]) -> Encoded:
        return Family.encode(self, model, pixel_values, geometry, constants)

    def members(self, config: Any, geometry: Geometry) -> np.ndarray:
        side = self._side(config)
        return np.concatenate([np.arange(side**2), self._stitched(config, geometry)])[:, None]

    def segments(self, config: Any, geometry: Geometry) -> tuple[int, ...]:
        return (self._side(config) ** 2 + self.has_cls(config),) * geometry["pixel_values"][1]

    def panels(self, config: Any, bucket: Bucket) -> tuple[Panel, ...]:
        side = self._side(config)
        rows = int((self._stitched(config, bucket.geometry) < 0).sum())
        columns = (bucket.tokens - side**2) // rows - 1
        return (Panel(rows=side, columns=side), Panel(rows=rows, columns=columns, line_breaks=True))

    def _stitched(self, config: Any, geometry: Geometry) -> np.ndarray:
        """The patch behind each token after the thumbnail's, -1 for a newline; by transformers' own packing."""
        side, tiles = self._side(config), geometry["pixel_values"][1]
        if tiles == 1:
            return np.array([-1])
        sizes = [tuple(geometry["image_sizes"])]
        # Where a patch lies in the stitched picture goes through the packing in the place of its features.
        high, wide = transformers.models.llava_next.modeling_llava_next.get_anyres_image_grid_shape(
            sizes[0], config.image_grid_pinpoints, config.vision_config.image_size
        )
        y, x = np.divmod(np.arange(high * wide * side * side).reshape(high, wide, side, side), side)
        y, x = y % side + np.arange(high)[:, None, None, None] * side, x + np.arange(wide)[None, :, None, None] * side
        places = torch.from_numpy(np.stack([y, x], axis=-1).reshape(high * wide, side * side, 2)).float()
        features = torch.cat([torch.zeros(1, side * side, 2), places])
        packed = self._pack(config, [features], sizes, torch.full((2,), -1.0))[0][0][side * side :]
        row, column = packed.round().long().numpy().T
        patch = (row // side * wide + column // side + 1) * side * side + row % side * side + column % side
        return np.where(row < 0, -1, patch)

    def _pack(self, config: Any, features: Any, sizes: Any, newline: Tensor) -> Any:
        model: Any = SimpleNamespace(config=config)
        strategy = config.vision_feature_select_strategy
        return transformers.LlavaNextModel.pack_image_features(model, features, sizes, strategy, newline)

    @staticmethod
    def _side(config: Any) -> int:
        return config.vision_config.image_size // config.vision_config.patch_size


class LlavaOnevision(LlavaNext):
    """A SigLIP tower; a grid of more patches than `vision_aspect_ratio` names is interpolated down."""

    def _pack(self, config: Any, features: Any, sizes: Any, newline: Tensor) -> Any:
        model: Any = SimpleNamespace(config=config)
        return transformers.LlavaOnevisionModel.pack_image_features(
            model, features, sizes, newline, config.vision_aspect_ratio
        )
