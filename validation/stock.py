"""Does vlmcut read this model as transformers does? Asked of the numbers, before anything is cut.

A prompt with an image goes through `model.forward` as any user calls it, and through the parts as vlmcut calls them.
Positions, masks, merges of image and text, scales: whatever a family does and vlmcut does not know shows here.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..errors import ModelError
from ..manifest import Bucket
from ..prompt import Picture, Prompt, Prompter, assemble
from ..surgery.load import Loaded, describe, locate
from ..surgery.selection import attached
from ..surgery.talk import Talk, see_all

TOLERANCE = 1e-4  # of the largest logit; float32 through other kernels and orders gave at most 3e-6
_USUAL = frozenset(
    "input_ids attention_mask position_ids past_key_values inputs_embeds use_cache visual_pos_masks "
    "deepstack_visual_embeds cache_position kwargs".split()
)
_TEXT = (2, 5)  # tokens before and after an image where no processor writes a prompt
_AROUND = (("vision_start_token_id", "image_start_token_id"), ("vision_end_token_id", "image_end_token_id"))


def check(loaded: Loaded) -> float:
    """Compare the logits after a prompt with one image, or one clip, of every bucket.

    Returns:
        The worst distance, in units of the largest logit.

    Raises:
        ModelError: they differ by more than rounding.
    """
    return max(_processed(loaded, bucket) for bucket in attached(loaded.model).buckets)


def check_bare(model: Any) -> float:
    """The same for an attached model without a processor: token ids and random pixels of the shapes of its buckets.

    Raises:
        ModelError: they differ by more than rounding.
    """
    return max(_bare(model, bucket) for bucket in attached(model).buckets)


def _processed(loaded: Loaded, bucket: Bucket) -> float:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (bucket.frames, *bucket.size, 3), dtype=np.uint8)
    images = [Image.fromarray(image) for image in noise]
    prompter = Prompter(loaded.processor, describe(loaded.model).layout)
    prompt = prompter(images, "Describe the image.")
    return _compare(loaded.model, prompt, prompter.raw(images, "Describe the image."))


def _bare(model: Any, bucket: Bucket) -> float:
    rng, layout = np.random.default_rng(0), attached(model).family.layout(model.config)
    before, after = (rng.integers(3, 200, count) for count in _TEXT)
    first, last = ([v] if (v := _named(model.config, names)) is not None else [] for names in _AROUND)
    image = np.full(bucket.tokens, layout.image_token_id)
    ids = np.concatenate([before, first, image, last, after]).astype(np.int64)[None]
    picture = Picture(rng.normal(0, 0.5, bucket.geometry["pixel_values"]).astype(np.float32), bucket.geometry)
    kinds = (ids == layout.image_token_id).astype(np.int64)
    given = attached(model).family.tensors(bucket.geometry)
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "pixel_values": picture.pixel_values, **given}
    inputs |= {name: kinds for name in ("mm_token_type_ids", "token_type_ids", "moe_mm_token_type_ids")}
    return _compare(model, assemble(layout, ids, [picture], [bucket.tokens]), inputs)


def _named(config: Any, names: tuple[str, ...]) -> int | None:
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if isinstance(value, int)), None)


@torch.no_grad()
def _compare(model: Any, prompt: Prompt, inputs: Mapping[str, Any]) -> float:
    about = attached(model)
    selection, about.selection = about.selection, None  # of a cut model; transformers knows no choice of tokens
    try:
        shrunk, seen = see_all(model, prompt)
    finally:
        about.selection = selection
    mine = Talk.read(model, [shrunk], [seen]).logits[0]
    known = inspect.signature(model.forward).parameters
    tensors: dict[str, Any] = {
        name: torch.as_tensor(np.asarray(value)) for name, value in inputs.items() if name in known and name != "labels"
    }
    tensors = {name: t.to(model.dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    if "logits_to_keep" in known:  # an int8 head's scale depends on every row it sees
        tensors["logits_to_keep"] = 1
    theirs = model(**tensors).logits[0, -1]
    distance = float((mine - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6))
    if not distance <= TOLERANCE:
        more = [name for name in inspect.signature(locate(model).language.forward).parameters if name not in _USUAL]
        takes = f" (its language model also takes {', '.join(more)})" if more else ""
        raise ModelError(
            f"`{model.config.model_type}`: vlmcut reads it differently from transformers{takes}: logits {distance:.1e} "
            f"of their largest apart, {TOLERANCE:.0e} allowed",
            hint="this family does something that its reader does not know; a bundle would be wrong",
        )
    return distance
