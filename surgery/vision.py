"""One image through the tower, the projector and the selection: the same code in eager and under the exporter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .families.base import Encoded, Family
from .first_layer import first_layer
from .merging import between
from .selection import Tap, Text, TowerState, attached, places
from .taps import tapping


@dataclass(frozen=True)
class Seen:
    """What one image became."""

    features: Tensor  # [K, hidden]
    kept: Tensor  # int64 [K], ascending
    levels: tuple[Tensor, ...] = ()  # DeepStack: added behind language layer 0, 1, …; [K, hidden] each


@dataclass(frozen=True)
class Prepared:
    """What depends on the geometry alone; a trace gets it, and must not make it."""

    geometry: Mapping[str, tuple[int, ...]]
    constants: Mapping[str, Any]
    members: np.ndarray | None


def prepare(model: Any, geometry: Mapping[str, tuple[int, ...]]) -> Prepared:
    """Everything about an image of this geometry that needs no pixel."""
    about = attached(model)
    family: Family = about.family
    members = family.members(model.config, geometry)
    frames = about.bucket(geometry).frames
    if members is not None and frames > 1:
        rows = sum(n - family.has_cls(model.config) for n in family.segments(model.config, geometry))
        members = np.concatenate([np.where(members < 0, -1, members + i * rows) for i in range(frames)])
    return Prepared(geometry, family.constants(model, geometry), members)


def read_question(model: Any, ids: np.ndarray) -> Text | None:
    """The question for a method that depends on it, int64 [M], unpadded; None for the others."""
    about = attached(model)
    if about.selection is None or not about.selection.selector.text:
        return None
    if about.vocabulary is not None:
        about.vocabulary.check(ids)
    padded = np.append(ids, 0) if not len(ids) else ids  # a column that is masked: nothing was asked
    return embed_question(model, torch.from_numpy(padded)[None], torch.tensor([len(ids)]))


def embed_question(model: Any, ids: Tensor, length: Tensor) -> Text:
    """Padded ids, int64 [1, M], of which the first `length` are real."""
    embeddings = attached(model).family.embed(model, ids)
    mask = (torch.arange(ids.shape[1])[None] < length).to(embeddings.dtype)
    return Text(embeddings, mask)


def look(
    model: Any, pixel_values: Tensor, prepared: Prepared, text: Text | None = None, keep: int | None = None
) -> tuple[Encoded, TowerState]:
    """Encode one image, whole, and gather what a selector may look at.

    Args:
        pixel_values: as the family's processor gives it for one image, in the model's dtype; [frames, …] of a clip.
        text: the question, for a method that depends on it.
        keep: tokens that go on, for a method inside the tower; as many as the bucket keeps for None.
    """
    about = attached(model)
    family, bucket = about.family, about.bucket(prepared.geometry)
    scored = family.scored(model) if about.selection else {}
    blocks = about.selection.selector.blocks(sorted(scored)) if about.selection else ()
    layers = family.locate(model).tower_layers
    wanted = about.selection.selector.outputs if about.selection else ()
    keep = about.keep(about.buckets.index(bucket)) if keep is None else keep
    leaving = about.selection.selector.leaving(bucket.tokens, keep, len(layers)) if about.selection else ()
    has_cls, stream = family.has_cls(model.config), None
    with ExitStack() as stack:
        taps = stack.enter_context(tapping({b: scored[b] for b in (scored if any(leaving) else blocks)}))
        if any(leaving):
            assert about.selection is not None
            stream = stack.enter_context(between(layers, taps, leaving, about.selection.selector.inside, has_cls))
        outputs = stack.enter_context(_recording([layers[b] for b in wanted], has_cls))
        clip = [pixel_values] if bucket.frames == 1 else pixel_values.unbind(0)
        frames = [family.encode(model, pixels, prepared.geometry, prepared.constants) for pixels in clip]
    encoded = frames[0] if bucket.frames == 1 else _joined(frames)
    arrived = None
    if stream is not None:  # back in the order of the picture
        arrived, order = torch.sort(stream.places(has_cls))
        encoded, arrived = replace(encoded, tokens=encoded.tokens.index_select(0, order)), arrived[None]
    panels = bucket.panels
    state = TowerState(
        tokens=encoded.tokens[None],
        project=encoded.project or (lambda x: x),
        taps=tuple(Tap(block, tuple(taps[block].rows), taps[block].scale) for block in blocks),
        has_cls=has_cls,
        members=prepared.members,
        panels=panels,
        places=places(panels) if panels else None,
        frames=bucket.frames,
        text=text,
        outputs=tuple(torch.cat(calls, dim=1) for calls in outputs),
        first=partial(first_layer, model),
        arrived=arrived,
    )
    return encoded, state


@contextmanager
def _recording(blocks: Sequence[Any], has_cls: bool) -> Iterator[list[list[Tensor]]]:
    """While inside, keep what these tower blocks give: for each block, [1, patches, width] of each call."""
    found: list[list[Tensor]] = [[] for _ in blocks]

    def record(calls: list[Tensor], out: Any) -> None:
        rows = out[0] if isinstance(out, tuple) else out  # [segments, rows, width]
        calls.append(rows[:, int(has_cls) :].flatten(0, 1)[None])

    hooks = [
        block.register_forward_hook(lambda _, args, out, calls=calls: record(calls, out))
        for block, calls in zip(blocks, found, strict=True)
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _joined(frames: list[Encoded]) -> Encoded:
    levels = tuple(torch.cat(level) for level in zip(*(frame.levels for frame in frames), strict=True))
    return Encoded(torch.cat([frame.tokens for frame in frames]), frames[0].project, levels)


def see(model: Any, pixel_values: Tensor, prepared: Prepared, keep: int, text: Text | None = None) -> Seen:
    """Encode one image and keep `keep` of its tokens, a Python int."""
    encoded, state = look(model, pixel_values, prepared, text, keep)
    return chosen(model, encoded, state, keep, attached(model).bucket(prepared.geometry).line_breaks)


def chosen(model: Any, encoded: Encoded, state: TowerState, keep: int, breaks: tuple[int, ...]) -> Seen:
    """What goes on of an image that was looked at; `breaks` are the positions of its newline tokens."""
    selection = attached(model).selection
    if selection is None:
        tokens, kept, levels = encoded.tokens, torch.arange(encoded.tokens.shape[0]), encoded.levels
    elif state.arrived is not None:
        tokens, kept, levels = encoded.tokens, state.arrived[0], ()
    else:
        choice = selection.choose(state, keep, breaks)
        kept, levels = choice.kept[0], tuple(map(choice.take, encoded.levels))
        if choice.features is not None:
            return Seen(choice.features[0], kept, levels)
        tokens = choice.take(encoded.tokens)
    features = tokens if encoded.project is None else encoded.project(tokens[None])[0]
    return Seen(features, kept, levels)
