"""The README's tables about the example models, on their held-out questions.

    python benchmarks/scenes.py exactness    # bundles against their eager models, 50 questions
    python benchmarks/scenes.py quality      # methods at 75 % removed, 500 questions

`--example scenes-smol` takes the second one, which has no [CLS].

`exactness` converts the example into bundles (kept with --work), asks 50 held-out questions, and compares every
logit and every greedy token with the eager model that has the same cuts. `quality` needs no bundle: exactness says that
a bundle answers as its eager model does.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from vlmcut.passes import folder as cut_folder
from vlmcut.passes import recipe as recipes
from vlmcut.passes.tokens.methods import METHODS
from vlmcut.pipeline import Request, convert
from vlmcut.prompt import Prompt
from vlmcut.runtime.bundle import Bundle
from vlmcut.surgery.load import describe
from vlmcut.surgery.talk import Talk, see_all
from vlmcut.validation import quality

EXAMPLES = Path(__file__).parent.parent / "examples"
BUNDLES: dict[str, dict[str, Any]] = {
    "float32": {},
    "int8": {"quantize": "int8"},
    "float32, standard operators": {"target": "rtx", "defer_build": True},
    "float16, standard operators": {"target": "rtx", "dtype": "float16", "defer_build": True},
}
SEEDS = (0, 1, 2)


def exactness(folder: Path, work: Path, count: int) -> None:
    """Print worst logit error, equal tokens and equal answers of each bundle against its eager model."""
    print("| bundle | worst logit error | greedy tokens equal | questions with equal tokens | near ties |")
    print("|---|---|---|---|---|")
    for name, options in BUNDLES.items():
        out = work / name.replace(", ", "-").replace(" ", "-")
        if not out.exists():
            convert(Request(model=str(folder), prune=0.75, questions=0, **options), out)
        bundle = Bundle(out)
        loaded = cut_folder.load(folder)
        recipes.from_tables(bundle.manifest.recipe).apply(loaded.model, None)
        model = loaded.model.to(getattr(torch, bundle.manifest.dtype))
        questions = quality.read_set(loaded, folder / "heldout")
        sample = random.Random(0).sample(questions, count)
        found = [_compare(model, bundle, q.prompt) for q in sample]
        tokens, equal = sum(f["tokens"] for f in found), sum(f["equal"] for f in found)
        same = sum(f["tokens"] == f["equal"] for f in found)
        ties = [gap for f in found for gap in f["gaps"]]
        shown = ", ".join(f"{gap:.2g}" for gap in ties) or "none"
        worst = max(f["error"] for f in found)
        print(f"| {name} | {worst:.1e} | {equal} of {tokens} | {same} of {len(sample)} | {shown} |", flush=True)


def _compare(model: Any, bundle: Bundle, whole: Prompt) -> dict[str, Any]:
    """Feed both the eager model's tokens; compare logits and what each would say next."""
    prompt, sights = bundle.see(whole)
    logits = bundle.graphs.prefill(prompt, sights)
    shrunk, seen = see_all(model, whole)
    talk = Talk.read(model, [shrunk], [seen])
    stop = bundle.prompter.processor.tokenizer.eos_token_id
    result: dict[str, Any] = {"tokens": 0, "equal": 0, "error": 0.0, "gaps": []}
    for step in range(bundle.budget.new_tokens):
        eager = talk.logits[0].float()
        want, have = int(eager.argmax()), int(logits.argmax())
        result["error"] = max(result["error"], float((torch.from_numpy(logits) - eager).abs().max()))
        result["tokens"] += 1
        result["equal"] += want == have
        if want != have:
            result["gaps"].append(float(eager[want] - eager[have]))
        if want == stop or step + 1 == bundle.budget.new_tokens:
            return result
        talk = talk.say(torch.tensor([want]))
        logits = bundle.graphs.decode(want, prompt, step)
    return result


def table(folder: Path, prune: float, count: int) -> None:
    """Print accuracy of every method at one ratio beside the original; random is the mean and spread over seeds."""
    print("| method | tokens kept | right | agrees with the original |")
    print("|---|---|---|---|")
    original: list[str] = []
    for method in ("original", *METHODS):
        rows = []
        for seed in SEEDS if method == "random" else SEEDS[:1]:
            loaded = cut_folder.load(folder)
            a = describe(loaded.model)
            if method != "original":
                recipes.from_flags(a, prune=prune, method=method, seed=seed).apply(loaded.model, None)
            questions = [q for q in quality.read_set(loaded, folder / "heldout") if q.kind != "description"][:count]
            answers = quality.eager_answers(loaded, questions)
            original = original or answers
            agree = sum(x == y for x, y in zip(answers, original, strict=True)) / len(answers)
            rows.append((max(describe(loaded.model).keep), quality.accuracy(answers, questions), agree))
        right, agrees = ([100 * r[i] for r in rows] for i in (1, 2))
        spread = f" ({min(right):.1f} to {max(right):.1f}, {len(rows)} seeds)" if len(rows) > 1 else ""
        kept, mean = rows[0][0], statistics.mean(right)
        print(f"| {method} | {kept} | {mean:.1f} %{spread} | {statistics.mean(agrees):.1f} % |", flush=True)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("exactness", "quality"))
    parser.add_argument("--work", type=Path, help="folder for the bundles of `exactness`; a temporary one if not given")
    parser.add_argument("--questions", type=int, help="50 for exactness, 500 for quality")
    parser.add_argument("--prune", type=float, default=0.75)
    parser.add_argument("--example", default="scenes", choices=("scenes", "scenes-smol"))
    options = parser.parse_args()
    folder = EXAMPLES / options.example
    if options.what == "quality":
        table(folder, options.prune, options.questions or 500)
        return
    with tempfile.TemporaryDirectory() as temporary:
        exactness(folder, options.work or Path(temporary), options.questions or 50)


if __name__ == "__main__":
    main()
