"""A sweep answers as the slow road does, judges against random, hides nothing, and refuses what cannot be done."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from vlmcut.errors import PassError, VlmcutError
from vlmcut.passes.recipe import make
from vlmcut.passes.tokens.methods import METHODS
from vlmcut.surgery.load import Loaded, describe
from vlmcut.surgery.talk import see_all
from vlmcut.validation import quality, sweep, sweep_answers
from vlmcut.validation.quality import Question
from vlmcut.validation.sweep import Asked, check_room, run
from vlmcut.validation.sweep_answers import Chunks, Score, scores
from vlmcut.validation.sweep_plan import BASELINES, DRAWS, Cell, Design, Refused, applied, design
from vlmcut.validation.sweep_report import MARK, Sweep, pareto, picture, table, to_json, write
from vlmcut.validation.sweep_times import Time, times

KEEP = (8,)
ASKED = ("Is it red?", "What is left of the blue one?")


def write_set(folder: Path, answers: dict[str, str] | None = None) -> Path:
    """Three pictures with two questions each."""
    folder.mkdir()
    rng = np.random.default_rng(3)
    lines = []
    for number in range(3):
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        for asked in ASKED:
            answer = (answers or {}).get(f"{number} {asked}", "yes")
            lines.append(json.dumps({"image": f"{number}.png", "question": asked, "answer": answer}))
    (folder / "questions.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("asked") / "set")


@pytest.fixture(scope="module")
def trimmed(asked: Path) -> Callable[[str], tuple[Loaded, list[Question]]]:
    """A trimmed tiny model with questions; each once."""
    done: dict[str, tuple[Loaded, list[Question]]] = {}

    def load(kind: str) -> tuple[Loaded, list[Question]]:
        if kind not in done:
            import vlmcut

            loaded = vlmcut.load(f"tiny:{kind}", sizes=((32, 32),))
            questions = quality.read_set(loaded, asked)
            make([]).apply(loaded.model, None)
            done[kind] = loaded, questions
        return done[kind]

    return load


def design_of(loaded: Loaded, *args: Any, **kwargs: Any) -> Design:
    return design(describe(loaded.model), *args, **kwargs)


@pytest.mark.parametrize("kind", ["llava", "llava-siglip-qwen2", "qwen2_5_vl", "qwen3_vl"])
def test_cached_looks_are_what_each_method_would_see(
    kind: str, trimmed: Callable[[str], tuple[Loaded, list[Question]]]
) -> None:
    """Every method that applies, bit by bit: a wrong block, question or bucket would show."""
    loaded, questions = trimmed(kind)
    plan = design_of(loaded, prune=(0.5,))
    (chunk,) = Chunks(loaded, [c for c in plan.cells if c.row.inside is None]).of(questions)
    assert len(chunk.looks) == 3 and len(chunk.prompts) == 6
    assert len(plan.cells) > 8 and (kind != "llava" or any(c.row.text for c in plan.cells))
    for cell in (None, *plan.cells):
        fast = chunk.looked(cell, 0)
        with applied(loaded.model, cell):
            slow = [see_all(loaded.model, question.prompt) for question in questions]
        for (prompt, seen), (want_prompt, want) in zip(fast, slow, strict=True):
            np.testing.assert_array_equal(prompt.input_ids, want_prompt.input_ids, err_msg=str(cell))
            np.testing.assert_array_equal(prompt.position_ids, want_prompt.position_ids, err_msg=str(cell))
            assert torch.equal(seen[0].kept, want[0].kept), cell
            assert torch.equal(seen[0].features, want[0].features), cell
            assert len(seen[0].levels) == len(want[0].levels)
            assert all(map(torch.equal, seen[0].levels, want[0].levels)), cell


def test_answers_are_those_of_the_slow_road(trimmed: Callable[[str], tuple[Loaded, list[Question]]]) -> None:
    loaded, questions = trimmed("llava")
    plan = design_of(loaded, ["fastervlm", "tome", "cdpruner"], keep=KEEP)
    said = quality.eager_answers(loaded, questions, 6)
    asked = [replace(question, answer=answer) for question, answer in zip(questions, said, strict=True)]
    found = scores(loaded, plan, asked, seeds=2, new_tokens=6)
    assert found[None] == Score((1.0,), (1.0,))
    for cell in plan.cells:
        draws = range(2 if cell.method == "random" else 1)
        slow = []
        for seed in draws:
            with applied(loaded.model, cell, seed):
                slow.append(quality.accuracy(quality.eager_answers(loaded, asked, 6), asked))
        assert found[cell].accuracy == found[cell].agreement == tuple(slow)
    assert min(score.accuracy[0] for score in found.values()) < 1  # something did change an answer
    assert describe(loaded.model).method is None  # and the model is as before


def test_a_picture_goes_through_the_tower_once(
    trimmed: Callable[[str], tuple[Loaded, list[Question]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, questions = trimmed("llava")
    looks: list[int] = []
    look = sweep_answers.look

    def count(*args: Any, **kwargs: Any) -> Any:
        looks.append(1)
        return look(*args, **kwargs)

    monkeypatch.setattr(sweep_answers, "look", count)
    plan = design_of(loaded, ["fastervlm", "divprune"], keep=KEEP)
    first = scores(loaded, plan, questions, new_tokens=3)
    assert len(looks) == 3
    # Less room than one picture takes: a run of its own for each question, and the same answers.
    monkeypatch.setattr(Chunks.__init__, "__defaults__", (1,))
    assert scores(loaded, plan, questions, new_tokens=3) == first
    assert len(looks) == 3 + 6


def test_only_random_draws(trimmed: Callable[[str], tuple[Loaded, list[Question]]]) -> None:
    """Other methods are asked once: a second seed must not change them."""
    loaded, questions = trimmed("llava")
    plan = design_of(loaded, keep=KEEP)
    (chunk,) = Chunks(loaded, [c for c in plan.cells if c.row.inside is None]).of(questions[:1])
    for cell in plan.cells:
        kept = [chunk.looked(cell, seed)[0][1][0].kept for seed in range(3)]
        assert (torch.equal(kept[0], kept[1]) and torch.equal(kept[1], kept[2])) == (cell.method not in DRAWS), cell


def test_design_hides_nothing(tiny: Callable[[str], Loaded]) -> None:
    a = describe(tiny("llava").model)
    plan = design(a, prune=(0.5, 0.75))
    assert plan.tokens == (16,) and plan.keeps == ((8,), (4,))
    assert [c.method for c in plan.cells[:2]] == list(BASELINES)
    for keep in plan.keeps:
        shown = {c.method for c in plan.cells if c.keep == keep}
        refused = {r.method for r in plan.refused if r.keep in (None, keep)}
        assert shown | refused == set(METHODS) and not shown & refused
    assert all(r.reason and not r.reason.startswith("prune-tokens") for r in plan.refused)
    frames = [r for r in plan.refused if METHODS[r.method].frames]
    assert frames and all(r.keep is None for r in frames)  # one picture is no clip, whatever its budget
    at_one = [r for r in design(a, ["fopru-row"], keep=(4, 5)).refused]
    assert [(r.method, r.keep) for r in at_one] == [("fopru-row", (5,))] and "5 tokens" in at_one[0].reason


def test_design_adds_the_baselines_once(tiny: Callable[[str], Loaded]) -> None:
    plan = design(describe(tiny("llava").model), ["divprune", "uniform", "divprune"], keep=(5,))
    assert [c.method for c in plan.cells] == ["random", "uniform", "divprune"]


BAD: dict[str, tuple[dict[str, Any], tuple[str, str]]] = {
    "method": ({"methods": ["divprun"]}, ("divprun", "did you mean `divprune`?")),
    "option": ({"methods": ["divprune:blok=2"]}, ("blok", "did you mean `block`?")),
    "both": ({"prune": (0.5,), "keep": (4,)}, ("--prune and --keep", "one of them")),
    "keep 0": ({"keep": (0,)}, ("--keep 0", "choose 1 to 15")),
    "keep all": ({"keep": (16,)}, ("--keep 16: `llava` makes 16", "choose 1 to 15")),
    "prune 0": ({"prune": (0.0,)}, ("--prune 0 ", "0 < R < 1")),
    "prune 1": ({"prune": (0.5, 1.0)}, ("--prune 1 ", "0 < R < 1")),
    "twice": ({"prune": (0.5, 0.51)}, ("0.5,0.51 keeps 8, 8", "once")),
}


@pytest.mark.parametrize("name", BAD)
def test_design_refuses(name: str, tiny: Callable[[str], Loaded]) -> None:
    given, (message, hint) = BAD[name]
    with pytest.raises(PassError) as error:
        design(describe(tiny("llava").model), **given)
    assert message in str(error.value) and hint in (error.value.hint or "")


def test_a_pruned_model_is_refused(tiny: Callable[[str], Loaded]) -> None:
    loaded = tiny("llava")
    make([Cell("uniform", (5,)).step()]).apply(loaded.model, None)
    with pytest.raises(PassError, match="already keeps tokens by `uniform`"):
        design_of(loaded)


def test_too_long_for_the_model(trimmed: Callable[[str], tuple[Loaded, list[Question]]]) -> None:
    loaded, questions = trimmed("llava")
    a = describe(loaded.model)
    longest = max(q.prompt.length for q in questions)
    check_room(a, questions, a.language.max_positions - longest)
    with pytest.raises(VlmcutError, match=rf"{longest} columns.*knows {a.language.max_positions}"):
        check_room(a, questions, a.language.max_positions - longest + 1)


def test_times_of_graphs(trimmed: Callable[[str], tuple[Loaded, list[Question]]]) -> None:
    loaded, _ = trimmed("llava")
    plan = design_of(loaded, ["mmtok"], keep=(4,))
    plan = replace(plan, cells=plan.cells[1:])  # an export takes seconds
    said: list[str] = []
    found = times(loaded.model, plan, text_tokens=20, new_tokens=4, runs=3, threads=1, progress=said.append)
    assert found.keys() == {None, *plan.cells}
    assert said[-1] == "timing 5 graphs, 3 runs of each in turn"  # vision of 3, and one prefill a budget
    for cell, time in found.items():
        assert time.vision > 0 and time.prefill > 0
        assert time.first_token == time.vision + time.prefill
        assert time.quartiles[0] <= time.selection <= time.quartiles[1]
        if cell is None or cell.method == "uniform":
            assert (time.selection, time.noise) == (0.0, True)
        if cell is not None:
            assert time.prefill == found[Cell("uniform", cell.keep)].prefill
    assert describe(loaded.model).method is None


def test_groups_of_a_large_model_hold_their_reference(
    trimmed: Callable[[str], tuple[Loaded, list[Question]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, _ = trimmed("llava")
    monkeypatch.setattr("vlmcut.validation.sweep_times._MEMORY", 0)
    plan = design_of(loaded, ["uniform"], keep=(4,))
    plan = replace(plan, cells=plan.cells[1:])
    said: list[str] = []
    found = times(loaded.model, plan, text_tokens=20, new_tokens=4, runs=1, threads=1, progress=said.append)
    assert found.keys() == {None, *plan.cells}
    assert [text.split()[1] for text in said if text.startswith("timing")] == ["2", "2"]


def made(accuracy: dict[str, tuple[float, ...]], timed: bool = True) -> Sweep:
    """A sweep of one budget with these answers."""
    cells = tuple(Cell(method, KEEP) for method in accuracy if method != "original")
    plan = Design((16,), (KEEP,), cells, (Refused("tome", None, "no tower"), Refused("pool", KEEP, "no grid")))
    found = {c: Score(accuracy[c.method if c else "original"], (0.5,)) for c in (None, *cells)}
    clocks = {c: Time(10.0, 5.0, 0.0 if c is None else 2.5, (-0.1, 0.1) if c is None else (2.0, 3.0)) for c in found}
    return Sweep("folder/model", 100, "folder/heldout", plan, found, clocks if timed else None, 15, 1)


ACCURACY = {
    "original": (1.0,), "random": (0.2, 0.5, 0.8), "uniform": (0.5,), "divprune": (0.51,), "fastervlm": (0.49,),
}  # fmt: skip


def test_table_marks_what_does_not_beat_the_mean_of_random() -> None:
    text = table(made(ACCURACY))
    lines = text.splitlines()
    assert [line.split("|")[2].strip() for line in lines if line.startswith("|")][2:] == [
        "original", "divprune", "random", f"uniform {MARK}", f"fastervlm {MARK}",
    ]  # fmt: skip  # best first; equal to random is not better
    assert "50.0 (20.0 to 80.0)" in text
    assert f"8 tokens: 2 of 3 methods do not beat random, 50.0 % in the mean ({MARK}): uniform, fastervlm" in lines
    assert "does not apply: tome: no tower" in lines and "does not apply at 8 tokens: pool: no grid" in lines
    assert "at most 5.0 points" in text
    assert len({len(line) for line in lines if line.startswith("|")}) == 1  # columns line up


def test_table_shows_times_or_noise() -> None:
    found = made(ACCURACY)
    assert found.times is not None
    found.times[Cell("divprune", KEEP)] = Time(10.0, 5.0, -0.2, (-0.4, 0.1))
    found.times[Cell("fastervlm", KEEP)] = Time(8.0, 5.0, -2.0, (-2.1, -1.9))  # really faster: fewer rows in the tower
    rows = {
        line.split("|")[2].strip().split()[0]: [x.strip() for x in line.split("|")[5:8]]
        for line in table(found).splitlines()
        if line.startswith("|")
    }
    assert rows["divprune"] == ["<noise", "", "15.00"]
    assert rows["fastervlm"] == ["-2.00", "-25", "13.00"]
    assert rows["random"] == ["2.50", "25", "15.00"]
    assert rows["original"] == ["", "", "15.00"]
    assert "TTFT" not in table(made(ACCURACY, timed=False))


def test_json_says_the_same() -> None:
    data = json.loads(json.dumps(to_json(made(ACCURACY))))
    rows = {row["method"]: row for row in data["rows"]}
    assert rows["random"]["accuracy"] == pytest.approx(0.5) and rows["random"]["accuracy_of_seeds"] == [0.2, 0.5, 0.8]
    assert "beats_random" not in rows["random"] and "beats_random" not in rows["original"]
    assert [rows[m]["beats_random"] for m in ("uniform", "divprune", "fastervlm")] == [False, True, False]
    assert rows["divprune"]["ttft_ms"] == 15.0 and rows["divprune"]["selection_quartiles_ms"] == [2.0, 3.0]
    assert data["not_applicable"] == [
        {"method": "tome", "keep": None, "reason": "no tower"}, {"method": "pool", "keep": [8], "reason": "no grid"},
    ]  # fmt: skip
    assert to_json(made(ACCURACY, timed=False))["timing"] is None


points = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12)


@given(points)
def test_pareto_is_what_nothing_beats(found: list[tuple[int, int]]) -> None:
    front = pareto(found)
    for index, (cost, gain) in enumerate(found):
        better = any((c <= cost and g >= gain) and (c, g) != (cost, gain) for c, g in found)
        same = [i for i, point in enumerate(found) if point == (cost, gain)]
        assert (index in front) == (not better and index == same[0])
    assert front == sorted(front, key=lambda i: found[i]) and not any(math.isnan(x) for p in found for x in p)


@pytest.mark.parametrize("timed", [True, False])
def test_picture_names_every_method(timed: bool, tmp_path: Path) -> None:
    found = made(ACCURACY, timed)
    left, right = picture(found).axes
    assert {tick.get_text() for tick in right.get_yticklabels()} == ACCURACY.keys() - {"original"}
    assert left.get_xlabel() == ("time to first token, ms" if timed else "visual tokens kept")
    write(found, tmp_path)
    assert Image.open(tmp_path / "sweep.png").width > 1000
    assert {p.name for p in tmp_path.iterdir()} == {"sweep.json", "sweep.png", "table.md"}


def test_run_needs_questions(tmp_path: Path) -> None:
    with pytest.raises(VlmcutError, match=r"heldout` has no questions\.jsonl"):
        _ = Asked(model=str(tmp_path)).folder
    with pytest.raises(VlmcutError, match="--seeds 0"):
        _ = Asked(model=str(tmp_path), seeds=0).folder


def test_run_whole(asked: Path, tiny: Callable[[str], Loaded], monkeypatch: pytest.MonkeyPatch) -> None:
    a = describe(tiny("llava").model)
    plan = design(a, ["divprune"], keep=(5,))
    request = Asked(model="tiny:llava", quality=asked, questions=4, seeds=2, threads=1)
    timed: list[dict[str, Any]] = []

    def fake(model: Any, given: Design, **options: Any) -> dict[Cell | None, Time]:
        assert given is plan and describe(model).tower.layers == a.tower.feature_layer
        timed.append(options)
        return dict.fromkeys((None, *plan.cells), Time(2.0, 1.0, 0.5, (0.4, 0.6)))

    monkeypatch.setattr(sweep, "times", fake)
    found = run(request, plan, runs=2)
    assert found.questions == 4 and found.origin == str(asked)
    assert len(found.scores[Cell("random", (5,))].accuracy) == 2
    assert (timed[0]["runs"], timed[0]["threads"]) == (2, 1)
    questions = quality.read_set(tiny("llava"), asked, 4)
    assert timed[0]["text_tokens"] == max(q.prompt.length - 16 for q in questions)
    assert run(replace(request, timing=False), plan).times is None and len(timed) == 1


def test_more_budgets_than_colours() -> None:
    keeps = tuple((count,) for count in range(1, 9))
    cells = tuple(Cell(method, keep) for keep in keeps for method in BASELINES)
    found = {cell: Score((0.5,), (0.5,)) for cell in (None, *cells)}
    drawn = picture(Sweep("m", 10, "q", Design((16,), keeps, cells, ()), found, None, 15, 1))
    assert len(drawn.axes) == 2
