"""Random weights under which a tiny model behaves like a trained one: every layer matters, outputs vary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def draw(build: Callable[[], Any], seed: int, *, norms: bool = True, embeddings: float = 0.15) -> Any:
    """A model from `build` with strong random weights; the caller's randomness is left alone.

    Stock initialisation is too weak: with tied embeddings a model would only repeat its last token, gemma3's
    projector starts at zero and FastViT's layer scales at 1e-5, so that an error upstream of them could not be seen.

    Args:
        embeddings: standard deviation of token, patch and position embeddings.
        norms: also move norm weights, layer scales and other vectors off their starting values.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build().eval()
        for name, parameter in model.named_parameters():
            if "embed" in name and "norm" not in name:
                parameter.data.normal_(0, embeddings)
            elif parameter.dim() > 1:
                gain = 1.5 if "language_model" in name or "text_model" in name else 0.5
                parameter.data.normal_(0, gain / parameter.shape[-1] ** 0.5)
            elif "bias" in name:
                parameter.data.normal_(0, 0.1)
            elif norms:  # around 1 or, where the norm multiplies by 1 + weight, around 0
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model
