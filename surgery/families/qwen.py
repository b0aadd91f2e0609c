"""Qwen2-VL (arXiv:2409.12191), Qwen2.5-VL (arXiv:2502.13923), Qwen3-VL (arXiv:2511.21631): pictures of any size.

Patches come in groups that become one token, so that members are consecutive rows; positions have three axes. Segments
of unequal length attend each to itself: transformers' exporter would fold them into a batch and be silently wrong.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers.vision_utils import get_vision_window_index

from ...manifest import Bucket, Panel
from .base import Family, Geometry, spatial_merge


class Qwen2VL(Family):
    """Full attention in the tower, 2 x 2 patches a token, M-RoPE."""

    def members(self, config: Any, geometry: Geometry) -> np.ndarray:
        unit = spatial_merge(config) ** 2
        return np.arange(int(np.prod(geometry["image_grid_thw"]))).reshape(-1, unit)

    def panels(self, config: Any, bucket: Bucket) -> tuple[Panel, ...]:
        _, height, width = bucket.geometry["image_grid_thw"]
        return (Panel(rows=height // spatial_merge(config), columns=width // spatial_merge(config)),)

    def segments(self, config: Any, geometry: Geometry) -> tuple[int, ...]:
        return (int(np.prod(geometry["image_grid_thw"])),)


class Qwen25VL(Qwen2VL):
    """Windows in most tower blocks; the blocks that see everything are named by number."""

    def scored(self, model: Any) -> dict[int, Any]:
        """Of the blocks that see the whole picture."""
        full = model.config.vision_config.fullatt_block_indexes
        return {block: module for block, module in super().scored(model).items() if block in full}

    def windowed(self, config: Any, layers: int) -> tuple[bool, ...]:
        return tuple(layer not in config.vision_config.fullatt_block_indexes for layer in range(layers))

    def members(self, config: Any, geometry: Geometry) -> np.ndarray:
        """Inside the tower groups of patches stand in the order of windows."""
        return super().members(config, geometry)[np.argsort(_windows(config, geometry)[0])]

    def windows(self, config: Any, geometry: Geometry) -> tuple[int, ...]:
        ends = np.unique(_windows(config, geometry)[1])  # a window outside the picture is empty
        return tuple(np.diff(ends).tolist())


class Qwen3VL(Qwen2VL):
    """DeepStack: features of some tower blocks are added behind the first language layers."""


def _windows(config: Any, geometry: Geometry) -> tuple[np.ndarray, np.ndarray]:
    """Tokens in the order of windows, and the patches before each window and behind the last."""
    vision = config.vision_config
    grid = torch.tensor(geometry["image_grid_thw"])[None]
    found = get_vision_window_index(grid, vision.spatial_merge_size, vision.window_size, vision.patch_size)
    return found[0].numpy(), found[1].numpy()
