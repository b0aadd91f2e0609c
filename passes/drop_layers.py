"""Drop whole transformer layers that change their input, or the model's answers, least.

Source: ShortGPT, arXiv:2403.03853, section 3 (block influence, 1 - cosine of a layer's input and output, mean over
tokens). We differ: used for the vision tower too. `loss` leaves out one layer after the other instead: each time the
one without which the answers move least, measured anew with those that are gone.

Layers that something names by number stay: the one that feeds the projector, the last that can score tokens, and on
either side of DeepStack those whose output is taken or added to. Numbers of the others follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ..errors import PassError, nearest
from ..surgery.anatomy import Anatomy, Idle, Pinned
from ..surgery.cuts import count_layers, take_layers
from ..surgery.load import locate
from ..surgery.numbered import follow
from .base import Pass, check_part
from .calibration import MEASURED, Calibration, observe
from .importance import Answers, without_layer

IMPORTANCES = ("influence", "loss")


def block_influence(inputs: Tensor, outputs: Tensor) -> Tensor:
    """1 - cosine between what enters and what leaves a layer, mean over tokens: [..., hidden] twice -> scalar."""
    return 1 - torch.nn.functional.cosine_similarity(inputs.double(), outputs.double(), dim=-1).mean()


@dataclass(frozen=True, kw_only=True)
class DropLayers(Pass):
    """Drop `count` layers of one part, those of least importance on the calibration images, or `drop` by index."""

    name: ClassVar[str] = "drop-layers"
    summary: ClassVar[str] = "drop the layers that change their input least (block influence)"
    source: ClassVar[str] = "ShortGPT, arXiv:2403.03853"

    part: str  # vision or language
    count: int
    drop: tuple[int, ...] | None = None  # layer indices; measured when absent
    importance: str = "influence"  # how it is measured: influence, or loss, one after the other

    def _layers(self, a: Anatomy) -> int:
        return a.tower.layers if self.part == "vision" else a.language.layers

    def _pinned(self, a: Anatomy) -> Pinned:
        return (a.tower if self.part == "vision" else a.language).pinned

    def _candidates(self, a: Anatomy) -> list[int]:
        stay = {layer for layer, _ in self._pinned(a)}
        end = a.tower.feature_layer if self.part == "vision" else a.language.layers
        return [i for i in range(end) if i not in stay]

    def plan(self, a: Anatomy) -> Anatomy:
        check_part(self.name, self.part)
        if self.importance not in IMPORTANCES:
            raise PassError(
                f"{self.name}: no importance `{self.importance}`", hint=nearest(self.importance, IMPORTANCES)
            )
        if self.part == "vision" and a.method is not None:  # which may name blocks, or leave from them
            raise PassError(
                f"{self.name}: `{a.method}` counts on the {a.tower.layers} blocks that the tower has",
                hint="put drop-layers before prune-tokens",
            )
        if self.part == "language" and a.ladder:
            raise PassError(
                f"{self.name}: `{a.inside}` names {len(a.ladder)} of the {a.language.layers} layers by number",
                hint="put drop-layers before prune-inside",
            )
        if self.part == "language" and a.idle != Idle():
            raise PassError(
                f"{self.name}: visual tokens skip work in layers that are named by number",
                hint=f"put drop-layers before {a.idle.origin}",
            )
        layers, candidates = self._layers(a), self._candidates(a)
        most = max(min(len(candidates), layers - 1), 0)
        if not 1 <= self.count <= most:
            raise PassError(
                f"{self.name}: count={self.count}, but {self.part} has {layers} layers of which {most} can go",
                hint=f"choose 1 to {most}" if most else "this part cannot lose a layer",
            )
        drop = self.drop if self.drop is not None else tuple(candidates[: self.count])  # counts are what matters here
        for layer, why in self._pinned(a):
            if layer in drop:
                raise PassError(
                    f"{self.name}: drop={list(drop)} names {self.part} layer {layer}, which must stay: {why}",
                    hint=f"choose from {candidates}",
                )
        if len(set(drop)) != self.count or not set(drop) <= set(candidates):
            raise PassError(
                f"{self.name}: drop={list(drop)} must be {self.count} different layers of {candidates}",
                hint="leave `drop` out to have it measured",
            )
        keep = [i for i in range(layers) if i not in drop]
        pinned = tuple((keep.index(layer), why) for layer, why in self._pinned(a))
        if self.part == "vision":
            tower = replace(
                a.tower,
                heads=tuple(a.tower.heads[i] for i in keep),
                intermediate=tuple(a.tower.intermediate[i] for i in keep),
                windowed=tuple(a.tower.windowed[i] for i in keep),
                feature_layer=a.tower.feature_layer - self.count,
                pinned=pinned,
            )
            return replace(a, tower=tower, scored=tuple(i for i, old in enumerate(keep) if old in a.scored))
        language = replace(
            a.language,
            heads=tuple(a.language.heads[i] for i in keep),
            kv_heads=tuple(a.language.kv_heads[i] for i in keep),
            stiff=a.language.stiff if any(not a.language.kv_heads[i] for i in keep) else None,
            intermediate=tuple(a.language.intermediate[i] for i in keep),
            others=tuple(a.language.others[i] for i in keep),
            windows=tuple(a.language.windows[i] for i in keep),
            masked=tuple(a.language.masked[i] for i in keep),
            pinned=pinned,
        )
        return replace(a, language=language)

    def notes(self, a: Anatomy) -> list[str]:
        if self.importance != "loss" or self.drop is not None:
            return []
        candidates = len(self._candidates(a))
        passes = 1 + sum(candidates - gone for gone in range(self.count))
        return [
            f"{self.part}: {self.count} of {candidates} layers leave one after the other, each time the one that is "
            f"missed least: {passes} answers to each calibration prompt ({MEASURED} at most)"
        ]

    @property
    def needs_calibration(self) -> bool:
        return self.drop is None

    def resolve(self, model: Any, a: Anatomy, calibration: Calibration) -> Self:
        if self.drop is not None:
            return self
        parts = locate(model)
        layers: Any = parts.tower_layers if self.part == "vision" else parts.language_layers
        measure = self._by_loss if self.importance == "loss" else self._by_influence
        return replace(self, drop=tuple(sorted(measure(model, layers, self._candidates(a), calibration))))

    def _by_influence(self, model: Any, layers: Any, candidates: list[int], calibration: Calibration) -> list[int]:
        influence = torch.zeros(len(layers), dtype=torch.float64)

        def record(index: int, args: Sequence[Any], output: Any) -> None:
            influence[index] += block_influence(args[0], output[0] if isinstance(output, tuple) else output)

        observe(model, layers, record, calibration)
        return sorted(candidates, key=lambda i: (float(influence[i]), i))[: self.count]

    def _by_loss(self, model: Any, layers: Any, candidates: list[int], calibration: Calibration) -> list[int]:
        answers = Answers(model, self.part, calibration)
        gone: list[int] = []
        with ExitStack() as stack:
            for _ in range(self.count):
                losses = []
                for i in (i for i in candidates if i not in gone):
                    with without_layer(layers[i]):
                        losses.append((answers.moved(), i))
                gone.append(min(losses)[1])
                stack.enter_context(without_layer(layers[gone[-1]]))
        return gone

    def apply(self, model: Any, a: Anatomy) -> None:
        assert self.drop is not None
        parts, layers, vision = locate(model), self._layers(a), self.part == "vision"
        stack = parts.tower_stack if vision else parts.language_stack
        assert stack is not None  # plan counted its layers
        keep = [i for i in range(layers) if i not in self.drop]
        stack.replace(take_layers(stack.modules, keep))
        module, config = (
            (parts.tower, model.config.vision_config) if vision else (parts.language, model.config.get_text_config())
        )
        follow(model.config if vision else None, [module, module.config, config], layers, keep)
        for one in (module.config, config):
            count_layers(one, len(keep))
