"""Methods that make the vision tower itself smaller: tokens merge or leave between its blocks.

A step gets the rows between attention and MLP of one block, and how many tokens leave there: a Python int. The counts
of all blocks are constant too, and sum to what the method removes, so that every block has a length of its own.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from ...surgery.picking import topk
from ...surgery.selection import Choice, Rows, TowerState
from .method import Inside, Method, Options, Place, Refusal
from .scores import attention_rows, unit, wide
from .select import ascending

_PAPER_ROWS = 577  # of CLIP ViT-L/14 at 336 pixels, for which Turbo's factor of 30 was found


def least(tokens: int, blocks: int) -> int:
    """The fewest tokens that are left when every block merges as many pairs as it can: half of them, rounded down."""
    for _ in range(blocks):
        tokens -= tokens // 2
    return tokens


def even(tokens: int, keep: int, blocks: int) -> tuple[int, ...]:
    """How many tokens leave in each block, `tokens - keep` in all: alike, the remainder first; no more than pair up.

    Where late blocks have too few tokens for an equal share, early ones take more.
    """
    found = []
    for behind in reversed(range(blocks)):
        share = -(-(tokens - keep) // (behind + 1))
        found.append(max(share, tokens - keep * 2**behind))
        tokens -= found[-1]
    return tuple(found)


def ladder(tokens: int, keep: int, blocks: int, steps: int) -> tuple[int, ...]:
    """How many tokens leave in each block: in `steps` of them, evenly spaced, the same fraction of those left."""
    counts = [max(keep, round(tokens * (keep / tokens) ** (i / steps))) for i in range(steps)] + [keep]
    found = [0] * blocks
    for i, (before, after) in enumerate(pairwise(counts), start=1):
        found[blocks * i // (steps + 1)] = before - after
    return tuple(found)


def attended(rows: Rows) -> Tensor:
    """How much attention each row receives in this block, mean over heads: from [CLS], or from all rows: [1, n]."""
    assert rows.tap is not None
    ((q, k),) = rows.tap.rows
    weights = attention_rows(q[:, :, :1] if rows.has_cls else q, k, rows.tap.scale)
    if rows.proportional:  # softmax(s + log size) is softmax(s) times size, normed again
        weights = weights * rows.size[:, None, None]
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights.mean(dim=(1, 2))


def merge(rows: Rows, count: int, penalty: Tensor | None = None) -> Rows:
    """Bipartite soft matching: the `count` rows most like another merge into it (ToMe, arXiv:2210.09461, section 3).

    Rows at even places look for the row at an odd place whose key is nearest by cosine; the nearest pairs merge into
    their mean, weighted by size, at the odd one's place. [CLS], at place 0, looks for none.

    Args:
        penalty: how much less each row shall merge, [1, n]; None for ToMe.
    """
    assert rows.tap is not None
    ((_, k),) = rows.tap.rows
    metric = unit(wide(k).mean(dim=1))
    similar = metric[:, ::2] @ metric[:, 1::2].transpose(-1, -2)
    worth = similar.amax(dim=-1)
    if penalty is not None:
        worth = worth - penalty[:, ::2]
    if rows.has_cls:
        worth = torch.where(torch.arange(worth.shape[1]) == 0, -torch.inf, worth)
    order = topk(worth, worth.shape[1])
    source, rest = order[:, :count], ascending(order[:, count:])
    goal = topk(similar, 1)[..., 0].gather(1, source)
    odd = torch.arange(similar.shape[2])
    pairs = (goal[:, None] == odd[:, None]).to(rows.size.dtype)  # [1, odd rows, count]
    x, size = wide(rows.x), rows.size[..., None]
    whole = x * size
    sizes = size[:, 1::2] + pairs @ _rows(size[:, ::2], source)
    met = (whole[:, 1::2] + pairs @ _rows(whole[:, ::2], source)) / sizes
    return replace(
        rows,
        x=torch.cat([_rows(rows.x[:, ::2], rest), met.to(rows.x.dtype)], dim=1),
        size=torch.cat([_rows(size[:, ::2], rest), sizes], dim=1)[..., 0],
        place=torch.cat([rows.place[:, ::2].gather(1, rest), rows.place[:, 1::2]], dim=1),
    )


def depart(rows: Rows, count: int, fuse: bool) -> Rows:
    """The `count` rows that receive least attention leave (EViT, arXiv:2202.07800, section 3.2).

    Args:
        fuse: one more leaves, and one row comes for all that left: their mean, weighted by the attention they got. It
            takes the place of the one that got most.
    """
    first = int(rows.has_cls)
    score = attended(rows)[:, first:]
    order = topk(score, score.shape[1]) + first
    left = score.shape[1] - count - fuse
    cls = torch.zeros(len(order), first, dtype=torch.int64)
    stay = torch.cat([cls, ascending(order[:, :left])], dim=1)
    x, size, place = _rows(rows.x, stay), rows.size.gather(1, stay), rows.place.gather(1, stay)
    if fuse:
        gone = order[:, left:]
        weights = score.gather(1, gone - first)[:, None]
        one = (weights @ wide(_rows(rows.x, gone))) / weights.sum(dim=-1, keepdim=True)
        x = torch.cat([x, one.to(x.dtype)], dim=1)
        size = torch.cat([size, rows.size.gather(1, gone).sum(dim=1, keepdim=True)], dim=1)
        place = torch.cat([place, rows.place.gather(1, gone[:, :1])], dim=1)
    return replace(rows, x=x, size=size, place=place)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def _tome(rows: Rows, count: int, o: Options) -> Rows:
    return replace(merge(rows, count), proportional=o["proportional"])


def _turbo(rows: Rows, count: int, o: Options) -> Rows:
    factor = o["alpha"] * 30 * (rows.patches + 1) / _PAPER_ROWS
    return replace(merge(rows, count, factor * attended(rows)), proportional=o["proportional"])


def _refuse(place: Place) -> Refusal | None:
    a = place.anatomy
    if a.tower.rigid is not None:
        return f"`{a.family}`: {a.tower.rigid}, so none can leave inside it", _AFTER
    if place.bucket.frames > 1:
        return f"a clip of {place.bucket.frames} frames goes through the tower one by one", _AFTER
    if a.tower.layers != a.tower.feature_layer:
        return f"the tower still has {a.tower.layers} layers of which {a.tower.feature_layer} are used", "trim it first"
    if "vision" in a.quantized:
        return "the tower is int8 already", "put quantize last"
    return None


_AFTER = "choose a method that works after the encoder"


def _pairs(place: Place, o: Options) -> Refusal | None:
    blocks = place.anatomy.tower.layers
    fewest = least(place.tokens, blocks)
    if not (refused := _refuse(place)) and place.keep < fewest:
        cause = f"keep={place.keep}, but merging pairs in {blocks} blocks leaves {fewest} of {place.tokens} tokens"
        return cause, f"choose {fewest} or more"
    return refused


def _steps(place: Place, o: Options) -> Refusal | None:
    blocks = place.anatomy.tower.layers
    if not (refused := _refuse(place)) and not 1 <= o["steps"] <= blocks:
        return f"steps={o['steps']} in a tower of {blocks} blocks", f"choose 1 to {blocks}"
    return refused


def _never(state: TowerState, keep: int, options: Options) -> Choice:
    raise AssertionError("tokens left inside the tower")


ROWS: dict[str, Method] = {
    "tome": Method(
        title="ToMe",
        source="arXiv:2210.09461",
        summary="the most similar tokens merge in every block of the vision tower, which gets smaller on the way",
        choose=_never,
        inside=Inside(lambda tokens, keep, blocks, o: even(tokens, keep, blocks), _tome),
        options={"proportional": True},
        merges=True,
        refuse=_pairs,
        differs="as many merge in each block as lead to `keep`, the remainder first; a merged token takes the place of "
        "the one that the others joined, and tokens are sorted by place in the end",
    ),
    "turbo": Method(
        title="Turbo",
        source="arXiv:2312.07408",
        summary="as `tome`, but tokens that [CLS] attends to are less likely to merge away",
        choose=_never,
        inside=Inside(lambda tokens, keep, blocks, o: even(tokens, keep, blocks), _turbo),
        options={"alpha": 5.0, "proportional": True},
        merges=True,
        refuse=_pairs,
        without_cls="this tower has no [CLS] token: the mean attention received from all tokens takes its place",
        differs="the factor of 30 grows with the number of patches, 30 at CLIP-L/336; the same in every block (beta of "
        "1); no floor of 40 tokens",
    ),
    "early-exit": Method(
        title="EViT",
        source="arXiv:2202.07800, section 3.2",
        summary="tokens that [CLS] attends to least leave the vision tower in three of its blocks",
        choose=_never,
        inside=Inside(
            lambda tokens, keep, blocks, o: ladder(tokens, keep, blocks, o["steps"]),
            lambda rows, count, o: depart(rows, count, o["fuse"]),
        ),
        options={"steps": 3, "fuse": False},
        merges=True,
        refuse=_steps,
        without_cls="this tower has no [CLS] token: the mean attention received from all tokens takes its place",
        differs="not trained; those that leave are fused into one token with fuse=true only, as a mean (the paper's "
        "weights do not sum to 1), counted in `keep`",
    ),
}
