"""Cohere2 Vision's image processing with PIL and NumPy; transformers has it for torchvision only."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers.image_utils import PILImageResampling, SizeDict
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil


class Cohere2VisionImageProcessorPil(GotOcr2ImageProcessorPil):
    """A grid of tiles and a thumbnail: `pixel_values` [tiles of all images, 3, height, width] float32.

    As GotOcr2's, but the grid is the one that enlarges the image least, or shrinks it least when none holds it.

    Source: transformers 5.23, models/cohere2_vision/image_processing_cohere2_vision.py. We differ in the resampling,
    PIL's instead of torchvision's, as transformers' own two backends of GotOcr2 do: on noise 4 % of the pixels by one
    of 255 levels, 0.2 % by up to 20, where the cubic filter overshoots.
    """

    size = {"height": 512, "width": 512}  # noqa: RUF012
    crop_to_patches = True
    patch_size = 16

    def crop_image_to_patches(
        self,
        image: np.ndarray,
        min_patches: int,
        max_patches: int,
        use_thumbnail: bool = True,
        patch_size: Any = None,
        resample: PILImageResampling | None = None,
    ) -> list[np.ndarray]:
        """Tiles row by row, then the whole image as one tile if there are several; `min_patches` has no effect."""
        high, wide = patch_size.height, patch_size.width
        rows, columns = _grid(image.shape[1], image.shape[2], high, max_patches)
        large = self.resize(image, SizeDict(height=rows * high, width=columns * wide), resample=resample)
        tiles = [
            large[:, top : top + high, left : left + wide]
            for top in range(0, rows * high, high)
            for left in range(0, columns * wide, wide)
        ]
        if use_thumbnail and len(tiles) > 1:
            tiles.append(self.resize(image, patch_size, resample=resample))
        return tiles


def _grid(height: int, width: int, side: int, most: int) -> tuple[int, int]:
    """Rows and columns of tiles of `side` pixels; tiles are square."""
    sides = range(1, most + 1)
    shapes = sorted(((w, h) for w in sides for h in sides if w * h <= most), key=lambda s: s[0] * s[1])
    scales = (np.array(shapes) * side / np.array([width, height])).min(axis=1)
    best = scales.argmax() if (scales < 1).all() else np.where(scales < 1, np.inf, scales).argmin()
    columns, rows = shapes[best]
    return rows, columns
