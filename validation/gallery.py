"""What several methods keep of one picture, side by side; in eager, so nothing needs to be exported."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from ..errors import ModelError
from ..passes import folder as cut_folder
from ..passes.recipe import make
from ..passes.trim_tower import TrimTower
from ..prompt import Prompter
from ..runtime.overlay import Kept, fitting_picture, side_by_side
from ..surgery.anatomy import Anatomy
from ..surgery.talk import see_picture
from .sweep_plan import Cell, Keep, applied


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
    return side_by_side([shown], found, bucket.panels), found
