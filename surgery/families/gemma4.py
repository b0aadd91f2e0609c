"""Gemma 4: pictures of any shape, padded to one number of patches, averaged by place; every layer has embeddings.

Small models are causal everywhere. In larger ones an image sees itself, in sliding layers only and within their window.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.models.gemma4.modeling_gemma4 import create_masks_for_vision_model

from .base import Family


class Gemma4(Family):
    """Which patches are padding follows from the geometry; a graph holds it as constants."""

    refused: ClassVar[Mapping[str, tuple[Any, str]]] = {
        "text_config.num_kv_shared_layers": (0, "layers share the keys and values of others")
    }

    def beside(self, model: Any, ids: Tensor, visual: Tensor) -> dict[str, Any]:
        text = model.config.get_text_config()
        if not text.hidden_size_per_layer_input:
            return {}
        ids = torch.where(visual, text.pad_token_id, ids)
        return {"per_layer_inputs": self.locate(model).language.get_per_layer_inputs(ids, None)}


class Gemma4Vision(Gemma4):
    """`use_bidirectional_attention` = "vision"."""

    prefix = "image"
    window_over_blocks = True
    windowed_blocks = True

    def masks(self, **given: Any) -> Any:
        return create_masks_for_vision_model(attention_mask=None, **given)
