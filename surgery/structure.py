"""Where things are in a Hugging Face model, found by what they are: nothing here knows a family by name."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import ModelError

_PROJECTIONS = ("q_proj", "qkv")
_OUTPUTS = ("o_proj", "out_proj", "proj", "projection_layer", "projection")
_COUNTS = ("num_heads", "num_attention_heads")
_PROJECTORS = ("multi_modal_projector", "connector", "aligner", "embed_vision", "model_connector", "vision_projection")

_OPTIONS = ("vision_feature_layer", "vision_feature_select_strategy", "vision_aspect_ratio", "return_dict")


@dataclass(frozen=True)
class Layers:
    """A stack of transformer layers and where it hangs, so that another stack can take its place."""

    owner: Any
    name: str

    @property
    def modules(self) -> nn.ModuleList:
        return getattr(self.owner, self.name)

    def replace(self, modules: nn.ModuleList) -> None:
        setattr(self.owner, self.name, modules)


@dataclass(frozen=True)
class Parts:
    """The live modules of a model."""

    base: Any  # the model without its output projection
    tower: Any
    tower_stack: Layers | None  # None for a tower that is not a stack of transformer layers
    projector: nn.Module | None  # None where the tower holds it
    language: Any
    language_stack: Layers
    head: Any  # the output projection

    @property
    def tower_layers(self) -> list[Any]:
        return list(self.tower_stack.modules) if self.tower_stack else []

    @property
    def language_layers(self) -> list[Any]:
        return list(self.language_stack.modules)


def find_parts(model: Any) -> Parts:
    """Find the parts through transformers' shared names.

    Raises:
        ModelError: naming the convention that this model does not follow.
    """
    kind = model.config.model_type
    base = model.base_model
    tower = model.get_encoder(modality="image")
    language = model.get_decoder()
    if language is not model and language.get_output_embeddings() is not None:  # a whole model inside this one
        language = language.get_decoder()
    head = model.get_output_embeddings()
    refuse_encoder_decoder(model.config)
    missing = [
        what
        for what, found in (
            ("get_image_features", hasattr(base, "get_image_features")),
            ("vision tower", tower is not model and tower is not base),
            ("language model", language is not model and language is not base),
            ("output projection", head is not None),
        )
        if not found
    ]
    stack = None if missing else find_layers(language)
    if not missing and stack is None:
        missing = ["stack of decoder layers"]
    if missing or stack is None:
        raise ModelError(
            f"cannot describe `{kind}`: it has no {missing[0]} where transformers' families keep it",
            hint="vlmcut cuts models with a vision tower whose features take the place of image tokens",
        )
    projector = next((getattr(base, name) for name in _PROJECTORS if hasattr(base, name)), None)
    return Parts(base, tower, find_layers(tower), projector, language, stack, head)


def refuse_encoder_decoder(config: Any) -> None:
    """Raise ModelError for a config whose decoder does not read image features in its prompt."""
    if config.is_encoder_decoder or config.get_text_config().is_encoder_decoder:
        raise ModelError(
            f"cannot describe `{config.model_type}`: its decoder reads an encoder's output (encoder-decoder)",
            hint="vlmcut cuts models whose image features take the place of image tokens in a decoder's prompt",
        )


def image_parameters(model: Any) -> dict[str, bool]:
    """What `get_image_features` takes beside options, name -> whether it must be given."""
    function = getattr(model.base_model, "get_image_features", None)
    found = {} if function is None else inspect.signature(function).parameters
    return {n: p.default is p.empty for n, p in found.items() if p.kind is not p.VAR_KEYWORD and n not in _OPTIONS}


def find_layers(root: nn.Module) -> Layers | None:
    """The longest list of modules that hold attention, outermost first; None if there is none."""
    best: tuple[int, Layers] | None = None
    for owner in root.modules():
        for name, child in owner.named_children():
            if not isinstance(child, nn.ModuleList) or not any(find_attention(m) for m in child):
                continue
            if best is None or len(child) > best[0]:
                best = (len(child), Layers(owner, name))
    return best[1] if best else None


def find_attention(block: nn.Module) -> Any | None:
    """The self-attention of a block: the first module with a query projection; None for a convolution block."""
    return next((m for m in block.modules() if any(hasattr(m, name) for name in _PROJECTIONS)), None)


def output_name(attention: nn.Module) -> str:
    """The name of the projection behind the heads."""
    name = next((name for name in _OUTPUTS if hasattr(attention, name)), None)
    if name is None:
        raise ModelError(
            f"`{type(attention).__name__}` has no projection behind its heads that vlmcut knows",
            hint=f"known: {', '.join(_OUTPUTS)}",
        )
    return name


def head_dim(attention: Any) -> int:
    """Width of one head."""
    width = getattr(attention, "head_dim", None)
    if width:
        return int(width)
    count = next((getattr(attention, name) for name in _COUNTS if hasattr(attention, name)), None)
    if count is None:
        raise ModelError(
            f"`{type(attention).__name__}` does not say how many heads it has", hint=f"known: {', '.join(_COUNTS)}"
        )
    return output_columns(attention) // int(count)


def output_columns(attention: Any) -> int:
    """Width of all query heads side by side."""
    return _linear(getattr(attention, output_name(attention))).in_features


def query_heads(attention: Any) -> int:
    return output_columns(attention) // head_dim(attention)


def kv_heads(attention: Any) -> int:
    """Key-value heads; as many as query heads where q, k and v are one matrix."""
    if not hasattr(attention, "k_proj"):
        return query_heads(attention)
    return _linear(attention.k_proj).out_features // head_dim(attention)


def _linear(module: Any) -> Any:
    """A projection, or the linear that a wrapper of one holds (Gemma 4 clips what goes in and out)."""
    return module if hasattr(module, "in_features") else getattr(module, "linear", module)


def sliding_window(attention: Any) -> int:
    """Columns that an attention of the language model sees at most, itself included; 0 for all."""
    default = getattr(getattr(attention, "config", None), "sliding_window", None)  # Mistral keeps it there
    return getattr(attention, "sliding_window", default) or 0


def product_weights(block: nn.Module) -> int:
    """Weights of a block that rows are multiplied with outside its attention: linears, convolutions, experts."""
    attention = find_attention(block)
    inside = set() if attention is None else set(map(id, attention.modules()))
    found = 0
    for module in block.modules():
        if id(module) in inside:
            continue
        linear: Any = module
        if hasattr(module, "in_features"):
            found += linear.weight.numel()
        else:
            found += sum(p.numel() for p in module.parameters(recurse=False) if p.dim() == 3)
    return found


def mlp_linears(block: nn.Module) -> list[Any]:
    """The linears of a block outside its attention."""
    attention = find_attention(block)
    inside = set() if attention is None else set(map(id, attention.modules()))
    return [m for m in block.modules() if hasattr(m, "in_features") and id(m) not in inside]
