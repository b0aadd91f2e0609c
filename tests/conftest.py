"""Shared by all tests: one thread, no network, tiny models, and bundles that are built once when first asked for."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vlmcut
from hypothesis import settings
from PIL import Image
from vlmcut.pipeline import Request, convert
from vlmcut.prompt import Prompter
from vlmcut.surgery.load import Loaded, describe

torch.set_num_threads(1)
# Examples are derived from the test alone, so that a failure repeats; timing is not what is tested.
settings.register_profile("vlmcut", deadline=None, derandomize=True, database=None)
settings.load_profile("vlmcut")

KINDS = ("llava", "llava-siglip-qwen2")


@pytest.fixture(scope="session")
def tiny() -> Callable[[str], Loaded]:
    """A factory: a fresh tiny model of a kind (`llava` or `llava-siglip-qwen2`), the same weights every time."""

    def make(kind: str = "llava") -> Loaded:
        return vlmcut.load(f"tiny:{kind}")

    return make


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Every tiny model in turn."""
    return request.param


def _bundle(factory: pytest.TempPathFactory, name: str, **request: Any) -> Path:
    out = factory.mktemp(name) / "bundle"
    convert(Request(model="tiny:llava", **request), out)
    return out


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny:llava, 70 % of its tokens removed, room for two images; do not write into it."""
    return _bundle(tmp_path_factory, "plain", prune=0.7, images=2, text_tokens=24, new_tokens=20)


@pytest.fixture(scope="session")
def bundle_int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny:llava in int8 with two budgets, 5 and 16 tokens per image; do not write into it."""
    return _bundle(tmp_path_factory, "int8", quantize="int8", keep=(5, 16), text_tokens=24, new_tokens=20)


@pytest.fixture(scope="session")
def bundle_rtx_graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny:llava in float16 for TensorRT-RTX, standard operators, engines deferred; do not write into it."""
    return _bundle(
        tmp_path_factory, "rtx", prune=0.7, target="rtx", dtype="float16", defer_build=True,
        text_tokens=24, new_tokens=20,
    )  # fmt: skip


@pytest.fixture(scope="session")
def prompt() -> Callable[[Loaded], dict[str, torch.Tensor]]:
    """Inputs of a model: two seeded images, one of them inside the text, placeholders for the tokens it keeps."""

    def inputs(loaded: Loaded) -> dict[str, torch.Tensor]:
        a = describe(loaded.model)
        rng = np.random.default_rng(7)
        size = a.tower.image_size
        images = [Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(2)]
        made = Prompter(loaded.processor, a.image_token_id, a.visual_tokens)(images, "Is the red <image> left?")
        made = made.shrink(a.keep)
        return {"input_ids": torch.from_numpy(made.input_ids), "pixel_values": torch.from_numpy(made.pixel_values)}

    return inputs


@pytest.fixture(scope="session")
def logits(prompt: Callable[[Loaded], dict[str, torch.Tensor]]) -> Callable[[Loaded], torch.Tensor]:
    """What a model answers to `prompt`: logits of every column, [1, columns, vocabulary]."""

    def run(loaded: Loaded) -> torch.Tensor:
        with torch.no_grad():
            return loaded.model(**prompt(loaded)).logits

    return run
