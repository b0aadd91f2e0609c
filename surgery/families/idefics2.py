"""Idefics2 (arXiv:2405.02246): a SigLIP tower on tiles of one size; a perceiver makes as many tokens of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...manifest import Bucket, Panel
from .base import Encoded, Geometry
from .tiles import Idefics3


class Idefics2(Idefics3):
    """A token mixes all patches of its tile: none belongs to it."""

    def encode(self, model: Any, pixel_values: Tensor, geometry: Geometry, constants: Mapping[str, Any]) -> Encoded:
        parts = self.locate(model)
        hidden = self.hidden(model, pixel_values, constants)
        assert parts.projector is not None
        every = torch.ones(hidden.shape[:2], dtype=torch.bool)
        return Encoded(parts.projector(hidden, attention_mask=every).flatten(0, 1))

    def members(self, config: Any, geometry: Geometry) -> np.ndarray | None:
        return None

    def panels(self, config: Any, bucket: Bucket) -> tuple[Panel, ...]:
        return ()
