"""LLaVA-UHD v3's windowed token compression (arXiv:2511.21150): a learned weighted mean of each 2 x 2 window."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .tokenpacker import refuse_windows
from .weights import Learned
from .windows import mlp, windows

SIDE = 2


class WindowCompression(Learned):
    """Weights of the members come from each member beside the window's mean, for every channel alone.

    With zeros in the last linear it is average pooling, which is where training begins.

    Args:
        hidden: of the language model.
    """

    method = "wtc"

    def __init__(self, *, hidden: int) -> None:
        super().__init__()
        self.logits = mlp(2 * hidden, hidden, hidden)
        last = self.logits[-1]
        assert isinstance(last, nn.Linear)
        for parameter in (last.weight, last.bias):
            nn.init.zeros_(parameter)

    def refuse(self, rows: int, columns: int, keep: int) -> str | None:
        return refuse_windows(rows, columns, keep, SIDE)

    def forward(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """[B, rows * columns, hidden] -> [B, T, hidden]."""
        members = windows(x, rows, columns, SIDE)
        mean = members.mean(dim=2, keepdim=True).expand_as(members)
        weights = torch.softmax(self.logits(torch.cat([members, mean], dim=-1)), dim=2)
        return (members * weights).sum(dim=2)
