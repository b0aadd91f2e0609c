"""What the language model's first layer attends to, for methods that ask before the language model runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .families.base import Family
from .selection import Tap, attached
from .taps import peek


def first_layer(model: Any, x: Tensor) -> Tap:
    """Queries and keys of the first layer for embeddings [1, L, hidden], norms and rotary embeddings done.

    What the layer makes of them is nobody's input; see `taps.peek`.
    """
    family: Family = attached(model).family
    parts = family.locate(model)
    layers = parts.language_stack.modules

    def run() -> None:
        parts.language(
            inputs_embeds=x,
            position_ids=torch.arange(x.shape[1])[None] + family.first_position,
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool),  # a 4-D mask passes untouched; ours is unused
            use_cache=False,
        )

    parts.language_stack.replace(nn.ModuleList(layers[:1]))
    try:
        calls = peek(parts.language.config, run)
    finally:
        parts.language_stack.replace(layers)
    (rows,) = calls.rows
    return Tap(0, (rows,), calls.scale)
