"""Is every weight of the cut model in the bundle? Asked of the bytes, by another road than the export.

A weight counts as present if the sha256 of its bytes, as they are or transposed, is that of a tensor which a graph
names. A weight that was changed by one bit on the way is therefore missing.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..exporters.weights import tensor_digests
from ..surgery.load import state_dict


def missing_weights(model: Any, graphs: list[Path]) -> list[str]:
    """Names of the weights of `model` that no graph reads."""
    present = set(tensor_digests(graphs))
    return sorted(name for name, tensor in state_dict(model).items() if not _digests(tensor) & present)


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
    views = [tensor] if tensor.dim() != 2 else [tensor, tensor.t()]
    return {hashlib.sha256(v.contiguous().numpy().tobytes()).hexdigest() for v in views}
