"""`vlmcut sweep --search` in order: questions, search, confirmation on questions that the search never saw."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from ..errors import VlmcutError, nearest
from ..passes import folder as cut_folder
from ..passes.calibration import read_calibration
from ..passes.recipe import Recipe
from ..surgery.anatomy import Anatomy
from ..surgery.load import Size, describe
from . import quality, stock
from .quality import Question, content
from .search import Outcome, search
from .search_axes import Axis, Choice, axes
from .search_judge import OBJECTIVES, RUNS, Confirmed, ModelJudge
from .sweep import check_room
from .sweep_plan import Progress, Refused


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What to search for."""

    model: str
    min_quality: float = 0.98  # of the original's right answers
    objective: str = "ttft"
    minutes: float = 30.0  # after which nothing new is asked
    width: int = 4  # of the beam
    methods: tuple[str, ...] = ()  # of choosing tokens
    prune: tuple[float, ...] = ()
    keep: tuple[int, ...] = ()
    quality: Path | None = None  # questions of the search; MODEL/calibration for None
    confirm: Path | None = None  # held-out questions; MODEL/heldout for None
    calibration: Path | None = None  # MODEL/calibration for None
    questions: int = 500  # the first so many of either set
    seeds: int = 3
    threads: int = 0
    sizes: tuple[Size, ...] = ()
    revision: str | None = None
    trust_remote_code: bool = False

    def check(self) -> tuple[Path, Path]:
        """Refuse what can be refused before a model is read.

        Returns:
            The folders of the search's and of the held-out questions.

        Raises:
            VlmcutError: a number out of range, an unknown objective, questions that are missing or the same twice.
        """
        if not 0 < self.min_quality <= 1:
            raise VlmcutError(
                f"--min-quality {self.min_quality:g} is not a fraction of the original's right answers",
                hint="choose 0 < Q <= 1, for example 0.98",
            )
        if self.objective not in OBJECTIVES:
            raise VlmcutError(f"no objective `{self.objective}`", hint=nearest(self.objective, OBJECTIVES))
        if not self.minutes > 0:
            raise VlmcutError(f"--minutes {self.minutes:g} leaves no time", hint="choose more than 0")
        for name, least in (("width", 1), ("questions", 1), ("seeds", 1), ("threads", 0)):
            if getattr(self, name) < least:
                flag = {"width": "beam"}.get(name, name)
                raise VlmcutError(f"--{flag} {getattr(self, name)} is too small", hint=f"choose {least} or more")
        folders = (self.quality or Path(self.model) / "calibration", self.confirm or Path(self.model) / "heldout")
        for folder, flag in zip(folders, ("--quality", "--confirm"), strict=True):
            if not (folder / "questions.jsonl").is_file():
                raise VlmcutError(
                    f"`{folder}` has no questions.jsonl, and recipes are judged by answers",
                    hint=f"give {flag} a folder with images and questions.jsonl; see docs/bundle.md for its format",
                )
        return folders


@dataclass(frozen=True)
class Found:
    """Everything that a search found."""

    wanted: Wanted
    folders: tuple[Path, Path]  # of the search's and of the held-out questions
    counts: tuple[int, int]  # of questions
    text_tokens: int  # of the longest question, the room for text in the language model's graphs
    original: float  # accuracy on the search's questions
    axes: tuple[Axis, ...]
    refused: tuple[Refused, ...]  # methods
    outcome: Outcome
    flops: dict[Choice, int]  # of the original and of everything that was asked
    recipes: dict[Choice, Recipe]  # resolved: of the winner and the best single cut
    held: dict[Choice, Confirmed]  # of the same
    minutes: float  # that it took, confirmation included
    runs: tuple[int, int]  # of each graph, while searching and at the end


def run(wanted: Wanted, a: Anatomy, progress: Progress = lambda _: None, runs: tuple[int, int] = RUNS) -> Found:
    """Search, and confirm what was found.

    Args:
        a: the original's anatomy.
        runs: of each graph that is timed, while searching and at the end.

    Raises:
        VlmcutError: no questions, questions that do not fit the model or are in both sets, nothing that keeps the
            answers and costs less.
    """
    start = time.monotonic()
    folders = wanted.check()
    every, refused = axes(a, wanted.methods, prune=wanted.prune, keep=wanted.keep)
    progress("loading the model")
    loaded = cut_folder.load(
        wanted.model, sizes=wanted.sizes, revision=wanted.revision, trust_remote_code=wanted.trust_remote_code
    )
    if loaded.recipe:
        raise VlmcutError(f"`{wanted.model}` is a cut model already", hint="search from the original model")
    asked, held = (quality.read_set(loaded, folder, wanted.questions) for folder in folders)
    check_room(describe(loaded.model), [*asked, *held])
    _check_apart(asked, held, folders)
    progress("checking that vlmcut reads this model as transformers does")
    stock.check(loaded)
    beside = Path(wanted.model) / "calibration"
    calibration = read_calibration(loaded, wanted.calibration or (beside if beside.is_dir() else None))
    progress(f"calibrating on {len(calibration.prompts)} prompts from {calibration.origin}")
    text_tokens = max(q.prompt.length - sum(q.prompt.counts) for q in [*asked, *held])
    progress(f"answering {len(asked)} questions with the original model")
    judge = ModelJudge(
        loaded, every, asked, calibration, wanted.objective, text_tokens=text_tokens, seeds=wanted.seeds, runs=runs,
        threads=wanted.threads, progress=progress,
    )  # fmt: skip
    end, took = start + 60 * wanted.minutes, (time.monotonic() - start) / 60
    if took >= wanted.minutes:
        raise VlmcutError(
            f"nothing was asked: the time was over ({wanted.minutes:g} minutes), and reading the model and answering "
            f"{len(asked)} questions with it alone took {took:.1f}",
            hint="give more --minutes, or fewer --questions: every recipe answers all of them",
        )
    outcome = search(
        every, judge, least=wanted.min_quality, width=wanted.width, over=lambda: time.monotonic() >= end,
        progress=progress,
    )  # fmt: skip
    chosen = dict.fromkeys((outcome.winner, outcome.single))
    progress(f"confirming on {len(held)} held-out questions")
    return Found(
        wanted=wanted,
        folders=folders,
        counts=(len(asked), len(held)),
        text_tokens=text_tokens,
        original=judge.right / len(asked),
        axes=every,
        refused=refused,
        outcome=outcome,
        flops={choice: judge.flops(choice) for choice in ((), *outcome.points)},
        recipes={choice: judge.cut(choice)[1] for choice in chosen},
        held=judge.confirm(tuple(chosen), held),
        minutes=(time.monotonic() - start) / 60,
        runs=runs,
    )


def _check_apart(asked: list[Question], held: list[Question], folders: tuple[Path, Path]) -> None:
    """Refuse pictures that are in both sets: answers to them would confirm nothing."""
    seen = {content(picture) for question in asked for picture in question.prompt.pictures}
    twice = {content(picture) for question in held for picture in question.prompt.pictures} & seen
    if twice:
        raise VlmcutError(
            f"{len(twice)} of {len(seen)} pictures of `{folders[0]}` are in `{folders[1]}` too",
            hint="confirm on pictures that the search does not see: --quality and --confirm",
        )
