"""What several methods keep of one picture, side by side; in eager, so nothing needs to be exported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..errors import ModelError
from ..passes import folder as cut_folder
from ..passes.recipe import make
from ..passes.trim_tower import TrimTower
from ..prompt import Prompter
from ..runtime.overlay import draw, fitting_picture
from ..surgery.anatomy import Anatomy
from ..surgery.talk import see_picture
from .sweep_plan import Cell, Keep, applied

_GAP = 16  # pixels between drawings
_TITLE = 34  # pixels above each
_WIDTH = 2200  # pixels of a sheet, at most, unless one drawing is wider


@dataclass(frozen=True)
class Kept:
    """The places that the tokens of one method take; of a merged token, the one it lies at."""

    method: str
    positions: np.ndarray  # int64 [K]
    tokens: int  # of so many


def gallery(
    model: str,
    a: Anatomy,
    picture: Image.Image,
    methods: Sequence[str],
    keep: Keep,
    *,
    question: str = "",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Image.Image, list[Kept]]:
    """Draw what each method keeps of a picture.

    Args:
        a: the model's anatomy for pictures of this size, nothing cut.
        question: for methods that depend on it.

    Raises:
        PassError: a method that does not apply.
        ModelError: a family of which vlmcut does not know where its tokens lie.
    """
    trimmed = TrimTower().plan(a)
    cells = [Cell(method, keep) for method in methods]
    for cell in cells:
        cell.step().plan(trimmed)
    if not a.smallest.panels:
        raise ModelError("vlmcut does not know where the visual tokens of this model lie", hint="nothing can be drawn")
    sizes = tuple(bucket.size for bucket in a.buckets)
    loaded = cut_folder.load(model, sizes=sizes, revision=revision, trust_remote_code=trust_remote_code)
    make([]).apply(loaded.model, None)
    (given,) = Prompter(loaded.processor, a.layout)([picture], question).pictures
    bucket = a.buckets[given.bucket(a.buckets)]
    found = []
    for cell in cells:
        with applied(loaded.model, cell):
            kept = see_picture(loaded.model, given).kept.numpy()
        found.append(Kept(cell.method, kept, bucket.tokens))
    shown = fitting_picture(loaded.processor.image_processor, given.pixel_values, bucket, picture)
    titles = [f"{one.method}: {len(one.positions)} of {one.tokens}" for one in found]
    drawn = [draw([shown], one.positions, bucket.panels) for one in found]
    return sheet(list(zip(titles, drawn, strict=True))), found


def sheet(drawings: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Drawings of one size with a title above each, in rows as even as fit."""
    width, height = drawings[0][1].size
    font = ImageFont.load_default(size=22)
    width = max(width, *(round(font.getlength(title)) for title, _ in drawings))
    most = max(1, (_WIDTH + _GAP) // (width + _GAP))
    rows = -(-len(drawings) // most)
    columns = -(-len(drawings) // rows)
    size = (columns * (width + _GAP) - _GAP, rows * (height + _TITLE + _GAP) - _GAP)
    whole = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(whole)
    for number, (title, drawing) in enumerate(drawings):
        row, column = divmod(number, columns)
        left, top = column * (width + _GAP), row * (height + _TITLE + _GAP)
        pen.text((left, top + 4), title, fill="black", font=font)
        whole.paste(drawing, (left, top + _TITLE))
    return whole
