"""Prompts: shrinking drops placeholders and nothing else, padding adds and never truncates."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from vlmcut.errors import BundleError
from vlmcut.manifest import Bucket, Layout, TokenBudget
from vlmcut.prompt import Picture, Prompt, Prompter, assemble, open_image, positions

IMAGE = 3  # id of the placeholder
COMPACT = Layout(image_token_id=IMAGE)
FROM_ONE = Layout(image_token_id=IMAGE, first_position=1)
MROPE = Layout(image_token_id=IMAGE, positions="mrope", merge=2)
LAYOUTS = st.sampled_from([COMPACT, FROM_ONE, MROPE])
# A sequence: text tokens as numbers, images as the rows and columns of their tokens.
GRIDS = st.tuples(st.integers(1, 4), st.integers(1, 4))
SEQUENCES = st.lists(st.one_of(st.integers(4, 300), GRIDS), min_size=1, max_size=20)
Sequence = list[int | tuple[int, int]]


def grids(sequence: Sequence) -> list[tuple[int, int]]:
    return [item for item in sequence if isinstance(item, tuple)]


def build(sequence: Sequence, layout: Layout = COMPACT) -> Prompt:
    """A whole prompt: as many placeholders for an image as its grid has tokens."""
    ids = [i for item in sequence for i in ([item] if isinstance(item, int) else [IMAGE] * (item[0] * item[1]))]
    pictures = [
        Picture(
            np.zeros((1, 3, 2, 2), np.float32),
            {"pixel_values": (1, 3, 2, 2), "image_grid_thw": (1, rows * layout.merge, columns * layout.merge)},
        )
        for rows, columns in grids(sequence)
    ]
    return assemble(layout, np.array([ids], np.int64), pictures, [rows * columns for rows, columns in grids(sequence)])


def draw_kept(data: st.DataObject, counts: Any) -> list[np.ndarray]:
    """For each picture some of its tokens, ascending, at least one; pictures keep unequal numbers."""
    places = [data.draw(st.sets(st.integers(0, count - 1), min_size=1)) for count in counts]
    return [np.array(sorted(chosen), np.int64) for chosen in places]


@given(SEQUENCES, LAYOUTS, st.data())
def test_shrink_by_a_loop(sequence: Sequence, layout: Layout, data: st.DataObject) -> None:
    """Column by column: text stays, a placeholder stays if its token does; M-RoPE positions go along."""
    prompt = build(sequence, layout)
    kept = draw_kept(data, prompt.counts)
    small = prompt.shrink(kept)
    ids, ranks, columns = [], [], []
    column = picture = rank = 0
    for item in sequence:
        if isinstance(item, int):
            ids.append(item)
            ranks.append(-1)
            columns.append(column)
            column += 1
            continue
        for token in kept[picture].tolist():
            ids.append(IMAGE)
            ranks.append(rank)
            columns.append(column + token)
            rank += 1
        column += item[0] * item[1]
        picture += 1
    assert small.input_ids[0].tolist() == ids and small.visual_index[0].tolist() == ranks
    assert small.counts == tuple(map(len, kept)) and small.length == len(ids)
    assert small.pictures is prompt.pictures and small.layout is layout
    if layout.positions == "mrope":  # a token keeps its place in the picture, and text what came before it
        np.testing.assert_array_equal(small.position_ids, prompt.position_ids[:, columns])
        assert small.next_position == prompt.next_position
    else:
        assert small.position_ids.tolist() == [list(range(layout.first_position, layout.first_position + len(ids)))]
        assert small.next_position == layout.first_position + len(ids)


@given(SEQUENCES, LAYOUTS, st.data())
def test_shrink_never_drops_text(sequence: Sequence, layout: Layout, data: st.DataObject) -> None:
    prompt = build(sequence, layout)
    small = prompt.shrink(draw_kept(data, prompt.counts))
    text = small.visual_index[0] < 0
    assert small.input_ids[0, text].tolist() == [item for item in sequence if isinstance(item, int)]
    assert small.visual_index[0, ~text].tolist() == list(range(sum(small.counts)))
    assert (small.input_ids[0, ~text] == IMAGE).all()
    assert small.position_ids.shape == (layout.axes, small.length)
    assert (small.position_ids < small.next_position).all()  # what follows is new to every row


@given(SEQUENCES, LAYOUTS, st.data())
def test_shrink_to_all_is_neutral_and_shrinks_compose(sequence: Sequence, layout: Layout, data: st.DataObject) -> None:
    prompt = build(sequence, layout)
    middle = draw_kept(data, prompt.counts)
    inner = draw_kept(data, [len(m) for m in middle])
    for one, other in (
        (prompt.shrink([np.arange(n) for n in prompt.counts]), prompt),
        (prompt.shrink(middle).shrink(inner), prompt.shrink([m[i] for m, i in zip(middle, inner, strict=True)])),
    ):
        for name in ("input_ids", "visual_index", "position_ids"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        assert (one.next_position, one.counts) == (other.next_position, other.counts)


@given(SEQUENCES, LAYOUTS, st.data())
def test_pad(sequence: Sequence, layout: Layout, data: st.DataObject) -> None:
    whole = build(sequence, layout)
    prompt = whole.shrink(draw_kept(data, whole.counts))
    text = prompt.length - sum(prompt.counts)
    most = max(prompt.counts, default=1) + data.draw(st.integers(0, 3))
    budget = TokenBudget(
        images=len(prompt.counts) + data.draw(st.integers(0, 3)),
        visual_tokens=most,
        text_tokens=text + data.draw(st.integers(0, 40)),
        new_tokens=2,
    )
    made = prompt.pad(budget)
    assert sorted(made) == ["input_ids", "length", "position_ids", "visual_index"]
    assert made["input_ids"].shape == made["visual_index"].shape == (1, budget.sequence)
    assert made["position_ids"].shape == (layout.axes, budget.sequence)
    assert made["length"].tolist() == [prompt.length]
    assert all(value.dtype == np.int64 for value in made.values())
    visual = prompt.visual_index[0] >= 0
    np.testing.assert_array_equal(made["input_ids"][0, : prompt.length], np.where(visual, 0, prompt.input_ids[0]))
    np.testing.assert_array_equal(made["position_ids"][:, : prompt.length], prompt.position_ids)
    # Token i of picture p takes row p * visual_tokens + i: every picture has its own rows, however few it kept.
    slots = [p * most + i for p, count in enumerate(prompt.counts) for i in range(count)]
    assert made["visual_index"][0, : prompt.length][visual].tolist() == slots
    assert len(set(slots)) == len(slots) and max(slots, default=0) < max(1, budget.images * most)
    assert (made["visual_index"][0, : prompt.length][~visual] == -1).all()
    rest = {"input_ids": 0, "visual_index": -1, "position_ids": 0}
    assert all((made[name][:, prompt.length :] == value).all() for name, value in rest.items())


@given(SEQUENCES, st.integers(1, 10))
def test_over_budget_is_refused_with_both_numbers(sequence: Sequence, missing: int) -> None:
    whole = build(sequence)
    prompt = whole.shrink([np.arange(1)] * len(whole.counts))
    text = prompt.length - len(prompt.counts)
    budget = TokenBudget(images=len(prompt.counts), visual_tokens=1, text_tokens=text - missing, new_tokens=2)
    with pytest.raises(BundleError) as caught:
        prompt.pad(budget)
    assert f"{prompt.length} tokens" in str(caught.value) and f"holds {budget.sequence}" in str(caught.value)
    assert f"{len(prompt.counts)} images of {sum(prompt.counts)} in all and {text} of text" in str(caught.value)
    assert str(text) in str(caught.value.hint)


def test_unused_room_for_images_holds_text() -> None:
    """Columns are columns: text may use those of an image that is not there."""
    budget = TokenBudget(images=2, visual_tokens=5, text_tokens=8, new_tokens=2)
    made = build([7] * 18).pad(budget)
    assert (made["input_ids"] == 7).all() and (made["visual_index"] == -1).all()
    assert made["position_ids"].tolist() == [list(range(18))]


def test_more_images_than_the_budget() -> None:
    budget = TokenBudget(images=1, visual_tokens=1, text_tokens=50, new_tokens=2)
    with pytest.raises(BundleError, match="2 images in the prompt, the budget holds 1") as caught:
        build([(1, 1), 7, (1, 1)]).pad(budget)
    assert caught.value.hint == "convert again with --images 2"


# --- positions


@given(SEQUENCES)
def test_mrope_by_a_loop(sequence: Sequence) -> None:
    """arXiv:2409.12191, section 2.1, token by token."""
    want: list[tuple[int, int, int]] = []
    start = 0
    for item in sequence:
        if isinstance(item, int):
            want.append((start,) * 3)
        else:
            want += [(start, start + row, start + column) for row in range(item[0]) for column in range(item[1])]
        start = max(start, 1 + max(max(place) for place in want)) if want else start
    prompt = build(sequence, MROPE)
    assert prompt.position_ids.T.tolist() == [list(place) for place in want]
    assert prompt.next_position == start


@pytest.fixture(scope="module")
def mrope(tiny: Any) -> Any:
    made: dict[str, Any] = {}
    return lambda kind: made.setdefault(kind, tiny(kind))


TALL, WIDE, SQUARE = (96, 64), (64, 160), (64, 64)  # height, width: grids of different shape, and sides


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ([TALL], "What is it?"),
        ([TALL], "What is it? <image>"),
        ([TALL, WIDE], "Is <image> the same as <image>"),
        ([WIDE, TALL], "<image> Is it left or right of <image>, or of both?"),
        ([SQUARE, WIDE, TALL], "One <image>, two <image>"),
        ([WIDE, WIDE], "twice"),
    ],
)
def test_mrope_is_transformers(kind: str, sizes: list[tuple[int, int]], text: str, mrope: Any) -> None:
    """Positions and the position after them, against `get_rope_index` of the model itself."""
    loaded = mrope(kind)
    layout = loaded.model.vlmcut.family.layout(loaded.model.config)
    assert (layout.positions, layout.axes) == ("mrope", 3)
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
    prompter = Prompter(loaded.processor, layout)
    prompt = prompter(images, text)
    raw = prompter.raw(images, text)
    grid = torch.as_tensor(np.asarray(raw["image_grid_thw"]))
    assert [p.geometry["image_grid_thw"] for p in prompt.pictures] == [tuple(g) for g in grid.tolist()]
    ids = torch.from_numpy(prompt.input_ids)
    kinds = (ids == layout.image_token_id).int()
    want, delta = loaded.model.model.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=grid)
    assert want.shape == (3, 1, prompt.length)
    np.testing.assert_array_equal(prompt.position_ids, want[:, 0].numpy())
    assert prompt.next_position == prompt.length + int(delta)
    assert prompt.next_position < prompt.length  # an image takes fewer positions than it has tokens


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_mrope_of_an_image_at_the_very_end(kind: str, mrope: Any) -> None:
    """Chat templates put text behind the last image; ids without it, and with none in front."""
    loaded = mrope(kind)
    layout = loaded.model.vlmcut.family.layout(loaded.model.config)
    grid = [(1, 6 * layout.merge, 2 * layout.merge), (1, 2 * layout.merge, 5 * layout.merge)]
    pictures = [Picture(np.zeros((1, 1), np.float32), {"image_grid_thw": g}) for g in grid]
    ids = np.array([[layout.image_token_id] * 12 + [30, 31, 32] + [layout.image_token_id] * 10], np.int64)
    prompt = assemble(layout, ids, pictures, (12, 10))
    want, delta = loaded.model.model.get_rope_index(
        torch.from_numpy(ids),
        mm_token_type_ids=torch.from_numpy(ids == layout.image_token_id).int(),
        image_grid_thw=torch.tensor(grid),
    )
    np.testing.assert_array_equal(prompt.position_ids, want[:, 0].numpy())
    assert prompt.next_position == ids.shape[1] + int(delta) == 6 + 3 + 5


def test_compact_positions() -> None:
    for layout in (COMPACT, FROM_ONE):
        found, after = positions(layout, np.full((1, 4), -1), ())
        assert found.tolist() == [[n + layout.first_position for n in range(4)]] and after == 4 + layout.first_position


# --- pictures and buckets


def test_a_picture_finds_its_bucket() -> None:
    """Every number counts: pixels alike and another grid is another bucket; a refusal names both."""
    wide = {"pixel_values": (16, 12), "image_grid_thw": (1, 2, 8)}
    tall = {"pixel_values": (16, 12), "image_grid_thw": (1, 8, 2)}
    buckets = [Bucket(size=(28, 112), geometry=wide, tokens=4), Bucket(size=(112, 28), geometry=tall, tokens=4)]
    pixels = np.zeros((16, 12), np.float32)
    assert Picture(pixels, dict(wide)).bucket(buckets) == 0 and Picture(pixels, dict(tall)).bucket(buckets) == 1
    other = Picture(pixels, {"pixel_values": (16, 12), "image_grid_thw": (1, 4, 4)})
    with pytest.raises(BundleError) as caught:
        other.bucket(buckets)
    message = str(caught.value)
    assert "the image makes pixel_values 16x12, image_grid_thw 1x4x4, which no bucket has" in message
    assert "28x112: pixel_values 16x12, image_grid_thw 1x2x8" in message
    assert "112x28: pixel_values 16x12, image_grid_thw 1x8x2" in message
    assert "--fit" in (caught.value.hint or "") and "--image-size" in (caught.value.hint or "")


def test_an_image_of_another_size_names_both(mrope: Any) -> None:
    """What a real processor makes of it: the bucket's numbers and the image's."""
    loaded = mrope("qwen2_vl")
    (bucket,) = loaded.model.vlmcut.buckets
    prompter = Prompter(loaded.processor, loaded.model.vlmcut.family.layout(loaded.model.config))
    height, width = bucket.size
    same, _ = prompter.look(Image.new("RGB", (width, height)))
    assert same.bucket([bucket]) == 0
    other, _ = prompter.look(Image.new("RGB", (width * 2, height)))
    have, want = ("x".join(map(str, p)) for p in (bucket.geometry["image_grid_thw"], other.geometry["image_grid_thw"]))
    assert have != want
    with pytest.raises(BundleError, match=f"image_grid_thw {want}, which no bucket has .*image_grid_thw {have}"):
        other.bucket([bucket])


# --- the processor's side ---


@pytest.fixture(scope="module")
def prompter(tiny: Any) -> Prompter:
    loaded = tiny("llava")
    return Prompter(loaded.processor, Layout(image_token_id=loaded.model.config.image_token_id))


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
    assert len(prompt.pictures) == images and prompt.counts == (16,) * images
    assert prompt.visual_index[0][prompt.visual_index[0] >= 0].tolist() == list(range(16 * images))


def test_more_tags_than_images(prompter: Prompter) -> None:
    with pytest.raises(BundleError, match="2 <image> tags for 1 images"):
        prompter([Image.new("RGB", (8, 8))], "<image> and <image>")


def test_processor_of_another_model(prompter: Prompter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images together must have the placeholders that each has alone."""
    look = Prompter.look
    monkeypatch.setattr(Prompter, "look", lambda self, image: (look(self, image)[0], 25))
    with pytest.raises(BundleError, match="wrote 32 image tokens for 2 images of 25, 25"):
        prompter([Image.new("RGB", (8, 8))] * 2, "What?")


def test_each_image_is_the_one_that_it_is_alone(prompter: Prompter) -> None:
    """In order, whatever stands between them: pixels and counts of each are those of `look`."""
    images = [Image.new("RGB", (20, 30), color) for color in ("red", "blue", "green")]
    prompt = prompter(images, "One <image>, two <image>")
    for image, picture, count in zip(images, prompt.pictures, prompt.counts, strict=True):
        alone, tokens = prompter.look(image)
        assert count == tokens == 16 and picture.geometry == alone.geometry == {"pixel_values": (1, 3, 32, 32)}
        np.testing.assert_array_equal(picture.pixel_values, alone.pixel_values)
        assert picture.pixel_values.dtype == np.float32
    assert prompter([], "What?").pictures == ()


MODES = [
    (m, s) for m in ("L", "LA", "RGBA", "P", "CMYK", "1", "I;16") for s in ("png", "tif") if (m, s) != ("CMYK", "png")
]


@pytest.mark.parametrize(("mode", "suffix"), MODES)
def test_every_kind_of_image_becomes_rgb(mode: str, suffix: str, tmp_path: Path) -> None:
    Image.new(mode, (5, 4)).save(tmp_path / f"a.{suffix}")
    opened = open_image(tmp_path / f"a.{suffix}")
    assert (opened.mode, opened.size) == ("RGB", (5, 4))


@pytest.mark.parametrize("suffix", [".mp4", ".MOV", ".webm", ".mkv", ".avi", ".m4v", ".mpg", ".mpeg"])
def test_a_video_is_refused_by_what_it_is(suffix: str, tmp_path: Path) -> None:
    """Whether it is there or not, and whatever is in it."""
    for there in (False, True):
        path = tmp_path / f"clip{suffix}"
        if there:
            Image.new("RGB", (4, 4)).save(path, format="PNG")
        with pytest.raises(BundleError, match=re.escape(f"{path}` is a video, a bundle takes images")) as caught:
            open_image(path)
        assert caught.value.hint == "give its frames, one --image for each"


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no image `.*nothing\.png`"):
        open_image(tmp_path / "nothing.png")
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(BundleError, match=r"text\.png` is not a readable image"):
        open_image(tmp_path / "text.png")
