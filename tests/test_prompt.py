"""Prompts: shrinking drops placeholders and nothing else, padding adds and never truncates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from vlmcut.errors import BundleError
from vlmcut.manifest import TokenBudget
from vlmcut.prompt import Prompt, Prompter, open_image

IMAGE = 3  # id of the placeholder
# A layout: text tokens as numbers, images as None.
layouts = st.lists(st.one_of(st.integers(4, 300), st.none()), min_size=1, max_size=30)


def build(layout: list[int | None], per_image: int) -> Prompt:
    """A prompt put together token by token."""
    ids: list[int] = []
    index: list[int] = []
    images = 0
    for item in layout:
        if item is None:
            ids += [IMAGE] * per_image
            index += range(images * per_image, (images + 1) * per_image)
            images += 1
        else:
            ids.append(item)
            index.append(-1)
    pixels = np.zeros((images, 3, 2, 2), np.float32) if images else None
    return Prompt(np.array([ids]), np.array([index]), pixels, images, per_image)


@given(layouts, st.data())
def test_shrink_equals_a_prompt_built_that_small(layout: list[int | None], data: st.DataObject) -> None:
    per_image = data.draw(st.integers(1, 9))
    keep = data.draw(st.integers(1, per_image))
    small, want = build(layout, per_image).shrink(keep), build(layout, keep)
    np.testing.assert_array_equal(small.input_ids, want.input_ids)
    np.testing.assert_array_equal(small.visual_index, want.visual_index)
    assert (small.images, small.per_image, small.length) == (want.images, keep, want.length)


@given(layouts, st.data())
def test_shrink_touches_no_text_and_counts_visual_tokens(layout: list[int | None], data: st.DataObject) -> None:
    per_image = data.draw(st.integers(1, 9))
    keep = data.draw(st.integers(1, per_image))
    prompt = build(layout, per_image)
    small = prompt.shrink(keep)
    text = small.visual_index[0] < 0
    assert small.input_ids[0, text].tolist() == [item for item in layout if item is not None]
    assert small.visual_index[0, ~text].tolist() == list(range(prompt.images * keep))
    assert (small.input_ids[0, ~text] == IMAGE).all()
    assert small.pixel_values is prompt.pixel_values


@given(layouts, st.data())
def test_shrink_to_all_is_neutral_and_shrinks_compose(layout: list[int | None], data: st.DataObject) -> None:
    per_image = data.draw(st.integers(1, 9))
    middle = data.draw(st.integers(1, per_image))
    keep = data.draw(st.integers(1, middle))
    prompt = build(layout, per_image)
    for one, other in ((prompt.shrink(per_image), prompt), (prompt.shrink(middle).shrink(keep), prompt.shrink(keep))):
        np.testing.assert_array_equal(one.input_ids, other.input_ids)
        np.testing.assert_array_equal(one.visual_index, other.visual_index)


@given(layouts, st.integers(1, 5), st.integers(0, 3), st.integers(0, 40))
def test_pad(layout: list[int | None], keep: int, more_images: int, more_text: int) -> None:
    prompt = build(layout, keep)
    text = prompt.length - prompt.images * keep
    budget = TokenBudget(
        images=prompt.images + more_images, visual_tokens=keep, text_tokens=text + more_text, new_tokens=2
    )
    ids, index = prompt.pad(budget)
    assert ids.shape == index.shape == (1, budget.sequence)
    np.testing.assert_array_equal(ids[:, : prompt.length], prompt.input_ids)
    np.testing.assert_array_equal(index[:, : prompt.length], prompt.visual_index)
    assert (ids[:, prompt.length :] == 0).all() and (index[:, prompt.length :] == -1).all()


@given(layouts, st.integers(1, 5), st.integers(1, 10))
def test_over_budget_is_refused_with_both_numbers(layout: list[int | None], keep: int, missing: int) -> None:
    prompt = build(layout, keep)
    text = prompt.length - prompt.images * keep
    budget = TokenBudget(images=prompt.images, visual_tokens=keep, text_tokens=text - missing, new_tokens=2)
    with pytest.raises(BundleError) as caught:
        prompt.pad(budget)
    assert f"{prompt.length} tokens" in str(caught.value) and f"holds {budget.sequence}" in str(caught.value)
    assert str(text) in str(caught.value.hint)


def test_unused_room_for_images_holds_text() -> None:
    """Columns are columns: text may use those of an image that is not there."""
    budget = TokenBudget(images=2, visual_tokens=5, text_tokens=8, new_tokens=2)
    ids, index = build([7] * 18, 5).pad(budget)
    assert (ids == 7).all() and (index == -1).all()


def test_more_images_than_the_budget() -> None:
    budget = TokenBudget(images=1, visual_tokens=1, text_tokens=50, new_tokens=2)
    with pytest.raises(BundleError, match="2 images in the prompt, the budget holds 1") as caught:
        build([None, 7, None], 1).pad(budget)
    assert caught.value.hint == "convert again with --images 2"


# --- the processor's side ---


@pytest.fixture(scope="module")
def prompter(tiny: Any) -> Prompter:
    loaded = tiny("llava")
    return Prompter(loaded.processor, loaded.model.config.image_token_id, 16)


@pytest.mark.parametrize(
    ("text", "images", "rendered"),
    [
        ("What?", 0, "USER: What? ASSISTANT:"),
        ("What?", 1, "USER: <image>\nWhat? ASSISTANT:"),
        ("What?", 2, "USER: <image>\n<image>\nWhat? ASSISTANT:"),
        ("Is <image> red?", 1, "USER: Is<image>\nred? ASSISTANT:"),
        ("Is <image> red?", 2, "USER: <image>\nIs<image>\nred? ASSISTANT:"),
        ("<image> a <image>", 2, "USER: <image>\na<image>\n ASSISTANT:"),
        ("", 1, "USER: <image>\n ASSISTANT:"),
    ],
)
def test_images_go_where_their_tags_are(text: str, images: int, rendered: str, prompter: Prompter) -> None:
    prompt = prompter([Image.new("RGB", (20, 30), "red")] * images, text)
    tokenizer = prompter.processor.tokenizer
    want = tokenizer(rendered.replace("<image>", "<image>" * 16))["input_ids"]
    assert prompt.input_ids[0].tolist() == want
    assert prompt.images == images
    assert prompt.visual_index[0][prompt.visual_index[0] >= 0].tolist() == list(range(16 * images))


def test_more_tags_than_images(prompter: Prompter) -> None:
    with pytest.raises(BundleError, match="2 <image> tags for 1 images"):
        prompter([Image.new("RGB", (8, 8))], "<image> and <image>")


def test_processor_of_another_model(prompter: Prompter) -> None:
    other = Prompter(prompter.processor, prompter.image_token_id, 25)
    with pytest.raises(BundleError, match="wrote 16 image tokens for 1 images of 25"):
        other([Image.new("RGB", (8, 8))], "What?")


MODES = [
    (m, s) for m in ("L", "LA", "RGBA", "P", "CMYK", "1", "I;16") for s in ("png", "tif") if (m, s) != ("CMYK", "png")
]


@pytest.mark.parametrize(("mode", "suffix"), MODES)
def test_every_kind_of_image_becomes_rgb(mode: str, suffix: str, tmp_path: Path) -> None:
    Image.new(mode, (5, 4)).save(tmp_path / f"a.{suffix}")
    opened = open_image(tmp_path / f"a.{suffix}")
    assert (opened.mode, opened.size) == ("RGB", (5, 4))
