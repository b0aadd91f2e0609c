"""Any method on any family: it works on real pictures of it, or `plan` says why not. Some of each are exported."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vlmcut.errors import ModelError, PassError
from vlmcut.exporters import onnx
from vlmcut.exporters.components import components
from vlmcut.exporters.operators import Contrib
from vlmcut.exporters.weights import WeightFile
from vlmcut.manifest import TokenBudget
from vlmcut.passes import folder
from vlmcut.passes.prune_tokens import PruneTokens
from vlmcut.passes.recipe import make
from vlmcut.passes.tokens.methods import METHODS
from vlmcut.prompt import Picture
from vlmcut.runtime.sessions import open_session
from vlmcut.surgery.load import Loaded, describe
from vlmcut.surgery.selection import attached
from vlmcut.surgery.talk import see_picture

KINDS = (
    "llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm", "idefics3",
    "paligemma", "gemma3", "mistral3", "pixtral", "lfm2_vl",
)  # fmt: skip
OWN = [name for name, row in METHODS.items() if row.module is None]
SPEC = {
    "mustdrop-vision": "mustdrop-vision:window=2",
    "dart": "dart:pivots=1",
}  # tiny rasters are smaller than defaults
QUESTION = np.array([5, 9, 31])


def picture(loaded: Loaded, seed: int) -> Picture:
    bucket = attached(loaded.model).buckets[0]
    pixels = np.random.default_rng(seed).standard_normal(bucket.pixels).astype(np.float32)
    return Picture(pixels, bucket.geometry, bucket.frames, QUESTION)


def applied(loaded: Loaded, method: str) -> int | None:
    """Let the model keep about a third by this method; None if plan refuses every number from a tenth to all."""
    attached(loaded.model).selection = None
    a = describe(loaded.model)
    tokens, spec = a.visual_tokens, SPEC.get(method, method)
    for keep in sorted(range(max(1, tokens // 10), tokens), key=lambda k: abs(k - tokens // 3)):
        try:
            step = PruneTokens(keep=keep, method=spec)
            step.plan(a)
        except PassError as error:
            assert str(error) and error.hint
            continue
        step.apply(loaded.model, a)
        return keep
    return None


def opened(kind: str, frames: int) -> Loaded:
    loaded = folder.load(f"tiny:{kind}", frames=frames)
    make([]).apply(loaded.model, None)
    return loaded


def works(loaded: Loaded, method: str, keep: int) -> None:
    """The right number of tokens, each place once, finite, and not the same for every picture but for baselines."""
    whole = describe(loaded.model)
    seen = [see_picture(loaded.model, picture(loaded, seed)) for seed in range(2)]
    for one in seen:
        places = one.kept.tolist()
        assert len(places) == keep == one.features.shape[0] and all(a < b for a, b in pairwise(places)), method
        assert places[0] >= 0 and places[-1] < whole.visual_tokens and one.features.isfinite().all()
        assert all(level.shape[0] == keep and level.isfinite().all() for level in one.levels)
    assert not torch.equal(seen[0].features, seen[1].features)


@pytest.mark.parametrize("kind", KINDS)
def test_every_method_works_or_is_refused(kind: str) -> None:
    alone, refused = opened(kind, 1), []
    for method in OWN:
        if METHODS[method].frames:
            continue
        keep = applied(alone, method)
        if keep is None:
            refused.append(method)
        else:
            works(alone, method, keep)
    inside = [name for name in OWN if METHODS[name].inside is not None]
    grids = [name for name in OWN if METHODS[name].grid]  # no number suits rasters of unequal width
    allowed = {*inside, *grids} if kind not in ("llava", "paligemma") else set()
    assert set(refused) <= allowed, refused
    try:
        clip = opened(kind, 4)
    except ModelError as error:
        assert kind == "gemma3" and "reads each image as a block" in str(error)
        return
    for method in OWN:
        if METHODS[method].frames:
            keep = applied(clip, method)
            assert keep is not None, method
            works(clip, method, keep)


@pytest.mark.parametrize("number", range(len(OWN)), ids=OWN)
def test_a_method_is_exported_from_another_family(number: int, tmp_path: Path) -> None:
    """Each method from one family that takes it, in turn: ONNX Runtime keeps what eager keeps."""
    method = OWN[number]
    frames = 4 if METHODS[method].frames else 1
    for turn in range(1, len(KINDS)):
        kind = KINDS[(number + turn) % len(KINDS)]
        if kind == "llava" or (frames > 1 and kind == "gemma3"):
            continue  # test_methods_whole has llava
        loaded = opened(kind, frames)
        keep = applied(loaded, method)
        if keep is not None:
            break
    else:
        raise AssertionError(f"{method} works on llava alone")
    budget = TokenBudget(images=1, visual_tokens=keep, text_tokens=8, new_tokens=2)
    graph = onnx.export(components(loaded.model, budget, [keep])[0], loaded.model, Contrib())
    with WeightFile(tmp_path) as weights:
        weights.save(graph, "vision.onnx")
    session = open_session(tmp_path / "vision.onnx", threads=1)
    for seed in range(2):
        shown = picture(loaded, seed)
        inputs: dict[str, Any] = {"pixel_values": shown.pixel_values}
        if METHODS[method].text:
            inputs |= {"text_ids": np.pad(QUESTION, (0, 5))[None], "text_length": np.array([len(QUESTION)])}
        features, kept = (torch.from_numpy(x) for x in session.run(["image_features", "kept"], inputs))
        want = see_picture(loaded.model, shown)
        assert torch.equal(kept[0], want.kept)
        torch.testing.assert_close(features, want.features, rtol=1e-5, atol=2e-5)  # float32, other orders of sums
