"""Layers that somebody names by number: which of them cannot leave, and how the numbers of the others follow.

Numbers stand in a config, and in a module that read them when it was made. DeepStack (Qwen3-VL, arXiv:2511.21631)
takes features behind some tower layers and adds them behind the first language layers; other lists say which tower
layers see the whole picture, or of what kind each layer is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .anatomy import Pinned

_TAPS = "deepstack_visual_indexes"
_NUMBERS = (_TAPS, "fullatt_block_indexes", "global_attn_indexes")  # each entry is the number of a layer
_KINDS = ("layer_types", "mlp_layer_types")  # one entry per layer
_STATES = ("vision_feature_layer", "vision_feature_layers")  # entry i of the hidden states is what i layers made


def pinned_tower(config: Any, tower: Any, layers: int, feature_layer: int, scored: Sequence[int]) -> Pinned:
    """Tower layers that must stay, ascending, and why.

    Args:
        config: the model's.
        feature_layer: layers that run before the features are taken.
        scored: layers by whose attention tokens can be scored.
    """
    found = {state - 1: "the projector reads its output" for state in _states(config, layers) if state > 0}
    found[feature_layer - 1] = "the projector reads its output"
    last = max((i for i in scored if i < feature_layer), default=None)
    if last is not None:
        found.setdefault(last, "no later layer can score tokens by attention")
    for holder in (tower, getattr(tower, "config", None)):
        for layer in getattr(holder, _TAPS, None) or ():
            found.setdefault(layer, "its output is a DeepStack feature")
    return tuple(sorted((layer, why) for layer, why in found.items() if 0 <= layer < feature_layer))


def pinned_language(levels: int) -> Pinned:
    """Language layers that must stay where `levels` DeepStack features are added behind the first ones, and why."""
    return tuple((layer, "a DeepStack feature is added behind it") for layer in range(levels))


def follow(config: Any, holders: Sequence[Any], layers: int, keep: Sequence[int]) -> None:
    """Correct every number of a layer when only those in `keep` stay.

    Args:
        config: the model's, which names hidden states of the tower, if the tower is cut; else None.
        holders: configs and modules of the part that is cut.
        layers: how many there were.
    """
    new = {old: i for i, old in enumerate(sorted(keep))}
    for holder in {id(h): h for h in holders}.values():
        for name in _NUMBERS:
            numbers = getattr(holder, name, None)
            if numbers is not None:
                setattr(holder, name, [new[i] for i in numbers if i in new])
        for name in _KINDS:
            kinds = getattr(holder, name, None)
            if kinds and len(kinds) == layers:
                setattr(holder, name, [kinds[i] for i in sorted(keep)])
    for name in _STATES if config is not None else ():
        given = getattr(config, name, None)
        if given is None:
            continue
        listed = isinstance(given, (list, tuple))
        moved = []
        for number in given if listed else [given]:
            state = _state(number, layers)
            state = state and new[state - 1] + 1
            moved.append(state if number >= 0 else state - len(new) - 1)
        setattr(config, name, moved if listed else moved[0])


def _states(config: Any, layers: int) -> list[int]:
    """The hidden states that the model's config names, counted from the embeddings."""
    found = []
    for name in _STATES:
        given = getattr(config, name, None)
        if given is not None:
            found += [_state(number, layers) for number in (given if isinstance(given, (list, tuple)) else [given])]
    return found


def _state(number: int, layers: int) -> int:
    return number if number >= 0 else layers + 1 + number
