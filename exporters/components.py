"""The three graphs of a budget as modules of plain tensors with example inputs of their final shapes.

| graph | input | shape | dtype |
|---|---|---|---|
| vision | pixel_values | [1, 3, height, width] | float |
| prefill | input_ids, visual_index, position_ids | [1, S] | int64 |
| | image_features | [images * K, hidden] | float |
| | length | [1] | int64, prompt tokens |
| | past_key_i, past_value_i | [1, kv_heads, C, head_dim] | float |
| decode | input_ids, position_ids | [1, 1] | int64 |
| | length | [1] | int64, tokens in the cache after this step |
| | past_key_i, past_value_i | [1, kv_heads, C, head_dim] | float |

Outputs: vision gives image_features [K, hidden] and kept [1, K] int64; prefill and decode give logits
[1, vocabulary] of the last token and present_key_i, present_value_i, which may share memory with the past.

The vision graph takes one image: a prompt with fewer images than its budget pays only for those it has, and an int8
scale never depends on the neighbour.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..manifest import TokenBudget
from ..surgery.anatomy import Anatomy
from ..surgery.selection import SelectedOutput
from .operators import CacheStep, PassThrough


@dataclass(frozen=True, kw_only=True)
class Component:
    """One graph: a module of plain tensors, and everything static about it."""

    role: str  # vision, prefill, decode
    module: nn.Module
    inputs: dict[str, Tensor]  # example inputs in graph order; every dimension is final
    outputs: tuple[str, ...]  # names in graph order


class Vision(nn.Module):
    """pixel_values -> image_features, kept."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        out = self.model.get_image_features(pixel_values, return_dict=True)
        features = out.pooler_output[0]
        kept = out.kept if isinstance(out, SelectedOutput) else None
        return features, torch.arange(features.shape[0])[None] if kept is None else kept.clone()


class Decoder(nn.Module):
    """One step of the language model over KV buffers; `prefill` reads a whole padded prompt with its images."""

    def __init__(self, model: Any, prefill: bool, mask_padding: bool) -> None:
        super().__init__()
        self.model = model
        self.prefill = prefill
        self.mask_padding = mask_padding

    def forward(self, inputs: dict[str, Tensor], past: list[Tensor]) -> list[Tensor]:
        language = self.model.model.language_model
        ids, length = inputs["input_ids"], inputs["length"]
        x = language.embed_tokens(ids)
        valid = None
        if self.prefill:
            index = inputs["visual_index"]
            visual = inputs["image_features"][index.clamp(min=0)]
            x = torch.where((index >= 0).unsqueeze(-1), visual, x)
            if self.mask_padding:
                valid = (torch.arange(ids.shape[1]) < length).to(x.dtype)[None, :, None]
                x = x * valid
        step = CacheStep(past=past, length=length, prefill=self.prefill, valid=valid)
        out = language(
            inputs_embeds=x,
            position_ids=inputs["position_ids"],
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool),  # 4-D masks pass through untouched; ours is unused
            past_key_values=PassThrough(),
            use_cache=True,
            step=step,
        ).last_hidden_state[0]
        last = out.index_select(0, length - 1) if self.prefill else out
        return [self.model.lm_head(last), *step.present]


def components(model: Any, a: Anatomy, budget: TokenBudget) -> list[Component]:
    """The graphs of one budget. The model's selection must already keep `budget.visual_tokens`."""
    dtype = model.dtype
    size = a.tower.image_size
    past = {
        f"past_{kind}_{layer}": torch.zeros(1, heads, budget.cache, a.language.head_dim, dtype=dtype)
        for layer, heads in enumerate(a.language.kv_heads)
        for kind in ("key", "value")
    }
    present = tuple(name.replace("past", "present") for name in past)

    def ids(columns: int) -> Tensor:
        return torch.arange(columns)[None] % 7

    prefill = {
        "input_ids": ids(budget.sequence),
        "visual_index": torch.full((1, budget.sequence), -1),
        "position_ids": torch.arange(budget.sequence)[None],
        "image_features": torch.zeros(budget.images * budget.visual_tokens, a.language.hidden, dtype=dtype),
        "length": torch.tensor([budget.sequence]),
    }
    decode = {"input_ids": ids(1), "position_ids": ids(1), "length": torch.tensor([2])}
    mask = "language" in a.quantized
    return [
        Component(
            role="vision",
            module=Vision(model),
            inputs={"pixel_values": torch.zeros(1, 3, size, size, dtype=dtype)},
            outputs=("image_features", "kept"),
        ),
        Component(
            role="prefill",
            module=Decoder(model, prefill=True, mask_padding=mask),
            inputs=prefill | past,
            outputs=("logits", *present),
        ),
        Component(
            role="decode",
            module=Decoder(model, prefill=False, mask_padding=mask),
            inputs=decode | past,
            outputs=("logits", *present),
        ),
    ]
