"""What the uncut model says to the calibration prompts, kept for the cut model to learn from: no labels are read.

Source: knowledge distillation, arXiv:1503.02531 (soft targets), on answers of the teacher's own, arXiv:1606.07947
(section 3.2). We differ: answers are greedy, temperature 1, and labels are never read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..prompt import Prompt
from ..surgery.selection import attached
from ..surgery.talk import Talk, greedy, see_all, stop_ids
from ..surgery.vision import Seen

ANSWER = 32  # tokens, at most
BATCH = 16  # prompts that are read together


@dataclass(frozen=True)
class Lesson:
    """One prompt, whole, with the uncut model's greedy answer behind it, and what that model expected."""

    prompt: Prompt
    expected: Tensor  # float32 [said + 1, V]: log-probabilities of each token of the answer and of the one behind it


@torch.no_grad()
def listen(model: Any, prompts: Sequence[Prompt]) -> tuple[Lesson, ...]:
    """Let a model answer unshrunk prompts, each with at most `ANSWER` tokens.

    Memory: (tokens of the answer + 1) x vocabulary x 4 bytes for each prompt.
    """
    stop = stop_ids(model)
    answered = list(prompts)
    for batch in alike(prompts, BATCH):
        said = greedy(read(model, [see_all(model, prompts[i]) for i in batch]), ANSWER, stop)
        for i, tokens in zip(batch, said, strict=True):
            answered[i] = prompts[i].answered(tokens)
    lessons: dict[int, Lesson] = {}
    for batch in alike(answered, BATCH):
        found = expectations(model, [see_all(model, answered[i]) for i in batch])
        lessons |= {i: Lesson(answered[i], rows) for i, rows in zip(batch, found, strict=True)}
    return tuple(lessons[i] for i in range(len(prompts)))


def alike(prompts: Sequence[Prompt], size: int) -> list[list[int]]:
    """Indices of prompts that can be read together, at most `size` each: of one length, with pictures of one size."""
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, prompt in enumerate(prompts):
        groups[prompt.length, *prompt.counts].append(i)
    return [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]


def read(model: Any, looked: Sequence[tuple[Prompt, Sequence[Seen]]], learn: bool = False) -> Talk:
    """Prompts of one length, shrunk to what their pictures became."""
    return Talk.read(model, [prompt for prompt, _ in looked], [seen for _, seen in looked], learn=learn)


def expectations(model: Any, looked: Sequence[tuple[Prompt, Sequence[Seen]]], learn: bool = False) -> list[Tensor]:
    """Log-probabilities of the answer's tokens and of the one behind it: float32 [said + 1, V] of each prompt."""
    hidden = read(model, looked, learn).hidden
    counts = [prompt.said + 1 for prompt, _ in looked]
    rows = torch.cat([columns[-count:] for columns, count in zip(hidden, counts, strict=True)])
    with torch.set_grad_enabled(learn):
        logits = attached(model).family.logits(model, rows)
        return list(logits.float().log_softmax(dim=-1).split(counts))
