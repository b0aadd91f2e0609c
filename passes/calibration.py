"""Calibration data and how statistics are taken from it: deterministic, on the model as it is at that pass."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from ..errors import PassError
from ..prompt import Prompt, Prompter, open_image
from ..surgery.load import Loaded, describe
from ..surgery.talk import Talk, see_all
from .lessons import Lesson

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_QUESTION = "Describe the image."
MEASURED = 32  # prompts that statistics are taken from, at most
_LINE = 'each line is {"image": …, "question": …, "answer": …}'


@dataclass(frozen=True)
class Calibration:
    """Prompts with images, ready for the model; every prompt carries its placeholders unshrunk."""

    prompts: tuple[Prompt, ...]
    origin: str  # a folder, or how the images were made
    tokenizer: Any
    texts: tuple[str, ...] = ()  # every question and answer that the folder has
    lessons: tuple[Lesson, ...] = ()  # what the uncut model says to them, for a recipe that heals
    progress: Callable[[str], None] = lambda _: None  # told by a pass that takes long how far it is


def read_calibration(loaded: Loaded, folder: Path | None, limit: int | None = MEASURED) -> Calibration:
    """Read calibration images, or make noise images when there is no folder.

    Args:
        folder: images, optionally with `questions.jsonl` whose lines have `image` and `question`. None looks for
            `calibration/` beside the weights and otherwise uses 8 seeded noise images, which the plan announces.
        limit: the first so many; None takes all.

    Raises:
        PassError: a folder without images, or a corrupt image.
    """
    a = describe(loaded.model)
    prompter = Prompter(loaded.processor, a.layout)
    if folder is None:
        rng = np.random.default_rng(0)
        sizes = [a.buckets[i % len(a.buckets)].size for i in range(8)]
        noise = [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
        prompts = tuple(prompter([i], _QUESTION) for i in noise)
        return Calibration(prompts, "8 seeded noise images", loaded.processor.tokenizer, (_QUESTION,))
    lines = read_questions(folder)
    pairs = [(folder / line["image"], line["question"]) for line in lines] or [
        (p, _QUESTION) for p in sorted(folder.glob("*")) if p.suffix.lower() in _SUFFIXES
    ]
    if not pairs:
        raise PassError(f"`{folder}` has no images", hint=f"put {', '.join(_SUFFIXES)} files there")
    prompts = tuple(prompter([open_image(p)], q) for p, q in pairs[:limit])
    said = [line[key] for line in lines for key in ("question", "answer") if isinstance(line.get(key), str)]
    return Calibration(prompts, str(folder), loaded.processor.tokenizer, (_QUESTION, *said))


def read_questions(folder: Path) -> list[dict[str, str]]:
    """The lines of `questions.jsonl`: image, question and, for evaluation, answer.

    Raises:
        PassError: a line that is not JSON or lacks a field.
    """
    path = folder / "questions.jsonl"
    if not path.is_file():
        return []
    lines = []
    for number, text in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            line = json.loads(text)
            fields = {k: line.get(k) for k in ("image", "question")}
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
            raise PassError(f"`{path}` line {number} is not a JSON object: {error}", hint=_LINE) from error
        if wrong := [k for k, v in fields.items() if not isinstance(v, str)]:
            raise PassError(f"`{path}` line {number}: `{wrong[0]}` is {fields[wrong[0]]!r}, not a text", hint=_LINE)
        lines.append(line)
    return lines


def observe(
    model: Any,
    modules: Sequence[nn.Module],
    record: Callable[[int, Sequence[Any], Any], None],
    calibration: Calibration,
) -> None:
    """Run the first calibration prompts and call `record(index, inputs, output)` for each of `modules`."""
    hooks = [m.register_forward_hook(lambda _, args, out, i=i: record(i, args, out)) for i, m in enumerate(modules)]
    try:
        for prompt in calibration.prompts[:MEASURED]:
            shrunk, seen = see_all(model, prompt)
            Talk.read(model, [shrunk], [seen])
    finally:
        for hook in hooks:
            hook.remove()
