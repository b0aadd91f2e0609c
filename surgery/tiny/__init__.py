"""Tiny random models with their processors, built offline in a second: for tests and for trying commands.

Sizes are odd on purpose (heads, layers and batch differ), weights are scaled so that logits are not degenerate.
"""

from __future__ import annotations

from typing import Any

import transformers

from ...errors import ModelError, nearest
from . import families, processors, shrink, weights


def make(kind: str, seed: int = 0) -> tuple[Any, Any]:
    """A tiny model and its processor.

    Args:
        kind: a model type such as `qwen3_vl`, or a variant of one, `llava-siglip-qwen2` (see `kinds`). A type without
            a family of its own here is shrunk from its default config, and has no processor: None.
        seed: of the weights; the caller's random state is left alone.

    Raises:
        ModelError: an unknown kind, or one that needs a package that is missing.
    """
    if kind not in families.FAMILIES:
        if kind not in kinds():
            raise ModelError(f"no tiny model `{kind}`", hint=nearest(kind, kinds()))
        return shrink.model(kind, seed), None
    family = families.FAMILIES[kind]
    tokenizer = processors.tokenizer(family.special, **family.named)
    config, processor = family.build(tokenizer)
    model = weights.draw(
        lambda: transformers.AutoModelForImageTextToText.from_config(config),
        seed,
        norms=family.norms,
        embeddings=family.embeddings,
    )
    model.generation_config = transformers.GenerationConfig(eos_token_id=tokenizer.eos_token_id, do_sample=False)
    return model, processor


def make_model(kind: str, seed: int = 0) -> Any:
    """A tiny model alone; raises as `make` does."""
    return make(kind, seed)[0]


def kinds() -> list[str]:
    """Names that `make` knows: families with a processor, and every other type that transformers registers."""
    return sorted({*families.FAMILIES, *shrink.kinds()})
