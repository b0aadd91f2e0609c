"""Int8 linears whose eager arithmetic is the runtime's, operator by operator.

Weights: signed int8, symmetric, one scale per output channel. Activations: uint8, asymmetric, one scale per tensor,
found at run time exactly as ONNX `DynamicQuantizeLinear` does; products accumulate in int32. Signed weights matter:
on x86 with VNNI or AMX they use the fast kernel, unsigned ones run eight times slower.

The scale is per item of the leading axis here and per call there; the runtime runs one item per call.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 per row: [out, in] -> int8 [out, in] and float32 scales [out]; weight = int8 * scale."""
    scale = weight.float().abs().amax(dim=1) / 127
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (weight.float() / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def quantize_activation(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ONNX DynamicQuantizeLinear for each item of the leading axis.

    Returns:
        Integers 0..255 in x's dtype and shape, scale and zero point, each [items, 1, ...].
    """
    axes = tuple(range(1, x.dim()))
    low = x.amin(dim=axes, keepdim=True).clamp(max=0)  # the range always holds 0, so padding of zeros is exact
    high = x.amax(dim=axes, keepdim=True).clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = (-low / scale).round().clamp(0, 255)
    return ((x / scale).round() + zero).clamp(0, 255), scale, zero


@torch.library.custom_op("vlmcut::dynamic_int8_linear", mutates_args=())
def dynamic_int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T with quantized operands; x [items, ..., in], weight int8 [out, in], scale [out]."""
    q, x_scale, x_zero = quantize_activation(x)
    # int8 x int8 -> int32 needs signed operands: shift by 128 and put the shift back through the sums of the weight's
    # rows, which a row of ones gives in the same product.
    rows = (q - 128).to(torch.int8).reshape(-1, x.shape[-1])
    product = torch.ops.aten._int_mm(torch.cat([rows, rows.new_ones(1, rows.shape[1])]), weight.t())
    product, sums = product[:-1], product[-1]
    product = product.reshape(*x.shape[:-1], -1) + (128 - x_zero).to(torch.int32) * sums
    out = product.to(x.dtype) * (x_scale * scale.to(x.dtype))
    return out if bias is None else out + bias


@register_flop_formula(torch.ops.vlmcut.dynamic_int8_linear)
def _(x: Sequence[int], weight: Sequence[int], *shapes: Any, out_shape: Any = None, **given: Any) -> int:
    """Of shapes: what the same linear in float does."""
    return 2 * prod(x) * weight[0]


@dynamic_int8_linear.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


class Int8Linear(nn.Module):
    """A linear with an int8 weight [out, in] and a float32 scale per output."""

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)

    @classmethod
    def of(cls, linear: nn.Linear) -> Int8Linear:
        bias = None if linear.bias is None else linear.bias.detach()
        return cls(*quantize_weight(linear.weight.detach()), bias)

    def forward(self, x: Tensor) -> Tensor:
        return dynamic_int8_linear(x, self.weight, self.weight_scale, self.bias)


class Int8Embedding(nn.Module):
    """An embedding table in int8 with a scale per row; shared with the output projection where they are tied."""

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype, times: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale.to(dtype))
        self.times = times  # what the family multiplies its embeddings with (Gemma: the root of the width)

    def forward(self, ids: Tensor) -> Tensor:
        scale = self.weight_scale[ids].unsqueeze(-1)
        return self.weight[ids].to(scale.dtype) * scale * self.times
