"""What choosing tokens costs inside the vision graph, beside the tower; writes docs/selection-cost.md.

    python benchmarks/selection.py [METHOD …] [--sizes 576,2880,5x576] [--shares 0.25,0.1] [--write]

Towers are CLIP ViT-L/14-336 as LLaVA runs it (23 blocks, 1024 wide) with random weights: speed does not ask what a
weight says. 576 tokens are one picture of LLaVA-1.5, 2880 the five tiles of a 672x672 picture of LLaVA-NeXT, 5x576 a
clip of five frames, for methods that compare frames. The language model is one layer of Vicuna-7B's width without its
MLP, enough for the projector and for what a method asks of the first layer.

The selection is a graph of its own: what the tower gives (tokens, queries and keys) is its input, the tokens that go on
are its output, as the exporter makes it. It and the tower run in turn in one process, so a drifting clock hits both.
Of a method inside the tower there is no such graph: its whole vision graph is timed against that of `uniform`, and the
difference counts, which is negative where it saves more than it costs. `--whole` does this for every method, too.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from real_size import machine
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig
from vlmcut.errors import PassError
from vlmcut.exporters import onnx
from vlmcut.exporters.components import Component, Vision
from vlmcut.exporters.operators import Contrib
from vlmcut.exporters.weights import WeightFile
from vlmcut.passes.prune_tokens import PruneTokens
from vlmcut.passes.tokens.method import parse
from vlmcut.passes.tokens.methods import METHODS
from vlmcut.passes.trim_tower import TrimTower
from vlmcut.processors import Processor
from vlmcut.runtime.sessions import open_session
from vlmcut.surgery import tiny
from vlmcut.surgery.load import attach, describe, locate, make_buckets
from vlmcut.surgery.selection import Selection, Text, TowerState, attached
from vlmcut.surgery.vision import look, prepare

PAGE = Path(__file__).parents[1] / "docs" / "selection-cost.md"
SIDE, QUESTION = 336, 64  # pixels of a tile; tokens of the question
BARS = {"loop": 15.0, "no loop": 2.0}  # percent of the tower's time
SIZES = {  # family, pixels of a picture, frames
    "576": ("llava", (SIDE, SIDE), 1),
    "2880": ("llava_next", (2 * SIDE, 2 * SIDE), 1),
    "5x576": ("llava", (SIDE, SIDE), 5),
}
COLUMNS = (
    "method", "tokens kept", "nodes", "selection ms", "of it projector ms", "% of the tower", "bar %", "met",
    "whole graph ms", "export s",
)  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """One method at one size and budget; milliseconds are medians."""

    size: str
    method: str
    keep: int
    nodes: int  # of the selection's graph; of the whole one for a method inside the tower
    export_s: float
    selection_ms: float | None = None  # None: inside the tower
    projector_ms: float = 0.0  # of it, for a method that looks at projected tokens before they are chosen
    extra_ms: float | None = None  # whole vision graph minus that of `uniform`

    @property
    def counted_ms(self) -> float:
        """What is held against the bar."""
        found = self.extra_ms if self.selection_ms is None else self.selection_ms
        assert found is not None
        return found


class Tower(nn.Module):
    """pixel_values -> what the tower hands to a selector."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.prepared = prepare(model, attached(model).buckets[0].geometry)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return look(self.model, pixel_values, self.prepared)[0].tokens


class Projector(nn.Module):
    """The projector on every token."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        projector = locate(self.model).projector
        assert projector is not None
        return projector(tokens).clone()


class Everything:
    """A selector that looks at every block and chooses nothing."""

    method, text, outputs = "everything", False, ()

    def blocks(self, scored: Sequence[int]) -> Sequence[int]:
        return scored

    def leaving(self, tokens: int, keep: int, blocks: int) -> tuple[int, ...]:
        return ()


class Selecting(nn.Module):
    """The tensors of a state -> the tokens that go on, and their positions."""

    def __init__(self, model: Any, state: TowerState, selection: Selection, keep: int, breaks: tuple[int, ...]) -> None:
        super().__init__()
        self.model = model  # its projector is part of the graph where a method asks for projected tokens
        self.state, self.selection, self.keep, self.breaks = state, selection, keep, breaks
        self.projected = False

    def inputs(self) -> dict[str, Tensor]:
        found = {"tokens": self.state.tokens}
        for tap in self.state.taps:
            for call, (q, k) in enumerate(tap.rows):
                found |= {f"q_{tap.block}_{call}": q, f"k_{tap.block}_{call}": k}
        if self.state.text is not None:
            found |= {"text": self.state.text.embeddings, "text_mask": self.state.text.mask}
        return found

    def _project(self, tokens: Tensor) -> Tensor:
        self.projected = True
        return self.state.project(tokens)

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        rest: Iterator[Tensor] = iter(given)
        tokens = next(rest)
        state = replace(
            self.state,
            tokens=tokens,
            project=self._project,
            taps=tuple(replace(t, rows=tuple((next(rest), next(rest)) for _ in t.rows)) for t in self.state.taps),
            text=None if self.state.text is None else Text(next(rest), next(rest)),
        )
        choice = self.selection.choose(state, self.keep, self.breaks)
        features = choice.take(tokens[0]) if choice.features is None else choice.features[0]
        return features.clone(), choice.kept.clone()


def build(size: str) -> Any:
    """A model of this size with random weights, its dead end removed."""
    kind, picture, frames = SIZES[size]
    small, processor = tiny.make(kind)
    config = copy.deepcopy(small.config)
    config.vision_config = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=SIDE,
        patch_size=14, projection_dim=768,
    )  # fmt: skip
    config.text_config = LlamaConfig(
        hidden_size=4096, intermediate_size=64, num_hidden_layers=1, num_attention_heads=32,
        vocab_size=small.config.text_config.vocab_size,
    )  # fmt: skip
    config.image_seq_length = (SIDE // 14) ** 2
    processor.patch_size = 14
    square = {"height": SIDE, "width": SIDE}
    options: dict[str, Any] = {"size": square, "crop_size": square}
    if kind == "llava_next":
        config.image_grid_pinpoints = [list(picture)]
        options = {"size": {"shortest_edge": SIDE}, "crop_size": square, "image_grid_pinpoints": [list(picture)]}
    processor.image_processor = type(processor.image_processor)(**options)
    torch.manual_seed(0)
    model: Any = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:  # keeps activations near 1 through all layers
            parameter.data.normal_(0, 0.5 / parameter[0].numel() ** 0.5)
    attach(model, make_buckets(config, Processor(processor), (picture,), frames))
    TrimTower().apply(model, describe(model))
    return model


def budget(model: Any, method: str, share: float) -> int:
    """The number of kept tokens nearest to a share of all that the method can meet.

    Raises:
        PassError: none within a quarter of it.
    """
    a = describe(model)
    target = round(share * (a.buckets[0].tokens - len(a.buckets[0].line_breaks)))
    refusal: PassError | None = None
    for keep in sorted(range(round(0.75 * target), round(1.25 * target) + 1), key=lambda k: abs(k - target)):
        try:
            PruneTokens(keep=keep, method=method).plan(a)
            return keep
        except PassError as error:
            refusal = refusal or error
    assert refusal is not None
    raise refusal


class Timed:
    """A graph as ONNX Runtime runs it, with its inputs; `ms` of all runs so far."""

    def __init__(self, model: Any, module: nn.Module, inputs: dict[str, Tensor], outputs: Sequence[str]) -> None:
        start = time.perf_counter()
        component = Component(role="vision", module=module, inputs=inputs, outputs=tuple(outputs))
        graph = onnx.export(component, model, Contrib())
        self.export_s = time.perf_counter() - start
        self.nodes = sum(1 for _ in graph.graph)
        with tempfile.TemporaryDirectory() as folder:
            with WeightFile(Path(folder)) as weights:
                path = weights.save(graph, "graph.onnx")
            self.session = open_session(path, threads=torch.get_num_threads())
        wanted = {x.name for x in self.session.get_inputs()}
        self.feeds = {name: x.numpy() for name, x in inputs.items() if name in wanted}
        self.ms: list[float] = []
        self.session.run(None, self.feeds)  # a warm-up

    def run(self) -> None:
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter  # the first ignores neighbours
        start = clock()
        self.session.run(None, self.feeds)
        self.ms.append(1000 * (clock() - start))

    @property
    def median(self) -> float:
        return statistics.median(self.ms)


class Bench:
    """One size: its model, its tower as a graph, and what the tower hands on for one random picture."""

    def __init__(self, size: str, rounds: int, runs: int) -> None:
        self.size, self.rounds, self.runs = size, rounds, runs
        self.model = build(size)
        self.about = attached(self.model)
        bucket = self.about.buckets[0]
        self.pixels = {"pixel_values": torch.randn(bucket.pixels)}
        self.tower = Timed(self.model, Tower(self.model), self.pixels, ["tokens"])
        everything: Any = Everything()
        self.about.selection = Selection(everything, (bucket.tokens,))
        with torch.no_grad():
            self.state = look(self.model, self.pixels["pixel_values"], prepare(self.model, bucket.geometry))[1]
        self.about.selection = None
        width = self.model.config.get_text_config().hidden_size
        self.text = Text(torch.randn(1, QUESTION, width), torch.ones(1, QUESTION))
        self.projector: Timed | None = None

    def cost(self, method: str, share: float, whole: bool) -> Cost:
        """Measure one method, tower and selection in turn.

        Raises:
            PassError: the method cannot work here.
        """
        keep = budget(self.model, method, share)
        row, _ = parse(method, METHODS, "method")
        PruneTokens(keep=keep, method=method).apply(self.model, describe(self.model))
        selection, bucket = self.about.selection, self.about.buckets[0]
        assert selection is not None
        try:
            extra = self._extra(method, keep) if whole or row.inside else None
            if row.inside:
                assert extra is not None
                return Cost(self.size, method, keep, extra[1].nodes, extra[1].export_s, extra_ms=extra[0])
            wanted = selection.selector.blocks([tap.block for tap in self.state.taps])
            taps = {tap.block: tap for tap in self.state.taps}
            state = replace(self.state, taps=tuple(taps[b] for b in wanted), text=self.text if row.text else None)
            module = Selecting(self.model, state, selection, keep, bucket.line_breaks)
            with torch.no_grad():
                module(*module.inputs().values())  # the exporter would undo what it writes down
            alone = Timed(self.model, module, module.inputs(), ["features", "kept"])
            projector = self._projector() if module.projected else None
            for _ in range(self.rounds):
                self.tower.run()
                for _ in range(self.runs):
                    alone.run()
                    if projector is not None:
                        projector.run()
            return Cost(
                self.size, method, keep, alone.nodes, alone.export_s, alone.median,
                0.0 if projector is None else projector.median, None if extra is None else extra[0],
            )  # fmt: skip
        finally:
            self.about.selection = None

    def _projector(self) -> Timed | None:
        """On all tokens; None for a family whose tower holds it already."""
        if self.projector is None and isinstance(self.state.project, nn.Module):
            self.projector = Timed(self.model, Projector(self.model), {"tokens": self.state.tokens}, ["features"])
        return self.projector

    def _extra(self, method: str, keep: int) -> tuple[float, Timed]:
        """Milliseconds of the whole vision graph beyond those of `uniform`'s, and the graph."""
        bucket = self.about.buckets[0]
        question = {"text_ids": torch.ones(1, QUESTION, dtype=torch.int64), "text_length": torch.tensor([QUESTION])}
        inputs = self.pixels | (question if parse(method, METHODS, "method")[0].text else {})
        mine = Timed(self.model, Vision(self.model, bucket, keep), inputs, ["image_features", "kept"])
        before, self.about.selection = self.about.selection, None
        PruneTokens(keep=keep, method="uniform").apply(self.model, describe(self.model))
        plain = Timed(self.model, Vision(self.model, bucket, keep), self.pixels, ["image_features", "kept"])
        self.about.selection = before
        for _ in range(self.rounds):
            plain.run()
            mine.run()
        return mine.median - plain.median, mine


_FEW_STEPS = ("dart", "fastvid")  # greedy too, in a number of steps that does not grow with the tokens kept


@dataclass
class Report:
    """What was measured, and under what load."""

    costs: list[Cost]
    tower_ms: dict[str, float]
    refused: dict[tuple[str, str], str]
    threads: int
    load: str

    def loops(self, cost: Cost) -> bool:
        """Whether a method takes token after token: its graph is larger where it keeps more."""
        if cost.method in _FEW_STEPS:
            return True
        same = [c.nodes for c in self.costs if (c.size, c.method) == (cost.size, cost.method)]
        return max(same) > 1.5 * min(same) if len(same) > 1 else cost.nodes > 3 * cost.keep

    def table(self, size: str) -> str:
        """Markdown, dearest first."""
        tower = self.tower_ms[size]
        lines = [row(*COLUMNS), "|---|" + "---:|" * (len(COLUMNS) - 1)]
        for c in sorted((c for c in self.costs if c.size == size), key=lambda c: -c.counted_ms):
            bar = BARS["loop" if self.loops(c) else "no loop"]
            percent = 100 * c.counted_ms / tower
            lines.append(
                row(
                    c.method,
                    c.keep,
                    c.nodes,
                    "inside the tower" if c.selection_ms is None else f"{c.selection_ms:.2f}",
                    f"{c.projector_ms:.1f}" if c.projector_ms else "",
                    f"{percent:.2f}",
                    f"{bar:g}",
                    "yes" if percent < bar else "no",
                    "" if c.extra_ms is None else f"{c.extra_ms:+.1f}",
                    f"{c.export_s:.0f}",
                )
            )
        return "\n".join(lines)

    def page(self) -> str:
        """The whole page; no cell of it is written by hand."""
        on = machine()
        runtime = next(number for name, number in on["versions"].items() if name.startswith("onnxruntime"))
        clock = "CPU time" if self.threads == 1 else "wall time"
        parts = [
            f"""# What choosing tokens costs

Written by `python benchmarks/selection.py {" ".join(sys.argv[1:])}` on {datetime.date.today()}: {on["cpu"]},
{on["cores"]} cores, {self.threads} thread, load {self.load}; torch {on["versions"]["torch"]}, ONNX Runtime {runtime}.

The selection alone, as a graph of its own, beside the tower (CLIP ViT-L/14-336, 23 blocks, random weights) in the same
process, medians of runs in turn, {clock}, float32. A method whose graph grows with the tokens kept takes
them one after another, as dart and fastvid do in few steps, and may cost {BARS["loop"]:g} % of the tower's time, any
other {BARS["no loop"]:g} %. "Of it projector": the method looks at projected tokens, so the projector runs on all of
them before the choice, and not on those kept alone. "Whole graph": milliseconds beyond the same graph with
`uniform`, which is all that can be said of a method inside the tower.
"""
        ]
        for size, tower in self.tower_ms.items():
            kind, (height, width), frames = SIZES[size]
            what = f"{frames} frames of {height}x{width}" if frames > 1 else f"a picture of {height}x{width}"
            parts.append(f"## {size} tokens: {what} ({kind}), tower {tower:.0f} ms\n\n{self.table(size)}\n")
        if self.refused:
            lines = [f"- {size}, {method}: {why}" for (size, method), why in self.refused.items()]
            parts.append("Not measured:\n\n" + "\n".join(lines) + "\n")
        return "\n".join(parts)


def measure(sizes: Sequence[str], methods: Sequence[str], shares: Sequence[float], options: Any) -> Report:
    """All methods at all sizes and shares; a line on stdout for each as it is done."""
    found = Report([], {}, {}, options.threads, load())
    for size in sizes:
        frames = SIZES[size][2] > 1
        named = [m for m in methods if parse(m, METHODS, "method")[0].frames == frames or (frames and m == "uniform")]
        bench = Bench(size, options.rounds, options.runs)
        for method in named:
            for share in shares:
                try:
                    cost = bench.cost(method, share, options.whole)
                except PassError as error:
                    found.refused[size, method] = str(error)
                    continue
                found.costs.append(cost)
                found.tower_ms[size] = bench.tower.median
                print(f"{size} {cost}", flush=True)
        if bench.tower.ms:
            found.tower_ms[size] = bench.tower.median
    return found


def row(*cells: Any) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def load() -> str:
    """Of the last minute, and how many cores there are for it."""
    return f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"


def main() -> None:
    """Measure and print the page; with --write, write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help="with options as name:option=value; all if none is given")
    parser.add_argument("--sizes", default=",".join(SIZES), help="comma-separated")
    parser.add_argument("--shares", default="0.25,0.1", help="of the tokens that are kept, comma-separated")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="runs of the tower for each method and share")
    parser.add_argument("--runs", type=int, default=5, help="runs of the selection after each of the tower's")
    parser.add_argument("--whole", action="store_true", help="time whole vision graphs too, of every method")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    options = parser.parse_args()
    sizes = options.sizes.split(",")
    if unknown := set(sizes) - set(SIZES):
        parser.error(f"no size `{min(unknown)}`; choose from {', '.join(SIZES)}")
    if options.write and options.methods:
        parser.error("--write needs all methods")
    torch.set_num_threads(options.threads)
    report = measure(sizes, options.methods or list(METHODS), [float(s) for s in options.shares.split(",")], options)
    print(report.page())
    if options.write:
        PAGE.write_text(report.page())


if __name__ == "__main__":
    main()
