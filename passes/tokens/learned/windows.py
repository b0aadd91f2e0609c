"""Windows of a grid, and attention inside them: the piece that TokenPacker, QueCC and LLaVA-UHD v3 share."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn


def windows(x: Tensor, rows: int, columns: int, size: int) -> Tensor:
    """Tokens of a raster grid by window: [B, rows * columns, d] -> [B, T, size * size, d], windows in raster order."""
    batch, _, d = x.shape
    split = x.reshape(batch, rows // size, size, columns // size, size, d)
    return split.transpose(2, 3).reshape(batch, -1, size * size, d)


def centres(rows: int, columns: int, high: int, wide: int) -> list[int]:
    """The token in the middle of each of `high` x `wide` equal parts of a grid, in raster order; rounded down."""
    down, right = ([int((i + 0.5) * n / m - 0.5) for i in range(m)] for n, m in ((rows, high), (columns, wide)))
    return [r * columns + c for r in down for c in right]


def bilinear(n: int, m: int) -> np.ndarray:
    """Weights [m, n] of bilinear resizing with half-pixel centres, borders repeated, no antialiasing."""
    at = np.clip((np.arange(m) + 0.5) * n / m - 0.5, 0, n - 1)
    low = np.minimum(at.astype(int), n - 1)
    matrix = np.zeros((m, n))
    matrix[np.arange(m), low] += 1 - (at - low)
    matrix[np.arange(m), np.minimum(low + 1, n - 1)] += at - low
    return matrix


def adaptive(n: int, m: int) -> np.ndarray:
    """Weights [m, n] of adaptive average pooling: bins from floor(i n / m) to ceil((i + 1) n / m)."""
    matrix = np.zeros((m, n))
    for i in range(m):
        start, end = i * n // m, -(-(i + 1) * n // m)
        matrix[i, start:end] = 1 / (end - start)
    return matrix


def resize(x: Tensor, down: np.ndarray, right: np.ndarray) -> Tensor:
    """Resize a raster grid by weights [h', h] and [w', w]: [B, h * w, d] -> [B, h' * w', d]."""
    return torch.from_numpy(np.kron(down, right)).to(x.dtype) @ x


class WindowAttention(nn.Module):
    """One query for each window, which sees the window's members only."""

    def __init__(self, inner: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(inner, inner) for _ in range(4))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Query [B, T, inner], key and value [B, T, members, inner] -> [B, T, inner]."""
        q = self.q_proj(query).unflatten(-1, (self.heads, 1, -1))  # [B, T, heads, 1, head_dim]
        k, v = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(2, 3)  # [B, T, heads, members, head_dim]
            for linear, x in ((self.k_proj, key), (self.v_proj, value))
        )
        weights = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
        return self.out_proj((weights @ v).flatten(2))


def mlp(given: int, inner: int, out: int) -> nn.Sequential:
    """Linear, GELU, linear."""
    return nn.Sequential(nn.Linear(given, inner), nn.GELU(), nn.Linear(inner, out))
