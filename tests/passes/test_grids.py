"""Grid transforms against PyTorch's pooling, a cosine transform written out, and their own promises."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vlmcut.errors import PassError
from vlmcut.manifest import Bucket, Panel
from vlmcut.passes.prune_tokens import PruneTokens
from vlmcut.passes.tokens.grids import ROWS, average_bins, centres, cosines, grid_linear, lowpass, smaller
from vlmcut.passes.tokens.method import Place
from vlmcut.passes.tokens.methods import TableSelector
from vlmcut.surgery.load import Loaded, describe
from vlmcut.surgery.selection import Selection, TowerState, places

from .token_helpers import chosen, graph, state

METHODS = ("pool", "fourier", "fourier:gain=code")
SIDES = st.integers(1, 12)


def _tokens(spec: str, seen: TowerState, keep: int) -> np.ndarray:
    return chosen(spec, seen, keep).take(seen.tokens[0]).numpy()


@given(SIDES, SIDES)
def test_bins_are_those_of_adaptive_pooling(n: int, m: int) -> None:
    x = torch.from_numpy(np.random.default_rng(n * 13 + m).standard_normal((3, n)))
    want = torch.nn.functional.adaptive_avg_pool1d(x, m).numpy()
    # float64: a mean as a product; measured 2e-16.
    np.testing.assert_allclose(x.numpy() @ average_bins(n, m).T, want, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("rows", "columns", "keep", "grid"), [(4, 6, 6, (2, 3)), (5, 7, 12, (3, 4)), (3, 4, 1, (1, 1))]
)
def test_pool_is_adaptive_pooling(rows: int, columns: int, keep: int, grid: tuple[int, int]) -> None:
    seen = state([(rows, columns)], dtype=torch.float64)
    picture = seen.tokens[0].T.reshape(1, -1, rows, columns)
    want = torch.nn.functional.adaptive_avg_pool2d(picture, grid).flatten(2)[0].T.numpy()
    np.testing.assert_allclose(_tokens("pool", seen, keep), want, rtol=0, atol=1e-14)  # float64; measured 2e-16
    if rows % grid[0] == columns % grid[1] == 0:
        steps = (rows // grid[0], columns // grid[1])
        plain = torch.nn.functional.avg_pool2d(picture, steps).flatten(2)[0].T.numpy()
        np.testing.assert_allclose(_tokens("pool", seen, keep), plain, rtol=0, atol=1e-14)


def _transformed(x: np.ndarray, m: int) -> np.ndarray:
    """Axis 0 of x through the definition: coefficients by sums of cosines, the first m of them back."""
    n = len(x)
    coefficients = []
    for k in range(m):
        norm = np.sqrt((1 if k == 0 else 2) / n)
        coefficients.append(norm * sum(x[j] * np.cos(np.pi * (2 * j + 1) * k / (2 * n)) for j in range(n)))
    back = []
    for j in range(m):
        terms = [
            np.sqrt((1 if k == 0 else 2) / m) * c * np.cos(np.pi * (2 * j + 1) * k / (2 * m))
            for k, c in enumerate(coefficients)
        ]
        back.append(sum(terms))
    return np.stack(back)


def test_fourier_is_the_transform_written_out() -> None:
    seen = state([(5, 7)], dtype=torch.float64)
    picture = seen.tokens[0].numpy().reshape(5, 7, -1)
    both = _transformed(_transformed(picture, 3).transpose(1, 0, 2), 4).transpose(1, 0, 2).reshape(12, -1)
    # float64; measured 9e-16 and 7e-16.
    np.testing.assert_allclose(_tokens("fourier:gain=code", seen, 12), both, rtol=0, atol=1e-13)
    np.testing.assert_allclose(_tokens("fourier", seen, 12), both * np.sqrt(12 / 35), rtol=0, atol=1e-13)


@given(SIDES)
def test_keeping_all_is_the_identity(n: int) -> None:
    assert np.array_equal(average_bins(n, n), np.eye(n))
    np.testing.assert_allclose(cosines(n) @ cosines(n).T, np.eye(n), rtol=0, atol=1e-14)  # float64; measured 2e-15
    for clean in (True, False):
        np.testing.assert_allclose(lowpass(n, n, clean), np.eye(n), rtol=0, atol=1e-13)  # float64; measured 3e-15
    assert centres(n, n).tolist() == list(range(n))


@pytest.mark.parametrize("spec", METHODS)
def test_a_constant_picture_stays_constant(spec: str) -> None:
    seen = state([(4, 6), (2, 3)], dtype=torch.float64)
    seen.tokens[:] = torch.tensor([3.0, -1.0, 0.5, 2.0, 0.0, 7.0])
    gain = np.sqrt(24 / 4) if spec == "fourier:gain=code" else 1.0
    want = np.tile(seen.tokens[0, :1].numpy() * gain, (5, 1))
    np.testing.assert_allclose(_tokens(spec, seen, 5), want, rtol=0, atol=1e-13)  # float64; measured 1e-14


@given(st.integers(1, 3), SIDES, SIDES, st.data())
def test_one_matrix_is_both_axes(batch: int, rows: int, columns: int, data: st.DataObject) -> None:
    h, w = data.draw(st.integers(1, rows)), data.draw(st.integers(1, columns))
    rng = np.random.default_rng(rows + 100 * columns)
    x, along = rng.standard_normal((batch, rows * columns, 2)), rng.standard_normal((h, rows))
    across = rng.standard_normal((w, columns))
    want = np.einsum("hr,brcd,wc->bhwd", along, x.reshape(batch, rows, columns, 2), across).reshape(batch, h * w, 2)
    np.testing.assert_allclose(grid_linear(along, across) @ x, want, rtol=0, atol=1e-11)  # float64; measured 2e-14


@given(SIDES, SIDES, st.integers(1, 60))
def test_the_smaller_grid_is_the_most_alike(rows: int, columns: int, count: int) -> None:
    every = [(h, w) for h in range(1, rows + 1) for w in range(1, columns + 1) if h * w == count]
    found = smaller(rows, columns, count)
    if not every:
        assert found is None
        return
    stretch = {(h, w): abs(np.log(h / w) - np.log(rows / columns)) for h, w in every}
    assert found in every
    assert stretch[found] <= min(stretch.values()) + 1e-12


def test_of_two_grids_equally_alike_the_wider_is_taken() -> None:
    assert smaller(6, 6, 12) == (3, 4)
    assert smaller(24, 24, 144) == (12, 12)
    assert smaller(4, 4, 5) is None


@given(SIDES, st.data())
def test_centres_lie_in_their_cells(n: int, data: st.DataObject) -> None:
    m = data.draw(st.integers(1, n))
    found = centres(n, m)
    assert (np.diff(found) > 0).all()
    assert all(average_bins(n, m)[i, place] > 0 for i, place in enumerate(found))


@pytest.mark.parametrize("spec", METHODS)
def test_panels_share_in_proportion_and_do_not_mix(spec: str) -> None:
    seen = state([(4, 6), (2, 6)], frames=2)
    choice = chosen(spec, seen, 18)
    assert seen.places is not None and choice.mix is not None
    panel = seen.places[:, 0]
    taken = panel[choice.kept[0].numpy()]
    assert np.bincount(taken).tolist() == [6, 3, 6, 3]
    assert not choice.mix[0].numpy()[taken[:, None] != panel].any()


def test_kept_tokens_are_in_the_middle_of_their_cells() -> None:
    assert chosen("pool", state([(4, 6)]), 6).kept[0].tolist() == [7, 9, 11, 19, 21, 23]
    assert chosen("pool", state([(3, 3)]), 1).kept[0].tolist() == [4]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_weights_are_float32_or_wider(dtype: torch.dtype) -> None:
    choice = chosen("fourier", state([(4, 4)], dtype=dtype), 4)
    assert choice.mix is not None
    assert choice.mix.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert choice.take(torch.ones(16, 2, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("policy", ["drop", "keep"])
def test_line_breaks_take_no_part(policy: str) -> None:
    panels = (Panel(rows=2, columns=4), Panel(rows=4, columns=2, line_breaks=True))
    seen = TowerState(tokens=torch.randn(1, 20, 3), project=lambda x: x, panels=panels, places=places(panels))
    breaks = Bucket(size=(1, 1), geometry={}, tokens=20, panels=panels).line_breaks
    keep = 4 + (len(breaks) if policy == "keep" else 0)
    choice = Selection(TableSelector("pool"), (keep,), policy).choose(seen, keep, breaks)
    assert choice.mix is not None
    mixed = [i for i, kept in enumerate(choice.kept[0].tolist()) if kept not in breaks]
    assert len(mixed) == 4 and not choice.mix[0][mixed][:, list(breaks)].any()
    torch.testing.assert_close(choice.mix[0].sum(dim=-1), torch.ones(keep))


def test_tiles_with_budgets_of_their_own_are_the_same_grids() -> None:
    seen = state([(4, 4), (4, 4)])
    alone, together = TableSelector("pool", pool="tile")(seen, 8), TableSelector("pool")(seen, 8)
    assert alone.mix is not None and together.mix is not None
    assert torch.equal(alone.kept, together.kept) and torch.equal(alone.mix, together.mix)


@pytest.mark.parametrize("spec", METHODS)
def test_onnx_runtime_makes_the_same_tokens(spec: str) -> None:
    seen = state([(4, 6), (2, 3)], taps=0)
    run, want = graph(spec, seen, 10), chosen(spec, seen, 10)
    have = run(seen)
    assert torch.equal(have.kept, want.kept)
    assert have.mix is not None and want.mix is not None
    assert torch.equal(have.mix, want.mix)  # constants


def _refused(spec: str, shapes: list[tuple[int, int]], keep: int, panels: int | None = None) -> tuple[str, str] | None:
    rasters = tuple(Panel(rows=r, columns=c) for r, c in shapes)
    tokens = sum(panel.tokens for panel in rasters)
    bucket = Bucket(size=(1, 1), geometry={}, tokens=tokens, panels=rasters)
    name, _, option = spec.partition(":gain=")
    panels = panels or len(shapes)
    place = Place(anatomy=None, bucket=bucket, tokens=tokens * panels // len(shapes), keep=keep, panels=panels)  # type: ignore[arg-type]
    return ROWS[name].refuse(place, dict(ROWS[name].options) | ({"gain": option} if option else {}))


@pytest.mark.parametrize("spec", METHODS)
def test_every_budget_is_met_or_refused(spec: str) -> None:
    shapes = [(4, 5), (2, 5)]
    for keep in range(1, 31):
        refused = _refused(spec, shapes, keep)
        if refused is None:
            chosen(spec, state(shapes), keep)
        else:
            assert f"{keep} of 30 tokens" in refused[0]
            near = [int(k) for k in refused[1].rpartition(": ")[2].split(", ")]
            assert len(near) == 3 and all(_refused(spec, shapes, k) is None for k in near)
    assert [k for k in range(1, 31) if _refused(spec, shapes, k) is None] == [3, 6, 9, 12, 15, 18, 24, 30]


def test_a_tile_with_a_budget_of_its_own_is_checked_alone() -> None:
    assert _refused("pool", [(4, 4), (4, 4)], 4, panels=1) is None
    assert _refused("pool", [(4, 4), (4, 4)], 5, panels=1) is not None
    assert _refused("pool", [(4, 4), (4, 4)], 5) is not None
    assert _refused("pool", [(4, 4), (4, 4)], 8) is None


def test_an_unknown_gain_is_refused() -> None:
    refused = _refused("fourier:gain=loud", [(4, 4)], 4)
    assert refused is not None and "gain=loud" in refused[0]


def test_plan_says_which_counts_are_grids(tiny: Callable[[str], Loaded]) -> None:
    anatomy = describe(tiny("llava").model)  # 4 x 4 tokens
    with pytest.raises(PassError, match="7 of 16 tokens, in 1 raster of 4x4") as error:
        PruneTokens(keep=7, method="pool").plan(anatomy)
    assert error.value.hint == "the nearest that do: 6, 8, 9"
    assert PruneTokens(keep=4, method="fourier").plan(anatomy).keep == (4,)
