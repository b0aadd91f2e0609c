"""`sweep --search`: what it prints and writes, that its recipe converts, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vlmcut
from PIL import Image
from vlmcut.passes import recipe as recipes
from vlmcut.surgery.load import describe
from vlmcut.validation import quality, search_report, search_run

Refuses = Callable[..., Any]
Run = Callable[..., Any]
FAST = (
    "--methods",
    "fastervlm",
    "--keep",
    "8",
    "--seeds",
    "1",
    "--beam",
    "1",
    "--objective",
    "flops",
    "--min-quality",
    "0.75",
)


NEW = 1  # token of an answer: random weights say another text after any cut


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens of an answer."""
    for function in (quality.eager_answers, quality.say):
        monkeypatch.setattr(function, "__defaults__", (NEW,))


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`search` and `held`: two pictures each with two questions, answered as tiny:llava answers; `same` is `search`."""
    place = tmp_path_factory.mktemp("sets")
    rng = np.random.default_rng(5)
    loaded = vlmcut.load("tiny:llava")
    for name in ("search", "held"):
        (place / name).mkdir()
        lines = []
        for number in range(2):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / name / f"{number}.png")
            lines += [{"image": f"{number}.png", "question": q, "answer": "?"} for q in ("Is it?", "What is left?")]
        _write(place / name, lines)
        said = quality.eager_answers(loaded, quality.read_set(loaded, place / name), NEW)
        _write(place / name, [line | {"answer": answer} for line, answer in zip(lines, said, strict=True)])
    return place


def _write(folder: Path, lines: list[dict[str, str]]) -> None:
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))


def test_search_writes_prints_and_its_recipe_converts(run: Run, sets: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(
        "sweep", "tiny:llava", "--search", "-o", out, "--quality", sets / "search", "--confirm", sets / "held",
        "--calibration", sets / "search", *FAST,
    )  # fmt: skip
    assert result.code == 0, result
    assert {p.name for p in out.iterdir()} == {"recipe.toml", "single.toml", "search.json", "search.png", "table.md"}
    written = (out / "table.md").read_text()
    said, command = result.out.strip().removesuffix(str(out)).strip().rsplit("\n", 1)
    assert said.strip() in written and "Held out, the winner keeps " in said
    assert command == f"Convert it: vlmcut convert tiny:llava --recipe {out / 'recipe.toml'} -o BUNDLE"
    data = json.loads((out / "search.json").read_text())
    winner, single = data["winner"], data["single"]
    assert winner["quality"] >= 0.75 and winner["ratio"] <= single["ratio"] < 1
    assert winner["recipe"] in written and single["recipe"] in written and "held out" in written
    assert {"random 8", "uniform 8", "fastervlm 8"} <= {p["recipe"] for p in data["points"]}
    assert [p["recipe"] for p in data["points"] if p["baseline"]] == ["random 8", "uniform 8"]
    # The recipe is whole: applied without data it is what was judged.
    loaded, recipe = vlmcut.load("tiny:llava"), recipes.read(out / "recipe.toml")
    assert recipe.tables() == winner["passes"] and not recipe.needs_calibration
    recipe.apply(loaded.model, None)
    held = quality.read_set(loaded, sets / "held")
    assert quality.accuracy(quality.eager_answers(loaded, held), held) == winner["heldout"]["accuracy"]
    plan = json.loads(
        run(
            "inspect", "tiny:llava", "--recipe", out / "recipe.toml", "--text-tokens", data["text_tokens"], "--json"
        ).out
    )  # fmt: skip
    assert plan["after"]["anatomy"] == describe(loaded.model).to_json()
    work = [sum(part["flops"] for part in plan[when]["costs"]) for when in ("before", "after")]
    assert winner["ratio"] == work[1] / work[0]  # what is planned is what was searched for


def test_with_json_stderr_says_whether_the_winner_holds(
    run: Run, sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stdout is for the machine; who reads the terminal sees it all the same."""
    monkeypatch.setattr(search_run, "run", lambda *_: "found")
    for name, value in (("write", None), ("to_json", {"winner": 1}), ("summary", "long"), ("heldout", "It holds.")):
        monkeypatch.setattr(search_report, name, lambda *_, value=value: value)
    result = run("sweep", "tiny:llava", "--search", "-o", tmp_path / "out", "--quality", sets / "search", "--confirm",
                 sets / "held", "--json")  # fmt: skip
    assert json.loads(result.out) == {"winner": 1} and result.err == "… It holds.\n"


BAD = {
    "--min-quality 1.5": ("--min-quality 1.5", "0 < Q <= 1"),
    "--min-quality 0": ("--min-quality 0 ", "0 < Q <= 1"),
    "--min-quality nan": ("--min-quality nan", "0 < Q <= 1"),
    "--objective ttf": ("no objective `ttf`", "did you mean `ttft`?"),
    "--minutes 0": ("--minutes 0 leaves no time", "more than 0"),
    "--quality nowhere": ("nowhere", "no questions.jsonl", "--quality"),
    "--confirm nowhere": ("nowhere", "no questions.jsonl", "--confirm"),
    "--methods fastervl": ("no method `fastervl`", "did you mean `fastervlm`?"),
    "--keep 16": ("--keep 16", "choose 1 to 15"),
}


@pytest.mark.parametrize("flags", BAD)
def test_search_refuses(flags: str, refuses: Refuses, sets: Path) -> None:
    name, value = flags.split()
    given = {"--quality": sets / "search", "--confirm": sets / "held"} | {name: value}
    result = refuses("sweep", "tiny:llava", "--search", "-o", "out", *(x for pair in given.items() for x in pair),
                     says=BAD[flags])  # fmt: skip
    assert "loading" not in result.err  # no work was done


def test_search_without_questions(refuses: Refuses) -> None:
    refuses("sweep", "tiny:llava", "--search", "-o", "out", says=("tiny:llava/calibration", "--quality"))


def test_search_refuses_to_confirm_on_what_it_saw(refuses: Refuses, sets: Path) -> None:
    refuses("sweep", "tiny:llava", "--search", "-o", "out", "--quality", sets / "search", "--confirm", sets / "search",
            says=("2 of 2 pictures", "--confirm"))  # fmt: skip


def test_nothing_is_good_enough(refuses: Refuses, sets: Path, tmp_path: Path) -> None:
    """Nothing is left behind, and the best that was reached is said."""
    refuses("sweep", "tiny:llava", "--search", "-o", "out", "--quality", sets / "search", "--confirm", sets / "held",
            "--methods", "uniform", "--keep", "1", "--seeds", "1", "--minutes", "1e-9",
            says=("nothing was asked: the time was over (1e-09 minutes)", "4 questions", "--minutes"))  # fmt: skip


@pytest.mark.parametrize("flags", ["--min-quality 0.9", "--objective size", "--minutes 3", "--beam 2", "--confirm a",
                                   "--calibration a"])  # fmt: skip
def test_flags_of_the_search_need_it(flags: str, refuses: Refuses, sets: Path) -> None:
    refuses("sweep", "tiny:llava", "-o", "out", "--quality", sets / "search", *flags.split(), code=2,
            says=(flags.split()[0], "--search"))  # fmt: skip


@pytest.mark.parametrize("flags", ["--no-timing", "--beam 0", "--min-quality x"])
def test_search_usage(flags: str, refuses: Refuses, sets: Path) -> None:
    refuses("sweep", "tiny:llava", "--search", "-o", "out", *flags.split(), code=2, says=(flags.split()[0],))
