"""QueCC (arXiv:2411.03312): the question is added to the picture before its windows are summed up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ....surgery.selection import Text
from .tokenpacker import refuse_windows
from .weights import Learned
from .windows import WindowAttention, mlp, windows


def mean_question(text: Text) -> Tensor:
    """Mean of the question's embeddings, zeros if nothing was asked: [B, hidden]."""
    mask = text.mask.unsqueeze(-1)
    return (text.embeddings * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


class QueryCompressor(Learned):
    """Queries are windows of the last named level plus the question; keys and values as TokenPacker's.

    Args:
        width: of the tower. hidden: of the language model. inner: of the attention, with `heads` heads.
        blocks: tower blocks whose outputs it reads; the last one gives the queries.
        window: side of a window in tokens, kernel and stride of the queries' convolution.
    """

    method = "query-compressor"

    def __init__(self, *, width: int, hidden: int, inner: int, heads: int, blocks: Sequence[int], window: int) -> None:
        super().__init__()
        self.blocks, self.window = tuple(blocks), window
        self.question = nn.Sequential(nn.Linear(hidden, width), nn.LayerNorm(width))
        self.query = nn.Sequential(*mlp(width, inner, inner), nn.LayerNorm(inner))
        self.shrink = nn.Conv2d(inner, inner, window, stride=window, groups=inner)
        self.key = nn.Sequential(*mlp(len(blocks) * width, inner, inner), nn.LayerNorm(inner))
        self.value = nn.Sequential(*mlp(len(blocks) * width, inner, inner), nn.LayerNorm(inner))
        self.attention = WindowAttention(inner, heads)
        self.project = mlp(inner, hidden, hidden)

    def refuse(self, rows: int, columns: int, keep: int) -> str | None:
        return refuse_windows(rows, columns, keep, self.window)

    def forward(self, levels: Sequence[Tensor], text: Text, rows: int, columns: int) -> Tensor:
        """Levels [B, rows * columns, width] each, the question [B, M, hidden] -> [B, T, hidden]."""
        asked = self.question(mean_question(text)).unsqueeze(1)
        fine = self.query(levels[-1] + asked).transpose(1, 2).unflatten(-1, (rows, columns))
        query = self.shrink(fine).flatten(2).transpose(1, 2)
        several = torch.cat(list(levels), dim=-1)
        key, value = (windows(part(several), rows, columns, self.window) for part in (self.key, self.value))
        return self.project(self.attention(query, key, value))
