"""The MLP of a transformer block, and whether its neurons are separate: one can leave without another noticing.

A neuron is one number between the linears that make it (gate and up, or one alone) and the linear that reads it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .structure import find_attention

# The linears that make neurons and, last, the one that reads them, by transformers' names.
_NAMES = (
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "w3", "w2"),  # LFM2
    ("fc1", "fc2"),
    ("linear_fc1", "linear_fc2"),  # Qwen3-VL
)
_HIDDEN, _NEURONS = 4, 6  # of the small copy that is tried


@dataclass(frozen=True)
class Mlp:
    """The MLP of one block."""

    module: Any
    names: tuple[str, ...]

    @property
    def makes(self) -> list[Any]:
        """The linears whose rows are neurons."""
        return [getattr(self.module, name) for name in self.names[:-1]]

    @property
    def reads(self) -> Any:
        """The linear whose columns are neurons."""
        return getattr(self.module, self.names[-1])

    @property
    def neurons(self) -> int:
        return self.reads.in_features


def find_mlp(block: nn.Module) -> Mlp | None:
    """The one MLP of a block; None for several (experts) and for linears under names that are not known."""
    attention = find_attention(block)
    inside = set() if attention is None else set(map(id, attention.modules()))
    found = [
        Mlp(module, names)
        for module in block.modules()
        if id(module) not in inside
        for names in _NAMES
        if all(hasattr(getattr(module, name, None), "in_features") for name in names)
    ]
    if len(found) != 1 or _has_experts(block):
        return None
    (mlp,) = found
    if {key.partition(".")[0] for key in mlp.module.state_dict()} != set(mlp.names):  # a norm of the neurons, say
        return None
    return mlp if {linear.out_features for linear in mlp.makes} == {mlp.neurons} else None


def solid(blocks: Sequence[nn.Module]) -> str | None:
    """Why no neuron can leave the MLPs of these blocks; None if any can. Works on the meta device."""
    if not blocks:
        return "it is not a stack of transformer layers"
    for index, block in enumerate(blocks):
        if _has_experts(block):
            return f"layer {index} is a mixture of experts"
        mlp = find_mlp(block)
        if mlp is None:
            return f"layer {index} (`{type(block).__name__}`) has no single MLP of {' or '.join(map(_list, _NAMES))}"
        if not _separate(mlp):
            return f"the neurons of layer {index} (`{type(mlp.module).__name__}`) depend on each other"
    return None


def _list(names: tuple[str, ...]) -> str:
    return "/".join(names)


def _has_experts(block: nn.Module) -> bool:
    return any("expert" in name.rpartition(".")[2] for name, _ in block.named_modules())


@torch.no_grad()
def _separate(mlp: Mlp) -> bool:
    """Whether neurons depend on their own rows alone, tried on a small copy: other rows change no bit of them."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, _HIDDEN, generator=rng)
    first = [_linear(_NEURONS, _HIDDEN, rng) for _ in mlp.makes]
    second = [_linear(_NEURONS, _HIDDEN, rng) for _ in mlp.makes]
    stay = torch.arange(_NEURONS) % 2 == 0
    for one, other in zip(first, second, strict=True):
        other.weight[stay], other.bias[stay] = one.weight[stay], one.bias[stay]
    try:
        before, after = (_neurons(mlp, linears, x) for linears in (first, second))
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):  # it needs more than one input
        return False
    return torch.equal(before[..., stay], after[..., stay]) and not torch.equal(before, after)


def _neurons(mlp: Mlp, makes: list[nn.Linear], x: Tensor) -> Tensor:
    """What the reading linear is given when `makes` stand in the places of the MLP's own."""
    trial = copy.copy(mlp.module)
    trial._modules = dict(mlp.module._modules)  # a shallow copy shares the table
    reads = _linear(_HIDDEN, _NEURONS, torch.Generator())
    for name, linear in zip(mlp.names, [*makes, reads], strict=True):
        trial._modules[name] = linear
    seen: list[Tensor] = []
    reads.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    trial(x)
    (found,) = seen
    return found


def _linear(rows: int, columns: int, rng: torch.Generator) -> nn.Linear:
    """A random linear on the CPU that leaves the caller's random state alone."""
    linear = nn.Linear(columns, rows, device="meta", dtype=torch.float32).to_empty(device="cpu")
    linear.weight.copy_(torch.randn(rows, columns, generator=rng))
    linear.bias.copy_(torch.randn(rows, generator=rng))
    return linear.requires_grad_(False)
