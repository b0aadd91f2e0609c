"""A prompt read by the eager model, token by token: transformers' own language model, fed as the graphs are.

This is what calibration watches, what answers questions in eager, and what judges the graphs. Several prompts of one
length are read together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..manifest import visual_left
from ..prompt import Picture, Prompt
from .anatomy import Idle
from .bottleneck import Neck
from .inside import Columns, Landing, Passage, passing
from .load import locate
from .selection import attached
from .vision import Seen, prepare, read_question, see

Change = Callable[[Tensor], Tensor]


def unchanged(x: Tensor) -> Tensor:
    """The identity."""
    return x


def see_picture(model: Any, picture: Picture, change: Change = unchanged, learn: bool = False) -> Seen:
    """One picture with as many tokens as its bucket keeps; `learn` lets gradients through."""
    about = attached(model)
    pixels = change(torch.from_numpy(picture.pixel_values)).to(model.dtype)
    keep = about.keep(picture.bucket(about.buckets))
    with torch.set_grad_enabled(learn):
        return see(model, pixels, prepare(model, picture.geometry), keep, read_question(model, picture.question))


def see_all(model: Any, prompt: Prompt, learn: bool = False) -> tuple[Prompt, list[Seen]]:
    """The pictures of an unshrunk prompt, and the prompt shrunk to the kept tokens; `learn` lets gradients through."""
    seen = [see_picture(model, picture, learn=learn) for picture in prompt.pictures]
    return prompt.shrink([s.kept.numpy() for s in seen]), seen


@dataclass
class Talk:
    """Prompts that have been read: logits after their last token and the cache, to be continued."""

    model: Any
    logits: Tensor  # [B, V]
    cache: Any
    positions: Tensor  # int64 [B]: of the next token
    hidden: Tensor  # [B, L, hidden]: last hidden states of the columns that were read last
    kept: tuple[Tensor, ...] = ()  # for each rung of the ladder, the columns that went on, int64 [B, S]

    @classmethod
    def read(
        cls,
        model: Any,
        prompts: Sequence[Prompt],
        seen: Sequence[Sequence[Seen]],
        change: Change = unchanged,
        learn: bool = False,
    ) -> Talk:
        """Read shrunk prompts of one length, unpadded, with what their pictures became.

        Args:
            change: edits what enters the language model.
            learn: let gradients through.
        """
        with torch.set_grad_enabled(learn):
            return cls._read(model, prompts, seen, change)

    @classmethod
    def _read(cls, model: Any, prompts: Sequence[Prompt], seen: Sequence[Sequence[Seen]], change: Change) -> Talk:
        parts = locate(model)
        ids, index = (torch.from_numpy(np.concatenate([getattr(p, n) for p in prompts])) for n in _COLUMNS)
        about, place = attached(model), index >= 0
        family = about.family
        ids = ids.masked_fill(place, 0)  # an image token may have no row
        if about.vocabulary is not None:  # a prompt may be older than the cut
            about.vocabulary.check(ids.numpy())
        x = family.embed(model, ids)
        pictures = [s for one in seen for s in one]
        if pictures:
            x[place] = torch.cat([s.features for s in pictures]).to(x.dtype)
        x = change(x)
        cache = _cache(parts.language.config)
        positions = torch.from_numpy(np.stack([p.position_ids for p in prompts], axis=1))
        position_ids = positions[0] if len(positions) == 1 else positions
        extra = family.beside(model, ids, place)
        blocks = blocks_of(family.prefix, prompts)
        if blocks is not None:
            extra["attention_mask"] = family.masks(
                config=parts.language.config, inputs_embeds=x, past_key_values=cache, position_ids=positions[0],
                block_sequence_ids=blocks,
            )  # fmt: skip
        if pictures and pictures[0].levels:
            levels = zip(*(s.levels for s in pictures), strict=True)
            extra |= {"visual_pos_masks": place, "deepstack_visual_embeds": [torch.cat(level) for level in levels]}
        after = torch.tensor([p.next_position for p in prompts])
        talk = cls(model, torch.empty(0), cache, after, torch.empty(0))
        if about.inside is None and about.idle == Idle() and not about.carriers:
            return talk._run(x, position_ids, extra)
        with passing(model, _passage(model, x, prompts, place, blocks)) as passage:
            talk = talk._run(x, position_ids, extra)
        if passage.neck is not None:
            passage.neck.forget(talk.cache)
        return replace(talk, kept=tuple(passage.kept))

    @torch.no_grad()
    def say(self, tokens: Tensor, change: Change = unchanged) -> Talk:
        """Feed one token to each prompt, int64 [B]."""
        family, ids = attached(self.model).family, tokens[:, None]
        x = change(family.embed(self.model, ids))
        axes = family.layout(self.model.config).axes
        position_ids = self.positions[:, None] if axes == 1 else self.positions[None, :, None].expand(axes, -1, 1)
        after = Talk(self.model, self.logits, self.cache, self.positions + 1, self.hidden)
        return after._run(x, position_ids, family.beside(self.model, ids, torch.zeros_like(ids, dtype=torch.bool)))

    def _run(self, x: Tensor, position_ids: Tensor, extra: dict[str, Any]) -> Talk:
        out = locate(self.model).language(
            inputs_embeds=x, position_ids=position_ids, past_key_values=self.cache, use_cache=True, **extra
        )
        # One row, as in the graph: an int8 scale depends on every row it sees.
        logits = attached(self.model).family.logits(self.model, out.last_hidden_state[:, -1])
        return Talk(self.model, logits, out.past_key_values, self.positions, out.last_hidden_state)

    def states(self) -> dict[str, Tensor]:
        """What is remembered of the first prompt: key_i, value_i [kv_heads, rows, head_dim], conv_i [channel, taps]."""
        found: dict[str, Tensor] = {}
        for i, layer in enumerate(self.cache.layers):
            if hasattr(layer, "conv_states"):
                found[f"conv_{i}"] = layer.conv_states[0][0]
            else:
                found |= {f"key_{i}": layer.keys[0], f"value_{i}": layer.values[0]}
        return found


def _passage(model: Any, x: Tensor, prompts: Sequence[Prompt], visual: Tensor, blocks: Tensor | None) -> Passage:
    """Prompts that lose visual tokens on their way: as many of each, or the rows of a batch would differ."""
    about, counts = attached(model), prompts[0].counts
    ladder = about.inside.ladder if about.inside else ()
    length, total = x.shape[1], sum(counts)
    gone = [visual_left(ladder, counts, rung.layer) for rung in ladder]
    if any(p.counts != counts for p in prompts):
        raise ValueError("prompts that have different numbers of visual tokens are not read together")
    landings = [Landing(length - n, total - n, torch.tensor([n])) for n in gone]
    places = torch.arange(length)[None].expand(len(x), -1)
    columns = Columns(places, visual, torch.tensor([length]), blocks)
    neck = None
    if about.carriers and total:  # a prompt of text has no picture to see
        index = torch.from_numpy(np.concatenate([p.visual_index for p in prompts]))
        neck = Neck.of(index, _images(prompts), columns.real, len(counts), about.carriers, length - total)
    return Passage(model, x, columns, total, landings, neck=neck)


_COLUMNS = ("input_ids", "visual_index")


def stop_ids(model: Any) -> frozenset[int]:
    """End-of-sequence ids of a model's generation config."""
    value = getattr(model.generation_config, "eos_token_id", None)
    return frozenset([value] if isinstance(value, int) else value or [])


def greedy(talk: Talk, count: int, stop: frozenset[int] = frozenset()) -> list[list[int]]:
    """At most `count` greedy tokens of each prompt, ending before a stop token."""
    said: list[list[int]] = [[] for _ in talk.positions]
    going = [True] * len(said)
    for step in range(count):
        tokens = talk.logits.argmax(dim=-1)
        for row, token in enumerate(tokens.tolist()):
            going[row] = going[row] and token not in stop
            if going[row]:
                said[row].append(token)
        if not any(going):
            break
        if step + 1 < count:
            talk = talk.say(tokens)
    return said


def _cache(config: Any) -> Any:
    """A cache that forgets nothing: a sliding layer keeps all its rows, as in the graphs, and masks the old ones."""
    cache = DynamicCache(config=config)
    cache.layers = [DynamicLayer() if isinstance(layer, DynamicSlidingWindowLayer) else layer for layer in cache.layers]
    return cache


def blocks_of(prefix: str, prompts: Sequence[Prompt]) -> Tensor | None:
    """For attention that is not causal: which block each column sees whole, int64 [B, L], -1 for none."""
    if prefix == "causal":
        return None
    if prefix == "whole":  # but no answer
        asked = prompts[0].length - np.array([[p.said] for p in prompts])
        return torch.from_numpy(np.where(np.arange(prompts[0].length) < asked, 0, -1))
    return _images(prompts)


def _images(prompts: Sequence[Prompt]) -> Tensor:
    """Of which picture each column is, int64 [B, L], -1 for text."""
    index = np.concatenate([p.visual_index for p in prompts])
    images = [np.searchsorted(np.cumsum(p.counts), p.visual_index, side="right") for p in prompts]
    return torch.from_numpy(np.where(index < 0, -1, np.concatenate(images)))
