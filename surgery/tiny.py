"""Tiny random models with their processors, built offline in a second: for tests and for trying commands.

Sizes are odd on purpose (heads, layers and batch differ), weights are scaled so that logits are not degenerate.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)

from ..errors import ModelError, nearest

_TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
_CORPUS = ["USER: <image>\nWhat is in the picture? ASSISTANT: a red square and two blue circles on the left."]
_IMAGE = "<image>"


def make(kind: str, seed: int = 0) -> tuple[Any, Any]:
    """A tiny model and its processor: `llava` (CLIP + Llama) or `llava-siglip-qwen2`.

    Raises:
        ModelError: an unknown kind.
    """
    if kind not in _KINDS:
        raise ModelError(f"no tiny model `{kind}`", hint=nearest(kind, _KINDS))
    cls, vision, language = _KINDS[kind]
    tokenizer: Any = _tokenizer()
    text = language(len(tokenizer))
    config = LlavaConfig(
        vision_config=vision(),
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(_IMAGE),
        vision_feature_layer=-2 if cls else -1,
        vision_feature_select_strategy="default" if cls else "full",
        tie_word_embeddings=text.tie_word_embeddings,
        image_seq_length=16,
    )
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if "embed" in name:
            parameter.data.normal_(0, 0.15)
        elif parameter.dim() > 1:
            # Strong language layers: with tied embeddings weak ones would only repeat the last token.
            gain = 1.5 if "language_model" in name else 0.5
            parameter.data.normal_(0, gain / parameter.shape[-1] ** 0.5)
        elif "bias" in name:
            parameter.data.normal_(0, 0.1)
    torch.random.set_rng_state(state)
    model.generation_config = transformers.GenerationConfig(eos_token_id=tokenizer.eos_token_id, do_sample=False)
    return model, _processor(tokenizer, config, cls)


def _clip() -> Any:
    return CLIPVisionConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=5, num_attention_heads=2, image_size=32, patch_size=8
    )


def _siglip() -> Any:
    return SiglipVisionConfig(
        hidden_size=96, intermediate_size=80, num_hidden_layers=4, num_attention_heads=3, image_size=40, patch_size=10
    )


def _llama(vocabulary: int) -> Any:
    return LlamaConfig(
        hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=3,
        head_dim=32, vocab_size=vocabulary, tie_word_embeddings=True, max_position_embeddings=512,
    )  # fmt: skip


def _qwen2(vocabulary: int) -> Any:
    return Qwen2Config(
        hidden_size=96, intermediate_size=72, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1,
        vocab_size=vocabulary, tie_word_embeddings=False, max_position_embeddings=512,
    )  # fmt: skip


_KINDS: dict[str, tuple[bool, Any, Any]] = {
    "llava": (True, _clip, _llama),
    "llava-siglip-qwen2": (False, _siglip, _qwen2),
}


def _tokenizer() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>", "</s>", _IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(_CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        extra_special_tokens={"image_token": _IMAGE},
    )  # fmt: skip


def _processor(tokenizer: Any, config: Any, cls: bool) -> Any:
    size = config.vision_config.image_size
    if cls:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        images = CLIPImageProcessorPil(
            size={"height": size, "width": size}, crop_size={"height": size, "width": size}, do_center_crop=False
        )
    else:
        from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

        images = SiglipImageProcessorPil(size={"height": size, "width": size})
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=_TEMPLATE,
        num_additional_image_tokens=int(cls),
    )
