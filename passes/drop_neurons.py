"""Drop MLP neurons of the vision tower or the language model that add least to the residual stream.

A neuron is one number between the linears that make it (gate and up, or fc1) and the linear that reads it (down, or
fc2). Its importance is the mean of its magnitude on calibration images times the norm of its output column: activation
magnitude times output weight norm, no training.

Source: vlmcut; the statistic is Wanda's (arXiv:2306.11695, equation 1, |weight| times norm of the input activation)
taken over whole columns of the last projection. We differ: neurons leave, not single weights; magnitudes are averaged,
not squared; nothing is compared per output row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ..errors import PassError, nearest
from ..surgery.anatomy import Anatomy
from ..surgery.cuts import count_neurons, take_neurons
from ..surgery.load import locate
from ..surgery.neurons import find_mlp
from .base import Pass, check_part, rounding
from .calibration import Calibration, observe
from .importance import RANKINGS, best_of_all, best_of_each, over_mean, spread


def neuron_importance(magnitude: Tensor, weight: Tensor) -> Tensor:
    """Mean norm of what each neuron adds to the residual stream.

    Args:
        magnitude: mean |activation| of each neuron, [neurons].
        weight: the projection that reads them, [hidden, neurons].

    Returns:
        One number per neuron, float64 [neurons], in units of the residual stream.
    """
    return magnitude.double() * weight.double().norm(dim=0)


@dataclass(frozen=True, kw_only=True)
class DropNeurons(Pass):
    """Drop a fraction of the MLP neurons of one part, or keep exactly the listed ones."""

    name: ClassVar[str] = "drop-neurons"
    summary: ClassVar[str] = "drop MLP neurons that add least to the residual"
    source: ClassVar[str] = (
        "activation magnitude times output weight norm, training-free; by column after Wanda, arXiv:2306.11695"
    )

    part: str  # vision or language
    fraction: float  # of the neurons removed, 0 <= fraction < 1; rounded to whole neurons
    keep: tuple[tuple[int, ...], ...] | None = None  # kept neurons per layer; measured when absent
    ranking: str = "layer"  # layer: every layer loses the same fraction; global: layers are ranked together

    def _neurons(self, a: Anatomy) -> tuple[int, ...]:
        return (a.tower if self.part == "vision" else a.language).intermediate

    def plan(self, a: Anatomy) -> Anatomy:
        check_part(self.name, self.part)
        if self.ranking not in RANKINGS:
            raise PassError(f"{self.name}: no ranking `{self.ranking}`", hint=nearest(self.ranking, RANKINGS))
        part = a.tower if self.part == "vision" else a.language
        if part.solid is not None:
            raise PassError(f"{self.name}: no neuron of the {self.part} part of `{a.family}` can go: {part.solid}")
        if self.part in a.quantized:  # its scales, one per row, would not follow
            raise PassError(f"{self.name}: {self.part} is int8 already", hint="put quantize last")
        if self.part == "language" and a.idle.neurons:
            raise PassError(
                f"{self.name}: visual tokens use neurons of {len(a.idle.neurons)} layers that are named by number",
                hint="put drop-neurons before slim-visual",
            )
        if not 0 <= self.fraction < 1:
            raise PassError(
                f"{self.name}: fraction={self.fraction} of the {self.part} neurons", hint="choose 0 <= fraction < 1"
            )
        left = self._left(a)
        if self.keep is not None:
            left = self._kept(a, left)
        if self.part == "vision":
            return replace(a, tower=replace(a.tower, intermediate=left))
        return replace(a, language=replace(a.language, intermediate=left))

    def _left(self, a: Anatomy) -> tuple[int, ...]:
        """Neurons that stay in each layer; where only their sum is known before they are measured, spread evenly."""
        neurons = self._neurons(a)
        total = sum(neurons)
        if self.ranking == "global":
            count = total - round(total * self.fraction)
            if count < len(neurons):
                raise PassError(
                    f"{self.name}: fraction={self.fraction} leaves {count} of {total} {self.part} neurons for "
                    f"{len(neurons)} layers",
                    hint=f"choose at most {_most(total, len(neurons))}",
                )
            return spread(count, neurons)
        left = tuple(n - round(n * self.fraction) for n in neurons)
        least = min(neurons)
        if min(left) < 1:
            raise PassError(
                f"{self.name}: fraction={self.fraction} leaves 0 of {least} {self.part} neurons",
                hint=f"choose at most {_most(least, 1)}",
            )
        return left

    def _kept(self, a: Anatomy, left: tuple[int, ...]) -> tuple[int, ...]:
        """Neurons that `keep` names in each layer."""
        assert self.keep is not None
        neurons, counts = self._neurons(a), tuple(len(k) for k in self.keep)
        legal = len(counts) == len(neurons) and all(
            k and len(set(k)) == len(k) and min(k) >= 0 and max(k) < n for k, n in zip(self.keep, neurons, strict=True)
        )
        if not legal or (counts != left if self.ranking == "layer" else sum(counts) != sum(left)):
            stay = list(left) if self.ranking == "layer" else f"{sum(left)} in all"
            raise PassError(
                f"{self.name}: keep lists {list(counts)} neurons per layer, fraction={self.fraction} of "
                f"{list(neurons)} leaves {stay}",
                hint="leave `keep` out to have it measured",
            )
        return counts

    def notes(self, a: Anatomy) -> list[str]:
        neurons = self._neurons(a)
        if self.ranking == "global":
            found = [f"{self.part}: layers keep different numbers of neurons, which only vlmcut.load reads back"]
            if self.keep is None:
                found.append(f"{self.part}: which layer loses how many is measured; the plan spreads them evenly")
            return found
        return rounding(self.part, self.fraction, max(neurons), "neurons")

    @property
    def needs_calibration(self) -> bool:
        return self.keep is None

    def resolve(self, model: Any, a: Anatomy, calibration: Calibration) -> Self:
        if self.keep is not None:
            return self
        reads = [mlp.reads for mlp in self._mlps(model)]
        sums = [torch.zeros(n, dtype=torch.float64) for n in self._neurons(a)]
        rows = [0] * len(reads)

        def record(index: int, args: Sequence[Any], output: Any) -> None:
            x = args[0].detach().reshape(-1, args[0].shape[-1])
            sums[index] += x.double().abs().sum(dim=0)
            rows[index] += len(x)

        observe(model, reads, record, calibration)
        importance = [
            neuron_importance(s / n, linear.weight.detach()) for s, n, linear in zip(sums, rows, reads, strict=True)
        ]
        left = self._neurons(self.plan(a))
        if self.ranking == "layer":
            return replace(self, keep=best_of_each(importance, left))
        return replace(self, keep=best_of_all(over_mean(importance), sum(left)))

    def apply(self, model: Any, a: Anatomy) -> None:
        assert self.keep is not None
        for mlp, keep in zip(self._mlps(model), self.keep, strict=True):
            take_neurons(mlp, keep)
        widths = {len(keep) for keep in self.keep}
        if len(widths) > 1:  # no config can say this
            return
        parts = locate(model)
        if self.part == "vision":
            configs = (parts.tower.config, model.config.vision_config)
        else:
            configs = (parts.language.config, model.config.get_text_config())
        for config in configs:
            count_neurons(config, *widths)

    def _mlps(self, model: Any) -> list[Any]:
        parts = locate(model)
        return [find_mlp(block) for block in (parts.tower_layers if self.part == "vision" else parts.language_layers)]


def _most(total: int, least: int) -> float:
    """The largest fraction of `total` to four decimals that leaves `least`."""
    return math.floor((total - least) / total * 1e4) / 1e4
