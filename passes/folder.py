"""A cut model as a folder: weights, the resolved recipe and the source's config, reloaded bit-equal.

Where widths stay regular (language heads and layers), plain `from_pretrained` reads the folder too; it does not know
token pruning, vision heads or int8, which only `load` here restores.
"""

from __future__ import annotations

import json
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
from .recipe import Recipe

SOURCE_CONFIG = "source_config.json"
RECIPE = "recipe.toml"
SOURCE = "source.json"


def load(
    model: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    sizes: tuple[surgery.Size, ...] = (),
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
        return surgery.load(model, dtype=dtype, sizes=sizes, revision=revision, trust_remote_code=trust_remote_code)
    surgery.check_folder(folder)
    fields = json.loads((folder / SOURCE_CONFIG).read_text())
    source = json.loads((folder / SOURCE).read_text())
    processor = surgery.load_processor(str(folder))
    skeleton = surgery.skeleton(transformers.CONFIG_MAPPING[fields["model_type"]].from_dict(fields))
    if sizes and sizes != (made := tuple((h, w) for h, w in source["sizes"])):
        was, asked = (", ".join(f"{height}x{width}" for height, width in some) for some in (made, sizes))
        raise ModelError(f"`{folder}` was cut for images of {was}, not {asked}", hint="cut the original model again")
    surgery.attach(
        skeleton, surgery.make_buckets(skeleton.config, processor, tuple((h, w) for h, w in source["sizes"]))
    )
    recipe = recipes.read(folder / RECIPE).apply(skeleton, None)
    weights = load_file(folder / "model.safetensors")
    wanted = surgery.state_dict(skeleton)
    shapes = [{(name, tuple(t.shape)) for name, t in tensors.items()} for tensors in (wanted, weights)]
    if left := sorted({name for name, _ in shapes[0] ^ shapes[1]}):
        raise ModelError(f"`{folder}`: {len(left)} weights do not fit the recipe, first `{left[0]}`", hint="cut again")
    skeleton.load_state_dict(weights, strict=False, assign=True)
    _tie(skeleton)
    if (folder / "generation_config.json").is_file():
        skeleton.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    source = {key: value for key, value in source.items() if key != "sizes"}
    return Loaded(skeleton.to(dtype).eval(), processor, source, recipe.tables())


def save(loaded: Loaded, folder: Path, source_config: Any, recipe: Recipe) -> None:
    """Write a cut model into an empty or new folder.

    Args:
        source_config: the model's config before the cuts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sizes = [bucket.size for bucket in attached(loaded.model).buckets]
    _readable(loaded.model.config, source_config).save_pretrained(folder)
    if loaded.model.generation_config is not None:
        loaded.model.generation_config.save_pretrained(folder)
    (folder / SOURCE_CONFIG).write_text(source_config.to_json_string(use_diff=False))
    (folder / RECIPE).write_text(recipe.to_toml())
    (folder / SOURCE).write_text(json.dumps(loaded.source | {"sizes": sizes}, indent=1) + "\n")
    loaded.processor.save_pretrained(folder)
    save_file(surgery.state_dict(loaded.model), folder / "model.safetensors", metadata={"format": "pt"})


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
