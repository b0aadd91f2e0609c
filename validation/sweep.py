"""Which method suits this model: every method at every budget, on held-out questions, beside baselines.

`random` is drawn with several seeds, and its mean is what every other method has to beat. Nothing is tuned, no seed is
picked, and a method that does not apply is listed with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import VlmcutError
from ..passes import folder as cut_folder
from ..passes.recipe import make
from ..surgery.anatomy import Anatomy
from ..surgery.load import Size, describe
from . import quality, stock
from .quality import Question
from .sweep_answers import scores
from .sweep_plan import Design, Progress
from .sweep_report import Sweep
from .sweep_times import RUNS, times


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What to sweep over beside its design."""

    model: str
    quality: Path | None = None  # images and questions.jsonl; MODEL/heldout for None
    questions: int = 500  # the first so many
    seeds: int = 3  # of methods that draw
    timing: bool = True
    threads: int = 0  # of one operator; 0 lets ONNX Runtime choose
    sizes: tuple[Size, ...] = ()
    revision: str | None = None
    trust_remote_code: bool = False

    @property
    def folder(self) -> Path:
        """Where the questions are.

        Raises:
            VlmcutError: nowhere, or a number that is too small.
        """
        for name, least in (("questions", 1), ("seeds", 1), ("threads", 0)):
            if getattr(self, name) < least:
                raise VlmcutError(f"--{name} {getattr(self, name)} is too small", hint=f"choose {least} or more")
        found = self.quality or Path(self.model) / "heldout"
        if not (found / "questions.jsonl").is_file():
            raise VlmcutError(
                f"`{found}` has no questions.jsonl, and methods are judged by answers",
                hint="give --quality a folder with images and questions.jsonl; see docs/bundle.md for its format",
            )
        return found


def run(asked: Asked, plan: Design, progress: Progress = lambda _: None, runs: int = RUNS) -> Sweep:
    """Answer and time everything that was planned.

    Args:
        runs: of each graph that is timed.

    Raises:
        VlmcutError: no questions, or questions that do not fit the model.
    """
    folder = asked.folder
    progress("loading the model")
    loaded = cut_folder.load(
        asked.model, sizes=asked.sizes, revision=asked.revision, trust_remote_code=asked.trust_remote_code
    )
    questions = quality.read_set(loaded, folder, asked.questions)
    a = describe(loaded.model)
    check_room(a, questions)
    progress("checking that vlmcut reads this model as transformers does")
    stock.check(loaded)
    make([]).apply(loaded.model, None)  # the dead end of the tower
    found = scores(loaded, plan, questions, seeds=asked.seeds, progress=progress)
    timed = None
    if asked.timing:
        text = max(question.prompt.length - sum(question.prompt.counts) for question in questions)
        timed = times(
            loaded.model, plan, text_tokens=text, new_tokens=quality.ANSWER, runs=runs, threads=asked.threads,
            progress=progress,
        )  # fmt: skip
    return Sweep(asked.model, len(questions), str(folder), plan, found, timed, runs, asked.threads)


def check_room(a: Anatomy, questions: Sequence[Question], new_tokens: int = quality.ANSWER) -> None:
    """Refuse questions that do not fit the model's positions.

    Raises:
        VlmcutError: the longest prompt and its answer have more columns than the model knows positions.
    """
    longest = max(question.prompt.length for question in questions)
    if longest + new_tokens > a.language.max_positions:
        raise VlmcutError(
            f"the longest prompt has {longest} columns and an answer {new_tokens} tokens, the model knows "
            f"{a.language.max_positions} positions",
            hint="ask shorter questions",
        )
