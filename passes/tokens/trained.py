"""Methods with weights of their own: trained compressors and scorers, read from a safetensors file.

Compressors make the tokens of the language model themselves, in the place of the projector, which is then dead weight.
They read what tower blocks give: where a family norms behind its last block, that norm is dead weight too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...errors import PassError
from ...surgery.selection import Choice, TowerState
from .baselines import uniform_positions
from .learned import weights
from .learned.covipal import Covipal
from .learned.mqt import Mqt
from .learned.quecc import QueryCompressor
from .learned.task_conv import TaskConv, first_attention
from .learned.tokenflex import TokenFlex, shape
from .learned.tokenpacker import TokenPacker
from .learned.windows import centres
from .learned.wtc import WindowCompression
from .method import Method, Options, Place, Refusal, every_row
from .scores import wide
from .select import ascending

_NAMES = "weights are read by our own tensor names, so a published checkpoint has to be renamed"


def learned_score(state: TowerState, keep: int, score: Tensor) -> Choice:
    """The best tokens by what a module says of them, [1, N]."""
    return Choice(ascending(state.top(wide(score), keep)))


def compressed(state: TowerState, keep: int, features: Tensor) -> Choice:
    """Tokens of a module's own, [1, T, hidden]: in the middles of equal parts of the grid, or evenly spaced."""
    assert features.shape[1] == keep
    rows, columns = _grid(state)
    grid = shape(rows, columns, keep)
    places = uniform_positions(state.count, keep) if grid is None else centres(rows, columns, *grid)
    return Choice(torch.tensor([places]), features=features)


def _grid(state: TowerState) -> tuple[int, int]:
    (panel,) = state.panels
    return panel.rows, panel.columns


def refuse_score(place: Place, header: weights.Header) -> Refusal | None:
    """Refuse weights that are not for this model."""
    why = header.module.refuse(1, place.tokens, place.keep)
    return weights.refuse_widths(header, place.anatomy) or ((why, weights.FIX) if why else None)


def refuse_first_layer(place: Place, header: weights.Header) -> Refusal | None:
    """Refuse a language model whose first layer does not attend by one axis of positions."""
    a = place.anatomy
    if a.layout.axes != 1 or not a.language.heads[0]:
        return (
            f"attention of the first language layer is asked with positions of 1 axis; `{a.family}` has "
            f"{a.layout.axes}, and {a.language.heads[0]} heads in that layer",
            "use covipal, which looks at embeddings",
        )
    return refuse_score(place, header)


def refuse_grid(place: Place, header: weights.Header) -> Refusal | None:
    """Refuse anything but one grid of tokens, a patch each, and weights or a count that do not fit it."""
    a, bucket = place.anatomy, place.bucket
    if a.layout.axes != 1:
        return (
            f"tokens that are made of several would have to share places of {a.layout.axes} axes (M-RoPE), not 1",
            "use a method that keeps tokens",
        )
    if len(bucket.panels) != 1 or bucket.line_breaks:
        return (
            f"it makes its tokens of 1 grid; those of `{a.family}` lie in {len(bucket.panels)} with "
            f"{len(bucket.line_breaks)} line breaks",
            "use a method that keeps tokens",
        )
    segments = a.segments[a.buckets.index(bucket)]
    patches = sum(segments) - a.tower.has_cls * len(segments)
    if header.module.blocks and (not a.tower.layers or patches != bucket.tokens):
        return (
            f"it makes its tokens of patches; `{a.family}` makes {bucket.tokens} tokens of {patches} patches in "
            f"{a.tower.layers} blocks that vlmcut knows",
            "use wtc, which begins behind the projector, or a method that keeps tokens",
        )
    panel = bucket.panels[0]
    why = header.module.refuse(panel.rows, panel.columns, place.keep)
    return weights.refuse_widths(header, a) or ((why, "give other weights or another --keep") if why else None)


def _method(
    kind: type[weights.Learned],
    choose: Callable[[TowerState, int, Any], Choice],
    refuse: Callable[[Place, weights.Header], Refusal | None],
    **row: Any,
) -> Method:
    """A row whose `choose` gets the module, and whose option names its file."""

    def refuse_file(place: Place, options: Options) -> Refusal | None:
        try:
            header = weights.head(kind, options["weights"])
        except PassError as error:
            return str(error), error.hint or weights.FIX
        return refuse(place, header)

    return Method(
        choose=lambda s, keep, o: choose(s, keep, o["module"]),
        refuse=refuse_file,
        options={"weights": ""},
        module=kind,
        **row,
    )


def _compressor(kind: type[weights.Learned], features: Callable[[TowerState, int, Any], Tensor], **row: Any) -> Method:
    def choose(state: TowerState, keep: int, module: Any) -> Choice:
        return compressed(state, keep, features(state, keep, module))

    return _method(kind, choose, refuse_grid, grid=True, merges=True, **row)


ROWS = {
    "covipal": _method(
        Covipal,
        lambda s, keep, m: learned_score(s, keep, m(s.project(s.tokens), s.text)),
        refuse_score,
        title="CoViPAL",
        source="arXiv:2508.17243",
        summary="a small trained classifier scores each token beside the question",
        projects=every_row,
        text=True,
        differs="the classifier's form is ours, as small as can be; it runs once, before the language model; trained "
        "by the paper's first stage alone; " + _NAMES,
    ),
    "task-conv": _method(
        TaskConv,
        lambda s, keep, m: learned_score(s, keep, m(first_attention(s).to(s.tokens.dtype))),
        refuse_first_layer,
        title="Generic token compression",
        source="arXiv:2506.01097",
        summary="five trained convolutions over the question's attention in the first language layer",
        projects=every_row,
        text=True,
        differs="the attention is of a prompt of the picture and the question alone, and divided by its mean; kernel "
        "size and activation are ours, the paper's are not known; " + _NAMES,
    ),
    "tokenpacker": _compressor(
        TokenPacker,
        lambda s, keep, m: m(s.outputs, *_grid(s)),
        title="TokenPacker",
        source="arXiv:2407.02392",
        summary="coarse queries gather details of their windows from several tower levels, trained",
        differs=_NAMES,
    ),
    "query-compressor": _compressor(
        QueryCompressor,
        lambda s, keep, m: m(s.outputs, s.text, *_grid(s)),
        title="QueCC",
        source="arXiv:2411.03312",
        summary="the question is added to the picture before windows are summed up, trained",
        text=True,
        differs="the question is the mean of its embeddings, not the language model's last state, which would cost a "
        "whole decoder before the picture; it is added to the queries' level alone; " + _NAMES,
    ),
    "mqt": _compressor(
        Mqt,
        lambda s, keep, m: m(s.outputs[0], keep),
        title="Matryoshka Query Transformer",
        source="arXiv:2405.19315",
        summary="the first k of learned queries, trained; their attention does not depend on the picture",
        differs="attention is a constant of the graph; " + _NAMES,
    ),
    "tokenflex": _compressor(
        TokenFlex,
        lambda s, keep, m: m(s.outputs[0], *_grid(s), keep),
        title="TokenFLEX",
        source="arXiv:2504.03154",
        summary="adaptive pooling to any smaller grid and a SwiGLU projector trained for several",
        differs="the projector's width is the file's, its linears have no bias; " + _NAMES,
    ),
    "wtc": _compressor(
        WindowCompression,
        lambda s, keep, m: m(s.project(s.tokens), *_grid(s)),
        title="LLaVA-UHD v3, windowed token compression",
        source="arXiv:2511.21150",
        summary="a trained weighted mean of each 2 x 2 window",
        projects=every_row,
        differs="once, behind the projector, instead of twice inside a tower with finer patches; " + _NAMES,
    ),
}
