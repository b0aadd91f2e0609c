"""The LLaVA layout: a CLIP or SigLIP tower, a per-token MLP projector, a Llama or Qwen2 language model.

This file alone knows where Hugging Face keeps the parts. A config field that it does not know and that differs from
its default is refused by name: an unknown option found later would be a wrong answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import ModelError
from .anatomy import Anatomy, Language, Tower
from .selection import TokenSelection

_COMMON = frozenset(
    "architectures attn_implementation _attn_implementation _attn_implementation_autoset bos_token_id "
    "chunk_size_feed_forward dtype eos_token_id id2label label2id initializer_factor initializer_range model_type "
    "name_or_path _name_or_path output_attentions output_hidden_states pad_token_id return_dict torch_dtype "
    "transformers_version use_cache attention_dropout projection_dim".split()
)
_HANDLED = {
    "llava": _COMMON
    | frozenset(
        "text_config vision_config image_token_index image_token_id projector_hidden_act image_seq_length "
        "vision_feature_select_strategy vision_feature_layer multimodal_projector_bias tie_word_embeddings".split()
    ),
    "vision": _COMMON
    | frozenset(
        "hidden_size intermediate_size num_hidden_layers num_attention_heads num_channels image_size patch_size "
        "hidden_act layer_norm_eps vision_use_head vocab_size".split()
    ),
    "language": _COMMON
    | frozenset(
        "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim vocab_size "
        "hidden_act max_position_embeddings rms_norm_eps rope_parameters tie_word_embeddings "
        "layer_types sliding_window use_sliding_window max_window_layers pretraining_tp".split()
    ),
}
_TOWERS = ("clip_vision_model", "siglip_vision_model")
_LANGUAGES = ("llama", "qwen2")
# Rotary tables that do not depend on the length of the prompt, so that one table serves a static graph.
_ROPE = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Parts:
    """The live modules of a model, found once."""

    tower: Any
    tower_layers: Any  # ModuleList of encoder layers
    projector: nn.Module
    language: Any
    language_layers: Any  # ModuleList of decoder layers
    selection: TokenSelection | None


def locate(model: Any) -> Parts:
    """Find the modules of a LLaVA model, cut or not."""
    base = model.model
    wrapped = base.vision_tower
    selection = wrapped if isinstance(wrapped, TokenSelection) else None
    tower: Any = selection.wrapped if selection else wrapped
    return Parts(
        tower=tower,
        tower_layers=tower.encoder.layers,
        projector=base.multi_modal_projector,
        language=base.language_model,
        language_layers=base.language_model.layers,
        selection=selection,
    )


def describe(model: Any) -> Anatomy:
    """Read the anatomy of a LLaVA model from its modules and config; works on the meta device.

    Raises:
        ModelError: a tower, a language model or a config field that this reader does not know.
    """
    config = model.config
    check(config)
    vision, text = config.vision_config, config.text_config
    parts = locate(model)
    blocks = parts.tower_layers
    layer = config.vision_feature_layer
    tower = Tower(
        kind=vision.model_type,
        hidden=vision.hidden_size,
        head_dim=blocks[0].self_attn.head_dim,
        heads=tuple(b.self_attn.num_heads for b in blocks),
        intermediate=blocks[0].mlp.fc1.out_features,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        has_cls=vision.model_type == "clip_vision_model",
        # hidden_states has one entry more than layers: entry i is what i layers made.
        feature_layer=layer if layer >= 0 else len(blocks) + 1 + layer,
    )
    attention = [b.self_attn for b in parts.language_layers]
    head_dim = attention[0].head_dim
    language = Language(
        kind=text.model_type,
        hidden=text.hidden_size,
        head_dim=head_dim,
        heads=tuple(m.q_proj.out_features // head_dim for m in attention),
        kv_heads=tuple(m.k_proj.out_features // head_dim for m in attention),
        intermediate=parts.language_layers[0].mlp.gate_proj.out_features,
        vocabulary=text.vocab_size,
        tied=bool(config.tie_word_embeddings),
        max_positions=text.max_position_embeddings,
    )
    quantized = [
        part
        for part, linear in (("vision", blocks[0].mlp.fc1), ("language", parts.language_layers[0].mlp.gate_proj))
        if not isinstance(linear, nn.Linear)
    ]
    return Anatomy(
        family="llava",
        tower=tower,
        language=language,
        image_token_id=config.image_token_id,
        keep=parts.selection.keep if parts.selection else tower.patches,
        method=parts.selection.selector.method if parts.selection else None,
        quantized=tuple(quantized),
    )


def check(config: Any) -> None:
    """Refuse a config that this reader does not fully understand."""
    vision, text = config.vision_config, config.text_config
    if vision.model_type not in _TOWERS:
        raise ModelError(
            f"llava: vision tower `{vision.model_type}` has no reader", hint=f"towers that work: {', '.join(_TOWERS)}"
        )
    if text.model_type not in _LANGUAGES:
        raise ModelError(
            f"llava: language model `{text.model_type}` has no reader",
            hint=f"language models that work: {', '.join(_LANGUAGES)}",
        )
    for part, section in (("llava", config), ("vision", vision), ("language", text)):
        if unknown := _unknown_fields(section, _HANDLED[part]):
            raise ModelError(
                f"llava: {part} config field `{unknown[0]}` = {getattr(section, unknown[0])!r} is not understood",
                hint="vlmcut would ignore it and could be wrong; ask for it with the config attached",
            )
    if not isinstance(config.vision_feature_layer, int):
        raise ModelError(
            f"llava: vision_feature_layer = {config.vision_feature_layer} names several layers",
            hint="only one feature layer is supported",
        )
    cls = vision.model_type == "clip_vision_model"
    if (config.vision_feature_select_strategy == "default") != cls:
        raise ModelError(
            f"llava: vision_feature_select_strategy = {config.vision_feature_select_strategy!r} with a "
            f"`{vision.model_type}` tower, which has {'a' if cls else 'no'} [CLS] token",
            hint="use `default` with CLIP and `full` with SigLIP",
        )
    sliding = [kind for kind in getattr(text, "layer_types", None) or [] if kind != "full_attention"]
    if sliding:
        raise ModelError(
            f"llava: {len(sliding)} language layers use `{sliding[0]}`", hint="only full attention is supported"
        )
    rope = (text.rope_parameters or {}).get("rope_type", "default")
    if rope not in _ROPE:
        raise ModelError(
            f"llava: rope_type `{rope}` depends on the prompt's length", hint=f"supported: {', '.join(_ROPE)}"
        )


def _unknown_fields(config: Any, handled: frozenset[str]) -> list[str]:
    default = type(config)().to_dict()
    return sorted(k for k, v in config.to_dict().items() if k not in handled and v != default.get(k))
