"""Predicted FLOPs of every graph beside those counted in it; writes docs/costs.md.

    python benchmarks/costs.py [NAME …] [--write]

Every must family on its tiny model, cut to half of its visual tokens, two image sizes; and a model of real size, whose
weights are left unset: an export asks for shapes alone. Nothing is run.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import exports
import families
import torch
from transformers import LlavaConfig, Qwen2Config, SiglipVisionConfig
from vlmcut import pipeline
from vlmcut.exporters import onnx
from vlmcut.exporters.components import components
from vlmcut.exporters.flops import Counted, count
from vlmcut.exporters.operators import Contrib
from vlmcut.manifest import Bucket, Panel, TokenBudget
from vlmcut.passes import folder
from vlmcut.passes.prune_tokens import PruneTokens
from vlmcut.passes.recipe import make
from vlmcut.surgery.costs import Work, predict
from vlmcut.surgery.load import attach, describe, skeleton
from vlmcut.surgery.selection import attached


@dataclass(frozen=True)
class Line:
    """One graph."""

    model: str
    graph: str
    predicted: Work
    counted: Counted

    @property
    def ratio(self) -> float:
        return self.predicted.flops / self.counted.flops


def tiny(kind: str) -> tuple[Any, TokenBudget]:
    """The tiny model of a family, cut to half of its tokens."""
    asked = families.request(kind, "onnx")
    planned = pipeline.plan(pipeline.Request(model=f"tiny:{kind}", **asked))
    loaded = folder.load(f"tiny:{kind}", sizes=families.buckets(kind))
    planned.recipe.apply(loaded.model, None)
    return loaded.model, planned.budgets[0]


def llava(vision: dict[str, Any], language: dict[str, Any]) -> Any:
    """SigLIP and Qwen2 in the layout of LLaVA, as benchmarks/real_size.py has them; weights are unset."""
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(**vision, vision_use_head=False),
        text_config=Qwen2Config(**language, tie_word_embeddings=True),
        image_token_index=7, vision_feature_layer=-1, vision_feature_select_strategy="full", tie_word_embeddings=True,
    )  # fmt: skip
    size = vision["image_size"]
    side = size // vision["patch_size"]
    bucket = Bucket(
        size=(size, size), geometry={"pixel_values": (1, 3, size, size)}, tokens=side**2,
        panels=(Panel(rows=side, columns=side),),
    )  # fmt: skip
    return attach(skeleton(config), (bucket,))


def llava_siglip_qwen2() -> tuple[Any, TokenBudget]:
    """SigLIP-so400m/14-384 and Qwen2-0.5B; 182 of 729 tokens by divprune."""
    model = llava(exports.VISION, exports.LANGUAGE)
    make([PruneTokens(keep=182, method="divprune")]).apply(model, None)
    return model, TokenBudget(images=1, visual_tokens=182, text_tokens=64, new_tokens=128)


REAL = {"llava: SigLIP-so400m + Qwen2-0.5B": llava_siglip_qwen2}
NAMES = [kind for kind in families.SIZES if kind != "fast_vlm"] + list(REAL)  # fast_vlm needs timm


def lines(name: str) -> Iterator[Line]:
    """Export the graphs of a model, one after the other, and count them."""
    model, budget = REAL[name]() if name in REAL else tiny(name)
    a, number = describe(model), 0
    several = len(attached(model).buckets) > 1
    for component in components(model, budget, a.keep):
        graph, bucket = component.role, 0
        if component.role == "vision":
            graph, bucket = f"vision {a.buckets[number].name}" if several else "vision", number
            number += 1
        counted = count(onnx.export(component, model, Contrib()))
        yield Line(name, graph, predict(a, budget, component.role, bucket), counted)


_HEAD = (
    "| model | graph | MFLOP predicted | counted | ratio | MB of weights predicted | counted | MB of states |\n"
    "|---|---|---:|---:|---:|---:|---:|---:|"
)
_PAGE = Path(__file__).parents[1] / "docs" / "costs.md"
_MARKS = ("<!-- made by benchmarks/costs.py -->", "<!-- end -->")


def row(line: Line) -> str:
    """A row of the table."""
    want, have = line.predicted, line.counted
    return (
        f"| {line.model} | {line.graph} | {want.flops / 1e6:,.3f} | {have.flops / 1e6:,.3f} | {line.ratio:.4f} | "
        f"{want.weight_bytes / 1e6:,.3f} | {have.weight_bytes / 1e6:,.3f} | {have.state_bytes / 1e6:,.3f} |"
    )


def write(rows: Sequence[str]) -> None:
    """Put a table between the marks of docs/costs.md; models that were not counted now keep their rows."""
    page = _PAGE.read_text()
    head, rest = page.split(_MARKS[0])
    old, tail = rest.split(_MARKS[1])
    made = {text.split("|")[1].strip() for text in rows}
    known = [text for text in old.splitlines() if text.startswith("| ") and text.split("|")[1].strip() not in made]
    order = sorted([*known, *rows], key=lambda text: [*NAMES, "model"].index(text.split("|")[1].strip()))
    table = "\n".join([_HEAD, *(text for text in order if not text.startswith("| model "))])
    _PAGE.write_text(f"{head}{_MARKS[0]}\n{table}\n{_MARKS[1]}{tail}")


def main() -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES, help="; ".join(NAMES))
    parser.add_argument("--write", action="store_true", help="write the rows into docs/costs.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(_HEAD)
    for name in options.names:
        rows = []
        for line in lines(name):
            rows.append(row(line))
            print(rows[-1], flush=True)
        if options.write:
            write(rows)


if __name__ == "__main__":
    sys.exit(main())
