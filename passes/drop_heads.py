"""Drop attention heads of the vision tower, or KV groups of the language model, that contribute least.

From activations, a head's importance is the mean norm of what it adds to the residual stream on calibration images: the
norm of out_proj's columns of that head times its output. From the loss, it is how far the model's answers move without
it, one head at a time. A KV group of the language model goes with all its query heads.

Source: vlmcut; Michel et al., arXiv:1905.10650, section 3 (rank heads by their effect), without gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..surgery.anatomy import Anatomy
from ..surgery.cuts import take_heads, take_kv_groups
from ..surgery.load import locate
from ..surgery.structure import find_attention, output_name
from .calibration import Calibration, observe
from .importance import Answers, without_columns
from .members import DropMembers


def head_contributions(heads_out: Tensor, weight: Tensor, heads: int) -> Tensor:
    """Mean norm of what each head adds to the residual stream.

    Args:
        heads_out: input of the output projection, heads side by side, [..., heads * head_dim].
        weight: the output projection, [hidden, heads * head_dim].

    Returns:
        One number per head, [heads], in units of the residual stream.
    """
    x = heads_out.reshape(-1, heads, heads_out.shape[-1] // heads)
    w = weight.reshape(weight.shape[0], heads, -1)
    return torch.einsum("thd,ohd->hto", x.double(), w.double()).norm(dim=-1).mean(dim=-1)


@dataclass(frozen=True, kw_only=True)
class DropHeads(DropMembers):
    """Drop a fraction of the heads of one part, or keep exactly the listed ones.

    Members are attention heads in the tower, KV groups with their query heads in the language model.
    """

    name: ClassVar[str] = "drop-heads"
    summary: ClassVar[str] = "drop attention heads (vision) or KV groups (language) that add least to the residual"
    source: ClassVar[str] = "head importance as in arXiv:1905.10650, from activations or by leaving one out"

    importances: ClassVar = {"activation": False, "loss": True}
    numbered = "heads"

    @property
    def _kind(self) -> str:
        return "heads" if self.part == "vision" else "KV heads"

    def _members(self, a: Anatomy) -> tuple[int, ...]:
        return a.tower.heads if self.part == "vision" else a.language.kv_heads

    def _why_none(self, a: Anatomy) -> str | None:
        if not any(self._members(a)):
            return f"the {self.part} part of `{a.family}` has no attention heads"
        why = (a.tower if self.part == "vision" else a.language).bound
        return why and f"no head of the {self.part} part of `{a.family}` can go: {why}"

    def _with(self, a: Anatomy, left: tuple[int, ...]) -> Anatomy:
        if self.part == "vision":
            return replace(a, tower=replace(a.tower, heads=left))
        lm = a.language
        queries = tuple(h // g * n if g else 0 for h, g, n in zip(lm.heads, lm.kv_heads, left, strict=True))
        return replace(a, language=replace(lm, heads=queries, kv_heads=left))

    def _left_out(self, a: Anatomy) -> tuple[int, str]:
        return sum(self._members(a)), self._kind

    def _measure(self, model: Any, a: Anatomy, calibration: Calibration) -> list[Tensor]:
        return (self._by_loss if self.importance == "loss" else self._by_activation)(model, a, calibration)

    def _outputs(self, model: Any) -> list[Any]:
        """The projection behind the heads of each layer; an idle module where a layer has none."""
        parts = locate(model)
        blocks = [find_attention(b) for b in (parts.tower_layers if self.part == "vision" else parts.language_layers)]
        return [nn.Identity() if m is None else getattr(m, output_name(m)) for m in blocks]

    def _by_activation(self, model: Any, a: Anatomy, calibration: Calibration) -> list[Tensor]:
        """Mean norm of what each head, or the heads of each KV group together, add to the residual stream."""
        outs = self._outputs(model)
        queries = a.tower.heads if self.part == "vision" else a.language.heads
        found = [torch.zeros(n, dtype=torch.float64) for n in queries]

        def record(index: int, args: Sequence[Any], output: Any) -> None:
            found[index] += head_contributions(args[0], outs[index].weight.detach(), queries[index])

        observe(model, outs, record, calibration)
        return [one.reshape(n, -1).sum(dim=-1) if n else one for one, n in zip(found, self._members(a), strict=True)]

    def _by_loss(self, model: Any, a: Anatomy, calibration: Calibration) -> list[Tensor]:
        """How far the model's answers move without each head or KV group, in nats."""
        answers = Answers(model, self.part, calibration)
        found = [torch.zeros(n, dtype=torch.float64) for n in self._members(a)]
        for out, losses in zip(self._outputs(model), found, strict=True):
            for head in range(len(losses)):
                width = out.in_features // len(losses)
                with without_columns(out, slice(head * width, (head + 1) * width)):
                    losses[head] = answers.moved()
        return found

    def apply(self, model: Any, a: Anatomy) -> None:
        assert self.keep is not None
        parts = locate(model)
        vision = self.part == "vision"
        for block, keep in zip(parts.tower_layers if vision else parts.language_layers, self.keep, strict=True):
            attention = find_attention(block)
            if attention is not None:
                (take_heads if vision else take_kv_groups)(attention, keep)
        planned = self.plan(a).language
        if vision or len({n for n in planned.kv_heads if n}) > 1:  # no config can say this
            return
        for config in (parts.language.config, model.config.get_text_config()):
            config.head_dim = planned.head_dim
            config.num_attention_heads = max(planned.heads)
            config.num_key_value_heads = max(planned.kv_heads)
