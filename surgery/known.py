"""Numbers that are known before a trace: the geometry of an image as tensors whose values a trace may ask for.

transformers computes positions, segments and sizes from such tensors, asks them for Python numbers, and splits by them;
a tracer cannot answer. These are computed at once, outside whatever traces, as long as they meet only their like;
with any other tensor they are ordinary constants.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map


class Known(Tensor):
    """A tensor of constants, also under a tracer; what is made of known tensors alone is known."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__ and isinstance(args[1], Known) and args[1].dtype == torch.bool:
            args = (args[0], args[1].nonzero(as_tuple=True))  # how many rows a known mask takes is known
        given = (args, kwargs or {})
        alone = all(isinstance(x, Known) for x in tree_leaves(given) if isinstance(x, Tensor))
        with torch._C.DisableTorchFunctionSubclass():
            with _disable_current_modes():
                positional, named = tree_map(_plain, given)
                if alone:
                    return tree_map(known, func(*positional, **named))
            return func(*positional, **named)


def known(x: Any) -> Any:
    """A tensor as a known one; anything else as it is."""
    return x.as_subclass(Known) if isinstance(x, Tensor) else x


def _plain(x: Any) -> Any:
    return x.as_subclass(Tensor) if isinstance(x, Known) else x
