"""A sweep as JSON, as a table and as a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .sweep_answers import Scores
from .sweep_plan import BASELINES, ORIGINAL, Cell, Design, Keep, label
from .sweep_times import Times

MARK = "†"  # does not beat random
_COLUMNS = ("kept", "method", "accuracy %", "agreement %", "selection ms", "of vision %", "TTFT ms")
_COLOURS = ("#1f6feb", "#d9480f", "#2b8a3e", "#862e9c", "#c2255c", "#087f8c")


@dataclass(frozen=True)
class Sweep:
    """Everything that a sweep found."""

    model: str
    questions: int
    origin: str  # folder of the questions
    plan: Design
    scores: Scores
    times: Times | None
    runs: int  # of each graph
    threads: int

    def accuracy(self, cell: Cell | None) -> float:
        """Mean over seeds, a fraction."""
        found = self.scores[cell].accuracy
        return sum(found) / len(found)

    def bar(self, keep: Keep) -> float:
        """What has to be beaten at a budget: the mean of random draws."""
        return self.accuracy(Cell(BASELINES[0], keep))

    def fails(self, cell: Cell | None) -> bool:
        """Whether a method does not beat random at its budget."""
        return cell is not None and cell.method != BASELINES[0] and self.accuracy(cell) <= self.bar(cell.keep)


def to_json(found: Sweep) -> dict[str, Any]:
    """Plain data; fractions and ms."""
    rows = []
    for cell, score in found.scores.items():
        row: dict[str, Any] = {
            "method": ORIGINAL if cell is None else cell.method,
            "keep": list(found.plan.tokens if cell is None else cell.keep),
            "accuracy": found.accuracy(cell),
            "accuracy_of_seeds": list(score.accuracy),
            "agreement": sum(score.agreement) / len(score.agreement),
            "agreement_of_seeds": list(score.agreement),
        }
        if cell is not None and cell.method != BASELINES[0]:
            row["beats_random"] = not found.fails(cell)
        if found.times is not None:
            time = found.times[cell]
            row |= {"vision_ms": time.vision, "prefill_ms": time.prefill, "ttft_ms": time.first_token}
            if cell is not None:
                row |= {"selection_ms": time.selection, "selection_quartiles_ms": list(time.quartiles)}
        rows.append(row)
    return {
        "model": found.model,
        "questions": found.questions,
        "quality": found.origin,
        "tokens": list(found.plan.tokens),
        "rows": rows,
        "not_applicable": [
            {"method": r.method, "keep": None if r.keep is None else list(r.keep), "reason": r.reason}
            for r in found.plan.refused
        ],
        "timing": None if found.times is None else {"provider": "cpu", "runs": found.runs, "threads": found.threads},
    }


def table(found: Sweep) -> str:
    """Markdown: the original, then by budget the best first; below, what does not beat random or does not apply."""
    columns = _COLUMNS if found.times is not None else _COLUMNS[:4]
    lines = [columns, *(_row(found, cell)[: len(columns)] for cell in _sorted(found))]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]

    def written(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i == 1 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = [f"{'-' * (w + 1)}{'-' if i == 1 else ':'}" for i, w in enumerate(widths)]
    text = [written(lines[0]), f"|{'|'.join(rule)}|", *map(written, lines[1:]), "", *_notes(found)]
    return "\n".join(text) + "\n"


def _sorted(found: Sweep) -> list[Cell | None]:
    cells = sorted(found.plan.cells, key=lambda c: (found.plan.keeps.index(c.keep), -found.accuracy(c)))
    return [None, *cells]


def _row(found: Sweep, cell: Cell | None) -> tuple[str, ...]:
    score = found.scores[cell]
    accuracy = f"{100 * found.accuracy(cell):.1f}"
    if len(score.accuracy) > 1:
        accuracy += f" ({100 * min(score.accuracy):.1f} to {100 * max(score.accuracy):.1f})"
    name = ORIGINAL if cell is None else cell.method + (f" {MARK}" if found.fails(cell) else "")
    agreement = f"{100 * sum(score.agreement) / len(score.agreement):.1f}"
    row = (label(found.plan.tokens if cell is None else cell.keep), name, accuracy, agreement)
    if found.times is None:
        return row
    time = found.times[cell]
    own = share = ""
    if cell is not None:
        own, share = (
            ("<noise", "") if time.noise else (f"{time.selection:.2f}", f"{100 * time.selection / time.vision:.0f}")
        )
    return (*row, own, share, f"{time.first_token:.2f}")


def _notes(found: Sweep) -> list[str]:
    notes = []
    for keep in found.plan.keeps:
        others = [c for c in found.plan.cells if c.keep == keep and c.method != BASELINES[0]]
        worse = [c.method for c in others if found.fails(c)]
        named = f" ({MARK}): {', '.join(worse)}" if worse else ""
        notes.append(
            f"{label(keep)} tokens: {len(worse)} of {len(others)} methods do not beat random, "
            f"{100 * found.bar(keep):.1f} % in the mean{named}"
        )
    error = 50 / math.sqrt(found.questions)
    notes.append(
        f"{found.questions} questions of {found.origin}: the standard error of an accuracy is at most {error:.1f} "
        "points"
    )
    if found.times is not None:
        spans = [t.quartiles[1] - t.quartiles[0] for c, t in found.times.items() if c is not None]
        notes.append(
            f"times are medians of {found.runs} runs in turn; selection is the vision graph minus that with "
            f"{BASELINES[1]}, whose quartiles lie at most {max(spans):.2f} ms apart; <noise: 0 is between them"
        )
    notes += [
        f"does not apply{'' if r.keep is None else f' at {label(r.keep)} tokens'}: {r.method}: {r.reason}"
        for r in found.plan.refused
    ]
    # One paragraph each in Markdown, one line each in a terminal.
    return [line for note in notes for line in (note, "")][:-1]


def write(found: Sweep, folder: Path) -> None:
    """Write sweep.json, table.md and sweep.png into a folder."""
    (folder / "sweep.json").write_text(json.dumps(to_json(found), indent=1) + "\n")
    title = f"# {found.model}: methods on {found.questions} questions\n\n"
    (folder / "table.md").write_text(title + table(found))
    picture(found).savefig(folder / "sweep.png", dpi=130, bbox_inches="tight")


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that nothing beats: less (cost) is better first, more (gain) second; cheapest first."""
    best, found = -math.inf, []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i)):
        if points[index][1] > best:
            best = points[index][1]
            found.append(index)
    return found


def picture(found: Sweep) -> Any:
    """Left: accuracy over cost with the line of what nothing beats. Right: every method by name, one column of dots.

    Returns:
        A matplotlib `Figure`.
    """
    from matplotlib.figure import Figure  # takes half a second

    cells: list[Cell | None] = [None, *found.plan.cells]
    specs = list(dict.fromkeys(c.method for c in found.plan.cells))
    specs.sort(key=lambda spec: max(found.accuracy(c) for c in found.plan.cells if c.method == spec))
    colours = {keep: _COLOURS[i % len(_COLOURS)] for i, keep in enumerate(found.plan.keeps)}
    figure = Figure(figsize=(13, max(4.5, 1.6 + 0.27 * len(specs))), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))

    def cost(cell: Cell | None) -> float:
        if found.times is not None:
            return found.times[cell].first_token
        return max(found.plan.tokens if cell is None else cell.keep)

    points = [(cost(cell), 100 * found.accuracy(cell)) for cell in cells]
    front = pareto(points)
    left.plot(*zip(*(points[i] for i in front), strict=True), color="#868e96", lw=1, zorder=1)
    for keep, colour in colours.items():
        mine = [(p, c) for p, c in zip(points, cells, strict=True) if c is not None and c.keep == keep]
        plain = [p for p, c in mine if c.method not in BASELINES]
        if plain:
            left.scatter(*zip(*plain, strict=True), s=22, color=colour, alpha=0.75, lw=0, label=f"{label(keep)} tokens")
        for name, marker in zip(BASELINES, ("x", "+"), strict=True):
            left.scatter(
                *zip(*(p for p, c in mine if c.method == name), strict=True), s=45, color=colour, marker=marker
            )
    left.scatter(*points[0], s=60, color="black", marker="*", label=ORIGINAL, zorder=3)
    for name, marker in zip(BASELINES, ("x", "+"), strict=True):
        left.scatter([], [], s=45, color="#495057", marker=marker, label=name)
    _name_points(left, [(points[i], cells[i]) for i in front], colours)
    left.set_xlabel("time to first token, ms" if found.times is not None else "visual tokens kept")
    left.set_ylabel("answers right, %")
    left.set_title("nothing is both faster and better than the line", fontsize=10, loc="left")
    left.margins(x=0.18, y=0.1)
    left.legend(fontsize=8, loc="lower right", framealpha=0.9)
    left.grid(color="#e9ecef", lw=0.6)
    left.set_axisbelow(True)

    for keep, colour in colours.items():
        draws = [100 * x for x in found.scores[Cell(BASELINES[0], keep)].accuracy]
        right.axvspan(min(draws), max(draws), color=colour, alpha=0.12, lw=0)
        right.axvline(100 * found.bar(keep), color=colour, lw=1, ls="--")
        mine = [c for c in found.plan.cells if c.keep == keep]
        aside = 0.6 * ((found.plan.keeps.index(keep) + 0.5) / len(found.plan.keeps) - 0.5)  # equal ones both show
        heights = [specs.index(c.method) - aside for c in mine]
        right.scatter([100 * found.accuracy(c) for c in mine], heights, s=24, color=colour, lw=0, zorder=3)
    right.axvline(100 * found.accuracy(None), color="black", lw=1)
    right.set_yticks(range(len(specs)), specs, fontsize=8)
    right.set_ylim(-0.7, len(specs) - 0.3)
    right.set_xlabel("answers right, %")
    right.set_title("dashed: random, mean and range of its draws; black: original", fontsize=10, loc="left")
    right.grid(color="#e9ecef", lw=0.6)
    right.set_axisbelow(True)
    figure.suptitle(f"{Path(found.model).name}: {found.questions} questions", fontsize=11)
    return figure


def _name_points(axes: Any, named: Sequence[tuple[tuple[float, float], Cell | None]], colours: dict[Keep, str]) -> None:
    """Names beside the points of the line, to the left, where nothing better can lie."""
    for point, cell in named:
        if cell is not None:
            axes.annotate(
                cell.method, point, xytext=(-5, 4), textcoords="offset points", ha="right", fontsize=8,
                color=colours[cell.keep],
            )  # fmt: skip
