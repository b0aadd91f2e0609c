"""Tiles of one size, pixel-shuffled, one after the other: InternVL (arXiv:2504.10479), Idefics3 (arXiv:2408.12637),
SmolVLM (arXiv:2504.05299).

The thumbnail of the whole picture comes last. Tokens are chosen after the shuffle, among all tiles of a picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...manifest import Bucket, Panel
from .base import Encoded, Family, Geometry, grid_members


class InternVL(Family):
    """Tiles along the first axis, a [CLS] token in each."""

    def has_cls(self, config: Any) -> bool:
        return True

    def shuffle(self, config: Any) -> int:
        """Patches along one side of a visual token."""
        return round(1 / config.downsample_ratio)

    def tiles(self, geometry: Geometry) -> int:
        """Tiles of one picture, the thumbnail included."""
        return geometry["pixel_values"][-4]

    def grid(self, config: Any, geometry: Geometry) -> tuple[int, int]:
        """Patches of a tile: rows, columns."""
        height, width = geometry["pixel_values"][-2:]
        patch = config.vision_config.patch_size
        high, wide = patch if isinstance(patch, (list, tuple)) else (patch, patch)
        return height // high, width // wide

    def members(self, config: Any, geometry: Geometry) -> np.ndarray | None:
        rows, columns = self.grid(config, geometry)
        one = grid_members(rows, columns, self.shuffle(config))
        return np.concatenate([one + tile * rows * columns for tile in range(self.tiles(geometry))])

    def segments(self, config: Any, geometry: Geometry) -> tuple[int, ...]:
        rows, columns = self.grid(config, geometry)
        return (rows * columns + self.has_cls(config),) * self.tiles(geometry)

    def panels(self, config: Any, bucket: Bucket) -> tuple[Panel, ...]:
        rows, columns = (n // self.shuffle(config) for n in self.grid(config, bucket.geometry))
        tiles = self.tiles(bucket.geometry)
        high, wide = arrangement(tiles - 1, bucket.size)
        boxes = [(r / high, c / wide, (r + 1) / high, (c + 1) / wide) for r in range(high) for c in range(wide)]
        boxes = [*boxes[: tiles - 1], (0.0, 0.0, 1.0, 1.0)]
        return tuple(Panel(rows=rows, columns=columns, box=box) for box in boxes)


class Idefics3(InternVL):
    """No [CLS]; tiles of a picture along the second axis. transformers drops tiles of zeros; one picture has none."""

    tower_mask = False  # it marks padding between pictures; one picture has none

    def encode(self, model: Any, pixel_values: Tensor, geometry: Geometry, constants: Mapping[str, Any]) -> Encoded:
        parts = self.locate(model)
        assert parts.projector is not None
        return Encoded(parts.projector(self.hidden(model, pixel_values, constants)).flatten(0, 1))

    def hidden(self, model: Any, pixel_values: Tensor, constants: Mapping[str, Any]) -> Tensor:
        """What the tower makes of every tile, [tiles, patches, d]."""
        parts = self.locate(model)
        # The tower finds the place of each patch with `bucketize`, which an exporter gets wrong; it is a constant here.
        ids = constants["position_ids"]
        hook = parts.tower.embeddings.position_embedding.register_forward_pre_hook(lambda *_: (ids,))
        try:
            return parts.tower(pixel_values.flatten(0, 1), return_dict=True).last_hidden_state
        finally:
            hook.remove()

    def constants(self, model: Any, geometry: Geometry) -> dict[str, Any]:
        embeddings = self.locate(model).tower.embeddings
        rows, columns = self.grid(model.config, geometry)
        mask = torch.ones(self.tiles(geometry), rows, columns, dtype=torch.bool)
        pixels = torch.zeros(*mask.shape[:1], *geometry["pixel_values"][-3:], dtype=model.dtype)
        taken: list[Tensor] = []
        hook = embeddings.position_embedding.register_forward_pre_hook(lambda _, args: taken.append(args[0]))
        try:
            zeros = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in embeddings.named_parameters()}
            torch.func.functional_call(embeddings, zeros, (pixels, mask))  # the model's own may be unset
        finally:
            hook.remove()
        return {"position_ids": taken[0].detach()}

    def has_cls(self, config: Any) -> bool:
        return False

    def shuffle(self, config: Any) -> int:
        return config.scale_factor


def arrangement(tiles: int, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of so many tiles that are nearest to the picture's shape."""
    if tiles < 1:
        return 1, 1
    pairs = [(rows, tiles // rows) for rows in range(1, tiles + 1) if tiles % rows == 0]
    return min(pairs, key=lambda p: abs(np.log(p[0] / p[1]) - np.log(size[0] / size[1])))
