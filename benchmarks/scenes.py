"""The README's table of exactness: bundles of an example model against their eager models, on 50 held-out questions.

    python benchmarks/scenes.py

Converts the example into bundles (kept with --work), asks the questions, and compares every logit and every greedy
token with the eager model that has the same cuts. `--example scenes-smol` takes the second one, which has no [CLS].
What methods are worth is for `vlmcut sweep` to say.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from vlmcut.passes import folder as cut_folder
from vlmcut.passes import recipe as recipes
from vlmcut.pipeline import Request, convert
from vlmcut.prompt import Prompt
from vlmcut.runtime.bundle import Bundle
from vlmcut.surgery.talk import Talk, see_all
from vlmcut.validation import quality

EXAMPLES = Path(__file__).parent.parent / "examples"
BUNDLES: dict[str, dict[str, Any]] = {
    "float32": {},
    "int8": {"quantize": "int8"},
    "float32, standard operators": {"target": "rtx", "defer_build": True},
    "float16, standard operators": {"target": "rtx", "dtype": "float16", "defer_build": True},
}


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


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for the bundles; a temporary one if not given")
    parser.add_argument("--questions", type=int, default=50)
    parser.add_argument("--example", default="scenes", choices=("scenes", "scenes-smol"))
    options = parser.parse_args()
    folder = EXAMPLES / options.example
    with tempfile.TemporaryDirectory() as temporary:
        exactness(folder, options.work or Path(temporary), options.questions)


if __name__ == "__main__":
    main()
