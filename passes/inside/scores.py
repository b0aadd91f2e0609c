"""Scores of columns at a layer's entry, float32 or wider: larger is more worth keeping.

Attention is recomputed from queries and keys as the layer's attention takes them, over all columns that a row sees.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...surgery.inside import LayerState
from ...surgery.selection import Tap
from ..tokens.scores import wide


def visual(state: LayerState, score: Tensor) -> Tensor:
    """[S] -> [1, S], -inf where there is no visual token."""
    return torch.where(state.columns.visual, score[None], -math.inf)


def asked(state: LayerState, tap: Tap) -> Tensor:
    """How much the last column of the prompt looks at each, mean over heads: [S]."""
    return state.attention(tap, state.last)[:, 0].mean(dim=0)


def in_common(state: LayerState) -> Tensor:
    """Neurons of the layer before that are active in a column and in the last one of the prompt, a count: [S].

    Active is above 0. CoreMatching, arXiv:2505.19235.
    """
    assert state.neurons is not None
    active = (state.neurons[0] > 0).to(torch.float32)  # float16 cannot count beyond 2048
    return active @ active.index_select(0, state.last)[0]


def text(state: LayerState) -> Tensor:
    """Real columns that are no image, and stand behind the first visual one: bool [S]."""
    columns = state.columns
    behind = torch.cumsum(columns.visual[0].to(torch.int64), dim=0) > 0
    return behind & ~columns.visual[0] & columns.real[0]


def looked_at(rows: Tensor, weight: Tensor) -> Tensor:
    """Weighted sum over query columns: [..., S, S] and [S] -> [..., S]."""
    return (rows * wide(weight)[:, None]).sum(dim=-2)


def masses(state: LayerState) -> tuple[Tensor, Tensor]:
    """Attention in the layer before from text behind the image, summed, and from visual tokens, its mean: [S] each.

    Of each pair the largest of the heads (FitPrune, arXiv:2409.10197).
    """
    assert state.before is not None
    rows, seen = state.attention(state.before).amax(dim=0), state.columns.visual
    return looked_at(rows, text(state)), looked_at(rows, seen[0]) / seen.sum().clamp(min=1)


def raters(state: LayerState) -> Tensor:
    """Text columns that visual tokens find in themselves more than on average: bool [S].

    SparseVLM, arXiv:2410.04417, section 3.2: softmax over text of the product of what entered the language model, mean
    over visual tokens; those above the mean of all text.
    """
    words, seen = text(state), state.columns.visual[0]
    entered = wide(state.embedded[0])
    score = torch.where(words, entered @ entered.T, torch.finfo(entered.dtype).min)
    share = torch.softmax(score, dim=-1) * (seen[:, None] & words)
    strength = share.sum(dim=0) / seen.sum().clamp(min=1)
    mean = strength.sum() / words.sum().clamp(min=1)
    return words & (strength > mean)
