"""Mixtures of experts as dense products: what a graph of fixed shape can compute.

transformers sorts tokens by expert and multiplies groups of whatever size came out; a static graph has no such sizes.
Many rows: every expert reads every row, and the routing weights, zero for experts that were not chosen, mix them; the
weights are read once and never copied. Few rows (decode): the chosen experts' weights are gathered, as transformers'
own batched form does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, batched_mm_experts_forward

_NAME = "vlmcut"


@contextmanager
def static_experts(root: nn.Module) -> Iterator[None]:
    """While inside, the experts in `root` compute without sorting."""
    modules: list[Any] = list(root.modules())
    configs = {id(m.config): m.config for m in modules if _is_registered(m)}
    before = [c._experts_implementation for c in configs.values()]
    loops = [m for m in modules if _is_loop(m)]
    ALL_EXPERTS_FUNCTIONS[_NAME] = experts
    try:
        for config in configs.values():
            config._experts_implementation_internal = _NAME
        for module in loops:
            module.forward = lambda x, index, weights, m=module: _dense(m, x, index, weights)
        yield
    finally:
        for config, name in zip(configs.values(), before, strict=True):
            config._experts_implementation_internal = name
        for module in loops:
            del module.forward
        del ALL_EXPERTS_FUNCTIONS[_NAME]


def _is_registered(module: Any) -> bool:
    """Whether transformers lets the way that these experts compute be chosen by name."""
    return hasattr(module, "has_gate") and hasattr(module, "is_transposed")


def _is_loop(module: Any) -> bool:
    """Whether these are experts of the usual layout whose only way is a loop (Step 3)."""
    stacked = getattr(module, "gate_up_proj", None)
    plain = isinstance(stacked, nn.Parameter) and stacked.dim() == 3 and hasattr(module, "_apply_gate")
    return plain and not _is_registered(module)


def experts(module: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """[T, hidden] through the chosen experts, index and weights [T, k] -> [T, hidden]."""
    if x.shape[0] * index.shape[1] <= module.num_experts:
        return batched_mm_experts_forward(module, x, index, weights)
    return _dense(module, x, index, weights)


def _dense(module: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    gated = getattr(module, "has_gate", True)
    chosen = index[..., None] == torch.arange(module.num_experts)  # [T, k, E]; an index of E, for none, chooses nobody
    routing = torch.where(chosen, weights[..., None], 0).sum(1).to(x.dtype)  # [T, E]
    up = _product(module, "gate_up_proj" if gated else "up_proj", x[None])
    inner = module._apply_gate(up) if gated else module.act_fn(up)
    out = _product(module, "down_proj", inner)  # [E, T, hidden]
    if getattr(module, "has_post_expert_norm", False):
        out = module.post_expert_norm(out)
    return (out * routing.t()[..., None]).sum(0).to(x.dtype)


def _product(module: Any, name: str, x: Tensor) -> Tensor:
    """[E or 1, T, in] through one linear of every expert -> [E, T, out]; the weight stays as it lies in memory."""
    weight = getattr(module, name)
    plain = getattr(module, "is_transposed", False)
    out = x @ weight if plain else (weight @ x.transpose(1, 2)).transpose(1, 2)
    return out + getattr(module, f"{name}_bias")[:, None] if getattr(module, "has_bias", False) else out
