"""Timing is positive and adds up; a drawing shows exactly what was kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import vlmcut
from PIL import Image
from vlmcut.runtime.bench import bench, full_prompt
from vlmcut.runtime.overlay import draw, overlay, seen_picture

EDGE = (255, 210, 60)
CELL = 120  # pixels of one of 4 x 4 patches


@pytest.fixture(scope="module")
def model(bundle: Path) -> vlmcut.Bundle:
    return vlmcut.Bundle(bundle, threads=1)


def test_bench_adds_up(model: vlmcut.Bundle) -> None:
    (speed,) = bench([model], runs=3, decode_tokens=4, warmup=1)
    assert (speed.images, speed.prompt_tokens) == (2, model.budget.sequence)
    for name, value in speed.to_json().items():
        assert value > 0, name
    assert speed.tokens_per_second == pytest.approx(1000 / speed.decode_ms)
    # A median of sums lies near the sum of medians; both parts are in it.
    assert max(speed.vision_ms, speed.prefill_ms) < speed.ttft_ms < 3 * (speed.vision_ms + speed.prefill_ms)


def test_bench_counts_what_it_says(model: vlmcut.Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    decode = model.graphs.decode

    def count(token: int, length: int) -> np.ndarray:
        steps.append(length)
        return decode(token, length)

    monkeypatch.setattr(model.graphs, "decode", count)
    bench([model], runs=2, decode_tokens=1000, warmup=1)
    first, most = model.budget.sequence + 1, model.budget.cache
    assert steps == 3 * list(range(first, most + 1))  # never beyond the cache


def test_bench_of_two_bundles(model: vlmcut.Bundle) -> None:
    speeds = bench([model, model], runs=1, decode_tokens=2, warmup=0)
    assert len(speeds) == 2 and speeds[0].prompt_tokens == speeds[1].prompt_tokens


def test_full_prompt_fills_the_budget(model: vlmcut.Bundle) -> None:
    prompt = full_prompt(model)
    assert prompt.length == model.budget.sequence and prompt.images == model.budget.images
    places = prompt.input_ids[0] == model.manifest.image_token_id
    assert prompt.visual_index[0, places].tolist() == list(range(2 * 5))
    np.testing.assert_array_equal(full_prompt(model).input_ids, prompt.input_ids)


def test_drawing_dims_dropped_and_frames_kept() -> None:
    picture = Image.new("RGB", (32, 32), (200, 100, 40))
    kept = np.array([0, 6, 15])
    pixels = np.asarray(draw(picture, kept, (4, 4)))
    assert pixels.shape == (480, 480, 3)
    for position in range(16):
        top, left = position // 4 * CELL, position % 4 * CELL
        patch = pixels[top : top + CELL, left : left + CELL]
        edge = np.ones((CELL, CELL), bool)
        edge[1:-1, 1:-1] = False
        inside = (200, 100, 40) if position in kept else (50, 25, 10)
        assert (patch[~edge] == inside).all(), position
        assert (patch[edge] == (EDGE if position in kept else inside)).all(), position


def test_grid_need_not_be_square() -> None:
    pixels = np.asarray(draw(Image.new("RGB", (30, 20), "white"), np.array([5]), (2, 3)))
    assert pixels.shape == (320, 480, 3)
    assert (pixels[-80, -80] == 255).all() and (pixels[80, 80] == 64).all()


def test_seen_picture_undoes_the_processor(model: vlmcut.Bundle) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))  # the tower's size: nothing is resized
    prompt = model.prompt([image], "x")
    assert prompt.pixel_values is not None
    seen = seen_picture(model.prompter.processor.image_processor, prompt.pixel_values[0])
    np.testing.assert_array_equal(np.asarray(seen), np.asarray(image))


def test_overlay_of_a_bundle(model: vlmcut.Bundle) -> None:
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    drawing, kept = overlay(model, image)
    _, (want,) = model.see(model.prompt([image], ""))
    np.testing.assert_array_equal(kept, want)
    assert len(kept) == 5
    pixels, source = np.asarray(drawing).astype(int), np.asarray(image).astype(float)
    for position in range(16):
        row, column = position // 4, position % 4
        have = pixels[row * CELL + 2 : (row + 1) * CELL : 15, column * CELL + 2 : (column + 1) * CELL : 15]
        patch = source[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
        light = 1 if position in kept else 0.25
        np.testing.assert_allclose(have, patch * light, atol=0.5, rtol=0)  # rounded to whole steps
