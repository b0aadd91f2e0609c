"""A cut model as a folder: weights, the resolved recipe and the source's config, reloaded bit-equal.

Where widths stay regular (language heads, neurons and layers), plain `from_pretrained` reads the folder too. It knows
no token pruning, vision heads, layers of unequal width or int8: only `load` here restores them.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file

from ..errors import ModelError
from ..surgery import load as surgery
from ..surgery.load import Loaded
from ..surgery.selection import attached
from . import recipe as recipes
from .int8 import Int8Embedding
from .prune_tokens import PruneTokens
from .recipe import Recipe
from .tokens.methods import TableSelector

SOURCE_CONFIG = "source_config.json"
RECIPE = "recipe.toml"
SOURCE = "source.json"
_ALIGNED = 64  # bytes: where torch puts a tensor that it makes itself
METHOD = "method.safetensors"  # weights of the method that chooses tokens, if it has some: a copy of their file


def load(
    model: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    sizes: tuple[surgery.Size, ...] = (),
    frames: int = 1,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Loaded:
    """Load a model, cut by vlmcut or not.

    Args:
        model: a folder (Hugging Face's, or made by `vlmcut cut`), a hub id, or `tiny:llava`.

    Raises:
        ModelError: not a model, a text-only model, missing or damaged weights, or a layout without a reader.
    """
    folder = Path(model)
    if not (folder / SOURCE_CONFIG).is_file():
        return surgery.load(
            model, dtype=dtype, sizes=sizes, frames=frames, revision=revision, trust_remote_code=trust_remote_code
        )
    surgery.check_folder(folder)
    fields = json.loads((folder / SOURCE_CONFIG).read_text())
    source = json.loads((folder / SOURCE).read_text())
    processor = surgery.load_processor(str(folder))
    skeleton = surgery.skeleton(transformers.CONFIG_MAPPING[fields["model_type"]].from_dict(fields))
    if sizes and sizes != (made := tuple((h, w) for h, w in source["sizes"])):
        was, asked = (", ".join(f"{height}x{width}" for height, width in some) for some in (made, sizes))
        raise ModelError(f"`{folder}` was cut for images of {was}, not {asked}", hint="cut the original model again")
    if frames not in (1, source["frames"]):
        raise ModelError(
            f"`{folder}` was cut for clips of {source['frames']} frames, not {frames}", hint="cut the original again"
        )
    sizes = tuple((h, w) for h, w in source["sizes"])
    surgery.attach(skeleton, surgery.make_buckets(skeleton.config, processor, sizes, source["frames"]))
    recipe = recipes.read(folder / RECIPE)
    _apply(recipe, skeleton, folder / METHOD)
    weights = load_file(folder / "model.safetensors")
    wanted = surgery.state_dict(skeleton)
    shapes = [{(name, tuple(t.shape)) for name, t in tensors.items()} for tensors in (wanted, weights)]
    if left := sorted({name for name, _ in shapes[0] ^ shapes[1]}):
        raise ModelError(f"`{folder}`: {len(left)} weights do not fit the recipe, first `{left[0]}`", hint="cut again")
    # A product with one row is summed in another order where its weight is not aligned, as any behind an odd number of
    # neurons is in the file: a copy is.
    weights = {name: tensor.clone() if tensor.data_ptr() % _ALIGNED else tensor for name, tensor in weights.items()}
    skeleton.load_state_dict(weights, strict=False, assign=True)
    _tie(skeleton)
    if (folder / "generation_config.json").is_file():
        skeleton.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    source = {key: value for key, value in source.items() if key not in ("sizes", "frames")}
    return Loaded(skeleton.to(dtype).eval(), processor, source, recipe.tables())


def save(loaded: Loaded, folder: Path, source_config: Any, recipe: Recipe) -> None:
    """Write a cut model into an empty or new folder.

    Args:
        source_config: the model's config before the cuts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    buckets = attached(loaded.model).buckets
    made_for = {"sizes": [bucket.size for bucket in buckets], "frames": buckets[0].frames}
    _readable(loaded.model.config, source_config).save_pretrained(folder)
    if loaded.model.generation_config is not None:
        loaded.model.generation_config.save_pretrained(folder)
    (folder / SOURCE_CONFIG).write_text(source_config.to_json_string(use_diff=False))
    (folder / RECIPE).write_text(recipe.to_toml())
    for step in recipe.passes:
        if isinstance(step, PruneTokens) and step.weights:
            shutil.copyfile(step.weights, folder / METHOD)
    (folder / SOURCE).write_text(json.dumps(loaded.source | made_for, indent=1) + "\n")
    loaded.processor.save_pretrained(folder)
    save_file(surgery.state_dict(loaded.model), folder / "model.safetensors", metadata={"format": "pt"})


def _apply(recipe: Recipe, model: Any, weights: Path) -> None:
    """Apply a folder's recipe without its training, whose outcome is in the weights.

    A method's weights are read from the folder, whatever path the recipe keeps.
    """
    recipe = recipe.unhealed()
    if not weights.is_file():
        recipe.apply(model, None)
        return
    passes = [p.reading(str(weights)) if isinstance(p, PruneTokens) else p for p in recipe.passes]
    Recipe(tuple(passes)).apply(model, None)
    selection = attached(model).selection
    assert selection is not None and isinstance(selection.selector, TableSelector)
    (method,) = (p.method for p in recipe.passes if isinstance(p, PruneTokens))
    selection.selector = replace(selection.selector, method=method)


def _readable(config: Any, source_config: Any) -> Any:
    """The cut config, or the source's where transformers refuses to read the cut one back.

    It refuses head counts that do not divide the width, although head_dim says how wide a head is. With the source's
    config plain `from_pretrained` then stops at the first weight of another shape.
    """
    try:
        type(config).from_dict(config.to_dict())
    except StrictDataclassError:
        return source_config
    return config


def _tie(model: Any) -> None:
    if not model.config.tie_word_embeddings:
        return
    embedding = model.get_input_embeddings()
    if isinstance(embedding, Int8Embedding):
        model.lm_head.weight, model.lm_head.weight_scale = embedding.weight, embedding.weight_scale.float()
    else:
        model.tie_weights()
