"""What a head, a layer or a neuron is worth, and which of them stay.

Two ways to measure. From activations: what a part adds, where it adds it. From the answers, `loss`: the part is
switched off, the model reads the calibration prompts again, and how far its next-token distributions moved is what it
is worth. No training, no gradients, no labels.

Source: vlmcut; leaving one out is Michel et al., arXiv:1905.10650, section 3.2. We differ: they count what the metric
of a labelled task loses, we measure the divergence from the uncut model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..prompt import Prompt
from ..surgery.load import locate
from ..surgery.selection import attached
from ..surgery.talk import Talk, see_all
from ..surgery.vision import Seen
from .calibration import Calibration

PROMPTS = 8  # of the calibration prompts are read for each part that is switched off: the first ones
RANKINGS = ("layer", "global")


def best_of_each(importance: Sequence[Tensor], counts: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The `counts[i]` most important members of layer i, ascending; equal ones go to the lower index."""
    return tuple(tuple(sorted(_order(one)[:n])) for one, n in zip(importance, counts, strict=True))


def best_of_all(importance: Sequence[Tensor], count: int) -> tuple[tuple[int, ...], ...]:
    """The `count` most important members of all layers together, per layer and ascending.

    Each layer keeps at least its best member; a layer without members (a convolution has no heads) keeps none.
    """
    keep = [set(_order(one)[:1]) for one in importance]
    ranked = sorted((-value, layer, i) for layer, one in enumerate(importance) for i, value in enumerate(one.tolist()))
    rest = [(layer, i) for _, layer, i in ranked if i not in keep[layer]]
    for layer, i in rest[: count - sum(map(len, keep))]:
        keep[layer].add(i)
    return tuple(tuple(sorted(found)) for found in keep)


def over_mean(importance: Sequence[Tensor]) -> list[Tensor]:
    """Each layer's importances over their mean: layers of different scale become comparable."""
    return [one / one.mean() if len(one) and one.mean() > 0 else one for one in importance]


def spread(count: int, most: Sequence[int]) -> tuple[int, ...]:
    """`count` members over layers of `most`, even in proportion, at least one where there is one."""
    room = [max(n - 1, 0) for n in most]
    extra = count - sum(n > 0 for n in most)
    ends = [sum(room[: i + 1]) * extra // max(sum(room), 1) for i in range(len(room))]
    starts = [0, *ends]
    return tuple(end - start + (n > 0) for start, end, n in zip(starts, ends, most, strict=False))


def _order(importance: Tensor) -> list[int]:
    values = importance.tolist()
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


class Answers:
    """What a model says to the first `PROMPTS` calibration prompts, and how far a change of the model moves it.

    Compared are the next-token distributions of every column from the last visual token on: all that have seen the
    whole picture. One forward pass per prompt; the tower runs again only if it is what changes.
    """

    def __init__(self, model: Any, part: str, calibration: Calibration) -> None:
        """Ask the model as it is. `part` is the one that will change: vision or language."""
        self._model = model
        self._prompts = calibration.prompts[:PROMPTS]
        self._seen = None if part == "vision" else [see_all(model, prompt) for prompt in self._prompts]
        self._before = list(self._ask())

    def moved(self) -> float:
        """Mean KL divergence in nats of what the model says now from what it said: over columns, then prompts."""
        found = [
            float((before.exp() * (before - now)).sum(dim=-1).mean())
            for before, now in zip(self._before, self._ask(), strict=True)
        ]
        return sum(found) / len(found)

    def _ask(self) -> Iterator[Tensor]:
        for index, prompt in enumerate(self._prompts):
            yield _distributions(
                self._model, *(see_all(self._model, prompt) if self._seen is None else self._seen[index])
            )


@torch.no_grad()
def _distributions(model: Any, prompt: Prompt, seen: list[Seen]) -> Tensor:
    """Log-probabilities of the next token from the last visual token on, float64 [columns, V]."""
    hidden: list[Tensor] = []
    hook = locate(model).language.register_forward_hook(lambda _, args, out: hidden.append(out.last_hidden_state))
    try:
        Talk.read(model, [prompt], [seen])
    finally:
        hook.remove()
    first = int(np.flatnonzero(prompt.visual_index[0] >= 0)[-1])
    return attached(model).family.logits(model, hidden[0][0, first:]).double().log_softmax(dim=-1)


@contextmanager
def without_columns(linear: nn.Module, columns: slice) -> Iterator[None]:
    """While inside, these inputs of a linear are zero: the heads or neurons behind them add nothing."""

    def silence(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0].clone()
        x[..., columns] = 0
        return x, *args[1:]

    hook = linear.register_forward_pre_hook(silence)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def without_layer(layer: nn.Module) -> Iterator[None]:
    """While inside, a layer gives back what it was given."""
    hook = layer.register_forward_hook(lambda _, args, out: (args[0], *out[1:]) if isinstance(out, tuple) else args[0])
    try:
        yield
    finally:
        hook.remove()
