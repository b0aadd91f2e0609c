"""The hook into the tower's blocks: between attention and MLP, where tokens may merge or leave.

transformers' pre-norm blocks compute x + attention(norm1(x)), then x + mlp(norm2(x)), in one method that leaves no
room between the two. While inside `between`, every block runs the same arithmetic from its own four modules, with a
step of the method's in the middle. That both are the same to the bit is proved on random rows before it is relied on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .norms import is_norm
from .selection import Rows, Tap
from .structure import find_attention, mlp_linears

Step = Callable[[Rows, int], Rows]  # what goes on of the rows, and how many tokens leave


@dataclass(frozen=True)
class PreNorm:
    """The four modules of a pre-norm block."""

    norm1: nn.Module
    attention: Any
    norm2: nn.Module
    mlp: nn.Module

    def attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        out = self.attention(hidden_states=self.norm1(x), attention_mask=mask)
        return x + (out[0] if isinstance(out, tuple) else out)

    def think(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm2(x))


def pre_norm(block: nn.Module) -> PreNorm | None:
    """The modules of a block of two norms, an attention and an MLP, and no more; None for any other."""
    children = list(block.children())
    norms = [m for m in children if isinstance(m, nn.LayerNorm) or is_norm(m)]
    attention = find_attention(block)
    others = [m for m in children if m not in norms and m is not attention]
    if len(norms) != 2 or len(others) != 1 or attention not in children or not mlp_linears(others[0]):
        return None
    own = any(True for _ in block.parameters(recurse=False))  # a scale of the layer's: not understood
    return None if own else PreNorm(norms[0], attention, norms[1], others[0])


def rigid(blocks: Sequence[nn.Module]) -> str | None:
    """Why nothing can be done between attention and MLP of these blocks; None if it can."""
    found = [pre_norm(block) for block in blocks]
    if not found or not all(parts is not None and hasattr(parts.attention, "config") for parts in found):
        return "its tower is not a stack of plain pre-norm blocks"
    return None


@torch.no_grad()
def prove(blocks: Sequence[Any]) -> None:
    """Check that our block is transformers' own, to the bit, on random rows and random weights.

    Raises:
        ModelError: naming the block that is not.
    """
    for index, block in enumerate(blocks):
        one = copy.deepcopy(block)  # weights may be unset here: a folder's come after its recipe
        rng = torch.Generator().manual_seed(index)
        for tensor in (t for t in one.parameters() if t.is_floating_point()):
            tensor.copy_(torch.randn(tensor.shape, generator=rng) / 4)
        parts = pre_norm(one)
        assert parts is not None  # `rigid` refused in plan
        weight: Any = parts.norm1.weight
        x = torch.randn(1, 7, weight.shape[-1], generator=rng).to(weight.dtype)
        want = one(x, None)
        if not (isinstance(want, Tensor) and torch.equal(parts.think(parts.attend(x, None)), want)):
            raise ModelError(
                f"tower block {index} of type `{type(block).__name__}` does not compute x + attention(norm1(x)), then "
                "x + mlp(norm2(x))",
                hint="choose a method that works after the encoder",
            )


@dataclass
class Stream:
    """The rows that are left, from block to block; after the tower, what its output stands for."""

    rows: Rows | None = None  # None before the first block in which tokens leave

    def places(self, has_cls: bool) -> Tensor:
        """The patch whose place each token takes, int64 [T], in the order of the tower's output."""
        assert self.rows is not None
        return self.rows.place[0, int(has_cls) :]


@contextmanager
def between(
    blocks: Sequence[Any], taps: Mapping[int, Any], leaving: Sequence[int], step: Step, has_cls: bool
) -> Iterator[Stream]:
    """While inside, `leaving[i]` tokens leave the tower between attention and MLP of block i.

    Args:
        taps: for each block, `rows` of q and k and a `scale`, filled when its attention runs.
    """
    stream = Stream()
    for index, block in enumerate(blocks):
        block.forward = _forward(pre_norm(block), taps[index], index, leaving[index], step, has_cls, stream)
    try:
        yield stream
    finally:
        for block in blocks:
            del block.forward


def _forward(
    parts: PreNorm | None, tap: Any, index: int, leaving: int, step: Step, has_cls: bool, stream: Stream
) -> Callable[..., Tensor]:
    assert parts is not None

    def forward(x: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Tensor:
        assert attention_mask is None and len(x) == 1  # one picture, whose rows all see each other
        before = stream.rows
        x = parts.attend(x, None if before is None else before.bias(x.dtype))
        if leaving:
            rows = Rows.whole(x, has_cls) if before is None else before.now(x)
            stream.rows = step(rows.seen(Tap(index, (tap.rows[-1],), tap.scale)), leaving)
            x = stream.rows.x
        return parts.think(x)

    return forward
