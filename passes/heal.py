"""Heal a cut model: a short training, at the end of which it expects what the uncut model expected.

The linears of the parts that were cut learn, as they are or through a product of two thin matrices (LoRA) that is added
to them at the end: no shape changes. The uncut model sees all visual tokens, the cut one those that it keeps; which
those are is a choice, through which no gradient flows.

Source: vlmcut; LoRA is arXiv:2106.09685, distillation after a cut as in Minitron, arXiv:2407.14679 (section 3). We
differ: the loss is the Kullback-Leibler divergence of the next token alone, on the uncut model's own answers; LoRA has
no scale beside the learning rate.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import PassError
from ..prompt import Prompt
from ..surgery.anatomy import Anatomy
from ..surgery.load import locate
from ..surgery.talk import see_all
from ..surgery.vision import Seen
from .base import PARTS, Pass, check_part
from .calibration import Calibration
from .lessons import BATCH, Lesson, alike, expectations

_WARM = 0.1  # of the steps, in which the learning rate rises; it falls to 0 in the others
_CLIP = 1.0  # the largest norm of all gradients together
_LINES = 10  # of progress


@dataclass(frozen=True)
class Healed:
    """What a training gave."""

    weights: dict[str, Tensor]  # by name
    prompts: int
    loss: tuple[float, float]  # before and after, on the prompts that were learnt: nats per token
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Heal(Pass):
    """Train the linears of `parts` towards the uncut model's expectations on the calibration prompts."""

    name: ClassVar[str] = "heal"
    summary: ClassVar[str] = "short distillation of the cut model against the uncut one"
    source: ClassVar[str] = "LoRA, arXiv:2106.09685; soft targets, arXiv:1503.02531"

    steps: int  # of the optimizer
    rank: int = 16  # of what is added to each weight; 0 for any change
    learning_rate: float = 1e-3  # the highest, of AdamW
    batch: int = 8  # prompts a step, at most: those of one length
    seed: int = 0
    parts: tuple[str, ...] = PARTS  # whose linears learn
    healed: Healed | None = field(default=None, repr=False, compare=False)  # learnt, not told: no recipe can hold it

    def plan(self, a: Anatomy) -> Anatomy:
        for key, least in (("steps", 1), ("rank", 0), ("batch", 1), ("seed", 0)):
            if getattr(self, key) < least:
                raise PassError(f"{self.name}: {key}={getattr(self, key)}", hint=f"choose {least} or more")
        if not 0 < self.learning_rate <= 1:
            raise PassError(f"{self.name}: learning_rate={self.learning_rate}", hint="choose 0 < learning_rate <= 1")
        for part in self.parts:
            check_part(self.name, part)
        if len(set(self.parts)) != len(self.parts) or not self.parts:
            raise PassError(f"{self.name}: parts={list(self.parts)}", hint="name vision, language or both, each once")
        if a.quantized:
            raise PassError(f"{self.name}: {a.quantized[0]} is int8 already", hint="put quantize behind heal")
        return a

    def notes(self, a: Anatomy) -> list[str]:
        return [
            f"heal: {self.steps} steps on the calibration prompts; the recipe alone cannot make these weights again, "
            "with the same prompts it can"
        ]

    @property
    def needs_calibration(self) -> bool:
        return self.healed is None

    def resolve(self, model: Any, a: Anatomy, calibration: Calibration) -> Self:
        if self.healed is not None:
            return self
        if model.dtype != torch.float32:
            raise PassError(f"{self.name}: the weights are {model.dtype}", hint="load the model in float32")
        lessons = calibration.lessons
        if not lessons:
            raise PassError(f"{self.name}: nobody asked the uncut model", hint="apply it as part of a recipe")
        was, width = lessons[0].expected.shape[1], locate(model).head.out_features
        if was != width:
            raise PassError(
                f"{self.name}: the uncut model knows {was} tokens, the cut one {width}",
                hint="leave the vocabulary whole where a recipe heals",
            )
        return replace(self, healed=self._train(model, lessons, calibration.progress))

    def apply(self, model: Any, a: Anatomy) -> None:
        assert self.healed is not None
        for name, weight in self.healed.weights.items():
            model.get_parameter(name).data.copy_(weight)

    def report(self) -> dict[str, Any]:
        """What the training was, for the manifest."""
        assert self.healed is not None
        before, after = self.healed.loss
        return {
            "steps": self.steps,
            "prompts": self.healed.prompts,
            "loss_before": before,
            "loss_after": after,
            "seconds": round(self.healed.seconds, 1),
        }

    def _train(self, model: Any, lessons: Sequence[Lesson], progress: Callable[[str], None]) -> Healed:
        started = time.monotonic()
        before = divergence(model, lessons)
        with learning(model, self.parts, self.rank, self.seed) as (linears, learnt):
            optimizer = torch.optim.AdamW(learnt, lr=self.learning_rate, weight_decay=0.0)
            pace = torch.optim.lr_scheduler.LambdaLR(optimizer, self._pace)
            look = _looker(model, "vision" in self.parts)
            line = max(1, self.steps // _LINES)
            said: list[float] = []
            for step, chosen in zip(range(1, self.steps + 1), self._batches(lessons), strict=False):
                optimizer.zero_grad()
                with parametrize.cached():
                    loss = _apart(model, [look(lessons[i]) for i in chosen], [lessons[i] for i in chosen], learn=True)
                    loss.backward()
                if not loss.isfinite():
                    raise PassError(
                        f"{self.name}: the loss is {float(loss.detach())} in step {step}",
                        hint=f"choose a learning_rate below {self.learning_rate:g}",
                    )
                nn.utils.clip_grad_norm_(learnt, _CLIP)
                optimizer.step()
                pace.step()
                said.append(float(loss.detach()))
                if step % line == 0 or step == self.steps:
                    progress(f"healing: step {step} of {self.steps}, loss {sum(said) / len(said):.4f}")
                    said = []
            after = divergence(model, lessons)
            weights = {f"{name}.weight": linear.weight.detach().clone() for name, linear in linears.items()}
        if not after < before:
            raise PassError(
                f"{self.name}: the loss went from {before:.4g} to {after:.4g} in {self.steps} steps",
                hint=f"choose a learning_rate below {self.learning_rate:g}, or more steps",
            )
        return Healed(weights, len(lessons), (before, after), time.monotonic() - started)

    def _pace(self, step: int) -> float:
        """The learning rate of a step, as a fraction of the highest: up in a line, down in half a cosine."""
        warm = max(1, round(_WARM * self.steps))
        if step < warm:
            return (step + 1) / warm
        return (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm))) / 2

    def _batches(self, lessons: Sequence[Lesson]) -> Iterator[list[int]]:
        """Lessons to read together, without end: all of them in an order of their own, again and again."""
        rng = np.random.default_rng(self.seed)
        while True:
            order = rng.permutation(len(lessons))
            batches = alike([lessons[i].prompt for i in order], self.batch)
            for number in rng.permutation(len(batches)):
                yield [int(order[i]) for i in batches[number]]


def divergence(model: Any, lessons: Sequence[Lesson]) -> float:
    """How far a model's expectations are from the lessons': nats per token, the mean over all of their rows."""
    total = 0.0
    for batch in alike([lesson.prompt for lesson in lessons], BATCH):
        some = [lessons[i] for i in batch]
        rows = sum(len(lesson.expected) for lesson in some)
        total += rows * float(_apart(model, [see_all(model, lesson.prompt) for lesson in some], some, learn=False))
    return total / sum(len(lesson.expected) for lesson in lessons)


def _apart(
    model: Any, looked: Sequence[tuple[Prompt, Sequence[Seen]]], lessons: Sequence[Lesson], *, learn: bool
) -> Tensor:
    """KL(uncut || cut) of the next token, a scalar: the mean over the rows of these lessons."""
    have = torch.cat(expectations(model, looked, learn))
    want = torch.cat([lesson.expected for lesson in lessons])
    return nn.functional.kl_div(have, want, reduction="batchmean", log_target=True)


def _looker(model: Any, learn: bool) -> Callable[[Lesson], tuple[Prompt, Sequence[Seen]]]:
    """What a lesson's pictures become: seen again in every step if the tower learns, else once."""
    if learn:
        return lambda lesson: see_all(model, lesson.prompt, learn=True)
    seen: dict[int, tuple[Prompt, Sequence[Seen]]] = {}

    def look(lesson: Lesson) -> tuple[Prompt, Sequence[Seen]]:
        if id(lesson) not in seen:
            seen[id(lesson)] = see_all(model, lesson.prompt)
        return seen[id(lesson)]

    return look


class Change(nn.Module):
    """weight + what was learnt: zero at first; a whole matrix, or a product of two thin ones."""

    def __init__(self, weight: Tensor, rank: int, rng: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.up = nn.Parameter(torch.zeros(rows, rank or columns))
        self.down = nn.Parameter(torch.randn(rank, columns, generator=rng) / columns**0.5) if rank else None

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up if self.down is None else self.up @ self.down)


@contextmanager
def learning(
    model: Any, parts: Sequence[str], rank: int, seed: int
) -> Iterator[tuple[dict[str, nn.Linear], list[nn.Parameter]]]:
    """While inside, the linears of these parts have a `Change` on their weights and nothing else can learn.

    Yields:
        The linears by name, and the parameters that learn. Afterwards the model is as it was.
    """
    linears = find_linears(model, parts)
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    rng = torch.Generator().manual_seed(seed)
    learnt: list[nn.Parameter] = []
    model.requires_grad_(False)
    try:
        for linear in linears.values():
            change = Change(linear.weight, rank, rng)
            parametrize.register_parametrization(linear, "weight", change)
            learnt += change.parameters()
        yield linears, learnt
    finally:
        for linear in filter(parametrize.is_parametrized, linears.values()):
            parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)
        for parameter, flag in before.items():
            parameter.requires_grad_(flag)


def find_linears(model: Any, parts: Sequence[str]) -> dict[str, nn.Linear]:
    """The linears of these parts by name: of the layers, and of the projector for vision."""
    found = locate(model)
    roots: list[Any] = []
    if "vision" in parts:
        roots += [*found.tower_layers, *([found.projector] if found.projector is not None else [])]
    if "language" in parts:
        roots += found.language_layers
    inside = {id(module) for root in roots for module in root.modules()}
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) in inside}
