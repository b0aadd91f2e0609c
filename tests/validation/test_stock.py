"""A family that is read otherwise than transformers computes it is refused before anything is cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vlmcut
from vlmcut import prompt
from vlmcut.errors import ModelError
from vlmcut.passes.drop_layers import DropLayers
from vlmcut.passes.prune_tokens import PruneTokens
from vlmcut.passes.quantize import Quantize
from vlmcut.passes.recipe import make
from vlmcut.passes.trim_tower import TrimTower
from vlmcut.surgery.families import FAMILIES
from vlmcut.surgery.families.base import Family
from vlmcut.surgery.selection import attached
from vlmcut.validation import stock


def reader(kind: str) -> type[Any]:
    """The class that reads a family."""
    return type(FAMILIES[kind])


def test_sound_readers_agree(kind: str, tiny: Any) -> None:
    # The same kernels on the same shapes; measured 0.0.
    assert stock.check(tiny(kind)) < 1e-5


@pytest.mark.parametrize("more", [[], [Quantize()]], ids=["float", "int8"])
def test_a_cut_model_is_compared_too(more: list[Any], tiny: Any) -> None:
    """With all its tokens, since transformers knows no choice of them; the choice is as before afterwards."""
    loaded = tiny("llava")
    cuts = [TrimTower(), PruneTokens(keep=5), DropLayers(part="language", count=1, drop=(1,))]
    make([*cuts, *more]).apply(loaded.model, None)
    selection = attached(loaded.model).selection
    assert stock.check(loaded) < 1e-5
    assert selection is not None and attached(loaded.model).selection is selection and selection.keep == (5,)


def other_features(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    """The reader of LLaVA with the tokens of an image changed."""
    encode = reader("llava").encode

    def changed(*args: Any) -> Any:
        made = encode(*args)
        return replace(made, tokens=change(made.tokens))

    return changed


def other_layer(self: Any, model: Any, *rest: Any) -> Any:
    """Features of the layer behind the right one."""
    config = model.config
    config.vision_feature_layer += 1
    try:
        return SOUND(self, model, *rest)
    finally:
        config.vision_feature_layer -= 1


SOUND = reader("llava").encode
FAULTS: dict[str, tuple[str, str, Any]] = {
    "the next feature layer": ("llava", "encode", other_layer),
    "tokens in another order": ("llava", "encode", other_features(lambda x: x.flip(0))),
    "one token shifted": ("llava", "encode", other_features(lambda x: x.roll(1, dims=0))),
    "features 0.1 % too large": ("llava", "encode", other_features(lambda x: x * 1.001)),
    "no projector": ("llava", "encode", lambda *args: replace(SOUND(*args), project=lambda x: x[..., :48])),
    "features not a number": ("llava", "encode", other_features(lambda x: x * torch.nan)),
    "the whole prompt sees itself": ("llava", "prefix", "whole"),
    "an image sees itself": ("llava", "prefix", "image"),
    "logits capped": ("llava", "logits", lambda self, model, x: 3 * torch.tanh(Family.logits(self, model, x) / 3)),
    "Gemma's images causal": ("gemma3", "prefix", "causal"),
    "Gemma's prompt whole": ("gemma3", "prefix", "whole"),
    "PaliGemma's images alone": ("paligemma", "prefix", "image"),
    "Qwen without its grid": (
        "qwen2_vl", "layout", lambda self, config: replace(LAYOUT(self, config), positions="compact")
    ),
}  # fmt: skip
LAYOUT = reader("qwen2_vl").layout


@pytest.mark.parametrize("name", FAULTS)
def test_misreading_is_refused(name: str, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, member, value = FAULTS[name]
    loaded = tiny(kind)
    assert stock.check(loaded) < 1e-5  # it is the fault that is refused
    monkeypatch.setattr(reader(kind), member, value)
    with pytest.raises(ModelError, match=f"`{kind}`: vlmcut reads it differently from transformers") as caught:
        stock.check(loaded)
    assert caught.value.hint and "1e-04 allowed" in str(caught.value)


def test_a_gap_in_the_positions_is_refused(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text behind an image counts from one too many; the same shift of every token changes nothing, see below."""
    sound = prompt.positions

    def gap(layout: Any, visual_index: np.ndarray, pictures: Any) -> tuple[np.ndarray, int]:
        found, after = sound(layout, visual_index, pictures)
        behind = np.maximum.accumulate(visual_index >= 0, axis=1) & (visual_index < 0)
        return found + behind, after + 1

    monkeypatch.setattr(prompt, "positions", gap)
    # With all tokens kept, shrinking would count anew.
    monkeypatch.setattr(prompt.Prompt, "shrink", lambda self, kept: self)
    with pytest.raises(ModelError, match="reads it differently"):
        stock.check(tiny("llava"))


def test_where_all_positions_start_cannot_be_seen(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary embeddings know distances alone: a family that starts one too late answers the same, prompt and decode."""
    monkeypatch.setattr(reader("llava"), "first_position", 1)
    assert stock.check(tiny("llava")) < 1e-5


def test_convert_stops_before_anything_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader("llava"), "prefix", "whole")
    seen: list[str] = []
    with pytest.raises(ModelError, match="reads it differently"):
        vlmcut.convert("tiny:llava", tmp_path / "out", prune=0.7, progress=seen.append)
    assert seen == ["loading the model", "checking that vlmcut reads this model as transformers does"]
    assert list(tmp_path.iterdir()) == []
