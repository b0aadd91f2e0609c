"""Timing is positive and adds up; a drawing shows exactly what was kept, by one method or by several."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vlmcut
from PIL import Image
from vlmcut.errors import BundleError, ModelError
from vlmcut.manifest import Bucket, Panel
from vlmcut.passes import recipe as recipes
from vlmcut.passes.recipe import make
from vlmcut.pipeline import Request, convert
from vlmcut.prompt import Prompter
from vlmcut.runtime.bench import bench, full_prompt
from vlmcut.runtime.bundle import Bundle
from vlmcut.runtime.overlay import draw, fitting_picture, overlay, seen_picture, sheet
from vlmcut.surgery.load import Loaded, describe
from vlmcut.surgery.talk import Talk, see_all, see_picture
from vlmcut.validation.gallery import gallery
from vlmcut.validation.sweep_plan import Cell, applied

EDGE = (255, 210, 60)
CELL = 120  # pixels of one of 4 x 4 patches


@pytest.fixture(scope="module")
def model(bundle: Path) -> vlmcut.Bundle:
    return vlmcut.Bundle(bundle, threads=1)


@pytest.fixture(scope="module")
def laddered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny:llava of which 12 tokens enter, 6 go on from layer 1, and none from layer 2."""
    out = tmp_path_factory.mktemp("laddered") / "bundle"
    ladder = ((1, 0.5), (2, 0.0))
    convert(Request(model="tiny:llava", keep=(12,), inside="fastv", ladder=ladder, text_tokens=48, new_tokens=2), out)
    return out


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
    step = model.graphs._step

    def count(role: str, inputs: dict[str, np.ndarray]) -> np.ndarray:
        if role == "decode":
            steps.append(int(inputs["length"][0]))
            assert inputs["position_ids"].tolist() == [[steps[-1] - 1]]
        return step(role, inputs)

    monkeypatch.setattr(model.graphs, "_step", count)
    bench([model], runs=2, decode_tokens=1000, warmup=1)
    first, most = model.budget.sequence + 1, model.budget.cache
    assert steps == 3 * list(range(first, most + 1))  # never beyond the cache


def test_bench_of_two_bundles(model: vlmcut.Bundle) -> None:
    speeds = bench([model, model], runs=1, decode_tokens=2, warmup=0)
    assert len(speeds) == 2 and speeds[0].prompt_tokens == speeds[1].prompt_tokens


def test_full_prompt_fills_the_budget(model: vlmcut.Bundle) -> None:
    whole = full_prompt(model)
    assert whole.counts == (16, 16) and len(whole.pictures) == model.budget.images
    places = whole.input_ids[0] == model.manifest.layout.image_token_id
    assert whole.visual_index[0, places].tolist() == list(range(2 * 16)) and places.sum() == 32
    prompt, sights = model.see(whole)
    assert prompt.length == model.budget.sequence and [len(s.kept) for s in sights] == [5, 5]
    np.testing.assert_array_equal(full_prompt(model).input_ids, whole.input_ids)
    for one, other in zip(full_prompt(model).pictures, whole.pictures, strict=True):
        np.testing.assert_array_equal(one.pixel_values, other.pixel_values)


def patches(pixels: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """[rows * columns, height, width, 3]."""
    height, width = pixels.shape[0] // rows, pixels.shape[1] // columns
    tiles = pixels.reshape(rows, height, columns, width, 3).swapaxes(1, 2)
    return tiles.reshape(rows * columns, height, width, 3)


def check(pixels: np.ndarray, kept: set[int], colours: np.ndarray, rows: int, columns: int) -> None:
    """Kept cells are framed and bright, the others dim, each in its own colour, [cells, 3]."""
    for cell, patch in enumerate(patches(pixels, rows, columns)):
        edge = np.ones(patch.shape[:2], bool)
        edge[1:-1, 1:-1] = False
        inside = colours[cell] * (1 if cell in kept else 0.25)
        y, x = patch.shape[0] // 2, patch.shape[1] // 2
        middle = patch[y - 4 : y + 4, x - 4 : x + 4]
        np.testing.assert_allclose(middle, np.broadcast_to(inside, middle.shape), atol=1, rtol=0, err_msg=str(cell))
        assert (patch[edge] == EDGE).all() == (cell in kept), cell


def mosaic(rows: int, columns: int, side: int, seed: int = 0) -> tuple[Image.Image, np.ndarray]:
    """A picture of one-coloured squares, and their colours [rows * columns, 3]."""
    colours = np.random.default_rng(seed).integers(0, 256, (rows * columns, 3), dtype=np.uint8)
    pixels = colours.reshape(rows, columns, 3).repeat(side, axis=0).repeat(side, axis=1)
    return Image.fromarray(pixels), colours.astype(float)


def test_drawing_dims_dropped_and_frames_kept() -> None:
    picture = Image.new("RGB", (32, 32), (200, 100, 40))
    kept = np.array([0, 6, 15])
    pixels = np.asarray(draw([picture], kept, [Panel(rows=4, columns=4)]))
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
    pixels = np.asarray(draw([Image.new("RGB", (30, 20), "white")], np.array([5]), [Panel(rows=2, columns=3)]))
    assert pixels.shape == (320, 480, 3)
    assert (pixels[-80, -80] == 255).all() and (pixels[80, 80] == 64).all()


def test_panels_side_by_side() -> None:
    """Two tiles with line breaks, left and right half, then the whole picture; each cell in its own colour."""
    picture, colours = mosaic(2, 4, 60)
    tiles = [Panel(rows=2, columns=2, box=(0, x / 2, 1, (x + 1) / 2), line_breaks=True) for x in range(2)]
    panels = [*tiles, Panel(rows=2, columns=4)]
    assert [p.tokens for p in panels] == [6, 6, 8]
    # Tile 0: its first cell and a line break; tile 1: its last cell; the whole: cells 2 and 7.
    pixels = np.asarray(draw([picture], np.array([0, 2, 6 + 4, 12 + 2, 12 + 7]), panels))
    assert pixels.shape == (480, 480 + 8 + 480 + 8 + 480, 3)
    grid = colours.reshape(2, 4, 3)
    check(pixels[:, :480], {0}, grid[:, :2].reshape(-1, 3), 2, 2)
    check(pixels[:, 488:968], {3}, grid[:, 2:].reshape(-1, 3), 2, 2)
    check(pixels[:240, 976:], {2, 7}, colours, 2, 4)
    assert (pixels[240:, 976:] == 0).all() and (pixels[:, 480:488] == 0).all()  # nothing lies there


def test_seen_picture_undoes_the_processor(model: vlmcut.Bundle) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))  # the tower's size: nothing is resized
    (picture,) = model.prompt([image], "x").pictures
    seen = seen_picture(model.prompter.processor.image_processor, picture.pixel_values[0])
    np.testing.assert_array_equal(np.asarray(seen), np.asarray(image))


def test_overlay_of_a_bundle(model: vlmcut.Bundle) -> None:
    image, colours = mosaic(4, 4, 8, seed=1)  # the tower's size and patches: nothing is resized
    drawing, (found,) = overlay(model, image)
    kept, tokens = found.positions, found.tokens
    _, (sight,) = model.see(model.prompt([image], ""))
    np.testing.assert_array_equal(kept, sight.kept)
    assert (len(kept), tokens) == (5, 16)
    check(np.asarray(drawing), set(kept.tolist()), colours, 4, 4)


def test_overlay_draws_what_a_crop_leaves(model: vlmcut.Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """LLaVA-1.5's processor cuts the middle out of a wide picture: the tokens lie there, not over the whole."""
    images = model.prompter.processor.image_processor
    monkeypatch.setattr(images, "size", type(images.size)(shortest_edge=32))
    monkeypatch.setattr(images, "do_center_crop", True)
    middle, colours = mosaic(4, 4, 8, seed=2)
    wide = Image.new("RGB", (64, 32), "red")
    wide.paste(middle, (16, 0))
    drawing, (found,) = overlay(model, wide)
    check(np.asarray(drawing), set(found.positions.tolist()), colours, 4, 4)


def test_overlay_without_panels_is_refused(model: vlmcut.Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = replace(model.manifest.buckets[0], panels=())
    monkeypatch.setattr(model, "manifest", replace(model.manifest, buckets=(bucket,)))
    with pytest.raises(BundleError, match="does not know where the visual tokens"):
        overlay(model, Image.new("RGB", (32, 32)))


def test_picture_that_tokens_lie_on(model: vlmcut.Bundle) -> None:
    """One raster: what the processor left. Tiles: the whole picture."""
    images = model.prompter.processor.image_processor
    red = Image.new("RGB", (20, 10), "red")
    one = Bucket(size=(32, 32), geometry={}, tokens=16, panels=(Panel(rows=4, columns=4),))
    pixels = np.zeros((1, 3, 32, 32), np.float32)
    assert fitting_picture(images, pixels, one, red).size == (32, 32)
    tiles = replace(one, panels=one.panels * 2)
    assert fitting_picture(images, np.zeros((2, 3, 32, 32), np.float32), tiles, red).size == (20, 10)
    assert fitting_picture(images, pixels[0], one, red).size == (20, 10)


def test_sheet_has_a_title_above_each() -> None:
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (9, 9, 9), (99, 9, 9)]
    drawings = [(f"number {i}", Image.new("RGB", (480, 480), colour)) for i, colour in enumerate(colours)]
    whole = np.asarray(sheet(drawings))
    assert whole.shape == (2 * (480 + 34) + 16, 3 * 480 + 2 * 16, 3)  # five in rows of three and two
    for i, colour in enumerate(colours):
        top, left = i // 3 * (480 + 34 + 16), i % 3 * (480 + 16)
        assert (whole[top + 34 : top + 34 + 480, left : left + 480] == colour).all()
        title = whole[top : top + 34, left : left + 480]
        assert (title == 255).all(axis=-1).mean() > 0.5 and (title == 0).any()
    assert (whole[514 + 16 :, 2 * 496 :] == 255).all()  # no sixth


def test_sheet_of_a_narrow_picture_keeps_titles_apart() -> None:
    title = "a-method-with-many-options:alpha=0.1:beta=0.2: 36 of 144"
    whole = sheet([(title, Image.new("RGB", (60, 480))), (title, Image.new("RGB", (60, 480)))])
    assert whole.width > 2 * 500 and whole.height == 480 + 34


def test_gallery_draws_what_each_method_keeps(tiny: Callable[[str], Loaded]) -> None:
    image, colours = mosaic(4, 4, 8, seed=3)
    loaded = tiny("llava")
    a = describe(loaded.model)
    methods = ["uniform", "divprune", "visionzip", "tome", "cdpruner"]
    drawing, found = gallery("tiny:llava", a, image, methods, (5,), question="What is red?")
    make([]).apply(loaded.model, None)
    (picture,) = Prompter(loaded.processor, a.layout)([image], "What is red?").pictures
    for number, (method, one) in enumerate(zip(methods, found, strict=True)):
        with applied(loaded.model, Cell(method, (5,))):
            want = see_picture(loaded.model, picture).kept.numpy()
        assert (one.name, one.tokens) == (method, 16)
        np.testing.assert_array_equal(one.positions, want)
        top, left = number // 3 * (480 + 34 + 16) + 34, number % 3 * (480 + 16)
        check(np.asarray(drawing)[top : top + 480, left : left + 480], set(want.tolist()), colours, 4, 4)
    assert len({tuple(one.positions) for one in found}) > 2


def test_gallery_without_panels_is_refused(tiny: Callable[[str], Loaded]) -> None:
    a = describe(tiny("llava").model)
    blind = replace(a, buckets=(replace(a.buckets[0], panels=()),))
    with pytest.raises(ModelError, match="does not know where the visual tokens"):
        gallery("tiny:llava", blind, Image.new("RGB", (32, 32)), ["uniform"], (5,))


@pytest.mark.parametrize("question", ["What is red?", "Where is the blue one, left or right of the other?"])
def test_tokens_that_leave_inside_are_drawn_rung_by_rung(
    question: str, laddered: Path, tiny: Callable[[str], Loaded]
) -> None:
    """What the drawing shows is what the cut model in eager lets go on at each layer, found without a graph."""
    image, colours = mosaic(4, 4, 8, seed=3)
    drawing, found = overlay(vlmcut.Bundle(laddered, threads=1), image, question=question)
    loaded = tiny("llava")
    recipes.read(laddered / "recipe.toml").apply(loaded.model, None)
    shrunk, seen = see_all(loaded.model, Prompter(loaded.processor, describe(loaded.model).layout)([image], question))
    (entered,), kept = shrunk.visual_index, Talk.read(loaded.model, [shrunk], [seen]).kept
    want = [seen[0].kept.numpy()]
    want += [want[0][entered[columns[0].numpy()][entered[columns[0].numpy()] >= 0]] for columns in kept]
    assert [one.name for one in found] == ["enter", "from layer 1", "from layer 2"]
    assert [len(one.positions) for one in found] == [12, 6, 0]
    assert drawing.size == (3 * 480 + 2 * 16, 480 + 34)
    for number, (one, positions) in enumerate(zip(found, want, strict=True)):
        np.testing.assert_array_equal(one.positions, positions)
        left = number * (480 + 16)
        check(np.asarray(drawing)[34:, left : left + 480], set(positions.tolist()), colours, 4, 4)


def test_a_question_over_budget_is_not_drawn(laddered: Path) -> None:
    """Who leaves inside depends on the whole prompt."""
    with pytest.raises(BundleError, match=r"the prompt has \d+ tokens .*the budget holds 60"):
        overlay(vlmcut.Bundle(laddered, threads=1), Image.new("RGB", (32, 32)), question="What is red? " * 40)


def test_overlay_asks_what_it_is_told(model: vlmcut.Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    prompt = model.prompt

    def record(images: Any, text: str, *, fit: bool = False) -> Any:
        asked.append(text)
        return prompt(images, text, fit=fit)

    monkeypatch.setattr(model, "prompt", record)
    overlay(model, Image.new("RGB", (32, 32)), question="What is red?")
    assert asked == ["What is red?"]


def test_a_clip_is_drawn_frame_by_frame(tmp_path: Path) -> None:
    """Frames side by side, each with what is kept of it; one picture alone is refused."""
    out = tmp_path / "clip"
    convert(Request(model="tiny:llava", keep=(20,), method="evs", frames=2, text_tokens=48, new_tokens=2), out)
    model = Bundle(out)
    rng = np.random.default_rng(0)
    frames = [Image.fromarray(rng.integers(128, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(2)]
    drawing, (found,) = overlay(model, *frames)
    kept = found.positions
    assert found.tokens == 32 and kept[:16].tolist() == list(range(16)) and len(kept) == 20  # the first frame whole
    width = (drawing.width - 8) // 2
    first, second = np.asarray(drawing)[:, :width], np.asarray(drawing)[:, width + 8 :]
    assert first.mean() > 1.5 * second.mean()
    with pytest.raises(BundleError, match="1 images, but clips have 2 frames"):
        overlay(model, frames[0])
    with pytest.raises(BundleError, match="4 images, a drawing shows 2"):
        overlay(model, *frames, *frames)
