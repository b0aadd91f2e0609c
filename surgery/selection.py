"""The one place where visual tokens leave a model: a module around the vision tower.

The tower runs as it is; a selector scores its tokens and the module hands the kept ones on, in raster order. The
projector and the language model then never see the others. State-dict names do not change on disk: the prefix
`.wrapped.` is dropped when a model is saved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling


@dataclass(frozen=True)
class TowerState:
    """What a selector may look at. N patches, d the tower's width; the leading axis is images."""

    patches: Tensor  # features of the patches, [images, N, d]
    block_input: Tensor  # input of the last block that ran, [images, N (+1 for CLS), d]
    block: Any  # that block, a transformers encoder layer
    has_cls: bool
    project: Callable[[Tensor], Tensor]  # the projector, [images, N, d] -> [images, N, hidden]


class Selector(Protocol):
    """Chooses tokens; composed in `passes/tokens`."""

    @property
    def method(self) -> str:
        """Its name in the table of methods."""
        ...

    def __call__(self, state: TowerState, keep: int) -> Tensor:
        """Ascending kept positions, int64 [images, keep]."""
        ...

    def scores(self, state: TowerState) -> Tensor | None:
        """What this selector ranks or measures, float32 or wider; None for a constant choice."""
        ...

    def regret(self, state: TowerState, kept: Tensor) -> Tensor:
        """By how much a given choice falls short of this selector's own, in units of its score; 0 if it does not."""
        ...


@dataclass
class SelectedOutput(BaseModelOutputWithPooling):
    """The tower's output with the positions of the kept tokens, int64 [images, keep]."""

    kept: Tensor | None = None


class TokenSelection(nn.Module):
    """A vision tower that returns only `keep` of its patch tokens (and [CLS], where the tower has one).

    Source: methods.md calls this hook h2; a per-token projector makes it equal to selecting after the projector.
    """

    wrapped: Any
    _projector: list[Callable[[Tensor], Tensor]]

    def __init__(self, tower: nn.Module, projector: nn.Module, selector: Selector, keep: int, has_cls: bool) -> None:
        super().__init__()
        self.wrapped = tower
        self.selector = selector
        self.keep = keep
        self.has_cls = has_cls
        # Not registered: the projector keeps its one place in the state dict.
        object.__setattr__(self, "_projector", [projector])

    def state(self, pixel_values: Tensor, **kwargs: Any) -> tuple[TowerState, Any]:
        """Run the tower and gather what a selector may look at. pixel_values: [images, 3, height, width]."""
        last = len(self.wrapped.encoder.layers)
        out = self.wrapped(pixel_values, output_hidden_states=[last - 1, last], return_dict=True, **kwargs)
        features = out.hidden_states[last]
        return (
            TowerState(
                patches=features[:, 1:] if self.has_cls else features,
                block_input=out.hidden_states[last - 1],
                block=self.wrapped.encoder.layers[last - 1],
                has_cls=self.has_cls,
                project=self._projector[0],
            ),
            out,
        )

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> SelectedOutput:
        kwargs.pop("output_hidden_states", None)
        kwargs.pop("return_dict", None)
        state, out = self.state(pixel_values, **kwargs)
        kept = self.selector(state, self.keep)
        tokens = state.patches.gather(1, kept.unsqueeze(-1).expand(-1, -1, state.patches.shape[-1]))
        if self.has_cls:  # the caller drops this row again
            tokens = torch.cat([out.hidden_states[-1][:, :1], tokens], dim=1)
        return SelectedOutput(hidden_states=(*out.hidden_states[:-1], tokens), kept=kept)
