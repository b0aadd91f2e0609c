"""What a search may cut: axes, each a few cuts from mild to strong, as tables of a recipe.

A new pass takes part with one entry in `axes`, or `NO_AXIS` says why it does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..passes.prune_tokens import kept_tokens
from ..passes.recipe import Recipe, from_tables
from ..passes.slim_visual import FIRST
from ..surgery.anatomy import Anatomy, Language
from .sweep_plan import BASELINES, Refused, design, label

Choice = tuple[tuple[int, int], ...]  # axis and level of each cut, ascending by axis; empty for the original

METHODS = ("fastervlm", "divprune", "todre", "tome", "early-exit")  # of choosing tokens, where none are named
PRUNE = (0.5, 0.75, 0.875, 0.9375)  # fractions of the visual tokens removed
FRACTIONS = (0.125, 0.25, 0.375, 0.5, 0.75)  # of heads and neurons removed
DEPTHS = (7 / 8, 3 / 4, 1 / 2, 3 / 8, 1 / 4)  # of the language model, at which all visual tokens leave
WORKS = (0.9, 0.75, 0.6, 0.5)  # mean share of the visual tokens that a language layer sees
SHARES = (0.5, 0.25, 0.125)  # of the visual tokens that go on where some leave early
LAYERS = (1 / 12, 1 / 6, 1 / 3, 1 / 2)  # fractions of the layers removed
NO_AXIS = {
    "trim-tower": "it changes no answer, and every recipe begins with it",
    "heal": "every recipe that is asked would be trained: heal the winner",
    "trim-vocabulary": "which rows may go depends on what will be asked, and the search knows its own questions alone",
    "bottleneck": "untrained it loses the image",
    "skip-visual near": "as `apart`",
    "skip-visual apart": "it saves attention alone, and only where a prompt has many more visual tokens than text",
}


@dataclass(frozen=True)
class Level:
    """One cut: a table of a recipe, and its words in a report."""

    text: str
    table: Mapping[str, Any]


@dataclass(frozen=True)
class Axis:
    """Cuts of one kind, the mildest first."""

    name: str
    levels: tuple[Level, ...]
    slot: str = ""  # of the axes of one slot a recipe has at most one; an empty slot excludes nothing
    baseline: bool = False  # asked and timed alone beside the others, never combined
    draws: bool = False  # differs from seed to seed


def axes(
    a: Anatomy, methods: Sequence[str] = (), *, prune: Sequence[float] = (), keep: Sequence[int] = ()
) -> tuple[tuple[Axis, ...], tuple[Refused, ...]]:
    """The axes for a model, in the order in which a recipe has their passes.

    Args:
        methods: of choosing tokens, with options; `METHODS` for none. The baselines are always among them.
        prune: fractions of the visual tokens that are removed; `PRUNE` if nothing is said.
        keep: tokens per image, instead.

    Returns:
        The axes, and the methods that do not apply with their reasons. Whether another cut applies is for its `plan`.

    Raises:
        PassError: an unknown method or option, a budget out of range or named twice, a model that is pruned already.
    """
    ratios = prune or ([] if keep else {tuple(kept_tokens(b.tokens, r) for b in a.buckets): r for r in PRUNE}.values())
    plan = design(a, methods or METHODS, prune=tuple(ratios), keep=keep)
    strong = sorted(plan.keeps, reverse=True)
    tokens = []
    for method in dict.fromkeys(cell.method for cell in plan.cells):
        mine = sorted((cell for cell in plan.cells if cell.method == method), key=lambda cell: strong.index(cell.keep))
        levels = tuple(Level(f"{method} {label(cell.keep)}", Recipe((cell.step(),)).tables()[0]) for cell in mine)
        baseline, draws = method in BASELINES, mine[0].draws
        tokens.append(Axis(f"tokens by {method}", levels, slot="tokens", baseline=baseline, draws=draws))
    t, lm = a.tower, a.language
    return (
        Axis("vision layers", _counts("drop-layers", "vision", "layers", t.feature_layer)),
        Axis("vision heads", _shares("drop-heads", "vision", "heads", t.heads)),
        Axis("vision neurons", _shares("drop-neurons", "vision", "neurons", t.intermediate)),
        *tokens,
        Axis("language layers", _counts("drop-layers", "language", "layers", lm.layers)),
        Axis("language heads", _shares("drop-heads", "language", "heads", lm.kv_heads)),
        Axis("language neurons", _shares("drop-neurons", "language", "neurons", lm.intermediate)),
        *_inside(lm),
        Axis("visual tokens skip MLPs", _skips("mlp", lm.layers), slot="skip"),
        Axis("visual tokens skip layers", _skips("layer", lm.layers), slot="skip"),
        Axis("visual tokens use fewer heads", _slim("heads", lm.heads[FIRST["heads"] :])),
        Axis("visual tokens use fewer neurons", _slim("neurons", lm.intermediate)),
        Axis("vision int8", (Level("vision int8", {"name": "quantize", "parts": ["vision"]}),)),
        Axis("language int8", (Level("language int8", {"name": "quantize", "parts": ["language"]}),)),
    ), plan.refused


def _inside(lm: Language) -> list[Axis]:
    """Tokens that leave inside the language model: all at a layer, some early, or some early and all later."""
    first, layers = max(1, lm.levels), lm.layers
    exits = sorted({max(first, round(layers * depth)) for depth in DEPTHS} - {layers}, reverse=True)

    def levels(method: str, ladders: Iterable[Sequence[tuple[int, float]]]) -> tuple[Level, ...]:
        found = []
        for ladder in ladders:
            places, shares = [list(x) for x in zip(*ladder, strict=True)]
            words = ", ".join(f"{share:.3g} from layer {layer}" for layer, share in ladder)
            table = {"name": "prune-inside", "method": method, "layers": places, "share": shares}
            found.append(Level(f"{method} {words}", table))
        return tuple(found)

    return [
        Axis("visual exit", levels("exit", ([(layer, 0.0)] for layer in exits)), slot="inside"),
        Axis("fastv", levels("fastv", ([(first, share)] for share in SHARES)), slot="inside"),
        Axis("fitprune", tuple(_measured(f"fitprune:work={work}") for work in WORKS), slot="inside"),
        Axis(
            "fastv and exit",
            levels("fastv", ([(first, share), (exit, 0.0)] for exit in exits if exit > first for share in SHARES[:2])),
            slot="inside",
        ),
    ]


def _measured(method: str) -> Level:
    return Level(method, {"name": "prune-inside", "method": method})


def _skips(what: str, layers: int) -> tuple[Level, ...]:
    counts = sorted({max(1, round(layers * share)) for share in LAYERS})
    table = {"name": "skip-visual", "what": what}
    return tuple(Level(f"visual tokens skip {what} x {n}", table | {"count": n}) for n in counts)


def _slim(what: str, numbers: Iterable[int]) -> tuple[Level, ...]:
    most = max(numbers, default=0)
    counts = sorted({round(most * share) for share in FRACTIONS} - {0, most})
    table = {"name": "slim-visual", "what": what}
    return tuple(
        Level(f"visual tokens, {what} -{100 * n / most:.3g} %", table | {"fraction": n / most}) for n in counts
    )


def _counts(name: str, part: str, kind: str, total: int) -> tuple[Level, ...]:
    counts = sorted({round(total * share) for share in LAYERS} - {0})
    return tuple(Level(f"{part} {kind} -{n}", {"name": name, "part": part, "count": n}) for n in counts)


def _shares(name: str, part: str, kind: str, numbers: Iterable[int]) -> tuple[Level, ...]:
    most = max(numbers, default=0)
    counts = sorted({round(most * share) for share in FRACTIONS} - {0, most})
    return tuple(
        Level(f"{part} {kind} -{100 * n / most:.3g} %", {"name": name, "part": part, "fraction": n / most})
        for n in counts
    )


def recipe(found: Sequence[Axis], choice: Choice, seed: int = 0) -> Recipe:
    """The recipe of a choice, not resolved; `seed` is of a method that draws."""
    tables = [found[axis].levels[level].table for axis, level in choice]
    return from_tables([{**table, "seed": seed} if "seed" in table else dict(table) for table in tables])


def text(found: Sequence[Axis], choice: Choice) -> str:
    """A choice in words."""
    return " + ".join(found[axis].levels[level].text for axis, level in choice) or "original"
