"""LFM2-VL's image processing with PIL and NumPy; transformers has it for torchvision only."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_base import BatchFeature
from transformers.image_utils import PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs
from transformers.utils.constants import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD


class Lfm2VlImageProcessorKwargs(ImagesKwargs, total=False):
    """Settings beside the usual ones."""

    downsample_factor: int
    do_image_splitting: bool
    min_tiles: int
    max_tiles: int
    use_thumbnail: bool
    min_image_tokens: int
    max_image_tokens: int
    encoder_patch_size: int
    tile_size: int
    max_pixels_tolerance: float
    return_row_col_info: bool


class Lfm2VlImageProcessorPil(PilBackend):
    """Small images become one tile of near their own size, large ones a grid of square tiles and a thumbnail.

    Every tile is a padded row of flattened patches: `pixel_values` [tiles, patches, patch * patch * 3] float32,
    `pixel_attention_mask` [tiles, patches] int32, `spatial_shapes` [tiles, 2] int64 (rows and columns of patches).

    Source: transformers 5.23, models/lfm2_vl/image_processing_lfm2_vl.py. We differ in the resampling (PIL instead of
    torchvision: at most one of 255 levels) and in rescaling before normalizing, as every PIL backend does.
    """

    valid_kwargs = Lfm2VlImageProcessorKwargs
    downsample_factor = 2
    do_image_splitting = True
    min_tiles = 2
    max_tiles = 10
    use_thumbnail = True
    min_image_tokens = 64
    max_image_tokens = 256
    encoder_patch_size = 16
    tile_size = 512
    max_pixels_tolerance = 2.0
    do_resize = True
    size = {"height": 512, "width": 512}  # noqa: RUF012
    resample = PILImageResampling.BILINEAR
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    do_pad = True
    return_row_col_info = False
    image_mean = IMAGENET_STANDARD_MEAN
    image_std = IMAGENET_STANDARD_STD
    model_input_names = ["pixel_values", "pixel_attention_mask", "spatial_shapes"]  # noqa: RUF012

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.max_num_patches = self._row_length(vars(type(self)) | vars(self))

    def _preprocess(self, images: list[np.ndarray], **o: Any) -> BatchFeature:  # pyright: ignore[reportIncompatibleMethodOverride]
        if o["do_image_splitting"] and o["min_tiles"] > o["max_tiles"]:
            raise ValueError("min_tiles must be less than or equal to max_tiles")
        length = self._row_length(o)
        values, masks, shapes, rows, columns, sizes = [], [], [], [], [], []
        for image in images:
            grid, size, tiles = self._split(image, o)
            rows.append(grid[0])
            columns.append(grid[1])
            sizes.append(list(size))
            for tile in tiles:
                patches, shape = _patches(self._normalized(tile, o), o["encoder_patch_size"])
                short = length - len(patches) if o["do_pad"] else 0
                if short < 0:  # transformers goes on, with a mask that is shorter than the row
                    raise ValueError(f"an image too elongated: {len(patches)} patches, at most {length}")
                values.append(np.pad(patches, ((0, short), (0, 0))))
                masks.append(np.repeat(np.array([1, 0], np.int32), [len(patches), short]))
                shapes.append(shape)
        data: dict[str, Any] = {"pixel_values": np.stack(values)}
        if o["do_pad"]:
            data |= {"pixel_attention_mask": np.stack(masks), "spatial_shapes": np.array(shapes)}
        if o["return_row_col_info"]:
            data |= {"image_rows": rows, "image_cols": columns, "image_sizes": sizes}
        return BatchFeature(data=data, tensor_type=o["return_tensors"])

    def _split(self, image: np.ndarray, o: dict[str, Any]) -> tuple[tuple[int, int], tuple[int, int], list[np.ndarray]]:
        """Grid (rows, columns), size (height, width) of the whole image when it is one tile, and the tiles."""
        height, width = image.shape[-2:]
        size = _smart_size(height, width, o)
        whole = self._resized(image, size, o)
        splits = o["do_image_splitting"] and not o["min_tiles"] == o["max_tiles"] == 1
        if not (splits and _too_large(height, width, o)):
            return (1, 1), size, [whole]
        side = o["tile_size"]
        rows, columns = _grid(height, width, o)
        large = self._resized(image, (rows * side, columns * side), o)
        tiles = [
            large[:, top : top + side, left : left + side]
            for top in range(0, rows * side, side)
            for left in range(0, columns * side, side)
        ]
        if o["use_thumbnail"] and len(tiles) > 1:
            tiles.append(whole)
        return (rows, columns), size, tiles

    def _resized(self, image: np.ndarray, size: tuple[int, int], o: dict[str, Any]) -> np.ndarray:
        return self.resize(image, SizeDict(height=size[0], width=size[1]), resample=o["resample"])

    def _normalized(self, image: np.ndarray, o: dict[str, Any]) -> np.ndarray:
        if o["do_rescale"]:
            image = self.rescale(image, o["rescale_factor"])
        if o["do_normalize"]:
            image = self.normalize(image, o["image_mean"], o["image_std"])
        return image

    @staticmethod
    def _row_length(o: dict[str, Any]) -> int:
        """Patches of the largest tile: every tile is padded to it."""
        tile = (o["tile_size"] // o["encoder_patch_size"]) ** 2 if o["do_image_splitting"] else 0
        return max(o["max_image_tokens"] * o["downsample_factor"] ** 2, tile)


def _patches(image: np.ndarray, side: int) -> tuple[np.ndarray, tuple[int, int]]:
    """[3, height, width] to [patches, side * side * 3], row by row, and how many rows and columns."""
    channels, height, width = image.shape
    rows, columns = height // side, width // side
    cells = image.reshape(channels, rows, side, columns, side).transpose(1, 3, 2, 4, 0)
    return cells.reshape(rows * columns, -1), (rows, columns)


def _nearest(number: int, factor: int) -> int:
    return round(number / factor) * factor


def _smart_size(height: int, width: int, o: dict[str, Any]) -> tuple[int, int]:
    """Size (height, width) in whole tokens, near the image's own, between the smallest and the largest area."""
    factor = o["encoder_patch_size"] * o["downsample_factor"]
    smallest, largest = o["min_image_tokens"] * factor**2, o["max_image_tokens"] * factor**2
    high, wide = max(factor, _nearest(height, factor)), max(factor, _nearest(width, factor))
    if high * wide > largest:
        shrink = math.sqrt(height * width / largest)
        high = max(factor, math.floor(height / shrink / factor) * factor)
        wide = max(factor, math.floor(width / shrink / factor) * factor)
    elif high * wide < smallest:
        grow = math.sqrt(smallest / (height * width))
        high = math.ceil(height * grow / factor) * factor
        wide = math.ceil(width * grow / factor) * factor
    return high, wide


def _too_large(height: int, width: int, o: dict[str, Any]) -> bool:
    """Whether the image is far larger than one tile may be."""
    patch = o["encoder_patch_size"]
    factor = patch * o["downsample_factor"]
    area = max(patch, _nearest(height, factor)) * max(patch, _nearest(width, factor))
    return area > o["max_image_tokens"] * factor**2 * o["max_pixels_tolerance"]


def _grid(height: int, width: int, o: dict[str, Any]) -> tuple[int, int]:
    """Rows and columns of tiles: the nearest aspect ratio; of equal ones the larger, if the image fills half of it."""
    least, most = o["min_tiles"], o["max_tiles"]
    shapes = [
        (w, h)
        for n in range(least, most + 1)
        for w in range(1, n + 1)
        for h in range(1, n + 1)
        if least <= w * h <= most
    ]
    best, nearest = (1, 1), float("inf")
    # Two shapes of one area can be equally near (2x1 and 1x2 for 5:4): then the order of the set decides, as there.
    for wide, high in sorted(set(shapes), key=lambda s: s[0] * s[1]):
        distance = abs(width / height - wide / high)
        if distance < nearest or (distance == nearest and width * height > 0.5 * o["tile_size"] ** 2 * wide * high):
            best, nearest = (wide, high), distance
    return best[1], best[0]
