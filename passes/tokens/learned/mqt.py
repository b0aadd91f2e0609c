"""Matryoshka Query Transformer (arXiv:2405.19315): the first m of learned queries, one projector for every budget.

Neither queries nor keys depend on the picture, so their attention is a constant, which is all that a graph keeps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from .weights import Learned


class Mqt(Learned):
    """One cross-attention from queries with positions to positions of the grid; the picture gives the values.

    Args:
        width: of the tower. hidden: of the language model. heads: of the attention.
        blocks: the one tower block whose output it reads.
        side: queries are `side` x `side`, with a position each, which are resized to the grid for the keys.
        grid: rows and columns of the tower's patches.
    """

    method = "mqt"

    def __init__(
        self, *, width: int, hidden: int, heads: int, blocks: Sequence[int], side: int, grid: Sequence[int]
    ) -> None:
        super().__init__()
        self.blocks, self.heads, self.side, self.grid = tuple(blocks), heads, side, tuple(grid)
        self.queries, self.positions = (nn.Parameter(0.02 * torch.randn(side * side, width)) for _ in range(2))
        self.query_norm, self.key_norm, self.value_norm = (nn.LayerNorm(width) for _ in range(3))
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))
        self.project = nn.Linear(width, hidden, bias=False)

    def refuse(self, rows: int, columns: int, keep: int) -> str | None:
        queries, width = self.side**2, self.q_proj.in_features
        if len(self.blocks) != 1:
            return f"mqt reads one tower block, its weights name {len(self.blocks)}"
        if width % self.heads:
            return f"{self.heads} heads do not divide a width of {width}"
        if self.grid != (rows, columns):
            return f"the weights are for a grid of {'x'.join(map(str, self.grid))}, this one is {rows}x{columns}"
        return None if keep <= queries else f"the weights have {queries} queries, not {keep}"

    def attention(self) -> Tensor:
        """Softmax of queries against the grid's positions: [heads, queries, rows * columns]."""
        grid = self.positions.unflatten(0, (self.side, self.side)).permute(2, 0, 1)[None]
        if self.grid != (self.side, self.side):
            grid = functional.interpolate(grid, self.grid, mode="bicubic", align_corners=False)
        k = self.k_proj(self.key_norm(grid[0].flatten(1).t()))
        q = self.q_proj(self.query_norm(self.queries + self.positions))
        q, k = (x.unflatten(-1, (self.heads, -1)).transpose(0, 1) for x in (q, k))
        return torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1)

    def forward(self, x: Tensor, keep: int) -> Tensor:
        """[B, rows * columns, width] -> [B, keep, hidden]."""
        v = self.v_proj(self.value_norm(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        # Gathered, not sliced: an exporter would store a slice of a constant instead of the constant.
        rows = self.attention().index_select(1, torch.arange(keep))
        return self.project(self.out_proj((rows @ v).transpose(1, 2).flatten(2)))

    @torch.no_grad()
    def exported(self) -> nn.Module:
        return Folded(self)


class Folded(nn.Module):
    """The same with its attention as numbers; queries, positions and what led to them are gone."""

    table: Tensor

    def __init__(self, of: Mqt) -> None:
        super().__init__()
        self.blocks, self.heads = of.blocks, of.heads
        self.value_norm, self.v_proj, self.out_proj, self.project = of.value_norm, of.v_proj, of.out_proj, of.project
        self.register_buffer("table", of.attention())

    def attention(self) -> Tensor:
        """As `Mqt.attention`."""
        return self.table

    forward = Mqt.forward
