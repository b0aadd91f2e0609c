"""Layers of the language model of which the visual columns of a prompt use some heads or some neurons, and text all.

Visual columns run through rows and columns of the layer's own weights, taken where they are needed: a graph holds the
whole weights once, and gathers the part from them.

Source: YOPO, "Treat visual tokens as text? But your MLLM only needs fewer efforts to see" (arXiv:2410.06169).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from .neurons import Mlp, find_mlp
from .rows import Half, Reader, Split, doing, halves, take
from .selection import Members
from .structure import find_attention, head_dim, output_name, query_heads


@contextmanager
def slimming(layers: Sequence[Any], config: Any, slim: Mapping[str, Members], reader: Reader) -> Iterator[None]:
    """While inside, visual columns of the prompts that the layers read use these heads and neurons alone.

    Args:
        config: of the language model.
        slim: `heads` and `neurons`, either may be absent.
    """
    with ExitStack() as stack:
        for index, kept in slim.get("heads", {}).items():
            attention = find_attention(layers[index])
            assert attention is not None
            stack.enter_context(doing(attention, _some_heads(attention, kept, config, reader)))
        for index, kept in slim.get("neurons", {}).items():
            mlp = find_mlp(layers[index])
            assert mlp is not None
            stack.enter_context(doing(mlp.module, _some_neurons(mlp, kept, reader)))
        yield


def _some_neurons(mlp: Mlp, kept: Sequence[int], reader: Reader) -> Callable[[Tensor], Tensor]:
    """An MLP of which visual columns use these neurons."""
    forward = mlp.module.forward

    def run(x: Tensor) -> Tensor:
        parts = reader.split
        if parts.visual.shape[1] == 0:  # a prompt of text, in eager
            return forward(x)
        text = forward(take(x, parts.text, -2, -3))
        with _narrowed(mlp.makes, mlp.reads, kept):
            return parts.join(text, forward(take(x, parts.visual, -2, -3)))

    return run


def _some_heads(attention: Any, kept: Sequence[int], config: Any, reader: Reader) -> Callable[..., tuple[Tensor, None]]:
    """An attention of which visual columns ask with these query heads; keys and values are made for all."""
    forward, width, heads = attention.forward, head_dim(attention), query_heads(attention)
    reads = getattr(attention, output_name(attention))
    numbers = [head * width + i for head in kept for i in range(width)]
    parted = halves(
        lambda hidden_states, **given: forward(hidden_states=hidden_states, **given)[0],
        config,
        reader,
        _asking(kept, heads),
        lambda: _narrowed([attention.q_proj], reads, numbers),
    )

    def run(hidden_states: Tensor, **given: Any) -> tuple[Tensor, None]:
        return parted(hidden_states, **given), None

    return run


def _asking(kept: Sequence[int], heads: int) -> Half:
    """Attention of visual columns in some of the query heads to the columns that they see."""

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, parts: Split, seen: Tensor) -> Tensor:
        """[B, kept, N, d] against [B, kv_heads, S, d] -> [B, N, kept, d]."""
        if not kept:  # nobody reads it
            return q.transpose(1, 2)
        group = torch.tensor([head // (heads // k.shape[1]) for head in kept])
        k, v = k.index_select(1, group), v.index_select(1, group)
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = (q @ k.transpose(-1, -2)).to(wide) * scale
        scores = torch.where(seen, scores, torch.finfo(wide).min)
        return (torch.softmax(scores, dim=-1).to(v.dtype) @ v).transpose(1, 2)

    return attend


@contextmanager
def _narrowed(makes: Sequence[Any], reads: Any, kept: Sequence[int]) -> Iterator[None]:
    """While inside, linears make only these numbers, and `reads` sums over them alone; over none, it adds its bias."""
    with ExitStack() as stack:
        if kept:
            for linear in makes:
                stack.enter_context(doing(linear, _part(linear, 0, kept)))
        stack.enter_context(doing(reads, _part(reads, 1, kept) if kept else _bias(reads)))
        yield


def _part(linear: Any, axis: int, kept: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """What a linear, int8 or not, does with these rows (axis 0) or columns (axis 1) of its weight."""
    part, index = copy.copy(linear), torch.tensor(kept)
    found = {"weight": linear.weight.t().index_select(1 - axis, index).t()}  # transposed first, as whole products are
    for name in ("bias", "weight_scale") if axis == 0 else ():
        if getattr(linear, name, None) is not None:
            found[name] = getattr(linear, name).index_select(0, index)
    part._parameters = {name: found.get(name, tensor) for name, tensor in linear._parameters.items()}
    part._buffers = {name: found.get(name, tensor) for name, tensor in linear._buffers.items()}
    return part.forward


def _bias(linear: Any) -> Callable[[Tensor], Tensor]:
    """A linear of which no column is left."""

    def run(x: Tensor) -> Tensor:
        out = x.new_zeros((*x.shape[:-1], linear.out_features))
        return out if linear.bias is None else out + linear.bias

    return run
