"""Perception LM's image processing with PIL and NumPy; transformers has it for torchvision only."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_base import BatchFeature
from transformers.image_utils import PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs
from transformers.utils.constants import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD


class PerceptionLMImageProcessorKwargs(ImagesKwargs, total=False):
    """Settings beside the usual ones."""

    vision_input_type: str | None
    tile_size: int
    max_num_tiles: int


class PerceptionLMImageProcessorPil(PilBackend):
    """A thumbnail and a grid of tiles: `pixel_values` [images, 1 + tiles, 3, side, side] float32.

    Source: transformers 5.23, models/perception_lm/image_processing_perception_lm.py. We differ in the resampling, as
    in `cohere2.py`. As there, images of one prompt must have equally many tiles.
    """

    valid_kwargs = PerceptionLMImageProcessorKwargs
    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_STANDARD_MEAN
    image_std = IMAGENET_STANDARD_STD
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    vision_input_type = "thumb+tile"
    tile_size = 448
    max_num_tiles = 36
    size = {"width": 448, "height": 448}  # noqa: RUF012

    def _preprocess(self, images: list[np.ndarray], **o: Any) -> BatchFeature:  # pyright: ignore[reportIncompatibleMethodOverride]
        values = []
        for image in images:
            tiles = [image]
            if o["do_resize"]:
                tiles = [self._resized(image, 1, 1, o)]
                if o["vision_input_type"] == "thumb+tile":
                    tiles += self._tiles(image, o)
            if o["do_rescale"]:
                tiles = [self.rescale(tile, o["rescale_factor"]) for tile in tiles]
            if o["do_normalize"]:
                tiles = [self.normalize(tile, o["image_mean"], o["image_std"]) for tile in tiles]
            values.append(np.stack(tiles))
        return BatchFeature(data={"pixel_values": values}, tensor_type=o["return_tensors"])

    def _tiles(self, image: np.ndarray, o: dict[str, Any]) -> list[np.ndarray]:
        """Tiles row by row."""
        side, (height, width) = o["tile_size"], image.shape[-2:]
        rows, columns = _grid(height, width, side, self.max_num_tiles) if o["max_num_tiles"] > 1 else (1, 1)
        large = self._resized(image, rows, columns, o)
        return [
            large[:, top : top + side, left : left + side]
            for top in range(0, rows * side, side)
            for left in range(0, columns * side, side)
        ]

    def _resized(self, image: np.ndarray, rows: int, columns: int, o: dict[str, Any]) -> np.ndarray:
        size = SizeDict(height=rows * o["tile_size"], width=columns * o["tile_size"])
        return self.resize(image, size, resample=o["resample"])


def _grid(height: int, width: int, side: int, most: int) -> tuple[int, int]:
    """Rows and columns of tiles: those on which the image gets largest, or else those nearest to its shape."""
    by_ratio: dict[float, list[tuple[int, int]]] = {}
    for tiles in range(most, 0, -1):
        for columns in range(1, tiles + 1):
            if tiles % columns == 0:
                rows = tiles // columns
                by_ratio.setdefault(columns / rows, []).append((rows, columns))
    best, largest = None, -math.inf
    for rows, columns in (shape for shapes in by_ratio.values() for shape in shapes):
        if rows * side >= height and columns * side >= width:
            shorter = _shorter_side(height, width, min(columns * side / width, rows * side / height))
            if shorter >= largest:
                best, largest = (rows, columns), shorter
    if best is not None:
        return best
    ratio = width / height
    if ratio >= 1:
        return max(by_ratio[max(r for r in by_ratio if r <= ratio)], key=lambda shape: shape[1])
    return max(by_ratio[min(r for r in by_ratio if r > ratio)], key=lambda shape: shape[0])


def _shorter_side(height: int, width: int, scale: float) -> int:
    """Of the image after scaling, in pixels; rounded in transformers' order, for it decides ties."""
    ratio = width / height
    return math.floor(scale * width / ratio) if ratio > 1 else math.floor(scale * height * ratio)
