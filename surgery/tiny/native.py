"""Families that see an image at its own size and shape: the Qwen-VL line, the Pixtral line, LFM2-VL."""

from __future__ import annotations

from typing import Any

from ...processors.lfm2 import Lfm2VlImageProcessorPil
from ...processors.opening import processor_class
from .family import CHATML, PLAIN, Family, hf, ids, mistral, pixtral_tower
from .processors import image_only, template

_PATCH = 8
_QWEN = template(
    "<|im_start|>{{ m['role'] }}\n",
    "<|vision_start|><|image_pad|><|vision_end|>",
    "<|im_start|>assistant\n",
    end="<|im_end|>\n",
)
_INSTRUCT = template("{{ '[INST]' if m['role'] == 'user' }}", "[IMG]", "", start="<s>").replace(
    "{% endfor %}{% if add", "{{ '[/INST]' if m['role'] == 'user' else '</s>' }}{% endfor %}{% if add"
)


def _qwen(tokenizer: Any, config: Any, processor: str, vision: Any, **text: Any) -> tuple[Any, Any]:
    """A Qwen-VL config with its processor: images of 4 to 36 merged tokens, three rotary axes."""
    token = tokenizer.convert_tokens_to_ids
    made = config(
        vision_config=vision,
        text_config={
            "hidden_size": 96, "intermediate_size": 72, "num_hidden_layers": 4, "num_attention_heads": 3,
            "num_key_value_heads": 1, "max_position_embeddings": 512, **text, **ids(tokenizer),
        },
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )  # fmt: skip
    video = "Qwen3VLVideoProcessor" if "3" in processor else "Qwen2VLVideoProcessor"
    unit = (2 * _PATCH) ** 2
    images = hf.Qwen2VLImageProcessorPil(
        size={"shortest_edge": 4 * unit, "longest_edge": 36 * unit}, patch_size=_PATCH, merge_size=2
    )
    return made, image_only(processor, video, images, tokenizer, chat_template=_QWEN)


def qwen2_vl(tokenizer: Any) -> tuple[Any, Any]:
    """Full attention over an image's patches, merged 2x2."""
    vision = {"depth": 4, "embed_dim": 64, "hidden_size": 96, "num_heads": 2, "mlp_ratio": 2, "patch_size": _PATCH}
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e6}
    return _qwen(tokenizer, hf.Qwen2VLConfig, "Qwen2VLProcessor", vision, rope_parameters=rope)


def qwen2_5_vl(tokenizer: Any) -> tuple[Any, Any]:
    """Windows of 2x2 merged tokens, ragged at the edge of any odd grid; blocks 1 and 3 see the whole image."""
    vision = {
        "depth": 5, "hidden_size": 64, "intermediate_size": 88, "num_heads": 2, "patch_size": _PATCH,
        "window_size": 4 * _PATCH, "fullatt_block_indexes": [1, 3], "out_hidden_size": 96,
    }  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e6}
    return _qwen(tokenizer, hf.Qwen2_5_VLConfig, "Qwen2_5_VLProcessor", vision, rope_parameters=rope)


def qwen3_vl(tokenizer: Any) -> tuple[Any, Any]:
    """Two deepstack levels, interpolated position embeddings, interleaved rotary axes."""
    vision = {
        "depth": 5, "hidden_size": 64, "intermediate_size": 88, "num_heads": 2, "patch_size": _PATCH,
        "num_position_embeddings": 36, "deepstack_visual_indexes": [1, 3], "out_hidden_size": 96,
    }  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [6, 5, 5], "mrope_interleaved": True, "rope_theta": 5e5}
    return _qwen(tokenizer, hf.Qwen3VLConfig, "Qwen3VLProcessor", vision, rope_parameters=rope, head_dim=32)


def _pixtral(tokenizer: Any, merge: int) -> Any:
    return processor_class("PixtralProcessor")(
        hf.PixtralImageProcessorPil(size={"longest_edge": 64}, patch_size={"height": _PATCH, "width": _PATCH}),
        tokenizer,
        patch_size=_PATCH,
        spatial_merge_size=merge,
        chat_template=_INSTRUCT,
    )


def pixtral(tokenizer: Any) -> tuple[Any, Any]:
    """LLaVA with a Pixtral tower: a break token after every row of patches."""
    config = hf.LlavaConfig(
        vision_config=pixtral_tower(),
        text_config=mistral(tokenizer, tied=False),
        image_token_index=tokenizer.image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return config, _pixtral(tokenizer, 1)


def mistral3(tokenizer: Any) -> tuple[Any, Any]:
    """A Pixtral tower whose patches are merged 2x2."""
    config = hf.Mistral3Config(
        vision_config=pixtral_tower(),
        text_config=mistral(tokenizer, tied=True),
        image_token_index=tokenizer.image_token_id,
        spatial_merge_size=2,
        tie_word_embeddings=True,
    )
    return config, _pixtral(tokenizer, 2)


def lfm2_vl(tokenizer: Any) -> tuple[Any, Any]:
    """SigLIP2 and a language model of short convolutions and attention; large images become tiles and a thumbnail."""
    config = hf.Lfm2VlConfig(
        vision_config={
            "model_type": "siglip2_vision_model", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
            "num_attention_heads": 2, "patch_size": _PATCH, "num_patches": 16, "vision_use_head": False,
        },
        text_config={
            "model_type": "lfm2", "hidden_size": 96, "intermediate_size": 88, "block_auto_adjust_ff_dim": False,
            "num_hidden_layers": 4, "num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 512,
            "layer_types": ["conv", "full_attention", "conv", "full_attention"], "conv_bias": True, **ids(tokenizer),
        },
        image_token_id=tokenizer.image_token_id,
        projector_hidden_size=72,
        downsample_factor=2,
    )  # fmt: skip
    images = Lfm2VlImageProcessorPil(
        encoder_patch_size=_PATCH, tile_size=32, min_image_tokens=2, max_image_tokens=6, max_tiles=4
    )
    chat = template(
        "<|im_start|>{{ m['role'] }}\n",
        "<image>",
        "<|im_start|>assistant\n",
        start="<|startoftext|>",
        end="<|im_end|>\n",
    )
    return config, hf.Lfm2VlProcessor(images, tokenizer, chat_template=chat)


def lighton_ocr(tokenizer: Any) -> tuple[Any, Any]:
    """A Pixtral tower whose patches are merged 2x2, and a Qwen3; no break tokens."""
    config = hf.LightOnOcrConfig(
        vision_config=pixtral_tower(),
        text_config={
            "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 3, "head_dim": 32,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, **ids(tokenizer),
        },
        image_token_id=tokenizer.image_token_id,
        spatial_merge_size=2,
    )  # fmt: skip
    images = hf.PixtralImageProcessorPil(size={"longest_edge": 64}, patch_size={"height": _PATCH, "width": _PATCH})
    chat = template("<|im_start|>{{ m['role'] }}\n", "<|image_pad|>", "<|im_start|>assistant\n", end="<|im_end|>\n")
    return config, processor_class("LightOnOcrProcessor")(
        images, tokenizer, patch_size=_PATCH, spatial_merge_size=2, chat_template=chat
    )


def glm4v(tokenizer: Any) -> tuple[Any, Any]:
    """Interpolated position embeddings, patches merged 2x2, three rotary axes over half of a head."""
    token = tokenizer.convert_tokens_to_ids
    config = hf.Glm4vConfig(
        vision_config={
            "depth": 4, "hidden_size": 64, "intermediate_size": 88, "num_heads": 2, "patch_size": _PATCH,
            "image_size": 48, "out_hidden_size": 96,
        },
        text_config={
            "hidden_size": 96, "intermediate_size": 72, "num_hidden_layers": 4, "num_attention_heads": 3,
            "num_key_value_heads": 1, "max_position_embeddings": 512, **ids(tokenizer),
            "rope_parameters": {
                "rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 1e4, "partial_rotary_factor": 0.5,
            },
        },
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        image_start_token_id=token("<|begin_of_image|>"),
        image_end_token_id=token("<|end_of_image|>"),
        video_start_token_id=token("<|begin_of_video|>"),
        video_end_token_id=token("<|end_of_video|>"),
    )  # fmt: skip
    unit = 2 * (2 * _PATCH) ** 2  # this size counts both frames of a patch
    images = hf.Glm4vImageProcessorPil(
        size={"shortest_edge": 4 * unit, "longest_edge": 36 * unit}, patch_size=_PATCH, merge_size=2
    )
    chat = template(
        "<|{{ m['role'] }}|>\n", "<|begin_of_image|><|image|><|end_of_image|>", "<|assistant|>\n", start="[gMASK]<sop>"
    )
    return config, image_only("Glm4vProcessor", "Glm4vVideoProcessor", images, tokenizer, chat_template=chat)


def gemma4(tokenizer: Any) -> tuple[Any, Any]:
    """Patches pooled 3x3 to at most 70 tokens; wider heads in the full layer; an embedding for every layer."""
    config = hf.Gemma4Config(
        vision_config={
            "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2,
            "num_key_value_heads": 2, "head_dim": 32, "patch_size": 4, "position_embedding_size": 128,
        },
        text_config={
            "hidden_size": 96, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 3,
            "num_key_value_heads": 1, "head_dim": 16, "global_head_dim": 32, "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": len(tokenizer),
            "final_logit_softcapping": 30.0, "use_bidirectional_attention": "vision",
            "max_position_embeddings": 512, **ids(tokenizer),
        },
        audio_config=None,
        image_token_id=tokenizer.image_token_id,
        boi_token_id=tokenizer.boi_token_id,
        eoi_token_id=tokenizer.eoi_token_id,
        video_token_id=tokenizer.convert_tokens_to_ids("<|video|>"),
        audio_token_id=tokenizer.audio_token_id,
    )  # fmt: skip
    chat = template(
        "<|turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n",
        "<|image|>",
        "<|turn>model\n",
        start="<bos>",
        end="<turn|>\n",
    )
    processor = image_only(
        "Gemma4Processor",
        "Gemma4VideoProcessor",
        hf.Gemma4ImageProcessorPil(patch_size=4, max_soft_tokens=70),
        tokenizer,
        feature_extractor=hf.Gemma4AudioFeatureExtractor(),
        image_seq_length=70,
        chat_template=chat,
    )
    return config, processor


_GEMMA4_NAMES = {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>"}
_GEMMA4_NAMES |= {"audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>"}
_GEMMA4 = ("<pad>", "<bos>", "<eos>", "<|turn>", "<turn|>", "<|video|>", *_GEMMA4_NAMES.values())
_GLM = ("<|endoftext|>", "[gMASK]", "<|user|>", "<sop>", "<|assistant|>", "<|begin_of_image|>", "<|end_of_image|>")
_GLM += ("<|begin_of_video|>", "<|end_of_video|>", "<|image|>", "<|video|>")
_LIGHT_NAMES = {"image_token": "<|image_pad|>", "image_break_token": "<|vision_pad|>"}
_LIGHT_NAMES |= {"image_end_token": "<|vision_end|>"}
_LFM2_NAMES = {
    "image_token": "<image>",
    "image_start_token": "<|image_start|>",
    "image_end_token": "<|image_end|>",
    "image_thumbnail_token": "<|img_thumbnail|>",
}
_LFM2_TOKENS = ("<|pad|>", "<|startoftext|>", "<|im_end|>", "<|im_start|>", *_LFM2_NAMES.values())
_LFM2_TOKENS += tuple(f"<|img_row_{i}_col_{j}|>" for i in range(1, 5) for j in range(1, 5))
_QWEN_TOKENS = (*CHATML, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_QWEN_NAMES = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
_QWEN_NAMES |= {"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}
_PIXTRAL = (*PLAIN, "[IMG]", "[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]")

FAMILIES = {
    "gemma4": Family(gemma4, _GEMMA4, _GEMMA4_NAMES, embeddings=0.03),
    "glm4v": Family(glm4v, _GLM, {"image_token": "<|image|>", "video_token": "<|video|>"}),
    "lighton_ocr": Family(lighton_ocr, (*CHATML, *_LIGHT_NAMES.values()), _LIGHT_NAMES),
    "lfm2_vl": Family(lfm2_vl, _LFM2_TOKENS, _LFM2_NAMES),
    "qwen2_vl": Family(qwen2_vl, _QWEN_TOKENS, _QWEN_NAMES),
    "qwen2_5_vl": Family(qwen2_5_vl, _QWEN_TOKENS, _QWEN_NAMES),
    "qwen3_vl": Family(qwen3_vl, _QWEN_TOKENS, _QWEN_NAMES),
    "pixtral": Family(pixtral, _PIXTRAL, {"image_token": "[IMG]"}),
    "mistral3": Family(mistral3, _PIXTRAL, {"image_token": "[IMG]"}),
}
