"""One row per family: its special tokens, a tiny config of transformers' own classes, and the processor that fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import transformers as hf

from . import processors as read


@dataclass(frozen=True)
class Family:
    """How to make one kind of model."""

    build: Callable[[Any], tuple[Any, Any]]  # tokenizer -> config, processor
    special: tuple[str, ...]  # padding, beginning, end, then the family's own tokens
    named: dict[str, str] = field(default_factory=dict)  # those that the processor asks its tokenizer for
    norms: bool = True  # move norm weights off 1


_PLAIN = ("<pad>", "<s>", "</s>")
_VICUNA = read.template("{{ m['role'].upper() }}: ", "<image>\n", "ASSISTANT:", end=" ")


def _ids(tokenizer: Any) -> dict[str, int]:
    return {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _clip() -> Any:
    return hf.CLIPVisionConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=5, num_attention_heads=2, image_size=32, patch_size=8
    )


def _siglip(size: int, **options: Any) -> Any:
    return hf.SiglipVisionConfig(
        hidden_size=96, intermediate_size=80, num_hidden_layers=4, num_attention_heads=3, image_size=size,
        patch_size=size // 4, **options,
    )  # fmt: skip


def _llama(vocabulary: int) -> Any:
    return hf.LlamaConfig(
        hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=3,
        head_dim=32, vocab_size=vocabulary, tie_word_embeddings=True, max_position_embeddings=512,
    )  # fmt: skip


def _qwen2(vocabulary: int) -> Any:
    return hf.Qwen2Config(
        hidden_size=96, intermediate_size=72, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1,
        vocab_size=vocabulary, tie_word_embeddings=False, max_position_embeddings=512,
    )  # fmt: skip


def _square(size: int) -> dict[str, int]:
    return {"height": size, "width": size}


def _llava(tokenizer: Any, vision: Any, text: Any, images: Any, *, cls: bool) -> tuple[Any, Any]:
    config = hf.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.image_token_id,
        vision_feature_layer=-2 if cls else -1,
        vision_feature_select_strategy="default" if cls else "full",
        tie_word_embeddings=text.tie_word_embeddings,
        image_seq_length=16,
    )
    processor = hf.LlavaProcessor(
        images,
        tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=_VICUNA,
        num_additional_image_tokens=int(cls),
    )
    return config, processor


def llava(tokenizer: Any) -> tuple[Any, Any]:
    """CLIP, whose layer -2 is read without its class token, and a Llama."""
    images = hf.CLIPImageProcessorPil(size=_square(32), crop_size=_square(32), do_center_crop=False)
    return _llava(tokenizer, _clip(), _llama(len(tokenizer)), images, cls=True)


def llava_siglip(tokenizer: Any) -> tuple[Any, Any]:
    """SigLIP, read whole, and a Qwen2."""
    images = hf.SiglipImageProcessorPil(size=_square(40))
    return _llava(tokenizer, _siglip(40), _qwen2(len(tokenizer)), images, cls=False)


FAMILIES: dict[str, Family] = {
    "llava": Family(llava, (*_PLAIN, "<image>"), {"image_token": "<image>"}, norms=False),
    "llava-siglip-qwen2": Family(llava_siglip, (*_PLAIN, "<image>"), {"image_token": "<image>"}, norms=False),
}
