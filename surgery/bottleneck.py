"""A bottleneck in the language model: text sees a picture through a few of its columns, which see all of it.

Those columns are the carriers, the last visual ones of each picture. Attention is split in two in every layer. Text
and carriers attend to text and carriers, and only these enter the cache; visual columns attend to all that they saw
before. Norms, projections and MLPs stay whole: nothing is computed twice but the carriers' attention.

Source: VoCo-LLaMA (arXiv:2406.12275). We differ: see passes/bottleneck.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .picking import topk
from .rows import Reader, take
from .taps import Attention, intercepting


@dataclass(frozen=True)
class Neck:
    """What is left of B prompts behind the bottleneck: text, carriers and padding."""

    kept: Tensor  # int64 [B, K], ascending: their columns
    text: Tensor  # int64 [B, T]: where those of `Split.text` stand among them

    @classmethod
    def of(cls, index: Tensor, image: Tensor, real: Tensor, count: int, carriers: int, text: int) -> Neck:
        """Find the carriers.

        Args:
            index: int64 [B, S], which visual token a column takes, ascending in each picture; -1 for text.
            image: int64 [B, S], of which picture that is; -1 for text.
            real: bool [1, S], which columns are no padding.
            count: pictures of each prompt; of a graph, at most.
            carriers: of each picture.
            text: columns that are no visual token; of a graph, with all its pictures.
        """
        last = torch.where(image[:, None] == torch.arange(count)[:, None], index[:, None], -1).amax(dim=-1)
        carries = (index >= 0) & (index > last.gather(1, image.clamp(min=0)) - carriers)
        rank = torch.where(index >= 0, 2 * carries.to(torch.int64), 1 + real.to(torch.int64))
        kept = torch.sort(topk(rank.to(torch.float32), text + count * carriers), dim=-1).values
        words = topk(torch.where(take(carries, kept, -1, -2), 0.0, 1.0), text)
        return cls(kept, words)

    def forget(self, cache: Any) -> None:
        """Leave in an eager cache what the graphs keep."""
        for layer in cache.layers:
            layer.keys, layer.values = (take(x, self.kept, -2, -4) for x in (layer.keys, layer.values))


@contextmanager
def narrowing(config: Any, neck: Neck, reader: Reader) -> Iterator[None]:
    """While inside, the language model with this config reads whole prompts through a bottleneck.

    Args:
        reader: who knows the columns of these prompts.
    """
    parts, seen = reader.split, reader.seen(reader.split.visual)

    def wrap(inner: Attention) -> Attention:
        def of_kept(x: Tensor) -> Tensor:
            return take(x, neck.kept, -2, -4)

        def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any = None, **given: Any) -> Any:
            step = given.pop("step", None)
            few = [of_kept(x) for x in (q, k, v)]
            if step is None:
                among = None if mask is None else take(of_kept(mask), neck.kept, -1, -4)
                words, _ = inner(module, *few, among, **given)
                pictures, _ = inner(module, take(q, parts.visual, -2, -4), k, v, seen, **given)
            else:  # of a graph, which knows masks and rows by its step
                words, _ = inner(module, *few, mask, **given, step=step.among(neck.kept))
                pictures, _ = inner(module, q, k, v, mask, **given, step=step.beside(seen, parts.visual))
            words = take(words.flatten(2), neck.text, -2, -3)
            return parts.join(words, pictures.flatten(2)).unflatten(-1, pictures.shape[2:]), None

        return attention

    with intercepting([config], wrap):
        yield
