"""Answers and costs of recipes on a real model: cut in eager for the answers, exported for the times."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import PassError, VlmcutError
from ..passes.base import Pass
from ..passes.calibration import Calibration
from ..passes.prune_inside import PruneInside
from ..passes.quantize import Quantize
from ..passes.recipe import Recipe
from ..passes.skip_visual import SkipVisual
from ..passes.slim_visual import SlimVisual
from ..prompt import Prompt
from ..surgery.costs import costs
from ..surgery.load import Loaded, describe, state_dict
from ..surgery.vision import Seen
from . import quality
from .quality import Question
from .search import Cost
from .search_axes import Axis, Choice, recipe
from .search_graphs import Cut, Graphs
from .sweep_plan import Progress

RUNS = (21, 61)  # of each graph, while searching and at the end
_LOOKS = 4  # sets of looks that are remembered, the latest

Looked = Sequence[tuple[Prompt, Sequence[Seen]]]


@dataclass(frozen=True)
class Confirmed:
    """Fractions of questions that the search never saw."""

    accuracy: float
    original: float  # accuracy of the original
    agreement: float  # answers equal to the original's

    @property
    def quality(self) -> float:
        """Questions answered right, as a fraction of the original's."""
        return self.accuracy / self.original if self.original else math.nan


@dataclass(frozen=True)
class Objective:
    """What is made small: graphs that are timed, or a number that is counted."""

    title: str
    unit: str
    roles: tuple[str, ...] = ()


OBJECTIVES = {
    "ttft": Objective("time to first token", "ms", ("vision", "prefill")),
    "decode": Objective("time of one decoded token", "ms", ("decode",)),
    "size": Objective("weights", "bytes"),
    "flops": Objective("work of the first token", "FLOP"),
}


class ModelJudge:
    """A model that is loaded once and copied for each recipe.

    What was measured on calibration images is remembered with the cuts that came before it, and what the pictures
    became with the cuts of the vision part: both are the same numbers that each recipe alone would give.
    """

    def __init__(
        self,
        loaded: Loaded,
        axes: Sequence[Axis],
        questions: Sequence[Question],
        calibration: Calibration,
        objective: str,
        *,
        text_tokens: int,
        seeds: int = 3,
        runs: tuple[int, int] = RUNS,
        threads: int = 0,
        progress: Progress = lambda _: None,
    ) -> None:
        """Answer the questions with the original.

        Args:
            loaded: the original model, nothing cut.
            objective: of `OBJECTIVES`.
            text_tokens: room for text in the language model's graphs.
            seeds: draws of a method that draws; its quality is their mean.
            runs: of each graph, while searching and at the end.

        Raises:
            VlmcutError: the original answers nothing right.
        """
        self.loaded, self.axes, self.questions, self.calibration = loaded, axes, questions, calibration
        self.objective, self.text_tokens, self.seeds, self.runs = OBJECTIVES[objective], text_tokens, seeds, runs
        self.original = describe(loaded.model)
        self._resolved: dict[tuple[Pass, ...], Pass] = {}
        self._looked: dict[tuple[Pass, ...], Looked] = {}
        self._graphs: Graphs | None = None
        if self.objective.roles:
            self._graphs = Graphs(
                self._timed(()), self.objective.roles, _bytes(loaded.model), text_tokens=text_tokens,
                new_tokens=quality.ANSWER, threads=threads, progress=progress,
            )  # fmt: skip
        self.right = sum(self._right((), questions))
        if not self.right:
            raise VlmcutError(
                f"the original answers none of {len(questions)} questions right, and quality is relative to it",
                hint="see docs/bundle.md: answers are compared word for word",
            )

    @property
    def grain(self) -> float:
        """One question, as a fraction of all that the original answers right."""
        return 1 / self.right

    @property
    def whole(self) -> tuple[float, ...]:
        """The parts of the original's cost, which add up to 1, from the rounds that were measured first."""
        return (1.0,) if self._graphs is None else self._graphs.whole

    def refusal(self, choice: Choice) -> str | None:
        """Why a recipe cannot be planned, or None."""
        wanted = recipe(self.axes, choice)
        try:
            wanted.plan(self.original)
        except PassError as error:
            return str(error) + (f" ({error.hint})" if error.hint else "")
        return None

    def quality(self, choice: Choice) -> float:
        """Questions answered right, as a fraction of the original's; the mean over seeds of a method that draws."""
        draws = self.seeds if any(self.axes[axis].draws for axis, _ in choice) else 1
        return sum(sum(self._right(choice, self.questions, seed)) for seed in range(draws)) / draws / self.right

    def costs(self, choices: Sequence[Choice], *, final: bool = False) -> list[Cost]:
        """Measure or count recipes beside the original; `final` with more rounds."""
        if self._graphs is not None:
            return self._graphs.costs([self._timed(choice) for choice in choices], self.runs[final])
        whole, *values = (self._counted(choice) for choice in ((), *choices))
        return [Cost(value / whole, (value / whole,), value) for value in values]

    def flops(self, choice: Choice) -> int:
        """Of the first token to a prompt with one image, as `inspect` counts them."""
        a = recipe(self.axes, choice).plan(self.original)
        return sum(part.flops for part in costs(a, text_tokens=self.text_tokens))

    def cut(self, choice: Choice, seed: int = 0) -> tuple[Any, Recipe]:
        """A copy of the model with a recipe applied, and the recipe resolved, which needs no data."""
        model = copy.deepcopy(self.loaded.model)
        steps: list[Pass] = []
        for step in recipe(self.axes, choice, seed).passes:
            steps.append(self._resolved.get((*steps, step), step))
        done = Recipe(tuple(steps)).apply(model, self.calibration)
        for i, step in enumerate(recipe(self.axes, choice, seed).passes):
            self._resolved[*done.passes[:i], step] = done.passes[i]
        return model, done

    def confirm(self, choices: Sequence[Choice], questions: Sequence[Question]) -> dict[Choice, Confirmed]:
        """Answer other questions with the original and with recipes."""
        first = self._answers((), questions)
        original = quality.accuracy(first, questions)
        found = {}
        for choice in choices:
            answers = self._answers(choice, questions)
            same = sum(a == b for a, b in zip(answers, first, strict=True)) / len(first)
            found[choice] = Confirmed(quality.accuracy(answers, questions), original, same)
        return found

    def _timed(self, choice: Choice) -> Cut:
        return recipe(self.axes, choice).plan(self.original), lambda: self.cut(choice)[0]

    def _counted(self, choice: Choice) -> int:
        return self.flops(choice) if self.objective is OBJECTIVES["flops"] else _bytes(self.cut(choice)[0])

    def _right(self, choice: Choice, questions: Sequence[Question], seed: int = 0) -> list[bool]:
        answers = self._answers(choice, questions, seed)
        return [answer == question.answer for answer, question in zip(answers, questions, strict=True)]

    def _answers(self, choice: Choice, questions: Sequence[Question], seed: int = 0) -> list[str]:
        model, done = self.cut(choice, seed)
        loaded = replace(self.loaded, model=model)
        if questions is not self.questions or describe(model).query_dependent:
            return quality.eager_answers(loaded, questions)
        key = tuple(step for step in done.passes if not _of_language(step))
        if key not in self._looked:
            if len(self._looked) == _LOOKS:
                del self._looked[next(iter(self._looked))]
            self._looked[key] = quality.looks(model, questions)
        return quality.say(loaded, self._looked[key])


def _of_language(step: Pass) -> bool:
    """Whether a pass leaves what the pictures become as it is."""
    if isinstance(step, PruneInside | SkipVisual | SlimVisual):
        return True
    return getattr(step, "part", None) == "language" or (isinstance(step, Quantize) and step.parts == ("language",))


def _bytes(model: Any) -> int:
    return sum(tensor.nbytes for tensor in state_dict(model).values())
