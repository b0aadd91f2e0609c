"""Methods after the encoder against transcriptions of their own, against each other, and as graphs.

The transcriptions are loops in float64 written from the formulas. Scores of float32 states differ from theirs by some
1e-8 and lie some 1e-3 apart, so that the same tokens are chosen; examples are drawn from fixed seeds.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import vlmcut
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from vlmcut.errors import PassError
from vlmcut.passes.prune_tokens import PruneTokens
from vlmcut.passes.tokens import merge, select
from vlmcut.passes.tokens.after import ROWS
from vlmcut.passes.tokens.methods import METHODS, TableSelector
from vlmcut.passes.tokens.scores import joined, keys
from vlmcut.passes.trim_tower import TrimTower
from vlmcut.surgery.load import describe
from vlmcut.surgery.selection import Choice, Selection, Tap, TowerState, judge

from .token_helpers import chosen, graph, legal, same, state, tapped, valid

SEEDS = st.integers(0, 10_000)
FEW = settings(max_examples=20)
Numbers = np.ndarray[Any, Any]


# --- transcriptions: one segment per panel, one patch per token


def attention(q: torch.Tensor, k: torch.Tensor, scale: float) -> Numbers:
    """[heads, rows, keys] of the one segment of a call."""
    queries, found = q[0].double().numpy(), k[0].double().numpy()
    maps = []
    for head in range(len(queries)):
        logits = queries[head] @ found[head * len(found) // len(queries)].T * scale
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        maps.append(weights / weights.sum(axis=1, keepdims=True))
    return np.array(maps)


def cls_row(seen: TowerState, tap: Tap) -> Numbers:
    """methods.md A1: mean over heads of the [CLS] row; without one the mean of all rows."""
    parts = [attention(q, k, tap.scale).mean(axis=0) for q, k in tap.rows]
    return np.concatenate([part[0, 1:] if seen.has_cls else part.mean(axis=0) for part in parts])


def columns(seen: TowerState, tap: Tap) -> Numbers:
    """methods.md A4: the mean of all rows, that of [CLS] too, without its column."""
    parts = [attention(q, k, tap.scale).mean(axis=(0, 1)) for q, k in tap.rows]
    return np.concatenate([part[1:] if seen.has_cls else part for part in parts])


def best(score: Numbers, count: int) -> list[int]:
    """Best first, of equals the lower index."""
    return sorted(range(len(score)), key=lambda i: -score[i])[:count]


def cosine(a: Numbers, b: Numbers) -> float:
    return float(a @ b / np.sqrt(a @ a) / np.sqrt(b @ b))


def mean_keys(seen: TowerState, tap: Tap) -> Numbers:
    return np.concatenate([k[0].double().numpy().mean(axis=0)[int(seen.has_cls) :] for _, k in tap.rows])


def features(seen: TowerState) -> Numbers:
    return seen.tokens[0].double().numpy()


def made(choice: Choice, seen: TowerState) -> Numbers:
    """What goes on of the tokens, in float64."""
    return choice.take(seen.tokens[0].double()).numpy()


# float32 weights against float64 ones: sums of some 30 numbers near 1, whose last bit is 6e-8; measured 8.7e-7.
NEAR = {"rtol": 0, "atol": 3e-6}


@FEW
@given(SEEDS, st.integers(1, 11), st.booleans(), st.sampled_from([-1, 0, 1, 3, 5]))
def test_vtc_cls(seed: int, keep: int, cls: bool, first: int) -> None:
    """methods.md A2: the rows of all blocks from the first on, summed."""
    spec = f"vtc-cls:first_block={first}"
    seen = tapped(spec, scored=range(6), cls=cls, seed=seed)
    assert [tap.block for tap in seen.taps] == list(range(3 if first == -1 else first, 6))
    score = np.sum([cls_row(seen, tap) for tap in seen.taps], axis=0)
    assert chosen(spec, seen, keep).kept[0].tolist() == sorted(best(score, keep))


@FEW
@given(SEEDS, st.integers(1, 4), st.sampled_from(["cls", "all"]), st.booleans())
def test_fopru_row(seed: int, count: int, queries: str, cls: bool) -> None:
    """methods.md A3: rows of both panels together, by their mean."""
    seen = state([(3, 4), (2, 4)], cls=cls, seed=seed, kv_heads=1)
    score = (cls_row if queries == "cls" else columns)(seen, seen.taps[-1])
    ranked = best(score.reshape(5, 4).mean(axis=1), count)
    want = [4 * row + column for row in sorted(ranked) for column in range(4)]
    assert chosen(f"fopru-row:queries={queries}", seen, 4 * count).kept[0].tolist() == want


def hiprune(seen: TowerState, keep: int, alpha: float, neighbours: Any) -> list[int]:
    """methods.md A4, the form with sets."""
    first, deep = (columns(seen, tap) for tap in (seen.taps[0], seen.taps[-1]))
    anchors = best(first, round(keep * alpha / 5))
    union = set(anchors) | {j for i in anchors for j in neighbours(i)}
    deep = deep - np.array([i in union for i in range(len(deep))])
    return sorted(union | set(best(deep, keep - len(union))))


@FEW
@given(SEEDS, st.integers(5, 50), st.sampled_from([0.0, 0.1, 0.3, 0.7]), st.booleans())
def test_hiprune(seed: int, keep: int, alpha: float, cls: bool) -> None:
    """On two panels: neighbours end at the border of each."""
    spec = f"hiprune:alpha={alpha}"
    seen = tapped(spec, [(5, 6), (3, 7)], cls=cls, seed=seed)
    assert [tap.block for tap in seen.taps] == [1, 2]

    def neighbours(i: int) -> list[int]:
        start, width, height = (0, 6, 5) if i < 30 else (30, 7, 3)
        row, column = divmod(i - start, width)
        around = [(row, column - 1), (row, column + 1), (row - 1, column), (row + 1, column)]
        return [start + r * width + c for r, c in around if 0 <= r < height and 0 <= c < width]

    assert chosen(spec, seen, keep).kept[0].tolist() == hiprune(seen, keep, alpha, neighbours)


@FEW
@given(SEEDS)
def test_hiprune_is_the_codes_within_borders(seed: int) -> None:
    """The code walks through the raster by index, clamped: the same where no anchor lies on a border."""
    seen = state([(8, 8)], taps=2, seed=seed)
    anchors = best(columns(seen, seen.taps[0]), round(20 * 0.5 / 5))
    assume(all(0 < i // 8 < 7 and 0 < i % 8 < 7 for i in anchors))
    want = hiprune(seen, 20, 0.5, lambda i: [min(max(i + move, 0), 63) for move in (-1, 1, -8, 8)])
    assert chosen("hiprune:alpha=0.5", seen, 20).kept[0].tolist() == want


@pytest.mark.parametrize(
    ("scored", "option", "blocks"),
    [(range(24), -1, (8, 23)), (range(23), -1, (8, 22)), ((7, 15, 23, 31), -1, (15, 31)), (range(23), 3, (3, 22))],
)
def test_hiprune_looks_where_the_paper_does(scored: range, option: int, blocks: tuple[int, int]) -> None:
    """CLIP-L whole and trimmed: block 9 counted from 1. Qwen2.5-VL's blocks of full attention: 16 counted from 1."""
    assert TableSelector(f"hiprune:object_block={option}").blocks(list(scored)) == blocks


def visionzip(seen: TowerState, keep: int, contextual: int, variant: str) -> dict[int, Numbers]:
    """methods.md A5: place -> what stands there."""
    tap, x = seen.taps[-1], features(seen)
    dominant = best(cls_row(seen, tap), keep - contextual)
    rest = [i for i in range(len(x)) if i not in dominant]
    step = max(1, len(rest) // contextual)
    targets = [rest[i] for i in range(0, len(rest), step)][:contextual]
    metric = mean_keys(seen, tap)
    joined: dict[int, list[Numbers]] = {target: [] for target in targets}
    for i in rest:
        if i not in targets:
            joined[max(targets, key=lambda t: cosine(metric[i], metric[t]))].append(x[i])
    found = {i: x[i] for i in dominant}
    for target, likes in joined.items():
        total = np.sum(likes, axis=0) if likes else np.zeros_like(x[0])
        if variant == "code":
            found[target] = x[target] + total / max(1, len(likes))
        else:
            found[target] = (x[target] + total) / (1 + len(likes))
    return found


@FEW
@given(SEEDS, st.integers(2, 29), st.sampled_from([0.156, 0.4, 0.7]), st.sampled_from(["clean", "code"]), st.booleans())
def test_visionzip(seed: int, keep: int, share: float, variant: str, cls: bool) -> None:
    contextual = round(share * keep)
    assume(1 <= contextual < keep)
    seen = state(30, cls=cls, heads=4, kv_heads=2, seed=seed)
    choice = chosen(f"visionzip:contextual={share}:variant={variant}", seen, keep)
    want = visionzip(seen, keep, contextual, variant)
    assert choice.kept[0].tolist() == sorted(want)
    np.testing.assert_allclose(made(choice, seen), [want[i] for i in sorted(want)], **NEAR)


@pytest.mark.parametrize(("keep", "contextual"), [(192, 30), (128, 20), (64, 10), (640, 100), (320, 50), (160, 25)])
def test_visionzip_shares_as_the_paper_does(keep: int, contextual: int) -> None:
    """Dominant and contextual tokens of every published budget, tiles summed."""
    assert round(METHODS["visionzip"].options["contextual"] * keep) == contextual


def prumerge(seen: TowerState, keep: int, strided: int, neighbours: int) -> dict[int, Numbers]:
    """methods.md A6, counts fixed: place -> what stands there."""
    tap, x = seen.taps[-1], features(seen)
    flat = []
    for q, k in tap.rows:
        wide = [np.concatenate(list(y[0].double().numpy()), axis=-1) for y in (q, k)]  # heads side by side
        flat.append(wide)
    metric = np.concatenate([k[int(seen.has_cls) :] for _, k in flat])
    a = cls_row(seen, tap)
    if seen.has_cls:
        a = np.concatenate(
            [
                attention(torch.from_numpy(q)[None, None], torch.from_numpy(k)[None, None], q.shape[1] ** -0.5)[
                    0, 0, 1:
                ]
                for q, k in flat
            ]
        )
    kept = [i * (len(x) // strided) for i in range(strided)] if strided else []
    for i in best(a, len(x)):
        if i not in kept and len(kept) < keep - 1:
            kept.append(i)
    found = {}
    for i in kept:
        others = sorted((j for j in range(len(x)) if j != i), key=lambda j: -cosine(metric[i], metric[j]))
        found[i] = x[i] + np.sum([a[j] * x[j] for j in others[:neighbours]], axis=0)
    dropped = [j for j in best(a, len(x)) if j not in kept]
    found[dropped[0]] = np.sum([a[j] * x[j] for j in dropped], axis=0)
    return found


@FEW
@given(SEEDS, st.integers(2, 39), st.sampled_from([0.0, 0.5, 0.75, 1.0]), st.sampled_from([0, 1, 5, 39]), st.booleans())
def test_prumerge(seed: int, keep: int, spatial: float, neighbours: int, cls: bool) -> None:
    seen = state(40, cls=cls, heads=3, seed=seed)
    choice = chosen(f"prumerge+:spatial={spatial}:neighbours={neighbours}", seen, keep)
    want = prumerge(seen, keep, round(spatial * (keep - 1)), neighbours or 32)
    assert choice.kept[0].tolist() == sorted(want)
    np.testing.assert_allclose(made(choice, seen), [want[i] for i in sorted(want)], **NEAR)


def test_prumerge_of_few_tokens_has_few_neighbours() -> None:
    """32 or all others: of 12 tokens the default is 11."""
    seen = state(12)
    default, eleven = (chosen(f"prumerge+:neighbours={m}", seen, 5) for m in (0, 11))
    assert default.mix is not None and eleven.mix is not None and torch.equal(default.mix, eleven.mix)


def vispruner(seen: TowerState, keep: int, share: float, step: int) -> list[int]:
    """methods.md A7; those that stay keep their order."""
    x = features(seen)
    order = best(cls_row(seen, seen.taps[-1]), len(x))
    important = int(keep * share)
    rest = order[important:]
    while keep > important and len(rest) > keep - important:
        even, odd = rest[::2], rest[1::2]
        worst = [max(cosine(x[i], x[j]) for j in odd) for i in even]
        ranked = sorted(range(len(even)), key=lambda e: -worst[e])
        gone = min(step, len(rest) - (keep - important))
        rest = [i for i in rest if i not in [even[e] for e in ranked[:gone]]]
    return sorted(order[:important] + (rest if keep > important else []))


@FEW
@given(SEEDS, st.integers(1, 39), st.sampled_from([0.0, 0.5, 0.9, 1.0]), st.sampled_from([1, 3, 8, 100]), st.booleans())
def test_vispruner(seed: int, keep: int, share: float, step: int, cls: bool) -> None:
    seen = state(40, cls=cls, seed=seed)
    got = chosen(f"vispruner:important={share}:step={step}", seen, keep)
    assert got.mix is None and got.kept[0].tolist() == vispruner(seen, keep, share, step)


def test_vispruner_drops_twins() -> None:
    """Two of one, and one of each: of those that are compared, the copies are the first to leave."""
    x = torch.eye(6)[None]
    x[0, 4] = x[0, 1]
    score = torch.tensor([[6.0, 5, 4, 3, 2, 1]])  # list places: 1 is odd, 4 is even
    left = select.without_twins(torch.argsort(-score), x @ x.transpose(1, 2), 5, 1)
    assert sorted(left[0].tolist()) == [0, 1, 2, 3, 5]


def mustdrop(seen: TowerState, keep: int, side: int, panels: list[tuple[int, int]]) -> dict[int, Numbers]:
    """methods.md A14: place -> what stands there."""
    x, start, found, windows = features(seen), 0, {}, []
    for height, width in panels:
        for top, left in itertools.product(range(0, height, side), range(0, width, side)):
            windows.append([start + (top + i) * width + left + j for i in range(side) for j in range(side)])
        start += height * width
    score = [np.mean([cosine(x[i], x[j]) for i, j in itertools.combinations(w, 2)]) for w in windows]
    merged = best(np.array(score), (len(x) - keep) // (side * side - 1))
    for number, window in enumerate(windows):
        if number in merged:
            centre = (side - 1) // 2
            found[window[centre * side + centre]] = x[window].mean(axis=0)
        else:
            found |= {i: x[i] for i in window}
    return found


@FEW
@given(SEEDS, st.sampled_from([(2, [(4, 6), (2, 4)]), (3, [(6, 6), (3, 9)]), (4, [(8, 4)])]), st.data())
def test_mustdrop(seed: int, case: tuple[int, list[tuple[int, int]]], data: st.DataObject) -> None:
    side, panels = case
    seen = state(panels, seed=seed)
    count = seen.count // side**2
    keep = seen.count - data.draw(st.integers(1, count)) * (side**2 - 1)
    choice = chosen(f"mustdrop-vision:window={side}", seen, keep)
    want = mustdrop(seen, keep, side, panels)
    assert choice.kept[0].tolist() == sorted(want)
    np.testing.assert_allclose(made(choice, seen), [want[i] for i in sorted(want)], **NEAR)


# --- against each other


@FEW
@given(SEEDS, st.integers(1, 35), st.booleans())
def test_methods_that_meet(seed: int, keep: int, cls: bool) -> None:
    """methods.md section 7: special cases of one are the other, to the token."""
    seen = state([(6, 6)], taps=3, cls=cls, seed=seed)
    wanted = chosen("fastervlm", seen, keep).kept
    last = replace(seen, taps=seen.taps[-1:])
    for spec in ("vtc-cls", "fopru-rank", "visionzip:contextual=0", "vispruner:important=1"):
        choice = chosen(spec, last, keep)
        assert torch.equal(choice.kept, wanted) and choice.mix is None
    deep = chosen("fopru-rank:queries=all", seen, keep).kept
    assert torch.equal(chosen("hiprune:alpha=0", seen, keep).kept, deep)
    if not cls:
        assert torch.equal(deep, wanted)
    # The places that PruMerge takes without any spread are those of the best, the last of them for what is left over.
    if keep > 1:
        one = replace(last, taps=tuple(joined(tap) for tap in last.taps)) if cls else last
        assert torch.equal(chosen("prumerge+:spatial=0", last, keep).kept, chosen("fastervlm", one, keep).kept)


@pytest.mark.parametrize("method", ROWS)
def test_all_tokens_are_all_tokens(method: str) -> None:
    seen = tapped(method, [(6, 6)])
    choice = TableSelector(method)(seen, 36)
    assert valid(choice, 36, 36) == list(range(36)) and choice.mix is None


@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize(
    "spec", ["fastervlm", "vtc-cls", "fopru-rank", "fopru-row", "hiprune:alpha=0", "visionzip:contextual=0"]
)
def test_a_constant_score_keeps_the_first(spec: str, cls: bool) -> None:
    seen = tapped(spec, [(6, 6)], cls=cls, constant=True)
    assert chosen(spec, seen, 12).kept[0].tolist() == list(range(12))


@pytest.mark.parametrize("spec", ["fopru-row", "hiprune:alpha=0.5", "vispruner"])
def test_ties_are_broken_alike_in_a_graph(spec: str) -> None:
    """Attention that is equal to the bit: the lower index first, in ONNX Runtime too."""
    seen = tapped(spec, [(4, 4)], constant=True)
    assert same(spec, seen, 8) == 0


# --- pieces


def batch(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_pieces_see_each_image_by_itself() -> None:
    x, weight = batch(3, 20, 5), batch(3, 20, seed=1).abs()
    score = batch(3, 20, seed=2)
    kept = score.argsort(dim=1)[:, :6]
    members = ~select.mark(kept, 20)
    likeness = x @ x.transpose(1, 2)
    cross = select.crosses(np.stack([np.zeros(20), *np.divmod(np.arange(20), 5)], axis=1).astype(int))
    group = torch.arange(20) // 4
    merged = (score[:, ::4] > 0)[:, group]
    first = torch.arange(0, 20, 4).expand(3, -1)
    pieces = {
        "mark": lambda b: select.mark(kept[b], 20),
        "dilated": lambda b: select.dilated(select.mark(kept[b, :2], 20), cross),
        "without_twins": lambda b: select.without_twins(score[b].argsort(dim=1), likeness[b], 7, 3),
        "clean": lambda b: merge.assign(kept[b], members[b], x[b]),
        "code": lambda b: merge.assign(kept[b], members[b], x[b], "code"),
        "absorb": lambda b: merge.absorb(kept[b], x[b], weight[b], 4),
        "residual": lambda b: merge.residual(kept[b], weight[b]),
        "groups": lambda b: merge.groups(first[b], group, merged[b]),
        "in_order": lambda b: merge.in_order(kept[b], merge.one_hot(kept[b], 20)).kept,
        "in_order mix": lambda b: merge.in_order(kept[b], merge.one_hot(kept[b], 20)).mix,
    }
    for name, piece in pieces.items():
        alone = [piece(slice(b, b + 1)) for b in range(3)]
        # float32: products of a batch may be summed in another order; measured 0.0
        torch.testing.assert_close(piece(slice(0, 3)), torch.cat(alone), rtol=0, atol=1e-6, msg=name)
        assert not torch.equal(alone[0], alone[1]) or name == "groups", name  # negative control: they do differ


@pytest.mark.parametrize(("variant", "times"), [("clean", 1), ("code", 2)])
def test_merging_equals(variant: str, times: int) -> None:
    """methods.md section 7: members equal to their centre give the centre, in the code's form twice the centre."""
    x = torch.tensor([[[1.0, 0], [0, 2], [1, 0], [1, 0], [0, 2]]])
    mix = merge.assign(torch.tensor([[0, 1]]), torch.tensor([[False, False, True, True, True]]), x, variant)
    # float32: thirds are summed; measured 0.0
    torch.testing.assert_close(mix @ x, times * x[:, :2], rtol=0, atol=1e-6)


def test_a_centre_that_nobody_joins_stays() -> None:
    x = torch.tensor([[[1.0, 0], [0, 2], [1, 0]]])
    for variant in ("clean", "code"):
        mix = merge.assign(torch.tensor([[0, 1]]), torch.tensor([[False, False, True]]), x, variant)
        assert torch.equal(mix[0, 1], torch.tensor([0.0, 1.0, 0.0]))


def test_of_equal_centres_the_first_is_joined() -> None:
    x = torch.ones(1, 4, 2)
    mix = merge.assign(torch.tensor([[1, 2]]), torch.tensor([[True, False, False, True]]), x)
    assert torch.equal(mix[0, 1], torch.tensor([0.0, 0, 1, 0])) and mix[0, 0, 2] == 0


def test_keys_of_joined_heads_are_side_by_side() -> None:
    seen = state(5, heads=3, head_dim=4)
    _, k = seen.taps[0].rows[0]
    got = keys(seen, joined(seen.taps[0]))
    assert torch.equal(got[0], k[0, :, 1:].permute(1, 0, 2).reshape(5, 12))
    assert joined(seen.taps[0]).scale == 12**-0.5


def test_places_of_a_raster() -> None:
    """Panels that do not begin at 0, as `only` leaves them, and rows whose line breaks are gone."""
    seen = state([(2, 2), (2, 3)])
    assert seen.places is not None
    part = seen.places[4:]
    assert select.rows(part).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert select.crosses(part).tolist()[1] == [1, 0, 2, -1, 4]
    assert select.crosses(seen.places)[4].tolist() == [4, -1, 5, -1, 7]  # the panel before is no neighbour
    square = state([(4, 4)]).places
    assert square is not None
    assert select.windows(square, 2).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_half_precision_is_scored_wide() -> None:
    """float16 tokens, queries and keys: mixtures are float32, features come back in float16."""
    for method in ROWS:
        seen = tapped(method, [(6, 6)], dtype=torch.float16)
        keep = legal(method, seen)[-1]
        choice = chosen(method, seen, keep)
        assert choice.mix is None or choice.mix.dtype == torch.float32
        assert choice.take(seen.tokens[0]).dtype == torch.float16


# --- judged and forced


@FEW
@given(SEEDS, st.sampled_from(list(ROWS)), st.data())
def test_who_is_told_what_to_keep_keeps_that(seed: int, method: str, data: st.DataObject) -> None:
    """`Selection.forced`, whatever it is: what a runtime kept is compared on the same places."""
    seen = tapped(method, [(6, 6)], seed=seed)
    keep = data.draw(st.sampled_from(legal(method, seen)))
    if method == "fopru-row":
        rows = data.draw(st.permutations(range(6)))[: keep // 6]
        forced = sorted(6 * row + column for row in rows for column in range(6))
    elif method == "mustdrop-vision":
        other = tapped(method, [(6, 6)], seed=seed + 1)  # windows are whole: what another picture keeps
        forced = chosen(method, other, keep).kept[0].tolist()
    else:
        forced = sorted(data.draw(st.permutations(range(36)))[:keep])
    selection = Selection(TableSelector(method), (keep,), forced=torch.tensor([forced]))
    choice = selection.choose(seen, keep)
    assert valid(choice, keep, 36) == forced


@pytest.mark.parametrize("method", ["vtc-cls", "fopru-rank", "hiprune:alpha=0", "visionzip", "prumerge+:spatial=0"])
def test_a_near_tie_costs_its_margin(method: str) -> None:
    """The best token that was dropped in the place of the worst that was kept: the shortfall is what lies between."""
    seen = tapped(method, [(6, 6)])
    taps = seen.taps[-1:] if method != "vtc-cls" else seen.taps
    if method.startswith("prumerge"):
        taps = tuple(joined(tap) for tap in taps)
    score = np.sum([(columns if method.startswith("hiprune") else cls_row)(seen, tap) for tap in taps], axis=0)
    order, keep = best(score, 36), 12
    count = keep - 2 if method == "visionzip" else keep  # 2 of them are merged ones
    kept = [*order[: count - 1], order[count]]
    if method == "visionzip":
        rest = [i for i in range(36) if i not in kept]
        kept += [rest[0], rest[len(rest) // 2]]
        assert order[count - 1] not in kept
    judged = judge(torch.tensor([sorted(kept)]), 36)
    again = TableSelector(method)(replace(seen, pick=judged), keep)
    assert again.kept[0].tolist() == sorted(kept)
    want = score[order[count - 1]] - score[order[count]]
    # float32 scores near 0.05: the difference of two of them is good to 1e-8.
    assert max(call.shortfall for call in judged.calls) == pytest.approx(want, abs=1e-7) and want > 1e-5


# --- as graphs

GRAPHS = [
    *((method, [(6, 6)], 20 if method == "mustdrop-vision" else 18, True) for method in ROWS),
    ("fopru-row:queries=all", [(3, 6), (2, 6)], 12, True),
    ("hiprune:alpha=1:object_block=2", [(4, 4), (3, 6)], 20, False),
    ("visionzip:variant=code:contextual=0.5", [(4, 4), (3, 6)], 33, False),
    ("prumerge+:spatial=0:neighbours=3", [(4, 4), (3, 6)], 33, False),
    ("prumerge+:spatial=1:neighbours=35", [(6, 6)], 2, True),
    ("vispruner:step=3:important=0", [(4, 4), (3, 6)], 25, False),
    ("vispruner", [(6, 6)], 1, True),
    ("mustdrop-vision:window=2", [(4, 4), (2, 6)], 7, False),
]


@pytest.mark.parametrize(("spec", "panels", "keep", "cls"), GRAPHS)
def test_a_graph_chooses_what_eager_chooses(spec: str, panels: list[tuple[int, int]], keep: int, cls: bool) -> None:
    """On the picture that it was traced with and on others; ends of the range among them."""
    seen = tapped(spec, panels, cls=cls, heads=4, kv_heads=2)
    assert keep in legal(spec, seen)
    run = graph(spec, seen, keep)
    for seed in (1, 2, 3):
        other = tapped(spec, panels, cls=cls, heads=4, kv_heads=2, seed=seed)
        want, got = chosen(spec, other, keep), run(other)
        assert torch.equal(got.kept, want.kept)
        assert (got.mix is None) == (want.mix is None)
        if got.mix is not None and want.mix is not None:
            # float32 softmaxes of other kernels, last bit 6e-8; measured 6e-8
            torch.testing.assert_close(got.mix, want.mix, rtol=0, atol=2e-6)


# --- refused by plan

REFUSED = [
    ("llava", "vtc-cls:first_block=4", 5, "first_block=4, but the last block that can score is 3", "choose 0 to 3"),
    ("llava", "vtc-cls:first_block=-2", 5, "first_block=-2", "-1 for half"),
    ("llava", "fopru-rank:queries=some", 5, "queries='some' is not cls or all", "choose cls or all"),
    ("llava", "fopru-row", 5, "5 tokens are not whole rows of 4", "choose 4 or 8"),
    ("llava", "fopru-row", 3, "3 tokens are not whole rows of 4", "choose 4"),
    ("llava", "fopru-row", 15, "15 tokens are not whole rows of 4", "choose 12 or 16"),
    ("llava", "fopru-row:queries=x", 8, "queries='x'", "choose cls or all"),
    ("llava", "hiprune:alpha=1.5", 8, "alpha=1.5", "choose 0 to 1"),
    ("llava", "hiprune:alpha=-0.1", 8, "alpha=-0.1", "choose 0 to 1"),
    ("llava", "hiprune:alpha=nan", 8, "alpha=nan", "choose 0 to 1"),
    ("llava", "hiprune:alpha=1", 3, "1 anchors with four neighbours each do not fit into 3 tokens", "lower alpha"),
    ("llava", "hiprune:object_block=4", 8, "object_block=4, but blocks that can score are 0, 1, 2, 3", "or -1"),
    ("llava", "visionzip:contextual=1.1", 8, "contextual=1.1", "choose 0 to 1"),
    ("llava", "visionzip:contextual=1", 8, "8 contextual tokens of 8 leave no dominant one", "lower contextual"),
    ("llava", "visionzip:variant=paper", 8, "variant='paper' is not clean or code", "choose clean or code"),
    ("llava", "prumerge+", 1, "1 token, and one stands for all that are dropped", "keep 2 or more"),
    ("llava", "prumerge+:neighbours=16", 8, "neighbours=16, but a token has 15 others", "choose 1 to 15, or 0"),
    ("llava", "prumerge+:neighbours=-1", 8, "neighbours=-1", "choose 1 to 15, or 0"),
    ("llava", "prumerge+:spatial=2", 8, "spatial=2.0", "choose 0 to 1"),
    ("llava", "vispruner:important=-1", 8, "important=-1.0", "choose 0 to 1"),
    ("llava", "vispruner:step=0", 8, "step=0 tokens leave in a round", "choose 1 or more"),
    ("llava", "mustdrop-vision", 8, "4x4 tokens cannot be cut into windows of 3x3", "divides both"),
    ("llava", "mustdrop-vision:window=1", 8, "window=1 merges nothing", "choose 2 or more"),
    ("llava", "mustdrop-vision:window=2", 8, "keep=8 of 16, and each window of 2x2 saves 3", "choose 7 or 10"),
    ("llava", "mustdrop-vision:window=2", 3, "keep=3 of 16, and each window of 2x2 saves 3", "choose 4"),
    ("llava", "mustdrop-vision:window=2", 15, "keep=15 of 16, and each window of 2x2 saves 3", "choose 13 or 16"),
]


@pytest.mark.parametrize(("kind", "method", "keep", "message", "hint"), REFUSED)
def test_what_cannot_be_met_is_refused(kind: str, method: str, keep: int, message: str, hint: str, tiny) -> None:
    a = TrimTower().plan(describe(tiny(kind).model))
    with pytest.raises(PassError) as caught:
        PruneTokens(keep=keep, method=method).plan(a)
    assert message in str(caught.value) and hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("method", "keep"),
    [
        ("vtc-cls:first_block=3", 5), ("fopru-row", 8), ("hiprune:alpha=1", 5), ("hiprune:object_block=0", 8),
        ("visionzip:contextual=0.9", 8), ("prumerge+:neighbours=15", 2), ("vispruner:step=1", 8),
        ("mustdrop-vision:window=2", 7), ("mustdrop-vision:window=4", 1),
    ],
)  # fmt: skip
def test_what_can_be_met_is_planned(method: str, keep: int, tiny) -> None:
    """Negative control of the refusals: next to each a number that works."""
    planned = PruneTokens(keep=keep, method=method).plan(TrimTower().plan(describe(tiny("llava").model)))
    assert planned.keep == (keep,) and planned.method == method


def test_rows_of_unequal_tiles_are_refused(tiny) -> None:
    a = TrimTower().plan(describe(tiny("llava").model))
    panel = a.buckets[0].panels[0]
    bucket = replace(a.buckets[0], panels=(replace(panel, rows=2), replace(panel, rows=4, columns=2)))
    with pytest.raises(PassError, match="rows of 2 and 4 tokens cannot be ranked together"):
        PruneTokens(keep=8, method="fopru-row").plan(replace(a, buckets=(bucket,)))


@pytest.mark.parametrize("method", [name for name, row in ROWS.items() if row.grid])
def test_without_a_raster_nothing_is_planned(method: str, tiny) -> None:
    a = TrimTower().plan(describe(tiny("llava").model))
    with pytest.raises(PassError, match="needs tokens in rows"):
        PruneTokens(keep=8, method=method).plan(replace(a, buckets=(replace(a.buckets[0], panels=()),)))


@pytest.mark.parametrize("method", [name for name, row in ROWS.items() if row.without_cls])
def test_the_substitute_for_cls_is_noted(method: str) -> None:
    a = TrimTower().plan(describe(vlmcut.load("tiny:llava-siglip-qwen2").model))
    assert any("no [CLS]" in note for note in PruneTokens(keep=8, method=method).notes(a))
