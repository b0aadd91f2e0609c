"""Answers of every method on one set of questions, in eager.

A picture goes through the tower once; each method then chooses from what the tower left (`surgery.vision.look`), and
the language model reads the rest. Methods inside the tower look for themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..passes.tokens.methods import TableSelector
from ..prompt import Picture, Prompt
from ..surgery.families.base import Encoded
from ..surgery.load import Loaded
from ..surgery.selection import Selection, Selector, TowerState, attached
from ..surgery.talk import see_picture
from ..surgery.vision import Seen, chosen, look, prepare, read_question
from . import quality
from .quality import Question, content
from .sweep_plan import ORIGINAL, Cell, Design, Progress, applied

_CACHE = 1 << 30  # bytes of tower outputs that are held at once


@dataclass(frozen=True)
class Score:
    """How a method answered: fractions of the questions, one for each seed."""

    accuracy: tuple[float, ...]
    agreement: tuple[float, ...]  # with the original's answers


Scores = dict[Cell | None, Score]  # None is the original


def scores(
    loaded: Loaded,
    plan: Design,
    questions: Sequence[Question],
    *,
    seeds: int = 3,
    new_tokens: int = quality.ANSWER,
    progress: Progress = lambda _: None,
) -> Scores:
    """Answer all questions with every cell.

    Args:
        loaded: the trimmed model, without a selection.
        seeds: draws of a method that draws; 0, 1, …
    """
    draws = [(None, 0), *((c, s) for c in plan.cells for s in range(seeds if c.draws else 1))]
    answers: dict[tuple[Cell | None, int], list[str]] = {draw: [] for draw in draws}
    chunks = Chunks(loaded, [c for c in plan.cells if c.row.inside is None])
    for chunk in chunks.of(questions):
        for number, (cell, seed) in enumerate(draws, start=1):
            progress(f"answering {number}/{len(draws)}: {ORIGINAL if cell is None else cell.text}")
            looked = chunk.looked(cell, seed)
            answers[cell, seed] += quality.say(loaded, looked, new_tokens)
    first = answers[None, 0]
    found: Scores = {}
    for cell in (None, *plan.cells):
        mine = [answers[draw] for draw in draws if draw[0] == cell]
        found[cell] = Score(
            tuple(quality.accuracy(each, questions) for each in mine),
            tuple(sum(a == b for a, b in zip(each, first, strict=True)) / len(first) for each in mine),
        )
    return found


@dataclass(frozen=True)
class Union(TableSelector):
    """Looks at everything that one of these selectors wants; as a row of the table it chooses by constants."""

    selectors: tuple[Selector, ...] = ()

    def blocks(self, scored: Sequence[int]) -> Sequence[int]:
        return sorted({block for selector in self.selectors for block in selector.blocks(scored)})

    @property
    def outputs(self) -> Sequence[int]:
        return sorted({block for selector in self.selectors for block in selector.outputs})


@dataclass(frozen=True)
class Look:
    """What the tower made of one picture, and all that any method may ask of it."""

    bucket: int
    outputs: Sequence[int]  # the tower blocks whose outputs the state has
    encoded: Encoded
    state: TowerState

    @property
    def bytes(self) -> int:
        tensors = [self.encoded.tokens, *self.encoded.levels]
        tensors += [x for tap in self.state.taps for pair in tap.rows for x in pair] + [*self.state.outputs]
        return sum(x.nbytes for x in tensors)


@torch.no_grad()
def glance(model: Any, picture: Picture, selectors: Sequence[Selector]) -> Look:
    """Encode one picture for all of these selectors."""
    about, union = attached(model), Union("uniform", selectors=tuple(selectors))
    before, pixels = about.selection, torch.from_numpy(picture.pixel_values).to(model.dtype)
    about.selection = Selection(union, tuple(bucket.tokens for bucket in about.buckets))
    try:
        encoded, state = look(model, pixels, prepare(model, picture.geometry))
    finally:
        about.selection = before
    return Look(picture.bucket(about.buckets), union.outputs, encoded, state)


@torch.no_grad()
def choose(model: Any, seen: Look, picture: Picture) -> Seen:
    """As `vision.see` with the model's selection, from what the tower made before."""
    about, state = attached(model), seen.state
    bucket, keep = about.buckets[seen.bucket], about.keep(seen.bucket)
    if about.selection is not None:
        selector = about.selection.selector
        taps = {tap.block: tap for tap in state.taps}
        outputs = dict(zip(seen.outputs, state.outputs, strict=True))
        state = replace(
            state,
            taps=tuple(taps[block] for block in selector.blocks(sorted(about.family.scored(model)))),
            outputs=tuple(outputs[block] for block in selector.outputs),
            text=read_question(model, picture.question),
        )
    return chosen(model, seen.encoded, state, keep, bucket.line_breaks)


@dataclass(frozen=True)
class Chunk:
    """Prompts, and looks at their pictures by content."""

    model: Any
    prompts: list[Prompt]
    looks: dict[bytes, Look]
    cached: frozenset[str]  # methods that choose from a look

    def looked(self, cell: Cell | None, seed: int) -> list[tuple[Prompt, list[Seen]]]:
        """The prompts shrunk to what a cell keeps, with what their pictures became."""
        found = []
        done: dict[bytes, Seen] = {}
        with applied(self.model, cell, seed) as selection:
            asks = selection is not None and selection.selector.text
            for prompt in self.prompts:
                seen = []
                for picture in prompt.pictures:
                    key = content(picture) + (picture.question.tobytes() if asks else b"")
                    if key not in done:
                        done[key] = self._see(cell, picture)
                    seen.append(done[key])
                found.append((prompt.shrink([s.kept.numpy() for s in seen]), seen))
        return found

    def _see(self, cell: Cell | None, picture: Picture) -> Seen:
        if cell is None or cell.method in self.cached:
            return choose(self.model, self.looks[content(picture)], picture)
        return see_picture(self.model, picture)


class Chunks:
    """Questions in runs whose tower outputs fit into memory; one run unless the model is large."""

    def __init__(self, loaded: Loaded, cells: Sequence[Cell], most: int = _CACHE) -> None:
        self.model, self.most = loaded.model, most
        self.cached = frozenset(cell.method for cell in cells)
        found = []
        for cell in {cell.method: cell for cell in cells}.values():
            with applied(self.model, cell) as selection:
                assert selection is not None
                found.append(selection.selector)
        self.selectors = tuple(found)

    def of(self, questions: Sequence[Question]) -> Iterator[Chunk]:
        chunk, held = self._empty(), 0
        for question in questions:
            for picture in question.prompt.pictures:
                key = content(picture)
                if key not in chunk.looks:
                    chunk.looks[key] = glance(self.model, picture, self.selectors)
                    held += chunk.looks[key].bytes
            chunk.prompts.append(question.prompt)
            if held >= self.most:
                yield chunk
                chunk, held = self._empty(), 0
        if chunk.prompts:
            yield chunk

    def _empty(self) -> Chunk:
        return Chunk(self.model, [], {}, self.cached)
