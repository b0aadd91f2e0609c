"""The three kinds of graph of a budget as modules of plain tensors with example inputs of their final shapes.

| graph | input | shape | dtype |
|---|---|---|---|
| vision, one for each bucket | pixel_values | as the processor gives it for one image, [frames, …] of a clip | float |
| | text_ids, if the method depends on the question | [1, M] | int64, padded |
| | text_length, with it | [1] | int64 |
| prefill | input_ids, visual_index | [1, S] | int64 |
| | position_ids | [axes, S] | int64, axes 3 with M-RoPE, else 1 |
| | image_features, deepstack_j | [images * K, hidden] | float |
| | length | [1] | int64, prompt tokens |
| | left, with a ladder | [rungs] | int64, visual tokens that have left behind each rung |
| | past_key_i, past_value_i, past_conv_i | see below | float |
| decode | input_ids | [1, 1] | int64 |
| | position_ids | [axes, 1] | int64 |
| | length | [1] | int64, tokens in the cache after this step, of a layer that sees all |
| | left, with a ladder | [rungs] | as in prefill |
| | past_key_i, past_value_i, past_conv_i | see below | float |

With a ladder (`surgery/inside.py`) a layer behind a rung has shorter buffers, and prefill also gives kept_i
[1, columns] int64, the columns of the prompt that go on from each rung, padding included. With a bottleneck
(`surgery/bottleneck.py`) the buffers of all layers hold text and carriers only, and so does decode's `length` count.

Outputs: vision gives image_features [K, hidden], kept [1, K] int64 and deepstack_j [K, hidden]; prefill and decode give
logits [1, vocabulary] of the last token and a present_… for each past_…, which may share its memory. Of an attention
layer: key and value [1, kv_heads, C, head_dim]; of a short convolution (LFM2): conv [1, channels, taps].

The vision graph takes one image, or one clip of frames: a prompt with fewer than its budget pays only for those it
has, images may have different sizes, and an int8 scale never depends on the neighbour.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..manifest import Bucket, TokenBudget
from ..surgery.anatomy import Idle
from ..surgery.bottleneck import Neck
from ..surgery.inside import Columns, Landing, Passage, passing
from ..surgery.load import locate
from ..surgery.rows import take
from ..surgery.selection import attached
from ..surgery.vision import embed_question, prepare, see
from .operators import CacheStep, PassThrough


@dataclass(frozen=True, kw_only=True)
class Component:
    """One graph: a module of plain tensors, and everything static about it."""

    role: str  # vision, prefill, decode
    module: nn.Module
    inputs: dict[str, Tensor]  # example inputs in graph order; every dimension is final
    outputs: tuple[str, ...]  # names in graph order


class Vision(nn.Module):
    """pixel_values, the question if the method wants it -> image_features, kept, deepstack_j: one image of a bucket."""

    def __init__(self, model: Any, bucket: Bucket, keep: int) -> None:
        super().__init__()
        self.model = model
        self.prepared = prepare(model, bucket.geometry)
        self.keep = keep

    def forward(self, pixel_values: Tensor, *question: Tensor) -> tuple[Tensor, ...]:
        text = embed_question(self.model, *question) if question else None
        seen = see(self.model, pixel_values, self.prepared, self.keep, text)
        return seen.features, seen.kept[None].clone(), *seen.levels


class Decoder(nn.Module):
    """One step of the language model over its buffers; `prefill` reads a whole padded prompt with its images."""

    def __init__(self, model: Any, budget: TokenBudget, prefill: bool, mask_padding: bool) -> None:
        super().__init__()
        self.model = model
        self.budget = budget
        self.slot = budget.visual_tokens
        self.prefill = prefill
        self.mask_padding = mask_padding

    def forward(self, inputs: dict[str, Tensor], past: dict[str, Tensor]) -> list[Tensor]:
        family, parts = attached(self.model).family, locate(self.model)
        ids, length, position_ids = inputs["input_ids"], inputs["length"], inputs["position_ids"]
        x = family.embed(self.model, ids)
        seen = torch.zeros_like(ids, dtype=torch.bool)
        valid = blocks = None
        hooks = []
        if self.prefill:
            index = inputs["visual_index"]
            seen = index >= 0
            visual = seen.unsqueeze(-1)
            row = index.clamp(min=0)
            x = torch.where(visual, inputs["image_features"][row], x)
            if self.mask_padding:
                valid = (torch.arange(ids.shape[1]) < length).to(x.dtype)[None, :, None]
                x = x * valid
            if family.prefix == "image":
                blocks = self._images(index)
            elif family.prefix == "whole":
                blocks = torch.where(torch.arange(ids.shape[1])[None] < length, 0, -1)
            for name, layer in zip(_levels(inputs), parts.language_layers, strict=False):
                level = torch.where(visual, inputs[name][row], 0)
                hooks.append(layer.register_forward_hook(lambda _, args, out, level=level: _add(out, level)))
        step = CacheStep(
            past=past, length=length, prefill=self.prefill, valid=valid, blocks=blocks,
            window_over_blocks=family.window_over_blocks, windowed_blocks=family.windowed_blocks,
        )  # fmt: skip
        with ExitStack() as stack:
            for hook in hooks:
                stack.callback(hook.remove)
            passage = self._passage(stack, x, seen, step, inputs)
            out = parts.language(
                inputs_embeds=x,
                position_ids=position_ids if len(position_ids) == 1 else position_ids.unsqueeze(1),
                attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool),  # a 4-D mask passes untouched; ours is unused
                past_key_values=PassThrough(step),
                use_cache=True,
                step=step,
                **family.beside(self.model, ids, seen),
            ).last_hidden_state[0]
        last = out.index_select(0, step.length - 1) if self.prefill else out
        kept = passage.kept if passage else []
        return [family.logits(self.model, last), *kept, *(step.present[name] for name in past)]

    def _passage(
        self, stack: ExitStack, x: Tensor, visual: Tensor, step: CacheStep, inputs: dict[str, Tensor]
    ) -> Passage | None:
        """Have visual columns leave at each rung; in decode they have left, and the caches are shorter."""
        ladder, length = self.budget.ladder, inputs["length"]
        left = inputs["left"].split(1) if ladder else ()
        if not self.prefill:
            layers = locate(self.model).language_layers
            for rung, gone in zip(ladder, left, strict=True):

                def shorten(module: Any, args: Any, gone: Tensor = gone) -> None:
                    step.length = length - gone

                stack.callback(layers[rung.layer].register_forward_pre_hook(shorten).remove)
            return None
        carriers = self.budget.carriers
        if not ladder and attached(self.model).idle == Idle() and not carriers:
            return None

        def arrived(columns: Columns, index: Tensor) -> None:
            step.length, step.blocks = columns.length, columns.blocks
            step.valid = None if step.valid is None else take(step.valid, index, -2, -3)

        gone = [self.budget.left(rung.layer) for rung in ladder]
        whole = self.budget.images * self.slot
        landings = [Landing(x.shape[1] - n, whole - n, one) for n, one in zip(gone, left, strict=True)]
        columns = Columns(torch.arange(x.shape[1])[None], visual, length, step.blocks)
        neck = None
        if carriers:
            index = inputs["visual_index"]
            text = self.budget.text_tokens
            neck = Neck.of(index, self._images(index), columns.real, self.budget.images, carriers, text)
        return stack.enter_context(passing(self.model, Passage(self.model, x, columns, whole, landings, arrived, neck)))

    def _images(self, index: Tensor) -> Tensor:
        """Of which picture the columns with these visual tokens are, int64 [1, S], -1 for text."""
        return torch.where(index < 0, -1, torch.div(index.clamp(min=0), self.slot, rounding_mode="floor"))


def _levels(inputs: dict[str, Tensor]) -> list[str]:
    return [name for name in inputs if name.startswith("deepstack_")]


def _add(out: Any, level: Tensor) -> Any:
    return (out[0] + level, *out[1:]) if isinstance(out, tuple) else out + level


def components(model: Any, budget: TokenBudget, keep: Sequence[int], quantized: Sequence[str] = ()) -> list[Component]:
    """The graphs of one budget.

    Args:
        keep: visual tokens of an image of each bucket.
        quantized: parts that compute in int8.
    """
    about, dtype = attached(model), model.dtype
    family = about.family
    hidden = model.config.get_text_config().hidden_size
    states = family.states(model, [budget.cache - budget.left(i) for i in range(len(locate(model).language_layers))])
    past = {f"past_{name}": torch.zeros(shape, dtype=dtype) for name, shape in states.items()}
    present = tuple(f"present_{name}" for name in states)
    axes = family.layout(model.config).axes

    def ids(columns: int) -> Tensor:
        return torch.arange(columns)[None] % 7

    vision = []
    for bucket, count in zip(about.buckets, keep, strict=True):
        module = Vision(model, bucket, count)
        inputs = {"pixel_values": torch.zeros(bucket.pixels, dtype=dtype)}
        if about.selection is not None and about.selection.selector.text:
            inputs |= {"text_ids": ids(budget.text_tokens), "text_length": torch.tensor([budget.text_tokens])}
        levels = tuple(f"deepstack_{i}" for i in range(family.levels(model.config)))
        vision.append(
            Component(
                role="vision",
                module=module,
                inputs=inputs,
                outputs=("image_features", "kept", *levels),
            )
        )
    tables = ["image_features", *(f"deepstack_{i}" for i in range(family.levels(model.config)))]
    prefill = {
        "input_ids": ids(budget.sequence),
        "visual_index": torch.full((1, budget.sequence), -1),
        "position_ids": torch.arange(budget.sequence)[None].expand(axes, -1).contiguous(),
        "length": torch.tensor([budget.sequence]),
        **{name: torch.zeros(budget.images * budget.visual_tokens, hidden, dtype=dtype) for name in tables},
    }
    decode = {"input_ids": ids(1), "position_ids": torch.zeros(axes, 1, dtype=torch.int64), "length": torch.tensor([2])}
    if budget.ladder:
        left = torch.tensor([budget.left(rung.layer) for rung in budget.ladder])
        prefill, decode = prefill | {"left": left}, decode | {"left": torch.zeros_like(left)}
    rungs = tuple(f"kept_{i}" for i in range(len(budget.ladder)))
    mask = "language" in quantized
    return [
        *vision,
        Component(
            role="prefill",
            module=Decoder(model, budget, prefill=True, mask_padding=mask),
            inputs=prefill | past,
            outputs=("logits", *rungs, *present),
        ),
        Component(
            role="decode",
            module=Decoder(model, budget, prefill=False, mask_padding=mask),
            inputs=decode | past,
            outputs=("logits", *present),
        ),
    ]
