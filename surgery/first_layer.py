"""What the language model's first layer attends to, for methods that ask before the language model runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .families.base import Family
from .selection import Tap, attached

_FIRST = "vlmcut_first"


def first_layer(model: Any, x: Tensor) -> Tap:
    """Queries and keys of the first layer for embeddings [1, L, hidden], norms and rotary embeddings done.

    They are taken where the layer hands them to its attention function. What the layer makes of them is nobody's input,
    so a graph gets its norm and two projections, which share their weights with prefill.
    """
    family: Family = attached(model).family
    parts = family.locate(model)
    found: list[Tap] = []

    def function(module: Any, q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Any:
        found.append(Tap(0, ((q, k),), kwargs.get("scaling") or q.shape[-1] ** -0.5))
        return q.transpose(1, 2), None  # of the right shape; an exception would lose a trace's place

    config, layers = parts.language.config, parts.language_stack.modules
    before = config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[_FIRST] = function
    config._attn_implementation_internal = _FIRST
    parts.language_stack.replace(nn.ModuleList(layers[:1]))
    try:
        parts.language(
            inputs_embeds=x,
            position_ids=torch.arange(x.shape[1])[None] + family.first_position,
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool),  # a 4-D mask passes untouched; ours is unused
            use_cache=False,
        )
    finally:
        parts.language_stack.replace(layers)
        config._attn_implementation_internal = before
        del ALL_ATTENTION_FUNCTIONS[_FIRST]
    (tap,) = found
    return tap
