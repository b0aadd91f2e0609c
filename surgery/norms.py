"""RMS norms by what they compute: families name them alike, but Gemma's multiplies by 1 + weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def epsilon(norm: Any) -> float:
    """The term under the root, whatever its attribute is called."""
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is called an RMS norm, has a weight and an epsilon."""
    named = type(module).__name__.endswith("RMSNorm") and isinstance(getattr(module, "weight", None), Tensor)
    return named and (hasattr(module, "variance_epsilon") or hasattr(module, "eps"))


def offset(module: nn.Module) -> float | None:
    """c, where a module computes x / rms(x) * (c + weight) and no more: 0, or Gemma's 1; None for anything else."""
    if not is_norm(module) or module.weight.device.type == "meta":
        return None
    return next((c for c in (0.0, 1.0) if _computes(module, c)), None)


def widen(model: nn.Module) -> None:
    """Let the RMS norms of a float64 model compute in float64; transformers computes them in float32."""
    for module in model.modules():
        c = offset(module)
        if c is not None:
            module.forward = lambda x, n=module, c=c: _normed(n, x, c)


def _normed(norm: Any, x: Tensor, c: float) -> Tensor:
    return (c + norm.weight) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon(norm)))


def _computes(norm: Any, c: float) -> bool:
    x = torch.linspace(-1, 1.5, norm.weight.shape[-1], dtype=norm.weight.dtype)[None]
    rtol = 1e-2 if x.dtype.itemsize == 2 else 1e-4
    with torch.no_grad():
        return bool(torch.allclose(type(norm).forward(norm, x), _normed(norm, x, c), rtol=rtol))
