"""Layers of the language model in which the visual columns of a prompt do less work than its text.

Columns are split in two, so that the work falls in the graph too: products over fewer rows, not masks. What visual
tokens may do without is asked by YOPO ("Treat visual tokens as text? But your MLLM only needs fewer efforts to see",
arXiv:2410.06169) and, of attention among themselves, by SAISA (NAAViT, arXiv:2502.02458). Neighbours are gathered by a
constant index, so that no block of all visual columns by all of them is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..manifest import Panel
from .anatomy import Idle
from .near import neighbours, repeated
from .neurons import find_mlp
from .picking import topk
from .taps import intercepting, peek

# What a layer is given beside hidden states: the axes of it that are columns, and the one that is prompts.
AXES = {"position_embeddings": ((-2,), -3), "position_ids": ((-1,), -2), "attention_mask": ((-1, -2), -4)}
BESIDE = ((-2,), -3)  # and of what it is given behind them, by place: more of the same columns (Gemma 4)


def take(x: Any, index: Tensor, axis: int, prompts: int) -> Any:
    """The given entries of an axis, others for each prompt; both axes count from the end. Of a tuple, each.

    Args:
        index: int64 [B, n].
        prompts: the axis of the B prompts, 1 if all have the same.
    """
    if isinstance(x, tuple):
        return tuple(take(one, index, axis, prompts) for one in x)
    if len(index) == 1:
        return x.index_select(axis, index[0])
    shape = list(x.shape)
    shape[prompts] = len(index)
    each = zip(x.expand(shape).split(1, prompts), index, strict=True)
    return torch.cat([one.index_select(axis, entries) for one, entries in each], dim=prompts)


@dataclass(frozen=True)
class Split:
    """Columns of B prompts in two groups: text and visual ones; padding may be in either."""

    text: Tensor  # int64 [B, T]
    visual: Tensor  # int64 [B, N]
    back: Tensor  # int64 [B, T + N]: where each column stands in text, then visual

    @classmethod
    def of(cls, visual: Tensor, real: Tensor, count: int) -> Split:
        """Split columns.

        Args:
            visual: bool [B, S]. real: bool [1, S]. count: visual columns of a prompt; of a graph, at most.
        """
        rank = torch.where(visual, 0, 1 + real.to(torch.int64)).to(torch.float32)
        order = topk(rank, visual.shape[1])  # text, padding, visual, each in order
        text = visual.shape[1] - count
        return cls(order[:, :text], order[:, text:], torch.sort(order, dim=-1, stable=True).indices)

    def join(self, text: Tensor, visual: Tensor) -> Tensor:
        """[B, T, d] and [B, N, d] -> [B, S, d]."""
        return take(torch.cat([text, visual], dim=-2), self.back, -2, -3)


class Reader(Protocol):
    """Who knows which columns the layers see by now."""

    @property
    def split(self) -> Split: ...

    def seen(self, rows: Tensor) -> Tensor:
        """Which columns these ones see, int64 [B, n] -> bool [B, 1, n, S]."""
        ...

    def real(self, rows: Tensor) -> Tensor:
        """Which of these are no padding, int64 [B, n] -> bool [B, n]."""
        ...


@contextmanager
def idling(layers: Sequence[Any], config: Any, idle: Idle, panels: tuple[Panel, ...], reader: Reader) -> Iterator[None]:
    """While inside, visual columns of the prompts that the layers read leave work out.

    Args:
        config: of the language model.
        panels: of every image, where columns see their neighbours.
    """
    with ExitStack() as stack:
        for index in idle.mlp:
            mlp = find_mlp(layers[index])
            assert mlp is not None
            stack.enter_context(doing(mlp.module, _text_alone(mlp.module.forward, reader)))
        visuals: dict[int, Half | None] = dict.fromkeys(idle.layers) | dict.fromkeys(idle.apart, _own_column)
        if idle.near:
            visuals |= dict.fromkeys(idle.near, _neighbours(panels, idle.window))
        for index, visual in visuals.items():
            layer = layers[index]
            stack.enter_context(doing(layer, halves(layer.forward, config, reader, visual)))
        yield


@contextmanager
def doing(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """While inside, this is what a module does."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _text_alone(forward: Callable[..., Tensor], reader: Reader) -> Callable[..., Tensor]:
    """An MLP of which visual columns get nothing."""

    def run(x: Tensor) -> Tensor:
        parts = reader.split
        y = forward(take(x, parts.text, -2, -3))
        return parts.join(y, y.new_zeros(len(x), parts.visual.shape[1], y.shape[-1]))

    return run


@dataclass
class _Given:
    """A cache that is told other keys and values than the layer made of its few columns."""

    cache: Any
    k: Tensor
    v: Tensor

    def update(self, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.cache.update(self.k, self.v, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


Half = Callable[[Tensor, Tensor, Tensor, float, Split, Tensor], Tensor]


def halves(
    forward: Callable[..., Any],
    config: Any,
    reader: Reader,
    visual: Half | None,
    narrowed: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Callable[..., Any]:
    """A layer, or an attention, that runs on text columns, and apart from them on visual ones, inside `narrowed`.

    All columns give keys and values, which text sees as ever. Without `visual` visual columns go by.
    """

    def run(x: Tensor, *rest: Any, **given: Any) -> Any:
        parts = reader.split
        if parts.visual.shape[1] == 0:  # a prompt of text, in eager
            return forward(x, *rest, **given)
        alone = {"past_key_values": None, "use_cache": False}
        calls = peek(config, lambda: forward(x, *rest, **given | alone))
        ((_, k),), (v,) = calls.rows, calls.values

        def half(columns: Tensor, **other: Any) -> Any:
            return forward(*of_columns(columns, x, *rest), **of_columns_by_name(columns, given) | other)

        step, seen = given.get("step"), reader.seen(parts.text)
        mask = {"attention_mask": seen} if step is None else {}
        with nullcontext() if step is None else step.asking(seen, parts.text):
            text = half(parts.text, past_key_values=_Given(given["past_key_values"], k, v), **mask)
        if visual is None:
            other = take(x, parts.visual, -2, -3)
        else:

            def attention(module: Any, q: Tensor, *_: Any, half: Half = visual, **__: Any) -> tuple[Tensor, None]:
                out = half(q, k, v, calls.scale, parts, reader.seen(parts.visual))
                # Padding stays zero: an int8 scale must not see it.
                return torch.where(reader.real(parts.visual)[..., None, None], out, 0), None

            with intercepting([config], lambda inner: attention), narrowed():
                other = half(parts.visual, **alone)
        return parts.join(text, other)

    return run


def _own_column(q: Tensor, k: Tensor, v: Tensor, scale: float, parts: Split, seen: Tensor) -> Tensor:
    """Attention of visual columns to the text that they see and to themselves: [B, heads, N, d] -> [B, N, heads, d]."""
    group = q.shape[1] // k.shape[1]
    k_own, v_own = (take(t, parts.visual, -2, -4).repeat_interleave(group, dim=1) for t in (k, v))
    own = (q * k_own).sum(dim=-1, keepdim=True)
    words, share = _beside_text(q, k, v, scale, parts, seen, own)
    return (words + share * v_own).transpose(1, 2)


def _neighbours(panels: tuple[Panel, ...], window: int) -> Half:
    """Attention of visual columns to the text that they see and to those next to them in the panels of their image."""

    def half(q: Tensor, k: Tensor, v: Tensor, scale: float, parts: Split, seen: Tensor) -> Tensor:
        index, there = map(torch.from_numpy, repeated(neighbours(panels, window), q.shape[2]))
        columns = parts.visual.index_select(1, index.flatten())
        k_near, v_near = (take(t, columns, -2, -4).unflatten(-2, index.shape) for t in (k, v))
        grouped = q.unflatten(1, (k.shape[1], -1)).transpose(2, 3)  # [B, kv_heads, N, heads of one, d]
        own = (grouped @ k_near.transpose(-1, -2)).transpose(2, 3).flatten(1, 2)
        words, share = _beside_text(q, k, v, scale, parts, seen, own, there)
        found = share.unflatten(1, (k.shape[1], -1)).transpose(2, 3) @ v_near
        return (words + found.transpose(2, 3).flatten(1, 2)).transpose(1, 2)

    return half


def _beside_text(
    q: Tensor, k: Tensor, v: Tensor, scale: float, parts: Split, seen: Tensor, own: Tensor, there: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One softmax over the text that visual columns see and `m` others.

    Args:
        own: products with the keys of those others, [B, heads, N, m], not scaled.
        there: bool [N, m], which of them are seen; None: all.

    Returns:
        What they take from text, [B, heads, N, d], and what they give to the others, [B, heads, N, m].
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    group, least = q.shape[1] // k.shape[1], torch.finfo(wide).min
    k_text, v_text = (take(t, parts.text, -2, -4) for t in (k, v))
    if group > 1:
        k_text, v_text = (t.repeat_interleave(group, dim=1) for t in (k_text, v_text))
    words = torch.where(take(seen, parts.text, -1, -4), (q @ k_text.transpose(-1, -2)).to(wide) * scale, least)
    own = own.to(wide) * scale
    own = own if there is None else torch.where(there, own, least)
    share = torch.softmax(torch.cat([words, own], dim=-1), dim=-1).to(v.dtype)
    text = words.shape[-1]
    return share[..., :text] @ v_text, share[..., text:]


def of_columns(columns: Tensor, x: Tensor, *beside: Any) -> list[Any]:
    """What a layer is given by place, for these of its columns alone, int64 [B, n]."""
    (axis,), prompts = BESIDE
    return [take(one, columns, axis, prompts) for one in (x, *beside)]


def of_columns_by_name(columns: Tensor, given: Mapping[str, Any]) -> dict[str, Any]:
    """What it is given by name; a mask is given anew."""

    def one(name: str, value: Any) -> Any:
        if name not in AXES or name == "attention_mask" or value is None:
            return value
        (axis,), prompts = AXES[name]
        return take(value, columns, axis, prompts)

    return {name: one(name, value) for name, value in given.items()}
