"""RMS norms are known by what they compute, not by their name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRMSNorm
from vlmcut.surgery import norms

WIDTH = 12
CASES = [(LlamaRMSNorm, 0.0), (Qwen2VLRMSNorm, 0.0), (GemmaRMSNorm, 1.0), (Gemma3RMSNorm, 1.0)]


def drawn(kind: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A norm with weights that are nowhere neutral."""
    norm = kind(WIDTH, eps=1e-3)
    norm.weight.data = torch.linspace(-0.7, 1.3, WIDTH)
    return norm.to(dtype)


class Centred(LlamaRMSNorm):
    """Called an RMS norm, but it takes the mean off first."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))


class TwoRMSNorm(LlamaRMSNorm):
    """Multiplies by 2 + weight, as nothing does."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        ones = torch.full_like(self.weight, 2.0)
        return hidden_states * torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + 1e-3) * (ones + self.weight)


CentredRMSNorm = type("CentredRMSNorm", (Centred,), {})


class BareRMSNorm(nn.Module):
    """Without a weight there is nothing to hand to an operator."""

    eps = 1e-3

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("kind", "offset"), CASES, ids=lambda v: getattr(v, "__name__", ""))
def test_the_offset_is_asked_of_the_module(kind: Any, offset: float, dtype: torch.dtype) -> None:
    norm = drawn(kind, dtype)
    assert norms.is_norm(norm) and norms.epsilon(norm) == 1e-3
    assert norms.offset(norm) == offset
    # A fresh one too: Llama's weights are 1, Gemma's 0, and both then compute the same.
    assert norms.offset(kind(WIDTH)) == offset


@pytest.mark.parametrize("norm", [drawn(CentredRMSNorm), drawn(TwoRMSNorm)], ids=lambda n: type(n).__name__)
def test_a_name_is_not_enough(norm: Any) -> None:
    assert norms.is_norm(norm) and norms.offset(norm) is None


def test_what_is_no_norm() -> None:
    for module in (nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), BareRMSNorm(), drawn(Centred)):
        assert not norms.is_norm(module) and norms.offset(module) is None
    with torch.device("meta"):
        empty = LlamaRMSNorm(WIDTH)
    assert norms.is_norm(empty) and norms.offset(empty) is None  # nothing to compute with


@pytest.mark.parametrize(("kind", "offset"), CASES, ids=lambda v: getattr(v, "__name__", ""))
def test_widened_norms_compute_in_float64(kind: Any, offset: float) -> None:
    plain = drawn(kind, torch.float64)
    wide = nn.Sequential(copy.deepcopy(plain))
    norms.widen(wide)
    x = torch.randn(3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = [row / (sum(float(v) ** 2 for v in row) / WIDTH + 1e-3) ** 0.5 for row in x]
    want = torch.stack(rows) * (offset + plain.weight)
    with torch.no_grad():
        # float64: a few last bits of numbers below 4, 4.4e-16 each.
        torch.testing.assert_close(wide(x), want, rtol=0, atol=4e-15)
        # Negative control: transformers' own computes in float32, a hundred million times coarser.
        assert (plain(x) - want).abs().max() > 1e-9


def test_widening_touches_only_what_is_known(tiny) -> None:
    """Gemma 3's own model: its norms and no other module; those that are not understood stay as they are."""
    model = tiny("gemma3").model.double()
    strange = nn.ModuleList([drawn(CentredRMSNorm, torch.float64), nn.LayerNorm(WIDTH, dtype=torch.float64)])
    model.strange = strange
    found = [m for m in model.modules() if norms.offset(m) is not None]
    norms.widen(model)
    changed = [m for m in model.modules() if "forward" in vars(m)]
    assert changed == found and len(found) > 6 and all(type(m) is Gemma3RMSNorm for m in found)
    x = torch.randn(2, found[0].weight.shape[0], dtype=torch.float64)
    with torch.no_grad():
        outs = [m(x) for m in found if m.weight.shape[0] == x.shape[1]]
    assert len({tuple(out[0].tolist()) for out in outs}) == len(outs) > 2  # each computes with its own weight
