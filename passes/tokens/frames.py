"""Methods that compare the frames of a clip: several pictures of one size that are seen together.

Tokens lie frame after frame, P of each. What a frame keeps is constant wherever a method says so by itself; otherwise
it is made constant, and said.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ...surgery.selection import Choice, TowerState
from .merge import in_order, one_hot
from .method import Method, Options, Place, Refusal, every_row, last
from .scores import change, density_peaks, received, unit, wide
from .select import ascending, mark

_NEW = 4.0  # of tokens that no frame was before: above every 1 - cosine, and finite, so that its lack can be measured
_GROUP = 4  # frames that DyCoke compares with each other


def largest_remainder(weights: Sequence[int], total: int) -> list[int]:
    """Whole shares of `total` in proportion to weights; what is left over goes to the largest fractions, then first."""
    every = sum(weights)
    found = [weight * total // every for weight in weights]
    order = sorted(range(len(weights)), key=lambda i: (-(weights[i] * total % every), i))
    for i in order[: total - sum(found)]:
        found[i] += 1
    return found


def _frame(state: TowerState, number: int) -> range:
    """Positions of a frame in the clip."""
    length = state.count // state.frames
    return range(number * length, (number + 1) * length)


def _top(state: TowerState, own: range, score: Tensor, count: int) -> Tensor:
    """The best of a frame by its own scores, [1, P]: positions in the clip, int64 [1, count]."""
    return state.pick.only(torch.tensor(own)).top(score, count) + own.start


def _torn(place: Place) -> Refusal | None:
    """Why frames cannot be compared here."""
    if place.bucket.panels and place.panels < place.frames:
        return (
            f'this method compares {place.frames} frames, and pool = "tile" shows it one at a time',
            'use pool = "image"',
        )
    return None


def _nearest(legal: Iterable[int], keep: int) -> str:
    return ", ".join(map(str, sorted(sorted(legal, key=lambda k: (abs(k - keep), k))[:3])))


def _evs(state: TowerState, keep: int, options: Options) -> Choice:
    frames = range(state.frames)
    score = change(state.project(state.tokens), [max(0, frame - 1) for frame in frames])
    first = torch.tensor([frame == 0 for frame in frames])[:, None]
    return Choice(ascending(state.top(torch.where(first, _NEW, score).flatten(1), keep)))


def _refuse_evs(place: Place, options: Options) -> Refusal | None:
    if torn := _torn(place):
        return torn
    length = place.tokens // place.frames
    if place.keep < length:
        return (
            f"{place.keep} of {place.tokens} tokens, but the first frame keeps all of its {length}",
            f"choose {length} or more",
        )
    return None


def _dycoke(state: TowerState, keep: int, options: Options) -> Choice:
    frames, length = range(state.frames), state.count // state.frames
    share = (keep // (state.frames // _GROUP) - length) // (_GROUP - 1)
    # The second frame of a group is compared with the first, the third with the first too, the fourth with the third.
    score = change(state.project(state.tokens), [frame - (0, 1, 2, 1)[frame % _GROUP] for frame in frames])
    kept = []
    for frame in frames:
        own = _frame(state, frame)
        if frame % _GROUP == 0:
            kept.append(torch.tensor([own]))
        elif share:
            kept.append(_top(state, own, score[:, frame], share))
    return Choice(ascending(torch.cat(kept, dim=1)))


def _refuse_dycoke(place: Place, options: Options) -> Refusal | None:
    if torn := _torn(place):
        return torn
    frames = place.frames
    if frames % _GROUP:
        return f"this method compares groups of {_GROUP} frames, and a clip has {frames}", f"use a multiple of {_GROUP}"
    groups, length = frames // _GROUP, place.tokens // frames
    legal = range(groups * length, place.tokens + 1, groups * (_GROUP - 1))
    if place.keep not in legal:
        return (
            f"{place.keep} of {place.tokens} tokens, but {groups} of {frames} frames keep all of their {length}, and "
            f"the other {frames - groups} share what is left equally",
            f"the nearest that can be met: {_nearest(legal, place.keep)}",
        )
    return None


@dataclass(frozen=True)
class _Frame:
    """What a frame keeps in FastVID."""

    segment: int
    salient: int  # tokens that receive most attention
    context: int  # centres of clusters, into which the rest of the segment merges


def _plan(frames: int, keep: int, options: Options) -> list[_Frame]:
    segments = min(options["segments"], frames)
    cuts = [i * frames // segments for i in range(segments + 1)]
    sizes = [end - start for start, end in pairwise(cuts)]
    found = []
    for segment, (size, share) in enumerate(zip(sizes, largest_remainder(sizes, keep), strict=True)):
        context = int(options["context"] * share + 0.5)
        salient = largest_remainder([1] * size, share - context)
        anchor = [(size - 1 - i) % options["anchors"] == 0 for i in range(size)]  # the last, and every so many before
        centres = largest_remainder(anchor, context)
        found += [_Frame(segment, *pair) for pair in zip(salient, centres, strict=True)]
    return found


def _fastvid(state: TowerState, keep: int, options: Options) -> Choice:
    tokens, attention = wide(state.project(state.tokens)), received(state, state.taps[-1])
    length = state.count // state.frames
    plan = _plan(state.frames, keep, options)
    salient, centres = [], []
    for number, frame in enumerate(plan):
        own = _frame(state, number)
        if frame.salient:
            salient.append(_top(state, own, attention[:, own.start : own.stop], frame.salient))
        if frame.context:
            there = ~mark(salient[-1] - own.start, length) if frame.salient else torch.tensor([[True] * length])
            neighbours = min(options["neighbours"], length - frame.salient)
            score = density_peaks(tokens[:, own.start : own.stop], there, neighbours)
            centres.append(_top(state, own, score, frame.context))
    if not centres:
        return Choice(ascending(torch.cat(salient, dim=1)))
    segments = np.array([frame.segment for frame in plan])
    joined = np.repeat(segments, length)[:, None] == np.repeat(segments, [frame.context for frame in plan])
    centre = torch.cat(centres, dim=1)
    kept = torch.cat([*salient, centre], dim=1)
    free = torch.from_numpy(joined) & ~mark(kept, state.count)[..., None]
    mix = [blend(tokens, centre, free, options["alpha"])]
    if salient:
        mix.insert(0, one_hot(torch.cat(salient, dim=1), state.count).to(mix[0].dtype))
    return in_order(kept, torch.cat(mix, dim=1))


def blend(tokens: Tensor, centres: Tensor, free: Tensor, alpha: float) -> Tensor:
    """Every free token joins the centre most similar to it, of those that it may join: weights [B, C, N].

    A centre with n members has the weight max(1 / (n + 1), alpha), and its members share the rest.

    Args:
        tokens: [B, N, d].
        centres: positions, int64 [B, C].
        free: whether a token may join a centre, bool [B, N, C]; false for one that stays itself or leaves.
    """
    rows = unit(tokens)
    own = one_hot(centres, rows.shape[1]).to(rows.dtype)
    near = rows @ (own @ rows).transpose(1, 2)
    nearest = near.masked_fill(~free, -math.inf).argmax(dim=-1, keepdim=True)
    members = ((nearest == torch.arange(centres.shape[1])) & free).to(rows.dtype).transpose(1, 2)
    count = members.sum(dim=-1, keepdim=True)
    weight = (1 / (count + 1)).clamp(min=alpha)
    return weight * own + (1 - weight) / count.clamp(min=1) * members


def _refuse_fastvid(place: Place, options: Options) -> Refusal | None:
    if torn := _torn(place):
        return torn
    for name in ("segments", "anchors", "neighbours"):
        if options[name] < 1:
            return f"{name}={options[name]}", "choose 1 or more"
    for name in ("context", "alpha"):
        if not 0 <= options[name] <= 1:
            return f"{name}={options[name]}", "choose from 0 to 1"
    frames = place.frames
    segments, length = min(options["segments"], frames), place.tokens // frames
    if place.keep < segments:
        return f"{place.keep} tokens of {segments} segments", f"choose {segments} or more"
    for frame in _plan(frames, place.keep, options) if place.keep < place.tokens else ():
        if frame.salient + frame.context > length:
            return (
                f"{place.keep} of {place.tokens} tokens are {frame.salient} of the most attended and {frame.context} "
                f"of the densest of a frame, which has {length}",
                "keep fewer, or lower the options context or anchors",
            )
    return None


def _videoscan(state: TowerState, keep: int, options: Options) -> Choice:
    share, length = keep // state.frames, state.count // state.frames
    cuts = [i * length // share for i in range(share + 1)]
    mix = np.zeros((keep, state.count))
    kept = []
    for frame in range(0, state.count, length):
        for start, end in pairwise(cuts):
            mix[len(kept), frame + start : frame + end] = 1 / (end - start)
            kept.append(frame + (start + end - 1) // 2)
    dtype = torch.promote_types(state.tokens.dtype, torch.float32)
    return Choice(torch.tensor([kept]), torch.from_numpy(mix).to(dtype)[None])


def _refuse_videoscan(place: Place, options: Options) -> Refusal | None:
    if torn := _torn(place):
        return torn
    frames = place.frames
    if place.keep % frames:
        legal = range(frames, place.tokens + 1, frames)
        return (
            f"{place.keep} tokens, but each of {frames} frames keeps the same number",
            f"the nearest that can be met: {_nearest(legal, place.keep)}",
        )
    return None


ROWS = {
    "evs": Method(
        title="EVS",
        source="arXiv:2510.14624, as deployed in vLLM",
        summary="the first frame whole, then the tokens that changed most since the frame before",
        projects=every_row,
        choose=_evs,
        frames=True,
        refuse=_refuse_evs,
    ),
    "dycoke": Method(
        title="DyCoke, stage 1",
        source="arXiv:2411.15024",
        summary="of every four frames one whole, of the others the tokens that are least like the frame before",
        projects=every_row,
        choose=_dycoke,
        frames=True,
        refuse=_refuse_dycoke,
        differs="stage 2, which drops keys and values while decoding, is not built; keep sets the share of tokens that "
        "go (0.7 in the paper), and the number of frames must be a multiple of 4 instead of being padded",
    ),
    "fastvid": Method(
        title="FastVID",
        source="arXiv:2503.11187",
        summary="of each part of a clip the most attended tokens, and centres of clusters that the rest merges into",
        projects=every_row,
        choose=_fastvid,
        options={"segments": 8, "context": 0.4, "anchors": 4, "neighbours": 4, "alpha": 0.6},
        blocks=last,
        frames=True,
        merges=True,
        refuse=_refuse_fastvid,
        without_cls="attention received from all tokens takes the place of the probe of SigLIP's pooling head, which "
        "these towers run without",
        differs="segments are equally long (one for each frame of a shorter clip) instead of cut where frames change, "
        "so that counts are constant; a token joins one centre of its segment, not one of each anchor frame; what "
        "merges is averaged before the projector; ties of density go to the lower index instead of by noise",
    ),
    "videoscan": Method(
        title="VideoScan, carrier tokens",
        source="arXiv:2503.09387",
        summary="the mean of each frame, or of equal parts of it in raster order",
        choose=_videoscan,
        frames=True,
        merges=True,
        refuse=_refuse_videoscan,
        differs="without training: the paper fine-tunes the language model, keeps the carriers' keys and values, which "
        "have seen the whole frame, and forgets old carriers; here the mean of the features is all that is left of a "
        "frame, and it is taken before the projector",
    ),
}
