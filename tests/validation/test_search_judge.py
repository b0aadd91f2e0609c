"""Recipes judged on a tiny model: what is remembered is what each alone would give, and graphs are shared by shape."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vlmcut
from PIL import Image
from vlmcut.errors import PassError, VlmcutError
from vlmcut.passes.calibration import Calibration, read_calibration
from vlmcut.passes.drop_heads import DropHeads
from vlmcut.passes.recipe import PASSES, parse
from vlmcut.passes.skip_visual import WHATS, SkipVisual
from vlmcut.surgery.anatomy import Anatomy
from vlmcut.surgery.costs import costs
from vlmcut.surgery.load import Loaded, describe, state_dict
from vlmcut.surgery.talk import see_all
from vlmcut.validation import quality, search_judge
from vlmcut.validation.quality import Question
from vlmcut.validation.search_axes import METHODS, NO_AXIS, Axis, Choice, axes, recipe, text
from vlmcut.validation.search_judge import Confirmed, ModelJudge
from vlmcut.validation.sweep_plan import BASELINES

ASKED = ("Is it red?", "What is left of the blue one?")
NEW = 5  # tokens of an answer: random weights never stop


def write_set(folder: Path, seed: int = 3) -> Path:
    """Three pictures of noise with two questions each, answered as tiny:llava answers."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    lines = []
    for number in range(3):
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        lines += [{"image": f"{number}.png", "question": asked, "answer": "?"} for asked in ASKED]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    loaded = vlmcut.load("tiny:llava")
    said = quality.eager_answers(loaded, quality.read_set(loaded, folder), NEW)
    lines = [line | {"answer": answer} for line, answer in zip(lines, said, strict=True)]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("asked") / "set")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens of an answer."""
    for function in (quality.eager_answers, quality.say):
        monkeypatch.setattr(function, "__defaults__", (NEW,))


@pytest.fixture
def loaded(tiny: Callable[[str], Loaded]) -> Loaded:
    return tiny("llava")


@pytest.fixture
def questions(loaded: Loaded, asked: Path) -> list[Question]:
    return quality.read_set(loaded, asked)


@pytest.fixture
def calibration(loaded: Loaded, asked: Path) -> Calibration:
    return read_calibration(loaded, asked, 2)


def every(loaded: Loaded, **options: Any) -> tuple[Axis, ...]:
    return axes(describe(loaded.model), **({"methods": ("fastervlm", "tome"), "keep": (8, 4)} | options))[0]


def of(found: Sequence[Axis], *words: str) -> Choice:
    """A choice by the words of its levels."""
    places = {level.text: (a, i) for a, axis in enumerate(found) for i, level in enumerate(axis.levels)}
    return tuple(sorted(places[word] for word in words))


COMBINED = ("vision heads -50 %", "vision neurons -25 %", "fastervlm 8", "language neurons -25 %", "language int8")


def make_judge(
    loaded: Loaded, questions: list[Question], calibration: Calibration, objective: str = "flops", **options: Any
) -> ModelJudge:
    found = every(loaded)
    return ModelJudge(loaded, found, questions, calibration, objective, text_tokens=20, **options)


@pytest.mark.parametrize("kind", ["llava", "llava-siglip-qwen2", "qwen3_vl", "llava_next"])
def test_every_axis_is_in_order_and_mild_first(kind: str, tiny: Callable[[str], Loaded]) -> None:
    a = describe(tiny(kind).model)
    found, refused = axes(a)
    assert {x.name.removeprefix("tokens by ") for x in found if x.slot == "tokens"} | {r.method for r in refused} == {
        *METHODS, *BASELINES,
    }  # fmt: skip
    assert [x.name for x in found if x.baseline] == ["tokens by random", "tokens by uniform"]
    assert [x.name for x in found if x.draws] == ["tokens by random"]
    for axis in found:
        flops = [
            sum(c.flops for c in costs(recipe([axis], ((0, level),)).plan(a)))
            for level in range(len(axis.levels))
            if _plans(axis, level, a)
        ]
        assert flops == sorted(flops, reverse=True) and len(set(flops)) == len(flops), axis.name
        # No level that every model refuses: what is left out for that is said by a plan, as of Qwen3-VL's tower layers.
        assert flops or not axis.levels or (kind, axis.name) == ("qwen3_vl", "vision layers")
    words = [level.text for axis in found for level in axis.levels]
    assert len(set(words)) == len(words)
    assert {"vision layers -1", "vision neurons -50 %", "language neurons -12.5 %"} <= set(words)
    assert not any("-100 %" in word for word in words)


def test_every_pass_has_an_axis_or_a_reason(tiny: Callable[[str], Loaded]) -> None:
    """A pass of which neither is said would silently be left out of every search."""
    a = describe(tiny("llava").model)
    tables = [level.table for axis in axes(a)[0] for level in axis.levels]
    searched = {t["name"] for t in tables if t["name"] != SkipVisual.name}
    searched |= {f"{t['name']} {t['what']}" for t in tables if t["name"] == SkipVisual.name}
    every_pass = PASSES.keys() - {SkipVisual.name} | {f"{SkipVisual.name} {what}" for what in WHATS}
    assert searched | NO_AXIS.keys() == every_pass and not searched & NO_AXIS.keys()
    page = (Path(__file__).parents[2] / "docs" / "search.md").read_text()
    for name, reason in NO_AXIS.items():
        assert f"| `{name}` | {reason} |" in page


def _plans(axis: Axis, level: int, a: Anatomy) -> bool:
    try:
        recipe([axis], ((0, level),)).plan(a)
    except PassError:
        return False
    return True


def test_the_original_has_words(loaded: Loaded) -> None:
    assert text(every(loaded), ()) == "original"
    assert text(every(loaded), of(every(loaded), "tome 4", "language int8")) == "tome 4 + language int8"


def test_a_wrong_method_or_budget_is_refused_before_anything(loaded: Loaded) -> None:
    with pytest.raises(PassError, match="no method `fastervl`"):
        every(loaded, methods=("fastervl",))
    with pytest.raises(PassError, match="--keep 16"):
        every(loaded, keep=(16,))


def test_remembered_cuts_are_the_recipe_applied_alone(
    loaded: Loaded, questions: list[Question], calibration: Calibration
) -> None:
    judge = make_judge(loaded, questions, calibration)
    choice = of(judge.axes, *COMBINED)
    first = [judge.cut(choice[:count])[1] for count in range(len(choice) + 1)]  # fills the memory
    model, done = judge.cut(choice)
    alone = copy.deepcopy(loaded.model)
    assert done == first[-1] == recipe(judge.axes, choice).apply(alone, calibration)
    weights = state_dict(alone)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in state_dict(model).items())
    assert describe(loaded.model) == judge.original  # the original is as before
    # And without data, from the file that is written.
    again = copy.deepcopy(loaded.model)
    parse(done.to_toml()).apply(again, None)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in state_dict(again).items())


def test_each_pass_is_measured_once_for_what_came_before(
    loaded: Loaded, questions: list[Question], calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Any] = []
    resolve = DropHeads.resolve

    def count(self: DropHeads, *args: Any) -> DropHeads:
        if self.keep is None:
            measured.append(self)
        return resolve(self, *args)

    monkeypatch.setattr(DropHeads, "resolve", count)
    judge = make_judge(loaded, questions, calibration)
    heads = of(judge.axes, "vision heads -50 %")
    for more in ((), of(judge.axes, "language int8"), of(judge.axes, "vision neurons -25 %")):
        judge.cut(tuple(sorted((*heads, *more))))
    assert len(measured) == 1
    judge.cut(tuple(sorted((*heads, *of(judge.axes, "vision layers -1")))))  # another tower: measured anew
    assert len(measured) == 2


@pytest.mark.parametrize("words", [(), ("tome 8",), COMBINED, ("language heads -33.3 %",), ("vision int8",)])
def test_quality_is_that_of_the_slow_road(
    words: tuple[str, ...], loaded: Loaded, questions: list[Question], calibration: Calibration
) -> None:
    judge = make_judge(loaded, questions, calibration)
    choice = of(judge.axes, *words)
    judge.quality(of(judge.axes, "fastervlm 8"))
    found = [judge.quality(choice) for _ in range(2)]  # the second from remembered looks
    model, _ = judge.cut(choice)
    cut = replace(loaded, model=model)
    said = quality.say(cut, [see_all(model, question.prompt) for question in questions])
    assert judge.right == len(questions) and found[0] == found[1] == quality.accuracy(said, questions)


def test_looks_are_shared_by_cuts_of_the_language_model_alone(
    loaded: Loaded, questions: list[Question], calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = make_judge(loaded, questions, calibration)
    looked: list[Any] = []
    looks = quality.looks
    monkeypatch.setattr(quality, "looks", lambda *args: (looked.append(1), looks(*args))[1])
    for words, count in (
        (("language neurons -25 %",), 0), (("language heads -33.3 %", "language int8"), 0), (("vision int8",), 1),
        (("vision int8", "language layers -1"), 1), (("fastervlm 8",), 2), (("vision heads -50 %",), 3),
    ):  # fmt: skip
        judge.quality(of(judge.axes, *words))
        assert len(looked) == count, words
    monkeypatch.setattr(search_judge, "_LOOKS", 4)
    judge.quality(of(judge.axes, "fastervlm 4"))
    assert len(judge._looked) == 4  # no more are held


def test_a_method_that_draws_is_the_mean_of_its_seeds(
    loaded: Loaded, questions: list[Question], calibration: Calibration
) -> None:
    judge = make_judge(loaded, questions, calibration, seeds=3)
    choice = of(judge.axes, "random 8")
    each = [sum(judge._right(choice, questions, seed)) / judge.right for seed in range(3)]
    assert judge.quality(choice) == pytest.approx(sum(each) / 3)
    kept = [judge.cut(choice, seed)[1].tables()[-1]["seed"] for seed in range(3)]
    assert kept == [0, 1, 2]


def test_work_and_bytes_are_counted(loaded: Loaded, questions: list[Question], calibration: Calibration) -> None:
    flops = make_judge(loaded, questions, calibration)
    size = make_judge(loaded, questions, calibration, "size")
    choice = of(flops.axes, *COMBINED)
    model = flops.cut(choice)[0]
    work = [sum(c.flops for c in costs(a, text_tokens=20)) for a in (describe(model), describe(loaded.model))]
    (cost,) = flops.costs([choice])
    assert (cost.value, cost.ratio, cost.parts) == (work[0], work[0] / work[1], (cost.ratio,))
    assert flops.flops(()) == work[1] and flops.whole == (1.0,)
    trimmed = size.cut(())[0]
    (cost,) = size.costs([choice])
    held = [sum(t.nbytes for t in state_dict(m).values()) for m in (model, trimmed)]
    assert (cost.value, cost.ratio) == (held[0], held[0] / held[1])


def test_graphs_are_exported_once_for_their_shapes(
    loaded: Loaded, questions: list[Question], calibration: Calibration
) -> None:
    said: list[str] = []
    judge = make_judge(loaded, questions, calibration, "ttft", runs=(3, 4), threads=1, progress=said.append)
    words = (("fastervlm 8",), ("uniform 8",), ("language neurons -25 %",), ("fastervlm 8", "language neurons -25 %"))
    found = judge.costs([of(judge.axes, *word) for word in words])
    # Vision: original, fastervlm, uniform. Prefill: original, 8 tokens, cut, cut with 8 tokens.
    assert [text.split(",")[0] for text in said].count("exporting vision") == 3
    assert [text.split(",")[0] for text in said].count("exporting prefill") == 4
    assert said[-1] == "timing 7 graphs, 3 runs of each in turn"
    for cost in found:
        assert cost.ratio == pytest.approx(sum(cost.parts)) and len(cost.parts) == 2 and cost.value > 0
    assert min(judge.whole) > 0 and sum(judge.whole) == pytest.approx(1)
    assert found[2].parts[0] == judge.whole[0]  # the tower is the original's: noise cannot say otherwise
    assert len(judge.costs([of(judge.axes, "uniform 8")], final=True)) == 1
    assert said[-1] == "timing 4 graphs, 4 runs of each in turn"
    assert sum(text.startswith("exporting") for text in said) == 7


def test_what_a_plan_refuses_is_said(loaded: Loaded, questions: list[Question], calibration: Calibration) -> None:
    judge = make_judge(loaded, questions, calibration)
    assert judge.refusal(of(judge.axes, *COMBINED)) is None
    reason = judge.refusal(of(judge.axes, "tome 8", "vision int8"))
    assert reason is not None and "tokens leave inside the tower" in reason and "quantize parts" in reason


def test_confirmed_on_other_questions(
    loaded: Loaded, questions: list[Question], calibration: Calibration, tmp_path: Path
) -> None:
    judge = make_judge(loaded, questions, calibration)
    held = quality.read_set(loaded, write_set(tmp_path / "held", seed=9))
    choice = of(judge.axes, "language neurons -50 %")
    found = judge.confirm([choice, ()], held)
    assert found[()] == Confirmed(1.0, 1.0, 1.0)
    said = quality.eager_answers(replace(loaded, model=judge.cut(choice)[0]), held)
    right = quality.accuracy(said, held)
    assert found[choice] == Confirmed(right, 1.0, right) and found[choice].quality == right


def test_an_original_that_is_never_right(loaded: Loaded, questions: list[Question], calibration: Calibration) -> None:
    wrong = [replace(question, answer="no such answer") for question in questions]
    with pytest.raises(VlmcutError, match="answers none of 6 questions right"):
        make_judge(loaded, wrong, calibration)


def test_pictures_are_looked_at_once(loaded: Loaded, questions: list[Question]) -> None:
    """And what is remembered is what `see_all` sees, bit by bit."""
    for (prompt, seen), question in zip(quality.looks(loaded.model, questions), questions, strict=True):
        want, wanted = see_all(loaded.model, question.prompt)
        np.testing.assert_array_equal(prompt.input_ids, want.input_ids)
        assert torch.equal(seen[0].features, wanted[0].features)
    assert len({id(seen[0]) for _, seen in quality.looks(loaded.model, questions)}) == 3
