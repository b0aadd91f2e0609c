"""From images and a text to the numbers that the graphs take; NumPy only, shared by calibration, checks and runner.

The processor writes one placeholder per patch of an image; a model that keeps K tokens per image needs K. Shrinking
drops placeholders, never text, so an image may stand anywhere in the prompt and several images work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from .errors import BundleError
from .manifest import TokenBudget

IMAGE_TAG = "<image>"  # in a user's prompt: where an image goes


def open_image(path: str | Path) -> Image.Image:
    """Read an image file as RGB.

    Raises:
        BundleError: no such file, or not an image.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise BundleError(f"no image `{path}`", hint="check the path") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise BundleError(f"`{path}` is not a readable image: {error}", hint="give a PNG or JPEG file") from error


@dataclass(frozen=True)
class Prompt:
    """One prompt. `per_image` placeholders stand for each image."""

    input_ids: np.ndarray  # int64 [1, length]
    visual_index: np.ndarray  # int64 [1, length]: which visual token this column takes, -1 for text
    pixel_values: np.ndarray | None  # float32 [images, 3, height, width]
    images: int
    per_image: int

    @property
    def length(self) -> int:
        return self.input_ids.shape[1]

    def shrink(self, keep: int) -> Prompt:
        """The same prompt with `keep` placeholders for each image."""
        index = self.visual_index[0]
        column = (index < 0) | (index % self.per_image < keep)
        kept = index[column]
        kept = np.where(kept < 0, -1, kept // self.per_image * keep + kept % self.per_image)
        return replace(self, input_ids=self.input_ids[:, column], visual_index=kept[None], per_image=keep)

    def pad(self, budget: TokenBudget) -> tuple[np.ndarray, np.ndarray]:
        """`input_ids` and `visual_index` padded on the right to the budget's sequence.

        Raises:
            BundleError: more images, or more tokens, than the budget holds.
        """
        if self.images > budget.images:
            raise BundleError(
                f"{self.images} images in the prompt, the budget holds {budget.images}",
                hint=f"convert again with --images {self.images}",
            )
        if self.length > budget.sequence:
            text = self.length - self.images * self.per_image
            raise BundleError(
                f"the prompt has {self.length} tokens ({self.images} images of {self.per_image} and {text} of text), "
                f"the budget holds {budget.sequence}",
                hint=f"shorten it, or convert again with --text-tokens {text}",
            )
        room = ((0, 0), (0, budget.sequence - self.length))
        return np.pad(self.input_ids, room), np.pad(self.visual_index, room, constant_values=-1)


class Prompter:
    """Applies a processor and its chat template.

    Args:
        processor: a transformers processor with the PIL image backend.
        image_token_id: the placeholder's id.
        per_image: placeholders that the processor writes for one image.
    """

    def __init__(self, processor: Any, image_token_id: int, per_image: int) -> None:
        self.processor = processor
        self.image_token_id = image_token_id
        self.per_image = per_image

    def __call__(self, images: Sequence[Image.Image], text: str) -> Prompt:
        """Build a prompt. `<image>` in `text` places an image; images without a place come first.

        Raises:
            BundleError: more `<image>` tags than images, or a processor that wrote another number of placeholders.
        """
        tags = text.count(IMAGE_TAG)
        if tags > len(images):
            raise BundleError(
                f"the prompt has {tags} {IMAGE_TAG} tags for {len(images)} images", hint="give one --image for each"
            )
        rendered = self._render(text, len(images), tags)
        inputs = self.processor(images=list(images) or None, text=rendered, return_tensors="np")
        ids = np.asarray(inputs["input_ids"], dtype=np.int64)
        places = ids[0] == self.image_token_id
        if places.sum() != len(images) * self.per_image:
            raise BundleError(
                f"the processor wrote {places.sum()} image tokens for {len(images)} images of {self.per_image}",
                hint="the processor does not belong to this model",
            )
        index = np.where(places, np.cumsum(places) - 1, -1)[None]
        pixels = np.asarray(inputs["pixel_values"], dtype=np.float32) if images else None
        return Prompt(ids, index, pixels, len(images), self.per_image)

    def _render(self, text: str, images: int, tags: int) -> str:
        pieces = text.split(IMAGE_TAG)
        content: list[dict[str, str]] = [{"type": "image"}] * (images - tags)
        for number, piece in enumerate(pieces):
            if number:
                content.append({"type": "image"})
            if piece.strip() or len(pieces) == 1:
                content.append({"type": "text", "text": piece.strip()})
        if getattr(self.processor, "chat_template", None):
            message = [{"role": "user", "content": content}]
            return self.processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        tag = getattr(self.processor, "image_token", IMAGE_TAG)
        return "\n".join(tag if part["type"] == "image" else part["text"] for part in content)
