"""The kept tokens drawn on the picture: those that enter the language model, and those that go on inside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..errors import BundleError
from ..manifest import Bucket, Panel
from ..prompt import Prompt, open_image
from .bundle import Bundle

_SIDE = 480  # pixels of a panel's longer side, at least
_GAP = 8  # pixels between panels
_DIM = 0.25  # brightness of dropped patches
_EDGE = (255, 210, 60)
_BETWEEN = 16  # pixels between drawings of a sheet
_TITLE = 34  # pixels above each
_WIDTH = 2200  # pixels of a sheet, at most, unless one drawing is wider


@dataclass(frozen=True)
class Kept:
    """The places that tokens take; of a merged token, the one it lies at."""

    name: str  # of the method that kept them, or of the layer from which they go on
    positions: np.ndarray  # int64 [K], ascending
    tokens: int  # of so many


def overlay(
    bundle: Bundle, *images: str | Path | Image.Image, question: str = "", fit: bool = False
) -> tuple[Image.Image, list[Kept]]:
    """Draw which parts of an image reach the language model: kept ones bright and framed, dropped ones dim.

    Where tokens leave inside the language model, what goes on from each of these layers is drawn beside it. Tiles and
    their thumbnail, and frames of a clip, are drawn side by side, in the order of their tokens.

    Args:
        images: one, or the frames of one clip.
        question: for a method that depends on it, as who leaves inside the language model does.
        fit: as in `Bundle.prompt`.

    Returns:
        The drawing, and the tokens that enter the language model; behind them, those that go on at each rung.

    Raises:
        BundleError: a family of which vlmcut does not know where its tokens lie, more than one image or clip, or a
            question over budget.
    """
    prompt = bundle.prompt(images, question, fit=fit)
    if len(prompt.pictures) != 1:
        frames = bundle.manifest.layout.frames
        raise BundleError(
            f"{len(images)} images, a drawing shows {frames}", hint=f"give {frames} --image, and draw others apart"
        )
    bucket = bundle.manifest.buckets[prompt.pictures[0].bucket(bundle.manifest.buckets)]
    if not bucket.panels:
        raise BundleError("vlmcut does not know where the visual tokens of this model lie", hint="nothing can be drawn")
    found, pixels = _stages(bundle, prompt, bucket.tokens), prompt.pictures[0].pixel_values
    alone = replace(bucket, panels=bucket.panels[: len(bucket.panels) // bucket.frames])
    each = [pixels] if bucket.frames == 1 else list(pixels)
    sources = [image if isinstance(image, Image.Image) else open_image(image) for image in images]
    processor = bundle.prompter.processor.image_processor
    shown = [fitting_picture(processor, one, alone, source) for one, source in zip(each, sources, strict=True)]
    if len(found) == 1:
        return draw(shown, found[0].positions, bucket.panels), found
    return side_by_side(shown, found, bucket.panels), found


def _stages(bundle: Bundle, prompt: Prompt, tokens: int) -> list[Kept]:
    """What enters the language model, and what goes on at each rung."""
    shrunk, seen = bundle.see(prompt)
    entered, ladder = seen[0].kept, bundle.budget.ladder
    if not ladder:
        return [Kept("", entered, tokens)]
    bundle.graphs.prefill(shrunk, seen)
    found = [Kept("enter", entered, tokens)]
    for rung, columns in zip(ladder, bundle.graphs.kept, strict=True):
        index = shrunk.visual_index[0, columns]
        found.append(Kept(f"from layer {rung.layer}", entered[index[index >= 0]], tokens))
    return found


def side_by_side(pictures: Sequence[Image.Image], found: Sequence[Kept], panels: Sequence[Panel]) -> Image.Image:
    """A drawing for each, with what it is and how many it has above it."""
    titles = [f"{one.name}: {len(one.positions)} of {one.tokens}" for one in found]
    return sheet([(t, draw(pictures, one.positions, panels)) for t, one in zip(titles, found, strict=True)])


def fitting_picture(image_processor: Any, pixel_values: np.ndarray, bucket: Bucket, image: Image.Image) -> Image.Image:
    """The picture that the tokens lie on: of one raster what is left after any crop, else the whole."""
    if len(bucket.panels) == 1 and pixel_values.ndim == 4 and len(pixel_values) == 1:
        return seen_picture(image_processor, pixel_values[0])
    return image.convert("RGB")


def seen_picture(image_processor: Any, pixel_values: np.ndarray) -> Image.Image:
    """Undo the processor's normalisation: float32 [3, height, width] -> the picture after resize and crop."""
    mean, std = 0.0, 1.0
    if image_processor.do_normalize:
        mean, std = (np.reshape(getattr(image_processor, k), (3, 1, 1)) for k in ("image_mean", "image_std"))
    scaled = np.clip(pixel_values * std + mean, 0, 1) * 255
    return Image.fromarray(scaled.round().astype(np.uint8).transpose(1, 2, 0))


def draw(pictures: Sequence[Image.Image], kept: np.ndarray, panels: Sequence[Panel]) -> Image.Image:
    """Dim everything that is not in `kept` and frame what is; every picture has as many of the panels."""
    drawn, start = [], 0
    for number, panel in enumerate(panels):
        mine = kept[(kept >= start) & (kept < start + panel.tokens)] - start
        drawn.append(_panel(pictures[number * len(pictures) // len(panels)], mine, panel))
        start += panel.tokens
    sheet = Image.new("RGB", (sum(d.width for d in drawn) + _GAP * (len(drawn) - 1), max(d.height for d in drawn)))
    left = 0
    for one in drawn:
        sheet.paste(one, (left, 0))
        left += one.width + _GAP
    return sheet


def _panel(picture: Image.Image, kept: np.ndarray, panel: Panel) -> Image.Image:
    top, left, bottom, right = panel.box
    part = picture.crop(
        (
            round(left * picture.width),
            round(top * picture.height),
            round(right * picture.width),
            round(bottom * picture.height),
        )
    )
    rows, columns = panel.rows, panel.columns
    cell = max(1, -(-_SIDE // max(rows, columns)))
    row, column = np.divmod(kept, columns + panel.line_breaks)
    row, column = row[column < columns], column[column < columns]  # a line break shows nothing
    light = np.full((rows, columns), _DIM)
    light[row, column] = 1.0
    pixels = np.asarray(part.resize((columns * cell, rows * cell), Image.Resampling.BICUBIC), dtype=np.float64)
    pixels = pixels * light.repeat(cell, axis=0).repeat(cell, axis=1)[..., None]
    drawing = Image.fromarray(pixels.round().astype(np.uint8))
    pen = ImageDraw.Draw(drawing)
    for y, x in zip(row.tolist(), column.tolist(), strict=True):
        pen.rectangle((x * cell, y * cell, (x + 1) * cell - 1, (y + 1) * cell - 1), outline=_EDGE)
    return drawing


def sheet(drawings: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Drawings of one size with a title above each, in rows as even as fit."""
    width, height = drawings[0][1].size
    font = ImageFont.load_default(size=22)
    width = max(width, *(round(font.getlength(title)) for title, _ in drawings))
    most = max(1, (_WIDTH + _BETWEEN) // (width + _BETWEEN))
    rows = -(-len(drawings) // most)
    columns = -(-len(drawings) // rows)
    size = (columns * (width + _BETWEEN) - _BETWEEN, rows * (height + _TITLE + _BETWEEN) - _BETWEEN)
    whole = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(whole)
    for number, (title, drawing) in enumerate(drawings):
        row, column = divmod(number, columns)
        left, top = column * (width + _BETWEEN), row * (height + _TITLE + _BETWEEN)
        pen.text((left, top + 4), title, fill="black", font=font)
        whole.paste(drawing, (left, top + _TITLE))
    return whole
