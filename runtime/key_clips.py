"""Which frames of a video to show: the best clips around the moments that fit the question, at a constant cost.

Source: F2C, arXiv:2510.02262. The similarities of frames and question come from elsewhere (CLIP, SigLIP): a bundle has
no text tower that could compare them. We differ in what the paper leaves open or to chance: of a plateau the first
frame is its peak, k-means is solved exactly, a clip lies around its anchor (the longer half behind it, moved inward at
the ends), and a frame is compared with itself too, or clips of one frame would never be redundant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..errors import BundleError

LONGEST, COARSEST = 4, 2.0  # frames of a clip; scale of its pictures
REDUNDANCY, LENGTH = 0.5, 0.05  # weights of the objective
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Clip:
    """Frames `start` to `start + length - 1`, to be made smaller by `scale` along each side."""

    anchor: int  # its frame that fits best
    start: int
    length: int
    scale: float  # 1 .. COARSEST

    @property
    def frames(self) -> range:
        return range(self.start, self.start + self.length)


def key_clips(
    similarity: np.ndarray, count: int, features: np.ndarray | None = None, longest: int = LONGEST
) -> list[Clip]:
    """The clips of a video that fit a question best, in order of time.

    Together they cost at most what `count` frames of full size do: length / scale² summed up is at most `count`.

    Args:
        similarity: of each frame with the question, [F].
        count: anchors at most; fewer where the curve has fewer peaks.
        features: of each frame, [F, d], any unit; how alike two frames are is their cosine. Without, nothing is
            redundant, and longer clips win unless they fit less.
        longest: most frames of a clip. With 1 all clips are single frames of full size.

    Raises:
        BundleError: nothing to choose from, more clips than frames, or numbers that do not belong together.
    """
    similarity = np.asarray(similarity, dtype=np.float64)
    frames = len(similarity)
    if similarity.ndim != 1 or not np.isfinite(similarity).all():
        raise BundleError(
            f"similarities of shape {list(similarity.shape)}, {int((~np.isfinite(similarity)).sum())} of them not "
            "finite",
            hint="give one number for each frame",
        )
    if not 1 <= count <= frames:
        raise BundleError(f"{count} key frames of {frames} frames", hint=f"choose 1 to {frames}")
    if not 1 <= longest <= LONGEST:  # more would cost more than `count` frames at the coarsest scale
        raise BundleError(f"clips of at most {longest} frames", hint=f"choose 1 to {LONGEST}")
    if features is not None and (np.ndim(features) != 2 or len(features) != frames):
        raise BundleError(
            f"features of shape {list(np.shape(features))} for {frames} frames", hint="give one row for each frame"
        )
    anchors = peaks(similarity)
    if len(anchors) > count:
        anchors = np.array([run[similarity[run].argmax()] for run in clusters(anchors, count)])
    alike = None if features is None else cosines(features)
    clips = []
    for anchor in anchors:
        start, length = _best_clip(similarity, alike, int(anchor), longest)
        scale = min(max((len(anchors) * length / count) ** 0.5, 1.0), COARSEST)
        clips.append(Clip(int(anchor), start, length, scale))
    return merge(clips, similarity)


def peaks(curve: np.ndarray) -> np.ndarray:
    """Frames where a basin of the watershed begins when the curve is flooded from above, ascending int64.

    These are the runs of equal frames with nothing higher beside them; each counts once, by its first frame.
    """
    begins = np.flatnonzero(np.diff(curve, prepend=np.nan) != 0)
    height = np.pad(curve[begins], 1, constant_values=-np.inf)
    return begins[(height[1:-1] > height[:-2]) & (height[1:-1] > height[2:])]


def clusters(times: np.ndarray, count: int) -> list[np.ndarray]:
    """The k-means clusters of ascending times, [A] -> `count` runs of them, none empty; of equal splits the earlier.

    In one dimension clusters are runs, so the best ones are found outright, by dynamic programming over where the last
    one begins: O(count A²).
    """
    moments = [np.concatenate([[0.0], np.cumsum(times.astype(np.float64) ** power)]) for power in (0, 1, 2)]
    size, first, second = (m[None] - m[:, None] for m in moments)  # of times[i:j], [A + 1, A + 1]
    spread = np.where(size > 0, second - first**2 / np.maximum(size, 1), np.inf)
    best, begins = spread[0], []
    for _ in range(count - 1):
        total = best[:, None] + spread
        begins.append(total.argmin(axis=0))
        best = total.min(axis=0)
    ends = [len(times)]
    for begin in reversed(begins):
        ends.append(int(begin[ends[-1]]))
    return np.split(times, ends[:0:-1])


def cosines(features: np.ndarray) -> np.ndarray:
    """Of every pair of rows, [F, d] -> [F, F]; 0 beside a row of zeros."""
    rows = np.asarray(features, dtype=np.float64)
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return rows @ rows.T


def _best_clip(similarity: np.ndarray, alike: np.ndarray | None, anchor: int, longest: int) -> tuple[int, int]:
    """Start and length of the clip around an anchor that is worth most; of equal ones the shorter."""
    best, found = -np.inf, (anchor, 1)
    for length in range(1, min(longest, len(similarity)) + 1):
        start = min(max(anchor - (length - 1) // 2, 0), len(similarity) - length)
        inside = slice(start, start + length)
        redundancy = 0.0 if alike is None else alike[inside, inside].mean()
        worth = similarity[inside].mean() - REDUNDANCY * redundancy + LENGTH * length / longest
        if worth > best:
            best, found = worth, (start, length)
    return found


def merge(clips: Sequence[Clip], similarity: np.ndarray) -> list[Clip]:
    """Clips of one scale that share frames become one, whose anchor is the one that fits best."""
    merged: list[Clip] = []
    for clip in sorted(clips, key=lambda c: (c.scale, c.start)):
        last = merged[-1] if merged else None
        if last is None or last.scale != clip.scale or clip.start >= last.start + last.length:
            merged.append(clip)
            continue
        anchor = max(last.anchor, clip.anchor, key=lambda a: (similarity[a], -a))
        end = max(last.start + last.length, clip.start + clip.length)
        merged[-1] = replace(last, anchor=anchor, length=end - last.start)
    return sorted(merged, key=lambda c: (c.start, c.anchor))


def key_frames(folder: Path, similarity: Path, count: int) -> list[Path]:
    """The pictures of a folder that fit a question best, in order of their names.

    A bundle takes pictures of fixed sizes, and scaled ones would cost as many tokens as whole ones: clips are one
    frame long here, and all frames keep their size.

    Raises:
        BundleError: no pictures, a file of similarities that is not one number for each, or more than there are.
    """
    if not folder.is_dir():
        raise BundleError(f"`{folder}` is not a folder", hint="give the folder of the frames")
    frames = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGES)
    numbers = read_similarity(similarity)
    if len(numbers) != len(frames):
        raise BundleError(
            f"`{similarity}` has {len(numbers)} numbers for {len(frames)} frames in `{folder}`",
            hint=f"give one number for each picture ({', '.join(IMAGES)}), in order of their names",
        )
    if not frames:
        raise BundleError(f"`{folder}` has no pictures", hint=f"put the frames there: {', '.join(IMAGES)}")
    return [frames[clip.anchor] for clip in key_clips(numbers, count, longest=1)]


def read_similarity(path: Path) -> np.ndarray:
    """One number for each frame, float64 [F]: a `.npy` file, or text with one number in each line.

    Raises:
        BundleError: no such file, or something else in it.
    """
    if not path.is_file():
        raise BundleError(f"no file `{path}`", hint="check the path")
    try:
        if path.suffix == ".npy":
            found = np.load(path, allow_pickle=False).astype(np.float64)
        else:
            found = np.array([float(line) for line in path.read_text().split("\n") if line.strip()])
    except (ValueError, TypeError, AttributeError, EOFError, OSError) as error:
        raise BundleError(f"`{path}` cannot be read: {error}", hint="write one number per line") from error
    if found.ndim != 1 or not np.isfinite(found).all():
        raise BundleError(
            f"`{path}` holds an array of shape {list(found.shape)}, {int((~np.isfinite(found)).sum())} numbers of it "
            "not finite",
            hint="write one finite number for each frame",
        )
    return found
