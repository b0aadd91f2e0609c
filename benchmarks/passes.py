"""What each cut predicts and what it buys on a model of real size; writes docs/costs.md.

    python benchmarks/passes.py [RECIPE …] [--threads 1] [--runs 3] [--small] [--write]

SigLIP-so400m and Qwen2-0.5B with random weights, one image of 729 tokens, 64 text tokens, 128 new ones, float32 graphs
for ONNX Runtime. Recipes name what goes, so nothing is calibrated: work and time do not ask which heads go. Graphs that
a recipe leaves alone, or that another one has too, are not made. Each other one runs in turn with the original's
(`alone.py`), so that a busy machine hits both.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import costs
import exports
import numpy as np
import torch
from alone import Runs, race
from cuts import recipes
from vlmcut.exporters import onnx
from vlmcut.exporters.components import Component, components
from vlmcut.exporters.flops import count
from vlmcut.exporters.operators import Contrib
from vlmcut.exporters.weights import WeightFile
from vlmcut.manifest import TokenBudget
from vlmcut.passes.recipe import make
from vlmcut.surgery.anatomy import Anatomy, Idle
from vlmcut.surgery.costs import Work, predict
from vlmcut.surgery.load import describe
from vlmcut.validation.search_graphs import Graphs, Key

FIRST = ("vision", "prefill")  # what the first token takes
ROLES = (*FIRST, "decode")


@dataclass(frozen=True)
class Graph:
    """What one call does, and where it lies, if it is to run."""

    predicted: Work
    counted: Work
    path: Path


@dataclass(frozen=True)
class Race:
    """A cut graph, and its runs in turn with those of the original's; nothing ran with `--runs 0`."""

    graph: Graph
    pair: tuple[Runs, ...]

    @property
    def ratio(self) -> float:
        """Of the times, median over the rounds."""
        mine, whole = self.pair
        return float(np.median(mine.seconds / whole.seconds))


def budget(a: Anatomy) -> TokenBudget:
    return TokenBudget(
        images=1, visual_tokens=max(a.keep), text_tokens=64, new_tokens=128, ladder=a.ladder, carriers=a.carriers
    )


def visual_work(a: Anatomy) -> int:
    """FLOPs of the language model's prefill that the image takes: with it, minus those of the text alone."""
    text = replace(budget(a), images=0, ladder=(), carriers=0)
    alone = predict(replace(a, ladder=(), idle=Idle(), carriers=0), text, "prefill").flops
    return predict(a, budget(a), "prefill").flops - alone


def unset_model(small: bool) -> Any:
    """The original. Its tower is trimmed, which changes nothing; counting asks for shapes alone."""
    shallow = {"num_hidden_layers": 4}
    vision = exports.SMALL_VISION | shallow if small else exports.VISION
    model = costs.llava(vision, exports.SMALL_LANGUAGE | shallow if small else exports.LANGUAGE)
    make([]).apply(model, None)
    return model


def fill(model: Any) -> None:
    """Random weights that keep activations near 1."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.5 / parameter[0].numel() ** 0.5)
        else:
            parameter.data.fill_(0 if name.endswith("bias") else 1)


def inputs(component: Component, sizes: TokenBudget) -> dict[str, np.ndarray]:
    """Noise; a whole prompt whose image comes first; for decode the last token of the budget."""
    rng, found = np.random.default_rng(0), {}
    for name, tensor in component.inputs.items():
        noise = name in ("pixel_values", "image_features")
        found[name] = rng.normal(size=tensor.shape).astype(np.float32) if noise else tensor.numpy()
    if component.role == "prefill":
        column = np.arange(sizes.sequence)[None]
        found["visual_index"] = np.where(column < sizes.visual_tokens, column, -1)
    if component.role == "decode":
        found["length"], found["position_ids"] = np.array([sizes.cache]), np.array([[sizes.cache - 1]])
        if sizes.ladder:
            found["left"] = np.array([sizes.left(rung.layer) for rung in sizes.ladder])
    return found


def export(model: Any, roles: Sequence[str], folder: Path, save: bool) -> dict[str, Graph]:
    """Count the graphs of some roles, and write those that shall run with their inputs."""
    a, found = describe(model), {}
    with WeightFile(folder) as weights:
        for component in components(model, budget(a), a.keep):
            if component.role not in roles:
                continue
            made = onnx.export(component, model, Contrib())
            path = folder / f"{component.role}.onnx"
            found[component.role] = Graph(predict(a, budget(a), component.role), count(made), path)
            if save:
                weights.save(made, path.name)
                np.savez(path.with_suffix(".npz"), **inputs(component, budget(a)))  # type: ignore[arg-type]
    return found


class Bench:
    """The original model, its graphs, and what they take."""

    def __init__(self, small: bool, folder: Path, threads: int, runs: int) -> None:
        self.threads, self.runs, self.model = threads, runs, unset_model(small)
        if runs:
            fill(self.model)
        self.a = describe(self.model)
        self.recipes = recipes(self.a)
        self.graphs = export(self.model, ROLES, folder, bool(runs))
        both = self._race([self.graphs[role].path for role in FIRST])
        self.times = {role: float(np.median(one.seconds)) for role, one in zip(FIRST, both, strict=bool(runs))}
        sizes = budget(self.a)
        self._races: dict[Key, Race] = {}
        self._key = Graphs(
            (self.a, lambda: self.model), ROLES, 1, text_tokens=sizes.text_tokens, new_tokens=sizes.new_tokens
        ).key

    def _race(self, graphs: Sequence[Path]) -> tuple[Runs, ...]:
        return race(graphs, self.threads, self.runs) if self.runs else ()

    def rows(self, name: str, folder: Path) -> list[str]:
        """Cut, export what changed, run it beside the original: a row for each graph, and one for the first token."""
        recipe = make(self.recipes[name])
        a = recipe.plan(self.a)
        keys = {role: self._key(role, a) for role in ROLES if self._key(role, a) != self._key(role, self.a)}
        missing = [role for role, key in keys.items() if key not in self._races]
        # A cut takes new tensors for what it cuts: a copy may share all others.
        shared = {id(tensor): tensor for tensor in (*self.model.parameters(), *self.model.buffers())}
        cut = copy.deepcopy(self.model, shared)
        recipe.apply(cut, None)
        for role, graph in export(cut, missing, folder, bool(self.runs)).items():
            self._races[keys[role]] = Race(graph, self._race([graph.path, self.graphs[role].path]))
        races = {role: self._races[key] for role, key in keys.items()}
        found = [self._row(name, role, a, one) for role, one in races.items()]
        return [*found, self._first_token(name, races)]

    def _row(self, name: str, role: str, a: Anatomy, one: Race) -> str:
        mine, whole, flops = one.graph.predicted, self.graphs[role].predicted, one.graph.counted.flops
        return row(
            name, role, f"{mine.flops / 1e9:,.2f}", f"{flops / 1e9:,.2f}", f"{mine.flops / flops:.4f}",
            share(mine.flops, whole.flops),
            share(visual_work(a), visual_work(self.a)) if role == "prefill" else "",
            share(mine.state_bytes, whole.state_bytes) if role == "decode" else "",
            share(one.ratio, 1) if one.pair else "",
            "{:,.0f} ({:,.0f})".format(*(runs.memory / 1e6 for runs in one.pair)) if one.pair else "",
        )  # fmt: skip

    def _first_token(self, name: str, races: dict[str, Race]) -> str:
        """Vision and prefill together; one that the recipe leaves alone takes what the original's takes."""
        whole = {role: self.graphs[role].predicted.flops for role in FIRST}
        flops = sum(races[role].graph.predicted.flops if role in races else work for role, work in whole.items())
        work, took = share(flops, sum(whole.values())), ""
        if self.times:
            time = sum((races[role].ratio if role in races else 1) * time for role, time in self.times.items())
            took = share(time, sum(self.times.values()))
        return row(name, "first token", f"{flops / 1e9:,.2f}", "", "", work, "", "", took, "")


def share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %"


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


_HEAD = (
    "| recipe | graph | GFLOP predicted | counted | ratio | FLOPs | visual FLOPs | KV cache | time | peak MB |\n"
    "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|"
)
_PAGE = Path(__file__).parents[1] / "docs" / "costs.md"
_MARKS = ("<!-- made by benchmarks/passes.py -->", "<!-- end of passes -->")


def write(rows: Sequence[str], order: Sequence[str]) -> None:
    """Put rows between the marks of docs/costs.md; recipes that were not measured now keep theirs."""
    head, _, rest = _PAGE.read_text().partition(_MARKS[0])
    old, _, tail = rest.partition(_MARKS[1])
    known: dict[str, list[str]] = {name: [] for name in order}
    for text in old.splitlines():
        if (name := text.strip("| ").partition(" |")[0]) in known:
            known[name].append(text)
    new = dict.fromkeys(text.strip("| ").partition(" |")[0] for text in rows)
    table = [
        text for name in order for text in (rows if name in new else known[name]) if text.startswith(f"| {name} |")
    ]
    _PAGE.write_text("\n".join([head + _MARKS[0], _HEAD, *table, _MARKS[1] + tail]))


def main() -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="RECIPE", help="all of them if none is named")
    parser.add_argument("--threads", type=int, default=1, help="of one operator")
    parser.add_argument("--runs", type=int, default=3, help="of each graph, after one to warm up; 0 to count alone")
    parser.add_argument("--small", action="store_true", help="four narrow layers on each side, to try the benchmark")
    parser.add_argument("--write", action="store_true", help="write the rows into docs/costs.md, recipe by recipe")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(options.small, Path(place), options.threads, options.runs)
        if unknown := set(options.names) - set(bench.recipes):
            parser.error(f"no recipe `{min(unknown)}`; choose from: {'; '.join(bench.recipes)}")
        print(_HEAD)
        for name in options.names or bench.recipes:
            with tempfile.TemporaryDirectory() as folder:
                rows = bench.rows(name, Path(folder))
            print(*rows, sep="\n", flush=True)
            if options.write:
                write(rows, list(bench.recipes))


if __name__ == "__main__":
    sys.exit(main())
