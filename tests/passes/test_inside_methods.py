"""Methods that look at neurons, or at differences: against loops over what the uncut model computes itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from vlmcut.errors import PassError
from vlmcut.manifest import Rung
from vlmcut.passes.prune_inside import PruneInside
from vlmcut.passes.skip_visual import SkipVisual
from vlmcut.surgery.load import Loaded, describe, locate

from .test_inside import MUST, cut, one_image, read, recorded, see_all, wide_window


def kept(loaded: Loaded, made: Any) -> list[int]:
    """Visual columns that went on at the one rung."""
    shrunk, _ = see_all(loaded.model, made)
    (places,) = read(loaded, made).kept
    return [place for place in places[0].tolist() if shrunk.visual_index[0][place] >= 0]


def entered(loaded: Loaded, made: Any) -> dict[str, Any]:
    """What the language model of an uncut model is given."""
    with recorded(loaded.model) as calls:
        read(loaded, made)
    return {name: calls[0][1][name] for name in ("inputs_embeds", "position_ids")}


@pytest.mark.parametrize("kind", MUST)
def test_core_counts_neurons_in_common(kind: str, tiny, prompt) -> None:
    """By a loop over the neurons of the first layer's MLP, of every must family."""
    loaded, plain = wide_window(tiny(kind)), wide_window(tiny(kind))
    made = prompt(loaded)
    layer = max(1, describe(loaded.model).language.levels)
    cut(loaded, PruneInside(method="core", layers=(layer,), share=(0.3,)))
    neurons: list[np.ndarray] = []
    mlp: Any = locate(plain.model).language_layers[layer - 1].mlp
    mlp.down_proj.register_forward_pre_hook(lambda _, args: neurons.append(args[0][0].detach().numpy()))
    read(plain, made)
    active = neurons[0] > 0
    shrunk, _ = see_all(plain.model, made)
    columns = [i for i in range(shrunk.length) if shrunk.visual_index[0][i] >= 0]
    common = {i: sum(mine and last for mine, last in zip(active[i], active[-1], strict=True)) for i in columns}
    count = sum(Rung(layer, 0.3).stay(n) for n in shrunk.counts)
    assert kept(loaded, made) == sorted(sorted(columns, key=lambda i: (-common[i], i))[:count])


def test_vlapruner_takes_what_differs_most_of_two_lists(tiny, prompt) -> None:
    """Both lists from the model's own maps; then the farthest from those taken, by a loop."""
    loaded, eager = tiny("llava-siglip-qwen2"), tiny("llava-siglip-qwen2")
    made, share = one_image(prompt(loaded)), 0.3
    cut(loaded, PruneInside(method="vlapruner", layers=(1,), share=(share,)))
    given = entered(eager, made)
    language = locate(eager.model).language
    language.set_attn_implementation("eager")
    with torch.no_grad():
        rows = language(**given, use_cache=False, output_attentions=True).attentions[0][0].mean(dim=0).numpy()
    shrunk, _ = see_all(loaded.model, made)
    columns = [i for i in range(shrunk.length) if shrunk.visual_index[0][i] >= 0]
    count = Rung(1, share).stay(len(columns))
    union: set[int] = set()
    for score in (rows.sum(axis=0), rows[-1]):
        union |= set(sorted(columns, key=lambda i: (-score[i], i))[:count])
    x = given["inputs_embeds"][0].numpy().astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    taken: list[int] = []
    for _ in range(count):
        free = sorted(union - set(taken))
        taken.append(max(free, key=lambda i: min(1 - x[i] @ x[j] for j in taken or union - {i})))
    assert len(union) > count and kept(loaded, made) == sorted(taken)


def test_a_language_model_without_neurons_to_look_at_is_refused(tiny) -> None:
    a = describe(tiny("llava").model)
    a = replace(a, language=replace(a.language, solid="layer 1 is a mixture of experts"))
    PruneInside(method="fastv", layers=(1,), share=(0.5,)).plan(a)
    with pytest.raises(PassError, match="`core` looks at neurons of `llava`: layer 1 is a mixture of experts") as error:
        PruneInside(method="core", layers=(1,), share=(0.5,)).plan(a)
    assert "fastv" in (error.value.hint or "")


@pytest.mark.parametrize(("method", "free"), [("core", (0, 2)), ("fastv", (0, 1, 2))])
def test_neurons_that_choose_are_not_skipped(method: str, free: tuple[int, ...], tiny) -> None:
    a = PruneInside(method=method, layers=(2,), share=(0.5,)).plan(describe(tiny("llava").model))
    assert SkipVisual(what="mlp", count=1).candidates(a) == free
    assert SkipVisual(what="layer", count=1).candidates(a) == (0,)
