"""Ladders found on calibration prompts, on the model as it is at that pass; written out, they need no data.

Every layer is first seen with all visual tokens in it, by the code that graphs are made of: a ladder whose rungs keep
everyone changes no bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...errors import PassError
from ...manifest import Rung
from ...surgery.anatomy import Anatomy
from ...surgery.inside import Going, Inside, LayerState
from ...surgery.selection import attached
from ...surgery.talk import Talk, see_all
from ..calibration import MEASURED, Calibration
from ..importance import Answers
from ..tokens.method import Options
from . import scores
from .method import Usual, usual_ladder

RUNGS = 4  # of a measured ladder at most: each makes the graphs one cache of another length
_NEAR = 0.01  # FitPrune's tolerance of its one number
CORE: Usual = ((5 / 32, 0.25),)


def first_layer(a: Anatomy) -> int:
    """The first layer at whose entry tokens may leave."""
    return max(1, a.language.levels)


@contextmanager
def climbing(model: Any, inside: Inside) -> Iterator[None]:
    """While inside, visual tokens leave by this ladder and no other."""
    about = attached(model)
    before, about.inside = about.inside, inside
    try:
        yield
    finally:
        about.inside = before


# --- exit: the first layer at which leaving changes the answers little enough


def expect_exit(a: Anatomy, options: Options) -> tuple[Rung, ...]:
    """Half of the depth, until it is measured."""
    if not 0 <= options["tolerance"] < math.inf:
        raise PassError(
            f"prune-inside: exit:tolerance={options['tolerance']} is no divergence in nats",
            hint="choose 0.05, or another number above 0",
        )
    return (Rung(max(first_layer(a), round(a.language.layers / 2)), 0.0),)


class _Nobody:
    """Of a ladder of which no rung keeps a token."""

    method, before, neurons = "exit", False, False

    def __call__(self, state: LayerState, keep: int) -> Going:
        raise AssertionError("nobody is chosen")


def find_exit(model: Any, a: Anatomy, calibration: Calibration, options: Options) -> tuple[Rung, ...]:
    """The first layer at which all visual tokens can leave within a tolerance.

    Compared are next-token distributions as in `importance.Answers`: mean KL divergence from the model as it is.

    Source: vlmcut. VTW (arXiv:2405.05803) looks for the layer on a small set by the divergence of the next token too;
    ToDRE and DyVTE decide for each prompt, which a static graph cannot.

    Raises:
        PassError: no layer moves the answers by so little.
    """
    answers, moved = Answers(model, "language", calibration), math.inf
    for layer in range(first_layer(a), a.language.layers):
        with climbing(model, Inside(_Nobody(), (Rung(layer, 0.0),))):
            moved = answers.moved()
        calibration.progress(f"leaving at layer {layer} of {a.language.layers} moves answers by {moved:.2g} nats")
        if moved <= options["tolerance"]:
            return (Rung(layer, 0.0),)
    raise PassError(
        f"prune-inside: exit:tolerance={options['tolerance']:g}, but leaving at the last layer moves the answers "
        f"by {moved:.3g} nats",
        hint=f"choose {moved:.3g} or more, or leave prune-inside out",
    )


# --- FitPrune: as many as keep most of the attention that a layer gives to visual tokens


def expect_fit(a: Anatomy, options: Options) -> tuple[Rung, ...]:
    """All that have to leave leave at the first layer, until it is measured."""
    work, layers, first = options["work"], a.language.layers, first_layer(a)
    if not first / layers < work < 1:
        raise PassError(
            f"prune-inside: fitprune:work={work:g}: {first} of {layers} layers see every visual token before one can "
            "leave",
            hint=f"choose more than {first / layers:.3g} and less than 1",
        )
    return (Rung(first, _up((work * layers - first) / (layers - first))),)


@dataclass
class Watcher:
    """Keeps everyone, and writes down what attention each visual token gets in the layer before each rung."""

    cross: list[Tensor] = field(default_factory=list)  # [N] for each rung: from text
    own: list[Tensor] = field(default_factory=list)  # from visual tokens
    method, before, neurons = "fitprune", True, False

    def __call__(self, state: LayerState, keep: int) -> Going:
        seen = state.columns.visual[0]
        cross, own = scores.masses(state)
        self.cross.append(cross[seen].double())
        self.own.append(own[seen].double())
        return Going(torch.nonzero(seen).T)


def left(cross: Sequence[Tensor], own: Sequence[Tensor], alpha: float) -> list[int]:
    """Visual tokens of one prompt that are left behind each layer when all leave that may.

    Args:
        cross: attention from text to each visual token in a layer of the whole model, largest of the heads, [N].
        own: the same from visual tokens.
        alpha: of both masses of a layer, each over all N tokens, the share that may be missing.
    """
    here, counts = torch.ones(len(cross[0]), dtype=torch.bool), []
    for masses in zip(cross, own, strict=True):
        gone = torch.ones_like(here)
        for mass in masses:
            order = torch.argsort(mass.masked_fill(~here, math.inf), stable=True)
            after = torch.flip(torch.cumsum(torch.flip((mass * here)[order], (0,)), dim=0), (0,))
            rest = torch.cat([after[1:], torch.zeros(1)])  # once each one and those before have left
            fits = (rest >= (1 - alpha) * mass.sum()) & here[order]
            count = int(torch.cumprod(fits.long(), dim=0).sum())
            gone &= torch.zeros_like(here).index_fill(0, order[:count], True)
        here = here & ~gone
        counts.append(int(here.sum()))
    return counts


def few_rungs(curve: Sequence[float], first: int, keep: Sequence[int], most: int) -> tuple[Rung, ...]:
    """The ladder of at most so many rungs that leaves least work, and in no layer fewer tokens than the curve.

    Args:
        curve: for each layer from `first` on, what share is left; does not ascend.
        keep: tokens that enter, of each size of image; some of each leave at every rung.
    """
    end = first + len(curve)

    @cache
    def best(layer: int, before: float, rungs: int) -> tuple[float, tuple[Rung, ...]]:
        """Work from a layer on, in whole layers, where `before` arrives."""
        found: tuple[float, tuple[Rung, ...]] = (before * (end - layer), ())
        for at in range(layer, end) if rungs else ():
            here, old = Rung(at, curve[at - first]), Rung(at, before)
            if all(here.stay(n) < old.stay(n) for n in keep):
                work, more = best(at + 1, here.share, rungs - 1)
                work += before * (at - layer) + here.share
                found = min(found, (work, (here, *more)), key=lambda one: one[0])
        return found

    return best(first, 1.0, most)[1]


def work_of(ladder: Sequence[Rung], layers: int) -> float:
    """Mean over the layers of the share of the visual tokens that a layer sees."""
    ends = [*(rung.layer for rung in ladder), layers]
    seen = [rung.share * (end - rung.layer) for rung, end in zip(ladder, ends[1:], strict=True)]
    return (ends[0] + sum(seen)) / layers


def find_fit(model: Any, a: Anatomy, calibration: Calibration, options: Options) -> tuple[Rung, ...]:
    """The ladder that keeps most of the attention to visual tokens, of those that leave `work` of their work.

    One number says what share of a layer's attention may be missing; bisection finds the smallest that leaves so little
    work. Shares are means over prompts.

    Source: FitPrune, arXiv:2409.10197. We differ: work is the mean of what layers see, not FLOPs of the whole
    language model; few rungs instead of one at every layer, each a stretch of layers that keep what the first of them
    needs; all masses are those of the whole model.
    """
    first, layers = first_layer(a), a.language.layers
    watched = []
    with climbing(model, Inside(Watcher(), tuple(Rung(layer, 1.0) for layer in range(first, layers)))):
        for prompt in calibration.prompts[:MEASURED]:
            attached(model).inside.leaver = watcher = Watcher()
            shrunk, seen = see_all(model, prompt)
            Talk.read(model, [shrunk], [seen])
            watched.append(watcher)

    def ladder(alpha: float) -> tuple[Rung, ...]:
        counts = torch.tensor([left(w.cross, w.own, alpha) for w in watched], dtype=torch.float64)
        whole = torch.tensor([[len(w.cross[0])] for w in watched], dtype=torch.float64)
        curve = (counts / whole).mean(dim=0).tolist()
        return few_rungs([_up(share) for share in curve], first, a.keep, RUNGS)

    low, high = 0.0, 1.0
    found = ladder(high)  # all leave as early as they can
    while high - low > _NEAR:
        alpha = (low + high) / 2
        trial = ladder(alpha)
        if work_of(trial, layers) <= options["work"]:
            high, found = alpha, trial
        else:
            low = alpha
    calibration.progress(f"fitprune: {1 - high:.3f} of the attention to visual tokens stays in every layer")
    return found


# --- CoreMatching: as many as stand above the bend of the sorted scores


def expect_elbow(a: Anatomy, options: Options) -> tuple[Rung, ...]:
    """The usual share, until it is measured; the layer is the usual one."""
    if min(a.keep) < 3:
        raise PassError(
            f"prune-inside: core:elbow=true looks for a bend in the scores of {min(a.keep)} visual tokens, 3 at least",
            hint="give layers and share",
        )
    return usual_ladder(CORE, a.language.layers, a.language.levels)


@dataclass
class _Scored:
    """Keeps everyone, and writes down how many neurons each visual token has in common with the last column."""

    found: list[Tensor] = field(default_factory=list)  # float64 [N] for each prompt
    method, before, neurons = "core", False, True

    def __call__(self, state: LayerState, keep: int) -> Going:
        seen = state.columns.visual[0]
        self.found.append(scores.in_common(state)[seen].double())
        return Going(torch.nonzero(seen).T)


def above_elbow(score: Tensor) -> int:
    """How many stand above the elbow of their scores in descending order: the point farthest from the chord.

    Args:
        score: whole numbers, [N]. All of them stay where they lie on the chord.
    """
    curve = torch.sort(score.double(), descending=True).values
    steps = len(curve) - 1
    # Times the steps, so that a line of whole numbers is one without rounding.
    away = ((curve - curve[0]) * steps - (curve[-1] - curve[0]) * torch.arange(len(curve))).abs()
    return int(away.argmax()) if away.any() else len(curve)


def find_elbow(model: Any, a: Anatomy, calibration: Calibration, options: Options) -> tuple[Rung, ...]:
    """The share of visual tokens above the elbow of their scores, mean over prompts.

    Source: CoreMatching, arXiv:2505.19235. We differ: it keeps what is above the elbow of each prompt; a static graph
    has one share, and keeps the best so many.

    Raises:
        PassError: scores do not bend, and nobody would leave.
    """
    (rung,) = expect_elbow(a, options)
    watcher = _Scored()
    with climbing(model, Inside(watcher, (Rung(rung.layer, 1.0),))):
        for prompt in calibration.prompts[:MEASURED]:
            shrunk, seen = see_all(model, prompt)
            Talk.read(model, [shrunk], [seen])
    shares = [above_elbow(score) / len(score) for score in watcher.found]
    found = Rung(rung.layer, _up(sum(shares) / len(shares)))
    calibration.progress(f"core: {found.share:.3f} of the visual tokens, {min(shares):.3f} to {max(shares):.3f}, go on")
    if any(found.stay(n) >= n for n in a.keep):
        raise PassError(
            f"prune-inside: core:elbow=true, but scores at layer {found.layer} do not bend: {found.share:g} of "
            f"{min(a.keep)} visual tokens are all of them",
            hint="give layers and share",
        )
    return (found,)


def _up(share: float) -> float:
    """To four decimals, not fewer."""
    return min(1.0, math.ceil(share * 1e4) / 1e4)
