"""Which MLPs are understood: names, shapes, and neurons that do not notice each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vlmcut.surgery.cuts import take_neurons
from vlmcut.surgery.neurons import find_mlp, solid


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))

    def act(self, x: Tensor) -> Tensor:
        return torch.nn.functional.gelu(x)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 12, bias=False), nn.Linear(8, 12)
        self.down_proj = nn.Linear(12, 8, bias=False)
        self.intermediate_size = 12

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Softmax(Plain):
    def act(self, x: Tensor) -> Tensor:
        return x.softmax(dim=-1)


class Normed(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)

    def act(self, x: Tensor) -> Tensor:
        return self.norm(x)


class Shuffled(Plain):
    def act(self, x: Tensor) -> Tensor:
        return x.flip(-1)


class Two(Plain):
    def forward(self, x: Tensor, more: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) + more


class Halved(Plain):
    """Gate and up in one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, 24)

    def act(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return gate.sigmoid() * up


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 8)
        self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 8)  # of its own, no MLP


class Block(nn.Module):
    def __init__(self, *mlps: nn.Module, **named: nn.Module) -> None:
        super().__init__()
        self.attention = Attention()
        for name, mlp in ({f"mlp_{i}": m for i, m in enumerate(mlps)} | named).items():
            self.add_module(name, mlp)


@pytest.mark.parametrize("kind", [Plain, Gated])
def test_an_mlp_is_found_beside_attention(kind: type[Any]) -> None:
    block = Block(kind())
    assert solid([block]) is None
    mlp = find_mlp(block)
    assert mlp is not None and mlp.neurons == 12 and mlp.reads.out_features == 8
    assert [linear.out_features for linear in mlp.makes] == [12] * (1 + (kind is Gated))


@pytest.mark.parametrize("kind", [Plain, Gated])
def test_taken_neurons_are_copies_in_order(kind: type[Any]) -> None:
    block = Block(kind())
    mlp = find_mlp(block)
    assert mlp is not None
    x, keep = torch.randn(3, 8), [7, 0, 3]
    stays = torch.zeros(12)
    stays[keep] = 1
    hook = mlp.reads.register_forward_pre_hook(lambda _, args: (args[0] * stays,))
    want = mlp.module(x)
    hook.remove()
    rows = [linear.weight.detach()[[0, 3, 7]].clone() for linear in mlp.makes]
    take_neurons(mlp, keep)
    assert mlp.neurons == 3 and getattr(mlp.module, "intermediate_size", 3) == 3
    assert all(torch.equal(linear.weight, row) for linear, row in zip(mlp.makes, rows, strict=True))
    torch.testing.assert_close(mlp.module(x), want, rtol=0, atol=1e-6)  # float32: zeros left out of a 12-long sum


@pytest.mark.parametrize(
    ("block", "why"),
    [
        (Block(Softmax()), "the neurons of layer 1 (`Softmax`) depend on each other"),
        (Block(Shuffled()), "the neurons of layer 1 (`Shuffled`) depend on each other"),
        (Block(Two()), "the neurons of layer 1 (`Two`) depend on each other"),
        (Block(Normed()), "layer 1 (`Block`) has no single MLP of gate_proj/up_proj/down_proj or"),
        (Block(Halved()), "layer 1 (`Block`) has no single MLP of"),
        (Block(), "layer 1 (`Block`) has no single MLP of"),
        (Block(Plain(), Gated()), "layer 1 (`Block`) has no single MLP of"),
        (Block(experts=nn.ModuleList([Plain(), Plain()])), "layer 1 is a mixture of experts"),
        (Block(Plain(), shared_expert=nn.Linear(2, 2)), "layer 1 is a mixture of experts"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_is_not_understood(block: Block, why: str) -> None:
    found = solid([Block(Plain()), block])
    assert found is not None and found.startswith(why)
    assert solid([]) == "it is not a stack of transformer layers"


def test_experts_are_no_mlp() -> None:
    assert find_mlp(Block(Plain(), experts=nn.Linear(2, 2))) is None


def test_it_works_on_the_meta_device() -> None:
    with torch.device("meta"):
        block = Block(Gated())
    assert solid([block]) is None
    assert next(block.parameters()).is_meta
