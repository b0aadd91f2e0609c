"""Shared by all tests: one thread, no network, tiny models, and bundles that are built once when first asked for."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vlmcut
from hypothesis import settings
from PIL import Image
from transformers.modeling_outputs import BaseModelOutputWithPooling
from vlmcut.exporters.graphs import write_graphs
from vlmcut.exporters.operators import Contrib, Operators, Standard
from vlmcut.manifest import GraphInfo, TokenBudget
from vlmcut.passes.prune_tokens import PruneTokens
from vlmcut.passes.quantize import Quantize
from vlmcut.passes.recipe import make
from vlmcut.pipeline import Request, convert
from vlmcut.prompt import Prompt, Prompter
from vlmcut.surgery.load import Loaded, describe
from vlmcut.surgery.talk import see_all

torch.set_num_threads(1)
# Examples are derived from the test alone, so that a failure repeats; timing is not what is tested.
settings.register_profile("vlmcut", deadline=None, derandomize=True, database=None)
settings.load_profile("vlmcut")

KINDS = ("llava", "llava-siglip-qwen2")


@pytest.fixture(scope="session")
def tiny() -> Callable[[str], Loaded]:
    """A factory: a fresh tiny model of a kind (`llava`, `qwen2_vl`, …), the same weights every time."""

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


QUESTION = "Is the red <image> left?"


def seeded_images(loaded: Loaded) -> list[Image.Image]:
    """Two images of noise, of the size that a model is attached for."""
    rng = np.random.default_rng(7)
    size = describe(loaded.model).smallest.size
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for _ in range(2)]


@pytest.fixture(scope="session")
def prompt() -> Callable[[Loaded], Prompt]:
    """A whole prompt for a model: two seeded images, one of them inside the text, placeholders for all their tokens."""

    def made(loaded: Loaded) -> Prompt:
        return Prompter(loaded.processor, describe(loaded.model).layout)(seeded_images(loaded), QUESTION)

    return made


@pytest.fixture(scope="session")
def stock(prompt: Callable[[Loaded], Prompt]) -> Callable[[Loaded], dict[str, torch.Tensor]]:
    """Inputs of `model.forward` for the same prompt, as transformers' users call it: nothing of ours chooses tokens."""

    def inputs(loaded: Loaded) -> dict[str, torch.Tensor]:
        made = prompt(loaded)
        pixels = np.concatenate([picture.pixel_values for picture in made.pictures])
        return {"input_ids": torch.from_numpy(made.input_ids), "pixel_values": torch.from_numpy(pixels)}

    return inputs


@pytest.fixture(scope="session")
def seen(prompt: Callable[[Loaded], Prompt]) -> Callable[[Loaded], dict[str, Any]]:
    """Inputs of `model.forward` for the prompt shrunk to what a model keeps, with the features that were kept."""

    def inputs(loaded: Loaded) -> dict[str, Any]:
        shrunk, pictures = see_all(loaded.model, prompt(loaded))
        features = BaseModelOutputWithPooling(pooler_output=tuple(s.features for s in pictures))  # type: ignore[arg-type]
        return {"input_ids": torch.from_numpy(shrunk.input_ids), "mm_encoder_outputs": {"image": features}}

    return inputs


@pytest.fixture(scope="session")
def logits(seen: Callable[[Loaded], dict[str, Any]]) -> Callable[[Loaded], torch.Tensor]:
    """What transformers' forward answers to `seen`: logits of every column, [1, columns, vocabulary]."""

    def run(loaded: Loaded) -> torch.Tensor:
        with torch.no_grad():
            return loaded.model(**seen(loaded)).logits

    return run


FORMS: dict[str, tuple[Operators, torch.dtype]] = {
    "contrib": (Contrib(), torch.float32),
    "standard": (Standard(), torch.float32),
    "standard16": (Standard(), torch.float16),
}
BUDGET = TokenBudget(images=2, visual_tokens=5, text_tokens=9, new_tokens=4)


@dataclass(frozen=True)
class Exported:
    """A tiny model that keeps 5 tokens, its three graphs, and whether exporting left the model alone."""

    loaded: Loaded
    folder: Path
    infos: dict[str, GraphInfo]
    budget: TokenBudget
    untouched: bool


@pytest.fixture(scope="session")
def export(
    tiny: Callable[[str], Loaded],
    logits: Callable[[Loaded], torch.Tensor],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Exported]:
    """Export (kind, form, int8 or not): contrib, standard or standard16; each once unless `fresh`."""
    done: dict[tuple[str, str, bool], Exported] = {}

    def run(kind: str, form: str, int8: bool = False, fresh: bool = False) -> Exported:
        key = (kind, form, int8)
        if key not in done or fresh:
            loaded = tiny(kind)
            make([PruneTokens(keep=5), *([Quantize()] if int8 else [])]).apply(loaded.model, None)
            operators, dtype = FORMS[form]
            loaded.model.to(dtype)
            folder = tmp_path_factory.mktemp("graphs")
            before = {"": logits(loaded)} if dtype == torch.float32 else {}
            before |= {n: t.clone() for n, t in loaded.model.state_dict().items()}
            infos = write_graphs(loaded.model, [BUDGET], [(BUDGET.visual_tokens,)], operators, folder)
            after = {"": logits(loaded)} if dtype == torch.float32 else {}
            after |= loaded.model.state_dict()
            same = before.keys() == after.keys() and all(torch.equal(t, after[n]) for n, t in before.items())
            made = Exported(loaded, folder, infos, BUDGET, same)
            if fresh:
                return made
            done[key] = made
        return done[key]

    return run
