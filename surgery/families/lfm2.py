"""LFM2-VL (huggingface.co/LiquidAI/LFM2-VL-1.6B): SigLIP 2 on any shape, short convolutions beside attention.

The processor pads the patches of each tile to one number; a graph of one geometry takes the real ones only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ...manifest import Bucket, Panel
from .base import Encoded, Family, Geometry, grid_members
from .tiles import arrangement


class Lfm2VL(Family):
    """Tiles of equal shape go through the tower together; the thumbnail, of another, follows."""

    def encode(self, model: Any, pixel_values: Tensor, geometry: Geometry, constants: Mapping[str, Any]) -> Encoded:
        parts, found, start = self.locate(model), [], 0
        for (height, width), alike in groupby(_shapes(geometry)):
            count = len(list(alike))
            pixels = pixel_values[start : start + count, : height * width]
            shapes = np.array([[height, width]] * count)
            with _placed(parts.tower.embeddings, constants[f"resize_{height}x{width}"]):
                out = parts.tower(
                    pixel_values=pixels, spatial_shapes=shapes, pixel_attention_mask=None, return_dict=True
                ).last_hidden_state
            assert parts.projector is not None
            found.append(parts.projector(out.reshape(count, height, width, -1)).flatten(0, 2))
            start += count
        return Encoded(torch.cat(found))

    def constants(self, model: Any, geometry: Geometry) -> dict[str, Any]:
        """The tower's table of positions is resized to a tile's grid by a constant matrix.

        TensorRT has no antialiased Resize.
        """
        side = self.locate(model).tower.embeddings.position_embedding_size
        one = torch.eye(side * side).reshape(1, side * side, side, side)  # a channel for each entry of the table
        options = {"mode": "bilinear", "align_corners": False, "antialias": True}
        return {
            f"resize_{height}x{width}": functional.interpolate(one, size=(height, width), **options)[0].flatten(1).T
            for height, width in dict.fromkeys(_shapes(geometry))
        }

    def members(self, config: Any, geometry: Geometry) -> np.ndarray:
        found, start = [], 0
        for height, width in _shapes(geometry):
            found.append(grid_members(height, width, config.downsample_factor) + start)
            start += height * width
        return np.concatenate(found)

    def segments(self, config: Any, geometry: Geometry) -> tuple[int, ...]:
        return tuple(height * width for height, width in _shapes(geometry))

    def panels(self, config: Any, bucket: Bucket) -> tuple[Panel, ...]:
        factor, shapes = config.downsample_factor, _shapes(bucket.geometry)
        tiles = len(shapes) - 1  # the thumbnail comes last
        high, wide = arrangement(tiles, bucket.size)
        boxes = [(r / high, c / wide, (r + 1) / high, (c + 1) / wide) for r in range(high) for c in range(wide)][:tiles]
        boxes.append((0.0, 0.0, 1.0, 1.0))
        return tuple(
            Panel(rows=height // factor, columns=width // factor, box=box)
            for (height, width), box in zip(shapes, boxes, strict=True)
        )


@contextmanager
def _placed(embeddings: Any, resize: Tensor) -> Iterator[None]:
    """While inside, the table of positions is resized by this matrix, [patches, entries]."""

    def resized(table: Tensor, shapes: Any, max_length: int) -> Tensor:
        return (resize.to(table.dtype) @ table.flatten(0, 1)).expand(len(shapes), -1, -1)

    embeddings.resize_positional_embeddings = resized
    try:
        yield
    finally:
        del embeddings.resize_positional_embeddings


def _shapes(geometry: Geometry) -> list[tuple[int, int]]:
    numbers = geometry["spatial_shapes"]
    return list(zip(numbers[::2], numbers[1::2], strict=True))
