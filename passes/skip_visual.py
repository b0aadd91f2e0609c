"""Visual tokens do less work than text in some layers of the language model, and none of them leaves.

| what | visual columns of these layers |
|---|---|
| mlp | skip the MLP |
| layer | go by unchanged; text still attends to keys and values made of them |
| apart | attend to the text before them and to themselves, not to each other |
| near | attend to the text before them and to a square of neighbours in the raster, before and behind them |

Work leaves the graph: products have as many rows as there are text columns. Decode does not change.

Source: YOPO, "Treat visual tokens as text? But your MLLM only needs fewer efforts to see" (arXiv:2410.06169), and for
`apart` NAAViT of SAISA (arXiv:2502.02458). We differ: nothing is trained for it, and layers are chosen by how little it
changes visual columns on calibration images. Tiles have a raster each; the line breaks of one are its last column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ..errors import PassError, nearest
from ..prompt import Prompt
from ..surgery.anatomy import Anatomy
from ..surgery.load import locate
from ..surgery.near import side
from ..surgery.neurons import find_mlp
from ..surgery.selection import attached
from ..surgery.talk import Talk, see_all
from ..surgery.vision import Seen
from .base import Pass
from .calibration import MEASURED, Calibration
from .inside.methods import METHODS
from .tokens.method import parse

WHATS = {"mlp": "mlp", "layer": "layers", "apart": "apart", "near": "near"}  # and the field of Idle
WINDOW = 5  # YOPO's


@dataclass(frozen=True, kw_only=True)
class SkipVisual(Pass):
    """In `count` layers, those where it changes visual columns least, or in `layers`, visual columns skip `what`."""

    name: ClassVar[str] = "skip-visual"
    summary: ClassVar[str] = "visual tokens skip MLPs, layers or tokens far off in the language model; none leaves"
    source: ClassVar[str] = "YOPO, arXiv:2410.06169; NAAViT, arXiv:2502.02458"

    what: str  # mlp, layer, apart or near
    count: int
    layers: tuple[int, ...] | None = None  # measured when absent
    window: int | None = None  # of `near`: side of the square of tokens, odd; 5 when absent

    def plan(self, a: Anatomy) -> Anatomy:
        if self.what not in WHATS:
            raise PassError(f"{self.name}: nothing to skip is called `{self.what}`", hint=nearest(self.what, WHATS))
        language = a.language
        if self.what == "mlp" and language.solid is not None:
            raise PassError(f"{self.name}: no MLP of `{a.family}` can be skipped: {language.solid}")
        if self.what != "mlp" and language.stiff is not None:
            raise PassError(f"{self.name}: columns of `{a.family}` cannot be told apart: {language.stiff}")
        if a.carriers and self.what != "mlp":
            raise PassError(
                f"{self.name}: {a.carriers} carriers of each image see the others in every layer, by `bottleneck`",
                hint='use what = "mlp", or leave one of the two passes out',
            )
        if a.language.window is not None and self.what != "mlp":
            raise PassError(
                f"{self.name}: some layers of `{a.family}` see {language.window} columns back, and one that runs "
                "on text alone sees all",
                hint='use what = "mlp"',
            )
        if self.window is not None and self.what != "near":
            raise PassError(f"{self.name}: window={self.window} says nothing of `{self.what}`", hint='it is for "near"')
        if self.what == "near":
            self._check_rasters(a)
        free = self.candidates(a)
        if not 1 <= self.count <= len(free):
            raise PassError(
                f"{self.name}: count={self.count}, but visual tokens can skip {len(free)} of {language.layers} layers"
                + self._holes(a),
                hint=f"choose 1 to {len(free)}" if free else "leave this pass out",
            )
        layers = self.layers if self.layers is not None else free[-self.count :]  # the last one is taken first
        if len(set(layers)) != self.count or not set(layers) <= set(free):
            raise PassError(
                f"{self.name}: layers={list(layers)} must be {self.count} different ones of {list(free)}"
                + self._holes(a),
                hint="leave `layers` out to have them measured",
            )
        field = WHATS[self.what]
        idle = replace(a.idle, **{field: tuple(sorted((*getattr(a.idle, field), *layers)))})
        return replace(a, idle=replace(idle, window=self._window) if self.what == "near" else idle)

    @property
    def _window(self) -> int:
        return WINDOW if self.window is None else self.window

    def _check_rasters(self, a: Anatomy) -> None:
        """Refuse what leaves a token without its neighbours."""
        for keep, bucket in zip(a.keep, a.buckets, strict=True):
            if not bucket.panels:
                raise PassError(
                    f"{self.name}: nobody knows where the visual tokens of `{a.family}` lie in the picture",
                    hint='use what = "apart"',
                )
            if keep != bucket.tokens:
                raise PassError(
                    f"{self.name}: `{a.method}` keeps {keep} of {bucket.tokens} visual tokens, which are no raster",
                    hint='leave prune-tokens out, or use what = "apart"',
                )
        shapes = [[(p.rows, p.columns, p.line_breaks) for p in bucket.panels] for bucket in a.buckets]
        for bucket, shape in zip(a.buckets, shapes, strict=True):
            if shape != shapes[0]:
                raise PassError(
                    f"{self.name}: images of {a.buckets[0].name} and {bucket.name} pixels have different rasters, "
                    f"{_rasters(shapes[0])} and {_rasters(shape)}, and the prefill graph serves them all",
                    hint="convert with one --image-size",
                )
        most = 2 * side(a.buckets[0].panels) - 1
        if self._window % 2 == 0 or not 3 <= self._window <= max(most, 3):
            raise PassError(
                f"{self.name}: window={self._window} of rasters of {_rasters(shapes[0])} tokens",
                hint=f"choose an odd number from 3 to {max(most, 3)}, which sees all",
            )
        if a.idle.near and a.idle.window != self._window:
            raise PassError(
                f"{self.name}: window={self._window}, and other layers have {a.idle.window} already",
                hint="choose one window",
            )

    def _holes(self, a: Anatomy) -> str:
        """Why layers behind a rung are not among the candidates."""
        if self.what != "near" or not a.ladder:
            return ""
        return f"; from layer {a.ladder[0].layer} on visual tokens have left, and the others are no raster"

    def candidates(self, a: Anatomy) -> tuple[int, ...]:
        """Layers in which visual columns may skip it.

        Not those where they do less already, nor those whose queries, keys or neurons choose who goes on; and none
        where neighbours have left.
        """
        taken = {*a.idle.mlp, *a.idle.layers, *a.idle.apart, *a.idle.near, *a.idle.slim}
        taken |= chosen_by(a, attention=self.what != "mlp")
        last = a.ladder[0].layer if self.what == "near" and a.ladder else last_layer(a)
        return tuple(i for i in range(last) if i not in taken)

    def notes(self, a: Anatomy) -> list[str]:
        return [] if self.layers is not None else [f"which layers visual tokens skip ({self.what}) is measured"]

    @property
    def needs_calibration(self) -> bool:
        return self.layers is None

    def resolve(self, model: Any, a: Anatomy, calibration: Calibration) -> Self:
        if self.layers is not None:
            return self
        change = visual_change(model, self.what, self.candidates(a), calibration)
        order = sorted(self.candidates(a), key=lambda i: (change[i], i))
        return replace(self, layers=tuple(sorted(order[: self.count])))

    def apply(self, model: Any, a: Anatomy) -> None:
        attached(model).idle = self.plan(a).idle


def _rasters(shapes: Sequence[tuple[int, int, bool]]) -> str:
    """Rasters in words, line breaks counted."""
    return " + ".join(f"{rows}x{columns + breaks}" for rows, columns, breaks in shapes)


def visual_change(model: Any, what: str, layers: Sequence[int], calibration: Calibration) -> dict[int, float]:
    """How far each of these layers, for `mlp` its MLP, moves visual columns: |change| / |column|, mean over columns.

    For `apart` and `near` it is the whole layer too: how far attention to other visual tokens moves them is not told
    apart.
    """
    blocks: Any = locate(model).language_layers
    looked = [see_all(model, prompt) for prompt in calibration.prompts[:MEASURED]]
    columns = [visual_columns(model, shrunk, pictures)[0] for shrunk, pictures in looked]
    sums, moved, seen = dict.fromkeys(layers, 0.0), dict[int, Tensor](), columns[0]

    def leave(index: int, args: Any, out: Any) -> None:
        change = moved[index] if what == "mlp" else (out[0] if isinstance(out, tuple) else out) - args[0]
        far, stream = (x[0][seen[index]].double().norm(dim=-1) for x in (change, args[0]))
        sums[index] += float((far / stream.clamp(min=1e-30)).sum())

    hooks = []
    for i in layers:
        mlp = find_mlp(blocks[i]) if what == "mlp" else None
        if mlp is not None:
            hooks.append(mlp.module.register_forward_hook(lambda _, args, out, i=i: moved.update({i: out})))
        hooks.append(blocks[i].register_forward_hook(lambda _, args, out, i=i: leave(i, args, out)))
    try:
        for (shrunk, pictures), seen in zip(looked, columns, strict=True):  # noqa: B007  `leave` reads it
            Talk.read(model, [shrunk], [pictures])
    finally:
        for hook in hooks:
            hook.remove()
    last = len(blocks) - 1  # nobody reads what becomes of visual columns there
    return {i: 0.0 if i == last else total / sum(int(one[i].sum()) for one in columns) for i, total in sums.items()}


def chosen_by(a: Anatomy, *, attention: bool) -> set[int]:
    """Layers by whose neurons, or if asked by whose attention too, it is chosen who goes on inside."""
    if a.inside is None:
        return set()
    row, _ = parse(a.inside, METHODS, "inside")
    rungs, found = [rung.layer for rung in a.ladder if rung.share], set()
    if row.choose is not None and attention:
        found |= {layer for rung in rungs for layer in (rung - 1, rung)}
    if row.neurons:
        found |= {rung - 1 for rung in rungs}
    return found


def last_layer(a: Anatomy) -> int:
    """The layer from which on no visual column is there; the number of layers if some always are."""
    return a.ladder[-1].layer if a.ladder and not a.ladder[-1].share else a.language.layers


def visual_columns(model: Any, prompt: Prompt, pictures: Sequence[Seen]) -> tuple[list[Tensor], list[Tensor]]:
    """Of the columns that each language layer sees, which are visual, bool [S], and their places in the prompt."""
    visual, inside = torch.from_numpy(prompt.visual_index[0] >= 0), attached(model).inside
    ladder = inside.ladder if inside else ()
    kept = Talk.read(model, [prompt], [pictures]).kept if ladder else ()
    seen = []
    for layer in range(len(locate(model).language_layers)):
        passed = [places[0] for rung, places in zip(ladder, kept, strict=True) if rung.layer <= layer]
        seen.append(passed[-1] if passed else torch.arange(len(visual)))
    return [visual[places] for places in seen], seen
