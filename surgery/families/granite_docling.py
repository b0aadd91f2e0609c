"""Granite-Docling (huggingface.co/ibm-granite): tiles of one size and a thumbnail, pixel-shuffled; DeepStack features.

transformers drops padding tiles with a mask; a picture of one geometry has none. The fine path, of four times as many
tokens, is not taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from .base import Encoded, Family, Geometry, flat


class GraniteDocling(Family):
    """Tiles of a picture along the second axis, all of them real."""

    def encode(self, model: Any, pixel_values: Tensor, geometry: Geometry, constants: Mapping[str, Any]) -> Encoded:
        out = self.locate(model).tower(pixel_values=pixel_values.flatten(0, 1), fine=False, return_dict=True)
        return Encoded(flat(out.pooler_output), levels=tuple(flat(level) for level in out.deepstack_features))

    def tensors(self, geometry: Geometry) -> dict[str, np.ndarray]:
        return {"pixel_attention_mask": np.ones(geometry["pixel_values"][:2], dtype=bool)}
