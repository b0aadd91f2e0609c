"""Methods that look for tokens that differ from each other, by their features alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...surgery.selection import Choice, TowerState
from .method import Method, Options, Place, Refusal, every_row, last
from .scores import cosine_distance, received, unit, wide
from .select import among, ascending, greedy, mark, max_min, max_sum

_STEPS = {"block": 1, "groups": 1}


def _refuse_steps(place: Place, options: Options) -> Refusal | None:
    block, groups = options["block"], options["groups"]
    if min(block, groups) < 1:
        return f"block={block}, groups={groups}", "choose 1 or more of each"
    if place.tokens % groups:
        return f"{place.tokens} tokens do not make {groups} groups of one size", f"choose a divisor of {place.tokens}"
    if place.keep % (groups * block):
        cause = f"keep={place.keep} is not met by {groups} groups that take {block} tokens in a step"
        return cause, f"choose a multiple of {groups * block}"
    return None


def _grouped(x: Tensor, groups: int) -> Tensor:
    """[1, N, …] as contiguous groups of one size, [groups, n, …]."""
    return x if groups == 1 else x.reshape(groups, -1, *x.shape[2:])


# --- DivPrune


def _divprune(state: TowerState, keep: int, o: Options) -> Choice:
    distance = cosine_distance(_grouped(state.project(state.tokens), o["groups"]))
    return Choice(greedy(state, max_min(distance), keep, o["block"]))


# --- ToDRE

_GAINS = {"max-sum": max_sum, "k-center": max_min}


def _todre(state: TowerState, keep: int, o: Options) -> Choice:
    attention = received(state, state.taps[-1])

    def spread(part: TowerState, score: Tensor) -> Tensor:
        distance = cosine_distance(_grouped(part.project(part.tokens), o["groups"]))
        return greedy(part, _GAINS[o["variant"]](distance, _grouped(score, o["groups"])), keep, o["block"])

    if not o["prefilter"]:
        return Choice(spread(state, attention))
    return Choice(among(state, attention, keep * o["prefilter"], lambda few, at: spread(few, attention.gather(1, at))))


def _refuse_todre(place: Place, options: Options) -> Refusal | None:
    variant, factor, groups = options["variant"], options["prefilter"], options["groups"]
    if variant not in _GAINS:
        return f"variant={variant!r}", "choose " + " or ".join(_GAINS)
    if factor not in (0, *range(2, -(-place.tokens // place.keep))):
        cause = f"prefilter={factor} makes {factor * place.keep} of {place.tokens} tokens candidates for {place.keep}"
        return cause, "choose 0 for none, or 2 or more and fewer candidates than tokens"
    if factor and groups > 1:
        return f"prefilter={factor} with groups={groups}: groups of candidates differ in size", "choose one of both"
    return _refuse_steps(place, options)


# --- DART


def _dart(state: TowerState, keep: int, o: Options) -> Choice:
    features = wide(state.project(state.tokens))
    pivots = ascending(state.top(features.abs().sum(dim=-1), o["pivots"]))
    directions = unit(features)
    far = 1 - directions.index_select(1, pivots[0]) @ directions.transpose(1, 2)  # [1, pivots, N]
    taken, used = [pivots], mark(pivots, state.count)
    for number, count in enumerate(_additions(keep, o["pivots"])):
        if not count:
            continue
        taken.append(state.top(far[:, number].masked_fill(used, -torch.inf), count))
        used = used | mark(taken[-1], state.count)
    return Choice(ascending(torch.cat(taken, dim=1)))


def _additions(keep: int, pivots: int) -> Sequence[int]:
    """How many tokens each pivot adds: as many each, the last one what is left as well."""
    each, rest = divmod(keep - pivots, pivots)
    return [each] * (pivots - 1) + [each + rest]


def _refuse_dart(place: Place, options: Options) -> Refusal | None:
    if options["pivots"] < 1:
        return f"pivots={options['pivots']}", "choose 1 or more"
    if place.keep < options["pivots"]:
        return f"keep={place.keep} is less than pivots={options['pivots']}", f"choose pivots=1 to {place.keep}"
    return None


ROWS = {
    "divprune": Method(
        title="DivPrune",
        source="arXiv:2503.02175, algorithm 1",
        summary="the most diverse tokens, by greedy max-min cosine distance after the projector",
        projects=every_row,
        choose=_divprune,
        options=_STEPS,
        refuse=_refuse_steps,
        differs="taken tokens are masked out instead of relying on a distance of 0, so that none is taken twice",
    ),
    "todre": Method(
        title="ToDRE",
        source="arXiv:2505.18757",
        summary="the token attended to most, then those of the largest summed cosine distance to all taken",
        projects=lambda tokens, keep, options: keep * options["prefilter"] or tokens,
        choose=_todre,
        options={"variant": "max-sum", "prefilter": 0} | _STEPS,
        blocks=last,
        refuse=_refuse_todre,
        without_cls="the first token is the one with the largest mean attention received from all tokens",
        differs="stage 1 alone: that all visual tokens leave at 7/8 of the language model's layers is a cut in there; "
        "variant=max-sum is the paper's second version, k-center its first; one first token of all tiles",
    ),
    "dart": Method(
        title="DART",
        source="arXiv:2502.11494",
        summary="a few pivot tokens, and for each those most unlike it, after the projector",
        projects=every_row,
        choose=_dart,
        options={"pivots": 4},
        refuse=_refuse_dart,
        differs="works on projected tokens, the paper on keys and hidden states of language layer 2; pivots are visual "
        "tokens alone, the paper adds four text tokens of the question; pivots add in ascending order, and the last "
        "fills up to keep",
    ),
}
