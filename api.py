"""The Python API of the two big verbs: `inspect` predicts, `convert` does."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import pipeline
from .errors import PassError
from .manifest import Manifest, TokenBudget
from .passes.bottleneck import Bottleneck
from .passes.drop_heads import DropHeads
from .passes.drop_layers import DropLayers
from .passes.drop_neurons import DropNeurons
from .passes.heal import Heal
from .passes.inside.methods import METHODS as INSIDE
from .passes.prune_inside import PruneInside
from .passes.prune_tokens import PruneTokens
from .passes.quantize import Quantize
from .passes.recipe import PASSES
from .passes.skip_visual import WHATS, SkipVisual
from .passes.slim_visual import WHATS as SLIM
from .passes.slim_visual import SlimVisual
from .passes.tokens.methods import METHODS
from .passes.trim_tower import TrimTower
from .passes.trim_vocabulary import TrimVocabulary
from .pipeline import Plan, Progress, Request
from .surgery.anatomy import Anatomy
from .surgery.costs import costs, kv_bytes
from .validation.survey import Row
from .validation.survey import survey as tried
from .validation.work import predicted


@dataclass(frozen=True)
class Verdict:
    """Whether a pass or a method applies to a model, and how far it goes or why not."""

    name: str
    applies: bool
    note: str


def inspect(model: str, **request: Any) -> dict[str, Any]:
    """Describe a model and predict what a recipe makes of it, from the config alone.

    Args:
        model: a folder, a hub id or `tiny:llava`.
        request: fields of `pipeline.Request`, such as `prune=0.75` or `drop_layers={"vision": 1}`.

    Returns:
        Plain data: `before` and `after`, each with `anatomy`, `graphs` (FLOPs and bytes of one call of each), `costs`
        (by part, of a first token) and `kv_bytes`; `passes` that apply.
    """
    planned = pipeline.plan(Request(model=model, **request))
    return to_json(planned)


def convert(model: str, out: str | Path, *, progress: Progress = lambda _: None, **request: Any) -> Manifest:
    """Convert a model into a verified bundle at `out`.

    Args:
        model: a folder, a hub id or `tiny:llava`.
        out: a new folder; an existing path is refused.
        progress: called with one line before each step.
        request: fields of `pipeline.Request`, such as `prune=0.75`, `recipe=Path("r.toml")` or `target="rtx"`.

    Returns:
        The manifest that was written.

    Raises:
        ParityError: a graph does not compute what the cut eager model computes; nothing is left at `out`.
        VlmcutError: any other expected failure; nothing is left either.
    """
    return pipeline.convert(Request(model=model, **request), Path(out), progress)


def survey(kinds: Iterable[str] | None = None, *, export: bool = True) -> Iterator[Row]:
    """Try image-text-to-text types of transformers with tiny random models, one after the other.

    Args:
        kinds: model types; all that transformers registers for None.
        export: also cut, export and prove each; a few tens of seconds per type.
    """
    return tried(kinds, export=export)


def to_json(planned: Plan) -> dict[str, Any]:
    """A plan as plain data."""
    budget = planned.budgets[0]

    def work(a: Anatomy) -> dict[str, Any]:
        sized = dataclasses.replace(budget, visual_tokens=max(a.keep))
        several = len(a.buckets) > 1
        calls = {f"vision {b.name}" if several else "vision": ("vision", i) for i, b in enumerate(a.buckets)}
        calls |= {"prefill": ("prefill", 0), "decode": ("decode", 0)}
        return {
            name: dataclasses.asdict(predicted(a, sized, role, bucket, planned.target, planned.dtype))
            for name, (role, bucket) in calls.items()
        }

    def part(a: Anatomy) -> dict[str, Any]:
        return {
            "anatomy": a.to_json(),
            "graphs": work(a),
            "costs": [dataclasses.asdict(c) for c in costs(a, images=budget.images, text_tokens=budget.text_tokens)],
            "kv_bytes": kv_bytes(a, dataclasses.replace(budget, visual_tokens=max(a.keep))),
        }

    return {
        "before": part(planned.before),
        "after": part(planned.after),
        "recipe": planned.recipe.tables(),
        "budgets": [_budget(b) for b in planned.budgets],
        "notes": list(planned.notes),
        "passes": [dataclasses.asdict(v) for v in verdicts(planned.before)],
    }


def _budget(budget: TokenBudget) -> dict[str, Any]:
    ladder = [dataclasses.asdict(rung) for rung in budget.ladder]
    return dataclasses.asdict(budget) | {"ladder": ladder, "sequence": budget.sequence, "cache": budget.cache}


def verdicts(a: Anatomy) -> list[Verdict]:
    """Every pass and method with the most it can do on this model, tried through `plan`."""
    trimmed = TrimTower().plan(a)
    found = [Verdict(TrimTower.name, True, f"{a.tower.layers - a.tower.feature_layer} tower layers are dead weight")]
    for name in METHODS:
        step = PruneTokens(keep=max(1, a.visual_tokens // 4), method=name)
        note = "; ".join([f"tried with {step.keep} of {a.visual_tokens} tokens", *step.notes(trimmed)])
        found.append(_try(f"{PruneTokens.name} {name}", step, trimmed, note))
    for part in ("vision", "language"):
        heads = max(trimmed.tower.heads if part == "vision" else a.language.kv_heads, default=0)
        kind = "heads" if part == "vision" else "KV heads"
        step = DropHeads(part=part, fraction=min(1 / max(heads, 1), 0.99))
        found.append(_try(f"{DropHeads.name} {part}", step, trimmed, f"{heads} {kind} per layer"))
        neurons = max(trimmed.tower.intermediate if part == "vision" else a.language.intermediate, default=0)
        step = DropNeurons(part=part, fraction=0.5)
        found.append(_try(f"{DropNeurons.name} {part}", step, trimmed, f"{neurons} neurons per layer"))
        layers = trimmed.tower.layers if part == "vision" else a.language.layers
        found.append(_try(f"{DropLayers.name} {part}", DropLayers(part=part, count=1), trimmed, f"{layers} layers"))
    for name, row in INSIDE.items():
        step = PruneInside(method=name)
        note = f"{a.language.layers} layers; {row.summary}"
        if a.language.layers <= len(row.usual):  # its own ladder has no room
            step = replace(step, layers=(a.language.layers - 1,), share=(0.0 if row.choose is None else 0.5,))
        found.append(_try(f"{PruneInside.name} {name}", step, trimmed, note))
    for what in WHATS:
        step = SkipVisual(what=what, count=1)
        found.append(_try(f"{SkipVisual.name} {what}", step, trimmed, f"{a.language.layers} layers"))
    step = Bottleneck(carriers=1)
    found.append(_try(step.name, step, trimmed, "text sees an image through its last tokens; meant with heal"))
    for what in SLIM:
        slim = SlimVisual(what=what, fraction=0.5)
        found.append(_try(f"{SlimVisual.name} {what}", slim, trimmed, f"{a.language.layers} layers"))
    found.append(_try(Heal.name, Heal(steps=1), trimmed, "after a cut; trains on the calibration prompts"))
    rows = a.language.vocabulary
    found.append(_try(TrimVocabulary.name, TrimVocabulary(size=max(2, rows // 2)), trimmed, f"{rows} tokens"))
    found.append(_try(Quantize.name, Quantize(), trimmed, "int8, --target onnx"))
    assert {v.name.split()[0] for v in found} == set(PASSES)
    return found


def _try(name: str, step: Any, a: Anatomy, note: str) -> Verdict:
    try:
        step.plan(a)
    except PassError as error:
        return Verdict(name, False, str(error).removeprefix(f"{step.name}: "))
    return Verdict(name, True, note)
