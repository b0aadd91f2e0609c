"""Task-related compression (generic token compression, arXiv:2506.01097): five convolutions over early attention.

What the question attends to in the language model's first layer is a poor guide as it is, and enough for a small
network to find the tokens that matter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ....surgery.selection import TowerState
from ..scores import wide
from .weights import Learned


class TaskConv(Learned):
    """Depthwise-separable 1-D convolutions along the visual tokens, then a number for each.

    Args:
        channels: of each convolution; the paper's are 32, 64, 128, 256, 512.
        kernel: taps of each, odd; the paper does not say.
        hidden: of the language model that it was trained for; no weight depends on it.
    """

    method = "task-conv"

    def __init__(self, *, channels: Sequence[int], kernel: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential()
        for given, out in zip([1, *channels], channels, strict=False):
            deep = nn.Conv1d(given, given, kernel, padding=kernel // 2, groups=given)
            self.layers.append(nn.Sequential(deep, nn.Conv1d(given, out, 1), nn.GELU()))
        self.head = nn.Conv1d(channels[-1], 1, 1)
        self.kernel = kernel

    def refuse(self, rows: int, columns: int, keep: int) -> str | None:
        return None if self.kernel % 2 else f"kernel = {self.kernel} has no middle: an even kernel shifts the tokens"

    def forward(self, attention: Tensor) -> Tensor:
        """Attention to each token [B, N], in any unit -> scores [B, N]."""
        mean = attention.mean(dim=-1, keepdim=True).clamp(min=1e-8)
        return self.head(self.layers((attention / mean).unsqueeze(1))).squeeze(1)


def first_attention(state: TowerState) -> Tensor:
    """Attention that the question pays to each visual token in the language model's first layer: [1, N].

    The prompt is the visual tokens and then the question, causal; mean over heads and over the question's tokens.
    """
    assert state.text is not None and state.first is not None
    asked, mask = state.text.embeddings, wide(state.text.mask)
    n, m = state.count, asked.shape[1]
    tap = state.first(torch.cat([state.project(state.tokens), asked], dim=1))
    q, k = (wide(x) for x in tap.rows[0])
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = q[:, :, n:] @ k.transpose(-1, -2) * tap.scale
    # Padding comes after the question, so a causal mask hides it from every row that counts.
    seen = torch.ones(m, n + m, dtype=torch.bool).tril(n)
    rows = torch.softmax(logits.masked_fill(~seen, -torch.inf), dim=-1)[..., :n].mean(dim=1)
    return (mask.unsqueeze(1) @ rows)[:, 0] / mask.sum(dim=-1, keepdim=True).clamp(min=1)
