"""Shared by all tests: one thread, no network, tiny models, and bundles that are built once when first asked for."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import vlmcut
from hypothesis import settings
from vlmcut.pipeline import Request, convert
from vlmcut.surgery.load import Loaded

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
