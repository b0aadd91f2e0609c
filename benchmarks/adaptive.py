"""What `run --adaptive` gains at which threshold: accuracy against the share of questions that need the larger budget.

    python benchmarks/adaptive.py --write

Converts the trained examples with two budgets each, asks both budgets every question once, and decides afterwards.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path

import vlmcut
from vlmcut.passes.calibration import read_questions
from vlmcut.prompt import open_image
from vlmcut.runtime.adaptive import CONFIDENCE, answer
from vlmcut.runtime.bundle import Bundle

ROOT = Path(__file__).resolve().parents[1]
THRESHOLDS = (0.5, 0.8, 0.9, 0.95, 0.99, 0.999)
RUNS = (
    ("scenes", "fastervlm", (14, 144)),
    ("scenes", "fastervlm", (6, 144)),
    ("scenes", "uniform", (36, 144)),
    ("scenes-smol", "divprune", (6, 64)),
    ("scenes-smol", "fastervlm", (16, 64)),
)
PAGE = ROOT / "docs" / "adaptive.md"


@dataclass(frozen=True)
class Said:
    """One answer: how sure, and whether it was right."""

    sure: float
    right: bool


def ask(bundle: Path, keep: int, example: Path, count: int) -> list[Said]:
    """Every budget's own answers, sure or not, to the same questions."""
    lines = random.Random(0).sample(read_questions(example / "heldout"), count)
    opened = Bundle(bundle, keep=keep, threads=1)
    found = []
    for line in lines:
        prompt = opened.prompt([open_image(example / "heldout" / line["image"])], line["question"])
        ids, sure = answer(opened, prompt, 0.0, 48)
        text = opened.prompter.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
        found.append(Said(sure, text == line["answer"]))
    return found


def row(small: list[Said], large: list[Said], threshold: float) -> str:
    """Percent right, and percent of the questions asked again."""
    again = [s.sure < threshold for s in small]
    right = [(one.right if not more else other.right) for one, other, more in zip(small, large, again, strict=True)]
    return f"{100 * sum(right) / len(right):.1f} / {100 * sum(again) / len(again):.1f}"


def table(count: int) -> str:
    """The markdown table of all runs."""
    head = ["bundle", "small alone", *(str(t) for t in THRESHOLDS), "large alone"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, method, (few, many) in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "bundle"
            example = ROOT / "examples" / name
            vlmcut.convert(str(example), out, keep=(few, many), method=method, questions=0)
            small, large = ask(out, few, example, count), ask(out, many, example, count)
        alone = [f"{100 * sum(s.right for s in said) / len(said):.1f}" for said in (small, large)]
        cells = [row(small, large, threshold) for threshold in THRESHOLDS]
        lines.append("| " + " | ".join([f"{name}, {method}, {few} and {many}", alone[0], *cells, alone[1]]) + " |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    """Print the table, or put it into the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    made = table(options.questions)
    if options.write:
        PAGE.write_text(
            f"""# Answering adaptively

    vlmcut convert examples/scenes --keep 14,144 -o out
    vlmcut run out --adaptive --image examples/scenes/images/0000.png --prompt "Where is the 9?"

The smallest budget answers first. Where it was not sure, the next larger one answers again, up to the largest, which
always answers. How sure an answer is: the smallest probability of one of its greedy tokens, the ending one included.
`--confidence` sets the threshold, {CONFIDENCE} if it is not given. Which budget answered goes to stderr.

VisionThink (arXiv:2507.13348) and AdaptVision train a model to ask for more; this is a rule on any bundle with several
budgets, and it is overconfident: a model that misses a token does not know that it did. It is no substitute for a
trained policy, nor for a budget that is large enough.

{options.questions} held-out questions, float32, percent right / percent asked again at each threshold
(`python benchmarks/adaptive.py --write`):

{made}

A question that is asked again pays for both budgets; nothing of the smaller one is reused.
"""
        )


if __name__ == "__main__":
    main()
