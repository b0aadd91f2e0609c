"""What every method promises, what judges promise, and the scores and selectors that most of them share."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from vlmcut.errors import PassError
from vlmcut.passes.tokens import frames, tower, trained
from vlmcut.passes.tokens.baselines import random_positions, uniform_positions
from vlmcut.passes.tokens.method import parse
from vlmcut.passes.tokens.methods import METHODS, TableSelector
from vlmcut.passes.tokens.scores import attention_rows, cosine_distance, received
from vlmcut.passes.tokens.select import ascending, greedy, max_min
from vlmcut.surgery.picking import Follow, topk
from vlmcut.surgery.selection import Choice, Tap, TowerState, judge

from .token_helpers import chosen, legal, state, tapped, valid

# Few distinct values, so that ties are common.
SCORES = st.lists(st.sampled_from([-1.5, 0.0, 0.25, 0.25, 1.0, 3.0]), min_size=1, max_size=24)
FLOATS = st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=24)
POINTS = st.integers(0, 2**32 - 1)


@st.composite
def scored(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    values = draw(st.one_of(SCORES, FLOATS))
    return torch.tensor([values]), draw(st.integers(1, len(values)))


@st.composite
def points(draw: st.DrawFn, duplicates: bool = False) -> tuple[np.ndarray, int]:
    """[N, d] float64 and how many to keep."""
    rng = np.random.default_rng(draw(POINTS))
    n, d = draw(st.integers(2, 14)), draw(st.integers(2, 6))
    x = rng.standard_normal((n, d))
    if duplicates:
        x = x[rng.integers(0, max(2, n // 2), n)]
    return x, draw(st.integers(1, n))


def is_ascending(positions: list[int]) -> bool:
    return positions == sorted(set(positions))


# --- picking


@given(scored())
def test_topk_is_exact_and_best(case: tuple[torch.Tensor, int]) -> None:
    score, keep = case
    order = topk(score, keep)
    assert order.shape == (1, keep) and order.dtype == torch.int64
    # Best first, and of equals the lower index first: Python's sort is stable too.
    assert order[0].tolist() == sorted(range(score.shape[1]), key=lambda i: -float(score[0, i]))[:keep]
    places = ascending(order)[0].tolist()
    assert is_ascending(places)
    if keep == score.shape[1]:
        assert places == list(range(keep))


@given(scored(), st.randoms(use_true_random=False))
def test_topk_ignores_the_order_of_what_it_drops(case: tuple[torch.Tensor, int], random: object) -> None:
    score, keep = case
    places = topk(score, keep)[0].tolist()
    values = [float(score[0, i]) for i in range(score.shape[1]) if i not in places]
    assume(values and max(values) < min(float(score[0, j]) for j in places))  # else a tie may move
    random.shuffle(values)  # type: ignore[attr-defined]
    fresh = iter(values)
    shuffled = [float(score[0, i]) if i in places else next(fresh) for i in range(score.shape[1])]
    assert topk(torch.tensor([shuffled]), keep)[0].tolist() == places


def test_images_do_not_see_each_other() -> None:
    score = torch.rand(3, 11, generator=torch.Generator().manual_seed(0))
    for count in (1, 4, 11):
        whole = topk(score, count)
        assert torch.equal(whole, torch.cat([topk(score[i : i + 1], count) for i in range(3)]))


def test_a_constant_score_keeps_the_first() -> None:
    assert topk(torch.zeros(2, 9), 4).tolist() == [[0, 1, 2, 3]] * 2
    assert topk(torch.zeros(2, 9), 1).tolist() == [[0]] * 2


# --- judges


@given(scored())
def test_a_judge_measures_the_margin(case: tuple[torch.Tensor, int]) -> None:
    score, keep = case
    n = score.shape[1]
    kept = topk(score, keep)
    own = judge(kept, n)
    assert set(own.top(score, keep)[0].tolist()) == set(kept[0].tolist()) and own.calls[0].shortfall == 0
    dropped = [i for i in range(n) if i not in kept[0].tolist()]
    assume(dropped)
    # Planted: the best kept token is exchanged for the worst dropped one.
    worst = min(dropped, key=lambda i: float(score[0, i]))
    planted = torch.tensor([[worst, *kept[0, 1:].tolist()]])
    left = [i for i in range(n) if i not in planted[0].tolist()]
    margin = max(float(score[0, i]) for i in left) - min(float(score[0, i]) for i in planted[0].tolist())
    other = judge(planted, n)
    assert set(other.top(score, keep)[0].tolist()) == set(planted[0].tolist())
    assert other.calls[0].shortfall == pytest.approx(max(0.0, margin), abs=1e-6)  # both are float32 read as float64
    assert margin >= float(score[0, kept[0, 0]] - score[0, worst]) - 1e-6


def test_a_judge_by_hand() -> None:
    score = torch.tensor([[0.9, 0.1, 0.5, 0.7]])
    for kept, shortfall in (([0, 3], 0.0), ([0, 2], 0.2), ([1, 2], 0.8)):
        judged = judge(torch.tensor([kept]), 4)
        assert sorted(judged.top(score, 2)[0].tolist()) == kept
        # float32: 0.7 - 0.5 is 0.19999999
        assert judged.calls[0].shortfall == pytest.approx(shortfall, abs=1e-7)
    # More than what was kept: no score excuses the third.
    judged = judge(torch.tensor([[0, 3]]), 4)
    judged.top(score, 3)
    assert judged.calls[0].shortfall == math.inf


def test_a_judge_of_some_tokens_is_the_same_judge() -> None:
    judged = judge(torch.tensor([[1, 4]]), 6)
    few = judged.only(torch.tensor([0, 4, 5]))
    assert few.top(torch.tensor([[3.0, 1.0, 2.0]]), 1).tolist() == [[1]]
    assert [call.shortfall for call in judged.calls] == [2.0]


def test_following_measures_noise() -> None:
    score = torch.tensor([[0.9, 0.1, 0.5, -math.inf]])
    judged = judge(torch.tensor([[0, 2]]), 4)
    judged.top(score, 2)
    follow = Follow(judged.calls)
    assert follow.top(score + torch.tensor([[0.0, -0.25, 0.0, 0.0]]), 2).tolist() == [[0, 2]]
    assert follow.noise == [pytest.approx(0.25, abs=1e-7)]  # float32: 0.1 - 0.25 is rounded; measured 7.5e-9


# --- DivPrune


def divprune(x: np.ndarray, keep: int) -> list[int]:
    """methods.md A8: D = 1 - cos; first the largest nearest-other distance; then argmax of the minimum."""
    n = len(x)
    norm = [math.sqrt(float(row @ row)) for row in x]
    d = [[1 - float(x[i] @ x[j]) / (norm[i] * norm[j]) for j in range(n)] for i in range(n)]
    nearest = [min(d[i][j] for j in range(n) if j != i) for i in range(n)]
    selected = [max(range(n), key=lambda i: (nearest[i], -i))]
    while len(selected) < keep:
        free = [i for i in range(n) if i not in selected]
        selected.append(max(free, key=lambda i: (min(d[i][s] for s in selected), -i)))
    return sorted(selected)


def farthest(distance: torch.Tensor, keep: int, kept: torch.Tensor | None = None) -> tuple[list[int], float]:
    """What max-min keeps of distances [1, N, N], and by how much that falls short, if it is confined to `kept`."""
    n = distance.shape[1]
    seen = TowerState(torch.zeros(1, n, 1), lambda x: x)
    if kept is None:
        return greedy(seen, max_min(distance), keep)[0].tolist(), 0.0
    judged = judge(kept, n)
    places = greedy(replace(seen, pick=judged), max_min(distance), keep)
    return places[0].tolist(), max(call.shortfall for call in judged.calls)


@given(points())
def test_divprune_is_the_papers(case: tuple[np.ndarray, int]) -> None:
    """float64, continuous points: two distances are equal only by symmetry, and then exactly, in both."""
    x, keep = case
    distance = cosine_distance(torch.from_numpy(x)[None])
    distance = (distance + distance.transpose(1, 2)) / 2  # as symmetric as the transcription
    assert farthest(distance, keep)[0] == divprune(x, keep)


@given(points())
def test_max_min_counts(case: tuple[np.ndarray, int]) -> None:
    x, keep = case
    places, _ = farthest(cosine_distance(torch.from_numpy(x)[None]), keep)
    assert len(places) == keep and is_ascending(places)
    assert set(places) <= set(range(len(x)))
    if keep == len(x):
        assert places == list(range(keep))


@given(points(duplicates=True))
def test_max_min_takes_each_distinct_point_first(case: tuple[np.ndarray, int]) -> None:
    x, keep = case
    _, label = np.unique(x, axis=0, return_inverse=True)
    # Distances of duplicates are exactly 0 here, as an exact copy deserves.
    distance = cosine_distance(torch.from_numpy(x)[None])[0].clamp(min=0)
    same = torch.from_numpy(label[:, None] == label[None, :])
    kept, _ = farthest(torch.where(same, 0.0, distance)[None], keep)
    distinct = len(set(label.tolist()))
    assert len(set(kept)) == keep
    assert len({int(label[i]) for i in kept}) == min(keep, distinct)


@given(points())
def test_max_min_judges_its_own_choice_as_best(case: tuple[np.ndarray, int]) -> None:
    x, keep = case
    distance = cosine_distance(torch.from_numpy(x)[None])
    kept, _ = farthest(distance, keep)
    assert farthest(distance, keep, torch.tensor([kept])) == (kept, 0.0)


def test_max_min_judges_a_worse_choice() -> None:
    """Four directions, one of them twice: keeping both copies costs what the dropped direction is away."""
    distance = cosine_distance(torch.tensor([[[1.0, 0], [1, 0], [0, 1], [-1, 0]]]))
    assert farthest(distance, 2)[0] == [0, 2]  # 2 and 3 are alone; then all are 1 away
    assert farthest(distance, 3)[0] == [0, 2, 3]
    assert farthest(distance, 3, torch.tensor([[0, 2, 3]])) == ([0, 2, 3], 0.0)
    assert farthest(distance, 3, torch.tensor([[0, 1, 2]])) == ([0, 1, 2], 1.0)


def test_divprune_looks_behind_the_projector() -> None:
    """A projector that turns tokens apart changes the choice: distances are measured on what it gives."""
    seen = state()
    weight = torch.diag(torch.tensor([5.0, 1, 0, 0, 0, 0]))
    turned = dataclasses.replace(seen, project=lambda t: t @ weight)
    own, projected = (chosen("divprune", s, 5).kept for s in (seen, turned))
    alone = chosen("divprune", dataclasses.replace(seen, tokens=seen.tokens @ weight), 5).kept
    assert torch.equal(projected, alone) and not torch.equal(projected, own)


# --- baselines


@given(n=st.integers(1, 60), data=st.data(), seed=st.integers(0, 5))
def test_constant_choices(n: int, data: st.DataObject, seed: int) -> None:
    keep = data.draw(st.integers(1, n))
    for places in (random_positions(n, keep, seed), uniform_positions(n, keep)):
        assert len(places) == keep and is_ascending(places)
        assert all(0 <= p < n for p in places)
        if keep == n:
            assert places == list(range(n))
    # Random choices are nested, so a sweep over budgets compares like with like.
    assert set(random_positions(n, keep, seed)) <= set(random_positions(n, n, seed))
    if keep > 1:
        assert set(random_positions(n, keep - 1, seed)) < set(random_positions(n, keep, seed))
        gaps = np.diff(uniform_positions(n, keep))
        assert gaps.max() - gaps.min() <= 1  # evenly spaced


def test_seeds_differ() -> None:
    assert random_positions(100, 10, 0) == random_positions(100, 10, 0)
    assert random_positions(100, 10, 0) != random_positions(100, 10, 1)


# --- every method


CONSTANT = ("random", "uniform", "pool", "fourier", "videoscan")  # they do not look
# Those that work inside the tower and those with weights of their own need more than a state: their tests give it.
HERE = [name for name in METHODS if name not in tower.ROWS and name not in trained.ROWS]


def picture(method: str, cls: bool = True, seed: int = 1) -> TowerState:
    """One that the method can work on, 36 tokens."""
    panel, count = ((3, 3), 4) if method in frames.ROWS else ((6, 6), 1)
    return tapped(method, [panel], cls=cls, text=4, frames=count, seed=seed, width=48)


def judged_again(spec: str, seen: TowerState, kept: torch.Tensor) -> tuple[Choice, float]:
    """What a method makes of an image if it is confined to `kept`, and by how much that falls short."""
    judged = judge(kept, seen.count)
    again = TableSelector(spec, seed=2)(replace(seen, pick=judged), kept.shape[1])
    shortfall = max((call.shortfall for call in judged.calls), default=0.0)
    return again, shortfall if torch.equal(again.kept, kept) else math.inf


@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize("method", HERE)
def test_every_method_selects_and_judges_itself(method: str, cls: bool) -> None:
    row = METHODS[method]
    assert row.title and row.summary and row.source
    assert row.without_cls is None or row.blocks is not None
    seen = picture(method, cls)
    selector = TableSelector(method, seed=2)
    keeps = legal(method, seen)
    assert keeps
    for keep in sorted({keeps[0], keeps[len(keeps) // 2], keeps[-1]}):
        choice = chosen(method, seen, keep, seed=2)
        assert (choice.mix is not None or choice.features is not None) <= row.merges
        again, shortfall = judged_again(method, seen, choice.kept)
        assert shortfall == 0
        if choice.mix is not None:
            assert again.mix is not None and torch.equal(again.mix, choice.mix)
    whole = selector(seen, 36)
    assert valid(whole, 36, 36) == list(range(36)) and whole.mix is None
    # Negative control: a choice that leaves the best out is not as good. `row.merges` of one kind keep fixed places.
    places = selector(seen, keeps[0]).kept
    others = [i for i in range(36) if i not in places[0].tolist()][: keeps[0]]
    if len(others) == keeps[0] and not (row.merges and row.blocks is None):
        assert judged_again(method, seen, torch.tensor([others]))[1] > 0


@pytest.mark.parametrize("method", HERE)
def test_every_method_looks(method: str) -> None:
    """Another picture, another choice or another mixture, but for those that say they do not look."""
    one, again, *others = (picture(method, seed=seed) for seed in (1, 1, 2, 3, 4, 5))
    keeps = legal(method, one)
    keep = keeps[len(keeps) // 2]
    tokens = one.tokens[0]
    first = chosen(method, one, keep).take(tokens)
    assert torch.equal(first, chosen(method, again, keep).take(tokens))
    looks = any(not torch.equal(first, chosen(method, other, keep).take(tokens)) for other in others)
    assert looks == (method not in CONSTANT)


# --- scores


def received_by_a_loop(seen: TowerState, everyone: bool = False) -> np.ndarray:
    """Per patch, counted over segments: softmax(q k^T * scale), mean over heads; row [CLS], or the mean of all rows."""
    found = []
    (tap,) = seen.taps
    one = seen.has_cls and not everyone
    for q, k in tap.rows:
        q, k = (x.double().numpy() for x in (q, k))
        group = q.shape[1] // k.shape[1]
        for segment in range(q.shape[0]):
            total = np.zeros(k.shape[2])
            for head in range(q.shape[1]):
                for row in [0] if one else range(q.shape[2]):
                    weights = np.exp(k[segment, head // group] @ q[segment, head, row] * tap.scale)
                    total += weights / weights.sum() / q.shape[1] / (1 if one else q.shape[2])
            found += total[1:].tolist() if seen.has_cls else total.tolist()
    return np.array(found)


@pytest.mark.parametrize("everyone", [True, False])
@pytest.mark.parametrize("cls", [True, False])
def test_attention_received_by_a_loop(cls: bool, everyone: bool) -> None:
    """methods.md A1: a = mean over heads of softmax(q_cls k^T / sqrt(dh)), columns 1..N."""
    seen = state(cls=cls)
    got = received(seen, seen.taps[0], everyone)
    assert got.shape == (1, 12)
    want = received_by_a_loop(seen, everyone)
    # float32 against float64: the last bit of a score near 0.1 is 7e-9.
    np.testing.assert_allclose(got[0].numpy(), want, rtol=0, atol=1e-7)
    if not everyone:
        best = sorted(np.argsort(-want)[:5].tolist())
        assert chosen("fastervlm", seen, 5).kept[0].tolist() == best


@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_scores_of_segments_and_merged_patches(groups: int, cls: bool) -> None:
    """Tiles in one call and in several, of unequal length; tokens of several patches, of one, and of none."""
    rng = torch.Generator().manual_seed(3)
    calls = tuple(
        (
            torch.randn(segments, 4, rows + cls, 8, generator=rng),
            torch.randn(segments, groups, rows + cls, 8, generator=rng),
        )
        for segments, rows in ((2, 6), (1, 9))
    )
    members = np.array([[0, 1, 2, 3], [4, 11, 20, -1], [7, -1, -1, -1], [-1, -1, -1, -1], [12, 13, 19, 5]])
    seen = TowerState(torch.zeros(1, 5, 3), lambda t: t, (Tap(0, calls, 0.3),), cls, members)
    patches = received_by_a_loop(seen)
    assert patches.shape == (21,)
    want = [float(np.mean([patches[m] for m in row if m >= 0])) if max(row) >= 0 else 0.0 for row in members.tolist()]
    got = received(seen, seen.taps[0])
    assert got.shape == (1, 5)
    np.testing.assert_allclose(got[0].numpy(), want, rtol=0, atol=1e-7)  # float32 against float64, as above
    # Fewer tokens of the same image have the scores that they had.
    some = seen.only([1, 4])
    assert torch.equal(received(some, some.taps[0]), got[:, [1, 4]])


def test_scores_are_wide() -> None:
    """float16 in, float32 out: in half precision distances tie massively (methods.md A8)."""
    x = torch.randn(1, 3, 8, dtype=torch.float16)
    assert cosine_distance(x).dtype == torch.float32 and cosine_distance(x.double()).dtype == torch.float64
    rows = attention_rows(x[:, None], x[:, None], 0.5)
    assert rows.dtype == torch.float32
    # float32: a softmax sums to 1 within a few last bits
    torch.testing.assert_close(rows.sum(dim=-1), torch.ones(1, 1, 3), rtol=0, atol=1e-6)
    assert not cosine_distance(torch.zeros(1, 2, 4)).isnan().any()  # a row of zeros has no direction


# --- names and options


@pytest.mark.parametrize(
    ("spec", "message", "hint"),
    [
        ("fastvlm", "no method `fastvlm`", "fastervlm"),
        ("fastervlm:alpha=1", "`fastervlm` has no option `alpha`", "takes no options"),
        ("hiprune:alhpa=1", "`hiprune` has no option `alhpa`", "did you mean `alpha`?"),
        ("hiprune:alpha=x", "alpha = 'x' is not of type float", "the default is 0.1"),
        ("hiprune:alpha", "alpha = '' is not of type float", "the default is 0.1"),
        ("hiprune:object_block=1.5", "object_block = '1.5' is not of type int", "the default is -1"),
    ],
)
def test_a_bad_method_is_named(spec: str, message: str, hint: str) -> None:
    with pytest.raises(PassError) as caught:
        parse(spec, METHODS, "here")
    assert message in str(caught.value) and hint in (caught.value.hint or "")


def test_options_are_read() -> None:
    row, options = parse("hiprune:alpha=0.2:object_block=3", METHODS, "here")
    assert row is METHODS["hiprune"] and options == {"alpha": 0.2, "object_block": 3}
    assert row.options == {"alpha": 0.1, "object_block": -1}  # the row's own stay as they are


def test_every_tile_keeps_its_own() -> None:
    """With pool = "tile" each tile is chosen from as if it were alone."""
    seen = state([(3, 4), (3, 4)], cls=False)
    for method in ("fastervlm", "divprune", "visionzip"):
        whole = TableSelector(method, pool="tile")(seen, 10)
        valid(whole, 10, 24)
        for tile in range(2):
            alone = TableSelector(method)(seen.only(range(12 * tile, 12 * tile + 12)), 5)
            assert (whole.kept[0, 5 * tile : 5 * tile + 5] - 12 * tile).tolist() == alone.kept[0].tolist()
            if alone.mix is not None:
                assert whole.mix is not None
                part = whole.mix[:, 5 * tile : 5 * tile + 5]
                assert torch.equal(part[..., 12 * tile : 12 * tile + 12], alone.mix)
                assert part.count_nonzero() == alone.mix.count_nonzero()
