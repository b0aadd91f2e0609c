"""Drop attention heads of the vision tower, or KV groups of the language model, that contribute least.

A head's importance is the mean norm of what it adds to the residual stream on calibration images: the norm of
out_proj's columns of that head times its output. A KV group of the language model goes with all its query heads.

Source: vlmcut; the statistic is the activation form of head importance (Michel et al., arXiv:1905.10650, section 3,
rank heads by their effect), without gradients. Every layer loses the same number, so widths stay regular.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..errors import PassError
from ..surgery.anatomy import Anatomy
from ..surgery.cuts import take_heads, take_kv_groups
from ..surgery.load import locate
from ..surgery.structure import find_attention, output_name
from .base import Pass, check_part, rounding
from .calibration import Calibration, observe


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
class DropHeads(Pass):
    """Drop a fraction of the heads of every layer of one part, or keep exactly the listed ones."""

    name: ClassVar[str] = "drop-heads"
    summary: ClassVar[str] = "drop attention heads (vision) or KV groups (language) that add least to the residual"
    source: ClassVar[str] = "head importance as in arXiv:1905.10650, from activations"

    part: str  # vision: attention heads; language: KV groups with their query heads
    fraction: float  # of the heads removed, 0 <= fraction < 1; rounded to whole heads per layer
    keep: tuple[tuple[int, ...], ...] | None = None  # kept heads per layer; measured when absent

    def _heads(self, a: Anatomy) -> tuple[int, ...]:
        return a.tower.heads if self.part == "vision" else a.language.kv_heads

    def plan(self, a: Anatomy) -> Anatomy:
        check_part(self.name, self.part)
        heads = self._heads(a)
        kind = "heads" if self.part == "vision" else "KV heads"
        if self.part in a.quantized:  # its scales, one per row, would not follow
            raise PassError(f"{self.name}: {self.part} is int8 already", hint="put quantize last")
        if not 0 <= self.fraction < 1:
            raise PassError(
                f"{self.name}: fraction={self.fraction} of the {self.part} heads", hint="choose 0 <= fraction < 1"
            )
        left = tuple(n - round(n * self.fraction) for n in heads)
        least = min((n for n in heads if n), default=0)
        if not least:
            raise PassError(f"{self.name}: the {self.part} part of `{a.family}` has no attention heads")
        if min(n for n, total in zip(left, heads, strict=True) if total) < 1:
            raise PassError(
                f"{self.name}: fraction={self.fraction} leaves 0 of {least} {self.part} {kind}",
                hint=f"choose at most {(least - 1) / least:.2f}",
            )
        if self.keep is not None:
            legal = len(self.keep) == len(heads) and all(
                len(set(k)) == n and set(k) <= set(range(total))
                for k, n, total in zip(self.keep, left, heads, strict=True)
            )
            if not legal:
                raise PassError(
                    f"{self.name}: keep lists {[len(k) for k in self.keep]} {kind} per layer, "
                    f"fraction={self.fraction} of {list(heads)} leaves {list(left)}",
                    hint="leave `keep` out to have it measured",
                )
        if self.part == "vision":
            return replace(a, tower=replace(a.tower, heads=left))
        queries = tuple(h // g * n if g else 0 for h, g, n in zip(a.language.heads, heads, left, strict=True))
        return replace(a, language=replace(a.language, heads=queries, kv_heads=left))

    def notes(self, a: Anatomy) -> list[str]:
        return rounding(self.part, self.fraction, max(self._heads(a), default=0), "heads")

    @property
    def needs_calibration(self) -> bool:
        return self.keep is None

    def resolve(self, model: Any, a: Anatomy, calibration: Calibration) -> Self:
        if self.keep is not None:
            return self
        parts = locate(model)
        vision = self.part == "vision"
        blocks = [find_attention(b) for b in (parts.tower_layers if vision else parts.language_layers)]
        outs: list[Any] = [getattr(m, output_name(m)) if m is not None else nn.Identity() for m in blocks]
        all_heads = a.tower.heads if vision else a.language.heads
        importance = [torch.zeros(h, dtype=torch.float64) for h in all_heads]

        def record(index: int, args: Sequence[Any], output: Any) -> None:
            importance[index] += head_contributions(args[0], outs[index].weight, all_heads[index])

        observe(model, outs, record, calibration)
        left = self.plan(a)
        counts = self._heads(left)
        groups = [i.reshape(n, -1).sum(dim=-1) if n else i for i, n in zip(importance, self._heads(a), strict=True)]
        keep = tuple(
            tuple(sorted(sorted(range(len(g)), key=lambda h, g=g: (-float(g[h]), h))[:n]))
            for g, n in zip(groups, counts, strict=True)
        )
        return replace(self, keep=keep)

    def apply(self, model: Any, a: Anatomy) -> None:
        assert self.keep is not None
        parts = locate(model)
        vision = self.part == "vision"
        for block, keep in zip(parts.tower_layers if vision else parts.language_layers, self.keep, strict=True):
            attention = find_attention(block)
            if attention is not None:
                (take_heads if vision else take_kv_groups)(attention, keep)
        if vision:
            return
        planned = self.plan(a).language
        for config in (parts.language.config, model.config.get_text_config()):
            config.head_dim = planned.head_dim
            config.num_attention_heads = max(planned.heads)
            config.num_key_value_heads = max(planned.kv_heads)
