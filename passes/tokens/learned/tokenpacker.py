"""TokenPacker (arXiv:2407.02392): coarse queries gather the details of their windows from several tower levels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .weights import Learned
from .windows import WindowAttention, bilinear, mlp, resize, windows


class TokenPacker(Learned):
    """Queries are the last named level, resized; keys and values all levels side by side; one token for each window.

    Args:
        width: of the tower. hidden: of the language model. inner: of the attention, with `heads` heads.
        blocks: tower blocks whose outputs it reads; the last one gives the queries.
        window: side of a window in tokens.
    """

    method = "tokenpacker"

    def __init__(self, *, width: int, hidden: int, inner: int, heads: int, blocks: Sequence[int], window: int) -> None:
        super().__init__()
        self.blocks, self.window = tuple(blocks), window
        self.query = nn.Sequential(nn.Linear(width, inner), nn.LayerNorm(inner))
        self.key = nn.Sequential(*mlp(len(blocks) * width, inner, inner), nn.LayerNorm(inner))
        self.value = nn.Sequential(*mlp(len(blocks) * width, inner, inner), nn.LayerNorm(inner))
        self.attention = WindowAttention(inner, heads)
        self.project = mlp(inner, hidden, hidden)

    def refuse(self, rows: int, columns: int, keep: int) -> str | None:
        return refuse_windows(rows, columns, keep, self.window)

    def forward(self, levels: Sequence[Tensor], rows: int, columns: int) -> Tensor:
        """Levels [B, rows * columns, width] each -> [B, T, hidden]."""
        s = self.window
        query = self.query(resize(levels[-1], bilinear(rows, rows // s), bilinear(columns, columns // s)))
        several = torch.cat(list(levels), dim=-1)
        key, value = (windows(part(several), rows, columns, s) for part in (self.key, self.value))
        return self.project(self.attention(query, key, value))


def refuse_windows(rows: int, columns: int, keep: int, window: int) -> str | None:
    """Why windows of this side do not make `keep` tokens."""
    if rows % window or columns % window:
        return f"windows of {window}x{window} tokens do not fill a grid of {rows}x{columns}"
    made = rows // window * (columns // window)
    return None if made == keep else f"windows of {window}x{window} make {made} tokens of {rows}x{columns}, not {keep}"
