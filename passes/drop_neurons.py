"""Drop MLP neurons of the vision tower or the language model that matter least.

A neuron is one number between the linears that make it (gate and up, or fc1) and the linear that reads it (down, or
fc2). What it is worth is measured on calibration prompts, without training:

| importance | a neuron's |
|---|---|
| activation | mean magnitude times the norm of its output column: what it adds to the residual stream |
| activity | share of the tokens at which it is above 0: of gate and up, that their product is |
| loss | part of what the answers lose without its chunk: neurons of a layer, ranked by activation, in 8 chunks |

Within a chunk the loss is shared out as the activation statistic is, so that layers lose neurons where answers move
least, and the least active ones first.

Source: vlmcut; the first statistic is Wanda's (arXiv:2306.11695, equation 1, |weight| times norm of the input
activation) taken over whole columns of the last projection. We differ: neurons leave, not single weights; magnitudes
are averaged, not squared; nothing is compared per output row. Activity is CoreMatching's core neurons
(arXiv:2505.19235), those that are active for most tokens. We differ: one set for all prompts, found on calibration
prompts, so that graphs stay static. Leaving one out is Michel et al., arXiv:1905.10650, section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..surgery.anatomy import Anatomy
from ..surgery.cuts import count_neurons, take_neurons
from ..surgery.load import locate
from ..surgery.neurons import find_mlp
from .calibration import Calibration, observe
from .importance import Answers, order, without_columns
from .members import DropMembers

CHUNKS = 8  # of a layer's neurons, at most, that are left out one by one


def neuron_importance(magnitude: Tensor, weight: Tensor) -> Tensor:
    """Mean norm of what each neuron adds to the residual stream.

    Args:
        magnitude: mean |activation| of each neuron, [neurons].
        weight: the projection that reads them, [hidden, neurons].

    Returns:
        One number per neuron, float64 [neurons], in units of the residual stream.
    """
    return magnitude.double() * weight.double().norm(dim=0)


def shared_loss(activation: Tensor, loss: Callable[[Tensor], float]) -> Tensor:
    """What the answers lose without each chunk of a layer's neurons, shared out among them.

    Args:
        activation: importance of each neuron by activation, [neurons]; the best of them are the first chunk.
        loss: of the answers, in nats, without these neurons, int64 [n].

    Returns:
        float64 [neurons], in nats; each chunk in proportion to `activation`.
    """
    found = torch.zeros_like(activation)
    for chunk in torch.tensor(order(activation)).tensor_split(min(CHUNKS, len(activation))):
        share = activation[chunk] / activation[chunk].sum().clamp(min=1e-30)
        found[chunk] = share * max(0.0, loss(chunk))
    return found


@dataclass(frozen=True, kw_only=True)
class DropNeurons(DropMembers):
    """Drop a fraction of the MLP neurons of one part, or keep exactly the listed ones."""

    name: ClassVar[str] = "drop-neurons"
    summary: ClassVar[str] = "drop MLP neurons that add least to the residual"
    source: ClassVar[str] = (
        "activation magnitude times output weight norm, training-free; by column after Wanda, arXiv:2306.11695; or "
        "activity, CoreMatching, arXiv:2505.19235, or leaving chunks out"
    )
    importances: ClassVar = {"activation": False, "activity": True, "loss": True}
    numbered = "neurons"

    @property
    def _kind(self) -> str:
        return "neurons"

    def _members(self, a: Anatomy) -> tuple[int, ...]:
        return (a.tower if self.part == "vision" else a.language).intermediate

    def _why_none(self, a: Anatomy) -> str | None:
        why = (a.tower if self.part == "vision" else a.language).solid
        return why and f"no neuron of the {self.part} part of `{a.family}` can go: {why}"

    def _with(self, a: Anatomy, left: tuple[int, ...]) -> Anatomy:
        if self.part == "vision":
            return replace(a, tower=replace(a.tower, intermediate=left))
        return replace(a, language=replace(a.language, intermediate=left))

    def _left_out(self, a: Anatomy) -> tuple[int, str]:
        return sum(min(CHUNKS, n) for n in self._members(a)), "chunks of neurons"

    def _measure(self, model: Any, a: Anatomy, calibration: Calibration) -> list[Tensor]:
        if self.importance == "activity":
            return self._mean(model, calibration, lambda x: x > 0)
        reads = self._reads(model)
        magnitudes = self._mean(model, calibration, torch.abs)
        found = [neuron_importance(m, linear.weight.detach()) for m, linear in zip(magnitudes, reads, strict=True)]
        if self.importance == "activation":
            return found
        answers = Answers(model, self.part, calibration)

        def without(linear: Any, neurons: Tensor) -> float:
            with without_columns(linear, neurons):
                return answers.moved()

        return [
            shared_loss(one, lambda neurons, linear=linear: without(linear, neurons))
            for one, linear in zip(found, reads, strict=True)
        ]

    def _mean(self, model: Any, calibration: Calibration, of: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Mean of a function of each layer's neurons over all rows of all prompts, float64 [neurons]."""
        reads = self._reads(model)
        sums = [torch.zeros(linear.in_features, dtype=torch.float64) for linear in reads]
        rows = [0] * len(reads)

        def record(index: int, args: Sequence[Any], output: Any) -> None:
            x = args[0].detach().reshape(-1, args[0].shape[-1])
            sums[index] += of(x).double().sum(dim=0)
            rows[index] += len(x)

        observe(model, reads, record, calibration)
        return [s / n for s, n in zip(sums, rows, strict=True)]

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

    def _reads(self, model: Any) -> list[Any]:
        return [mlp.reads for mlp in self._mlps(model)]
