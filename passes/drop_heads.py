"""Drop attention heads of the vision tower, or KV groups of the language model, that contribute least.

From activations, a head's importance is the mean norm of what it adds to the residual stream on calibration images: the
norm of out_proj's columns of that head times its output. From the loss, it is how far the model's answers move without
it, one head at a time. A KV group of the language model goes with all its query heads.

Source: vlmcut; Michel et al., arXiv:1905.10650, section 3 (rank heads by their effect), without gradients. Layers are
ranked one by one, or together: by importance over the layer's mean, as scales differ, or by the loss as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..errors import PassError, nearest
from ..surgery.anatomy import Anatomy
from ..surgery.cuts import take_heads, take_kv_groups
from ..surgery.load import locate
from ..surgery.structure import find_attention, output_name
from .base import Pass, check_part, rounding
from .calibration import MEASURED, Calibration, observe
from .importance import RANKINGS, Answers, best_of_all, best_of_each, over_mean, spread, without_columns

IMPORTANCES = ("activation", "loss")


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
    """Drop a fraction of the heads of one part, or keep exactly the listed ones."""

    name: ClassVar[str] = "drop-heads"
    summary: ClassVar[str] = "drop attention heads (vision) or KV groups (language) that add least to the residual"
    source: ClassVar[str] = "head importance as in arXiv:1905.10650, from activations or by leaving one out"

    part: str  # vision: attention heads; language: KV groups with their query heads
    fraction: float  # of the heads removed, 0 <= fraction < 1; rounded to whole heads
    keep: tuple[tuple[int, ...], ...] | None = None  # kept heads per layer; measured when absent
    ranking: str = "layer"  # layer: every layer loses the same fraction; global: layers are ranked together
    importance: str = "activation"  # how it is measured: activation, or loss, one answer per head and prompt

    def _heads(self, a: Anatomy) -> tuple[int, ...]:
        return a.tower.heads if self.part == "vision" else a.language.kv_heads

    def plan(self, a: Anatomy) -> Anatomy:
        check_part(self.name, self.part)
        for what, given, known in (
            ("ranking", self.ranking, RANKINGS),
            ("importance", self.importance, IMPORTANCES),
        ):
            if given not in known:
                raise PassError(f"{self.name}: no {what} `{given}`", hint=nearest(given, known))
        if self.part in a.quantized:  # its scales, one per row, would not follow
            raise PassError(f"{self.name}: {self.part} is int8 already", hint="put quantize last")
        if self.part == "language" and a.idle.heads:
            raise PassError(
                f"{self.name}: visual tokens use heads of {len(a.idle.heads)} layers that are named by number",
                hint="put drop-heads before slim-visual",
            )
        if not 0 <= self.fraction < 1:
            raise PassError(
                f"{self.name}: fraction={self.fraction} of the {self.part} heads", hint="choose 0 <= fraction < 1"
            )
        heads = self._heads(a)
        if not any(heads):
            raise PassError(f"{self.name}: the {self.part} part of `{a.family}` has no attention heads")
        why = (a.tower if self.part == "vision" else a.language).bound
        if why is not None:
            raise PassError(f"{self.name}: no head of the {self.part} part of `{a.family}` can go: {why}")
        left = self._left(a)
        if self.keep is not None:
            left = self._kept(a, left)
        if self.part == "vision":
            return replace(a, tower=replace(a.tower, heads=left))
        queries = tuple(h // g * n if g else 0 for h, g, n in zip(a.language.heads, heads, left, strict=True))
        return replace(a, language=replace(a.language, heads=queries, kv_heads=left))

    @property
    def _kind(self) -> str:
        return "heads" if self.part == "vision" else "KV heads"

    def _left(self, a: Anatomy) -> tuple[int, ...]:
        """Heads that stay in each layer; where only their sum is known before they are measured, spread evenly."""
        heads = self._heads(a)
        if self.ranking == "global":
            total, layers = sum(heads), sum(n > 0 for n in heads)
            count = total - round(total * self.fraction)
            if count < layers:
                raise PassError(
                    f"{self.name}: fraction={self.fraction} leaves {count} of {total} {self.part} {self._kind} for "
                    f"{layers} layers",
                    hint=f"choose at most {math.floor((total - layers) / total * 1e4) / 1e4}",
                )
            return spread(count, heads)
        left = tuple(n - round(n * self.fraction) for n in heads)
        if min(n for n, total in zip(left, heads, strict=True) if total) < 1:
            least = min(n for n in heads if n)
            raise PassError(
                f"{self.name}: fraction={self.fraction} leaves 0 of {least} {self.part} {self._kind}",
                hint=f"choose at most {(least - 1) / least:.2f}",
            )
        return left

    def _kept(self, a: Anatomy, left: tuple[int, ...]) -> tuple[int, ...]:
        """Heads that `keep` names in each layer."""
        assert self.keep is not None
        heads, counts = self._heads(a), tuple(len(k) for k in self.keep)
        legal = len(counts) == len(heads) and all(
            len(set(k)) == len(k) and set(k) <= set(range(n)) and bool(k) == (n > 0)
            for k, n in zip(self.keep, heads, strict=True)
        )
        if not legal or (counts != left if self.ranking == "layer" else sum(counts) != sum(left)):
            stay = list(left) if self.ranking == "layer" else f"{sum(left)} in all"
            raise PassError(
                f"{self.name}: keep lists {list(counts)} {self._kind} per layer, "
                f"fraction={self.fraction} of {list(heads)} leaves {stay}",
                hint="leave `keep` out to have it measured",
            )
        return counts

    def notes(self, a: Anatomy) -> list[str]:
        heads = self._heads(a)
        found = rounding(self.part, self.fraction, max(heads, default=0), "heads") if self.ranking == "layer" else []
        if self.ranking == "global":
            found.append(f"{self.part}: layers keep different numbers of heads, which only vlmcut.load reads back")
            if self.keep is None:
                found.append(f"{self.part}: which layer loses how many is measured; the plan spreads them evenly")
        if self.importance == "loss" and self.keep is None:
            found.append(
                f"{self.part}: each of {sum(heads)} {self._kind} is left out once: {sum(heads) + 1} answers to "
                f"each calibration prompt ({MEASURED} at most)"
            )
        return found

    @property
    def needs_calibration(self) -> bool:
        return self.keep is None

    def resolve(self, model: Any, a: Anatomy, calibration: Calibration) -> Self:
        if self.keep is not None:
            return self
        measure = self._by_loss if self.importance == "loss" else self._by_activation
        importance = measure(model, a, calibration)
        left = self._heads(self.plan(a))
        if self.ranking == "layer":
            return replace(self, keep=best_of_each(importance, left))
        # Activations are as large as their layer's stream; a loss is a loss wherever its head sits.
        comparable = importance if self.importance == "loss" else over_mean(importance)
        return replace(self, keep=best_of_all(comparable, sum(left)))

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
        return [one.reshape(n, -1).sum(dim=-1) if n else one for one, n in zip(found, self._heads(a), strict=True)]

    def _by_loss(self, model: Any, a: Anatomy, calibration: Calibration) -> list[Tensor]:
        """How far the model's answers move without each head or KV group, in nats."""
        answers = Answers(model, self.part, calibration)
        found = [torch.zeros(n, dtype=torch.float64) for n in self._heads(a)]
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
