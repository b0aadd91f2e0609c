"""Is every weight of the cut model in the bundle? Asked of the bytes, by another road than the export.

A weight counts as present if the sha256 of its bytes, as they are or transposed, is that of a tensor which a graph
names. A weight that was changed by one bit on the way is therefore missing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..exporters.weights import tensor_digests
from ..prompt import Picture, assemble
from ..surgery.load import state_dict
from ..surgery.selection import attached
from ..surgery.talk import Talk, see_all


def missing_weights(model: Any, graphs: list[Path], unused: Collection[str] = ()) -> list[str]:
    """Names of the weights of `model` that no graph reads, but for the `unused` ones."""
    present = set(tensor_digests(graphs))
    named = {name: tensor for name, tensor in state_dict(model).items() if name not in unused}
    return sorted(name for name, tensor in named.items() if not _digests(tensor) & present)


def unused_weights(model: Any) -> set[str]:
    """Weights whose module never runs when the eager model reads an image and a prompt: dead in the source too."""
    ran: set[int] = set()
    hooks = [m.register_forward_hook(lambda module, *_: ran.add(id(module))) for m in model.modules()]
    try:
        _read(model)
    finally:
        for hook in hooks:
            hook.remove()
    # A weight belongs to a module that ran, or to one whose parent reads it: some call `F.linear(x, child.weight)`.
    owners = {name: module for name, module in model.named_modules()}
    idle = set()
    for name in state_dict(model):
        owner = name.rpartition(".")[0]
        family = [owner, owner.rpartition(".")[0]]
        leaf = not list(owners[owner].children())
        if not any(id(owners[o]) in ran for o in (family if leaf else family[:1])):
            idle.add(name)
    return idle


def unread_weights(model: Any, names: Collection[str]) -> set[str]:
    """Those of `names` that no output depends on although their module runs, such as a final norm behind the features.

    Not by looking, but by poison: with NaN in their place, features and logits stay the same bit for bit.
    """
    tensors = {name: t for name, t in model.state_dict().items() if name in names and t.is_floating_point()}
    want, found = _read(model), set()
    for name, tensor in tensors.items():
        before = tensor.clone()
        try:
            tensor.fill_(torch.nan)
            have = _read(model)
        finally:
            tensor.copy_(before)
        if all(torch.equal(x, y) for x, y in zip(have, want, strict=True)):
            found.add(name)
    return found


@torch.no_grad()
def _read(model: Any) -> list[torch.Tensor]:
    """Features and logits of a prompt with one image, for every bucket."""
    layout = attached(model).family.layout(model.config)
    found = []
    for bucket in attached(model).buckets:
        text = [int(layout.image_token_id == 0)]
        ids = np.concatenate([text, np.full(bucket.tokens, layout.image_token_id), text])[None]
        picture = Picture(np.ones(bucket.geometry["pixel_values"], np.float32), bucket.geometry)
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
