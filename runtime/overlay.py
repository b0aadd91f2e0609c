"""The kept tokens drawn on the picture that the model saw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from .bundle import Bundle

_SIDE = 480  # pixels of the drawing, at least
_DIM = 0.25  # brightness of dropped patches
_EDGE = (255, 210, 60)


def overlay(bundle: Bundle, image: str | Path | Image.Image) -> tuple[Image.Image, np.ndarray]:
    """Draw which patches of an image reach the language model: kept ones bright and framed, dropped ones dim.

    Returns:
        The drawing, and the kept positions in raster order, int64 [K].
    """
    prompt = bundle.prompt([image], "")
    _, kept = bundle.see(prompt)
    assert prompt.pixel_values is not None
    picture = seen_picture(bundle.prompter.processor.image_processor, prompt.pixel_values[0])
    return draw(picture, kept[0], bundle.manifest.grid), kept[0]


def seen_picture(image_processor: Any, pixel_values: np.ndarray) -> Image.Image:
    """Undo the processor's normalisation: float32 [3, height, width] -> the picture after resize and crop."""
    mean, std = (np.reshape(getattr(image_processor, k), (3, 1, 1)) for k in ("image_mean", "image_std"))
    scaled = np.clip(pixel_values * std + mean, 0, 1) * 255
    return Image.fromarray(scaled.round().astype(np.uint8).transpose(1, 2, 0))


def draw(picture: Image.Image, kept: np.ndarray, grid: tuple[int, int]) -> Image.Image:
    """Dim every patch that is not in `kept` and frame those that are."""
    rows, columns = grid
    cell = max(1, -(-_SIDE // max(rows, columns)))
    size = (columns * cell, rows * cell)
    mask = np.zeros(rows * columns, dtype=bool)
    mask[kept] = True
    light = np.where(mask, 1.0, _DIM).reshape(rows, columns).repeat(cell, axis=0).repeat(cell, axis=1)
    pixels = np.asarray(picture.resize(size, Image.Resampling.NEAREST), dtype=np.float64) * light[..., None]
    drawing = Image.fromarray(pixels.round().astype(np.uint8))
    pen = ImageDraw.Draw(drawing)
    for position in kept:
        x, y = int(position % columns) * cell, int(position // columns) * cell
        pen.rectangle((x, y, x + cell - 1, y + cell - 1), outline=_EDGE)
    return drawing
