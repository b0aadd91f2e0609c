"""The smallest budget answers unless it is unsure; what is said is what that budget alone would say."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import typer
import vlmcut
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from vlmcut import cli
from vlmcut.errors import BundleError
from vlmcut.runtime.adaptive import Adaptive, Answer, account, answer, probability

SMALL, LARGE = 5, 16  # budgets of `bundle_int8`
QUESTION = "What is in the picture?"


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 30, 3), dtype=np.uint8))


# --- how sure ---


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=9))
def test_probability_is_softmax_of_the_largest(logits: list[float]) -> None:
    want = max(math.exp(x) for x in logits) / sum(math.exp(x) for x in logits)
    # float64, a sum of 9; measured 4e-16 of values up to 1. The logits go in as float64 here.
    assert probability(np.array(logits)) == pytest.approx(want, rel=1e-14)


@pytest.mark.parametrize(
    ("logits", "want"), [([0, 0, 0, 0], 0.25), ([1e4, 0], 1.0), ([-1e4, -1e4], 0.5), ([3e38, -3e38], 1.0), ([7], 1.0)]
)
def test_probability_of_extremes(logits: list[float], want: float) -> None:
    assert probability(np.array(logits, dtype=np.float32)) == want


def test_confidence_is_the_least_sure_step(bundle_int8: Path) -> None:
    """Stepped through by hand, softmax in long double; the token that ends an answer counts."""
    model = vlmcut.Bundle(bundle_int8, keep=SMALL)
    for seed in range(3):
        whole = model.prompt([picture(seed)], QUESTION)
        shrunk, seen = model.see(whole)
        logits = model.graphs.prefill(shrunk, seen)
        sure, ids = [], []
        for count in range(model.budget.new_tokens):
            powers = np.exp(logits.astype(np.longdouble))
            sure.append(powers.max() / powers.sum())
            token = int(logits.argmax())
            if token in model.stop:
                break
            ids.append(token)
            logits = model.graphs.decode(token, shrunk, count)
        made, least = answer(model, whole)
        assert made == ids == list(model.tokens(whole)) and len(ids) > 1
        assert least == pytest.approx(float(min(sure)), rel=1e-12)
        assert least < 1 / 2  # random weights


# --- which budget ---


def test_zero_never_escalates_and_opens_one_budget(bundle_int8: Path) -> None:
    model = Adaptive(bundle_int8, confidence=0)
    said = model.generate([picture(0)], QUESTION)
    assert said.keep == SMALL and said.tried == ((SMALL, said.confidence),)
    assert said.text == vlmcut.Bundle(bundle_int8, keep=SMALL).generate([picture(0)], QUESTION)
    assert list(model._opened) == [SMALL]


def test_one_always_escalates(bundle_int8: Path) -> None:
    model = Adaptive(bundle_int8, confidence=1)
    said = model.generate([picture(0)], QUESTION)
    assert said.keep == LARGE and [keep for keep, _ in said.tried] == [SMALL, LARGE]
    assert said.text == vlmcut.Bundle(bundle_int8, keep=LARGE).generate([picture(0)], QUESTION)
    # And the two budgets do not say the same of every picture, or nothing above would be tested.
    small, large = ([model.bundle(k).generate([picture(s)], QUESTION) for s in range(6)] for k in (SMALL, LARGE))
    assert small != large


def test_threshold_is_met_when_it_is_reached(bundle_int8: Path) -> None:
    sure = Adaptive(bundle_int8, confidence=0).generate([picture(1)], QUESTION).confidence
    at = Adaptive(bundle_int8, confidence=sure).generate([picture(1)], QUESTION)
    above = Adaptive(bundle_int8, confidence=math.nextafter(sure, 1)).generate([picture(1)], QUESTION)
    assert (at.keep, at.confidence) == (SMALL, sure)
    assert above.keep == LARGE and above.tried[0] == (SMALL, sure)


def test_a_prompt_without_pictures_is_answered_once(bundle_int8: Path) -> None:
    said = Adaptive(bundle_int8, confidence=1).generate([], "two blue circles")
    assert said.keep == SMALL and len(said.tried) == 1


def test_new_tokens_are_limited(bundle_int8: Path) -> None:
    model = Adaptive(bundle_int8, confidence=1)
    assert model.generate([picture(0)], QUESTION, 2).text == model.bundle(LARGE).generate([picture(0)], QUESTION, 2)
    with pytest.raises(BundleError, match="max_new_tokens=21, the budget holds 20"):
        model.generate([picture(0)], QUESTION, 21)


STOP = 3


def stub(said: list[tuple[int, float]]) -> Any:
    """A bundle that says these tokens, each with this probability among four, and counts what it was asked for."""
    asked: list[int] = []

    def steps(prompt: Any, most: int | None) -> Iterator[tuple[int, np.ndarray]]:
        for token, sure in said[:most]:
            asked.append(token)
            logits = np.full(4, math.log((1 - sure) / 3))
            logits[token] = math.log(sure)
            yield token, logits

    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: f" {ids} ")
    return SimpleNamespace(
        prompt=lambda images, text, fit: SimpleNamespace(pictures=images),
        steps=steps,
        stop=frozenset([STOP]),
        asked=asked,
        prompter=SimpleNamespace(processor=SimpleNamespace(tokenizer=tokenizer)),
    )


def stubbed(path: Path, confidence: float, **said: list[tuple[int, float]]) -> tuple[Adaptive, dict[int, Any]]:
    model = Adaptive(path, confidence=confidence)
    model.keeps = [int(name[1:]) for name in said]
    model._opened = {keep: stub(tokens) for keep, tokens in zip(model.keeps, said.values(), strict=True)}
    return model, model._opened


def test_the_first_that_is_sure_answers(bundle_int8: Path) -> None:
    model, opened = stubbed(
        bundle_int8,
        0.7,
        k2=[(0, 0.9), (1, 0.6), (2, 0.9), (STOP, 0.9)],
        k4=[(1, 0.8), (STOP, 0.75)],
        k8=[(2, 0.9), (STOP, 0.9)],
    )
    said = model.generate(["image"], "x")
    assert (said.text, said.keep) == ("[1]", 4)
    assert [(k, round(p, 9)) for k, p in said.tried] == [(2, 0.6), (4, 0.75)]
    assert opened[2].asked == [0, 1]  # it gives up where it becomes unsure
    assert not opened[8].asked


def test_the_largest_answers_however_unsure(bundle_int8: Path) -> None:
    model, opened = stubbed(bundle_int8, 0.9, k2=[(0, 0.8), (STOP, 0.8)], k4=[(1, 0.4), (2, 0.3), (STOP, 0.5)])
    said = model.generate(["image"], "x")
    assert (said.text, said.keep, round(said.confidence, 9)) == ("[1, 2]", 4, 0.3)
    assert opened[4].asked == [1, 2, STOP]


def test_being_unsure_about_the_end_counts(bundle_int8: Path) -> None:
    model, _ = stubbed(bundle_int8, 0.7, k2=[(0, 0.9), (STOP, 0.6)], k4=[(1, 0.9), (STOP, 0.9)])
    assert model.generate(["image"], "x").keep == 4


def test_budgets_are_tried_from_small_to_large(tmp_path: Path, bundle_int8: Path) -> None:
    """Whatever order they were converted in."""
    import json
    import shutil

    turned = shutil.copytree(bundle_int8, tmp_path / "turned")
    manifest = json.loads((turned / "manifest.json").read_text())
    manifest["budgets"].reverse()
    (turned / "manifest.json").write_text(json.dumps(manifest))
    assert Adaptive(turned).keeps == Adaptive(bundle_int8).keeps == [SMALL, LARGE]


# --- refusals, and the command line ---


@pytest.mark.parametrize("confidence", [-0.01, 1.01, math.nan, math.inf])
def test_confidence_must_be_a_probability(confidence: float, bundle_int8: Path) -> None:
    with pytest.raises(BundleError, match=f"confidence={confidence} is not a probability"):
        Adaptive(bundle_int8, confidence=confidence)


def test_one_budget_is_refused_with_the_fix(bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"has 1 budget of 5 tokens per image, .* needs 2 or more") as caught:
        Adaptive(bundle)
    assert caught.value.hint and "--keep 36,144" in caught.value.hint


def test_account_names_budgets_and_probabilities() -> None:
    one = account(Answer("x", 36, 0.987, ((36, 0.987),)), 0.9)
    assert one == "answered with 36 tokens per image, least probability 0.99"
    two = account(Answer("x", 144, 0.95, ((36, 0.41), (144, 0.95))), 0.9)
    assert two == "36 tokens per image: 0.41, below 0.9; answered with 144 tokens per image, least probability 0.95"


@pytest.mark.parametrize(("confidence", "keep"), [("0", SMALL), ("1", LARGE)])
def test_command_prints_the_answer_and_accounts_for_it_apart(
    confidence: str, keep: int, bundle_int8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "i.png"
    picture(0).save(path)
    options = ["-i", str(path), "-p", QUESTION, "--adaptive", "--confidence", confidence]
    cli.app(["run", str(bundle_int8), *options], standalone_mode=False)
    said = capsys.readouterr()
    assert said.out == vlmcut.Bundle(bundle_int8, keep=keep).generate([path], QUESTION) + "\n"
    assert f"answered with {keep} tokens per image" in said.err


@pytest.mark.parametrize(
    ("options", "says"),
    [(["--adaptive", "--keep", "5"], "give no --keep"), (["--confidence", "0.5"], "goes with --adaptive")],
)
def test_command_refuses_flags_that_do_not_go_together(options: list[str], says: str, bundle_int8: Path) -> None:
    with pytest.raises(typer.BadParameter, match=says):
        cli.app(["run", str(bundle_int8), "-p", "x", *options], standalone_mode=False)


def test_needs_no_torch() -> None:
    code = "import sys, vlmcut.runtime.adaptive, vlmcut.runtime.key_clips; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
