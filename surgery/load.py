"""Load a model with its processor: a Hugging Face folder, a hub id, or a tiny random one.

Nothing is fetched unless a hub id says so, no remote code runs unless asked, and a weight that is missing is an
error: `from_pretrained` would fill it with random numbers.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.initialization import no_init_weights

from ..errors import ModelError, nearest
from ..manifest import digest
from . import llava, tiny
from .anatomy import Anatomy

READERS = {"llava": llava}
_WRAP = ".wrapped."


@dataclass
class Loaded:
    """A model in eval mode, its processor (PIL backend), and where both came from."""

    model: Any
    processor: Any
    source: dict[str, Any]  # id, revision, files {name -> sha256}
    recipe: list[dict[str, Any]] = field(default_factory=list)  # cuts already made, resolved


def describe(model: Any) -> Anatomy:
    """The anatomy of a model, read from what is there."""
    return _reader(model.config).describe(model)


def locate(model: Any) -> llava.Parts:
    """The live modules of a model."""
    return _reader(model.config).locate(model)


def load(
    model: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Loaded:
    """Load a model by folder, hub id or `tiny:<family>`.

    Args:
        model: a Hugging Face folder, `tiny:llava` (random, offline), or a hub id.
        dtype: of the weights in memory.

    Raises:
        ModelError: not a model, a text-only model, missing or damaged weights, or a layout without a reader.
    """
    name = str(model)
    if name.startswith("tiny:"):
        made, processor = tiny.make(name.removeprefix("tiny:"))
        return Loaded(made.to(dtype).eval(), processor, {"id": name, "revision": None, "files": {}})
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
    return Loaded(loaded.eval(), load_processor(name, **options), source)


def load_config(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The config of an image-text-to-text model that a reader understands; no weight is touched."""
    if name.startswith("tiny:"):
        return tiny.make(name.removeprefix("tiny:"))[0].config
    if _is_local(name):
        _check_config(Path(name))
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise ModelError(f"`{name}` cannot be loaded: {str(error).splitlines()[0]}", hint=_MODEL_HINT) from error
    reader = _reader(config)
    if not trust_remote_code and getattr(config, "auto_map", None):
        raise ModelError(f"`{name}` brings its own code", hint="read it, then pass --trust-remote-code")
    reader.check(config)
    return config


def load_processor(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The processor with PIL image backend, the one that the torch-free runner uses too."""
    try:
        return AutoProcessor.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code, backend="pil"
        )
    except (OSError, ValueError, StrictDataclassError) as error:
        raise ModelError(
            f"`{name}`: no processor: {str(error).splitlines()[0]}",
            hint="save the processor (image processor, tokenizer, chat template) beside the weights",
        ) from error


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


def _reader(config: Any) -> Any:
    kind = getattr(config, "model_type", None) or "?"
    if kind in READERS:
        return READERS[kind]
    if not hasattr(config, "vision_config"):
        raise ModelError(
            f"`{kind}` is a text-only model: it has no vision tower", hint="vlmcut cuts vision-language models"
        )
    raise ModelError(f"cannot describe `{kind}`: no reader for it", hint=nearest(kind, READERS))


def skeleton(config: Any) -> Any:
    """A model of this config with unset weights but real rotary tables."""
    with no_init_weights():
        return AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").eval()


def state_dict(model: Any) -> dict[str, torch.Tensor]:
    """Weights under their Hugging Face names, each tied weight once."""
    # A tied `lm_head.weight` takes its `lm_head.weight_scale` along, when it is quantized.
    tied = tuple(model.all_tied_weights_keys) if model.config.tie_word_embeddings else ()
    return {plain_name(n): t.contiguous() for n, t in model.state_dict().items() if not n.startswith(tied)}


def plain_name(name: str) -> str:
    """The Hugging Face name of a weight, without the modules that vlmcut put around its owner."""
    return name.replace(_WRAP, ".")
