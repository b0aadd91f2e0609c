"""Methods that compare the frames of a clip, against loops in NumPy; what a still clip keeps; what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vlmcut.manifest import Bucket, Panel
from vlmcut.passes.tokens.frames import ROWS, blend, largest_remainder
from vlmcut.passes.tokens.method import Options, Place
from vlmcut.passes.tokens.methods import TableSelector
from vlmcut.passes.tokens.scores import change, density_peaks, received
from vlmcut.surgery.selection import Selection, TowerState

from .token_helpers import chosen, graph, state, valid

FASTVID = dict(ROWS["fastvid"].options)


def _state(
    frames: int = 4,
    seed: int = 1,
    dtype: torch.dtype = torch.float32,
    taps: int = 1,
    cls: bool = True,
    duplicates: bool = False,
    constant: bool = False,
) -> TowerState:
    """A clip of 3 x 4 tokens a frame, with a projector that changes what is like what."""
    weights = torch.from_numpy(np.random.default_rng(99).standard_normal((6, 6))).float()

    def project(x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ weights.to(x.dtype))

    return state(
        [(3, 4)], frames=frames, seed=seed, dtype=dtype, taps=taps, cls=cls, duplicates=duplicates, constant=constant,
        project=project,
    )  # fmt: skip


def _still(frames: int = 4) -> TowerState:
    """The same picture in every frame."""
    seen = _state(frames, taps=0)
    return replace(seen, tokens=seen.tokens[:, :12].repeat(1, frames, 1))


def _features(seen: TowerState) -> np.ndarray:
    """What the language model would see, float64 [F, P, c]."""
    return seen.project(seen.tokens)[0].double().numpy().reshape(seen.frames, 12, -1)


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def _best(score: dict[int, float], count: int) -> list[int]:
    return sorted(score, key=lambda i: (-score[i], i))[:count]


def _evs(seen: TowerState, keep: int) -> list[int]:
    x = _features(seen)
    score = {p: 1e9 for p in range(12)}
    score |= {f * 12 + p: 1 - _cosine(x[f, p], x[f - 1, p]) for f in range(1, seen.frames) for p in range(12)}
    return sorted(_best(score, keep))


def _dycoke(seen: TowerState, keep: int) -> list[int]:
    x = _features(seen)
    share = (keep // (seen.frames // 4) - 12) // 3
    kept: list[int] = []
    for group in range(0, seen.frames, 4):
        kept += range(group * 12, group * 12 + 12)
        for frame, before in ((1, 0), (3, 2), (2, 0)):
            similar = [_cosine(x[group + frame, p], x[group + before, p]) for p in range(12)]
            kept += [(group + frame) * 12 + p for p in _best({p: -s for p, s in enumerate(similar)}, share)]
    return sorted(kept)


@pytest.mark.parametrize("keep", [12, 13, 30, 47])
def test_evs_is_its_formula(keep: int) -> None:
    for seed in range(4):
        assert chosen("evs", _state(seed=seed), keep).kept[0].tolist() == _evs(_state(seed=seed), keep)


def test_evs_keeps_the_first_frame_and_what_moves() -> None:
    seen = _still()
    moving = [12 + 3, 24 + 3, 24 + 7, 36 + 11]
    tokens = seen.tokens.clone()
    tokens[:, moving] = -tokens[:, moving]
    kept = chosen("evs", replace(seen, tokens=tokens), 12 + 6).kept[0].tolist()
    # Token 3 moves away in frame 1 and back in frame 3, token 7 in frames 2 and 3; of the still ones the first is left.
    assert kept == [*range(12), 12, 12 + 3, 24 + 7, 36 + 3, 36 + 7, 36 + 11]


@pytest.mark.parametrize("keep", [12, 15, 36])
def test_a_still_clip_keeps_the_first_of_equal_tokens(keep: int) -> None:
    assert chosen("evs", _still(), keep).kept[0].tolist() == list(range(keep))


@pytest.mark.parametrize(("frames", "keep"), [(4, 12), (4, 15), (8, 24 + 18), (8, 24 + 66)])
def test_dycoke_is_its_formula(frames: int, keep: int) -> None:
    for seed in range(3):
        seen = _state(frames, seed)
        kept = chosen("dycoke", seen, keep).kept[0].tolist()
        assert kept == _dycoke(seen, keep)
        assert np.bincount(np.array(kept) // 12, minlength=frames).reshape(-1, 4)[:, 0].tolist() == [12] * (frames // 4)


def _peaks(x: np.ndarray, there: list[int], neighbours: int) -> dict[int, float]:
    """Density times distance to a denser one, of those there."""
    far = {(i, j): float(np.linalg.norm(x[i] - x[j])) / np.sqrt(x.shape[1]) for i in there for j in there}
    density = {i: np.exp(-np.mean(sorted(far[i, j] ** 2 for j in there)[:neighbours])) for i in there}
    found = {}
    for i in there:
        denser = [far[i, j] for j in there if (density[j], -j) > (density[i], -i)]
        found[i] = density[i] * min(denser, default=max(far.values()))
    return found


def _fastvid(seen: TowerState, counts: list[tuple[int, int, int]], alpha: float = 0.6) -> tuple[list[int], np.ndarray]:
    """Kept positions and weights; counts are (segment, salient, context) of each frame."""
    x, n = _features(seen), seen.count
    flat = x.reshape(n, -1)
    attention = received(seen, seen.taps[-1])[0].double().numpy()
    salient: list[int] = []
    centres: list[int] = []
    for frame, (_, many, context) in enumerate(counts):
        own = range(frame * 12, frame * 12 + 12)
        salient += _best({i: attention[i] for i in own}, many)
        rest = [i for i in own if i not in salient]
        centres += _best(_peaks(flat, rest, min(4, len(rest))), context)
    mix = {i: np.eye(n)[i] for i in salient}
    members: dict[int, list[int]] = {c: [] for c in centres}
    for i in range(n):
        rivals = [c for c in centres if counts[c // 12][0] == counts[i // 12][0]]
        if i not in salient and i not in centres and rivals:
            members[max(rivals, key=lambda c: _cosine(flat[i], flat[c]))].append(i)
    for c, joined in members.items():
        weight = max(1 / (len(joined) + 1), alpha)
        mix[c] = weight * np.eye(n)[c]
        for i in joined:
            mix[c] = mix[c] + (1 - weight) / len(joined) * np.eye(n)[i]
    kept = sorted(mix)
    return kept, np.stack([mix[i] for i in kept])


# 13 of 4 frames: 5 context tokens (0.4 of 13), all of the last frame with one segment; 8 salient ones, 2 a frame.
ONE_SEGMENT = [(0, 2, 0), (0, 2, 0), (0, 2, 0), (0, 2, 5)]
# Shares of 4, 3, 3, 3 tokens; of 4 two are context, of 3 one: each frame its own segment.
FOUR_SEGMENTS = [(0, 2, 2), (1, 2, 1), (2, 2, 1), (3, 2, 1)]
# 26 of 6 frames, segments of 3: 13 each, 5 context; anchors every second frame from the last: the first and third.
TWO_SEGMENTS = [(0, 3, 3), (0, 3, 0), (0, 2, 2), (1, 3, 3), (1, 3, 0), (1, 2, 2)]


@pytest.mark.parametrize(
    ("spec", "frames", "keep", "counts"),
    [
        ("fastvid:segments=1", 4, 13, ONE_SEGMENT),
        ("fastvid", 4, 13, FOUR_SEGMENTS),
        ("fastvid:segments=2:anchors=2", 6, 26, TWO_SEGMENTS),
    ],
)
@pytest.mark.parametrize("cls", [True, False])
def test_fastvid_is_its_formula(
    spec: str, frames: int, keep: int, counts: list[tuple[int, int, int]], cls: bool
) -> None:
    assert sum(salient + context for _, salient, context in counts) == keep
    for seed in range(3):
        seen = _state(frames, seed, torch.float64, cls=cls)
        kept, mix = _fastvid(seen, counts)
        choice = chosen(spec, seen, keep)
        assert choice.kept[0].tolist() == kept
        assert choice.mix is not None
        np.testing.assert_allclose(choice.mix[0], mix, rtol=0, atol=1e-12)  # float64; measured 0.0


def test_fastvid_options() -> None:
    seen = _state(4, dtype=torch.float64)
    kept, mix = _fastvid(seen, ONE_SEGMENT, alpha=0.0)  # the plain mean of a centre and its members
    choice = chosen("fastvid:segments=1:alpha=0", seen, 13)
    assert choice.kept[0].tolist() == kept and choice.mix is not None
    np.testing.assert_allclose(choice.mix[0], mix, rtol=0, atol=1e-12)  # float64; measured 0.0
    alone = chosen("fastvid:context=0", seen, 13)
    assert alone.mix is None and alone.kept.shape == (1, 13)
    every = chosen("fastvid:context=1", seen, 13)
    assert every.mix is not None
    torch.testing.assert_close(every.mix.sum(dim=-1), torch.ones(1, 13, dtype=torch.float64))  # measured 1e-16
    fewer = chosen("fastvid:neighbours=1", seen, 13).kept
    assert not torch.equal(fewer, chosen("fastvid", seen, 13).kept)


@given(st.integers(2, 9), st.integers(1, 10), st.floats(0, 1), st.integers(1, 5), st.data())
def test_fastvid_keeps_exactly_what_it_does_not_refuse(
    frames: int, segments: int, context: float, anchors: int, data: st.DataObject
) -> None:
    keep = data.draw(st.integers(1, 12 * frames - 1))
    options = FASTVID | {"segments": segments, "context": context, "anchors": anchors}
    if _refused("fastvid", frames, keep, options) is None:
        valid(ROWS["fastvid"].choose(_state(frames), keep, options), keep, 12 * frames)


def test_fastvid_of_duplicates() -> None:
    seen = _state(4, duplicates=True)
    choice = chosen("fastvid:segments=1", seen, 13)
    assert choice.mix is not None
    torch.testing.assert_close(choice.mix.sum(dim=-1), torch.ones(1, 13))  # float32 weights; measured 6e-8
    # Equal attention and equal tokens: the first of each frame.
    still = replace(_state(4, constant=True, cls=False), tokens=torch.ones(1, 48, 6))
    assert chosen("fastvid", still, 8).kept[0].tolist() == [0, 1, 12, 13, 24, 25, 36, 37]


@pytest.mark.parametrize("keep", [4, 8, 20, 44])
def test_videoscan_is_the_mean_of_parts(keep: int) -> None:
    seen = _state(4, taps=0, dtype=torch.float64)
    choice = chosen("videoscan", seen, keep)
    share = keep // 4
    made = choice.take(seen.tokens[0]).numpy()
    frames = seen.tokens[0].numpy().reshape(4, 12, -1)
    for row, kept in enumerate(choice.kept[0].tolist()):
        frame, part = divmod(row, share)
        first, end = part * 12 // share, (part + 1) * 12 // share
        mean = frames[frame, first:end].mean(axis=0)
        np.testing.assert_allclose(made[row], mean, rtol=0, atol=1e-14)  # float64; measured 4e-16
        assert frame * 12 + first <= kept < frame * 12 + end


def test_videoscan_of_a_constant_clip_is_constant() -> None:
    seen = replace(_state(4, taps=0), tokens=torch.full((1, 48, 6), 2.5))
    made = chosen("videoscan", seen, 20).take(seen.tokens[0])
    torch.testing.assert_close(made, torch.full((20, 6), 2.5), rtol=0, atol=1e-6)  # float32; measured 0.0


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.data())
def test_change_is_one_minus_cosine(batch: int, frames: int, places: int, data: st.DataObject) -> None:
    before = data.draw(st.lists(st.integers(0, frames - 1), min_size=frames, max_size=frames))
    x = np.random.default_rng(frames * 10 + places).standard_normal((batch, frames, places, 4))
    found = change(torch.from_numpy(x).flatten(1, 2), before)
    assert found.shape == (batch, frames, places)
    for b, f, p in np.ndindex(batch, frames, places):
        want = 1 - _cosine(x[b, f, p], x[b, before[f], p])
        np.testing.assert_allclose(found[b, f, p], want, rtol=0, atol=1e-12)  # float64; measured 7e-16
        assert before[f] != f or found[b, f, p] == 0


@given(st.integers(1, 3), st.integers(2, 9), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_density_peaks_are_their_formula(batch: int, n: int, neighbours: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, n, 3))
    there = np.stack([rng.permutation(n) < max(2, neighbours, n - 2) for _ in range(batch)])
    neighbours = min(neighbours, n)
    found = density_peaks(torch.from_numpy(x), torch.from_numpy(there), neighbours)
    for b in range(batch):
        want = _peaks(x[b], np.flatnonzero(there[b]).tolist(), neighbours)
        assert found[b].isfinite().tolist() == there[b].tolist()
        for i, value in want.items():
            np.testing.assert_allclose(found[b, i], np.log(value), rtol=0, atol=1e-9)  # float64, measured 2e-15


def test_density_does_not_depend_on_where_the_origin_is() -> None:
    x = torch.randn(1, 20, 8, generator=torch.Generator().manual_seed(0))
    there = torch.ones(1, 20, dtype=torch.bool)
    near, far = density_peaks(x, there, 4), density_peaks(x + 1000, there, 4)
    # float32: at 1000 the tokens themselves are rounded to 6e-5; measured 2e-5, and 0.17 without taking the mean off.
    torch.testing.assert_close(near, far, rtol=0, atol=1e-3)


def test_density_of_equal_tokens_is_finite_and_in_order() -> None:
    there = torch.tensor([[False, True, True, True, True]])
    found = density_peaks(torch.full((1, 5, 3), 2.0), there, 4)
    assert found[0, 1:].isfinite().all() and found[0, 0] == -torch.inf
    assert len(set(found[0, 1:].tolist())) == 1
    pairs = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(1)).repeat_interleave(2, dim=1)
    score = density_peaks(pairs, torch.ones(1, 6, dtype=torch.bool), 2)
    assert sorted(torch.sort(score, descending=True, stable=True).indices[0, :3].tolist()) == [0, 2, 4]


@given(st.integers(1, 3), st.integers(2, 8), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_blend_loses_no_weight(batch: int, n: int, alpha: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, n))
    tokens = torch.from_numpy(rng.standard_normal((batch, n, 3)))
    centres = torch.from_numpy(np.stack([np.sort(rng.permutation(n)[:count]) for _ in range(batch)]))
    free = torch.from_numpy(rng.random((batch, n, count)) < 0.6)
    free &= ~(torch.arange(n)[:, None] == centres[:, None]).any(dim=-1)[..., None]
    mix = blend(tokens, centres, free, alpha)
    torch.testing.assert_close(mix.sum(dim=-1), torch.ones(batch, count, dtype=torch.float64))  # measured 0.0
    for b in range(batch):
        for token in range(n):
            if token in centres[b]:
                assert mix[b, centres[b].tolist().index(token), token] >= alpha
                continue
            used = mix[b, :, token] != 0
            # One centre at most, and it is the most similar of those that it may join.
            allowed = [c for c in range(count) if free[b, token, c]]
            if alpha < 1:
                assert used.sum() == bool(allowed)
            if used.any():
                nearest = max(
                    allowed, key=lambda c: _cosine(tokens[b, token].numpy(), tokens[b, centres[b, c]].numpy())
                )
                assert used.nonzero().item() == nearest


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any), st.integers(0, 60))
def test_shares_are_exact_and_fair(weights: list[int], total: int) -> None:
    found = largest_remainder(weights, total)
    assert sum(found) == total
    for weight, share in zip(weights, found, strict=True):
        assert abs(share - weight * total / sum(weights)) < 1
        assert weight or not share
    assert largest_remainder([1, 1, 1], 5) == [2, 2, 1]


@pytest.mark.parametrize("policy", ["drop", "keep"])
def test_line_breaks_take_no_part(policy: str) -> None:
    panels = (Panel(rows=3, columns=4, line_breaks=True),) * 4
    bucket = Bucket(size=(1, 1), geometry={}, tokens=60, panels=panels, frames=4)
    seen = replace(_state(4, taps=0), tokens=torch.randn(1, 60, 6), panels=panels, places=None, members=None)
    without = np.array(sorted(set(range(60)) - set(bucket.line_breaks)))
    keep = 20 + (12 if policy == "keep" else 0)
    kept = Selection(TableSelector("evs"), (keep,), policy).choose(seen, keep, bucket.line_breaks).kept[0].tolist()
    want = chosen("evs", replace(seen, tokens=seen.tokens[:, without]), 20).kept[0].numpy()
    assert set(kept) - set(bucket.line_breaks) == set(without[want].tolist())
    assert len(kept) == keep


SPECS = [("evs", 20), ("dycoke", 21), ("videoscan", 20), ("fastvid:segments=2", 13)]


@pytest.mark.parametrize(("spec", "keep"), SPECS)
def test_onnx_runtime_keeps_the_same(spec: str, keep: int) -> None:
    taps = int(spec.startswith("fastvid"))
    run = graph(spec, _state(4, taps=taps), keep)
    for seed in range(3):
        for duplicates in (False, True):
            seen = _state(4, seed, taps=taps, duplicates=duplicates)
            have, want = run(seen), chosen(spec, seen, keep)
            assert torch.equal(have.kept, want.kept)
            assert (have.mix is None) == (want.mix is None)
            if have.mix is not None and want.mix is not None:
                torch.testing.assert_close(have.mix, want.mix, rtol=0, atol=1e-6)  # float32 weights; measured 0.0
    if not taps:
        assert torch.equal(run(_still()).kept, chosen(spec, _still(), keep).kept)


@pytest.mark.parametrize(("spec", "keep"), SPECS)
def test_what_is_told_to_stay_stays(spec: str, keep: int) -> None:
    seen = _state(4)
    kept = chosen(spec, _state(4, seed=7), keep).kept
    forced = Selection(TableSelector(spec), (keep,), forced=kept)
    assert torch.equal(forced.choose(seen, keep).kept, kept)


def _refused(
    name: str, frames: int, keep: int, options: Options | None = None, panels: int | None = None
) -> tuple[str, str] | None:
    rasters = (Panel(rows=3, columns=4),) * frames
    bucket = Bucket(size=(1, 1), geometry={}, tokens=12 * frames, panels=rasters, frames=frames)
    of = panels or frames
    place = Place(anatomy=None, bucket=bucket, tokens=12 * of, keep=keep, panels=of, frames=frames)  # type: ignore[arg-type]
    return ROWS[name].refuse(place, dict(ROWS[name].options) if options is None else options)


@pytest.mark.parametrize(
    ("name", "frames", "keep", "cause", "fix"),
    [
        ("evs", 4, 11, "11 of 48 tokens, but the first frame keeps all of its 12", "12 or more"),
        ("dycoke", 6, 20, "groups of 4 frames, and a clip has 6", "multiple of 4"),
        ("dycoke", 8, 10, "10 of 96 tokens, but 2 of 8 frames keep all of their 12", "24, 30, 36"),
        ("dycoke", 8, 40, "the other 6 share what is left equally", "36, 42, 48"),
        ("fastvid", 8, 7, "7 tokens of 8 segments", "8 or more"),
        ("videoscan", 4, 10, "each of 4 frames", "4, 8, 12"),
    ],
)
def test_what_cannot_be_met_is_refused(name: str, frames: int, keep: int, cause: str, fix: str) -> None:
    refused = _refused(name, frames, keep)
    assert refused is not None
    assert cause in refused[0] and fix in refused[1]


@pytest.mark.parametrize("name", list(ROWS))
def test_a_tile_alone_is_no_clip(name: str) -> None:
    refused = _refused(name, 4, 6, panels=1)
    assert refused is not None and "4 frames" in refused[0] and "pool" in refused[1]


@pytest.mark.parametrize(
    "given", [{"segments": 0}, {"anchors": 0}, {"neighbours": 0}, {"context": 1.5}, {"context": -0.1}, {"alpha": 2.0}]
)
def test_senseless_options_are_refused(given: dict[str, float]) -> None:
    refused = _refused("fastvid", 4, 13, FASTVID | given)
    assert refused is not None and refused[0] == "=".join(map(str, *given.items()))


def test_more_centres_than_an_anchor_frame_has_are_refused() -> None:
    refused = _refused("fastvid", 4, 40, FASTVID | {"segments": 1})
    assert refused is not None and "6 of the most attended and 16 of the densest of a frame, which has 12" in refused[0]


@pytest.mark.parametrize(("name", "counts"), [("dycoke", range(24, 97, 6)), ("videoscan", range(8, 97, 8))])
def test_every_budget_is_met_or_refused(name: str, counts: range) -> None:
    seen = _state(8, taps=0)
    legal = [keep for keep in range(1, 96) if _refused(name, 8, keep) is None]
    assert legal == list(counts)[:-1]
    for keep in legal:
        chosen(name, seen, keep)
