"""What the cut cost: answers on a set of questions, exact match, of the original, the cut eager model and the bundle.

Never mixed with exactness: a recipe that answers badly is the recipe's business, a graph that answers otherwise than
its eager model is a fault.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import VlmcutError
from ..passes.calibration import read_questions
from ..prompt import Prompt, Prompter, open_image
from ..runtime.bundle import Bundle
from ..surgery.load import Loaded, describe

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
    prompter = Prompter(loaded.processor, a.image_token_id, a.visual_tokens)
    return [
        Question(prompter([open_image(folder / x["image"])], x["question"]), x["answer"], x.get("kind", ""))
        for x in lines
    ]


def eager_answers(loaded: Loaded, questions: Sequence[Question], new_tokens: int = ANSWER) -> list[str]:
    """Greedy answers of the eager model, in batches of prompts of equal length (padding would move int8 scales)."""
    keep = describe(loaded.model).keep
    shrunk = [q.prompt.shrink(keep) for q in questions]
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(shrunk):
        by_length[prompt.length].append(index)
    answers = [""] * len(questions)
    for indices in by_length.values():
        for start in range(0, len(indices), _BATCH):
            batch = indices[start : start + _BATCH]
            for index, text in zip(batch, _generate(loaded, [shrunk[i] for i in batch], new_tokens), strict=True):
                answers[index] = text
    return answers


def _generate(loaded: Loaded, prompts: Sequence[Prompt], new_tokens: int) -> list[str]:
    ids = torch.cat([torch.from_numpy(p.input_ids) for p in prompts])
    pixels = torch.cat([torch.from_numpy(p.pixel_values) for p in prompts if p.pixel_values is not None])
    with torch.no_grad():
        out = loaded.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels.to(loaded.model.dtype),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=loaded.processor.tokenizer.pad_token_id,
        )
    texts = loaded.processor.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    return [t.strip() for t in texts]


def bundle_answers(bundle: Bundle, questions: Sequence[Question], new_tokens: int = ANSWER) -> list[str]:
    """Greedy answers of a bundle."""
    tokenizer = bundle.prompter.processor.tokenizer
    most = min(new_tokens, bundle.budget.new_tokens)
    answers = []
    for question in questions:
        ids = list(bundle.tokens(question.prompt.shrink(bundle.budget.visual_tokens), most))
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
