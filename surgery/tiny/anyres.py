"""The LLaVA line: one square image, or a square overview with tiles of the best of several grids."""

from __future__ import annotations

from typing import Any

from transformers.utils.import_utils import is_timm_available, is_torchvision_available

from ...errors import ModelError
from .family import CHATML, PLAIN, Family, clip, hf, ids, llama, qwen2, siglip, square
from .processors import image_only, template

_VICUNA = template("{{ m['role'].upper() }}: ", "<image>\n", "ASSISTANT:", end=" ")
_CHATML = template("<|im_start|>{{ m['role'] }}\n", "<image>\n", "<|im_start|>assistant\n", end="<|im_end|>\n")


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
    images = hf.CLIPImageProcessorPil(size=square(32), crop_size=square(32), do_center_crop=False)
    return _llava(tokenizer, clip(), llama(len(tokenizer)), images, cls=True)


def llava_siglip(tokenizer: Any) -> tuple[Any, Any]:
    """SigLIP, read whole, and a Qwen2."""
    return _llava(tokenizer, siglip(40), qwen2(len(tokenizer)), hf.SiglipImageProcessorPil(size=square(40)), cls=False)


_GRIDS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]  # height, width
_INSTRUCT = template(
    "{{ '[INST] ' if m['role'] == 'user' }}",
    "<image>\n",
    "",
    start="<s>",
    end="{{ ' [/INST]' if m['role'] == 'user' }}",
)


def _llava_next(tokenizer: Any, kind: Any, **options: Any) -> tuple[Any, Any]:
    config = kind(
        vision_config=clip(),
        text_config=llama(**ids(tokenizer)),
        image_token_index=tokenizer.image_token_id,
        image_grid_pinpoints=_GRIDS,
        image_seq_length=16,
        tie_word_embeddings=True,
        **options,
    )
    images = hf.LlavaNextImageProcessorPil(
        size={"shortest_edge": 32}, crop_size=square(32), image_grid_pinpoints=_GRIDS
    )
    return config, images


def llava_next(tokenizer: Any) -> tuple[Any, Any]:
    """CLIP on an overview and on grids of 1x2, 2x1, 2x2, 3x1 and 1x3 tiles; the padding of a grid is cut away."""
    config, images = _llava_next(tokenizer, hf.LlavaNextConfig)
    processor = hf.LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=_INSTRUCT,
        num_additional_image_tokens=1,
    )
    return config, processor


def llava_next_video(tokenizer: Any) -> tuple[Any, Any]:
    """As `llava_next`, with a pooling for videos beside it."""
    config, images = _llava_next(tokenizer, hf.LlavaNextVideoConfig, video_token_index=tokenizer.video_token_id)
    processor = image_only(
        "LlavaNextVideoProcessor",
        "LlavaNextVideoVideoProcessor",
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=_INSTRUCT,
        num_additional_image_tokens=1,
    )
    return config, processor


def llava_onevision(tokenizer: Any) -> tuple[Any, Any]:
    """SigLIP and Qwen2; grids that hold more than three tiles' worth of patches are interpolated down to that."""
    grids = [[40, 40], [40, 80], [80, 40], [80, 80], [40, 120], [120, 40]]
    config = hf.LlavaOnevisionConfig(
        vision_config=siglip(40, vision_use_head=False),
        text_config=qwen2(**ids(tokenizer)),
        image_token_index=tokenizer.image_token_id,
        video_token_index=tokenizer.video_token_id,
        image_grid_pinpoints=grids,
        vision_aspect_ratio="anyres_max_3",
    )
    processor = image_only(
        "LlavaOnevisionProcessor",
        "LlavaOnevisionVideoProcessor",
        hf.LlavaOnevisionImageProcessorPil(size=square(40), image_grid_pinpoints=grids),
        tokenizer,
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_3",
        chat_template=_CHATML,
    )
    return config, processor


def fast_vlm(tokenizer: Any) -> tuple[Any, Any]:
    """FastViT, five stages of convolutions and attention down to 3x3 of 192x192 pixels, and a Qwen2."""
    if not (is_timm_available() and is_torchvision_available()):
        raise ModelError("`fast_vlm` has a vision tower of timm", hint="pip install timm torchvision")
    config = hf.FastVlmConfig(
        vision_config={
            "model_type": "timm_wrapper",
            "architecture": "fastvit_mci3",
            "hidden_size": 128,  # twice the last stage's
            "do_pooling": True,
            "global_pool": "avg",
            "model_args": {
                "inference_mode": True,  # as published: the branches of training are folded into one
                "layers": [1, 2, 1, 1, 2],
                "embed_dims": [8, 16, 32, 64, 64],
                "mlp_ratios": [2, 2, 2, 2, 2],
            },
        },
        text_config=qwen2(**ids(tokenizer)),
        image_token_index=tokenizer.image_token_id,
        image_seq_length=9,
    )
    processor = hf.LlavaProcessor(
        hf.CLIPImageProcessorPil(size=square(192), crop_size=square(192), do_center_crop=False),
        tokenizer,
        patch_size=64,
        vision_feature_select_strategy="full",
        chat_template=_CHATML,
        num_additional_image_tokens=0,
    )
    return config, processor


_IMAGE = {"image_token": "<image>"}
_BOTH = _IMAGE | {"video_token": "<video>"}

FAMILIES = {
    "llava": Family(llava, (*PLAIN, "<image>"), _IMAGE, norms=False),
    "llava-siglip-qwen2": Family(llava_siglip, (*PLAIN, "<image>"), _IMAGE, norms=False),
    "fast_vlm": Family(fast_vlm, (*CHATML, "<image>"), _IMAGE),
    "llava_next": Family(llava_next, (*PLAIN, "<image>", "[INST]", "[/INST]"), _IMAGE),
    "llava_next_video": Family(llava_next_video, (*PLAIN, "<image>", "<video>", "[INST]", "[/INST]"), _BOTH),
    "llava_onevision": Family(llava_onevision, (*CHATML, "<image>", "<video>"), _BOTH),
}
