"""What each choice costs at run time: graphs of a sweep, timed in turn with ONNX Runtime.

A method's own time is its vision graph minus the one with `uniform`, which gathers as many tokens and chooses for
nothing. Both run in the same round, so the difference is taken round by round and a drifting clock hits neither.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ..exporters import onnx
from ..exporters.components import Component, components
from ..exporters.operators import Contrib
from ..exporters.weights import WeightFile
from ..manifest import TokenBudget
from ..runtime.sessions import open_session
from ..surgery.load import describe, state_dict
from .sweep_plan import BASELINES, ORIGINAL, Cell, Design, Keep, Progress, applied

RUNS = 21
_WARMUP = 2
_MEMORY = 8 << 30  # bytes of weights that are open at once
_REFERENCE = BASELINES[1]


@dataclass(frozen=True)
class Time:
    """Medians over all rounds in ms; selection with its quartiles, against `uniform` at the same budget."""

    vision: float
    prefill: float
    selection: float
    quartiles: tuple[float, float]

    @property
    def first_token(self) -> float:
        return self.vision + self.prefill

    @property
    def noise(self) -> bool:
        """Whether the method's own time drowns in the spread of the rounds."""
        return self.quartiles[0] <= 0 <= self.quartiles[1]


Times = dict[Cell | None, Time]


def times(
    model: Any,
    plan: Design,
    *,
    text_tokens: int,
    new_tokens: int,
    runs: int = RUNS,
    threads: int = 0,
    progress: Progress = lambda _: None,
) -> Times:
    """Time the vision graph of every cell for an image of the largest bucket, and prefill once per budget.

    Args:
        model: trimmed, without a selection.
        text_tokens: room for text in the prefill graph.
    """
    weights = sum(tensor.nbytes for tensor in state_dict(model).values())
    cells: list[Cell | None] = [None, *plan.cells]
    every = [cells] if weights * (len(cells) + len(plan.keeps)) <= _MEMORY else _by_budget(cells, plan.keeps)
    found: Times = {}
    for group in every:
        rounds = _Rounds(model, plan, group, text_tokens, new_tokens, threads, progress)
        progress(f"timing {len(rounds.calls)} graphs, {runs} runs of each in turn")
        found |= rounds.run(runs)
    return found


def _by_budget(cells: Sequence[Cell | None], keeps: Sequence[Keep]) -> list[list[Cell | None]]:
    return [[None], *([c for c in cells if c is not None and c.keep == keep] for keep in keeps)]


class _Rounds:
    """Sessions of some cells, run in turn."""

    def __init__(
        self,
        model: Any,
        plan: Design,
        cells: Sequence[Cell | None],
        text_tokens: int,
        new_tokens: int,
        threads: int,
        progress: Progress,
    ) -> None:
        self.cells, self.plan = cells, plan
        self.calls: dict[tuple[str, Any], Call] = {}
        quantized, largest = describe(model).quantized, int(np.argmax(plan.tokens))
        with tempfile.TemporaryDirectory() as place:
            made: dict[tuple[str, Any], Component] = {}
            with WeightFile(Path(place)) as weights:
                for cell in cells:
                    keep = self._keep(cell)
                    budget = TokenBudget(
                        images=1, visual_tokens=max(keep), text_tokens=text_tokens, new_tokens=new_tokens
                    )
                    progress(f"exporting {ORIGINAL if cell is None else cell.text}")
                    with applied(model, cell):
                        parts = components(model, budget, keep, quantized)
                        wanted: dict[tuple[str, Any], Component] = {("vision", cell): parts[largest]}
                        if ("prefill", keep) not in made:
                            wanted["prefill", keep] = next(c for c in parts if c.role == "prefill")
                        for key, component in wanted.items():
                            weights.save(onnx.export(component, model, Contrib()), f"{len(made)}.onnx")
                            made[key] = component
            for number, (key, component) in enumerate(made.items()):
                self.calls[key] = Call(component, open_session(Path(place) / f"{number}.onnx", threads=threads))

    def _keep(self, cell: Cell | None) -> Keep:
        return self.plan.tokens if cell is None else cell.keep

    def run(self, runs: int) -> Times:
        samples: dict[tuple[str, Any], list[float]] = {key: [] for key in self.calls}
        for number in range(_WARMUP + runs):
            for key, call in self.calls.items():
                took = call()
                if number >= _WARMUP:
                    samples[key].append(1000 * took)
        found: Times = {}
        for cell in self.cells:
            vision, prefill = samples["vision", cell], samples["prefill", self._keep(cell)]
            base = vision if cell is None else samples["vision", Cell(_REFERENCE, cell.keep)]
            own = [a - b for a, b in zip(vision, base, strict=True)]
            low, _, high = statistics.quantiles(own, n=4, method="inclusive") if len(own) > 1 else own * 3
            middle = statistics.median(own)
            found[cell] = Time(statistics.median(vision), statistics.median(prefill), middle, (low, high))
        return found


class Call:
    """One graph with inputs of its own; what a language model remembers is bound in place, as in a bundle."""

    def __init__(self, component: Component, session: ort.InferenceSession) -> None:
        rng = np.random.default_rng(0)
        self._session, self._binding = session, session.io_binding()
        self._held = []
        for name, tensor in component.inputs.items():
            value = tensor.numpy()
            if name == "pixel_values":
                value = rng.normal(0, 1, value.shape).astype(value.dtype)
            if name.startswith("past_"):
                buffer = ort.OrtValue.ortvalue_from_numpy(value, "cpu", 0)
                self._held.append(buffer)
                self._binding.bind_ortvalue_input(name, buffer)
                self._binding.bind_ortvalue_output(name.replace("past_", "present_", 1), buffer)
            else:
                self._held.append(value)
                self._binding.bind_cpu_input(name, value)
        for name in component.outputs:
            if not name.startswith("present_"):
                self._binding.bind_output(name, "cpu")

    def __call__(self) -> float:
        """Run once; seconds."""
        start = time.perf_counter()
        self._session.run_with_iobinding(self._binding)
        return time.perf_counter() - start
