"""What the command line prints, as text: plans, verdicts, speeds and the list of passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import Verdict
    from .manifest import ExactnessRow, Manifest, TokenBudget
    from .pipeline import Plan
    from .runtime.bench import Speed


def plan(model: str, planned: Plan) -> str:
    """What a model is made of, what a recipe makes of it, and where the work goes."""
    from .api import to_json

    data = to_json(planned)
    a, b = planned.before, planned.after
    kept = "all kept"
    if b.method is not None:
        kept = f"{', '.join('/'.join(map(str, keep)) for keep in planned.keeps)} kept by {b.method}"
    sizes = ", ".join(f"{bucket.name} px: {bucket.tokens}" for bucket in a.buckets)
    lines = [
        f"model    {model}: {a.family}, {a.tower.kind} + {a.language.kind}",
        f"tower    {_change(a.tower.layers, b.tower.layers)} layers, "
        f"{_change(_span(a.tower.heads), _span(b.tower.heads))} heads, "
        f"{_change(_span(a.tower.intermediate), _span(b.tower.intermediate))} neurons, hidden {a.tower.hidden}, "
        f"patches of {a.tower.patch_size} px",
        f"language {_change(a.language.layers, b.language.layers)} layers, "
        f"{_change(_span(a.language.heads), _span(b.language.heads))} heads in "
        f"{_change(_span(a.language.kv_heads), _span(b.language.kv_heads))} KV groups, "
        f"{_change(_span(a.language.intermediate), _span(b.language.intermediate))} neurons, "
        f"hidden {a.language.hidden}, {_change(a.language.vocabulary, b.language.vocabulary)} tokens",
        f"tokens   {sizes} visual tokens per image, {kept}",
        f"int8     {', '.join(b.quantized) or 'nothing'}",
    ]
    if b.ladder:
        steps = ", ".join(f"{'/'.join(str(r.stay(k)) for k in b.keep)} from layer {r.layer}" for r in b.ladder)
        lines.insert(-1, f"inside   {steps}, by {b.inside}")
    for what, layers in dataclasses.asdict(b.idle).items():
        if layers and what != "window":
            some = what in ("heads", "neurons")
            said = [f"{layer[1]} in layer {layer[0]}" if some else str(layer) for layer in layers]
            lines.insert(-1, f"idle     visual tokens, {what}: {'' if some else 'layers '}{', '.join(said)}")
    if b.carriers:
        lines.insert(-1, f"neck     text sees each image through {b.carriers} of its visual tokens")
    for budget in planned.budgets:
        lines.append(
            f"budget   {budget.images} x {budget.visual_tokens} image + {budget.text_tokens} text = {budget.sequence} "
            f"columns, + {budget.new_tokens} new = {_cache(budget)}"
        )
    for before, after in zip(data["before"]["costs"], data["after"]["costs"], strict=True):
        lines.append(
            f"work     {before['part']:<21} {before['flops'] / 1e9:10.3f} -> {after['flops'] / 1e9:10.3f} GFLOP, "
            f"{before['parameters'] / 1e6:9.3f} -> {after['parameters'] / 1e6:9.3f} M parameters"
        )
    for name, before in data["before"]["graphs"].items():
        lines.append(f"graph    {_graph(name, before, data['after']['graphs'][name])}")
    cache = [data[when]["kv_bytes"] / 1e6 for when in ("before", "after")]
    lines.append(f"KV cache {cache[0]:.3f} -> {cache[1]:.3f} MB in float32")
    lines += [f"note     {note}" for note in planned.notes]
    return "\n".join(lines)


def _cache(budget: TokenBudget) -> str:
    if not budget.carriers:
        return f"{budget.cache} cache rows"
    return f"{budget.positions} positions, {budget.cache} cache rows behind the bottleneck"


def applies(verdicts: Sequence[Verdict]) -> str:
    """Which passes and methods apply, and how far or why not."""
    rows = [f"  {'yes' if v.applies else 'no '} {v.name:<24} {v.note}" for v in verdicts]
    return "\n".join(["applies", *rows])


def verdict(manifest: Manifest) -> str:
    """How a conversion went: exactness, quality, sizes and engines."""
    from .validation.report import rows_of

    lines = [
        exactness(rows_of(manifest)),
        f"tokens   {manifest.exactness['equal']} of {manifest.exactness['tokens']} greedy tokens equal",
    ]
    lines += [f"near tie {text}" for text in manifest.exactness["near_ties"]]
    for name, work in manifest.anatomy["work"].items():
        have, want = work["counted"]["flops"] / 1e9, work["predicted"]["flops"] / 1e9
        lines.append(f"work     {name:<21} {have:10.4g} GFLOP counted, {want:10.4g} predicted ({work['ratio']:.3f})")
    if manifest.quality:
        right = ", ".join(f"{name} {100 * value:.1f} %" for name, value in manifest.quality["accuracy"].items())
        lines.append(f"quality  {manifest.quality['questions']} questions answered right: {right}")
    size = sum(f["bytes"] for f in manifest.files.values())
    lines.append(f"size     {size:,} bytes in {len(manifest.files)} files")
    for name, built in manifest.builds.items():
        lines.append(
            f"engine   {name}: " + (f"deferred, {built}" if name == "deferred" else f"{built['plan_bytes']:,} bytes")
        )
    return "\n".join(lines)


def exactness(rows: Sequence[ExactnessRow]) -> str:
    """A line for each output of each graph."""
    from .validation.report import line

    return "\n".join(map(line, rows))


def speeds(paths: Sequence[Path], found: Sequence[Speed]) -> str:
    """A line for each bundle, and for two the ratio of the first to the second."""
    columns = ("prompt_tokens", "vision_ms", "prefill_ms", "ttft_ms", "decode_ms", "tokens_per_second", "peak_rss_mb")
    lines = [" ".join(f"{c:>17}" for c in columns)]
    for path, speed in zip(paths, found, strict=True):
        lines.append(" ".join([*(f"{speed.to_json()[c]:17.1f}" for c in columns), str(path)]))
    if len(found) == 2:
        one, other = (s.to_json() for s in found)
        lines.append("ratio to the other: " + ", ".join(f"{c} {one[c] / other[c]:.2f}" for c in columns[1:5]))
    return "\n".join(lines)


def catalogue() -> dict[str, Any]:
    """Every pass and method as plain data."""
    from .passes.base import keys
    from .passes.inside.methods import METHODS as INSIDE
    from .passes.recipe import PASSES
    from .passes.tokens.methods import METHODS

    return {
        "passes": {
            name: {"summary": p.summary, "source": p.source, "keys": list(keys(p))} for name, p in PASSES.items()
        },
        "methods": {
            name: {
                "title": m.title,
                "summary": m.summary,
                "source": m.source,
                "stage": m.stage,
                "options": dict(m.options),
            }
            for name, m in METHODS.items()
        },
        "inside": {
            name: {
                "title": m.title,
                "summary": m.summary,
                "source": m.source,
                "usual": [list(rung) for rung in m.usual],
                "options": dict(m.options),
                "differs": m.differs,
            }
            for name, m in INSIDE.items()
        },
    }


def passes() -> str:
    """Every pass and method with its source."""
    found = catalogue()
    lines = ["passes, in the order of a recipe"]
    for name, p in found["passes"].items():
        keys = ", ".join(p["keys"]) or "no keys"
        lines.append(f"  {name:<13} {p['summary']}\n                keys: {keys}; {p['source']}")
    lines.append("methods of prune-tokens")
    for name, m in found["methods"].items():
        lines.append(f"  {name:<16} {m['summary']}\n{'':19}{m['stage']}; {m['source']}{_behind(m['options'])}")
    lines.append("methods of prune-inside, and where tokens leave when no ladder is given: share from depth on")
    for name, m in found["inside"].items():
        ladder = ", ".join(f"{share:.2g} from {depth:.2g}" for depth, share in m["usual"])
        lines.append(f"  {name:<16} {m['summary']}\n{'':19}{ladder}; {m['source']}{_behind(m['options'])}")
    return "\n".join(lines)


def _behind(options: dict[str, Any]) -> str:
    found = ":".join(f"{key}={_option(value)}" for key, value in options.items())
    return f"; options {found}" if found else ""


def _option(value: Any) -> str:
    """As it is written behind `--method name:`."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _graph(name: str, before: dict[str, int], after: dict[str, int]) -> str:
    """One call of a graph before and after the cuts."""
    flops, weights, states = (
        [one[key] / scale for one in (before, after)]
        for key, scale in (("flops", 1e9), ("weight_bytes", 1e6), ("state_bytes", 1e6))
    )
    text = (
        f"{name:<21} {flops[0]:10.4g} -> {flops[1]:10.4g} GFLOP, {weights[0]:9.3f} -> {weights[1]:9.3f} MB of weights"
    )
    return text if not any(states) else f"{text}, {states[0]:.3f} -> {states[1]:.3f} MB of states"


def _change(before: int | str, after: int | str) -> str:
    return str(before) if before == after else f"{before} -> {after}"


def _span(widths: tuple[int, ...]) -> str:
    """One number where all layers that have some have it, else the least and the most."""
    least, most = min((w for w in widths if w), default=0), max(widths, default=0)
    return str(most) if least == most else f"{least} to {most}"
