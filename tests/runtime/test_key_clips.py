"""Key clips against the paper's rules written as loops, and the frames that a bundle is shown."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
import vlmcut
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from vlmcut import cli
from vlmcut.errors import BundleError
from vlmcut.runtime.key_clips import Clip, clusters, cosines, key_clips, key_frames, peaks, read_similarity

# Few values on purpose: ties and plateaus.
CURVES = st.lists(st.integers(0, 4), min_size=1, max_size=24).map(lambda x: np.array(x) / 4)


# --- by another road ---


def slow_peaks(curve: np.ndarray) -> list[int]:
    """Every frame with a lower one before it, and a lower one behind it and all that equal it; ends are lower."""
    found = []
    for frame in range(len(curve)):
        behind = frame
        while behind + 1 < len(curve) and curve[behind + 1] == curve[frame]:
            behind += 1
        rises = frame == 0 or curve[frame - 1] < curve[frame]
        if rises and (behind + 1 == len(curve) or curve[behind + 1] < curve[frame]):
            found.append(frame)
    return found


def variation(group: tuple[int, ...]) -> float:
    return sum((x - sum(group) / len(group)) ** 2 for x in group)


def slow_clusters(times: list[int], count: int) -> float:
    """The least sum of squared distances from the means, over every way to cut the line."""
    cuts = itertools.combinations(range(1, len(times)), count - 1)
    splits = ([0, *cut, len(times)] for cut in cuts)
    return min(sum(variation(tuple(times[a:b])) for a, b in itertools.pairwise(split)) for split in splits)


def slow_clip(similarity: np.ndarray, features: np.ndarray | None, anchor: int, longest: int) -> tuple[int, int]:
    """Every length up to `longest`: mean similarity - 0.5 mean pairwise cosine + 0.05 length / longest."""
    best, found = None, (0, 0)
    for length in range(1, longest + 1):
        if length > len(similarity):
            break
        start = anchor - (length - 1) // 2
        while start < 0:
            start += 1
        while start + length > len(similarity):
            start -= 1
        frames = range(start, start + length)
        worth = sum(similarity[f] for f in frames) / length + 0.05 * length / longest
        if features is not None:
            pairs = [
                features[a] @ features[b] / np.sqrt((features[a] @ features[a]) * (features[b] @ features[b]))
                for a in frames
                for b in frames
            ]
            worth -= 0.5 * sum(pairs) / len(pairs)
        if best is None or worth > best + 1e-12:  # sums in another order; lengths differ by 0.0125 and more
            best, found = worth, (start, length)
    return found


@given(CURVES)
def test_peaks_are_the_runs_above_their_neighbours(curve: np.ndarray) -> None:
    assert peaks(curve).tolist() == slow_peaks(curve)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=9, unique=True), st.integers(1, 9))
def test_clusters_are_the_best_of_all_cuts(times: list[int], count: int) -> None:
    times, count = sorted(times), min(count, len(times))
    found = clusters(np.array(times), count)
    assert len(found) == count and all(len(run) for run in found)
    assert np.concatenate(found).tolist() == times
    # float64, sums of squares below 2e4; measured 4e-12.
    assert sum(variation(tuple(run)) for run in found) == pytest.approx(slow_clusters(times, count), abs=1e-9)


def test_equal_cuts_give_the_earlier() -> None:
    assert [run.tolist() for run in clusters(np.array([0, 1, 2]), 2)] == [[0], [1, 2]]


@given(st.data(), st.integers(1, 30), st.integers(1, 4), st.booleans())
def test_clips_follow_the_rules(data: st.DataObject, frames: int, longest: int, alike: bool) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    similarity = rng.random(frames)
    features = rng.normal(size=(frames, 3)) + 1 if alike else None
    count = data.draw(st.integers(1, frames))
    anchors = slow_peaks(similarity)
    if len(anchors) > count:
        anchors = [max(run, key=lambda a: similarity[a]) for run in clusters(np.array(anchors), count)]
    spans = []
    for anchor in anchors:
        start, length = slow_clip(similarity, features, int(anchor), longest)
        spans.append((start, length, min(2.0, max(1.0, np.sqrt(len(anchors) * length / count)))))
    found = key_clips(similarity, count, features, longest)
    for scale in {clip.scale for clip in found} | {round(s, 12) for _, _, s in spans}:
        # Frames of one scale, clip by clip: what overlapping spans cover together.
        want = {f for start, length, s in spans if np.isclose(s, scale) for f in range(start, start + length)}
        assert sorted(f for c in found if np.isclose(c.scale, scale) for f in c.frames) == sorted(want)
    assert {clip.anchor for clip in found} <= set(anchors)


@given(CURVES, st.data(), st.integers(1, 4), st.booleans())
def test_what_always_holds(curve: np.ndarray, data: st.DataObject, longest: int, alike: bool) -> None:
    count = data.draw(st.integers(1, len(curve)))
    features = np.stack([curve, 1 - curve], axis=1) if alike else None
    found = key_clips(curve, count, features, longest)
    assert 1 <= len(found) <= count
    assert found == sorted(found, key=lambda c: (c.start, c.anchor))
    for clip in found:
        assert clip.start >= 0 and clip.frames[-1] < len(curve) and clip.anchor in clip.frames
        assert 1 <= clip.scale <= 2
    # Never dearer than `count` frames of full size; float64 roots squared, measured 2e-15.
    assert sum(clip.length / clip.scale**2 for clip in found) <= count + 1e-12
    for one, other in itertools.combinations(found, 2):
        assert one.scale != other.scale or not set(one.frames) & set(other.frames)


def test_worked_by_hand() -> None:
    similarity = np.array([0.0, 0.0, 0.9, 0.9, 0.9, 0.9, 0.0, 0.0, 0.0, 0.9, 0.0])
    # Frame 2 begins the plateau. Its clips: 2 alone .9 + .0125; 2, 3 .9 + .025; 1 to 3 .6 + .0375; 1 to 4 .675 + .05.
    # Two anchors for two places: two frames are as dear as one when their area is halved.
    assert key_clips(similarity, 2) == [Clip(2, 2, 2, 2**0.5), Clip(9, 9, 1, 1.0)]
    # For four places, nothing has to be made smaller.
    assert key_clips(similarity, 4) == [Clip(2, 2, 2, 1.0), Clip(9, 9, 1, 1.0)]


def test_redundancy_worked_by_hand() -> None:
    similarity = np.array([0.0, 0.0, 0.7, 0.9, 0.7, 0.0, 0.0])
    assert key_clips(similarity, 1) == [Clip(3, 3, 1, 1.0)]  # .9 + .0125 against .8 + .025 and .767 + .0375
    # Frames without anything in common: -.5 + .9125, -.25 + .825, -.167 + .804, -.125 + .625.
    assert key_clips(similarity, 1, np.eye(7)) == [Clip(3, 2, 3, 3**0.5)]
    # Frames all alike are all equally redundant, one as well as four.
    assert key_clips(similarity, 1, np.ones((7, 3))) == [Clip(3, 3, 1, 1.0)]


def test_overlapping_clips_of_one_scale_become_one() -> None:
    similarity = np.array([0.79, 0.8, 0.79, 0.81, 0.79])
    assert key_clips(similarity, 2) == [Clip(3, 0, 5, 2.0)]  # peaks 1 and 3 with frames 0 to 3 and 1 to 4
    assert key_clips(similarity, 2, longest=1) == [Clip(1, 1, 1, 1.0), Clip(3, 3, 1, 1.0)]


def test_clips_of_one_frame_are_the_peaks() -> None:
    similarity = np.array([3, 1, 5, 1, 4, 1, 2.0])
    assert [clip.anchor for clip in key_clips(similarity, 7, longest=1)] == [0, 2, 4, 6]
    assert [clip.anchor for clip in key_clips(similarity, 1, longest=1)] == [2]
    assert {clip.scale for clip in key_clips(similarity, 3, longest=1)} == {1.0}


def test_extremes() -> None:
    assert key_clips(np.array([0.3]), 1) == [Clip(0, 0, 1, 1.0)]
    assert [(c.anchor, c.start) for c in key_clips(np.ones(9), 9)] == [(0, 0)]  # a constant curve has one peak
    assert np.array_equal(cosines(np.zeros((2, 3))), np.zeros((2, 2)))


@pytest.mark.parametrize(
    ("similarity", "arguments", "says"),
    [
        ([0.1] * 7, {"count": 8}, "8 key frames of 7 frames"),
        ([0.1] * 7, {"count": 0}, "0 key frames of 7 frames"),
        ([], {"count": 1}, "1 key frames of 0 frames"),
        ([0.1, np.nan], {"count": 1}, r"shape \[2\], 1 of them not finite"),
        ([[0.1]], {"count": 1}, r"shape \[1, 1\]"),
        ([0.1] * 7, {"count": 1, "longest": 5}, "at most 5 frames"),
        ([0.1] * 7, {"count": 1, "longest": 0}, "at most 0 frames"),
        ([0.1] * 7, {"count": 1, "features": np.ones((6, 2))}, r"shape \[6, 2\] for 7 frames"),
        ([0.1] * 7, {"count": 1, "features": np.ones(7)}, r"shape \[7\] for 7 frames"),
    ],
)
def test_refused(similarity: Any, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(BundleError, match=says) as caught:
        key_clips(np.array(similarity), **arguments)
    assert caught.value.hint


# --- frames in a folder ---


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """Five frames whose names do not sort as they were written, and a file that is no picture."""
    folder = tmp_path / "video"
    folder.mkdir()
    for number in (4, 0, 3, 1, 2):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.PNG" if number == 3 else folder / f"{number:02}.png")
    (folder / "notes.txt").write_text("not a frame")
    return folder


def numbers(folder: Path, *values: float) -> Path:
    path = folder / "similarity.txt"
    path.write_text("".join(f"{x}\n" for x in values))
    return path


def test_frames_are_chosen_in_order_of_their_names(video: Path, tmp_path: Path) -> None:
    found = key_frames(video, numbers(tmp_path, 0.1, 0.5, 0.2, 0.9, 0.3), 2)
    assert [path.name for path in found] == ["01.png", "03.PNG"]


def test_similarity_is_read_from_text_and_npy(tmp_path: Path) -> None:
    path = tmp_path / "s.npy"
    np.save(path, np.array([0.5, 2], dtype=np.float32))
    assert read_similarity(path).tolist() == [0.5, 2.0]
    text = tmp_path / "s.txt"
    text.write_bytes(b" 0.5\r\n\n2e0")
    assert read_similarity(text).tolist() == [0.5, 2.0]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("s.txt", b"0.5\nx\n", "cannot be read: could not convert string to float: 'x'"),
        ("s.txt", b"0.5 0.6\n", "cannot be read"),
        ("s.txt", b"\xff\xfe", "cannot be read"),
        ("s.txt", b"0.5\nnan\n", r"shape \[2\], 1 numbers of it not finite"),
        ("s.npy", b"", "cannot be read"),
        ("s.npy", b"0.5\n", "cannot be read"),
    ],
)
def test_what_is_no_similarity_is_refused(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(BundleError, match=says):
        read_similarity(path)


def test_arrays_of_other_shapes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.npy"
    for array in (np.ones((3, 2)), np.ones(()), np.array(["a"])):
        np.save(path, array)
        with pytest.raises(BundleError, match=r"shape|cannot be read"):
            read_similarity(path)
    np.savez(tmp_path / "z.npz", a=np.ones(3))
    (tmp_path / "z.npz").rename(path)
    with pytest.raises(BundleError, match="cannot be read"):
        read_similarity(path)


def test_other_counts_are_refused_with_both_numbers(video: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="has 4 numbers for 5 frames"):
        key_frames(video, numbers(tmp_path, 1, 2, 3, 4), 2)
    with pytest.raises(BundleError, match="6 key frames of 5 frames"):
        key_frames(video, numbers(tmp_path, 1, 2, 3, 4, 5), 6)
    with pytest.raises(BundleError, match="is not a folder"):
        key_frames(video / "00.png", numbers(tmp_path, 1), 1)
    with pytest.raises(BundleError, match="no file"):
        key_frames(video, tmp_path / "nowhere.txt", 1)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(BundleError, match="has no pictures"):
        key_frames(empty, numbers(tmp_path), 1)


def test_command_shows_the_chosen_frames(
    bundle: Path, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    similarity = numbers(tmp_path, 0.1, 0.5, 0.2, 0.9, 0.3)
    options = ["--frames-of", str(video), "--similarity", str(similarity), "--key-frames", "2"]
    cli.app(["run", str(bundle), "-p", "left and right?", *options], standalone_mode=False)
    said = capsys.readouterr()
    model = vlmcut.Bundle(bundle)
    want = model.generate([video / "01.png", video / "03.PNG"], "left and right?")
    assert said.out.strip() == want and "frames: 01.png, 03.PNG" in said.err
    three = numbers(tmp_path, 0.9, 0.1, 0.9, 0.1, 0.9)
    options[3:] = [str(three), "--key-frames", "3"]
    with pytest.raises(BundleError, match="3 images in the prompt, the budget holds 2"):
        cli.app(["run", str(bundle), "-p", "x", *options], standalone_mode=False)


@pytest.mark.parametrize(
    "options",
    [
        ["--frames-of", "v"],
        ["--key-frames", "2"],
        ["--similarity", "s"],
        ["--frames-of", "v", "--key-frames", "2"],
        ["--frames-of", "v", "--similarity", "s", "--key-frames", "2", "-i", "x.png"],
    ],
)
def test_command_wants_all_three(options: list[str], bundle: Path) -> None:
    with pytest.raises(typer.BadParameter, match="go together"):
        cli.app(["run", str(bundle), "-p", "x", *options], standalone_mode=False)
