"""Methods that choose among the tokens of an image after the encoder, without knowing the question."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...surgery.picking import topk
from ...surgery.selection import Choice, TowerState
from . import merge, select
from .method import Method, Options, Place, Refusal, last
from .scores import cosine_distance, joined, keys, received, unit
from .select import ascending, mark

_RECEIVED = "this tower has no [CLS] token: the mean attention received from all tokens takes its place"
_WORSE = _RECEIVED + ", which did worse than random on examples/scenes-smol; compare `divprune`"


def _share(options: Options, name: str) -> Refusal | None:
    if 0 <= options[name] <= 1:
        return None
    return f"{name}={options[name]}, and a share lies between 0 and 1", "choose 0 to 1"


# --- VTC-CLS


def _from_block(scored: Sequence[int], options: Options) -> Sequence[int]:
    first = options["first_block"]
    return scored[len(scored) // 2 :] if first == -1 else [block for block in scored if block >= first]


def _summed(state: TowerState) -> Tensor:
    return torch.stack([received(state, tap) for tap in state.taps]).sum(dim=0)


def _refuse_vtc(place: Place, options: Options) -> Refusal | None:
    first, most = options["first_block"], place.anatomy.scored[-1]
    if -1 <= first <= most:
        return None
    return f"first_block={first}, but the last block that can score is {most}", f"choose 0 to {most}, or -1 for half"


# --- FoPru


def _significance(state: TowerState, options: Options) -> Tensor:
    return received(state, state.taps[-1], everyone=options["queries"] == "all")


def _refuse_queries(place: Place, options: Options) -> Refusal | None:
    if options["queries"] in ("cls", "all"):
        return None
    return f"queries={options['queries']!r} is not cls or all", "choose cls or all"


def _refuse_rows(place: Place, options: Options) -> Refusal | None:
    widths = sorted({panel.columns for panel in place.bucket.panels})
    if len(widths) > 1:
        return (
            f"rows of {' and '.join(map(str, widths))} tokens cannot be ranked together",
            "choose a method that needs no rows, such as fopru-rank",
        )
    if place.keep % widths[0]:
        return f"{place.keep} tokens are not whole rows of {widths[0]}", f"choose {_nearest(place, 0, widths[0])}"
    return _refuse_queries(place, options)


def _nearest(place: Place, left: int, step: int) -> str:
    """The legal numbers around what was asked: `left` tokens and so many steps, up to all."""
    below = left + (place.keep - left) // step * step
    return " or ".join(str(n) for n in (below, below + step) if max(left, 1) <= n <= place.tokens)


# --- HiPrune


def _object_and_deep(scored: Sequence[int], options: Options) -> Sequence[int]:
    chosen = options["object_block"]
    # Block 8 of CLIP-L's 24, counted from 0.
    return (scored[round(8 / 23 * (len(scored) - 1))] if chosen == -1 else chosen, scored[-1])


def _anchors(keep: int, options: Options) -> int:
    return round(keep * options["alpha"] / 5)


def _hiprune(state: TowerState, keep: int, options: Options) -> Choice:
    objects, deep = (received(state, tap, everyone=True) for tap in (state.taps[0], state.taps[-1]))
    return Choice(select.anchors_and_more(state, objects, deep, _anchors(keep, options), keep))


def _refuse_hiprune(place: Place, options: Options) -> Refusal | None:
    if refused := _share(options, "alpha"):
        return refused
    if 5 * (anchors := _anchors(place.keep, options)) > place.keep:
        return f"{anchors} anchors with four neighbours each do not fit into {place.keep} tokens", "lower alpha"
    scored = place.anatomy.scored
    if options["object_block"] not in (-1, *scored):
        return (
            f"object_block={options['object_block']}, but blocks that can score are {', '.join(map(str, scored))}",
            "choose one of them, or -1",
        )
    return None


# --- VisionZip


def _visionzip(state: TowerState, keep: int, options: Options) -> Choice:
    contextual = round(options["contextual"] * keep)
    tap, n = state.taps[-1], state.count
    dominant = state.top(received(state, tap), keep - contextual)
    if not contextual:
        return Choice(ascending(dominant))
    taken = mark(dominant, n)
    centres = select.strided(state, taken, n - keep + contextual, contextual)
    merged = merge.assign(centres, ~taken & ~mark(centres, n), keys(state, tap), options["variant"])
    return merge.in_order(torch.cat([dominant, centres], dim=1), torch.cat([merge.one_hot(dominant, n), merged], dim=1))


def _refuse_visionzip(place: Place, options: Options) -> Refusal | None:
    if refused := _share(options, "contextual"):
        return refused
    if (contextual := round(options["contextual"] * place.keep)) >= place.keep:
        return f"{contextual} contextual tokens of {place.keep} leave no dominant one", "lower contextual"
    if options["variant"] not in ("clean", "code"):
        return f"variant={options['variant']!r} is not clean or code", "choose clean or code"
    return None


# --- LLaVA-PruMerge


def _prumerge(state: TowerState, keep: int, options: Options) -> Choice:
    whole = joined(state.taps[-1])
    score = received(state, whole if state.has_cls else state.taps[-1])
    order = select.with_stride(state, score, keep, round(options["spatial"] * (keep - 1)))
    kept = order[:, :-1]  # the worst of them lends its place to what is left over
    neighbours = options["neighbours"] or min(32, state.count - 1)
    mix = [merge.absorb(kept, keys(state, whole), score, neighbours), merge.residual(kept, score)]
    return merge.in_order(order, torch.cat(mix, dim=1))


def _refuse_prumerge(place: Place, options: Options) -> Refusal | None:
    if place.keep < 2:
        return f"{place.keep} token, and one stands for all that are dropped", "keep 2 or more"
    if not 0 <= options["neighbours"] < place.tokens:
        return (
            f"neighbours={options['neighbours']}, but a token has {place.tokens - 1} others",
            f"choose 1 to {place.tokens - 1}, or 0 for 32 or all",
        )
    return _share(options, "spatial")


# --- VisPruner


def _vispruner(state: TowerState, keep: int, options: Options) -> Choice:
    important = int(options["important"] * keep)
    score, n = received(state, state.taps[-1]), state.count
    best = state.top(score, important)
    if important == keep:
        return Choice(ascending(best))
    taken = mark(best, n)
    rest = topk(torch.where(taken, -torch.inf, score), n - important)
    left = select.without_twins(rest, 1 - cosine_distance(state.tokens), keep - important, options["step"])
    diverse = select.derived(state, mark(left, n), taken, keep - important)
    return Choice(ascending(torch.cat([best, diverse], dim=1)))


def _refuse_vispruner(place: Place, options: Options) -> Refusal | None:
    if options["step"] < 1:
        return f"step={options['step']} tokens leave in a round", "choose 1 or more"
    return _share(options, "important")


# --- MustDrop


def _mustdrop(state: TowerState, keep: int, options: Options) -> Choice:
    """Windows that stay are picked by their last token, which is not the one whose place the mean takes."""
    assert state.places is not None
    side = options["window"]
    table = select.windows(state.places, side)
    staying = len(table) - (state.count - keep) // (side * side - 1)
    group = np.empty(state.count, dtype=np.int64)
    group[table] = np.arange(len(table))[:, None]
    merged = torch.ones(1, len(table), dtype=torch.bool)
    if staying:
        best = state.only(table[:, -1]).top(-_redundancy(state.tokens, table), staying)
        merged = ~mark(best, len(table))
    index = torch.from_numpy(group)
    gone = merged[:, index]
    centre = np.zeros(state.count, dtype=bool)
    centre[table[:, (side - 1) // 2 * (side + 1)]] = True
    kept = topk((~gone | torch.from_numpy(centre)).to(torch.float32), keep)
    return Choice(kept, merge.groups(kept, index, gone))


def _redundancy(tokens: Tensor, table: np.ndarray) -> Tensor:
    """Mean cosine of the pairs in each window: [B, N, d] -> [B, windows]."""
    rows = unit(tokens)[:, torch.from_numpy(table)]
    size = table.shape[1]
    total, own = rows.sum(dim=2), (rows * rows).sum(dim=(2, 3))
    return ((total * total).sum(dim=-1) - own) / (size * (size - 1))


def _refuse_mustdrop(place: Place, options: Options) -> Refusal | None:
    side = options["window"]
    if side < 2:
        return f"window={side} merges nothing", "choose 2 or more"
    for panel in place.bucket.panels:
        if panel.rows % side or panel.columns % side:
            return (
                f"{panel.rows}x{panel.columns} tokens cannot be cut into windows of {side}x{side}",
                "choose a window that divides both",
            )
    least, saved = place.tokens // (side * side), side * side - 1
    if place.keep < least or (place.tokens - place.keep) % saved:
        near = _nearest(place, least, saved) or str(least)
        return f"keep={place.keep} of {place.tokens}, and each window of {side}x{side} saves {saved}", f"choose {near}"
    return None


ROWS = {
    "fastervlm": Method(
        title="FasterVLM",
        source="arXiv:2412.01818",
        summary="tokens that [CLS] attends to most in the last block that runs",
        choose=lambda s, keep, o: Choice(ascending(s.top(received(s, s.taps[-1]), keep))),
        blocks=last,
        without_cls=_WORSE,
    ),
    "vtc-cls": Method(
        title="VTC-CLS",
        source="arXiv:2412.05819",
        summary="tokens that [CLS] attends to most, summed over the blocks from `first_block` (-1: the deeper half)",
        choose=lambda s, keep, o: Choice(ascending(s.top(_summed(s), keep))),
        options={"first_block": -1},
        blocks=_from_block,
        refuse=_refuse_vtc,
        without_cls=_RECEIVED,
        differs="the paper tunes the first block and does not record it",
    ),
    "fopru-rank": Method(
        title="FoPru (rank)",
        source="arXiv:2411.14164",
        summary="tokens that get the most attention in the last block that runs, of [CLS] or (queries=all) of all",
        choose=lambda s, keep, o: Choice(ascending(s.top(_significance(s, o), keep))),
        options={"queries": "cls"},
        blocks=last,
        refuse=_refuse_queries,
        without_cls=_WORSE,
        differs="the paper does not say whose attention it sums",
    ),
    "fopru-row": Method(
        title="FoPru (row)",
        source="arXiv:2411.14164",
        summary="whole rows of tokens that get the most attention in the last block that runs",
        choose=lambda s, keep, o: Choice(select.best_rows(s, _significance(s, o), keep)),
        options={"queries": "cls"},
        blocks=last,
        grid=True,
        refuse=_refuse_rows,
        without_cls=_WORSE,
        differs="the paper does not say whose attention it sums; rows of all tiles compete",
    ),
    "hiprune": Method(
        title="HiPrune",
        source="arXiv:2508.00553",
        summary="tokens that an early block attends to (`alpha` of all, with their neighbours) and a deep one",
        choose=_hiprune,
        options={"alpha": 0.1, "object_block": -1},
        blocks=_object_and_deep,
        grid=True,
        refuse=_refuse_hiprune,
        differs="neighbours do not wrap around the ends of a row, as those of the code do",
    ),
    "visionzip": Method(
        title="VisionZip",
        source="arXiv:2412.04467",
        summary="tokens that [CLS] attends to most, and a share `contextual` that merges the rest by likeness of keys",
        choose=_visionzip,
        # 30 of 192, 20 of 128, 10 of 64, and the paper's numbers for tiles alike.
        options={"contextual": 0.156, "variant": "clean"},
        blocks=last,
        merges=True,
        refuse=_refuse_visionzip,
        without_cls=_WORSE,
        differs="[CLS] itself is not passed on, so that all tokens have a place; merged ones stand at their centre's "
        "place instead of last; a merged token is a mean (variant=code: the centre plus a mean)",
    ),
    "prumerge+": Method(
        title="LLaVA-PruMerge+",
        source="arXiv:2403.15388",
        summary="tokens that [CLS] attends to most and evenly spaced ones, each with its likes added, and one of all "
        "that are dropped",
        choose=_prumerge,
        options={"spatial": 0.75, "neighbours": 0},
        blocks=last,
        merges=True,
        refuse=_refuse_prumerge,
        without_cls=_RECEIVED + "; each head has its own, where [CLS] has one of the full width",
        differs="counts are fixed: `spatial` of them evenly spaced, the best others beside them; the last block that "
        "runs instead of the tower's last; raster order, the token of all dropped at the place of the best of them",
    ),
    "vispruner": Method(
        title="VisPruner",
        source="arXiv:2412.01818v3",
        summary="`important` of the tokens that [CLS] attends to most, and others that are left when twins leave",
        choose=_vispruner,
        options={"important": 0.5, "step": 8},
        blocks=last,
        refuse=_refuse_vispruner,
        without_cls=_RECEIVED,
        differs="those that stay in a round keep their order by attention; the code sorts half of them by likeness, so "
        "that rounding in one round changes who is compared in the next",
    ),
    "mustdrop-vision": Method(
        title="MustDrop (vision stage)",
        source="arXiv:2411.10803",
        summary="windows of the most similar tokens become their mean",
        choose=_mustdrop,
        options={"window": 3},
        grid=True,
        merges=True,
        refuse=_refuse_mustdrop,
        differs="a fixed number of windows instead of a threshold; its stages in the language model are not here",
    ),
}
