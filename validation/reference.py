"""The cut eager model as the judge: Hugging Face's own forward, token by token, in float64 or in the graph's dtype."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..surgery.load import locate
from ..surgery.selection import TowerState


@dataclass(frozen=True)
class Chosen:
    """A selector that keeps given positions, so that everything after the choice can be compared."""

    method: str
    kept: Tensor

    def __call__(self, state: TowerState, keep: int) -> Tensor:
        return self.kept

    def scores(self, state: TowerState) -> Tensor | None:
        return None

    def regret(self, state: TowerState, kept: Tensor) -> Tensor:
        return torch.zeros(())


def truth(model: Any) -> Any:
    """A copy of the model in float64, RMS norms included (transformers computes them in float32)."""
    exact = copy.deepcopy(model).double()
    for norm in locate(exact).language.modules():
        if type(norm).__name__.endswith("RMSNorm"):
            norm.forward = lambda x, n=norm: (
                n.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + n.variance_epsilon))
            )
    return exact


@contextmanager
def choosing(model: Any, kept: Tensor | None) -> Iterator[None]:
    """While inside, the model keeps these tokens, int64 [1, K], whatever its method says."""
    selection = locate(model).selection
    if selection is None or kept is None:
        yield
        return
    before = selection.selector
    selection.selector = Chosen(before.method, kept)
    try:
        yield
    finally:
        selection.selector = before


@torch.no_grad()
def see(model: Any, pixel_values: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One image, [1, 3, height, width] -> features [K, hidden] and kept [K]."""
    with choosing(model, kept):
        out = model.get_image_features(pixel_values.to(model.dtype), return_dict=True)
    features = out.pooler_output[0]
    positions = getattr(out, "kept", None)
    return features, torch.arange(len(features)) if positions is None else positions[0]


@torch.no_grad()
def tower_state(model: Any, pixel_values: Tensor) -> TowerState | None:
    """What the model's selector looks at; None for a model that keeps every token."""
    selection = locate(model).selection
    return None if selection is None else selection.state(pixel_values.to(model.dtype))[0]


Change = Callable[[Tensor], Tensor]


def unchanged(x: Tensor) -> Tensor:
    """The identity."""
    return x


@torch.no_grad()
def scores(model: Any, pixel_values: Tensor) -> Tensor | None:
    """What the model's method ranks, for one image; None if it ranks nothing."""
    state, selection = tower_state(model, pixel_values), locate(model).selection
    return None if state is None or selection is None else selection.selector.scores(state)


@dataclass
class Talk:
    """A prompt that has been read: logits of its last token and the cache, to be continued."""

    model: Any
    logits: Tensor  # [V]
    cache: Any

    @classmethod
    @torch.no_grad()
    def read(
        cls, model: Any, input_ids: Tensor, visual_index: Tensor, features: Tensor, change: Change = unchanged
    ) -> Talk:
        """Read an unpadded prompt, [1, L] twice, with features [images, K, hidden]; `change` edits what enters."""
        language = model.model.language_model
        x = language.embed_tokens(input_ids)
        place = visual_index[0] >= 0
        x[0, place] = features.to(x.dtype).flatten(0, 1)[visual_index[0, place]]
        cache = DynamicCache(config=language.config)
        return cls(model, torch.empty(0), cache)._run(change(x))

    @torch.no_grad()
    def say(self, token: int, change: Change = unchanged) -> Talk:
        """Feed one token."""
        return self._run(change(self.model.model.language_model.embed_tokens(torch.tensor([[token]]))))

    def _run(self, x: Tensor) -> Talk:
        out = self.model.model.language_model(inputs_embeds=x, past_key_values=self.cache, use_cache=True)
        # One row, as in the graph: an int8 scale depends on every row it sees.
        logits = self.model.lm_head(out.last_hidden_state[:, -1])[0]
        return Talk(self.model, logits, out.past_key_values)

    def rows(self) -> list[Tensor]:
        """key 0, value 0, …, each [kv_heads, rows, head_dim]."""
        return [t[0] for layer in self.cache.layers for t in (layer.keys, layer.values)]
