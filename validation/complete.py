"""Is every weight of the cut model in the bundle? Asked of the bytes, by another road than the export.

A weight counts as present if the sha256 of its bytes, as they are or transposed, is that of a tensor which a graph
names. A weight that was changed by one bit on the way is therefore missing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..exporters.weights import tensor_digests
from ..prompt import Picture, assemble
from ..surgery.load import state_dict
from ..surgery.selection import attached
from ..surgery.talk import Talk, see_all


def missing_weights(model: Any, graphs: list[Path]) -> list[str]:
    """Names of the weights of `model` that no graph reads."""
    present = set(tensor_digests(graphs))
    return sorted(name for name, tensor in state_dict(model).items() if not _digests(tensor) & present)


def unread_weights(model: Any, names: Collection[str]) -> set[str]:
    """Those of `names` that no output depends on: a tower for sound, a final norm behind the features.

    Not by looking, but by poison: with NaN in their place, features and logits stay the same bit for bit.
    """
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name in names}
    if not tensors:
        return set()
    want = _read(model)
    if _harmless(model, list(tensors.values()), want):  # the rule; one by one only to name those that are read
        return set(tensors)
    return {name for name, tensor in tensors.items() if _harmless(model, [tensor], want)}


def _harmless(model: Any, tensors: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> bool:
    """Whether the model reads a prompt to the same bits with all of these poisoned."""
    before = [tensor.clone() for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)
        have = _read(model)
    finally:
        for tensor, values in zip(tensors, before, strict=True):
            tensor.copy_(values)
    return all(torch.equal(x, y) for x, y in zip(have, want, strict=True))


@torch.no_grad()
def _read(model: Any) -> list[torch.Tensor]:
    """Features and logits of a prompt with one image, for every bucket."""
    about = attached(model)
    layout, known = about.family.layout(model.config), about.vocabulary.ids[:2].tolist() if about.vocabulary else (0, 1)
    text = [next(i for i in known if i != layout.image_token_id)]
    found = []
    for bucket in about.buckets:
        ids = np.concatenate([text, np.full(bucket.tokens, layout.image_token_id), text])[None]
        picture = Picture(np.ones(bucket.pixels, np.float32), bucket.geometry, bucket.frames)
        shrunk, seen = see_all(model, assemble(layout, ids, [picture], [bucket.tokens]))
        found += [*(s.features for s in seen), Talk.read(model, [shrunk], [seen]).logits]
    return found


def removed_weights(source: dict[str, tuple[int, ...]], model: Any) -> dict[str, int]:
    """What the cuts took: elements removed per weight of the source, by Hugging Face name.

    Args:
        source: shapes of the weights before the cuts.
    """
    left = {name: tensor.numel() for name, tensor in state_dict(model).items()}
    return {
        name: gone for name, shape in sorted(source.items()) if (gone := int(np.prod(shape)) - left.get(name, 0)) > 0
    }


def _digests(tensor: torch.Tensor) -> set[str]:
    """sha256 of the forms that a weight may have: as it is, transposed, and 1 + weight of a norm (Gemma)."""
    views = [tensor]
    if tensor.dim() >= 2:
        views.append(tensor.flatten(1).t())
        views.append(tensor.movedim(-1, 1))  # each expert transposed; channels of a map of positions first
    elif tensor.is_floating_point():
        views.append(1.0 + tensor)
    return {hashlib.sha256(v.contiguous().numpy().tobytes()).hexdigest() for v in views}
