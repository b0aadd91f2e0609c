"""What a head, a layer or a neuron is worth, and which of them stay.

Two ways to measure. From activations: what a part adds, where it adds it. From the answers, `loss`: the part is
switched off, the model answers the calibration prompts again, and how far its next-token distributions moved is what
it is worth. No training, no gradients, no labels.

Source: vlmcut; leaving one out is Michel et al., arXiv:1905.10650, section 3.2. We differ: they count what the metric
of a labelled task loses, we measure the divergence from the uncut model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..surgery.talk import Talk, greedy, see_all, stop_ids
from .calibration import MEASURED, Calibration

TOKENS = 8  # of each answer, at most
RANKINGS = ("layer", "global")


def best_of_each(importance: Sequence[Tensor], counts: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The `counts[i]` most important members of layer i, ascending; equal ones go to the lower index."""
    return tuple(tuple(sorted(order(one)[:n])) for one, n in zip(importance, counts, strict=True))


def best_of_all(importance: Sequence[Tensor], count: int, least: int = 1) -> tuple[tuple[int, ...], ...]:
    """The `count` most important members of all layers together, per layer and ascending.

    Each layer keeps at least its `least` best ones; a layer without members (a convolution has no heads) keeps none.
    """
    keep = [set(order(one)[:least]) for one in importance]
    ranked = sorted((-value, layer, i) for layer, one in enumerate(importance) for i, value in enumerate(one.tolist()))
    rest = [(layer, i) for _, layer, i in ranked if i not in keep[layer]]
    for layer, i in rest[: count - sum(map(len, keep))]:
        keep[layer].add(i)
    return tuple(tuple(sorted(found)) for found in keep)


def over_mean(importance: Sequence[Tensor]) -> list[Tensor]:
    """Each layer's importances over their mean: layers of different scale become comparable."""
    return [one / one.mean() if len(one) and one.mean() > 0 else one for one in importance]


def spread(count: int, most: Sequence[int], least: int = 1) -> tuple[int, ...]:
    """`count` members over layers of `most`, even in proportion, at least `least` (0 or 1) where there is one."""
    room = [max(n - least, 0) for n in most]
    extra = count - least * sum(n > 0 for n in most)
    ends = [sum(room[: i + 1]) * extra // max(sum(room), 1) for i in range(len(room))]
    starts = [0, *ends]
    return tuple(end - start + least * (n > 0) for start, end, n in zip(starts, ends, most, strict=False))


def order(importance: Tensor) -> list[int]:
    """Members from the most important to the least; equal ones with the lower index first."""
    values = importance.tolist()
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


class Answers:
    """What a model says to the calibration prompts, and how far a change of the model moves it.

    Compared are the next-token distributions after the prompt and after each token of the answer that the model gave as
    it was: greedy, `TOKENS` at most, fed whatever the changed model would say. The tower runs again only if it changes.
    """

    def __init__(self, model: Any, part: str, calibration: Calibration) -> None:
        """Ask the model as it is. `part` is the one that will change: vision or language."""
        self._model = model
        self._prompts = calibration.prompts[:MEASURED]
        seen = [see_all(model, prompt) for prompt in self._prompts]
        self._said = [greedy(Talk.read(model, [p], [s]), TOKENS, stop_ids(model))[0] for p, s in seen]
        self._seen = None if part == "vision" else seen
        self._before = list(self._ask())

    def moved(self) -> float:
        """Mean KL divergence in nats of what the model says now from what it said: over tokens, then prompts."""
        found = [
            float((before.exp() * (before - now)).sum(dim=-1).mean())
            for before, now in zip(self._before, self._ask(), strict=True)
        ]
        return sum(found) / len(found)

    def _ask(self) -> Iterator[Tensor]:
        """For each prompt, log-probabilities of the next token, float64 [1 + tokens, V]."""
        for index, (prompt, said) in enumerate(zip(self._prompts, self._said, strict=True)):
            shrunk, seen = see_all(self._model, prompt) if self._seen is None else self._seen[index]
            talk = Talk.read(self._model, [shrunk], [seen])
            rows = [talk.logits[0]]
            for token in said:
                talk = talk.say(torch.tensor([token]))
                rows.append(talk.logits[0])
            yield torch.stack(rows).double().log_softmax(dim=-1)


@contextmanager
def without_columns(linear: nn.Module, columns: slice | Tensor) -> Iterator[None]:
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
