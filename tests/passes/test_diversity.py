"""The greedy engine and its gains, DivPrune, ToDRE and DART, each against a transcription of its own."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from vlmcut.passes.tokens import select
from vlmcut.passes.tokens.method import Place
from vlmcut.passes.tokens.methods import METHODS
from vlmcut.passes.tokens.scores import cosine_distance, received
from vlmcut.surgery.picking import topk
from vlmcut.surgery.selection import Choice, TowerState, judge

from .token_helpers import chosen, graph, same, state

POINTS = st.integers(0, 2**32 - 1)


@st.composite
def points(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """[N, d] float64 and how many to keep."""
    rng = np.random.default_rng(draw(POINTS))
    n, d = draw(st.integers(2, 13)), draw(st.integers(2, 6))
    return rng.standard_normal((n, d)), draw(st.integers(1, n))


def blank(count: int) -> TowerState:
    return TowerState(tokens=torch.zeros(1, count, 1), project=lambda x: x)


def pick(gain: select.Gain, count: int, keep: int, block: int = 1) -> list[int]:
    kept = select.greedy(blank(count), gain, keep, block)
    assert kept.shape == (1, keep) and kept.dtype == torch.int64
    found = kept[0].tolist()
    assert found == sorted(set(found)) and found[0] >= 0 and found[-1] < count  # never one twice
    return found


def symmetric(x: np.ndarray) -> Tensor:
    distance = cosine_distance(torch.from_numpy(x)[None])
    return (distance + distance.transpose(1, 2)) / 2


# --- Transcriptions: methods.md 6.2, one candidate after the other, nothing carried from step to step.


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def best(free: list[int], worth: list[float]) -> int:
    return max(free, key=lambda j: (worth[free.index(j)], -j))


def by_distance(d: np.ndarray, keep: int, merge: str, pivot: int | None) -> list[int]:
    n = len(d)
    if pivot is None:
        pivot = best(list(range(n)), [min(d[i][j] for j in range(n) if j != i) for i in range(n)])
    taken = [pivot]
    while len(taken) < keep:
        free = [j for j in range(n) if j not in taken]
        each = [[d[j][t] for t in taken] for j in free]
        taken.append(best(free, [min(e) if merge == "min" else sum(e) for e in each]))
    return sorted(taken)


def by_cover(c: np.ndarray, keep: int) -> list[int]:
    taken: list[int] = []
    while len(taken) < keep:
        free = [j for j in range(c.shape[1]) if j not in taken]
        now = [max([0.0, *(c[r, t] for t in taken)]) for r in range(len(c))]
        taken.append(best(free, [sum(max(0.0, c[r, j] - now[r]) for r in range(len(c))) for j in free]))
    return sorted(taken)


def by_determinant(k: np.ndarray, keep: int) -> list[int]:
    taken: list[int] = []
    while len(taken) < keep:
        free = [j for j in range(len(k)) if j not in taken]
        taken.append(best(free, [float(np.linalg.slogdet(k[np.ix_([*taken, j], [*taken, j])])[1]) for j in free]))
    return sorted(taken)


@given(points(), st.sampled_from(["min", "sum"]), st.booleans())
def test_distance_gains_are_the_formula(case: tuple[np.ndarray, int], merge: str, with_pivot: bool) -> None:
    """float64, continuous points: two worths are equal only by symmetry, and then exactly, in both."""
    x, keep = case
    distance = symmetric(x)
    first = torch.from_numpy(np.random.default_rng(keep).random((1, len(x)))) if with_pivot or merge == "sum" else None
    pivot = None if first is None else int(first.argmax())
    gain = select.max_min(distance, first) if merge == "min" else select.max_sum(distance, first)  # type: ignore[arg-type]
    assert pick(gain, len(x), keep) == by_distance(distance[0].numpy(), keep, merge, pivot)


@given(points(), st.integers(1, 5))
def test_coverage_is_the_formula(case: tuple[np.ndarray, int], rows: int) -> None:
    x, keep = case
    cover = np.random.default_rng(rows).random((rows, len(x)))
    covered = by_cover(cover, keep)
    # Once every row is at its best, nothing adds anything: lower index first in both.
    assert pick(select.coverage(torch.from_numpy(cover)[None]), len(x), keep) == covered


@given(points())
def test_dpp_is_the_largest_determinant(case: tuple[np.ndarray, int]) -> None:
    x, keep = case
    rng = np.random.default_rng(len(x))
    features = rng.standard_normal((len(x), len(x) + 2))  # of full rank: every determinant is positive
    kernel = features @ features.T
    assert pick(select.dpp(torch.from_numpy(kernel)[None]), len(x), keep) == by_determinant(kernel, keep)


@given(POINTS, st.integers(1, 8))
def test_dpp_of_orthonormal_features_is_topk_of_relevance(seed: int, keep: int) -> None:
    rng = np.random.default_rng(seed)
    features = torch.from_numpy(np.linalg.qr(rng.standard_normal((8, 8)))[0])
    relevance = torch.from_numpy(rng.permutation(8) / 8.0 + 0.5)
    kernel = relevance[:, None] * (features @ features.T) * relevance
    assert pick(select.dpp(kernel[None]), 8, keep) == sorted(topk(relevance[None], keep)[0].tolist())


@given(POINTS)
def test_dpp_takes_no_duplicate_within_the_rank(seed: int) -> None:
    rng = np.random.default_rng(seed)
    distinct = rng.standard_normal((5, 7))
    label = np.concatenate([np.arange(5), rng.integers(0, 5, 6)])
    rng.shuffle(label)
    kernel = torch.from_numpy(distinct[label] @ distinct[label].T)[None]
    assert len(set(label[pick(select.dpp(kernel), 11, 5)])) == 5
    pick(select.dpp(kernel), 11, 11)  # beyond the rank: rounding decides, and still each once


@given(POINTS, st.integers(1, 9))
def test_max_min_takes_each_distinct_point_first(seed: int, keep: int) -> None:
    rng = np.random.default_rng(seed)
    distinct = rng.standard_normal((4, 3))
    label = np.concatenate([np.arange(4), rng.integers(0, 4, 5)])
    d = symmetric(distinct)[0].numpy()
    np.fill_diagonal(d, 0.0)
    kept = pick(select.max_min(torch.from_numpy(d[np.ix_(label, label)])[None]), 9, keep)
    assert len(set(label[kept])) == min(4, keep)


def gains(n: int, seed: int, batch: int = 1) -> dict[str, tuple[Tensor, ...]]:
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.standard_normal((batch, n, n + 3)))
    first = torch.from_numpy(rng.random((batch, n)))
    return {
        "max_min": (cosine_distance(x),),
        "max_sum": (cosine_distance(x), first),
        "coverage": (torch.from_numpy(rng.random((batch, 6, n))),),
        "dpp": (x @ x.transpose(1, 2),),
    }


@pytest.mark.parametrize("name", ["max_min", "max_sum", "coverage", "dpp"])
def test_groups_do_not_see_each_other(name: str) -> None:
    """A gain over [3, 7] is three gains over [1, 7], whose tokens follow each other."""
    gain, given = getattr(select, name), gains(7, 0, batch=3)[name]
    for keep, block in ((1, 1), (4, 1), (4, 2), (7, 1)):
        apart = [pick(gain(*(x[g : g + 1] for x in given)), 7, keep, block) for g in range(3)]
        assert pick(gain(*given), 21, 3 * keep, block) == [7 * g + i for g, one in enumerate(apart) for i in one]


@pytest.mark.parametrize("name", ["max_min", "max_sum", "coverage", "dpp"])
def test_a_block_is_the_best_of_each_step(name: str) -> None:
    """One block of all is a plain top-k of the first gains; the first block of two is that of one of two."""
    gain, given = getattr(select, name), gains(8, 1)[name]
    first = next(gain(*given))
    assert pick(gain(*given), 8, 3, 3) == sorted(topk(first, 3)[0].tolist())
    assert set(topk(first, 2)[0].tolist()) <= set(pick(gain(*given), 8, 6, 2))
    assert pick(gain(*given), 8, 8, 4) == list(range(8))


@pytest.mark.parametrize("keep", [1, 3, 9])
def test_ties_go_to_the_lower_index(keep: int) -> None:
    n = 9
    flat = torch.ones(1, n, n)
    for gain in (
        select.max_min(flat),
        select.max_sum(flat, torch.ones(1, n)),
        select.coverage(flat),
        select.dpp(torch.eye(n)[None]),
        select.max_min(torch.zeros(1, n, n)),
    ):
        assert pick(gain, n, keep) == list(range(keep))


def test_one_token() -> None:
    one = torch.ones(1, 1, 1)
    for gain in (select.max_min(one), select.max_sum(one, one[0]), select.coverage(one), select.dpp(one)):
        assert pick(gain, 1, 1) == [0]


def test_the_loop_is_steered_by_what_the_state_picks() -> None:
    """Told what a runtime kept, the same loop keeps that, and says how far it fell short."""
    distance = symmetric(np.random.default_rng(2).standard_normal((10, 4)))
    own = select.greedy(blank(10), select.max_min(distance), 4)
    other = torch.tensor([[0, 3, 5, 6]])
    assert not torch.equal(own, other)
    for kept, shortfall in ((own, False), (other, True)):
        judged = judge(kept, 10)
        again = select.greedy(replace(blank(10), pick=judged), select.max_min(distance), 4)
        assert torch.equal(again, kept)
        assert any(call.shortfall > 0 for call in judged.calls) == shortfall
        assert all(math.isfinite(call.shortfall) for call in judged.calls)
    grouped = torch.cat([distance[:, :5, :5], distance[:, 5:, 5:]])
    kept = torch.tensor([[1, 2, 8, 9]])
    judged = judge(kept, 10)
    assert torch.equal(select.greedy(replace(blank(10), pick=judged), select.max_min(grouped), 4), kept)


def test_among_chooses_from_the_best_alone() -> None:
    score = torch.tensor([[0.1, 0.9, 0.3, 0.8, 0.2, 0.7]])
    seen: list[list[int]] = []

    def last_two(few: TowerState, at: Tensor) -> Tensor:
        seen.append(at[0].tolist())
        return torch.sort(few.top(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), 2), dim=-1).values

    assert select.among(blank(6), score, 4, last_two).tolist() == [[3, 5]]
    assert seen == [[1, 2, 3, 5]]
    judged = judge(torch.tensor([[1, 5]]), 6)
    assert select.among(replace(blank(6), pick=judged), score, 4, last_two).tolist() == [[1, 5]]
    assert [call.shortfall for call in judged.calls] == [2.0]


# --- The rows


def features(seen: TowerState) -> np.ndarray:
    return seen.project(seen.tokens)[0].double().numpy()


@pytest.mark.parametrize("keep", [1, 5, 11])
def test_divprune_and_todre_are_the_papers(keep: int) -> None:
    seen = state(12, dtype=torch.float64, project=lambda x: 3 * x.flip(-1) + 1)
    d = symmetric(features(seen))[0].numpy()
    pivot = int(received(seen, seen.taps[-1]).argmax())
    kept = {spec: chosen(spec, seen, keep).kept[0].tolist() for spec in ("divprune", "todre", "todre:variant=k-center")}
    assert kept["divprune"] == by_distance(d, keep, "min", None)
    assert kept["todre"] == by_distance(d, keep, "sum", pivot)
    assert kept["todre:variant=k-center"] == by_distance(d, keep, "min", pivot)
    if keep == 5:
        assert len({tuple(x) for x in kept.values()}) == 3  # else they were not told apart


def test_todre_k_center_is_divprune_of_the_same_pivot() -> None:
    """A state whose attention is largest where DivPrune begins."""
    for seed in range(40):
        seen = state(12, dtype=torch.float64, seed=seed)
        distance = cosine_distance(seen.tokens)
        if next(select.max_min(distance)).argmax() == received(seen, seen.taps[-1]).argmax():
            break
    else:
        pytest.fail("no such state")
    assert torch.equal(chosen("todre:variant=k-center", seen, 6).kept, chosen("divprune", seen, 6).kept)


@pytest.mark.parametrize("name", ["divprune", "todre"])
def test_steps(name: str) -> None:
    seen = state(12, dtype=torch.float64)
    plain = chosen(name, seen, 6).kept
    assert torch.equal(chosen(f"{name}:block=1:groups=1", seen, 6).kept, plain)
    grouped = chosen(f"{name}:groups=2", seen, 6).kept
    pieces = [chosen(name, part(seen, g), 3).kept + 6 * g for g in range(2)]
    assert torch.equal(grouped, torch.cat(pieces, dim=1)) and not torch.equal(grouped, plain)
    assert not torch.equal(chosen(f"{name}:block=3", seen, 6).kept, plain)


def part(seen: TowerState, g: int) -> TowerState:
    return seen.only(range(6 * g, 6 * g + 6))


def test_todre_prefilter_is_todre_of_the_candidates() -> None:
    seen = state(20, dtype=torch.float64)
    attention = received(seen, seen.taps[-1])
    near = sorted(topk(attention, 8)[0].tolist())
    d = symmetric(features(seen)[near])[0].numpy()
    pivot = near.index(int(attention.argmax()))
    want = [near[i] for i in by_distance(d, 4, "sum", pivot)]
    assert chosen("todre:prefilter=2", seen, 4).kept[0].tolist() == want
    assert chosen("todre", seen, 4).kept[0].tolist() != want


def dart(x: np.ndarray, keep: int, pivots: int) -> list[int]:
    """methods.md D5, P1 variant: pivots by L1 norm, ascending; each adds q of the lowest cosine; the last fills up."""
    norm = [float(np.abs(row).sum()) for row in x]
    start = sorted(sorted(range(len(x)), key=lambda i: (-norm[i], i))[:pivots])
    taken, q = list(start), (keep - pivots) // pivots
    for number, p in enumerate(start):
        count = q if number < pivots - 1 else keep - len(taken)
        free = [i for i in range(len(x)) if i not in taken]
        taken += sorted(free, key=lambda i: (cosine(x[i], x[p]), i))[:count]
    return sorted(taken)


@pytest.mark.parametrize(("keep", "pivots"), [(4, 4), (5, 4), (11, 4), (19, 4), (9, 2), (7, 1), (1, 1)])
def test_dart_is_the_papers(keep: int, pivots: int) -> None:
    seen = state(20, dtype=torch.float64, project=lambda x: 2 * x - 1)
    assert chosen(f"dart:pivots={pivots}", seen, keep).kept[0].tolist() == dart(features(seen), keep, pivots)


@pytest.mark.parametrize("spec", ["divprune", "divprune:block=2:groups=2", "todre:prefilter=2", "dart:pivots=2"])
@pytest.mark.parametrize("keep", [4, 8])
def test_duplicates_and_equal_tokens(spec: str, keep: int) -> None:
    for tokens in (state(20, duplicates=True), replace(state(20, constant=True), tokens=torch.ones(1, 20, 6))):
        chosen(spec, tokens, keep)  # exactly so many, each once


@pytest.mark.parametrize(
    "spec",
    [
        "divprune",
        "divprune:block=3:groups=2",
        "todre:groups=3",
        "todre:block=2",
        "todre:variant=k-center",
        "todre:prefilter=2",
        "dart:pivots=3",
    ],
)
def test_onnx_runtime_keeps_the_same(spec: str) -> None:
    run = graph(spec, state(24), 6)
    equal = replace(state(24, constant=True), tokens=torch.ones(1, 24, 6))  # lower index first
    for seen in (state(24), state(24, seed=2), equal):
        assert torch.equal(run(seen).kept, chosen(spec, seen, 6).kept)


@pytest.mark.parametrize("name", ["max_min", "coverage", "dpp"])
def test_gains_in_onnx_runtime(name: str) -> None:
    class Greedy:
        method = name

        def __call__(self, seen: TowerState, keep: int) -> Choice:
            x = seen.tokens
            return Choice(select.greedy(seen, getattr(select, name)((x @ x.transpose(1, 2)).abs()), keep))

    same(Greedy(), state(10, width=14), 7)  # type: ignore[arg-type]


# --- Refusals


def refuse(spec: str, options: dict[str, object]) -> str | None:
    row = METHODS[spec]
    place = Place(None, None, 24, 6, 1)  # type: ignore[arg-type]  # tokens, keep: these rows ask for counts alone
    refused = row.refuse(place, dict(row.options) | options)
    return None if refused is None else refused[0]


@pytest.mark.parametrize(
    ("spec", "options", "numbers"),
    [
        ("divprune", {"groups": 5}, ("24", "5")),
        ("divprune", {"block": 4}, ("6", "4")),
        ("divprune", {"groups": 2, "block": 2}, ("6", "2")),
        ("divprune", {"block": 0}, ("0", "1")),
        ("divprune", {"groups": -2}, ("-2", "1")),
        ("todre", {"groups": 5}, ("24", "5")),
        ("todre", {"variant": "median"}, ("median",)),
        ("todre", {"prefilter": 1}, ("1", "6", "24")),
        ("todre", {"prefilter": -1}, ("-1",)),
        ("todre", {"prefilter": 4}, ("4", "24")),
        ("todre", {"prefilter": 2, "groups": 2}, ("2",)),
        ("dart", {"pivots": 7}, ("6", "7")),
        ("dart", {"pivots": 0}, ("0",)),
    ],
)
def test_refusals_name_the_numbers(spec: str, options: dict[str, object], numbers: tuple[str, ...]) -> None:
    cause = refuse(spec, options)
    assert cause is not None and all(number in cause for number in numbers)


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        ("divprune", {"groups": 3, "block": 2}),
        ("todre", {"prefilter": 3}),
        ("todre", {"groups": 6}),
        ("dart", {"pivots": 6}),
    ],
)
def test_what_can_be_met_is_not_refused(spec: str, options: dict[str, object]) -> None:
    assert refuse(spec, options) is None
    chosen(":".join([spec, *(f"{k}={v}" for k, v in options.items())]), state(24), 6)
