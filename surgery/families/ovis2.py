"""Ovis2 (arXiv:2405.20797): visual tokens are mixtures over a visual vocabulary, whose last entries stand for markers.

The markers around an image and between its tiles are text tokens with embeddings of the visual table.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import Family


class Ovis2(Family):
    """Markers are embedded as transformers does when an image is there; without one a prompt has none."""

    def embed(self, model: Any, ids: Tensor) -> Tensor:
        x, base = super().embed(model, ids), self.locate(model).base
        markers = base.visual_indicator_token_ids
        table = base.visual_embeddings_table.weight[-len(markers) :]
        for row, marker in enumerate(markers):
            x = torch.where((ids == marker).unsqueeze(-1), table[row], x)
        return x
