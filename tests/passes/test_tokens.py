"""Selectors: properties for any scores, DivPrune against a transcription of its own, and what regret promises."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from vlmcut.passes.tokens import select
from vlmcut.passes.tokens.methods import METHODS, TableSelector
from vlmcut.passes.tokens.scores import attention_rows, cosine_distance
from vlmcut.surgery.selection import TowerState

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


def ascending(positions: list[int]) -> bool:
    return positions == sorted(set(positions))


@given(scored())
def test_topk_is_ascending_exact_and_best(case: tuple[torch.Tensor, int]) -> None:
    score, keep = case
    kept = select.topk_select(score, keep)
    assert kept.shape == (1, keep) and kept.dtype == torch.int64
    places = kept[0].tolist()
    assert ascending(places)
    dropped = [i for i in range(score.shape[1]) if i not in places]
    for i in dropped:
        for j in places:
            assert score[0, j] >= score[0, i]
            if score[0, j] == score[0, i]:
                assert j < i  # a tie goes to the lower index
    if keep == score.shape[1]:
        assert places == list(range(keep))


@given(scored(), st.randoms(use_true_random=False))
def test_topk_ignores_the_order_of_what_it_drops(case: tuple[torch.Tensor, int], random: object) -> None:
    score, keep = case
    places = select.topk_select(score, keep)[0].tolist()
    values = [float(score[0, i]) for i in range(score.shape[1]) if i not in places]
    assume(values and max(values) < min(float(score[0, j]) for j in places))  # else a tie may move
    random.shuffle(values)  # type: ignore[attr-defined]
    fresh = iter(values)
    shuffled = [float(score[0, i]) if i in places else next(fresh) for i in range(score.shape[1])]
    assert select.topk_select(torch.tensor([shuffled]), keep)[0].tolist() == places


def test_images_do_not_see_each_other() -> None:
    rng = torch.Generator().manual_seed(0)
    score = torch.rand(3, 11, generator=rng)
    distance = torch.rand(3, 11, 11, generator=rng)
    distance = distance + distance.transpose(1, 2)
    for choose, x in ((select.topk_select, score), (select.max_min_select, distance)):
        whole = choose(x, 4)
        assert torch.equal(whole, torch.cat([choose(x[i : i + 1], 4) for i in range(3)]))


def test_a_constant_score_keeps_the_first() -> None:
    assert select.topk_select(torch.zeros(2, 9), 4).tolist() == [[0, 1, 2, 3]] * 2


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


@given(points())
def test_divprune_is_the_papers(case: tuple[np.ndarray, int]) -> None:
    """float64, continuous points: two distances are equal only by symmetry, and then exactly, in both."""
    x, keep = case
    distance = cosine_distance(torch.from_numpy(x)[None])
    distance = (distance + distance.transpose(1, 2)) / 2  # as symmetric as the transcription
    kept = select.max_min_select(distance, keep)
    assert kept[0].tolist() == divprune(x, keep)


@given(points())
def test_max_min_counts(case: tuple[np.ndarray, int]) -> None:
    x, keep = case
    kept = select.max_min_select(cosine_distance(torch.from_numpy(x)[None]), keep)
    assert kept.shape == (1, keep) and ascending(kept[0].tolist())
    assert set(kept[0].tolist()) <= set(range(len(x)))
    if keep == len(x):
        assert kept[0].tolist() == list(range(keep))


@given(points(duplicates=True))
def test_max_min_takes_each_distinct_point_first(case: tuple[np.ndarray, int]) -> None:
    x, keep = case
    _, label = np.unique(x, axis=0, return_inverse=True)
    # Distances of duplicates are exactly 0 here, as an exact copy deserves.
    distance = cosine_distance(torch.from_numpy(x)[None])[0].clamp(min=0)
    same = torch.from_numpy(label[:, None] == label[None, :])
    kept = select.max_min_select(torch.where(same, 0.0, distance)[None], keep)[0].tolist()
    distinct = len(set(label.tolist()))
    assert len(set(kept)) == keep
    assert len({int(label[i]) for i in kept}) == min(keep, distinct)


@given(n=st.integers(1, 60), data=st.data(), seed=st.integers(0, 5))
def test_constant_choices(n: int, data: st.DataObject, seed: int) -> None:
    keep = data.draw(st.integers(1, n))
    for places in (select.random_positions(n, keep, seed), select.uniform_positions(n, keep)):
        assert len(places) == keep and ascending(places)
        assert all(0 <= p < n for p in places)
        if keep == n:
            assert places == list(range(n))
    # Random choices are nested, so a sweep over budgets compares like with like.
    assert set(select.random_positions(n, keep, seed)) <= set(select.random_positions(n, n, seed))
    if keep > 1:
        assert set(select.random_positions(n, keep - 1, seed)) < set(select.random_positions(n, keep, seed))
        gaps = np.diff(select.uniform_positions(n, keep))
        assert gaps.max() - gaps.min() <= 1  # evenly spaced


def test_seeds_differ() -> None:
    assert select.random_positions(100, 10, 0) == select.random_positions(100, 10, 0)
    assert select.random_positions(100, 10, 0) != select.random_positions(100, 10, 1)


@given(scored())
def test_topk_regret(case: tuple[torch.Tensor, int]) -> None:
    score, keep = case
    kept = select.topk_select(score, keep)
    assert float(select.topk_regret(score, kept)) == 0
    dropped = [i for i in range(score.shape[1]) if i not in kept[0].tolist()]
    assume(dropped)
    # Planted: one kept token is exchanged for one dropped token; the regret is the margin between them.
    worst, best = min(dropped, key=lambda i: float(score[0, i])), kept[0, 0]
    planted = torch.tensor([sorted([worst, *kept[0, 1:].tolist()])])
    left = [i for i in range(score.shape[1]) if i not in planted[0].tolist()]
    margin = max(float(score[0, i]) for i in left) - min(float(score[0, i]) for i in planted[0].tolist())
    assert float(select.topk_regret(score, planted)) == pytest.approx(max(0.0, margin), abs=1e-6)  # float32 subtraction
    assert margin >= float(score[0, best] - score[0, worst]) - 1e-6


def test_topk_regret_is_the_margin() -> None:
    score = torch.tensor([[0.9, 0.1, 0.5, 0.7], [0.0, 1.0, 2.0, 3.0]])
    assert float(select.topk_regret(score, torch.tensor([[0, 3], [2, 3]]))) == 0
    # image 0 keeps 0.5 and drops 0.7; image 1 is right: the worst counts. float32: 0.7 - 0.5 is 0.19999999
    assert float(select.topk_regret(score, torch.tensor([[0, 2], [2, 3]]))) == pytest.approx(0.2, abs=1e-7)


@given(points())
def test_max_min_regret_of_its_own_choice_is_zero(case: tuple[np.ndarray, int]) -> None:
    x, keep = case
    distance = cosine_distance(torch.from_numpy(x)[None])
    assert float(select.max_min_regret(distance, select.max_min_select(distance, keep))) == 0


def test_max_min_regret_of_a_worse_choice() -> None:
    """Four directions, one of them twice: keeping both copies costs what the dropped direction is away."""
    distance = cosine_distance(torch.tensor([[[1.0, 0], [1, 0], [0, 1], [-1, 0]]]))
    assert select.max_min_select(distance, 2).tolist() == [[0, 2]]  # 2 and 3 are alone; then all are 1 away
    assert select.max_min_select(distance, 3).tolist() == [[0, 2, 3]]
    assert float(select.max_min_regret(distance, torch.tensor([[0, 2, 3]]))) == 0
    assert float(select.max_min_regret(distance, torch.tensor([[0, 1, 2]]))) == 1


def test_a_constant_choice_has_no_near_ties() -> None:
    assert float(select.same_for_all([1, 4], torch.tensor([[1, 4], [1, 4]]))) == 0
    assert float(select.same_for_all([1, 4], torch.tensor([[1, 4], [1, 5]]))) == math.inf


def state(n: int = 12, d: int = 6, cls: bool = True, seed: int = 1) -> TowerState:
    """One image of n tokens, one patch behind each, whose scored block has two heads of width 4."""
    rng = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, 2, n + cls, 4, generator=rng)
    return TowerState(
        tokens=torch.randn(1, n, d, generator=rng),
        project=lambda t: t,
        attention=((q, k),),
        scale=0.5,
        has_cls=cls,
        members=torch.arange(n)[:, None],
    )


@pytest.mark.parametrize("method", METHODS)
def test_every_method_selects_and_judges_itself(method: str) -> None:
    seen = state()
    selector = TableSelector(method, seed=2)
    with torch.no_grad():
        for keep in (1, 5, 11, 12):
            kept = selector(seen, keep)
            assert kept.shape == (1, keep) and kept.dtype == torch.int64
            assert ascending(kept[0].tolist())
            assert float(selector.regret(seen, kept)) == 0
            if keep == 12:
                assert kept.tolist() == [list(range(12))]
        kept = selector(seen, 5)
        scores = selector.scores(seen)
        row = METHODS[method]
        assert (scores is None) == (row.constant is not None) == (row.score is None)
        # Negative control: the complement is not as good.
        others = torch.tensor([[i for i in range(12) if i not in line][:5] for line in kept.tolist()])
        assert float(selector.regret(seen, others)) > 0
    assert row.summary and row.source


def received_by_a_loop(seen: TowerState) -> np.ndarray:
    """Per patch, counted over segments: softmax(q k^T * scale), mean over heads; row [CLS], or the mean of all rows."""
    found = []
    for q, k in seen.attention:
        q, k = (x.double().numpy() for x in (q, k))
        group = q.shape[1] // k.shape[1]
        for segment in range(q.shape[0]):
            total = np.zeros(k.shape[2])
            for head in range(q.shape[1]):
                for row in [0] if seen.has_cls else range(q.shape[2]):
                    weights = np.exp(k[segment, head // group] @ q[segment, head, row] * seen.scale)
                    total += weights / weights.sum() / q.shape[1] / (1 if seen.has_cls else q.shape[2])
            found += total[1:].tolist() if seen.has_cls else total.tolist()
    return np.array(found)


@pytest.mark.parametrize("cls", [True, False])
def test_fastervlm_by_a_loop(cls: bool) -> None:
    """methods.md A1: a = mean over heads of softmax(q_cls k^T / sqrt(dh)), columns 1..N."""
    seen = state(cls=cls)
    got = TableSelector("fastervlm").scores(seen)
    assert got is not None and got.shape == (1, 12)
    # float32 against float64: the last bit of a score near 0.1 is 7e-9.
    np.testing.assert_allclose(got[0].numpy(), received_by_a_loop(seen), rtol=0, atol=1e-7)


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
    members = torch.tensor([[0, 1, 2, 3], [4, 11, 20, -1], [7, -1, -1, -1], [-1, -1, -1, -1], [12, 13, 19, 5]])
    seen = TowerState(torch.zeros(1, 5, 3), lambda t: t, calls, 0.3, cls, members)
    patches = received_by_a_loop(seen)
    assert patches.shape == (21,)
    want = [np.mean([patches[m] for m in row if m >= 0]) if max(row) >= 0 else 0.0 for row in members.tolist()]
    got = TableSelector("fastervlm").scores(seen)
    assert got is not None and got.shape == (1, 5)
    np.testing.assert_allclose(got[0].numpy(), want, rtol=0, atol=1e-7)  # float32 against float64, as above
    # Fewer tokens of the same image have the scores that they had.
    some = TableSelector("fastervlm").scores(seen.only(torch.tensor([1, 4])))
    assert some is not None and torch.equal(some, got[:, [1, 4]])


def test_divprune_looks_behind_the_projector() -> None:
    """A projector that turns tokens apart changes the choice: distances are measured on what it gives."""
    seen = state()
    weight = torch.diag(torch.tensor([5.0, 1, 0, 0, 0, 0]))
    turned = dataclasses.replace(seen, project=lambda t: t @ weight)
    own, projected = (TableSelector("divprune")(s, 5) for s in (seen, turned))
    alone = TableSelector("divprune")(dataclasses.replace(seen, tokens=seen.tokens @ weight), 5)
    assert torch.equal(projected, alone) and not torch.equal(projected, own)


def test_scores_are_wide() -> None:
    """float16 in, float32 out: in half precision distances tie massively (methods.md A8)."""
    x = torch.randn(1, 3, 8, dtype=torch.float16)
    assert cosine_distance(x).dtype == torch.float32 and cosine_distance(x.double()).dtype == torch.float64
    rows = attention_rows(x[:, None], x[:, None], 0.5)
    assert rows.dtype == torch.float32
    # float32: a softmax sums to 1 within a few last bits
    torch.testing.assert_close(rows.sum(dim=-1), torch.ones(1, 1, 3), rtol=0, atol=1e-6)
    assert not cosine_distance(torch.zeros(1, 2, 4)).isnan().any()  # a row of zeros has no direction
