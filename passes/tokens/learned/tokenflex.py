"""TokenFLEX (arXiv:2504.03154): one projector behind adaptive pooling to any grid, trained for several token counts."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from .weights import Learned
from .windows import adaptive, resize


class TokenFlex(Learned):
    """Adaptive average pooling, then SwiGLU: out(silu(gate x) * up x).

    Args:
        width: of the tower. hidden: of the language model. inner: between.
        blocks: the one tower block whose output it reads.
    """

    method = "tokenflex"

    def __init__(self, *, width: int, hidden: int, inner: int, blocks: Sequence[int]) -> None:
        super().__init__()
        self.blocks = tuple(blocks)
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.out = nn.Linear(inner, hidden, bias=False)

    def refuse(self, rows: int, columns: int, keep: int) -> str | None:
        if len(self.blocks) != 1:
            return f"tokenflex reads one tower block, its weights name {len(self.blocks)}"
        return (
            None if shape(rows, columns, keep) else f"{keep} tokens are no grid of the proportions of {rows}x{columns}"
        )

    def forward(self, x: Tensor, rows: int, columns: int, keep: int) -> Tensor:
        """[B, rows * columns, width] -> [B, keep, hidden]."""
        grid = shape(rows, columns, keep)
        assert grid is not None
        x = resize(x, adaptive(rows, grid[0]), adaptive(columns, grid[1]))
        return self.out(functional.silu(self.gate(x)) * self.up(x))


def shape(rows: int, columns: int, keep: int) -> tuple[int, int] | None:
    """The smaller grid of `keep` tokens and the same proportions; None if there is none."""
    unit = math.gcd(rows, columns)
    high, wide = rows // unit, columns // unit
    side = math.isqrt(keep // (high * wide))
    return (side * high, side * wide) if side and side * side * high * wide == keep else None
