"""The work of a vision tower outside its layers, measured without computing it.

What stands before, between and behind the layers differs by family (patch embeddings, mergers, resamplers, whole towers
of convolutions), so it is counted rather than predicted: the family's own `encode` runs on fake tensors, which have
shapes and no data, under `torch.utils.flop_counter`. It takes about 0.1 s and needs no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..manifest import Bucket
from .anatomy import Outside
from .selection import attached


@dataclass(frozen=True)
class Measured:
    """What one image of a bucket, or one clip, is to the tower."""

    outside: Outside
    segments: tuple[int, ...]  # rows of each tower segment that attends to itself


def measured(model: Any) -> tuple[Measured, ...]:
    """Every bucket of a model, measured when first asked for: no cut changes what is outside the layers."""
    about = attached(model)
    if about.measured is None:
        about.measured = tuple(_measure(model, bucket) for bucket in about.buckets)
    return about.measured


class _Encode(nn.Module):
    """`encode` as a module, so that its weights can be replaced by fake ones for one call."""

    def __init__(self, model: Any, geometry: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.model, self.geometry = model, geometry
        self.constants = attached(model).family.constants(model, geometry)

    def forward(self, pixel_values: Tensor, count: Any) -> tuple[int, int]:
        """FLOPs of the image, and of a token whose projector runs later."""
        encoded = attached(self.model).family.encode(self.model, pixel_values, self.geometry, self.constants)
        image = count()
        if encoded.project is not None:
            encoded.project(encoded.tokens[:1][None])
        return image, count() - image


class _Inside:
    """FLOPs inside some modules, none of which is inside another."""

    def __init__(self, modules: list[nn.Module], count: Any) -> None:
        self.flops = 0
        self._hooks = [hook for m in modules for hook in self._watch(m, count)]

    def _watch(self, module: nn.Module, count: Any) -> list[Any]:
        def add(sign: int, *_: Any) -> None:
            self.flops += sign * count()

        return [module.register_forward_pre_hook(partial(add, -1)), module.register_forward_hook(partial(add, 1))]

    def __enter__(self) -> _Inside:
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()


@torch.no_grad()
def _measure(model: Any, bucket: Bucket) -> Measured:
    about = attached(model)
    parts = about.family.locate(model)
    encode, layers = _Encode(model, bucket.geometry), parts.tower_layers
    unread = [parts.tower.head] if hasattr(parts.tower, "head") else []  # a pooling head
    rows: list[int] = []

    def enter(_: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        x = args[0] if args else given["hidden_states"]
        rows.extend([x.shape[-2]] * (len(x) if x.dim() > 2 else 1))

    first = [layers[0].register_forward_pre_hook(enter, with_kwargs=True)] if layers else []
    tensors = dict([*encode.named_parameters(), *encode.named_buffers()])
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in tensors.items()}
        pixels = torch.empty(bucket.geometry["pixel_values"], dtype=model.dtype)
    # Outside that mode tensors that follow from the geometry alone stay real: a tower may ask for their numbers.
    with FlopCounterMode(display=False) as counter:
        count = counter.get_total_flops
        # The plain form of attention: the counter has no rule for the CPU's own.
        with (
            sdpa_kernel(SDPBackend.MATH),
            _Inside([*layers, *unread], count) as left_out,
            _Inside([] if parts.projector is None else [parts.projector], count) as projector,
        ):
            image, token = torch.func.functional_call(encode, fake, (pixels, count))
    for hook in first:
        hook.remove()
    frames, projected = bucket.frames, projector.flops - token
    outside = Outside(
        tower=frames * (image - left_out.flops - projected), projector=frames * projected, token=token
    )  # fmt: skip
    segments = about.family.segments(model.config, bucket.geometry) or tuple(rows)
    return Measured(outside, segments * frames)
