"""The table of methods inside the language model, and a row of it made callable."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...surgery.inside import Going, LayerState
from ...surgery.picking import topk
from ..tokens.merge import assign, one_hot
from ..tokens.method import Options, parse
from ..tokens.scores import cosine_distance, density_peaks, unit, wide
from ..tokens.select import mark, max_min
from . import ladders, scores
from .method import Measured, Method

_SEEDED = 1 << 16  # columns that have a random number


def _fastv(state: LayerState, keep: int, options: Options) -> Going:
    assert state.before is not None
    return Going(state.top(scores.visual(state, scores.asked(state, state.before)), keep))


def _pyramiddrop(state: LayerState, keep: int, options: Options) -> Going:
    return Going(state.top(scores.visual(state, scores.asked(state, state.own(state.last))), keep))


def _joined(best: Tensor, centres: Tensor, mix: Tensor) -> Going:
    """The best as they are, and centres of which each is a mix of columns, [1, C, S]."""
    own = one_hot(best, mix.shape[-1]).to(mix.dtype)
    return Going(torch.cat([best, centres], dim=1), torch.cat([own, mix], dim=1))


def recycled(tokens: int, keep: int) -> tuple[int, int]:
    """SparseVLM's numbers: of so many tokens of which `keep` go on, how many are recycled, and into how many."""
    again = int(0.3 * (tokens - keep)) + 1
    return again, int(again / 10) + 1


def _sparsevlm(state: LayerState, keep: int, options: Options) -> Going:
    assert state.before is not None
    weight = scores.raters(state)
    rows = state.attention(state.before).mean(dim=0)
    score = scores.visual(state, scores.looked_at(rows, weight) / weight.sum().clamp(min=1))
    again, clusters = recycled(state.visual, keep)
    if not options["recycle"] or clusters >= keep:
        return Going(state.top(score, keep))
    best = state.top(score, keep - clusters)
    rest = torch.where(mark(best, score.shape[1]), -math.inf, score)
    pool = mark(topk(rest, again), score.shape[1])
    peak = density_peaks(state.x, pool, min(clusters, again))
    centres = state.top(peak, clusters)
    members = pool & ~mark(centres, score.shape[1])
    mix = assign(centres, members, wide(state.x))
    return Going(
        torch.cat([best, centres], dim=1), torch.cat([one_hot(best, score.shape[1]).to(mix.dtype), mix], dim=1)
    )


def _fitprune(state: LayerState, keep: int, options: Options) -> Going:
    cross, own = scores.masses(state)
    return Going(state.top(scores.visual(state, cross * own), keep))


def _visiondrop(state: LayerState, keep: int, options: Options) -> Going:
    tap = state.own(None)
    ((_, k),) = tap.rows
    rows = state.attention(tap).mean(dim=0)
    seen = state.columns.visual[0]
    score = scores.looked_at(rows, seen)
    if options["normalise"]:  # early columns are seen by more rows than late ones
        able = torch.flip(torch.cumsum(torch.flip(wide(seen), (0,)), dim=0), (0,))
        score = score / able.clamp(min=1)
    score = scores.visual(state, score)
    context = round(keep * options["context"])
    if not context or context >= keep:
        return Going(state.top(score, keep))
    best = state.top(score, keep - context)
    gone = state.columns.visual & ~mark(best, score.shape[1])
    rank = torch.cumsum(gone.to(torch.int64), dim=-1) - 1
    step = max(1, (state.visual - keep + context) // context)
    centres = state.top(torch.where(gone & (rank % step == 0) & (rank < step * context), 1.0, -math.inf), context)
    members = gone & ~mark(centres, score.shape[1])
    mix = assign(centres, members, wide(k).mean(dim=1))
    return Going(
        torch.cat([best, centres], dim=1), torch.cat([one_hot(best, score.shape[1]).to(mix.dtype), mix], dim=1)
    )


def _dart(state: LayerState, keep: int, options: Options) -> Going:
    assert state.before is not None
    ((_, k),) = state.before.rows
    length = wide(k).abs().sum(dim=(1, 3))[0]  # L1, over all heads
    rows = unit(state.norm(state.x))[0]
    pivots = min(options["pivots"], keep)
    own = torch.sort(state.top(scores.visual(state, length), pivots), dim=-1).values
    free = state.columns.visual & ~mark(own, length.shape[0])
    words = topk(torch.where(scores.text(state), length, -math.inf)[None], options["pivots"])
    pivot = torch.cat([own, torch.sort(words, dim=-1).values], dim=1)
    each, more = divmod(keep - pivots, pivot.shape[1])
    chosen = [own]
    for i in range(pivot.shape[1]):
        count = each + (i < more)
        if not count:
            continue
        like = rows @ rows.index_select(0, pivot[0, i : i + 1])[0]
        found = state.top(torch.where(free, -like[None], -math.inf), count)
        free = free & ~mark(found, length.shape[0])
        chosen.append(found)
    return Going(torch.cat(chosen, dim=1))


def _core(state: LayerState, keep: int, options: Options) -> Going:
    return Going(state.top(scores.visual(state, scores.in_common(state)), keep))


def _vlapruner(state: LayerState, keep: int, options: Options) -> Going:
    assert state.before is not None
    rows = state.attention(state.before).mean(dim=0)
    whole, last = scores.looked_at(rows, state.columns.real[0]), rows.index_select(0, state.last)[0]
    ours = [mark(topk(scores.visual(state, score), keep), state.columns.count) for score in (whole, last)]
    union = ours[0] | ours[1]
    distance = cosine_distance(state.embedded)
    position = torch.arange(state.columns.count)
    others = union[:, None] & (position[:, None] != position)
    gain = max_min(distance, torch.where(others, distance, math.inf).amin(dim=-1))
    value, taken = next(gain), []
    for step in range(keep):
        if step:
            value = gain.send(taken[-1])
        taken.append(state.top(torch.where(union, value, -math.inf), 1))
    return Going(torch.cat(taken, dim=1))


def _random(state: LayerState, keep: int, options: Options) -> Going:
    numbers = torch.from_numpy(np.random.default_rng(options["seed"]).random(_SEEDED, dtype=np.float32))
    return Going(state.top(scores.visual(state, numbers[state.columns.place[0]]), keep))


def _uniform(state: LayerState, keep: int, options: Options) -> Going:
    seen = state.columns.visual[0]
    rank, count = torch.cumsum(seen.to(torch.int64), dim=0), state.visual
    steps = torch.div(rank * keep, count, rounding_mode="floor")
    before = torch.div((rank - 1) * keep, count, rounding_mode="floor")
    return Going(state.top(scores.visual(state, wide(steps > before)), keep))


METHODS: dict[str, Method] = {
    "fastv": Method(
        title="FastV",
        source="arXiv:2403.06764",
        summary="attention of the prompt's last token in the layer before, mean over heads",
        choose=_fastv,
        usual=((2 / 32, 0.5),),
        before=True,
        differs="as its code ranks, by the last row; tokens leave, where the paper's first code only masked them",
    ),
    "pyramiddrop": Method(
        title="PyramidDrop",
        source="arXiv:2410.17247",
        summary="attention of the prompt's last token in the layer itself, at a quarter, half and three quarters",
        choose=_pyramiddrop,
        usual=((8 / 32, 0.5), (16 / 32, 0.25), (24 / 32, 0.125)),
        differs="tokens keep their positions, where its code numbers them anew at each layer",
    ),
    "sparsevlm": Method(
        title="SparseVLM",
        source="arXiv:2410.04417",
        summary="attention of the words that see the image best; the best of the rest are recycled into clusters",
        choose=_sparsevlm,
        usual=((3 / 32, 300 / 576), (7 / 32, 200 / 576), (16 / 32, 110 / 576)),
        options={"recycle": True},
        before=True,
        ranked=False,
        differs="clusters count as tokens of the ladder and take the place of their centre; tokens keep their "
        "positions; of one token nothing is recycled",
    ),
    "fitprune": Method(
        title="FitPrune",
        source="arXiv:2409.10197",
        summary="product of the attention from text and from other visual tokens, largest of the heads",
        choose=_fitprune,
        usual=((1 / 32, 0.8), (2 / 32, 0.6), (3 / 32, 0.4)),
        options={"work": 0.0},
        measured=Measured("work", ladders.expect_fit, ladders.find_fit),
        before=True,
        differs="work=R measures the ladder, of few rungs; the usual one is ours; tokens leave at the "
        "entry of the next layer, whose cache is the first that lacks them, as in the paper; the output projection and "
        "MLP before still see them",
    ),
    "visiondrop": Method(
        title="VisionDrop",
        source="arXiv:2506.22283",
        summary="attention among visual tokens in the layer itself; the rest are merged into a few evenly spaced ones",
        choose=_visiondrop,
        usual=((8 / 32, 35 / 48), (16 / 32, 26 / 48), (24 / 32, 19 / 48)),
        options={"context": 1 / 7, "normalise": True},
        ranked=False,
        differs="a score is divided by the rows that can see the column (normalise=false: as in its code); merged "
        "tokens are means and take the place of their centre; tokens keep their positions",
    ),
    "dart": Method(
        title="DART",
        source="arXiv:2502.11494",
        summary="a few pivots of the longest keys, and what is least like each of them",
        choose=_dart,
        usual=((2 / 32, 2 / 9),),
        options={"pivots": 4},
        before=True,
        ranked=False,
        differs="what does not divide by the pivots goes to the first of them, so that the number is exact",
    ),
    "core": Method(
        title="CoreMatching",
        source="arXiv:2505.19235",
        summary="neurons of the layer before that are active in a token and in the prompt's last column, a count",
        choose=_core,
        usual=ladders.CORE,
        options={"elbow": False},
        measured=Measured("elbow", ladders.expect_elbow, ladders.find_elbow),
        neurons=True,
        differs="the share is one for all prompts: ours, or with elbow=true the mean of where the sorted counts bend; "
        "the last column asks, its code takes the fifth from the end; tokens leave, its code zeroes their keys and "
        "values in some layers; no neuron leaves",
    ),
    "vlapruner": Method(
        title="VLA-Pruner",
        source="arXiv:2511.16449",
        summary="of those with most attention from all columns or from the last one, the ones that differ most",
        choose=_vlapruner,
        usual=((3 / 32, 0.25),),
        before=True,
        ranked=False,
        differs="the last column of the prompt stands for the action tokens of earlier steps, of which no host keeps a "
        "state; both in the layer before",
    ),
    "random": Method(
        title="Random",
        source="baseline",
        summary="tokens at random places",
        choose=_random,
        usual=((2 / 32, 0.5),),
        options={"seed": 0},
    ),
    "uniform": Method(
        title="Uniform",
        source="baseline",
        summary="evenly spaced tokens",
        choose=_uniform,
        usual=((2 / 32, 0.5),),
    ),
    "exit": Method(
        title="Visual exit",
        source="VTW, arXiv:2405.05803; stage 2 of ToDRE, arXiv:2505.18757",
        summary="no visual token goes on",
        choose=None,
        usual=((1 / 2, 0.0),),
        options={"tolerance": 0.0},
        measured=Measured("tolerance", ladders.expect_exit, ladders.find_exit),
        differs="the layer is one for all prompts: given, or measured with tolerance=T",
    ),
}


@dataclass(frozen=True)
class TableLeaver:
    """A row of the table made callable; see `surgery.inside.Leaver`."""

    method: str  # its name, with options as `name:option=value:…`

    @cached_property
    def _parsed(self) -> tuple[Method, dict[str, Any]]:
        return parse(self.method, METHODS, "method")

    @property
    def before(self) -> bool:
        return self._parsed[0].before

    @property
    def neurons(self) -> bool:
        return self._parsed[0].neurons

    def __call__(self, state: LayerState, keep: int) -> Going:
        row, options = self._parsed
        assert row.choose is not None
        return row.choose(state, keep, options)
