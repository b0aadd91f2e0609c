"""Load a model with its processor: a Hugging Face folder, a hub id, or a tiny random one.

Nothing is fetched unless a hub id says so, no remote code runs unless asked, and a weight that is missing is an
error: `from_pretrained` would fill it with random numbers.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from ..errors import ModelError
from ..manifest import Bucket, digest
from ..processors import Processor, open_processor
from ..prompt import Prompter
from . import tiny
from .anatomy import Anatomy
from .families import family_of
from .measure import measured
from .selection import Attached, Selection, attached, leaving, projected
from .structure import Parts

Size = tuple[int, int]  # pixels: height, width


@dataclass
class Loaded:
    """A model in eval mode with what vlmcut attached to it, its processor (no torch), and where both came from."""

    model: Any
    processor: Any
    source: dict[str, Any]  # id, revision, files {name -> sha256}
    recipe: list[dict[str, Any]] = field(default_factory=list)  # cuts already made, resolved


def describe(model: Any) -> Anatomy:
    """The anatomy of a loaded model, cut or not, read from what is there; works on the meta device.

    Raises:
        ModelError: a layout or a config field that the family's reader does not understand.
    """
    about = attached(model)
    family, config = about.family, model.config
    parts = family.locate(model)
    blocks = [parts.tower_layers, parts.language_layers]
    keep = tuple(about.keep(index) for index in range(len(about.buckets)))
    quantized = [part for part, layers in zip(("vision", "language"), blocks, strict=True) if _is_int8(layers)]
    return Anatomy(
        family=config.model_type,
        tower=family.tower(model, parts),
        projector=0 if parts.projector is None else sum(p.numel() for p in _weights(parts.projector) if p.dim() > 1),
        language=family.language(model, parts),
        layout=replace(
            family.layout(config),
            frames=max((bucket.frames for bucket in about.buckets), default=1),
            vocabulary=about.vocabulary,
        ),
        buckets=about.buckets,
        segments=tuple(one.segments for one in measured(model)),
        windows=tuple(family.windows(config, bucket.geometry) * bucket.frames for bucket in about.buckets),
        outside=tuple(one.outside for one in measured(model)),
        breaks=tuple(len(bucket.line_breaks) for bucket in about.buckets),
        scored=tuple(sorted(family.scored(model)))
        if all(family.members(config, bucket.geometry) is not None for bucket in about.buckets)
        else (),
        keep=keep,
        projected=projected(about.selection.selector, about.buckets, keep) if about.selection else keep,
        method=about.selection.selector.method if about.selection else None,
        query_dependent=about.selection is not None and about.selection.selector.text,
        leaving=leaving(about.selection.selector, about.buckets, about.selection.keep, len(parts.tower_layers))
        if about.selection
        else (),
        inside=about.inside.leaver.method if about.inside else None,
        ladder=about.inside.ladder if about.inside else (),
        idle=about.idle,
        carriers=about.carriers,
        quantized=tuple(quantized),
    )


def _weights(module: Any) -> list[torch.Tensor]:
    return list(module.state_dict().values())


def _is_int8(layers: list[Any]) -> bool:
    return any(tensor.dtype == torch.int8 for layer in layers[:1] for tensor in _weights(layer))


def locate(model: Any) -> Parts:
    """The live modules of a model."""
    return family_of(model.config).locate(model)


def attach(model: Any, buckets: tuple[Bucket, ...], selection: Selection | None = None) -> Any:
    """Give a model what vlmcut needs to know beside its modules.

    Raises:
        ModelError: its parts are not where transformers' families keep them.
    """
    locate(model)
    model.vlmcut = Attached(family_of(model.config), buckets, selection)
    return model


def make_buckets(config: Any, processor: Any, sizes: tuple[Size, ...] = (), frames: int = 1) -> tuple[Bucket, ...]:
    """The buckets of pictures of these sizes, or clips of so many; one of the family's own size for none.

    Raises:
        ModelError: two sizes that the processor makes the same of, a processor that writes no placeholder, or frames
            of a family that reads each image as a block.
    """
    family = family_of(config)
    if frames > 1 and family.prefix == "image":
        raise ModelError(
            f"`{config.model_type}` cannot be cut for clips of {frames} frames: its language model reads each image as "
            "a block, and a clip has none",
            hint="leave --frames out: every image then has its own budget",
        )
    prompter = Prompter(processor, family.layout(config))
    found: list[Bucket] = []
    for size in sizes or (family.default_size(config),):
        bucket = prompter.bucket(size)
        bucket = replace(bucket, panels=family.panels(config, bucket))
        if bucket.panels and (drawn := sum(panel.tokens for panel in bucket.panels)) != bucket.tokens:
            raise ModelError(
                f"`{config.model_type}`: the processor writes {bucket.tokens} placeholders for an image of "
                f"{bucket.name} pixels, the model's config makes {drawn} visual tokens",
                hint="the processor does not belong to this model",
            )
        if bucket.tokens == 0:
            raise ModelError(
                f"`{config.model_type}`: the processor writes no token {prompter.layout.image_token_id} for an image",
                hint="the processor does not belong to this model",
            )
        twin = next((b for b in found if b.geometry == bucket.geometry), None)
        if twin is not None:
            raise ModelError(
                f"images of {twin.name} and {bucket.name} pixels become the same to this model",
                hint="name only one of them in --image-size",
            )
        found.append(bucket)
    return tuple(replace(b, tokens=frames * b.tokens, panels=b.panels * frames, frames=frames) for b in found)


def load(
    model: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    sizes: tuple[Size, ...] = (),
    frames: int = 1,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Loaded:
    """Load a model by folder, hub id or `tiny:<family>`.

    Args:
        model: a Hugging Face folder, `tiny:llava` (random, offline), or a hub id.
        dtype: of the weights in memory.
        sizes: height and width in pixels of the pictures to be cut for, a bucket each; the family's own for none.
        frames: images that are seen together as a clip and share a budget.

    Raises:
        ModelError: not a model, a text-only model, missing or damaged weights, or a layout without a reader.
    """
    name = str(model)
    if name.startswith("tiny:"):
        made, processor = tiny.make(name.removeprefix("tiny:"))
        family_of(made.config).check(made.config)
        opened = _tiny_processor(name, processor)
        attach(made, make_buckets(made.config, opened, sizes, frames))
        return Loaded(made.to(dtype).eval(), opened, {"id": name, "revision": None, "files": {}})
    folder = Path(name)
    if _is_local(name):
        check_folder(folder)
    config = load_config(name, revision=revision, trust_remote_code=trust_remote_code)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    # Mismatched shapes are let through here to be refused below, with their names.
    reading = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    made: Any = AutoModelForImageTextToText.from_pretrained(
        name, config=config, dtype=dtype, attn_implementation="sdpa", **reading, **options
    )
    loaded, report = made
    for key in ("missing_keys", "mismatched_keys"):
        if report[key]:
            first = sorted(map(str, report[key]))[0]
            raise ModelError(
                f"`{name}`: {len(report[key])} weights are {key.split('_')[0]}, first `{first}`",
                hint="the checkpoint does not fit its config; download it again",
            )
    source = {
        "id": folder.resolve().name if folder.exists() else name,
        "revision": revision or getattr(config, "_commit_hash", None),
        "files": {p.name: digest(p) for p in sorted(folder.glob("*.safetensors"))} if folder.is_dir() else {},
    }
    processor = load_processor(name, **options)
    attach(loaded, make_buckets(config, processor, sizes, frames))
    return Loaded(loaded.eval(), processor, source)


def load_config(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The config of an image-text-to-text model that a reader understands; no weight is touched."""
    if name.startswith("tiny:"):
        config = tiny.make(name.removeprefix("tiny:"))[0].config
        family_of(config).check(config)
        return config
    if _is_local(name):
        _check_config(Path(name))
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise ModelError(f"`{name}` cannot be loaded: {str(error).splitlines()[0]}", hint=_MODEL_HINT) from error
    if not hasattr(config, "vision_config"):
        if config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
            raise ModelError(
                f"cannot describe `{config.model_type}`: its config has no vision_config",
                hint="vlmcut cuts models with a vision tower whose features take the place of image tokens",
            )
        raise ModelError(
            f"`{config.model_type}` is a text-only model: it has no vision tower",
            hint="vlmcut cuts vision-language models",
        )
    if not trust_remote_code and getattr(config, "auto_map", None):
        raise ModelError(f"`{name}` brings its own code", hint="read it, then pass --trust-remote-code")
    family_of(config).check(config)
    return config


def load_processor(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Processor:
    """The processor, the one that the torch-free runner uses too."""
    if name.startswith("tiny:"):
        return _tiny_processor(name, tiny.make(name.removeprefix("tiny:"))[1])
    return open_processor(name, revision=revision, trust_remote_code=trust_remote_code)


def _tiny_processor(name: str, made: Any) -> Processor:
    if made is None:
        raise ModelError(
            f"`{name}` has random weights, but no processor",
            hint="use tiny:llava or a model's folder; `vlmcut inspect --all-transformers` needs no processor",
        )
    return Processor(made)


_MODEL_HINT = "give a Hugging Face folder (config.json, *.safetensors, processor), a hub id, or tiny:llava"


def _is_local(name: str) -> bool:
    """Whether a name is a path: only `owner/name` that is not here may be a hub id, so that a typo fetches nothing."""
    return Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") != 1


def _check_config(folder: Path) -> None:
    if not folder.is_dir():
        raise ModelError(f"`{folder}` is not a folder", hint=_MODEL_HINT)
    if not (folder / "config.json").is_file():
        raise ModelError(f"`{folder}` has no config.json", hint=_MODEL_HINT)
    _object(folder / "config.json")


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:  # bad UTF-8 too
        raise ModelError(f"`{path}` is not JSON: {error}", hint="download it again") from error
    if not isinstance(found, dict):
        raise ModelError(f"`{path}` is not a JSON object: {found!r}", hint="download it again")
    return found


def check_folder(folder: Path) -> None:
    """Check a local folder before anything is loaded: config, every shard, every shard's length.

    Raises:
        ModelError: naming the file and both numbers.
    """
    _check_config(folder)
    index = folder / "model.safetensors.index.json"
    shards = {"model.safetensors"}
    if index.is_file():
        weight_map = _object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"`{index}` has no weight_map", hint="download it again")
        shards = set(map(str, weight_map.values()))
    missing = sorted(s for s in shards if not (folder / s).is_file())
    if missing:
        raise ModelError(
            f"`{folder}`: {len(missing)} of {len(shards)} weight files are missing, first `{missing[0]}`",
            hint="download the model again (weights must be safetensors)",
        )
    for shard in sorted(shards):
        _check_safetensors(folder / shard)


def _check_safetensors(path: Path) -> None:
    """A safetensors file is 8 bytes of header length, the header, then exactly the bytes it names."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length + 8 > size:
            raise ModelError(
                f"`{path}` is truncated: {size:,} bytes, its header alone needs {length + 8:,}",
                hint="download the file again",
            )
        try:
            header = json.loads(file.read(length))
            named = [t["data_offsets"][1] for n, t in header.items() if n != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ModelError(f"`{path}` is not a safetensors file: {error}", hint="download the file again") from error
    want = 8 + length + max(named, default=0)
    if want != size:
        raise ModelError(f"`{path}` is damaged: {size:,} bytes, its header names {want:,}", hint="download it again")


def skeleton(config: Any) -> Any:
    """A model of this config with unset weights but real rotary tables."""
    with no_init_weights():
        made = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").eval()
    made.tie_weights()  # left out above
    return made


def state_dict(model: Any) -> dict[str, torch.Tensor]:
    """Weights under their Hugging Face names, each tied weight once."""
    # A tied `lm_head.weight` takes its `lm_head.weight_scale` along, when it is quantized.
    tied = tuple(model.all_tied_weights_keys) if getattr(model.config, "tie_word_embeddings", False) else ()
    return {name: t.contiguous() for name, t in model.state_dict().items() if not name.startswith(tied)}
