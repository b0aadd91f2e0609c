"""The cut eager model as the judge: in float64, and with the choice of tokens given."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..prompt import Picture, Prompt
from ..surgery import inside
from ..surgery.norms import widen
from ..surgery.picking import Judge
from ..surgery.selection import TowerState, attached, judge
from ..surgery.talk import Change, see_picture, unchanged
from ..surgery.vision import Seen, look, prepare, read_question


def truth(model: Any) -> Any:
    """A copy of the model in float64, RMS norms included (transformers computes them in float32)."""
    exact = copy.deepcopy(model).double()
    widen(exact)
    for module in exact.modules():
        if hasattr(module, "has_gate") and hasattr(module, "is_transposed"):  # experts; their fast form has no float64
            module.config._experts_implementation_internal = "eager"
    return exact


@contextmanager
def choosing(model: Any, kept: Tensor | None) -> Iterator[None]:
    """While inside, the model keeps these tokens, int64 [1, K], whatever its method says."""
    selection = attached(model).selection
    if selection is None or kept is None:
        yield
        return
    selection.forced = kept
    try:
        yield
    finally:
        selection.forced = None


def see(model: Any, picture: Picture, kept: Tensor | None = None, change: Change = unchanged) -> Seen:
    """One picture, with its own choice of tokens or the given one, int64 [1, K]."""
    with choosing(model, kept):
        return see_picture(model, picture, change)


def judges(prompt: Prompt, kept: Sequence[np.ndarray]) -> list[Judge]:
    """Pickers confined to the columns that went on at each rung, int64 [S]."""
    return [judge(torch.from_numpy(columns)[None], prompt.length) for columns in kept]


def passing(model: Any, prompt: Prompt, kept: Sequence[np.ndarray]) -> AbstractContextManager[None]:
    """While inside, these columns of the prompt go on at each rung, whatever the method says; of no ladder, nothing."""
    return inside.choosing(model, judges(prompt, kept)) if kept else nullcontext()


@torch.no_grad()
def state(model: Any, picture: Picture, change: Change = unchanged) -> TowerState:
    """What a selector of the model looks at."""
    pixels = change(torch.from_numpy(picture.pixel_values)).to(model.dtype)
    return look(model, pixels, prepare(model, picture.geometry), read_question(model, picture.question))[1]
