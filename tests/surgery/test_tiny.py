"""Tiny models: every family answers in eager, sees its image, and reads as many features as it has placeholders."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils import is_timm_available, is_torchvision_available
from vlmcut.errors import ModelError
from vlmcut.processors import open_processor
from vlmcut.surgery import tiny

TIMM = is_timm_available() and is_torchvision_available()
FAMILIES = [
    pytest.param(kind, marks=[pytest.mark.skipif(not TIMM, reason="needs timm, which needs torchvision")])
    if kind == "fast_vlm"
    else kind
    for kind in sorted(tiny.families.FAMILIES)
]
FIXED = {
    "llava",
    "llava-siglip-qwen2",
    "paligemma",
    "gemma3",
    "fast_vlm",
    "deepseek_vl",
}  # whatever the image's size, as many tokens
# `AutoProcessor` opens these with torchvision only: a video half, an import, or image processing without PIL.
TORCHVISION = {"llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm", "pixtral", "mistral3"}
TORCHVISION |= {"lfm2_vl", "llava_next_video", "glm4v", "gemma4", "cohere2_vision"}
SIZES = ((64, 64), (100, 40), (40, 90))  # width, height
WORDS = ("What is it?", "Where is the red square?", "two blue circles")
TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


@pytest.fixture(scope="module")
def made() -> Callable[[str], tuple[Any, Any]]:
    """Models by kind, made once; tests do not change them."""
    cache: dict[str, tuple[Any, Any]] = {}

    def get(kind: str) -> tuple[Any, Any]:
        if kind not in cache:
            cache[kind] = tiny.make(kind)
        return cache[kind]

    return get


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def ask(processor: Any, *sizes: tuple[int, int], text: str = WORDS[0], seed: int = 0) -> dict[str, Any]:
    """Inputs for a question about one random image per size."""
    content = [*({"type": "image"} for _ in sizes), {"type": "text", "text": text}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    images = [picture(size, seed + i) for i, size in enumerate(sizes)]
    inputs = dict(processor(images=images, text=prompt, return_tensors="pt"))
    inputs.pop("labels", None)  # PaliGemma's processor writes them whenever it tells image from text
    return inputs


@torch.no_grad()
def answer(model: Any, inputs: dict[str, Any]) -> list[int]:
    return model.generate(**inputs, max_new_tokens=16)[0, inputs["input_ids"].shape[1] :].tolist()


@torch.no_grad()
def features(model: Any, inputs: dict[str, Any]) -> int:
    """Rows that the tower and the projector make of the images."""
    pixels = {name: value for name, value in inputs.items() if name not in TEXT}
    found = model.base_model.get_image_features(**pixels, return_dict=True).pooler_output
    found = torch.cat([*found]) if isinstance(found, list | tuple) else found
    return found.flatten(0, -2).shape[0]


def placeholders(model: Any, inputs: dict[str, Any]) -> int:
    return int((inputs["input_ids"] == model.config.image_token_id).sum())


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_placeholder_has_a_feature(kind: str, made: Any) -> None:
    if kind == "mllama":
        pytest.skip("attends to its images and has no placeholders")
    model, processor = made(kind)
    counts = set()
    for sizes in (*((size,) for size in SIZES), SIZES[:2], SIZES[1:]):
        inputs = ask(processor, *sizes)
        assert placeholders(model, inputs) == features(model, inputs) > 0, sizes
        if len(sizes) == 1:
            counts.add(placeholders(model, inputs))
    assert (len(counts) == 1) == (kind in FIXED)


@pytest.mark.parametrize("kind", FAMILIES)
def test_answers_vary(kind: str, made: Any) -> None:
    model, processor = made(kind)
    said = set()
    for sizes, text in zip((SIZES[:1], SIZES[1:2], SIZES[:2]), WORDS, strict=True):
        said |= set(answer(model, ask(processor, *sizes, text=text)))
    assert len(said) >= 5


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_image_matters(kind: str, made: Any) -> None:
    model, processor = made(kind)
    with torch.no_grad():
        one, other = (model(**ask(processor, SIZES[0], seed=seed)).logits[:, -1] for seed in (0, 7))
    assert one.isfinite().all() and one.std() > 0.1
    assert (one - other).abs().max() > 1e-2


@pytest.mark.parametrize("kind", FAMILIES)
def test_nothing_rests_at_its_neutral_value(kind: str, made: Any) -> None:
    """A bias of 0 or a norm weight of 1 would hide that it is ignored; the two oldest kinds keep their numbers."""
    model, _ = made(kind)
    for name, parameter in model.named_parameters():
        if not tiny.families.FAMILIES[kind].norms and "norm" in name and "weight" in name:
            continue
        assert parameter.numel() == 1 or parameter.std() > 1e-3, name


@pytest.mark.parametrize("kind", FAMILIES)
def test_small_and_odd(kind: str, made: Any) -> None:
    model, _ = made(kind)
    assert sum(p.numel() for p in model.parameters()) < 2e6
    text = model.config.get_text_config()
    assert text.num_attention_heads != text.num_hidden_layers
    if kind == "gemma4":  # its layers differ, and reading the config's own `head_dim` is an error
        text = text.per_layer_config[0]
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    assert head in (16, 32)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_folder_gives_the_same(kind: str, made: Any, tmp_path: Path) -> None:
    model, processor = made(kind)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    if kind in TORCHVISION and not is_torchvision_available():
        with pytest.raises((ImportError, ValueError)):
            AutoProcessor.from_pretrained(tmp_path, backend="pil")
    elif kind not in TORCHVISION:
        AutoProcessor.from_pretrained(tmp_path, backend="pil")
    read = open_processor(tmp_path).inner
    one, other = ask(processor, *SIZES[:2]), ask(read, *SIZES[:2])
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    again: Any = AutoModelForImageTextToText.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**one).logits, model(**one).logits)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_seed_is_a_model(kind: str, made: Any) -> None:
    state = torch.random.get_rng_state()
    again, other = tiny.make(kind)[0].state_dict(), tiny.make(kind, seed=1)[0].state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)
    first = made(kind)[0].state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_windows_are_ragged(made: Any) -> None:
    """Some image of Qwen2.5-VL has windows of different lengths, and two blocks look across all of them."""
    model, processor = made("qwen2_5_vl")
    grid = ask(processor, (80, 48))["image_grid_thw"]
    assert (grid[0, 1:] // 2 % 2 != 0).any()
    assert 0 < len(model.config.vision_config.fullatt_block_indexes) < model.config.vision_config.depth


def test_a_window_is_shorter_than_a_prompt(made: Any) -> None:
    model, processor = made("gemma3")
    text = model.config.text_config
    assert text.sliding_window < ask(processor, (64, 64))["input_ids"].shape[1]
    assert set(text.layer_types) == {"sliding_attention", "full_attention"}


@pytest.mark.parametrize("kind", ["llava_next", "llava_onevision"])
def test_three_grids(kind: str, made: Any) -> None:
    _, processor = made(kind)
    tiles = {ask(processor, size)["pixel_values"].shape[1] for size in ((60, 60), (60, 30), (90, 30))}
    assert len(tiles) == 3


@pytest.mark.parametrize("kind", ["internvl", "idefics3", "smolvlm"])
def test_one_tile_or_several(kind: str, made: Any) -> None:
    _, processor = made(kind)
    side = 32 if kind == "internvl" else None
    tiles = [ask(processor, size)["pixel_values"].flatten(0, -4).shape[0] for size in ((32, 32), (90, 30))]
    assert tiles[1] > 1 and (side is None or tiles[0] == 1)


def test_mllama_attends_to_its_images(made: Any) -> None:
    model, processor = made("mllama")
    inputs = ask(processor, (64, 64), (90, 30))
    assert placeholders(model, inputs) == 2
    assert inputs["cross_attention_mask"].shape == (1, inputs["input_ids"].shape[1], 2, 4)
    assert inputs["aspect_ratio_ids"].shape == (1, 2) and len(inputs["aspect_ratio_ids"].unique()) == 2


OTHERS = sorted(set(tiny.kinds()) - set(tiny.families.FAMILIES))
UNBUILT = {"evolla"}  # transformers maps no model to its config
UNBUILT |= set() if TIMM else {"gemma3n", "perception_lm"}
UNBUILT |= set() if find_spec("scipy") else {"inkling_mm_model"}


@pytest.mark.parametrize("kind", OTHERS)
def test_every_other_type_is_shrunk(kind: str) -> None:
    if kind in UNBUILT:
        with pytest.raises(ModelError, match=f"`{kind}` cannot be built"):
            tiny.make(kind)
        return
    model, processor = tiny.make(kind)
    assert processor is None
    assert model.config.model_type == type(AutoConfig.for_model(kind)).model_type
    assert sum(p.numel() for p in model.parameters()) * 4 < 50e6
    assert all(p.isfinite().all() for p in model.parameters())


def test_most_types_build() -> None:
    assert len(tiny.kinds()) - len(UNBUILT) > 90


def test_layers_of_every_sort_stay() -> None:
    """Shrinking keeps what tells layers apart: gemma4's default has five sliding layers, then a full one."""
    text = tiny.shrink.config("gemma4").text_config
    assert text.num_hidden_layers == len(text.layer_types) == 4
    assert set(text.layer_types) == {"sliding_attention", "full_attention"}


def test_a_ratio_of_heads_stays() -> None:
    for kind, groups in (("qwen2_5_vl", 2), ("paligemma", 4)):
        text = tiny.shrink.config(kind).text_config
        assert text.num_attention_heads // text.num_key_value_heads == groups


def test_unknown_type() -> None:
    with pytest.raises(ModelError, match="no image-text-to-text model `bert`"):
        tiny.shrink.config("bert")


def test_unknown_kind() -> None:
    with pytest.raises(ModelError, match="no tiny model `qwen3vl`") as caught:
        tiny.make("qwen3vl")
    assert caught.value.hint == "did you mean `qwen3_vl`?"


@pytest.mark.skipif(TIMM, reason="timm is there")
def test_timm_is_named() -> None:
    with pytest.raises(ModelError, match="timm") as caught:
        tiny.make("fast_vlm")
    assert caught.value.hint == "pip install timm torchvision"
