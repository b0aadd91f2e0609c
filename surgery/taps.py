"""Queries and keys where a block hands them to its attention function.

Norms, rotary embeddings and a fused qkv then need no code of ours, and nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_NAME = "vlmcut_tap"  # in transformers' registry; one longer for each one inside another
Attention = Callable[..., Any]


@contextmanager
def intercepting(configs: Sequence[Any], wrap: Callable[[Attention], Attention]) -> Iterator[None]:
    """While inside, attention of the modules with these configs is computed by `wrap` of what computed it before."""
    before = configs[0]._attn_implementation
    name = before + "'" if before.startswith(_NAME) else _NAME
    inner = ALL_ATTENTION_FUNCTIONS[before]
    ALL_ATTENTION_FUNCTIONS[name] = wrap(inner)
    # Without one of its name a mask is dropped silently. transformers asks the global table: only `register` fills it.
    masks = ALL_MASK_ATTENTION_FUNCTIONS._global_mapping
    if before in masks:
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[before])
    for config in configs:  # `_attn_implementation` would set the masks of all parts of a composite config too
        config._attn_implementation_internal = name
    try:
        yield
    finally:
        for config in configs:
            config._attn_implementation_internal = before
        del ALL_ATTENTION_FUNCTIONS[name]
        masks.pop(name, None)


@dataclass
class Calls:
    """What one attention was given: q and k of each call, [B, heads, rows, head_dim]."""

    rows: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)  # v of each call, where it was asked for
    scale: float = 1.0


@contextmanager
def tapping(blocks: Mapping[int, Any]) -> Iterator[Mapping[int, Calls]]:
    """While inside, keep the q and k of these attentions, block -> module: what scores are made of."""
    taps = {block: Calls() for block in blocks}
    if not blocks:
        yield taps
        return
    wanted = {id(module): taps[block] for block, module in blocks.items()}

    def wrap(inner: Attention) -> Attention:
        def function(module: Any, q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Any:
            tap = wanted.get(id(module))
            if tap is not None:
                tap.rows.append((q, k))
                tap.scale = kwargs.get("scaling") or q.shape[-1] ** -0.5
            return inner(module, q, k, *args, **kwargs)

        return function

    with intercepting(list({id(m.config): m.config for m in blocks.values()}.values()), wrap):
        yield taps


def peek(config: Any, run: Callable[[], Any]) -> Calls:
    """The q, k and v of the one attention that `run` calls.

    What is made of them is nobody's input, so that a graph gets its norm and projections, which share their weights
    with the layer's own.
    """
    found = Calls()

    def function(module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        found.rows.append((q, k))
        found.values.append(v)
        found.scale = kwargs.get("scaling") or q.shape[-1] ** -0.5
        return q.transpose(1, 2), None  # of the right shape; an exception would lose a trace's place

    with intercepting([config], lambda inner: function):
        run()
    return found
