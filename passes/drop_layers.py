"""Drop whole transformer layers that change their input least.

Source: ShortGPT, arXiv:2403.03853, section 3 (block influence, 1 - cosine of a layer's input and output, mean over
tokens). We differ: used for the vision tower too, where the layer that feeds the projector is never dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ..errors import PassError
from ..surgery.anatomy import Anatomy, Idle
from ..surgery.cuts import count_layers, take_layers
from ..surgery.load import locate
from .base import Pass, check_part
from .calibration import Calibration, observe


def block_influence(inputs: Tensor, outputs: Tensor) -> Tensor:
    """1 - cosine between what enters and what leaves a layer, mean over tokens: [..., hidden] twice -> scalar."""
    return 1 - torch.nn.functional.cosine_similarity(inputs.double(), outputs.double(), dim=-1).mean()


@dataclass(frozen=True, kw_only=True)
class DropLayers(Pass):
    """Drop `count` layers of one part, those of least influence on the calibration images, or `drop` by index."""

    name: ClassVar[str] = "drop-layers"
    summary: ClassVar[str] = "drop the layers that change their input least (block influence)"
    source: ClassVar[str] = "ShortGPT, arXiv:2403.03853"

    part: str  # vision or language
    count: int
    drop: tuple[int, ...] | None = None  # layer indices; measured when absent

    def _layers(self, a: Anatomy) -> int:
        return a.tower.layers if self.part == "vision" else a.language.layers

    def _candidates(self, a: Anatomy) -> range:
        # The last tower layer feeds the projector and is the one whose attention scores tokens.
        return range(self._layers(a) - (self.part == "vision"))

    def plan(self, a: Anatomy) -> Anatomy:
        check_part(self.name, self.part)
        if self.part == "vision" and a.tower.fixed:
            raise PassError(f"{self.name}: vision layers of `{a.family}` cannot go: {a.tower.fixed}", hint="drop heads")
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
                hint="put drop-layers before skip-visual",
            )
        layers, most = self._layers(a), len(self._candidates(a)) - (self.part == "language")
        if not 1 <= self.count <= most:
            raise PassError(
                f"{self.name}: count={self.count}, but {self.part} has {layers} layers of which {most} can go",
                hint=f"choose 1 to {most}" if most else "this part cannot lose a layer",
            )
        drop = self.drop if self.drop is not None else tuple(range(self.count))  # counts are what matters here
        if len(set(drop)) != self.count or not set(drop) <= set(self._candidates(a)):
            raise PassError(
                f"{self.name}: drop={list(drop)} must be {self.count} different layers of 0 to "
                f"{len(self._candidates(a)) - 1}",
                hint="leave `drop` out to have it measured",
            )
        keep = [i for i in range(layers) if i not in drop]
        if self.part == "vision":
            tower = replace(
                a.tower,
                heads=tuple(a.tower.heads[i] for i in keep),
                intermediate=tuple(a.tower.intermediate[i] for i in keep),
                windowed=tuple(a.tower.windowed[i] for i in keep),
                feature_layer=a.tower.feature_layer - self.count,
            )
            return replace(a, tower=tower, scored=tuple(i for i, old in enumerate(keep) if old in a.scored))
        language = replace(
            a.language,
            heads=tuple(a.language.heads[i] for i in keep),
            kv_heads=tuple(a.language.kv_heads[i] for i in keep),
            intermediate=tuple(a.language.intermediate[i] for i in keep),
            others=tuple(a.language.others[i] for i in keep),
            windows=tuple(a.language.windows[i] for i in keep),
            masked=tuple(a.language.masked[i] for i in keep),
        )
        return replace(a, language=language)

    @property
    def needs_calibration(self) -> bool:
        return self.drop is None

    def resolve(self, model: Any, a: Anatomy, calibration: Calibration) -> Self:
        if self.drop is not None:
            return self
        parts = locate(model)
        layers: Any = parts.tower_layers if self.part == "vision" else parts.language_layers
        influence = torch.zeros(len(layers), dtype=torch.float64)

        def record(index: int, args: Sequence[Any], output: Any) -> None:
            influence[index] += block_influence(args[0], output[0] if isinstance(output, tuple) else output)

        observe(model, layers, record, calibration)
        order = sorted(self._candidates(a), key=lambda i: (float(influence[i]), i))
        return replace(self, drop=tuple(sorted(order[: self.count])))

    def apply(self, model: Any, a: Anatomy) -> None:
        assert self.drop is not None
        parts = locate(model)
        if self.part == "vision":
            assert parts.tower_stack is not None
            keep = [i for i in range(a.tower.layers) if i not in self.drop]
            parts.tower_stack.replace(take_layers(parts.tower_stack.modules, keep))
            for config in (parts.tower.config, model.config.vision_config):
                count_layers(config, len(keep))
            return
        keep = [i for i in range(a.language.layers) if i not in self.drop]
        parts.language_stack.replace(take_layers(parts.language_stack.modules, keep))
        for config in (parts.language.config, model.config.get_text_config()):
            kinds = getattr(config, "layer_types", None)
            if kinds and len(kinds) == a.language.layers:
                config.layer_types = [kinds[i] for i in keep]
            count_layers(config, len(keep))
