"""One square image, always the same number of tokens: the Gemma line, whose images see themselves, and DeepSeek-VL."""

from __future__ import annotations

from typing import Any

from .family import PLAIN, Family, hf, ids, llama, siglip, square
from .processors import template


def paligemma(tokenizer: Any) -> tuple[Any, Any]:
    """SigLIP and Gemma; the whole prompt attends in both directions. The processor adds 1152 location tokens."""
    images = hf.SiglipImageProcessorPil(size=square(40))
    images.image_seq_length = 16
    processor = hf.PaliGemmaProcessor(images, tokenizer, chat_template=template("", "<image>", ""))
    config = hf.PaliGemmaConfig(
        vision_config=siglip(40, vision_use_head=False),
        text_config=hf.GemmaConfig(
            hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1,
            head_dim=32, max_position_embeddings=512, **ids(tokenizer),
        ),
        image_token_index=tokenizer.image_token_id,
        projection_dim=64,
        hidden_size=64,
        vocab_size=len(tokenizer),
    )  # fmt: skip
    return config, processor


def gemma3(tokenizer: Any) -> tuple[Any, Any]:
    """SigLIP pooled to 4 tokens; three layers see the last 16 tokens only, one sees all; images see themselves."""
    config = hf.Gemma3Config(
        vision_config=siglip(32, vision_use_head=False),
        text_config={
            "hidden_size": 96, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 3,
            "num_key_value_heads": 1, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            "max_position_embeddings": 512, **ids(tokenizer),
        },
        mm_tokens_per_image=4,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )  # fmt: skip
    chat = template(
        "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n",
        "<start_of_image>",
        "<start_of_turn>model\n",
        start="<bos>",
        end="<end_of_turn>\n",
    )
    images = hf.Gemma3ImageProcessorPil(size=square(32))
    return config, hf.Gemma3Processor(images, tokenizer, image_seq_length=4, chat_template=chat)


def deepseek_vl(tokenizer: Any) -> tuple[Any, Any]:
    """SigLIP and Llama; the image is padded to a square."""
    config = hf.DeepseekVLConfig(
        vision_config=siglip(32, vision_use_head=False),
        text_config=llama(**ids(tokenizer)),
        image_token_id=tokenizer.image_token_id,
    )
    images = hf.DeepseekVLImageProcessorPil(size=square(32), min_size=8)
    chat = template(
        "{{ m['role'].capitalize() }}: ", "<image_placeholder>", "Assistant:", start="<s>", end="{{ '\n\n' }}"
    )
    return config, hf.DeepseekVLProcessor(images, tokenizer, num_image_tokens=16, chat_template=chat)


_GEMMA = ("<pad>", "<bos>", "<eos>")
_TURNS = ("<start_of_turn>", "<end_of_turn>")

FAMILIES = {
    "deepseek_vl": Family(deepseek_vl, (*PLAIN, "<image_placeholder>"), {"image_token": "<image_placeholder>"}),
    "paligemma": Family(paligemma, (*_GEMMA, "<image>"), {"image_token": "<image>"}, embeddings=0.03),
    "gemma3": Family(
        gemma3,
        (*_GEMMA, *_TURNS, "<start_of_image>", "<end_of_image>", "<image_soft_token>"),
        {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
        embeddings=0.03,
    ),
}
