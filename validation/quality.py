"""What the cut cost: answers on a set of questions, exact match, of the original, the cut eager model and the bundle.

Never mixed with exactness: a recipe that answers badly is the recipe's business, a graph that answers otherwise than
its eager model is a fault.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import VlmcutError
from ..passes.calibration import read_questions
from ..passes.lessons import alike, read
from ..prompt import Picture, Prompt, Prompter, open_image
from ..runtime.bundle import Bundle
from ..surgery.load import Loaded, describe
from ..surgery.selection import attached
from ..surgery.talk import greedy, see_picture, stop_ids
from ..surgery.vision import Seen

ANSWER = 48  # tokens, at most
_BATCH = 32


@dataclass(frozen=True)
class Question:
    """One line of `questions.jsonl` with its prompt, placeholders unshrunk."""

    prompt: Prompt
    answer: str
    kind: str


def read_set(loaded: Loaded, folder: Path, limit: int | None = None) -> list[Question]:
    """Read questions with answers.

    Args:
        limit: the first so many; None takes all.

    Raises:
        VlmcutError: no `questions.jsonl`, or a line without an answer.
    """
    lines = read_questions(folder)[:limit]
    if not lines or any("answer" not in line for line in lines):
        raise VlmcutError(
            f"`{folder}` has no questions with answers",
            hint='put images and questions.jsonl there: {"image": …, "question": …, "answer": …} per line',
        )
    a = describe(loaded.model)
    prompter = Prompter(loaded.processor, a.layout)
    return [
        Question(prompter([open_image(folder / x["image"])], x["question"]), x["answer"], x.get("kind", ""))
        for x in lines
    ]


def eager_answers(loaded: Loaded, questions: Sequence[Question], new_tokens: int = ANSWER) -> list[str]:
    """Greedy answers of the eager model."""
    return say(loaded, looks(loaded.model, questions), new_tokens)


def looks(model: Any, questions: Sequence[Question]) -> list[tuple[Prompt, list[Seen]]]:
    """Prompts shrunk to what the model keeps, with what their pictures became: each picture is looked at once."""
    selection = attached(model).selection
    asks = selection is not None and selection.selector.text
    done: dict[bytes, Seen] = {}
    found = []
    for question in questions:
        seen = []
        for picture in question.prompt.pictures:
            key = content(picture) + (picture.question.tobytes() if asks else b"")
            if key not in done:
                done[key] = see_picture(model, picture)
            seen.append(done[key])
        found.append((question.prompt.shrink([s.kept.numpy() for s in seen]), seen))
    return found


def content(picture: Picture) -> bytes:
    """Equal for equal pictures."""
    return hashlib.sha256(picture.pixel_values.tobytes() + repr(sorted(picture.geometry.items())).encode()).digest()


def say(loaded: Loaded, looked: Sequence[tuple[Prompt, Sequence[Seen]]], new_tokens: int = ANSWER) -> list[str]:
    """Greedy answers to shrunk prompts, given what their pictures became.

    Prompts of equal length and images make a batch: padding would move int8 scales.
    """
    answers = [""] * len(looked)
    stop = stop_ids(loaded.model)
    for batch in alike([prompt for prompt, _ in looked], _BATCH):
        talk = read(loaded.model, [looked[i] for i in batch])
        for index, ids in zip(batch, greedy(talk, new_tokens, stop), strict=True):
            answers[index] = loaded.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
    return answers


def bundle_answers(bundle: Bundle, questions: Sequence[Question], new_tokens: int = ANSWER) -> list[str]:
    """Greedy answers of a bundle."""
    tokenizer = bundle.prompter.processor.tokenizer
    most = min(new_tokens, bundle.budget.new_tokens)
    answers = []
    for question in questions:
        ids = list(bundle.tokens(question.prompt, most))
        answers.append(tokenizer.decode(ids, skip_special_tokens=True).strip())
    return answers


def accuracy(answers: Sequence[str], questions: Sequence[Question]) -> float:
    """Fraction of answers that are exactly right."""
    return sum(have == q.answer for have, q in zip(answers, questions, strict=True)) / len(questions)


def table(by_model: dict[str, list[str]], questions: Sequence[Question]) -> dict[str, Any]:
    """Accuracy of each model, and how often each says what the first one says."""
    first = next(iter(by_model.values()))
    return {
        "questions": len(questions),
        "accuracy": {name: accuracy(answers, questions) for name, answers in by_model.items()},
        "agreement": {
            name: sum(a == b for a, b in zip(answers, first, strict=True)) / len(first)
            for name, answers in by_model.items()
        },
    }
