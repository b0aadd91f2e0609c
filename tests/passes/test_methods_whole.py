"""Every method in the vision graph of a model: ONNX Runtime sees what eager sees, and TensorRT for RTX builds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import vlmcut
from vlmcut.errors import PassError
from vlmcut.exporters import onnx as exporter
from vlmcut.exporters.components import components
from vlmcut.exporters.engines import available, build_engine
from vlmcut.exporters.lint import lint
from vlmcut.exporters.operators import Standard
from vlmcut.exporters.weights import WeightFile
from vlmcut.manifest import TokenBudget
from vlmcut.passes.prune_tokens import PruneTokens
from vlmcut.passes.recipe import make
from vlmcut.passes.tokens.methods import METHODS
from vlmcut.passes.trim_tower import TrimTower
from vlmcut.prompt import Picture
from vlmcut.runtime.sessions import open_session
from vlmcut.surgery.load import Loaded, describe
from vlmcut.surgery.talk import see_picture

OWN = [name for name, row in METHODS.items() if row.module is None]  # weights of one's own: see test_trained
SPEC = {"mustdrop-vision": "mustdrop-vision:window=2"}  # which divides the 4 x 4 tokens of the tiny model
QUESTION = np.array([5, 9, 31])


def cut(method: str) -> Loaded:
    """A tiny model that keeps about a third of its tokens by this method; a clip of four frames where it wants one."""
    loaded = vlmcut.load("tiny:llava", frames=4 if METHODS[method].frames else 1)
    a = TrimTower().plan(describe(loaded.model))
    spec = SPEC.get(method, method)
    for keep in sorted(range(1, a.visual_tokens), key=lambda k: abs(k - a.visual_tokens // 3)):
        try:
            PruneTokens(keep=keep, method=spec).plan(a)
        except PassError:
            continue
        make([PruneTokens(keep=keep, method=spec)]).apply(loaded.model, None)
        return loaded
    raise AssertionError(f"{method} can keep no number of {a.visual_tokens} tokens")


def picture(loaded: Loaded, seed: int) -> Picture:
    (bucket,) = describe(loaded.model).buckets
    pixels = np.random.default_rng(seed).standard_normal(bucket.pixels).astype(np.float32)
    return Picture(pixels, bucket.geometry, bucket.frames, QUESTION)


@pytest.mark.parametrize("method", OWN)
def test_a_method_lives_in_the_vision_graph(method: str, tmp_path: Path) -> None:
    loaded = cut(method)
    a = describe(loaded.model)
    (keep,) = a.keep
    budget = TokenBudget(images=1, visual_tokens=keep, text_tokens=8, new_tokens=2)
    vision = components(loaded.model, budget, [keep])[0]
    graph = exporter.export(vision, loaded.model, Standard())
    with WeightFile(tmp_path) as weights:
        weights.save(graph, "vision.onnx")
    made = onnx.load(tmp_path / "vision.onnx", load_external_data=False).graph
    constants = {initializer.name for initializer in made.initializer}
    assert all(node.input[1] in constants for node in made.node if node.op_type == "TopK")
    assert not {"NonZero", "If", "Loop", "Compress", "RandomNormal"} & {node.op_type for node in made.node}
    assert all(d.dim_value > 0 for output in made.output for d in output.type.tensor_type.shape.dim)
    session = open_session(tmp_path / "vision.onnx", threads=1)
    for seed in range(3):
        shown = picture(loaded, seed)
        inputs: dict[str, Any] = {"pixel_values": shown.pixel_values}
        if METHODS[method].text:
            padded = np.pad(QUESTION, (0, budget.text_tokens - len(QUESTION)))
            inputs |= {"text_ids": padded[None], "text_length": np.array([len(QUESTION)])}
        features, kept = (torch.from_numpy(x) for x in session.run(["image_features", "kept"], inputs))
        want = see_picture(loaded.model, shown)
        assert torch.equal(kept[0], want.kept) and features.shape == (keep, a.language.hidden)
        # float32, features below 2: the tower's products in another order. Measured on x86: at most 3.0e-7.
        torch.testing.assert_close(features, want.features, rtol=0, atol=3e-6)
    assert [f for f in lint(tmp_path / "vision.onnx", "rtx") if f.severity == "error"] == []
    if available("rtx") is None:
        report = build_engine(tmp_path / "vision.onnx", tmp_path / "vision.plan", "rtx")
        assert report.plan_bytes > 0


def test_tensorrt_for_rtx_is_installed_where_the_tests_are() -> None:
    """The builds above are not silently skipped: the extra `test` brings the package wherever it exists."""
    reason = available("rtx")
    assert reason is None or "tensorrt_rtx" in reason
