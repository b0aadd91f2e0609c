"""From images and a text to the numbers that the graphs take; NumPy only, shared by calibration, checks and runner.

The processor writes the placeholders of the whole image; a model that keeps some of its tokens needs as many fewer.
Shrinking drops the placeholders of the dropped tokens, never text, so an image may stand anywhere in the prompt,
several images work, and markers between the tiles of an image stay where they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from .errors import BundleError
from .manifest import Bucket, Layout, TokenBudget, visual_hidden, visual_left

IMAGE_TAG = "<image>"  # in a user's prompt: where an image goes
# What processors say of an image, beside its pixels.
_GEOMETRY = ("image_sizes", "image_grid_thw", "image_merge_sizes", "image_position_ids", "spatial_shapes")
_VIDEO = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")


def open_image(path: str | Path) -> Image.Image:
    """Read an image file as RGB.

    Raises:
        BundleError: no such file, a video, or not an image.
    """
    if Path(path).suffix.lower() in _VIDEO:
        raise BundleError(f"`{path}` is a video, a bundle takes images", hint="give its frames, one --image for each")
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise BundleError(f"no image `{path}`", hint="check the path") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise BundleError(f"`{path}` is not a readable image: {error}", hint="give a PNG or JPEG file") from error


@dataclass(frozen=True)
class Picture:
    """One image as its family's processor makes it, or a clip of several."""

    pixel_values: np.ndarray  # float32, of the shape that the processor gives for one image; [frames, …] of a clip
    geometry: dict[str, tuple[int, ...]]  # that shape and every size or grid the processor gives beside it, of one
    frames: int = 1  # images of this geometry that are seen together
    question: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # int64 [M]: what is asked about it

    def bucket(self, buckets: Sequence[Bucket]) -> int:
        """Index of the bucket with this geometry.

        Raises:
            BundleError: none has it.
        """
        for index, bucket in enumerate(buckets):
            if bucket.geometry == self.geometry and bucket.frames == self.frames:
                return index
        have = "; ".join(f"{b.name}: {_geometry(b.geometry)}" for b in buckets)
        raise BundleError(
            f"the image makes {_geometry(self.geometry)}, which no bucket has ({have})",
            hint="resize it to a bucket's size (`run --fit` does), or convert again with its --image-size",
        )


def _geometry(geometry: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {'x'.join(map(str, numbers))}" for name, numbers in geometry.items())


@dataclass(frozen=True)
class Prompt:
    """One prompt. Visual tokens are counted through all its pictures, in order."""

    input_ids: np.ndarray  # int64 [1, length]
    visual_index: np.ndarray  # int64 [1, length]: which visual token this column takes, -1 for text
    position_ids: np.ndarray  # int64 [axes, length]
    next_position: int  # of the first token after the prompt, in every row
    pictures: tuple[Picture, ...]
    counts: tuple[int, ...]  # visual tokens of each picture in this prompt
    layout: Layout
    said: int = 0  # columns at the end that are an answer's

    @property
    def length(self) -> int:
        return self.input_ids.shape[1]

    def rows(self, budget: TokenBudget, layer: int = 0) -> int:
        """Columns that a language layer caches."""
        hidden = visual_hidden(budget.carriers, self.counts)
        return self.length - visual_left(budget.ladder, self.counts, layer) - hidden

    def shrink(self, kept: Sequence[np.ndarray]) -> Prompt:
        """The same prompt with the placeholders of the kept tokens only, int64 [K] for each picture."""
        starts = np.cumsum((0, *self.counts))
        chosen = np.concatenate([start + k for start, k in zip(starts, kept, strict=False)] or [np.zeros(0, np.int64)])
        index = self.visual_index[0]
        column = (index < 0) | np.isin(index, chosen)
        rank = np.where(index < 0, -1, np.searchsorted(chosen, index))[column]
        positions, after = self.position_ids[:, column], self.next_position
        if self.layout.positions == "compact":
            positions = np.arange(column.sum())[None] + self.layout.first_position
            after = int(column.sum()) + self.layout.first_position
        return replace(
            self,
            input_ids=self.input_ids[:, column],
            visual_index=rank[None],
            position_ids=positions,
            next_position=after,
            counts=tuple(len(k) for k in kept),
        )

    def answered(self, tokens: Sequence[int]) -> Prompt:
        """The same with the tokens of an answer behind it."""
        count = len(tokens)
        further = np.arange(self.next_position, self.next_position + count)
        return replace(
            self,
            input_ids=np.append(self.input_ids, np.array(tokens, np.int64)[None], axis=1),
            visual_index=np.append(self.visual_index, np.full((1, count), -1), axis=1),
            position_ids=np.append(self.position_ids, np.tile(further, (len(self.position_ids), 1)), axis=1),
            next_position=self.next_position + count,
            said=self.said + count,
        )

    def pad(self, budget: TokenBudget) -> dict[str, np.ndarray]:
        """`input_ids`, `visual_index` [1, S] and `position_ids` [axes, S], padded on the right, and `length` [1].

        In `visual_index` every picture has as many rows of the feature table as its budget allows one.

        Raises:
            BundleError: more images, or more tokens, than the budget holds.
        """
        if len(self.pictures) > budget.images:
            raise BundleError(
                f"{len(self.pictures)} images in the prompt, the budget holds {budget.images}",
                hint=f"convert again with --images {len(self.pictures)}",
            )
        text = self.length - sum(self.counts)
        if self.length > budget.sequence:
            raise BundleError(
                f"the prompt has {self.length} tokens ({len(self.pictures)} images of {sum(self.counts)} in all and "
                f"{text} of text), the budget holds {budget.sequence}",
                hint=f"shorten it, or convert again with --text-tokens {text}",
            )
        if text > budget.text_tokens and (budget.ladder or budget.carriers or budget.idle):  # else taken for visual
            raise BundleError(
                f"the prompt has {text} tokens of text, the budget holds {budget.text_tokens}: in some layers there is "
                "no room for text in the place of images",
                hint=f"shorten it, or convert again with --text-tokens {text}",
            )
        assert max(self.counts, default=0) <= budget.visual_tokens  # a prompt that was not shrunk would overlap
        slots = [np.arange(n) + i * budget.visual_tokens for i, n in enumerate(self.counts)]
        slot = np.concatenate([*slots, [-1]]).astype(np.int64)  # the last is what index -1 takes
        room = ((0, 0), (0, budget.sequence - self.length))
        return {
            # A placeholder's own id has no embedding in some families, and its row is replaced anyway.
            "input_ids": np.pad(np.where(self.visual_index < 0, self.input_ids, 0), room),
            "visual_index": np.pad(slot[self.visual_index], room, constant_values=-1),
            "position_ids": np.pad(self.position_ids, room),
            "length": np.array([self.length]),
        }


def positions(layout: Layout, visual_index: np.ndarray, pictures: Sequence[Picture]) -> tuple[np.ndarray, int]:
    """Position ids of a whole prompt, and the position after it.

    Args:
        visual_index: int64 [1, length] of the unpruned prompt.

    Returns:
        int64 [axes, length]; for M-RoPE (Qwen2-VL, arXiv:2409.12191, section 2.1) text counts on in all three rows,
        an image of a t x h x w grid of tokens takes start + (t, h, w), and what follows starts after its largest.
    """
    length = visual_index.shape[1]
    if layout.positions == "compact":
        return np.arange(length)[None] + layout.first_position, length + layout.first_position
    each = [p.geometry["image_grid_thw"] for p in pictures for _ in range(p.frames)]
    grids = [(t, h // layout.merge, w // layout.merge) for t, h, w in each]
    starts = np.cumsum([0] + [int(np.prod(grid)) for grid in grids])
    found = np.zeros((3, length), np.int64)
    column = after = 0
    while column < length:
        if visual_index[0, column] < 0:
            found[:, column] = after
            column, after = column + 1, after + 1
            continue
        grid = grids[int(np.searchsorted(starts, visual_index[0, column]))]
        places = np.indices(grid).reshape(3, -1)
        found[:, column : column + places.shape[1]] = places + after
        column, after = column + places.shape[1], after + max(grid[1:])
    return found, after


def assemble(layout: Layout, input_ids: np.ndarray, pictures: Sequence[Picture], counts: Sequence[int]) -> Prompt:
    """A prompt from the ids of a whole prompt, int64 [1, length], whose placeholders stand for `pictures` in order."""
    places = input_ids[0] == layout.image_token_id
    index = np.where(places, np.cumsum(places) - 1, -1)[None]
    position_ids, after = positions(layout, index, pictures)
    return Prompt(input_ids, index, position_ids, after, tuple(pictures), tuple(counts), layout)


class Prompter:
    """Applies a processor and its chat template.

    Args:
        processor: as `processors.open_processor` gives it, without torch.
    """

    def __init__(self, processor: Any, layout: Layout) -> None:
        self.processor = processor
        self.layout = layout

    def __call__(self, images: Sequence[Image.Image], text: str) -> Prompt:
        """Build a prompt. `<image>` in `text` places an image; images without a place come first.

        Raises:
            BundleError: more `<image>` tags than images, or a processor that wrote another number of placeholders.
        """
        inputs = self.raw(images, text)
        ids = np.asarray(inputs["input_ids"], dtype=np.int64)
        if self.layout.vocabulary is not None:
            self.layout.vocabulary.check(ids[ids != self.layout.image_token_id], self.processor.tokenizer.decode)
        placeholders = int((ids == self.layout.image_token_id).sum())
        seen = [(_picture(inputs), placeholders)] if len(images) == 1 else [self.look(image) for image in images]
        if placeholders != sum(count for _, count in seen):
            raise BundleError(
                f"the processor wrote {placeholders} image tokens for {len(images)} images of "
                f"{', '.join(str(count) for _, count in seen)}",
                hint="the processor does not belong to this model",
            )
        words = self.processor.tokenizer(text.replace(IMAGE_TAG, " ").strip(), add_special_tokens=False)["input_ids"]
        question = np.asarray(words, dtype=np.int64)
        clips = [(replace(p, question=question), count) for p, count in self._clips(seen)]
        return assemble(self.layout, ids, [p for p, _ in clips], [count for _, count in clips])

    def _clips(self, seen: list[tuple[Picture, int]]) -> list[tuple[Picture, int]]:
        """Pictures in runs of the layout's frames."""
        frames = self.layout.frames
        if frames == 1:
            return seen
        if len(seen) % frames:
            raise BundleError(
                f"{len(seen)} images, but clips have {frames} frames",
                hint=f"give {frames} images for each clip, or convert again with another --frames",
            )
        found = []
        for start in range(0, len(seen), frames):
            run = [picture for picture, _ in seen[start : start + frames]]
            if other := next((p for p in run if p.geometry != run[0].geometry), None):
                raise BundleError(
                    f"frames of one clip differ: {_geometry(run[0].geometry)} and {_geometry(other.geometry)}",
                    hint="make them one size",
                )
            clip = replace(run[0], pixel_values=np.stack([p.pixel_values for p in run]), frames=frames)
            found.append((clip, sum(count for _, count in seen[start : start + frames])))
        return found

    def raw(self, images: Sequence[Image.Image], text: str) -> Mapping[str, Any]:
        """What the processor makes of images and text, as NumPy arrays."""
        tags = text.count(IMAGE_TAG)
        if tags > len(images):
            raise BundleError(
                f"the prompt has {tags} {IMAGE_TAG} tags for {len(images)} images", hint="give one --image for each"
            )
        return self._process(list(images), self._render(text, len(images), tags))

    def look(self, image: Image.Image) -> tuple[Picture, int]:
        """One image alone: what the processor makes of it, and how many placeholders it writes for it."""
        inputs = self._process([image], self._render("", 1, 0))
        return _picture(inputs), int((np.asarray(inputs["input_ids"]) == self.layout.image_token_id).sum())

    def bucket(self, size: tuple[int, int]) -> Bucket:
        """The bucket of a picture of this height and width in pixels."""
        picture, tokens = self.look(Image.new("RGB", (size[1], size[0]), (127, 127, 127)))
        return Bucket(size=size, geometry=picture.geometry, tokens=tokens)

    def _process(self, images: list[Image.Image], rendered: str) -> Any:
        return self.processor(images=images or None, text=rendered, return_tensors="np")

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
        separator = getattr(self.processor, "separator", "\n")
        return separator.join(tag if part["type"] == "image" else part["text"] for part in content)


def _picture(inputs: Mapping[str, Any]) -> Picture:
    """The one image of a processor's output."""
    pixels = np.asarray(inputs["pixel_values"], dtype=np.float32)
    geometry = {"pixel_values": pixels.shape}
    for name in _GEOMETRY:
        if inputs.get(name) is not None:
            geometry[name] = tuple(int(n) for n in np.asarray(inputs[name]).reshape(-1))
    return Picture(pixels, geometry)
