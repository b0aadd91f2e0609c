"""Families that split a large image into equal tiles and add an overview: InternVL, Idefics3, SmolVLM."""

from __future__ import annotations

from typing import Any

import transformers as hf

from .family import CHATML, Family, ids, llama, qwen2, square
from .processors import image_only, template

_ROWS = tuple(f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7))


def internvl(tokenizer: Any) -> tuple[Any, Any]:
    """4x4 patches per tile, shuffled to 4 tokens; up to 4 tiles and an overview."""
    config = hf.InternVLConfig(
        vision_config={
            "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2,
            "attention_bias": True, "image_size": [32, 32], "patch_size": [8, 8],
        },
        text_config=qwen2(**ids(tokenizer)),
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=4,
        tie_word_embeddings=False,
    )  # fmt: skip
    images = hf.GotOcr2ImageProcessorPil(size=square(32), crop_to_patches=True, min_patches=1, max_patches=4)
    chat = template("<|im_start|>{{ m['role'] }}\n", "<IMG_CONTEXT>\n", "<|im_start|>assistant\n", end="<|im_end|>\n")
    return config, image_only(
        "InternVLProcessor", "InternVLVideoProcessor", images, tokenizer, image_seq_length=4, chat_template=chat
    )


def _chat(start: str) -> str:
    turn = (
        "{{ m['role'].capitalize() }}{{ ': ' if m['content'] is string or m['content'][0]['type'] == 'text' else ':' }}"
    )
    return template(turn, "<image>", "Assistant:", start=start, end="<end_of_utterance>\n")


def idefics3(tokenizer: Any) -> tuple[Any, Any]:
    """6x6 patches per tile, shuffled to 9 tokens; tiles of up to 144 pixels a side and an overview."""
    config = hf.Idefics3Config(
        vision_config={
            "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2,
            "image_size": 48, "patch_size": 8,
        },
        text_config=llama(**ids(tokenizer)),
        image_token_id=tokenizer.image_token_id,
        scale_factor=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    images = hf.Idefics3ImageProcessorPil(size={"longest_edge": 144}, max_image_size={"longest_edge": 48})
    processor = hf.Idefics3Processor(images, tokenizer, image_seq_len=9, chat_template=_chat("<|begin_of_text|>"))
    return config, processor


def smolvlm(tokenizer: Any) -> tuple[Any, Any]:
    """4x4 patches per tile, shuffled to 4 tokens; tiles of up to 96 pixels a side and an overview."""
    config = hf.SmolVLMConfig(
        vision_config={
            "hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 3,
            "image_size": 32, "patch_size": 8,
        },
        text_config=llama(**ids(tokenizer)),
        image_token_id=tokenizer.image_token_id,
        scale_factor=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    images = hf.SmolVLMImageProcessorPil(size={"longest_edge": 96}, max_image_size={"longest_edge": 32})
    processor = image_only(
        "SmolVLMProcessor",
        "SmolVLMVideoProcessor",
        images,
        tokenizer,
        image_seq_len=4,
        chat_template=_chat("<|im_start|>"),
    )
    return config, processor


_WRAP = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *_ROWS)
_INTERN = ("<img>", "</img>", "<IMG_CONTEXT>", "<video>")
_INTERN_NAMES = dict(
    zip(("start_image_token", "end_image_token", "context_image_token", "video_token"), _INTERN, strict=True)
)

FAMILIES = {
    "internvl": Family(internvl, (*CHATML, *_INTERN), _INTERN_NAMES),
    "idefics3": Family(
        idefics3, ("<|pad|>", "<|begin_of_text|>", "<|end_of_text|>", *_WRAP), {"image_token": "<image>"}
    ),
    "smolvlm": Family(
        smolvlm,
        (*CHATML, *_WRAP),
        {
            "image_token": "<image>",
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
            "end_of_utterance_token": "<end_of_utterance>",
        },
    ),
}
