"""What a search found as JSON, as tables, as a picture, and as recipes that `vlmcut convert` takes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .search import Point
from .search_axes import NO_AXIS, Choice, text
from .search_judge import OBJECTIVES
from .search_run import Found
from .sweep_plan import BASELINES
from .sweep_report import pareto

_SHOWN = 12  # recipes that a sentence names


def to_json(found: Found) -> dict[str, Any]:
    """Plain data; ratios and qualities are relative to the original."""
    o, wanted = found.outcome, found.wanted

    def named(choices: Iterable[Choice]) -> list[str]:
        return [text(found.axes, choice) for choice in choices]

    def result(choice: Choice) -> dict[str, Any]:
        held = found.held[choice]
        return {
            "recipe": text(found.axes, choice),
            "passes": found.recipes[choice].tables(),
            "quality": o.points[choice].quality,
            "ratio": o.final[choice].ratio,
            "value": o.final[choice].value,
            "heldout": {
                "quality": held.quality, "accuracy": held.accuracy, "original": held.original,
                "agreement": held.agreement, "holds": held.quality >= wanted.min_quality,
            },
        }  # fmt: skip

    return {
        "model": wanted.model,
        "objective": wanted.objective,
        "unit": OBJECTIVES[wanted.objective].unit,
        "min_quality": wanted.min_quality,
        "beam": wanted.width,
        "seeds": wanted.seeds,
        "minutes": {"limit": wanted.minutes, "took": found.minutes},
        "threads": wanted.threads,
        "text_tokens": found.text_tokens,
        "runs": list(found.runs),
        "search": {"questions": found.counts[0], "folder": str(found.folders[0]), "original": found.original},
        "heldout": {"questions": found.counts[1], "folder": str(found.folders[1])},
        "winner": result(o.winner),
        "single": result(o.single),
        "winner_of_single": o.gain,
        "finalists": {text(found.axes, c): {"ratio": x.ratio, "value": x.value} for c, x in o.final.items()},
        "points": [
            {
                "recipe": text(found.axes, p.choice),
                "cuts": len(p.choice),
                "baseline": _baseline(found, p),
                "quality": p.quality,
                "ratio": None if p.cost is None else p.cost.ratio,
                "value": None if p.cost is None else p.cost.value,
                "predicted_ratio": p.predicted,
                "flops_ratio": found.flops[p.choice] / found.flops[()],
            }
            for p in o.points.values()
        ],
        "not_tried": {
            "refused": {text(found.axes, c): reason for c, reason in o.refused.items()},
            "passes": NO_AXIS,
            "methods": {r.method: r.reason for r in found.refused},
            "beyond_what_failed": named(o.beyond),
            "not_predicted_to_pay": named(o.dear),
            "time_was_over": named(o.left),
        },
    }


def summary(found: Found) -> str:
    """Markdown: what won, by how much, the best of each axis, and what was not tried."""
    lines = [*_verdict(found), "", *_singles(found), "", *_notes(found)]
    return "\n".join(lines) + "\n"


def table(found: Found) -> str:
    """Markdown: the summary, then everything that was asked, the cheapest first."""
    o = found.outcome
    order = sorted(o.points.values(), key=lambda p: (p.ratio, -p.quality, p.choice))
    rows = [(*_row(found, p), "measured" if p.cost else "predicted" if p.predicted else "") for p in order]
    head = ("recipe", "quality %", _unit(found), "of the original", "FLOPs of the original", "")
    return summary(found) + "\n## All recipes\n\n" + "\n".join(_grid(head, rows)) + "\n"


def _verdict(found: Found) -> list[str]:
    o, wanted = found.outcome, found.wanted
    title, unit = OBJECTIVES[wanted.objective].title, OBJECTIVES[wanted.objective].unit
    single = f"the best single cut, {text(found.axes, o.single)}"
    if o.winner != o.single:
        first = f"**{text(found.axes, o.winner)}**: {title} is {o.gain:.3f} of that of {single}."
    elif any(len(choice) > 1 for choice in o.points):
        first = f"No combination beats the best single cut: **{text(found.axes, o.single)}**."
    else:
        first = f"No combination was asked. The best single cut: **{text(found.axes, o.single)}**."
    rows = []
    for name, choice in dict.fromkeys((("winner", o.winner), ("best single cut", o.single))):
        held, cost = found.held[choice], o.final[choice]
        rows.append(
            (
                name, text(found.axes, choice), f"{100 * o.points[choice].quality:.1f}", f"{100 * held.quality:.1f}",
                f"{100 * held.accuracy:.1f} ({100 * held.original:.1f})", _value(cost.value, unit), f"{cost.ratio:.3f}",
            )
        )  # fmt: skip
    head = ("", "recipe", "quality %, search", "quality %, held out", "right %, held out (original)", _unit(found),
            "of the original")  # fmt: skip
    meaning = (
        "Quality is right answers over those of the original, which answers "
        f"{100 * found.original:.1f} % of the search's {found.counts[0]} questions right (`{found.folders[0]}`); "
        f"{100 * wanted.min_quality:g} % of that were asked for."
    )
    return [first, "", heldout(found), "", *_grid(head, rows), "", meaning]


def heldout(found: Found) -> str:
    """What the winner keeps of questions that did not choose it, and what to do where that is too little."""
    o, least = found.outcome, found.wanted.min_quality
    kept, single = found.held[o.winner].quality, found.held[o.single].quality
    asked = f"{found.counts[1]} questions of `{found.folders[1]}`, asked once, at the end"
    if math.isnan(kept):
        return f"**Held out, nothing can be said**: the original answers none of the {asked}, right."
    if kept >= least:
        return f"Held out, the winner keeps {100 * kept:.1f} %, and {100 * least:g} % were asked for ({asked})."
    passed = sum(p.quality >= least and not _baseline(found, p) for p in o.points.values())
    milder = f"`single.toml`, which keeps {100 * single:.1f} % held out; " if single >= least else ""
    return (
        f"**Held out, the winner keeps {100 * kept:.1f} %, less than the {100 * least:g} % that were asked for** "
        f"({asked}). It is the cheapest of {passed} recipes that passed on the search's {found.counts[0]} questions, "
        f"where chance helps the winner. Take {milder}search again with more questions (`--quality`); or ask for more "
        "than is needed (`--min-quality`)."
    )


def _singles(found: Found) -> list[str]:
    """The largest cut of each axis that keeps the answers, alone."""
    rows = []
    for number, axis in enumerate(found.axes):
        mine = [p for c, p in found.outcome.points.items() if len(c) == 1 and c[0][0] == number]
        passed = [p for p in mine if p.quality >= found.wanted.min_quality]
        if passed:
            rows.append((axis.name, *_row(found, passed[-1])))
        elif mine:
            best = max(mine, key=lambda p: p.quality)
            rows.append(
                (axis.name, f"none ({text(found.axes, best.choice)} keeps {100 * best.quality:.1f})", *[""] * 4)
            )
        else:
            rows.append((axis.name, "none was asked", *[""] * 4))
    head = ("axis", "largest cut that keeps the answers", "quality %", _unit(found), "of the original",
            "FLOPs of the original")  # fmt: skip
    return ["## Each axis alone", "", *_grid(head, rows)]


def _row(found: Found, p: Point) -> tuple[str, ...]:
    unit = OBJECTIVES[found.wanted.objective].unit
    return (
        text(found.axes, p.choice),
        f"{100 * p.quality:.1f}",
        "" if p.cost is None else _value(p.cost.value, unit),
        "" if math.isinf(p.ratio) else f"{p.ratio:.3f}",
        f"{found.flops[p.choice] / found.flops[()]:.3f}",
    )


def _value(value: float, unit: str) -> str:
    return f"{value:.2f}" if unit == "ms" else f"{value:,.0f}"


def _unit(found: Found) -> str:
    objective = OBJECTIVES[found.wanted.objective]
    return f"{found.wanted.objective}, {objective.unit}"


def _notes(found: Found) -> list[str]:
    o, wanted = found.outcome, found.wanted
    least = wanted.min_quality
    errors = [f"{100 * math.sqrt(least * (1 - least) / count):.1f}" for count in found.counts]
    combined = sum(len(c) > 1 for c in o.points)
    notes = [
        f"{len(o.points)} recipes were asked, {combined} of them combinations, in {found.minutes:.1f} minutes; beam of "
        f"{wanted.width}. One question is {100 / found.counts[0]:.2f} points; the standard error of a quality of "
        f"{100 * least:g} % is {errors[0]} points on the search's questions, {errors[1]} on the held-out ones.",
    ]
    if OBJECTIVES[wanted.objective].roles:
        notes.append(
            f"Times are medians of {found.runs[0]} rounds in turn with the original, {found.runs[1]} for the last; "
            f"{f'--threads {wanted.threads}' if wanted.threads else 'all threads'}, ratios taken round by round. "
            "Combinations that were only predicted have no ms."
        )
    if o.left:
        notes.append(
            f"**The {wanted.minutes:g} minutes were over** (what had been asked was then timed and confirmed): "
            f"{len(o.left)} recipes were not asked, nor what would have grown from them: {_named(found, o.left)}. "
            "Give more --minutes, or fewer --methods."
        )
    if o.beyond:
        notes.append(
            f"{len(o.beyond)} recipes were not asked because a part of them failed: {_named(found, o.beyond)}."
        )
    if o.dear:
        notes.append(
            f"{len(o.dear)} recipes were not asked because they were not predicted to cost less than what they grew "
            f"from: {_named(found, o.dear)}."
        )
    for reason in dict.fromkeys(o.refused.values()):
        mine = [choice for choice, why in o.refused.items() if why == reason]
        notes.append(f"{len(mine)} recipes do not apply, {_named(found, mine)}: {reason}.")
    notes += [f"does not apply: {r.method}: {r.reason}" for r in found.refused]
    return [line for note in notes for line in (note, "")][:-1]


def _named(found: Found, choices: Sequence[Choice]) -> str:
    shown = "; ".join(text(found.axes, choice) for choice in choices[:_SHOWN])
    return shown + (f"; and {len(choices) - _SHOWN} more, all in search.json" if len(choices) > _SHOWN else "")


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table whose columns line up; numbers to the right."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    right = [all(_numeric(row[i]) for row in rows) and bool(rows) for i in range(len(head))]

    def written(line: Sequence[str]) -> str:
        cells = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)]
        return f"| {' | '.join(cells)} |"

    rule = "|".join("-" * (w + 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True))
    return [written(lines[0]), f"|{rule}|", *map(written, lines[1:])]


def _numeric(cell: str) -> bool:
    return not cell or (cell[0].isdigit() and not any(c.isalpha() for c in cell))


def _baseline(found: Found, p: Point) -> bool:
    return any(found.axes[axis].baseline for axis, _ in p.choice)


def write(found: Found, folder: Path) -> None:
    """Write recipe.toml (the winner), single.toml (the best single cut), search.json, table.md and search.png."""
    o = found.outcome
    (folder / "recipe.toml").write_text(found.recipes[o.winner].to_toml())
    (folder / "single.toml").write_text(found.recipes[o.single].to_toml())
    (folder / "search.json").write_text(json.dumps(to_json(found), indent=1) + "\n")
    title = f"# {found.wanted.model}: the cheapest recipe by {found.wanted.objective}\n\n"
    (folder / "table.md").write_text(title + table(found))
    picture(found).savefig(folder / "search.png", dpi=130, bbox_inches="tight")


def picture(found: Found) -> Any:
    """Quality over cost, both relative to the original, with the line of what nothing measured beats.

    Left: singles, combinations and baselines. Right: the same near the constraint. Recipes that failed alone were not
    measured and are not drawn.

    Returns:
        A matplotlib `Figure`.
    """
    from matplotlib.figure import Figure  # takes half a second

    objective, least = OBJECTIVES[found.wanted.objective], 100 * found.wanted.min_quality
    figure = Figure(figsize=(13, 6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        _draw(found, axes)
        axes.axhline(least, color="#2b8a3e", lw=1, ls="--", label="--min-quality")
        axes.set_xlabel(f"{objective.title}, fraction of the original's")
        axes.grid(color="#e9ecef", lw=0.6)
        axes.set_axisbelow(True)
    left.set_ylabel("questions answered right, % of the original's")
    left.set_title("all that was measured or predicted", fontsize=10, loc="left")
    right.set_title("near the constraint", fontsize=10, loc="left")
    top = max([100.0, *(100 * p.quality for p in _shown(found))])
    right.set_ylim(least - 0.6 * (top - least) - 0.5, top + 0.15 * (top - least) + 0.2)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle(f"{Path(found.wanted.model).name}: {found.counts[0]} questions", fontsize=11)
    return figure


def _shown(found: Found) -> list[Point]:
    return [p for p in found.outcome.points.values() if not math.isinf(p.ratio)]


def _draw(found: Found, axes: Any) -> None:
    cuts = [p for p in _shown(found) if not _baseline(found, p)]
    groups: list[tuple[str, list[Point], dict[str, Any]]] = [
        ("one cut", [p for p in cuts if len(p.choice) == 1], {"s": 30, "color": "#1f6feb", "marker": "o", "lw": 0}),
        ("combination", [p for p in cuts if len(p.choice) > 1 and p.cost],
         {"s": 34, "color": "#d9480f", "marker": "D", "lw": 0}),
        ("combination, cost predicted", [p for p in cuts if not p.cost],
         {"s": 28, "facecolors": "none", "edgecolors": "#d9480f", "marker": "D", "alpha": 0.6}),
    ]  # fmt: skip
    for name, marker in zip(BASELINES, ("x", "+"), strict=True):
        mine = [p for p in _shown(found) if _baseline(found, p) and text(found.axes, p.choice).startswith(f"{name} ")]
        groups.append((f"{name}, a baseline", mine, {"s": 50, "color": "#495057", "marker": marker}))
    for name, points, style in groups:
        if points:
            axes.scatter([p.ratio for p in points], [100 * p.quality for p in points], label=name, zorder=3, **style)
    axes.scatter([1], [100], s=80, color="black", marker="*", label="original", zorder=3)
    ends = {"best single cut": (found.outcome.single, "#1f6feb"), "winner": (found.outcome.winner, "#d9480f")}
    for word, (choice, colour) in ends.items():
        p = found.outcome.points[choice]
        axes.scatter(
            [p.ratio], [100 * p.quality], s=170, facecolors="none", edgecolors=colour, lw=1.5, zorder=4,
            label=f"{word}: {text(found.axes, choice)}",
        )  # fmt: skip
    places = [(1.0, 100.0), *((p.ratio, 100 * p.quality) for p in cuts if p.cost)]
    axes.plot(*zip(*(places[i] for i in pareto(places)), strict=True), color="#868e96", lw=1, zorder=1)
