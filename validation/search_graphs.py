"""Graphs of many cut models, exported once for their shapes and timed in turn with ONNX Runtime.

Time depends on shapes, not on which heads were kept: recipes that plan the same tower share a vision graph.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ..exporters import onnx
from ..exporters.components import Component, components
from ..exporters.operators import Contrib
from ..exporters.weights import WeightFile
from ..manifest import TokenBudget
from ..runtime.sessions import open_session
from ..surgery.anatomy import Anatomy
from ..surgery.load import describe
from .search import Cost
from .sweep_plan import Progress
from .sweep_times import Call

_WARMUP = 2
_MEMORY = 8 << 30  # bytes of weights that are on the disk, and open, at once

Key = tuple[str, str]  # role, and all of an anatomy that its graph depends on
Made = tuple[Component, tempfile.TemporaryDirectory[str]]
Cut = tuple[Anatomy, Callable[[], Any]]  # a planned model, and how to make it when a graph of it is missing


class Graphs:
    """Graphs of some roles, for one image of the largest bucket."""

    def __init__(
        self,
        original: Cut,
        roles: Sequence[str],
        weights: int,
        *,
        text_tokens: int,
        new_tokens: int,
        threads: int = 0,
        progress: Progress = lambda _: None,
    ) -> None:
        """Nothing is exported yet.

        Args:
            roles: vision, prefill, decode.
            weights: bytes of the original's, which no cut model exceeds.
            text_tokens: room for text in the language model's graphs.
        """
        self.original, self.roles, self.threads, self.progress = original, tuple(roles), threads, progress
        self.text_tokens, self.new_tokens = text_tokens, new_tokens
        self.most = max(1, _MEMORY // weights - 1)  # models beside the original
        self.whole: tuple[float, ...] = ()  # parts of the original's time, from the first rounds; they add up to 1
        self._made: dict[Key, Made] = {}

    def costs(self, cuts: Sequence[Cut], runs: int) -> list[Cost]:
        """Time cut models and the original, one run of each graph in turn.

        Each round is divided by the original's time in the same round, so that a drifting clock hits neither. Models
        that do not fit into the memory together are timed in groups, the original with each.
        """
        found = []
        for start in range(0, len(cuts), self.most):
            group = [self.original, *cuts[start : start + self.most]]
            samples = self._samples([self._keys(cut) for cut in group], runs)
            whole = samples[0].sum(axis=0)
            first, *others = (np.median(mine / whole, axis=1) for mine in samples)
            self.whole = self.whole or tuple((first / first.sum()).tolist())
            for mine, middle in zip(samples[1:], others, strict=True):
                parts = tuple((middle / first.sum()).tolist())
                found.append(Cost(sum(parts), parts, float(np.median(mine.sum(axis=0)))))
        return found

    def key(self, role: str, a: Anatomy) -> Key:
        """What a graph depends on."""
        o, part = self.original[0], "vision" if role == "vision" else "language"
        quantized = tuple(p for p in a.quantized if p == part)
        if role != "vision":
            blank = {"tower": o.tower, "scored": o.scored, "leaving": (), "method": None, "query_dependent": False}
            blank |= {"outside": o.outside, "windows": o.windows, "projected": o.projected}
            blank |= {"idle": o.idle} if role == "decode" else {}  # visual tokens do less in a prompt alone
            return role, repr(replace(a, quantized=quantized, **blank))
        if a.query_dependent:  # the question is embedded by the language model's table
            return role, repr(a)
        blank = {"language": o.language, "layout": o.layout, "inside": None, "ladder": (), "idle": o.idle}
        return role, repr(replace(a, quantized=quantized, carriers=0, **blank))

    def _keys(self, cut: Cut) -> list[Key]:
        a, make = cut
        keys = [self.key(role, a) for role in self.roles]
        missing = [key for key in keys if key not in self._made]
        if missing:
            model = make()
            keep, ladder = (about := describe(model)).keep, about.ladder  # as measured, which the plan only expects
            budget = TokenBudget(
                images=1, visual_tokens=max(keep), text_tokens=self.text_tokens, new_tokens=self.new_tokens,
                ladder=ladder, carriers=about.carriers,
            )  # fmt: skip
            every = components(model, budget, keep, a.quantized)
            for key in missing:
                role = key[0]
                mine = [c for c in every if c.role == role]
                component = mine[int(np.argmax([b.tokens for b in a.buckets])) if role == "vision" else 0]
                self.progress(f"exporting {role}, {len(self._made) + 1}")
                place = tempfile.TemporaryDirectory()
                with WeightFile(Path(place.name)) as weights:
                    weights.save(onnx.export(component, model, Contrib()), "graph.onnx")
                self._made[key] = (replace(component, module=nn.Identity()), place)  # the model itself is not kept
        return keys

    def _samples(self, every: Sequence[Sequence[Key]], runs: int) -> list[np.ndarray]:
        """ms of each model, [roles, runs]."""
        wanted = list(dict.fromkeys(key for keys in every for key in keys))
        calls = {}
        for key in wanted:
            component, place = self._made[key]
            calls[key] = Call(component, open_session(Path(place.name) / "graph.onnx", threads=self.threads))
        self.progress(f"timing {len(calls)} graphs, {runs} runs of each in turn")
        samples: dict[Key, list[float]] = {key: [] for key in calls}
        for number in range(_WARMUP + runs):
            for key, call in calls.items():
                took = 1000 * call()
                if number >= _WARMUP:
                    samples[key].append(took)
        for key in [k for k in self._made if k not in calls][: max(0, len(self._made) - self.most * len(self.roles))]:
            self._made.pop(key)[1].cleanup()
        return [np.array([samples[key] for key in keys]) for keys in every]
