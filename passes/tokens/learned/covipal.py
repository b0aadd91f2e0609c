"""CoViPAL (arXiv:2508.17243): a small classifier looks at the visual tokens and the question and scores each token.

The paper does not say how wide its classifier is; this one is the smallest that can relate the two: every token looks
for itself in the question, and what it finds and how well the two agree decide.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ....surgery.selection import Text
from .weights import Learned


class Covipal(Learned):
    """Visual states and the question to a score for each token.

    Args:
        hidden: of the language model. inner: of the classifier.
    """

    method = "covipal"

    def __init__(self, *, hidden: int, inner: int) -> None:
        super().__init__()
        self.visual_norm, self.text_norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.visual = nn.Linear(hidden, inner)
        self.key, self.value = nn.Linear(hidden, inner), nn.Linear(hidden, inner)
        self.classify = nn.Sequential(nn.Linear(3 * inner, inner), nn.GELU(), nn.Linear(inner, 1))

    def forward(self, visual: Tensor, text: Text) -> Tensor:
        """Projected tokens [B, N, hidden], the question [B, M, hidden] -> scores [B, N]."""
        v, t = self.visual(self.visual_norm(visual)), self.text_norm(text.embeddings)
        mask = text.mask.unsqueeze(1)  # [B, 1, M]
        likeness = v @ self.key(t).transpose(1, 2) * v.shape[-1] ** -0.5
        likeness = likeness.masked_fill(mask == 0, torch.finfo(likeness.dtype).min)
        found = (torch.softmax(likeness, dim=-1) * mask) @ self.value(t)  # zeros if nothing was asked
        return self.classify(torch.cat([v, found, v * found], dim=-1)).squeeze(-1)
