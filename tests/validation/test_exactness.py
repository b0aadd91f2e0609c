"""The gate's own judgement: near ties, choices within noise, NaN, and reports."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import Tensor
from vlmcut.errors import BundleError, ParityError
from vlmcut.manifest import ExactnessRow, Layout, read
from vlmcut.passes import recipe
from vlmcut.passes.tokens import select
from vlmcut.passes.tokens.scores import received
from vlmcut.prompt import Picture, Prompt, assemble
from vlmcut.runtime.sessions import Graphs, Sight
from vlmcut.surgery.load import describe
from vlmcut.surgery.picking import Judge
from vlmcut.surgery.selection import Choice, attached
from vlmcut.validation import cases, exactness, reference, report
from vlmcut.validation.exactness import MULTIPLE, Exactness


@pytest.fixture(scope="module")
def model(bundle: Path, tiny: Any) -> Any:
    """The cut model of the bundle."""
    made = tiny("llava").model
    recipe.read(bundle / "recipe.toml").apply(made, None)
    return made


@pytest.fixture(scope="module")
def graphs(bundle: Path) -> Graphs:
    return Graphs(bundle, read(bundle))


BLACK = Picture(np.zeros((1, 3, 32, 32), np.float32), {"pixel_values": (1, 3, 32, 32)})


def measure(model: Any, graphs: Graphs, **options: Any) -> tuple[Exactness, list[cases.Case]]:
    return exactness.measure(model, describe(model), graphs.budget, graphs, **options)


# --- inputs ---


def shrunk(prompt: Prompt, keep: int = 5) -> Prompt:
    return prompt.shrink([np.arange(keep)] * len(prompt.pictures))


def test_fresh_prompts_cover_the_layouts(model: Any, graphs: Graphs) -> None:
    a, budget = describe(model), graphs.budget
    prompts = exactness.fresh_prompts(a, budget, seed=3)
    full, middle, text, last = prompts
    assert [len(p.pictures) for p in prompts] == [budget.images, 1, 0, 1] and budget.images == 2
    for prompt in prompts:
        assert prompt.counts == (16,) * len(prompt.pictures)
        places = prompt.visual_index[0] >= 0
        np.testing.assert_array_equal(prompt.input_ids[0] == a.layout.image_token_id, places)
        assert prompt.visual_index[0, places].tolist() == list(range(len(prompt.pictures) * 16))
        for picture in prompt.pictures:
            assert picture.bucket(a.buckets) == 0 and picture.pixel_values.dtype == np.float32
        shrunk(prompt).pad(budget)
    assert shrunk(full).length == budget.sequence
    place = np.flatnonzero(middle.visual_index[0] >= 0)
    assert place[0] > 0 and place[-1] < middle.length - 1  # text on both sides
    assert shrunk(text).length < budget.sequence and shrunk(last).length < budget.sequence
    assert last.visual_index[0, -2] >= 0 > last.visual_index[0, -1]


def test_every_bucket_has_its_turn(model: Any, graphs: Graphs) -> None:
    """Unequal pictures meet in the full prompt, and none is left out however many there are."""
    a = describe(model)
    small = replace(a.buckets[0], geometry={"pixel_values": (1, 3, 16, 24)}, tokens=6)
    wide = replace(a.buckets[0], geometry={"pixel_values": (1, 3, 8, 40)}, tokens=5)
    tall = replace(a.buckets[0], geometry={"pixel_values": (7, 12)}, tokens=7)  # patches in rows, as Qwen's
    for buckets in ([a.buckets[0], small], [a.buckets[0], small, wide, tall, replace(tall, geometry={"x": (1,)})]):
        buckets[-1] = replace(buckets[-1], geometry=buckets[-1].geometry | {"pixel_values": (9, 12)})
        many = replace(a, buckets=tuple(buckets))
        prompts = exactness.fresh_prompts(many, graphs.budget, seed=3)
        met = {picture.bucket(many.buckets) for prompt in prompts for picture in prompt.pictures}
        assert met == set(range(len(buckets)))
        assert prompts[0].counts == (buckets[0].tokens, buckets[1].tokens)
        for prompt in prompts:
            assert prompt.counts == tuple(many.buckets[p.bucket(many.buckets)].tokens for p in prompt.pictures)
            assert (prompt.visual_index >= 0).sum() == sum(prompt.counts)


def test_fresh_prompts_follow_the_seed(model: Any, graphs: Graphs) -> None:
    a = describe(model)
    one, same, other = (exactness.fresh_prompts(a, graphs.budget, seed)[0] for seed in (3, 3, 4))
    np.testing.assert_array_equal(one.input_ids, same.input_ids)
    np.testing.assert_array_equal(one.pictures[1].pixel_values, same.pictures[1].pixel_values)
    assert not np.array_equal(one.input_ids, other.input_ids)
    assert not np.array_equal(one.pictures[0].pixel_values, other.pictures[0].pixel_values)
    assert not np.array_equal(one.pictures[0].pixel_values, one.pictures[1].pixel_values)


def test_truth_is_float64_throughout(model: Any) -> None:
    """A norm in float32 would leave an error of 1e-7; measured distance to the norm written out: 0."""
    exact = reference.truth(model)
    assert {p.dtype for p in exact.parameters()} == {torch.float64}
    assert model.dtype == torch.float32
    norm = exact.model.language_model.norm
    x = torch.linspace(-3, 3, norm.weight.numel(), dtype=torch.float64)
    want = norm.weight * x / (x.square().mean() + norm.variance_epsilon).sqrt()
    torch.testing.assert_close(norm(x), want, rtol=0, atol=1e-14)


# --- near ties ---


@dataclass
class Flipped:
    """The graphs, but the two largest logits change places at one step (0 is prefill)."""

    graphs: Graphs
    at: int
    step: int = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.graphs, name)

    def _turn(self, logits: np.ndarray) -> np.ndarray:
        if self.step == self.at:
            first, second = np.argsort(logits)[::-1][:2]
            logits = logits.copy()
            logits[first], logits[second] = logits[second], logits[first]
        self.step += 1
        return logits

    def prefill(self, *args: Any) -> np.ndarray:
        return self._turn(self.graphs.prefill(*args))

    def decode(self, *args: Any) -> np.ndarray:
        return self._turn(self.graphs.decode(*args))


@pytest.mark.parametrize("steps", [False, True], ids=["", "features may step, and do not"])
@pytest.mark.parametrize("at", [0, 3])
def test_one_flip_is_counted_once_with_its_gap(at: int, steps: bool, model: Any, graphs: Graphs) -> None:
    case = measure(model, graphs)[1][0]
    verdict = Exactness()
    turned: Any = Flipped(graphs, at)
    flips = exactness._compare_tokens(verdict, model, turned, case, "", steps=steps)
    assert (verdict.tokens, verdict.equal) == (len(case.tokens), len(case.tokens) - 1)
    ((gap, text),) = flips
    logits = case.prefill_logits if at == 0 else case.decode_logits[at - 1]
    first, second = np.sort(logits)[::-1][:2]
    assert gap == pytest.approx(first - second, abs=1e-4)  # float32 against float64; measured 6e-6
    assert text.startswith(f"token {at}: eager {logits.argmax()}, graph ")


def test_flip_within_noise_is_a_near_tie_and_beyond_is_wrong(
    model: Any, graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, _ = measure(model, graphs)
    assert plain.ok and plain.near_ties == plain.wrong == []
    close = 2 * max(row.tolerance for row in plain.rows if row.output == "logits")
    flips = [(0.99 * close, "near"), (1.01 * close, "far"), (math.nan, "nan"), (math.inf, "inf")]
    monkeypatch.setattr(exactness, "_compare_tokens", lambda *_, **__: flips[:1])
    verdict, _ = measure(model, graphs)
    assert verdict.near_ties == ["near"] * 4 and verdict.wrong == [] and verdict.ok  # of four prompts
    monkeypatch.setattr(exactness, "_compare_tokens", lambda *_, **__: flips)
    verdict, _ = measure(model, graphs)
    assert verdict.near_ties == ["near"] * 4 and verdict.wrong == ["far", "nan", "inf"] * 4
    assert not verdict.ok
    assert "far" in report.failure(verdict)


# --- choices within noise ---


@dataclass(frozen=True)
class Fixed:
    """A selector that ranks given scores, which a model sees rounded to its own dtype."""

    score: Tensor
    method: str = "fastervlm"
    text: bool = False
    outputs: tuple[int, ...] = ()

    def leaving(self, tokens: int, keep: int, blocks: int) -> tuple[int, ...]:
        return ()

    def projected(self, tokens: int, keep: int) -> int:
        return keep

    def blocks(self, scored: Any) -> Any:
        return ()

    def __call__(self, state: Any, keep: int) -> Choice:
        return Choice(select.ascending(state.top(self.score.to(state.tokens.dtype), keep)))


@pytest.mark.parametrize("gap", [0.0, 1e-9, 1e-3])
def test_another_choice_counts_by_its_score(gap: float, model: Any) -> None:
    """Tokens 4 and 5 differ by `gap`; the runtime kept 5 where the reference keeps 4."""
    score = torch.linspace(1, 0, 16, dtype=torch.float64)[None].clone()
    score[0, 5] = score[0, 4] - gap
    exact = reference.truth(model)
    model = copy.deepcopy(model)
    for either in (exact, model):
        attached(either).selection.selector = Fixed(score)  # type: ignore[union-attr]
    kept = exactness._Kept()
    kept.look(model, exact, BLACK, torch.tensor([[0, 1, 2, 3, 4]]))
    assert (kept.images, kept.other, kept.regret) == (1, 0, 0.0)
    assert kept.note == "equal on 1 images"
    kept.look(model, exact, BLACK, torch.tensor([[0, 1, 2, 3, 5]]))
    assert kept.regret == pytest.approx(gap, abs=1e-15)
    assert kept.note.startswith("other tokens on 1 of 2 images")
    assert 0 < kept.noise < 1e-7  # the scores' own rounding to float32
    assert (kept.regret <= MULTIPLE * kept.noise) == (gap < 1e-6)


class OtherChoice:
    """The graphs, but the vision graph keeps other tokens, and hands their features on."""

    def __init__(self, graphs: Graphs, model: Any, choose: Callable[[Tensor], Tensor]) -> None:
        self.graphs, self.model, self.choose = graphs, model, choose

    def __getattr__(self, name: str) -> Any:
        return getattr(self.graphs, name)

    def vision(self, picture: Picture) -> Sight:
        state = reference.state(self.model, picture)
        score = received(state, state.taps[-1])
        seen = reference.see(self.model, picture, self.choose(score))
        return Sight(seen.features.numpy(), seen.kept.numpy())


def _swap(score: Tensor) -> Tensor:
    """The best dropped token instead of the worst kept one."""
    order = score[0].argsort(descending=True)
    return torch.cat([order[:4], order[5:6]]).sort().values[None]


def test_bundle_that_differs_within_noise_is_accepted_with_a_note(
    model: Any, graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = OtherChoice(graphs, model, _swap)
    verdict, _ = measure(model, other)  # type: ignore[arg-type]
    row = next(r for r in verdict.rows if r.output == "kept")
    assert not row.ok and row.max_abs > row.tolerance and not verdict.ok  # no tie in these pictures

    real = Judge.top  # as if the pictures had ties: the scores differ by no more than rounding

    def closer(self: Judge, score: Tensor, count: int) -> Tensor:
        chosen = real(self, score, count)
        self.calls[-1] = replace(self.calls[-1], shortfall=self.calls[-1].shortfall * 1e-6)
        return chosen

    monkeypatch.setattr(Judge, "top", closer)
    verdict, recorded = measure(model, other)  # type: ignore[arg-type]
    row = next(r for r in verdict.rows if r.output == "kept")
    assert row.ok and 0 < row.max_abs <= row.tolerance
    assert row.note.startswith("other tokens on 4 of 4 images")
    assert verdict.ok and verdict.equal == verdict.tokens  # everything after is judged on the runtime's choice
    for case in recorded:
        for picture, sight in zip(case.prompt.pictures, case.seen, strict=True):
            np.testing.assert_array_equal(sight.kept, other.vision(picture).kept)


def test_keeping_all_must_keep_the_order(tiny: Any) -> None:
    whole = tiny("llava").model
    kept = exactness._Kept()
    kept.look(whole, whole, BLACK, torch.arange(16)[None])
    assert kept.regret == 0
    kept.look(whole, whole, BLACK, torch.arange(16).flip(0)[None])
    assert kept.regret == math.inf


# --- distances and rows ---


def test_nan_wins_wherever_it_stands(graphs: Graphs, model: Any) -> None:
    case = measure(model, graphs)[1][0]
    for layer in range(3):
        spoilt = {name: value.copy() for name, value in case.prefill_states.items()}
        spoilt[f"key_{layer}"][0, 0, 0] = np.nan
        found = cases.distances(graphs, replace(case, prefill_states=spoilt))
        assert math.isnan(found["prefill", "present_key"]), layer
        assert found["prefill", "present_value"] < 1e-5
    key = ("prefill", "logits")
    for values in ([1.0, math.nan], [math.nan, 1.0]):
        assert math.isnan(cases.worst([{key: v} for v in values])[key])


ROW = ExactnessRow(graph="prefill", output="logits", max_abs=0.0, floor=1.0, tolerance=8.0, ok=True)


@pytest.mark.parametrize(("far", "ok"), [(0, True), (8, True), (8.01, False), (math.nan, False), (math.inf, False)])
def test_judge(far: float, ok: bool) -> None:
    (row,) = cases.judge({("prefill", "logits"): far}, [ROW])
    assert row.ok is ok and (row.max_abs == far or math.isnan(far))


def test_judge_refuses_a_row_without_distance() -> None:
    with pytest.raises(BundleError, match=r"no distance for prefill\.logits"):
        cases.judge({}, [ROW])


def test_reference_of_another_shape_is_refused(graphs: Graphs, model: Any) -> None:
    case = measure(model, graphs)[1][0]
    with pytest.raises(BundleError, match=r"shape \[320\], the reference \[319\]"):
        cases.distances(graphs, replace(case, prefill_logits=case.prefill_logits[1:]))


def same(one: Any, other: Any) -> None:
    """Two cases, field by field; what the reference computed was rounded to float32 once, 6e-8 relative at most."""
    if isinstance(one, np.ndarray):
        assert one.shape == other.shape and one.dtype.kind == other.dtype.kind
        np.testing.assert_allclose(other, one, rtol=6e-8 if one.dtype == np.float64 else 0, atol=0)
    elif is_dataclass(one):
        assert type(one) is type(other)
        for field in fields(one):
            same(getattr(one, field.name), getattr(other, field.name))
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            same(one[key], other[key])
    elif isinstance(one, tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            same(a, b)
    else:
        assert one == other and type(one) is type(other)


@pytest.mark.parametrize("number", range(4))
def test_golden_case_round_trip(number: int, graphs: Graphs, model: Any, tmp_path: Path) -> None:
    case = measure(model, graphs)[1][number]
    assert sorted(case.prefill_states) == sorted(f"{kind}_{i}" for kind in ("key", "value") for i in range(3))
    case.save(tmp_path / "5.npz")
    again = cases.read_case(tmp_path / "5.npz", case.prompt.layout)
    same(case, again)
    found, before = cases.distances(graphs, again), cases.distances(graphs, case)
    assert found.keys() == before.keys()
    for key, far in before.items():
        # One rounding of a value below 4 to float32 moves a distance by less than 3e-7.
        assert found[key] == pytest.approx(far, abs=3e-7), key
    with pytest.raises(AssertionError):  # negative control
        same(case, replace(again, tokens=again.tokens + 1))


def test_golden_case_with_everything(tmp_path: Path) -> None:
    """DeepStack levels, grids, three rows of positions and a convolution's state, which tiny:llava does not have."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape)

    layout = Layout(image_token_id=3, positions="mrope", merge=2)
    pictures = [
        Picture(draw(16, 6).astype(np.float32), {"pixel_values": (16, 6), "image_grid_thw": (1, 4, 4)}),
        Picture(draw(8, 6).astype(np.float32), {"pixel_values": (8, 6), "image_grid_thw": (1, 2, 4)}),
    ]
    prompt = assemble(layout, np.array([[1, 3, 3, 3, 3, 7, 3, 3, 9]]), pictures, [4, 2])
    prompt = prompt.shrink([np.array([1, 3]), np.array([0])])
    seen = tuple(Sight(draw(n, 5), np.arange(n), (draw(n, 5), draw(n, 5))) for n in (2, 1))
    states = {"key_0": draw(2, 6, 4), "value_0": draw(2, 6, 4), "conv_1": draw(5, 3)}
    kept = (np.array([0, 1, 4]), np.array([0, 4]))
    case = cases.Case(prompt, seen, kept, draw(11), states, np.array([4, 5]), draw(2, 11), dict(states))
    case.save(tmp_path / "x.npz")
    same(case, cases.read_case(tmp_path / "x.npz", layout))


def test_empty_verdict_is_not_ok() -> None:
    assert not Exactness().ok
    assert Exactness(rows=[ROW]).ok
    assert not Exactness(rows=[replace(ROW, ok=False)]).ok
    assert not Exactness(rows=[ROW], wrong=["x"]).ok


def test_worst_rows_come_first() -> None:
    rows = [replace(ROW, output=str(v), max_abs=v) for v in (1.0, math.nan, 9.0, 3.0)]
    assert [r.output for r in Exactness(rows=rows).worst(3)] == ["nan", "9.0", "3.0"]


# --- reports ---

NASTY = "<script>alert('x')</script> & \"co\""


def test_page_holds_every_row_and_escapes(bundle: Path) -> None:
    manifest = read(bundle)
    rows = [replace(r, note=NASTY) for r in report.rows_of(manifest)]
    assert len(rows) == 8
    nasty = replace(
        manifest,
        source={"id": NASTY},
        tools={NASTY: NASTY},
        recipe=[{"name": NASTY}],
        files={NASTY: {"bytes": 10**6, "sha256": ""}},
        exactness=manifest.exactness | {"near_ties": [NASTY]},
        quality={"questions": 2, "accuracy": {NASTY: 0.5}, "agreement": {NASTY: 1.0}},
    )
    page = report.page(nasty, rows)
    assert "<script" not in page and "&lt;script&gt;" in page
    for row in rows:
        assert f"<td>{row.graph}.{row.output}</td><td>{row.max_abs:.2e}</td>" in page
    assert page.count("<td>ok</td>") == 8 and "FAIL" not in page
    assert "http" not in page  # nothing is fetched when it is opened
    assert "FAIL" in report.page(nasty, [replace(rows[0], ok=False)])


def test_page_says_not_exact(bundle: Path) -> None:
    manifest = read(bundle)
    rows = report.rows_of(manifest)
    assert ">exact</span>" in report.page(manifest, rows)
    bad = replace(manifest, exactness=manifest.exactness | {"ok": False})
    assert "NOT exact" in report.page(bad, rows)


def test_junit_is_what_ci_reads(bundle: Path) -> None:
    rows = report.rows_of(read(bundle))
    rows[2] = replace(rows[2], ok=False, max_abs=math.nan, note=NASTY)
    suite = ElementTree.fromstring(report.junit(rows))
    assert suite.tag == "testsuite"
    assert (suite.get("tests"), suite.get("failures")) == ("8", "1")
    found = {(c.get("classname"), c.get("name")): c.find("failure") for c in suite.findall("testcase")}
    assert list(found) == [(r.graph, r.output) for r in rows]
    (failure,) = [f for f in found.values() if f is not None]
    assert failure.get("message") == report.line(rows[2])
    stored = ElementTree.parse(bundle / "report" / "junit.xml").getroot()
    assert (stored.get("tests"), stored.get("failures")) == ("8", "0")


def test_failure_names_rows_and_tokens() -> None:
    rows = [replace(ROW, output=f"o{i}", max_abs=10.0 + i, ok=False) for i in range(7)] + [ROW]
    text = report.failure(Exactness(rows=rows, wrong=[f"token {i}" for i in range(9)]))
    assert "prefill.o6" in text and "prefill.o1" not in text and "token 4" in text and "token 5" not in text
    assert str(ParityError(text)).count("FAIL") == 5
