"""Budgets shared by units, and HiRED and GlobalCom2, each against a transcription of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vlmcut.manifest import Bucket, Panel
from vlmcut.passes.tokens.budgets import proportional, quota_key, quota_select
from vlmcut.passes.tokens.method import Place
from vlmcut.passes.tokens.methods import METHODS, TableSelector
from vlmcut.passes.tokens.tiles import areas, resized, tiles
from vlmcut.surgery.selection import TowerState, judge, places

from .token_helpers import chosen, graph, state

SPECS = ("hired", "globalcom2")

# --- Budgets


def shared(weights: list[int], total: int, caps: list[int]) -> list[int]:
    """Largest remainder in fractions; what is above a cap goes to the others, again and again."""
    share = [Fraction(0)] * len(caps)
    free, rest = [g for g, w in enumerate(weights) if w], Fraction(total)
    while free:
        level = rest / sum(weights[g] for g in free)
        full = [g for g in free if level * weights[g] >= caps[g]]
        if not full:
            for g in free:
                share[g] = level * weights[g]
            break
        for g in full:
            share[g] = Fraction(caps[g])
            rest -= caps[g]
        free = [g for g in free if g not in full]
    counts = [math.floor(x) for x in share]
    order = sorted((g for g in range(len(caps)) if counts[g] < caps[g]), key=lambda g: (counts[g] - share[g], g))
    for g in order[: total - sum(counts)]:
        counts[g] += 1
    return counts


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12)), min_size=1, max_size=7), st.data())
def test_shares_are_those_of_fractions(units: list[tuple[int, int]], data: st.DataObject) -> None:
    """float64; weights are whole, so that equal remainders are equal: their order is that of the lower index, up to
    rounding, which is why counts may differ where remainders are equal."""
    weights, caps = [w for w, _ in units], [c for _, c in units]
    total = data.draw(st.integers(0, sum(caps)))
    found = proportional(torch.tensor([weights], dtype=torch.float64), total, np.array(caps))[0].tolist()
    want = shared(weights, total, caps)
    assert sum(found) == total and all(0 <= f <= c for f, c in zip(found, caps, strict=True))
    assert all(abs(f - w) <= 1 for f, w in zip(found, want, strict=True))
    remainders = [Fraction(total * w, sum(weights)) % 1 for w in weights]
    capped = any(total * w >= c * sum(weights) for w, c in zip(weights, caps, strict=True))
    if not capped and len(set(remainders)) == len(remainders):
        assert found == want


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("weights", "total", "caps", "want"),
    [
        ([3, 1], 8, [9, 9], [6, 2]),
        ([1, 1, 1], 4, [9, 9, 9], [2, 1, 1]),  # equal remainders: lower index first
        ([5, 3, 2], 7, [9, 9, 9], [4, 2, 1]),  # 3.5, 2.1, 1.4
        ([98, 1, 1], 9, [3, 9, 9], [3, 3, 3]),  # what is above the cap is shared again
        ([90, 9, 1], 12, [3, 4, 9], [3, 4, 5]),
        ([1, 0, 0], 5, [3, 9, 9], [3, 1, 1]),  # nothing is left for those of no weight but what others cannot take
        ([0, 0], 3, [5, 5], [2, 1]),
        ([7, 2], 0, [5, 5], [0, 0]),
        ([7, 2], 10, [5, 5], [5, 5]),
        ([4], 3, [5], [3]),
    ],
)
def test_shares(weights: list[int], total: int, caps: list[int], want: list[int], dtype: torch.dtype) -> None:
    assert proportional(torch.tensor([weights]).to(dtype), total, np.array(caps)).tolist() == [want]


def test_images_share_apart() -> None:
    weights = torch.tensor([[1.0, 2.0, 5.0], [4.0, 4.0, 0.5], [0.0, 1.0, 0.0]])
    caps = np.array([4, 5, 3])
    whole = proportional(weights, 7, caps)
    assert torch.equal(whole, torch.cat([proportional(weights[i : i + 1], 7, caps) for i in range(3)]))
    score = torch.rand(3, 12, generator=torch.Generator().manual_seed(0))
    units = np.random.default_rng(0).permutation(np.repeat(np.arange(3), caps))
    apart = [quota_key(score[i : i + 1], units, whole[i : i + 1]) for i in range(3)]
    assert torch.equal(quota_key(score, units, whole), torch.cat(apart))


def blank(count: int) -> TowerState:
    return TowerState(tokens=torch.zeros(1, count, 1), project=lambda x: x)


def best_of_units(score: list[float], units: list[int], counts: list[int]) -> list[int]:
    kept = []
    for unit, count in enumerate(counts):
        members = [i for i in range(len(score)) if units[i] == unit]
        kept += sorted(members, key=lambda i: (-score[i], i))[:count]
    return sorted(kept)


@given(st.data())
def test_a_quota_takes_the_best_of_each_unit(data: st.DataObject) -> None:
    """Few values, so that ties at the cut are common, all equal ones among them."""
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    counts = [data.draw(st.integers(0, size)) for size in sizes]
    if not sum(counts):
        counts[0] = 1
    units = np.array(data.draw(st.permutations(np.repeat(np.arange(len(sizes)), sizes).tolist())))
    values = st.sampled_from([0.0, 1e-4, 0.25, 0.25, 3.0])
    score = data.draw(st.lists(values, min_size=len(units), max_size=len(units)))
    kept = quota_select(blank(len(units)), torch.tensor([score]), units, torch.tensor([counts]), sum(counts))
    assert kept[0].tolist() == best_of_units(score, units.tolist(), counts)


def test_a_near_tie_in_a_unit_is_a_near_tie_of_the_quota() -> None:
    """A runtime that swaps two tokens of nearly one score falls short by that, although units do not compare."""
    score = torch.tensor([[0.9, 0.5, 0.5 - 1e-5, 0.1, 0.01, 0.02, 0.03, 0.04]])
    units, counts = np.array([0, 0, 0, 0, 1, 1, 1, 1]), torch.tensor([[2, 2]])
    own = quota_select(blank(8), score, units, counts, 4)
    assert own.tolist() == [[0, 1, 6, 7]]
    for other, worst in (([0, 2, 6, 7], 2e-5), ([0, 3, 6, 7], 1.0)):
        judged = judge(torch.tensor([other]), 8)
        assert quota_select(replace(blank(8), pick=judged), score, units, counts, 4).tolist() == [other]
        assert worst / 10 < judged.calls[0].shortfall < worst
    # One more of a unit and one less of the other costs what the tokens differ by.
    judged = judge(torch.tensor([[0, 1, 2, 7]]), 8)
    quota_select(replace(blank(8), pick=judged), score, units, counts, 4)
    assert judged.calls[0].shortfall < 0.02


# --- Pictures in tiles


def tiled(high: int, wide: int, side: int = 4, thumbnail: str = "last", **more: object) -> TowerState:
    """Tiles of a picture, each a panel with its box, and the thumbnail of it all."""
    seen = state([(side, side)] * (high * wide + 1), taps=2, **more)  # type: ignore[arg-type]
    boxes = [(r / high, c / wide, (r + 1) / high, (c + 1) / wide) for r in range(high) for c in range(wide)]
    whole = (0.0, 0.0, 1.0, 1.0)
    boxes = [*boxes, whole] if thumbnail == "last" else [whole, *boxes]
    panels = tuple(Panel(rows=side, columns=side, box=box) for box in boxes)
    return replace(seen, panels=panels)


def stitched(high: int, wide: int, side: int = 4, cut: int = 0, **more: object) -> TowerState:
    """LLaVA-NeXT: the thumbnail first, then all tiles as one panel, of which `cut` rows are gone above and below."""
    seen = state([(side, side)] * (high * wide + 1), taps=2, **more)  # type: ignore[arg-type]
    rows, columns = high * side - 2 * cut, wide * side
    panels = (Panel(rows=side, columns=side), Panel(rows=rows, columns=columns))
    members = list(range(side * side))
    for y in range(cut, high * side - cut):
        for x in range(columns):
            members.append((1 + y // side * wide + x // side) * side * side + y % side * side + x % side)
    seen = replace(seen, tokens=seen.tokens[:, : len(members)], panels=panels, places=places(panels))
    return replace(seen, members=np.array(members)[:, None])


def test_units_are_tiles_wherever_their_tokens_lie() -> None:
    for seen, thumbnail in ((tiled(2, 3), 6), (tiled(2, 3, thumbnail="first"), 0)):
        found = tiles(seen)
        assert found is not None and found.sizes.tolist() == [16] * 7
        assert found.thumbnail.tolist() == list(range(16 * thumbnail, 16 * thumbnail + 16))
        others = [u for u in range(7) if u != thumbnail]
        for unit, panel in enumerate(others, start=1):
            assert (found.units[16 * panel : 16 * panel + 16] == unit).all()
    one = tiles(stitched(2, 2))
    assert one is not None and one.sizes.tolist() == [16] * 5 and one.grid == (4, 4)
    assert one.units[16:].reshape(8, 8).tolist() == np.kron([[1, 2], [3, 4]], np.ones((4, 4), int)).tolist()
    cut = tiles(stitched(2, 2, cut=1))
    assert cut is not None and cut.sizes.tolist() == [16, 12, 12, 12, 12]
    assert tiles(state([(4, 4)])) is None


def test_areas_are_quarters() -> None:
    """Of a 4 x 4 thumbnail over 2 x 2 tiles; stitched or not."""
    want = np.kron([[0, 1], [2, 3]], np.ones((2, 2), int)).reshape(-1)
    for seen in (tiled(2, 2), tiled(2, 2, side=4, thumbnail="first"), stitched(2, 2), stitched(2, 2, cut=1)):
        found = tiles(seen)
        assert found is not None
        np.testing.assert_array_equal(areas(found).argmax(axis=1), want)
        np.testing.assert_array_equal(areas(found).sum(axis=1), 1)


@pytest.mark.parametrize("make", [lambda: tiled(2, 3), lambda: stitched(2, 2), lambda: stitched(1, 3)])
def test_the_thumbnail_is_resized_as_pictures_are(make: Callable[[], TowerState]) -> None:
    """torch's own bilinear, of the whole stitched grid."""
    found = tiles(make())
    assert found is not None
    score = torch.rand(1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    order = np.lexsort(found.places[found.crops].T[::-1])  # raster order of the picture
    high = len(np.unique(found.places[found.crops][:, 0]))
    size = (high, len(found.crops) // high)
    want = torch.nn.functional.interpolate(score.reshape(1, 1, 4, 4), size=size, mode="bilinear", align_corners=False)
    # float64: products in another order; measured 2.2e-16
    torch.testing.assert_close(resized(found, score)[:, torch.from_numpy(order)], want.flatten(1), rtol=0, atol=1e-14)


# --- Transcriptions of methods.md A12 and A13, tile by tile, for tiles that are panels and a thumbnail that is last.


def attention(seen: TowerState, tap: int) -> list[list[float]]:
    """[CLS]'s attention in each tile, mean over heads; the column mean without [CLS]."""
    found = []
    for q, k in seen.taps[tap].rows:
        q, k = q[0].double().numpy(), k[0].double().numpy()
        logits = np.einsum("hrd,hkd->hrk", q, k) * seen.taps[tap].scale
        maps = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
        found.append(maps[:, 0, 1:].mean(axis=0) if seen.has_cls else maps.mean(axis=(0, 1)))
    return [x.tolist() for x in found]


def top(values: list[float], count: int) -> list[int]:
    return sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:count])


def remainder(shares: list[float], total: int) -> list[int]:
    counts = [math.floor(s + 1e-9) for s in shares]
    order = sorted(range(len(shares)), key=lambda g: (counts[g] - shares[g], g))
    for g in order[: total - sum(counts)]:
        counts[g] += 1
    return counts


def hired(seen: TowerState, keep: int, grid: tuple[int, int], side: int, alpha: float) -> list[int] | None:
    """None where a tile's share is above its size: the paper then leaves tokens unused."""
    content, score = attention(seen, 0), attention(seen, 1)
    n = side * side
    full = min(int(keep * alpha), n)
    marked = set(top(content[-1], int(n * (1 - alpha))))
    ones = [0] * (grid[0] * grid[1])
    for i in marked:
        y, x = divmod(i, side)
        ones[y * grid[0] // side * grid[1] + x * grid[1] // side] += 1
    shares = [one / sum(ones) * (keep - full) for one in ones]
    if max(shares) > n:
        return None
    counts = [*remainder(shares, keep - full), full]
    return [n * tile + i for tile, count in enumerate(counts) for i in top(score[tile], count)]


@pytest.mark.parametrize("alpha", [0.5, 0.25, 0.75])
@pytest.mark.parametrize(("grid", "keep"), [((2, 2), 21), ((2, 2), 7), ((1, 2), 13), ((4, 1), 30), ((1, 1), 9)])
@pytest.mark.parametrize("cls", [True, False])
def test_hired_is_the_papers(grid: tuple[int, int], keep: int, alpha: float, cls: bool) -> None:
    seen = tiled(*grid, dtype=torch.float64, cls=cls)
    want = hired(seen, keep, grid, 4, alpha)
    assert want is not None and len(want) == keep
    assert chosen(f"hired:alpha={alpha}", seen, keep).kept[0].tolist() == want


def globalcom2(seen: TowerState, keep: int, grid: tuple[int, int], side: int, tau: float) -> list[int]:
    score, n = attention(seen, 1), side * side
    count = len(score) * n
    full = int(n * Fraction(keep, count))
    whole = np.array(score[-1]).reshape(side, side)
    size = (side * grid[0], side * grid[1])
    large = torch.nn.functional.interpolate(torch.from_numpy(whole)[None, None], size=size, mode="bilinear")
    rich, parts = [], []
    for tile in range(grid[0] * grid[1]):
        y, x = divmod(tile, grid[1])
        rows = [i for i in range(side) if i * grid[0] // side == y]
        columns = [i for i in range(side) if i * grid[1] // side == x]
        rich.append(sum(whole[r, c] for r in rows for c in columns))
        parts.append(large[0, 0, y * side : (y + 1) * side, x * side : (x + 1) * side].numpy().reshape(-1))
    sigma = np.exp((np.array(rich) - max(rich)) / tau)
    sigma /= sigma.sum()
    rate = np.minimum(1, keep / count * (1 + sigma - sigma.mean()))
    counts = [*remainder((rate / rate.sum() * (keep - full)).tolist(), keep - full), full]
    both = []
    for tile, part in enumerate(parts):
        own = np.array(score[tile])
        both.append((own / np.sqrt((own**2).sum()) + part / np.sqrt((part**2).sum())).tolist())
    both.append(score[-1])
    return [n * tile + i for tile, c in enumerate(counts) for i in top(both[tile], c)]


@pytest.mark.parametrize("tau", [10.0, 0.05])
@pytest.mark.parametrize(("grid", "keep"), [((2, 2), 21), ((2, 2), 7), ((1, 2), 13), ((4, 1), 30), ((1, 1), 9)])
@pytest.mark.parametrize("cls", [True, False])
def test_globalcom2_is_the_papers(grid: tuple[int, int], keep: int, tau: float, cls: bool) -> None:
    seen = tiled(*grid, dtype=torch.float64, cls=cls)
    assert chosen(f"globalcom2:tau={tau}", seen, keep).kept[0].tolist() == globalcom2(seen, keep, grid, 4, tau)


@pytest.mark.parametrize("keep", [23, 41, 44])
def test_globalcom2_shares_by_room_and_richness(keep: int) -> None:
    """Tiles at the picture's edge are cut: of 12 tokens, where the others have 16."""
    seen = stitched(3, 2, cut=1, dtype=torch.float64, seed=5)
    found = tiles(seen)
    assert found is not None and found.sizes.tolist() == [16, 12, 12, 16, 16, 12, 12]
    rich = np.array(attention(seen, 1)[0]) @ areas(found)
    sigma = np.exp(rich / 0.05) / np.exp(rich / 0.05).sum()
    weights = keep / 96 * (1 + sigma - sigma.mean()) * found.sizes[1:]
    assert (weights < found.sizes[1:]).all()  # no rate is above 1
    full = keep * 16 // 96
    want = [full, *remainder((weights / weights.sum() * (keep - full)).tolist(), keep - full)]
    kept = chosen("globalcom2:tau=0.05", seen, keep).kept[0].numpy()
    assert np.bincount(found.units[kept], minlength=7).tolist() == want


@pytest.mark.parametrize("spec", SPECS)
def test_the_split_follows_the_picture(spec: str) -> None:
    """Otherwise a constant split would do."""
    counts = set()
    for seed in range(12):
        kept = chosen("globalcom2:tau=0.02" if spec == "globalcom2" else spec, tiled(2, 2, seed=seed), 24).kept[0]
        counts.add(tuple(np.bincount(kept.numpy() // 16, minlength=5).tolist()))
    assert len(counts) > 3 and len({c[4] for c in counts}) == 1  # the thumbnail's share is constant


@pytest.mark.parametrize("spec", SPECS)
def test_stitched_tiles_are_the_same_tiles(spec: str) -> None:
    """LLaVA-NeXT's packing moves tokens and changes nothing else."""
    apart, one = tiled(2, 2, thumbnail="first", seed=4), stitched(2, 2, seed=4)
    assert one.members is not None
    kept = set(one.members[chosen(spec, one, 23).kept[0].numpy(), 0].tolist())
    assert kept == set(chosen(spec, apart, 23).kept[0].tolist())
    chosen(spec, stitched(2, 2, cut=1), 23)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize("keep", [1, 7, 15])
def test_one_panel_is_fastervlm(spec: str, cls: bool, keep: int) -> None:
    seen = state([(4, 4)], taps=2, cls=cls)
    plain = chosen("fastervlm", replace(seen, taps=seen.taps[-1:]), keep).kept
    assert torch.equal(chosen(spec, seen, keep).kept, plain)
    # The budget of each tile alone knows one panel too.
    several = tiled(1, 2, cls=cls)
    each = TableSelector(spec, pool="tile")(several, 9).kept
    assert torch.equal(each, TableSelector("fastervlm", pool="tile")(several, 9).kept)


@pytest.mark.parametrize("spec", [*SPECS, "hired:alpha=0.0", "hired:alpha=1.0", "hired:alpha=0.01"])
@pytest.mark.parametrize("keep", [1, 2, 40, 63, 79, 80])
def test_any_budget_is_met(spec: str, keep: int) -> None:
    for seen in (tiled(2, 2), tiled(2, 2, constant=True), tiled(2, 2, duplicates=True), stitched(1, 4)):
        chosen(spec, seen, keep)


def test_line_breaks_stand_aside() -> None:
    """LLaVA-NeXT's newline tokens have no patch; a selection leaves them out before a method looks."""
    seen = stitched(1, 2)
    panels = (seen.panels[0], replace(seen.panels[1], line_breaks=True))
    assert seen.members is not None
    rows = np.split(seen.members[16:], 4)
    members = np.concatenate([seen.members[:16], *(part for row in rows for part in (row, [[-1]]))])
    tokens = torch.zeros(1, len(members), 6)
    whole = replace(seen, tokens=tokens, panels=panels, places=places(panels), members=members)
    others = np.flatnonzero(members[:, 0] >= 0)
    for spec in SPECS:
        assert torch.equal(chosen(spec, whole.only(others), 11).kept, chosen(spec, seen, 11).kept)


@pytest.mark.parametrize(("spec", "make"), [("hired", stitched), ("globalcom2", tiled)])
def test_onnx_runtime_keeps_the_same(spec: str, make: Callable[..., TowerState]) -> None:
    run = graph(spec, make(2, 2), 19)  # where tokens lie is constant; the operators are the same
    for seen in (make(2, 2), make(2, 2, seed=2), make(2, 2, seed=3), make(2, 2, constant=True)):
        assert torch.equal(run(seen).kept, chosen(spec, seen, 19).kept)


def test_a_judge_follows_and_says_by_how_much() -> None:
    seen = tiled(2, 2, dtype=torch.float64)
    for spec in SPECS:
        own = chosen(spec, seen, 19).kept
        judged = judge(own, 80)
        assert torch.equal(chosen(spec, replace(seen, pick=judged), 19).kept, own)
        assert [call.shortfall for call in judged.calls] == [0.0]


# --- Refusals


def refuse(spec: str, panels: tuple[Panel, ...], frames: int = 1, **options: object) -> str | None:
    bucket = Bucket(size=(8, 8), geometry={}, tokens=sum(p.tokens for p in panels), panels=panels)
    place = Place(None, bucket, bucket.tokens, 6, len(panels), frames)  # type: ignore[arg-type]
    refused = METHODS[spec].refuse(place, dict(METHODS[spec].options) | options)
    return None if refused is None else refused[0]


WHOLE, LEFT = Panel(rows=4, columns=4), Panel(rows=4, columns=4, box=(0.0, 0.0, 1.0, 0.5))


@pytest.mark.parametrize("spec", SPECS)
def test_refusals(spec: str) -> None:
    assert refuse(spec, (LEFT, LEFT, WHOLE)) is None and refuse(spec, (LEFT,)) is None
    cause = refuse(spec, (LEFT, LEFT, LEFT))
    assert cause is not None and "3 tiles" in cause
    cause = refuse(spec, (WHOLE, WHOLE), frames=2)
    assert cause is not None and "2 images" in cause
    bad = {"hired": ("alpha", -0.1, 1.5), "globalcom2": ("tau", 0.0, -1.0)}[spec]
    for value in bad[1:]:
        cause = refuse(spec, (WHOLE,), **{bad[0]: value})  # type: ignore[arg-type]
        assert cause is not None and f"={value}" in cause
