"""A picture for a model that has no processor here: the shapes that its tower takes, found by trying them.

transformers' towers take pixels in few ways: one square image, tiles, rows of flattened patches with a grid. Each is
offered in turn; the first that the tower encodes is the bucket, and the features that it gives are counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..errors import ModelError, VlmcutError
from ..manifest import Bucket
from ..surgery.selection import attached
from ..surgery.structure import image_parameters

Geometry = dict[str, tuple[int, ...]]

# What a tower says to pixels that it does not take.
_NO = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError, ZeroDivisionError)
_GIVEN = ("image_sizes", "image_grid_thw", "image_merge_sizes")
_ROWS, _COLUMNS = 4, 6  # tokens of a grid; unequal, so that swapped axes show


def sketch(model: Any) -> Bucket:
    """A bucket of an attached model's own making; the smallest image that its tower takes.

    Raises:
        ModelError: no known way to give it an image; with what the tower said to the likeliest one.
    """
    family, config = attached(model).family, model.config
    needed = [name for name, must in image_parameters(model).items() if must]
    given = family.tensors(dict.fromkeys(("pixel_values", *_GIVEN), (1,) * 6))
    if unknown := [name for name in needed if name not in ("pixel_values", *given)]:
        raise ModelError(
            f"`{config.model_type}`: its get_image_features needs {' and '.join(unknown)} beside pixels and sizes",
            hint=f"vlmcut knows pixel_values, {', '.join(_GIVEN)}",
        )
    said = ""
    for size, geometry in shapes(model):
        try:
            with torch.no_grad():
                constants = family.constants(model, geometry)
                pixels = torch.full(geometry["pixel_values"], 0.5, dtype=model.dtype)
                encoded = family.encode(model, pixels, geometry, constants)
        except VlmcutError:
            raise
        except _NO as error:
            words = (str(error).strip().splitlines() or ["no words"])[0]
            said = said or f"{type(error).__name__}: {words}"
            continue
        return Bucket(size=size, geometry=geometry, tokens=int(encoded.tokens.shape[0]))
    names = ", ".join(image_parameters(model))
    raise ModelError(
        f"`{config.model_type}`: get_image_features({names}) takes no image of a shape that vlmcut knows ({said})",
        hint="load it from a folder with its processor, which makes that shape",
    )


def shapes(model: Any) -> Iterator[tuple[tuple[int, int], Geometry]]:
    """Pixels of an image and what a processor would make of it, the likeliest first."""
    vision = model.config.vision_config
    accepted, patch = image_parameters(model), _number(vision, "patch_size") or 14
    channels = _number(vision, "num_channels", "in_channels", "in_chans") or 3
    if "image_grid_thw" in accepted:
        yield from _grids(model, patch, channels)
        return
    side = _number(vision, "image_size", "img_size") or 4 * patch
    square = (side, side)
    if "image_sizes" in accepted:
        merge = _number(model.config, "spatial_merge_size") or 1
        wide = (_ROWS * patch * merge, _COLUMNS * patch * merge)
        fixed: Geometry = {"pixel_values": (1, channels, *wide), "image_sizes": wide}
        tiled: Geometry = {"pixel_values": (1, 3, channels, *square), "image_sizes": (side, 2 * side)}
        either = [(wide, fixed), ((side, 2 * side), tiled)]
        yield from reversed(either) if hasattr(model.config, "image_grid_pinpoints") else either
    yield square, {"pixel_values": (1, channels, *square)}
    yield square, {"pixel_values": (1, 1, channels, *square)}


def _grids(model: Any, patch: int, channels: int) -> Iterator[tuple[tuple[int, int], Geometry]]:
    vision = model.config.vision_config
    merge = _number(vision, "spatial_merge_size", "merge_size") or _number(model.config, "spatial_merge_size") or 1
    frames = _number(vision, "temporal_patch_size")
    # Video-LLaMA 3's processor says of each image how it is merged: 1, for images.
    sizes: Geometry = {"image_merge_sizes": (merge,)} if "image_merge_sizes" in image_parameters(model) else {}
    for rows, columns in ((_ROWS, _COLUMNS), (_ROWS, _ROWS)):
        high, wide = rows * merge, columns * merge
        size, count = (high * patch, wide * patch), high * wide
        for depth in dict.fromkeys([frames or 1, 1, 2]):
            for pixels in ((count, channels * depth * patch**2), (count, channels, patch, patch)):
                yield size, {"pixel_values": pixels, "image_grid_thw": (1, high, wide)} | sizes


def _number(config: Any, *names: str) -> int | None:
    for name in names:
        value = getattr(config, name, None)
        value = value[0] if isinstance(value, (list, tuple)) and value else value
        if isinstance(value, int):
            return value
    return None
