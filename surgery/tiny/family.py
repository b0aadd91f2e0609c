"""What a family is, and the small towers and language models that several families share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import transformers

hf: Any = transformers  # type checkers know too few of the arguments that its configs take
PLAIN = ("<pad>", "<s>", "</s>")
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@dataclass(frozen=True)
class Family:
    """How to make one kind of model."""

    build: Callable[[Any], tuple[Any, Any]]  # tokenizer -> config, processor
    special: tuple[str, ...]  # padding, beginning, end, then the family's own tokens
    named: dict[str, str] = field(default_factory=dict)  # those that the processor asks its tokenizer for
    norms: bool = True  # move norm weights off 1
    embeddings: float = 0.15  # standard deviation; less where a model multiplies its embeddings by sqrt(hidden)


def ids(tokenizer: Any) -> dict[str, int]:
    """What a language config repeats of its tokenizer."""
    return {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def square(size: int) -> dict[str, int]:
    """A size as image processors want it."""
    return {"height": size, "width": size}


def clip() -> Any:
    """Tower with a class token; 16 patches of a 32 pixel image."""
    return hf.CLIPVisionConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=5, num_attention_heads=2, image_size=32, patch_size=8
    )


def siglip(size: int, **options: Any) -> Any:
    """Tower without a class token; 16 patches."""
    return hf.SiglipVisionConfig(
        hidden_size=96, intermediate_size=80, num_hidden_layers=4, num_attention_heads=3, image_size=size,
        patch_size=size // 4, **options,
    )  # fmt: skip


def pixtral_tower() -> Any:
    """Tower for any image size, with two-dimensional rotary positions."""
    return hf.PixtralVisionConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2, image_size=64, patch_size=8
    )


def llama(vocab_size: int, **options: Any) -> Any:
    """Grouped queries, tied embeddings, heads wider than hidden / heads."""
    return hf.LlamaConfig(
        hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=3,
        head_dim=32, vocab_size=vocab_size, tie_word_embeddings=True, max_position_embeddings=512, **options,
    )  # fmt: skip


def mistral(tokenizer: Any, *, tied: bool) -> Any:
    """As `llama`; without a sliding window, as the models with a vision tower have it."""
    return hf.MistralConfig(
        hidden_size=64, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, max_position_embeddings=512, sliding_window=None, tie_word_embeddings=tied, **ids(tokenizer),
    )  # fmt: skip


def qwen2(vocab_size: int, **options: Any) -> Any:
    """Biases on query, key and value; a single key-value head; untied embeddings."""
    return hf.Qwen2Config(
        hidden_size=96, intermediate_size=72, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1,
        vocab_size=vocab_size, tie_word_embeddings=False, max_position_embeddings=512, **options,
    )  # fmt: skip
