"""What a search says of itself: nothing that was skipped is silent, and held-out answers stand beside the search's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import vlmcut
from PIL import Image
from vlmcut.errors import VlmcutError
from vlmcut.passes.recipe import make
from vlmcut.pipeline import Request, save_cut
from vlmcut.surgery.load import describe
from vlmcut.validation.search import Cost, Outcome, Point
from vlmcut.validation.search_axes import Axis, Choice, Level
from vlmcut.validation.search_judge import Confirmed
from vlmcut.validation.search_report import heldout, picture, summary, table, to_json, write
from vlmcut.validation.search_run import Found, Wanted, run
from vlmcut.validation.sweep_plan import Refused

AXES = (
    Axis("heads", (Level("heads -1", {}), Level("heads -2", {}))),
    Axis("tokens by random", (Level("random 8", {}),), "tokens", baseline=True, draws=True),
    Axis("tokens by tome", (Level("tome 8", {}), Level("tome 4", {})), "tokens"),
    Axis("layers", (Level("layers -1", {}),)),
    Axis("late", (Level("late 1", {}),)),
)
HEADS, RANDOM, TOME, BOTH = ((0, 0),), ((1, 0),), ((2, 0),), ((0, 0), (2, 0))
FAILED, PREDICTED = ((3, 0),), ((0, 1), (2, 0))


def cost(ratio: float) -> Cost:
    return Cost(ratio, (ratio,), 10 * ratio)


def made(winner: Choice = BOTH, held: float = 0.99, **wanted: Any) -> Found:
    points = {
        HEADS: Point(HEADS, 1.0, cost(0.9)),
        RANDOM: Point(RANDOM, 0.6, cost(0.62)),
        TOME: Point(TOME, 0.99, cost(0.6)),
        FAILED: Point(FAILED, 0.9),
        BOTH: Point(BOTH, 0.985, cost(0.5), 0.54),
        PREDICTED: Point(PREDICTED, 0.7, None, 0.45),
    }
    outcome = Outcome(
        points, TOME, winner, {TOME: cost(0.6), BOTH: cost(0.5)},
        refused={((0, 0), (3, 0)): "no such pair"}, beyond=(((2, 1),),), dear=(((0, 0), (4, 0)),), left=(((4, 0),),),
    )  # fmt: skip
    return Found(
        wanted=Wanted(**{"model": "folder/model", "minutes": 3.0} | wanted),
        folders=(Path("folder/search"), Path("folder/held")),
        counts=(200, 500),
        text_tokens=20,
        original=0.995,
        axes=AXES,
        refused=(Refused("evs", None, "no clip"),),
        outcome=outcome,
        flops={(): 100, **{choice: 50 for choice in points}},
        recipes={winner: make([]), TOME: make([])},
        held={winner: Confirmed(held * 0.9, 0.9, 0.95), TOME: Confirmed(0.9, 0.9, 0.97)},
        minutes=3.5,
        runs=(21, 61),
    )


def test_winner_beside_the_best_single_cut() -> None:
    text = summary(made())
    assert "**heads -1 + tome 8**: time to first token is 0.833 of that of the best single cut, tome 8." in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert ["winner", "heads -1 + tome 8", "98.5", "99.0", "89.1 (90.0)", "5.00", "0.500"] in rows
    assert ["best single cut", "tome 8", "99.0", "100.0", "90.0 (90.0)", "6.00", "0.600"] in rows
    assert "which answers 99.5 % of the search's 200 questions right (`folder/search`); 98 % of that" in text
    assert text.splitlines()[2] == (  # right below the winner
        "Held out, the winner keeps 99.0 %, and 98 % were asked for (500 questions of `folder/held`, asked once, at "
        "the end)."
    )


def test_held_out_below_the_constraint_is_said_with_what_to_do() -> None:
    found = made(held=0.97)
    said = summary(found).splitlines()[2]
    assert said.startswith(
        "**Held out, the winner keeps 97.0 %, less than the 98 % that were asked for** (500 questions"
    )
    assert "the cheapest of 3 recipes that passed on the search's 200 questions" in said  # heads, tome, both
    assert "`single.toml`, which keeps 100.0 % held out" in said and "`--min-quality`" in said
    assert "`single.toml`" not in heldout(made(winner=TOME, held=0.97))  # it is the winner
    holds = [to_json(one)[name]["heldout"]["holds"] for one in (found, made()) for name in ("winner", "single")]
    assert holds == [False, True, True, True]


def test_held_out_questions_that_the_original_cannot_answer_say_nothing() -> None:
    found = made()
    assert "**Held out, nothing can be said**" in heldout(
        replace(found, held=found.held | {BOTH: Confirmed(0.0, 0.0, 1.0)})
    )


def test_no_combination_is_said() -> None:
    text = summary(made(winner=TOME))
    assert text.startswith("No combination beats the best single cut: **tome 8**.")
    assert to_json(made(winner=TOME))["winner_of_single"] == 1
    alone = made(winner=TOME)
    points = {choice: point for choice, point in alone.outcome.points.items() if len(choice) == 1}
    alone = replace(alone, outcome=replace(alone.outcome, points=points))
    assert summary(alone).startswith("No combination was asked. The best single cut: **tome 8**.")


def test_nothing_is_hidden() -> None:
    text = summary(made())
    assert "**The 3 minutes were over**" in text
    assert "1 recipes were not asked, nor what would have grown from them: late 1. Give more --minutes" in text
    assert "1 recipes were not asked because a part of them failed: tome 4." in text
    assert "not predicted to cost less than what they grew from: heads -1 + late 1." in text
    assert "1 recipes do not apply, heads -1 + layers -1: no such pair." in text
    assert "does not apply: evs: no clip" in text
    many = made()
    many = replace(many, outcome=replace(many.outcome, left=(((4, 0),),) * 20))
    assert "and 8 more, all in search.json" in summary(many)
    assert "were over" not in summary(replace(many, outcome=replace(many.outcome, left=())))


def test_each_axis_alone_with_its_largest_cut_that_keeps_the_answers() -> None:
    rows = [line for line in summary(made()).splitlines() if line.startswith("|")]
    by_axis = {line.split("|")[1].strip(): line.split("|")[2].strip() for line in rows}
    assert by_axis["heads"] == "heads -1" and by_axis["tokens by tome"] == "tome 8"
    assert by_axis["layers"] == "none (layers -1 keeps 90.0)" and by_axis["late"] == "none was asked"
    assert by_axis["tokens by random"] == "none (random 8 keeps 60.0)"


def test_table_and_json_have_every_recipe() -> None:
    found = made()
    lines = table(found).split("## All recipes")[1].splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")][2:]
    assert [(c[0], c[-1]) for c in cells] == [
        ("heads -2 + tome 8", "predicted"), ("heads -1 + tome 8", "measured"), ("tome 8", "measured"),
        ("random 8", "measured"), ("heads -1", "measured"), ("layers -1", ""),
    ]  # fmt: skip
    data = json.loads(json.dumps(to_json(found)))
    assert [p["recipe"] for p in data["points"]] == [
        "heads -1", "random 8", "tome 8", "layers -1", "heads -1 + tome 8", "heads -2 + tome 8",
    ]  # fmt: skip
    assert [p["baseline"] for p in data["points"]] == [False, True, False, False, False, False]
    assert data["points"][-1]["ratio"] is None and data["points"][-1]["predicted_ratio"] == 0.45
    assert data["winner"]["heldout"] == {
        "quality": pytest.approx(0.99), "accuracy": pytest.approx(0.891), "original": 0.9, "agreement": 0.95,
        "holds": True,
    }  # fmt: skip
    assert data["not_tried"]["time_was_over"] == ["late 1"] and data["not_tried"]["methods"] == {"evs": "no clip"}


@pytest.mark.parametrize("objective", ["ttft", "size"])
def test_picture_marks_what_is_what(objective: str, tmp_path: Path) -> None:
    found = made(objective=objective)
    drawn = picture(found)
    assert {text.get_text() for text in drawn.legends[0].get_texts()} == {
        "one cut", "combination", "combination, cost predicted", "random, a baseline", "original", "--min-quality",
        "winner: heads -1 + tome 8", "best single cut: tome 8",
    }  # fmt: skip
    left, right = drawn.axes
    assert left.get_ylim()[0] < 60 < right.get_ylim()[0] < 98 < 100 < right.get_ylim()[1]
    write(found, tmp_path)
    assert Image.open(tmp_path / "search.png").width > 1000
    assert ("Times are medians" in (tmp_path / "table.md").read_text()) == (objective == "ttft")


def test_nothing_right_on_held_out_questions_is_no_number() -> None:
    assert Confirmed(0.0, 0.0, 1.0).quality != Confirmed(0.0, 0.0, 1.0).quality  # not a number


@pytest.mark.parametrize(("name", "value"), [("width", 0), ("questions", 0), ("seeds", 0), ("threads", -1)])
def test_numbers_that_are_too_small(name: str, value: int) -> None:
    flag = {"width": "beam"}.get(name, name)
    with pytest.raises(VlmcutError, match=f"--{flag} {value} is too small"):
        Wanted(**{"model": "m", name: value}).check()


def test_a_cut_model_is_not_searched(tmp_path: Path) -> None:
    save_cut(Request(model="tiny:llava", drop_layers={"language": 1}), tmp_path / "cut")
    for name in ("search", "held"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "questions.jsonl").touch()
    loaded = vlmcut.load(tmp_path / "cut")
    wanted = Wanted(model=str(tmp_path / "cut"), quality=tmp_path / "search", confirm=tmp_path / "held")
    with pytest.raises(VlmcutError, match="is a cut model already"):
        run(wanted, describe(loaded.model))
