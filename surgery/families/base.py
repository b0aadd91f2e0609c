"""The structural base of all families: what transformers' shared conventions give without knowing a model.

A family is a subclass that says where it differs, usually in about thirty lines; see docs/adding-a-family.md.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.exporters.utils import precompute_export_inputs
from transformers.masking_utils import create_masks_for_generate

from ...errors import ModelError
from ...manifest import Bucket, Layout, Panel
from ..anatomy import Language, Tower
from ..heads import bound
from ..known import known
from ..merging import rigid
from ..neurons import find_mlp, solid
from ..numbered import pinned_language, pinned_tower
from ..structure import (
    Parts,
    find_attention,
    find_parts,
    head_dim,
    kv_heads,
    mlp_linears,
    product_weights,
    query_heads,
    refuse_encoder_decoder,
    sliding_window,
)
from ..vocabulary import whole
from .leftovers import LEFTOVERS

Geometry = Mapping[str, tuple[int, ...]]

# Rotary tables that do not depend on the length of the prompt, so that one table serves a static graph.
_ROPE = ("default", "linear", "llama3", "yarn", "proportional")
_LAYERS = ("full_attention", "sliding_attention", "conv")
# How the numbers of one image lie; pairs where not named.
_SHAPES = {"image_grid_thw": (-1, 3), "image_merge_sizes": (-1,), "image_position_ids": (1, -1, 2)}


@dataclass(frozen=True)
class Encoded:
    """The visual tokens of one image, in the order of their placeholders."""

    tokens: Tensor  # [N, d]
    project: Callable[[Tensor], Tensor] | None = None  # a projector that works token by token and has yet to run
    levels: tuple[Tensor, ...] = ()  # DeepStack features, [N, hidden] each


class Family:
    """How a family is laid out. Methods take the model or its config and the geometry of one image.

    Everything that depends on the geometry is Python ints or constants made before a trace.
    """

    prefix = "causal"  # attention among prompt tokens: causal; image (each image sees itself whole); whole
    window_over_blocks = False  # whether a sliding window cuts such a block too
    windowed_blocks = False  # whether only layers with a window let such a block see itself
    first_position = 0
    logits_scaling = -1  # the power of a config's `logits_scaling` that logits are multiplied with; Granite's divides
    tower_mask = True  # whether a mask that the tower makes for one image says anything
    stiff: str | None = None  # why visual tokens cannot leave between language layers
    rigid: str | None = "its visual tokens are not the rows of its tower, one for one"  # so none can leave inside it
    also: frozenset[str] = frozenset()  # fields that the config's class sets without declaring them
    refused: ClassVar[Mapping[str, tuple[Any, str]]] = {}  # config field -> (the one value that works, why)

    def locate(self, model: Any) -> Parts:
        """The live modules, cut or not."""
        return find_parts(model)

    # --- vision -----------------------------------------------------------------------------------------------------

    def encode(self, model: Any, pixel_values: Tensor, geometry: Geometry, constants: Mapping[str, Any]) -> Encoded:
        """The whole image as visual tokens; by default what `get_image_features` gives, sizes as Python ints."""
        out = self.locate(model).base.get_image_features(pixel_values, return_dict=True, **constants)
        return Encoded(flat(out.pooler_output), levels=tuple(flat(d) for d in getattr(out, "deepstack_features", ())))

    def constants(self, model: Any, geometry: Geometry) -> dict[str, Any]:
        """What `encode` needs beside pixels and depends on the geometry alone; made before a trace, never in it.

        A known tensor (`surgery/known.py`) stands where transformers asks for Python numbers of one (`.tolist()`).
        """
        parts = self.locate(model)
        accepted = inspect.signature(parts.base.get_image_features).parameters
        given = {name: value for name, value in self.tensors(geometry).items() if name in accepted}
        found: dict[str, Any] = {name: known(torch.from_numpy(value)) for name, value in given.items()}
        if "image_sizes" in found:
            found["image_sizes"] = [tuple(pair) for pair in found["image_sizes"].tolist()]
        if "image_grid_thw" in found:
            found |= grid_constants(parts.tower, geometry)
        return found

    def tensors(self, geometry: Geometry) -> dict[str, np.ndarray]:
        """What a processor gives beside the pixels of one image, from their geometry."""
        flat = {name: np.array(numbers) for name, numbers in geometry.items() if name != "pixel_values"}
        return {name: numbers.reshape(_SHAPES.get(name, (-1, 2))) for name, numbers in flat.items()}

    def has_cls(self, config: Any) -> bool:
        """Whether row 0 of each segment of the tower is a [CLS] token."""
        return False

    def scored(self, model: Any) -> dict[int, Any]:
        """The tower attentions that can score tokens, block -> module; empty if the tower has none."""
        found = {i: find_attention(block) for i, block in enumerate(self.locate(model).tower_layers)}
        return {i: module for i, module in found.items() if hasattr(module, "config")}  # else q and k cannot be seen

    def members(self, config: Any, geometry: Geometry) -> np.ndarray | None:
        """The patches behind each visual token, int64 [N, u], counted over all segments without [CLS]; -1 for none.

        None: not known, and methods that score by attention are refused.
        """
        return None

    def panels(self, config: Any, bucket: Bucket) -> tuple[Panel, ...]:
        """Where the visual tokens lie in the picture, in order; empty: not known, and nothing can be drawn."""
        return ()

    def segments(self, config: Any, geometry: Geometry) -> tuple[int, ...]:
        """Rows of each segment that attends to itself in the tower, [CLS] included; empty: see what enters a layer."""
        return ()

    def windowed(self, config: Any, layers: int) -> tuple[bool, ...]:
        """Which tower layers see windows of the picture only."""
        return (False,) * layers

    def windows(self, config: Any, geometry: Geometry) -> tuple[int, ...]:
        """Rows of each window, for a tower that has some; for counting work only."""
        return ()

    def feature_layer(self, config: Any, layers: int) -> int:
        """Tower layers that run before the features are taken."""
        return layers

    def trim(self, model: Any) -> None:
        """Remove modules of the tower whose output nobody reads; outputs do not change by a bit."""

    def default_size(self, config: Any) -> tuple[int, int]:
        """Pixels, height and width, of the picture that a bucket is made for when nobody says otherwise."""
        size = getattr(config.vision_config, "image_size", None)
        size = max(size) if isinstance(size, (list, tuple)) else size
        return (size, size) if size else (448, 448)

    # --- language ---------------------------------------------------------------------------------------------------

    def layout(self, config: Any) -> Layout:
        """How the host lays out a prompt."""
        token = image_token_id(config)
        if has_rope_index(config):
            return Layout(image_token_id=token, positions="mrope", merge=spatial_merge(config))
        return Layout(image_token_id=token, first_position=self.first_position)

    def embed(self, model: Any, ids: Tensor) -> Tensor:
        """What enters the language model for text, [B, L] -> [B, L, hidden]."""
        return self.locate(model).language.get_input_embeddings()(ids)

    def beside(self, model: Any, ids: Tensor, visual: Tensor) -> dict[str, Any]:
        """What the language model takes beside embeddings; `visual`, bool [B, L], marks placeholders, whose id is 0."""
        return {}

    def levels(self, config: Any) -> int:
        """DeepStack features that are added behind the first language layers."""
        return len(getattr(config.vision_config, "deepstack_visual_indexes", None) or ())

    def masks(self, **given: Any) -> Any:
        """The masks of a whole prompt as the eager language model takes them; `given` names block_sequence_ids."""
        return create_masks_for_generate(attention_mask=None, **given)

    def logits(self, model: Any, hidden: Tensor) -> Tensor:
        """Scores of the next token from the last hidden state, [B, hidden] -> [B, V]."""
        text = model.config.get_text_config()
        out = self.locate(model).head(hidden)
        scale = getattr(model, "logit_scale", None)  # Cohere's own; a text config may have one that nobody reads
        out = out if scale is None else out * scale
        scaling = getattr(text, "logits_scaling", None)
        out = out if scaling is None else out * scaling**self.logits_scaling
        out = out * (getattr(text, "output_multiplier", None) or 1)  # Muse
        cap = getattr(text, "final_logit_softcapping", None)
        return out if cap is None else torch.tanh(out / cap) * cap

    def states(self, model: Any, rows: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """What each language layer remembers, name -> shape: key_i, value_i of `rows[i]` rows, or conv_i."""
        found: dict[str, tuple[int, ...]] = {}
        for index, block in enumerate(self.locate(model).language_layers):
            attention = find_attention(block)
            if attention is not None:
                shape = (1, kv_heads(attention), rows[index], head_dim(attention))
                found |= {f"key_{index}": shape, f"value_{index}": shape}
                continue
            conv = next(m for m in block.modules() if isinstance(m, nn.Conv1d))
            found[f"conv_{index}"] = (1, conv.in_channels, conv.kernel_size[0])
        return found

    # --- description ------------------------------------------------------------------------------------------------

    def check(self, config: Any) -> None:
        """Refuse a config that is not fully understood, by field."""
        refuse_encoder_decoder(config)
        kind = config.model_type
        text = config.get_text_config()
        for section in (config, text, getattr(config, "vision_config", None)):
            if section is None or isinstance(section, dict):
                continue
            for name in (n for n in _undeclared(section) if n not in self.also):
                raise ModelError(
                    f"{kind}: `{type(section).__name__}` field `{name}` = {getattr(section, name)!r} is not understood",
                    hint="transformers ignores it: take it out of config.json if it says nothing about the weights",
                )
        sections = (getattr(text, "rope_parameters", None) or {}).get("mrope_section")
        if sections is not None and len(sections) != 3:
            raise ModelError(
                f"{kind}: positions of {len(sections)} axes are not supported",
                hint="M-RoPE has three: time, height, width",
            )
        latent = getattr(text, "qk_rope_head_dim", None), getattr(text, "v_head_dim", None)
        if all(latent) and latent[1] != latent[0] + text.qk_nope_head_dim:
            raise ModelError(
                f"{kind}: keys and values of a head differ in width (multi-head latent attention)",
                hint="the operators that keep a cache take one width",
            )
        for name, (works, why) in self.refused.items():
            value = _dig(config, name)
            if value != works:
                raise ModelError(f"{kind}: {name} = {value!r}: {why}", hint=f"only {works!r} is supported")
        for layer in getattr(text, "layer_types", None) or []:
            if layer not in _LAYERS:
                raise ModelError(
                    f"{kind}: language layers of type `{layer}` are not supported",
                    hint=f"supported: {', '.join(_LAYERS)}",
                )
        for rope in _rope_types(text):
            if rope not in _ROPE:
                raise ModelError(
                    f"{kind}: rope_type `{rope}` depends on the prompt's length", hint=f"supported: {', '.join(_ROPE)}"
                )

    def tower(self, model: Any, parts: Parts) -> Tower:
        """The tower as numbers."""
        vision = getattr(model.config, "vision_config", None)
        layers = parts.tower_layers
        attention = [find_attention(b) for b in layers]
        linears = mlp_linears(layers[0]) if layers else []
        feature_layer = self.feature_layer(model.config, len(layers))
        return Tower(
            kind=getattr(vision, "model_type", "?"),
            hidden=linears[0].in_features if linears else 0,
            head_dim=next((head_dim(a) for a in attention if a is not None), 0),
            heads=tuple(0 if a is None else query_heads(a) for a in attention),
            intermediate=_widths(layers, linears),
            matrices=len(linears),
            others=_outside_layers(parts),
            windowed=self.windowed(model.config, len(layers)),
            patch_size=_patch_size(vision),
            has_cls=self.has_cls(model.config),
            feature_layer=feature_layer,
            pinned=pinned_tower(model.config, parts.tower, len(layers), feature_layer, sorted(self.scored(model))),
            rigid=self.rigid or rigid(layers),
            solid=solid(layers),
            bound=bound(layers),
        )

    def language(self, model: Any, parts: Parts) -> Language:
        """The language model as numbers."""
        text = model.config.get_text_config()
        attention = [find_attention(b) for b in parts.language_layers]
        first = next(a for a in attention if a is not None)
        linears = mlp_linears(next(b for b, a in zip(parts.language_layers, attention, strict=True) if a is first))
        matrices = max(0 if (mlp := find_mlp(b)) is None else len(mlp.names) for b in parts.language_layers)
        intermediate = _widths(parts.language_layers, linears)
        windows = tuple(0 if a is None else sliding_window(a) for a in attention)
        return Language(
            kind=text.model_type,
            hidden=text.hidden_size,
            head_dim=head_dim(first),
            heads=tuple(0 if a is None else query_heads(a) for a in attention),
            kv_heads=tuple(0 if a is None else kv_heads(a) for a in attention),
            intermediate=intermediate,
            matrices=matrices,
            others=tuple(
                product_weights(block) - matrices * text.hidden_size * neurons
                for block, neurons in zip(parts.language_layers, intermediate, strict=True)
            ),
            windows=windows,
            masked=tuple(self.prefix != "causal" and (bool(w) or not self.windowed_blocks) for w in windows),
            vocabulary=parts.head.out_features,
            tied=parts.head.weight is parts.language.get_input_embeddings().weight,
            max_positions=getattr(text, "max_position_embeddings", None) or 2**31,
            pinned=pinned_language(self.levels(model.config)),
            solid=solid(parts.language_layers),
            levels=self.levels(model.config),
            window=_window(text),
            stiff=self.stiff or _stiff(attention),
            bound=bound(parts.language_layers),
            whole=whole(parts),
        )


def image_token_id(config: Any) -> int:
    """The id that stands for an image in a prompt."""
    for name in ("image_token_id", "image_token_index", "media_placeholder_token_id"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    raise ModelError(
        f"cannot describe `{config.model_type}`: its config names no image token",
        hint="no placeholder, nothing to prune",
    )


def has_rope_index(config: Any) -> bool:
    """Whether positions are M-RoPE's: the modelling file of this config has a class that lays them out."""
    found = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    modeling = vars(sys.modules[found.__module__]) if isinstance(found, type) else {}
    return any(isinstance(c, type) and hasattr(c, "get_rope_index") for c in modeling.values())


def spatial_merge(config: Any) -> int:
    """Patches along one side of a visual token of a t x h x w grid."""
    return getattr(config.vision_config, "spatial_merge_size", None) or getattr(config, "spatial_merge_size", None) or 1


def grid_constants(tower: Any, geometry: Geometry) -> dict[str, Any]:
    """Positions, segments and interpolation of a tower that takes patches of a t x h x w grid (Qwen2-VL and after)."""
    grid = torch.tensor(geometry["image_grid_thw"]).reshape(-1, 3)
    with torch.device("cpu"):
        found: dict[str, Any] = {"grid_thw": grid}
        if "image_merge_sizes" in geometry:
            found["merge_sizes"] = torch.tensor(geometry["image_merge_sizes"])
        precompute_export_inputs(tower, found)
    del found["grid_thw"]
    found.pop("merge_sizes", None)
    lengths = {name: known(value) for name, value in found.items() if name.startswith("cu_")}
    return {k: v for k, v in (found | lengths).items() if v is not None} | {"image_grid_thw": known(grid)}


def grid_members(rows: int, columns: int, merge: int) -> np.ndarray:
    """Patches of each merged token of a raster grid: [rows/merge * columns/merge, merge**2]."""
    grid = np.arange(rows * columns).reshape(rows // merge, merge, columns // merge, merge)
    return np.ascontiguousarray(grid.transpose(0, 2, 1, 3).reshape(-1, merge * merge))


def flat(features: Any) -> Tensor:
    """Features of one image as [N, d], whether they come as a list of images or with a leading axis of tiles."""
    if isinstance(features, (list, tuple)):
        features = features[0] if len(features) == 1 else torch.cat(list(features))
    return features.flatten(0, -2)


def _window(text: Any) -> int | None:
    """Columns that sliding layers see back; None if there are none."""
    kinds = getattr(text, "layer_types", None)
    window = getattr(text, "sliding_window", None)
    return window if window and (kinds is None or "sliding_attention" in kinds) else None


def _stiff(attention: Sequence[Any]) -> str | None:
    """Why visual tokens cannot leave between language layers; `attention` of each layer."""
    mixes = any(one is None for one in attention)
    return "its convolutions mix neighbouring columns, and who leaves changes neighbours" if mixes else None


def _undeclared(config: Any) -> list[str]:
    """Fields that the config's class does not declare: transformers would carry them along and ignore them."""
    declared = set(type(config)().to_dict()) | LEFTOVERS | set(getattr(type(config), "attribute_map", {}))
    return sorted(
        k for k, v in config.to_dict().items() if k not in declared and not k.startswith("_") and v is not None
    )


def _dig(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name, None)
    return config


def _rope_types(text: Any) -> set[str]:
    rope = getattr(text, "rope_parameters", None) or {}
    nested = [v for v in rope.values() if isinstance(v, dict)]
    return {r.get("rope_type", "default") for r in (nested or [rope])}


def _widths(blocks: list[Any], linears: list[Any]) -> tuple[int, ...]:
    """Neurons of each block; of `linears`, those of a block that has some, where a block's MLP is not understood."""
    usual = linears[0].out_features if linears else 0
    return tuple(usual if (mlp := find_mlp(block)) is None else mlp.neurons for block in blocks)


def _outside_layers(parts: Parts) -> int:
    """Weights of the tower outside its layers, norms and biases left out, and a pooling head, which nobody reads."""
    inside = [*parts.tower_layers, *([parts.tower.head] if hasattr(parts.tower, "head") else [])]
    counted = {id(p) for module in inside for p in module.parameters()}
    return sum(p.numel() for p in parts.tower.parameters() if p.dim() > 1 and id(p) not in counted)


def _patch_size(vision: Any) -> int:
    size = getattr(vision, "patch_size", 0) or 0
    return size[0] if isinstance(size, (list, tuple)) else size
