"""TensorRT-RTX engines of every must family after each pass; writes docs/builds.md.

    python benchmarks/builds.py [FAMILY …] [--dtype float32,float16] [--write]

Each tiny model is cut, its graphs are exported in the operators of `--target rtx`, linted, and built ahead of time as
`convert` does, without a GPU. A graph that a pass leaves as it was is built once, with nothing cut. Whether graphs say
what the model says is proven elsewhere (`families.py`, the tests); nothing is run here. Families that are not named
keep their rows.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import families
import torch
from transformers import AutoModelForImageTextToText
from vlmcut.errors import ExportError, PassError
from vlmcut.exporters import onnx
from vlmcut.exporters.components import components
from vlmcut.exporters.lint import lint
from vlmcut.exporters.operators import for_target
from vlmcut.exporters.weights import WeightFile
from vlmcut.manifest import TokenBudget
from vlmcut.passes import folder
from vlmcut.passes.base import Pass
from vlmcut.passes.bottleneck import Bottleneck
from vlmcut.passes.calibration import Calibration
from vlmcut.passes.drop_heads import DropHeads
from vlmcut.passes.drop_layers import DropLayers
from vlmcut.passes.drop_neurons import DropNeurons
from vlmcut.passes.prune_inside import PruneInside
from vlmcut.passes.prune_tokens import PruneTokens, usual_method
from vlmcut.passes.recipe import make
from vlmcut.passes.skip_visual import SkipVisual
from vlmcut.passes.slim_visual import SlimVisual
from vlmcut.passes.trim_vocabulary import TrimVocabulary
from vlmcut.pipeline import DTYPES
from vlmcut.prompt import Prompt, Prompter
from vlmcut.surgery.anatomy import Anatomy
from vlmcut.surgery.families import family_of
from vlmcut.surgery.load import Loaded, attach, describe
from vlmcut.surgery.selection import attached
from vlmcut.surgery.tiny import weights
from vlmcut.validation.search_graphs import Graphs

NAMES = [kind for kind in families.SIZES if kind != "fast_vlm"]  # it needs timm
ROLES = ("vision", "prefill", "decode")


def _inside(method: str, *shares: float) -> Callable[[Anatomy], Pass]:
    """Rungs one after the other, from the first layer that may be one."""

    def step(a: Anatomy) -> Pass:
        first = max(1, a.language.levels)
        return PruneInside(method=method, layers=tuple(range(first, first + len(shares))), share=shares)

    return step


# A pass as a user names it -> how to make it for a model; all that is measured is measured.
SETTINGS: dict[str, Callable[[Anatomy], Pass]] = {
    "prune-tokens": lambda a: PruneTokens(
        keep=tuple(max(1, bucket.tokens // 2) for bucket in a.buckets), method=usual_method(a)
    ),
    "drop-heads vision": lambda a: DropHeads(part="vision", fraction=1 / max(a.tower.heads)),
    "drop-heads language": lambda a: DropHeads(part="language", fraction=1 / max(a.language.kv_heads)),
    "drop-layers vision": lambda a: DropLayers(part="vision", count=1),
    "drop-layers language": lambda a: DropLayers(part="language", count=1),
    "drop-neurons vision": lambda a: DropNeurons(part="vision", fraction=0.3),
    "drop-neurons language": lambda a: DropNeurons(part="language", fraction=0.3, ranking="global"),
    "trim-vocabulary": lambda a: TrimVocabulary(size=a.language.vocabulary * 9 // 10, unseen="unknown", unknown=0),
    "fastv, exit": _inside("fastv", 0.5, 0.0),
    "exit": _inside("exit", 0.0),
    "pyramiddrop": _inside("pyramiddrop", 0.5, 0.25),
    "fitprune": _inside("fitprune", 0.6, 0.3),
    "skip-visual mlp": lambda a: SkipVisual(what="mlp", count=1, layers=(0,)),
    "skip-visual layer": lambda a: SkipVisual(what="layer", count=1, layers=(0,)),
    "skip-visual apart": lambda a: SkipVisual(what="apart", count=1, layers=(0,)),
    "skip-visual near": lambda a: SkipVisual(what="near", count=1, layers=(0,), window=3),
    "slim-visual heads": lambda a: SlimVisual(what="heads", fraction=1 / max(a.language.heads), first=0),
    "slim-visual neurons": lambda a: SlimVisual(what="neurons", fraction=0.5),
    "bottleneck": lambda a: Bottleneck(carriers=1),
}
INSIDE = ("fastv, exit", "exit", "pyramiddrop", "fitprune")
_COLUMNS = ("skip-visual layer", "skip-visual apart", "skip-visual near", "slim-visual heads", "bottleneck")

# What a plan refuses, by a part of its reason: (setting, kind).
REFUSED: Mapping[str, frozenset[tuple[str, str]]] = {
    "its convolutions mix neighbouring columns": frozenset((name, "lfm2_vl") for name in (*INSIDE, *_COLUMNS)),
    "some layers of `gemma3` see 16 columns back": frozenset((name, "gemma3") for name in _COLUMNS),
}


def refusal(name: str, kind: str) -> str | None:
    """Why this pass cannot cut this family, or None."""
    return next((reason for reason, cells in REFUSED.items() if (name, kind) in cells), None)


def redrawn(loaded: Loaded, **text: Any) -> Loaded:
    """The same tiny model with other numbers in the config of its language model, and weights of its own."""
    config = copy.deepcopy(loaded.model.config)
    for name, value in text.items():
        setattr(config.get_text_config(), name, value)
    model = weights.draw(lambda: AutoModelForImageTextToText.from_config(config), 0, embeddings=0.05)
    model.generation_config = loaded.model.generation_config
    attach(model, attached(loaded.model).buckets)
    family_of(config).check(config)
    return Loaded(model, loaded.processor, loaded.source)


def many_groups(loaded: Loaded) -> Loaded:
    """With at least two KV heads in each layer: where it has one, as many as query heads."""
    text = loaded.model.config.get_text_config()
    if text.num_key_value_heads > 1:
        return loaded
    return redrawn(loaded, num_key_value_heads=text.num_attention_heads)


def deep(loaded: Loaded) -> Loaded:
    """With at least three language layers, so that two of them can be rungs."""
    text = loaded.model.config.get_text_config()
    if text.num_hidden_layers > 2:
        return loaded
    types = getattr(text, "layer_types", None)
    more: dict[str, Any] = {} if types is None else {"layer_types": [*types, types[-1]]}
    return redrawn(loaded, num_hidden_layers=3, **more)


def variant(name: str | None) -> Callable[[Loaded], Loaded] | None:
    """What a tiny model must have for a setting to have something to cut; None for nothing."""
    return many_groups if name == "drop-heads language" else deep if name in INSIDE else None


def original(kind: str, name: str | None = None, sizes: Sequence[tuple[int, int]] = ()) -> Loaded:
    """The tiny model that a setting cuts, for pictures of these sizes, or of the family's first one."""
    loaded = folder.load(f"tiny:{kind}", sizes=tuple(sizes) or families.SIZES[kind][:1])
    change = variant(name)
    return loaded if change is None else change(loaded)


def asked(loaded: Loaded, kind: str) -> Prompt:
    """A question about a picture of the family's first size."""
    prompter = Prompter(loaded.processor, describe(loaded.model).layout)
    return prompter(families.pictures(kind)[:1], families.ALONE)


def cut(kind: str, name: str) -> tuple[Anatomy, Loaded]:
    """A tiny model after one pass, and what it was with its tower trimmed."""
    loaded = original(kind, name)
    data = Calibration((asked(loaded, kind),), "one picture of noise", loaded.processor.tokenizer)
    trimmed = make([]).plan(describe(loaded.model))
    make([SETTINGS[name](trimmed)]).apply(loaded.model, data)
    return trimmed, loaded


def budget(a: Anatomy) -> TokenBudget:
    """Room for two images, or for one where a sliding window of 16 columns must hold the whole cache."""
    return TokenBudget(
        images=2 if a.language.window is None else 1, visual_tokens=max(a.keep), text_tokens=8, new_tokens=4,
        ladder=a.ladder, carriers=a.carriers,
    )  # fmt: skip


def changed(before: Anatomy, after: Anatomy) -> tuple[str, ...]:
    """Roles whose graphs a pass changes."""
    key = Graphs((before, lambda: None), ROLES, 1, text_tokens=8, new_tokens=4).key
    return tuple(role for role in ROLES if key(role, after) != key(role, before))


# A graph that TensorRT dies of must not take the others along.
_BUILD = """
import sys
from pathlib import Path
from vlmcut.errors import ExportError
from vlmcut.exporters.engines import build_engine
for name in sys.argv[1:]:
    print(Path(name).name, flush=True)
    try:
        build_engine(name, Path(name).with_suffix(".plan"), "rtx")
    except ExportError as error:
        sys.exit(str(error))
"""


def build(model: Any, roles: Sequence[str], dtype: str = "float32") -> int:
    """Export the graphs of these roles for TensorRT-RTX, lint them, build their engines.

    Returns:
        Engines built.

    Raises:
        ExportError: a lint error, or TensorRT refuses a graph or dies of it.
    """
    model.to(DTYPES[dtype])
    a = describe(model)
    with tempfile.TemporaryDirectory() as place:
        with WeightFile(Path(place)) as stored:
            for component in components(model, budget(a), a.keep, a.quantized):
                if component.role in roles:
                    stored.save(onnx.export(component, model, for_target("rtx")), f"{component.role}.onnx")
        graphs = sorted(Path(place).glob("*.onnx"))
        for path in graphs:
            for found in lint(path, "rtx"):
                if found.severity == "error":
                    raise ExportError(f"{path.name}: {found.rule} at `{found.node}`: {found.message}", hint=found.fix)
        done = subprocess.run([sys.executable, "-c", _BUILD, *map(str, graphs)], capture_output=True, text=True)
        if done.returncode < 0:
            raise ExportError(f"TensorRT dies of {done.stdout.split()[-1]} (signal {-done.returncode})")
        if done.returncode:
            raise ExportError(done.stderr)
        return len(list(Path(place).glob("*.plan")))


def cell(kind: str, name: str | None, dtype: str) -> str:
    """What happened: initials of the roles that were built, the number of a refusal, or an error."""
    reason = None if name is None else refusal(name, kind)
    if name is not None and reason is not None:
        try:
            cut(kind, name)
        except PassError as error:
            assert reason in str(error), f"{kind}, {name}: refused, but not because {reason}: {error}"
            return f"no ({list(REFUSED).index(reason) + 1})"
        raise AssertionError(f"{kind}, {name}: not refused, although {reason}")
    if name is None:
        loaded, roles = original(kind), ROLES
        make([]).apply(loaded.model, None)
    else:
        before, loaded = cut(kind, name)
        roles = changed(before, describe(loaded.model))
    try:
        assert build(loaded.model, roles, dtype) == len(roles) > 0
    except ExportError as error:
        return f"failed: {' '.join(str(error).split())}".replace("|", "/")
    return " ".join(role[0] for role in roles)


def row(kind: str, dtype: str) -> str:
    """A row of the table."""
    cells = [cell(kind, name, dtype) for name in (None, *SETTINGS)]
    return f"| {' | '.join([f'{kind}, {dtype}', *cells, datetime.date.today().isoformat()])} |"


_PAGE = Path(__file__).parents[1] / "docs" / "builds.md"
_MARKS = ("<!-- made by benchmarks/builds.py -->", "<!-- end -->")


def write(rows: Mapping[str, str]) -> None:
    """Put rows between the marks of docs/builds.md; models that were not built now keep theirs."""
    page = _PAGE.read_text()
    head, rest = page.split(_MARKS[0])
    old, tail = rest.split(_MARKS[1])
    kept = {text.split("|")[1].strip(): text for text in old.splitlines() if text.startswith("| ")}
    order = [f"{kind}, {dtype}" for dtype in DTYPES for kind in NAMES]
    titles = ["model", "nothing cut", *SETTINGS, "date"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    lines += [found[name] for name in order if name in (found := kept | dict(rows))]
    notes = [f"{i}. {reason}" for i, reason in enumerate(REFUSED, start=1)]
    body = "\n".join([*lines, "", "Refused by the plan, because:", "", *notes])
    _PAGE.write_text(f"{head}{_MARKS[0]}\n{body}\n{_MARKS[1]}{tail}")


def main() -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=NAMES, help=", ".join(NAMES))
    parser.add_argument("--dtype", default="float32,float16")
    parser.add_argument("--write", action="store_true", help="write the rows into docs/builds.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for dtype in options.dtype.split(","):
        for kind in options.kinds:
            made = row(kind, dtype)
            print(made, flush=True)
            if options.write:
                write({f"{kind}, {dtype}": made})


if __name__ == "__main__":
    sys.exit(main())
