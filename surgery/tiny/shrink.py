"""Any image-text-to-text model that transformers registers, small: its default config, shrunk by the names of fields.

All widths become one width, all head counts one count, and so on, whatever the part: parts that fit together before
fit together after. What a family needs beside that stands in `_EXTRA`.
"""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from ...errors import ModelError, nearest
from . import weights

WIDTH, INNER, HEADS, HEAD, LAYERS, EXPERTS, VOCABULARY, SIDE = 64, 96, 4, 16, 4, 4, 512, 4
_DEPTHS = re.compile(r"^(num_hidden_layers|num_layers|n_layers|layers|depth|(encoder|decoder)_layers)$")

# The first rule that a field's whole name fits decides; numbers only ever get smaller.
_RULES: list[tuple[re.Pattern[str], int]] = [
    (re.compile(pattern), value)
    for pattern, value in (
        (r"num_channels|in_channels|in_chans|out_channels|embedding_size", 1 << 62),
        (r".*(intermediate_size|intermediate_size_mlp|ffn_dim|d_ff|mlp_dim|expert_dim)", INNER),
        (
            r".*(hidden_size|hidden_dim|d_model|embed_dim|in_dim|(out|in)put_dim|out_dim|(projection|proj)_dim)",
            WIDTH,
        ),
        (r"adapter_input_size|hidden_size_per_layer_input|projection_hidden_size|merged_hidden_size", WIDTH),
        (r".*(output_channels|lora_rank|laurel_rank|lowrank)", WIDTH // 2),
        (r".*(num_hidden_layers|num_layers|n_layers|encoder_layers|decoder_layers|depth|add_layers)|layers", LAYERS),
        (r"num_global_layers|max_window_layers|first_k_dense_replace|num_nextn_predict_layers", 1),
        (r".*(query_tokens|query_num|latents)", SIDE * SIDE),
        (r"n_groups?|topk_group", 1),
        (r"index_.*", 32),
        (r".*(experts_per_tok|topk|moe_k)", 2),
        (r".*(n_shared_experts|num_shared_experts)", 1),
        (r".*experts", EXPERTS),
        (r".*(head_dim|dim_head|d_kv|query_pre_attn_scalar)", HEAD),
        (r".*(key_value_heads|num_key_heads|kv_heads)", HEADS // 2),
        (r".*(heads)", HEADS),
        (r".*(vocab_size|vocab_size_base|vocab_size_per_layer_input|codebook_size|num_embeddings)", VOCABULARY),
        (r".*(max_position_embeddings|position_embedding_size|max_2d_position_embeddings|source_positions)", 512),
        (r"num_position_embeddings|num_patches", SIDE * SIDE),
        (r"pos_emb_(height|width)|posemb_grid_size", SIDE),
        (r"(base|latent)_channels", 32),
    )
]
_INDEXES = re.compile(r".*(index(es)?|indices|idxs?|layer_ids?|moe_layers|attention_layers|rope_scaling_layers)$")
_TOKEN = re.compile(r".*((token|im_start|im_end|im_newline|image_patch)_(id|index)|token_ids|vocab_offset)$")
_NAMED = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id")

# Where the model's code has them as constants: for heads of `HEAD` the sections of three rotary axes are these.
_AXES = {"text_config.rope_parameters.mrope_section": [4, 2, 2]}
_HALF_AXES = {"text_config.rope_parameters.mrope_section": [2, 1, 1]}

# A default config that builds no model or none that runs, or a field whose name says too little.
_EXTRA: dict[str, dict[str, Any]] = {
    "blip-2": {"image_token_index": 500},
    "instructblip": {"image_token_index": 500},
    "minicpm_ocr": {"image_token_id": 500},
    "minicpmv4_6": {"image_token_id": 500},
    "minicpmv4_7": {"image_token_id": 500},
    "nemotron_h_omni": {"image_token_id": 500},
    "aria": {"projector_patch_to_query_dict": {SIDE * SIDE: 4}},
    "chameleon": {"vocabulary_map": {"<image>": 500, "IMGIMGAZ": 501}},
    "cohere_compass": {
        "text_config.rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
        }
    },
    "deepseek_ocr2": {
        "vision_config.sam_config.downsample_channels": [WIDTH // 2, WIDTH],
        "text_config.mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "text_config.num_experts_per_tok": 2,
    },
    "diffusion_gemma": {
        "text_config.num_experts": EXPERTS,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": INNER,
    },
    "emu3": {"vocabulary_map": {"<image>": 500}},
    "ernie4_5_vl_moe": {"text_config.rope_parameters.mrope_section": [3, 3, 2]},
    "gemma3n": {
        "text_config.num_kv_shared_layers": 1,
        "vision_config.model_args": {"channel_multiplier": 0.05},
        "vision_config.hidden_size": 2048,  # whatever the multiplier
    },
    "glm46v": _AXES,
    "glm4v": _AXES,
    "glm4v_moe": _HALF_AXES,
    "glm_ocr": _AXES,
    "glmga": _AXES,
    "granite4_vision": {"downsample_rate": "1/2", "deepstack_layer_map": [[-2, 1], [-1, 0]]},
    "hunyuan_vl": {"text_config.head_dim": HEAD, "text_config.rope_parameters.mrope_section": [2, 2, 2, 2]},
    "molmo2": {"adapter_config.vision_feature_layer": [3, 1]},
    "muse_glimmer": {"out_hidden_size": 4 * WIDTH},
    "muse_spark": {
        "out_hidden_size": 4 * WIDTH,
        "audio_config.hidden_sizes": [16, 16, 32, 32],
        "audio_config.depths": [1, 1, 1, 1],
    },
    "paddleocr_vl": _AXES,
    "perception_lm": {
        "vision_config.architecture": "vit_pe_lang_large_patch14_448",
        "vision_config.model_args": {
            "embed_dim": WIDTH, "depth": LAYERS, "num_heads": HEADS, "img_size": [56, 56], "ref_feat_shape": [4, 4],
        },
        "vision_config.hidden_size": WIDTH,
    },
    "qwen2_5_omni_thinker": _AXES | {"vision_start_token_id": 500},
    "qwen2_5_vl": _AXES,
    "qwen2_vl": _AXES,
    "qwen3_omni_moe_thinker": _AXES | {"vision_start_token_id": 500},
    "qwen4_exp": {
        "text_config.indexer_n_heads": 2,
        "text_config.indexer_kv_heads": 1,
        "text_config.indexer_head_dim": HEAD,
        "text_config.indexer_budget": 32,
        "text_config.indexer_compress_ratio": 4,
    },
    "shieldgemma2": {"mm_tokens_per_image": 4},
    "step3p7": {"text_config.sliding_window": 16},
    "vipllava": {"vision_feature_layer": [-2, -3, 1]},
}  # fmt: skip


def kinds() -> list[str]:
    """Every model type that transformers registers for images and text to text."""
    return sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def config(model_type: str) -> Any:
    """A tiny config of a model type, from its default one.

    Raises:
        ModelError: not an image-text-to-text model of this transformers.
    """
    if model_type not in kinds():
        raise ModelError(
            f"transformers has no image-text-to-text model `{model_type}`", hint=nearest(model_type, kinds())
        )
    default = transformers.AutoConfig.for_model(model_type)
    return type(default).from_dict(shrunk(default.to_dict(), _EXTRA.get(model_type, {})))


def model(model_type: str, seed: int = 0) -> Any:
    """A tiny model with random weights.

    Raises:
        ModelError: not an image-text-to-text model, or one that needs a package that is missing.
    """
    small = config(model_type)
    try:
        return weights.draw(lambda: transformers.AutoModelForImageTextToText.from_config(small), seed)
    except ImportError as error:
        raise ModelError(f"`{model_type}` cannot be built: {str(error).strip().splitlines()[0]}") from error
    except ValueError as error:  # registered under a name that its own config class does not have
        if "Unrecognized configuration class" not in str(error):
            raise
        raise ModelError(f"`{model_type}` cannot be built: transformers maps no model to its config") from error


def shrunk(fields: dict[str, Any], extra: dict[str, Any] | None = None) -> dict[str, Any]:
    """A config's fields with small numbers; `extra` replaces fields, by dotted names, afterwards."""
    small = _dict(copy.deepcopy(fields), _Tokens())
    for path, value in (extra or {}).items():
        *parents, name = path.split(".")
        place = small
        for parent in parents:
            place = place[parent]
        place[name] = value
    return small


class _Tokens:
    """Token ids for a small vocabulary: the same old one is the same new one, in every part."""

    def __init__(self) -> None:
        self.known: dict[int, int] = {}

    def __call__(self, name: str, old: int) -> int:
        if name in _NAMED and 0 <= old < 32:
            return old
        return self.known.setdefault(old, VOCABULARY - 2 - len(self.known))


def _dict(fields: dict[str, Any], tokens: _Tokens) -> dict[str, Any]:
    depth = max((v for k, v in fields.items() if _DEPTHS.match(k) and isinstance(v, int)), default=0)
    keep = _positions(fields, depth)
    small = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            if name == "per_layer_config":  # by the number of the layer
                small[name] = {keep.index(int(k)): _dict(v, tokens) for k, v in value.items() if int(k) in keep}
            else:
                small[name] = _dict(value, tokens) if all(isinstance(key, str) for key in value) else value
        elif isinstance(value, (list, tuple)):
            small[name] = _list(name, list(value), depth, keep, tokens)
        elif isinstance(value, bool) or not isinstance(value, int):
            small[name] = value
        elif _TOKEN.match(name):
            small[name] = tokens(name, value) if value >= 0 else value
        elif _INDEXES.match(name) and 0 <= value < depth:
            small[name] = value * len(keep) // depth
        else:
            small[name] = _number(name, value)
    _geometry(fields, small)
    return small


def _number(name: str, value: int) -> int:
    for pattern, most in _RULES:
        if pattern.fullmatch(name):
            return min(value, most)
    return value


def _positions(fields: dict[str, Any], depth: int) -> list[int]:
    """Layers to keep: every sort of layer that the per-layer lists tell apart, then the first ones."""
    lists = [v for v in fields.values() if isinstance(v, (list, tuple)) and len(v) == depth]
    sorts = [repr(row) for row in zip(*lists, strict=True)] or [""] * depth
    first = [sorts.index(sort) for sort in dict.fromkeys(sorts)][:LAYERS]
    rest = [i for i in range(depth) if i not in first]
    return sorted(first + rest[: LAYERS - len(first)])


def _list(name: str, value: list[Any], depth: int, keep: list[int], tokens: _Tokens) -> list[Any]:
    if _TOKEN.match(name):
        return [tokens(name, v) for v in value]
    if depth and _INDEXES.match(name) and all(isinstance(v, int) and 0 <= v < depth for v in value):
        return sorted({v * len(keep) // depth for v in value})
    if depth and len(value) == depth:
        value = [value[i] for i in keep]
    if all(isinstance(v, int) and not isinstance(v, bool) for v in value):
        return [_number(name, v) for v in value]
    return value


def _geometry(old: dict[str, Any], small: dict[str, Any]) -> None:
    """Fields that hang together: image and patch, heads and their width, rotary sections."""
    patch = old.get("patch_size")
    side = patch[0] if isinstance(patch, (list, tuple)) else patch
    for name in ("image_size", "max_image_size", "max_img_size"):
        if isinstance(side, int) and isinstance(old.get(name), int) and side * SIDE < old[name]:
            small[name] = side * SIDE
        elif isinstance(side, int) and isinstance(old.get(name), (list, tuple)):
            small[name] = [side * SIDE] * len(old[name])
    if old.get("num_key_value_heads") == old.get("num_attention_heads") and "num_key_value_heads" in old:
        small["num_key_value_heads"] = small["num_attention_heads"]
    if "qk_nope_head_dim" in old and "qk_rope_head_dim" in old:
        _latent(old, small)
    for name in ("rope_parameters", "rope_scaling"):
        section = (old.get(name) or {}).get("mrope_section")
        if section:
            small[name]["mrope_section"] = _sections(section, HEAD // 2)


def _latent(old: dict[str, Any], small: dict[str, Any]) -> None:
    """Multi-head latent attention: a head is a part without and a part with rotary positions."""
    head = small["qk_nope_head_dim"] + small["qk_rope_head_dim"]
    small |= {name: head for name in ("qk_head_dim", "head_dim") if (old.get(name) or 0) > old["qk_rope_head_dim"]}
    ropes = small.get("rope_parameters") or {}
    for rope in (ropes, *(part for part in ropes.values() if isinstance(part, dict))):
        if "partial_rotary_factor" in rope:
            rope["partial_rotary_factor"] = small["qk_rope_head_dim"] / head


def _sections(old: list[int], total: int) -> list[int]:
    """Rotary sections in the old proportions, `total` together."""
    small = [max(1, math.floor(s * total / sum(old))) for s in old]
    small[0] += total - sum(small)
    return small
