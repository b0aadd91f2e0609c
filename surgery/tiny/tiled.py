"""Families that split a large image into equal tiles and add an overview: InternVL, Idefics3, SmolVLM."""

from __future__ import annotations

from typing import Any

from ...processors.cohere2 import Cohere2VisionImageProcessorPil
from .family import CHATML, Family, hf, ids, llama, qwen2, siglip, square
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


def _cohere2(tokenizer: Any) -> Any:
    """Three layers see the last 16 tokens only, one sees all."""
    return hf.Cohere2Config(
        hidden_size=96, intermediate_size=80, num_hidden_layers=4, num_attention_heads=3, num_key_value_heads=1,
        head_dim=32, sliding_window=16, max_position_embeddings=512, logit_scale=1.0, **ids(tokenizer),
    )  # fmt: skip


_COHERE = template(
    "<|START_OF_TURN_TOKEN|><|{{ 'CHATBOT' if m['role'] == 'assistant' else m['role'].upper() }}_TOKEN|>",
    "IMAGE",
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    start="<BOS_TOKEN>",
    end="<|END_OF_TURN_TOKEN|>",
)


def aya_vision(tokenizer: Any) -> tuple[Any, Any]:
    """SigLIP and Cohere2; 4x4 patches per tile, shuffled to 4 tokens; tiles are named in plain text."""
    config = hf.AyaVisionConfig(
        vision_config=siglip(32, vision_use_head=False),
        text_config=_cohere2(tokenizer),
        image_token_index=tokenizer.image_token_id,
        downsample_factor=2,
    )
    processor = hf.AyaVisionProcessor(
        hf.GotOcr2ImageProcessorPil(size=square(32), crop_to_patches=True, min_patches=1, max_patches=4),
        tokenizer,
        patch_size=8,
        img_size=32,
        downsample_factor=2,
        chat_template=_COHERE.replace("IMAGE", "<image>"),
    )
    return config, processor


def cohere2_vision(tokenizer: Any) -> tuple[Any, Any]:
    """SigLIP and Cohere2; 4x4 patches per tile, shuffled to 4 tokens and a line break."""
    config = hf.Cohere2VisionConfig(
        vision_config=siglip(32, vision_use_head=False),
        text_config=_cohere2(tokenizer),
        image_token_id=tokenizer.image_token_id,
        downsample_factor=2,
        alignment_intermediate_size=88,
    )
    images_of: Any = Cohere2VisionImageProcessorPil
    images = images_of(size=square(32), max_patches=4, patch_size=2)  # 2x2 tokens per tile
    processor = hf.Cohere2VisionProcessor(images, tokenizer, chat_template=_COHERE.replace("IMAGE", "<|IMG_PATCH|>"))
    return config, processor


def ovis2(tokenizer: Any) -> tuple[Any, Any]:
    """Patches become mixtures of a visual vocabulary; 4x4 patches per tile, merged to 4 tokens, and an overview."""
    token = tokenizer.convert_tokens_to_ids
    config = hf.Ovis2Config(
        vision_config={
            "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2,
            "image_size": 32, "patch_size": 8, "vocab_size": 48, "hidden_stride": 2,
        },
        text_config=qwen2(**ids(tokenizer)),
        image_token_id=token("<IMG_ATOM>"),
        visual_indicator_token_ids=[token(name) for name in _OVIS[2:]],
        vocab_size=len(tokenizer),
        hidden_size=96,
        tie_word_embeddings=False,
    )  # fmt: skip
    images = hf.Ovis2ImageProcessorPil(size=square(32), crop_to_patches=True, max_patches=4)
    chat = template("<|im_start|>{{ m['role'] }}\n", "<image>\n", "<|im_start|>assistant\n", end="<|im_end|>\n")
    return config, hf.Ovis2Processor(images, tokenizer, image_seq_length=4, chat_template=chat)


def mllama(tokenizer: Any) -> tuple[Any, Any]:
    """No placeholders: two of five layers attend to the tower's outputs, of up to 4 tiles; one image token each."""
    config = hf.MllamaConfig(
        vision_config={
            "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_global_layers": 2,
            "attention_heads": 2, "image_size": 32, "patch_size": 8, "intermediate_layers_indices": [1, 3],
            "vision_output_dim": 192,
        },
        text_config={
            "hidden_size": 96, "intermediate_size": 80, "num_hidden_layers": 5, "num_attention_heads": 3,
            "num_key_value_heads": 1, "cross_attention_layers": [1, 3], "max_position_embeddings": 512,
            **ids(tokenizer),
        },
        image_token_index=tokenizer.image_token_id,
    )  # fmt: skip
    chat = template(
        "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n",
        "<|image|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        start="<|begin_of_text|>",
        end="<|eot_id|>",
    )
    images = hf.MllamaImageProcessorPil(size=square(32), max_image_tiles=4)
    return config, hf.MllamaProcessor(images, tokenizer, chat_template=chat)


_COHERE_TURNS = ("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>")
_AYA = ("<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>")
_OVIS = ("<image>", "<IMG_ATOM>", "<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
_LLAMA3 = ("<|finetune_right_pad_id|>", "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
_WRAP = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *_ROWS)
_INTERN = ("<img>", "</img>", "<IMG_CONTEXT>", "<video>")
_INTERN_NAMES: dict[str, str] = dict(
    zip(("start_image_token", "end_image_token", "context_image_token", "video_token"), _INTERN, strict=True)
)

FAMILIES = {
    "aya_vision": Family(
        aya_vision,
        ("<PAD>", "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", *_COHERE_TURNS, *_AYA),
        {"image_token": "<|IMG_PATCH|>"},
    ),
    "cohere2_vision": Family(
        cohere2_vision,
        ("<PAD>", "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", *_COHERE_TURNS, *_AYA),
        {
            "image_token": "<|IMG_PATCH|>",
            "boi_token": "<|START_OF_IMG|>",
            "eoi_token": "<|END_OF_IMG|>",
            "img_line_break_token": "<|IMG_LINE_BREAK|>",
        },
    ),
    "mllama": Family(mllama, (*_LLAMA3, "<|python_tag|>", "<|image|>"), {"image_token": "<|image|>"}),
    "ovis2": Family(ovis2, (*CHATML, *_OVIS), {"image_token": "<IMG_ATOM>"}),
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
