"""Every must family end to end, proven on a tiny random model of it; writes docs/families.md.

    python benchmarks/families.py [KIND …] [--write]

For each family: cut to half of its visual tokens, two image sizes, two images in a prompt, then

- eager: `generate` of transformers, given the cut features and the shrunk prompt, says what vlmcut's eager model says;
- ONNX: graphs against the eager model in float64 on inputs that no trace has seen, and 16 greedy tokens for each;
- RTX: lint, and engines of the same cut built ahead of time for TensorRT-RTX;
- run: the bundle answers in a process that cannot import torch, with two pictures and with none, token for token as the
  eager model.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.modeling_outputs import BaseModelOutputWithPooling
from vlmcut import api
from vlmcut.errors import VlmcutError
from vlmcut.passes import folder, recipe
from vlmcut.prompt import Prompt, Prompter
from vlmcut.surgery.load import Loaded, describe
from vlmcut.surgery.selection import attached
from vlmcut.surgery.talk import Talk, greedy, see_all, stop_ids
from vlmcut.surgery.vision import Seen

TOKENS = 16
TOLERANCE = 1e-4  # of logits, absolute, float32
PROMPT = "What is in <image> and in <image>?"
ALONE = "What is red?"  # a prompt without pictures

# kind -> two sizes of picture, height and width; families of one fixed size make the same of both
SIZES: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {
    "llava": ((32, 32), (48, 30)),
    "llava-siglip-qwen2": ((40, 40), (30, 48)),
    "llava_next": ((64, 64), (40, 100)),
    "llava_onevision": ((64, 64), (90, 40)),
    "qwen2_vl": ((64, 96), (160, 64)),
    "qwen2_5_vl": ((64, 96), (160, 64)),
    "qwen3_vl": ((64, 96), (160, 64)),
    "internvl": ((32, 32), (40, 100)),
    "smolvlm": ((64, 64), (40, 100)),
    "idefics3": ((64, 64), (30, 90)),
    "paligemma": ((40, 40), (64, 48)),
    "gemma3": ((32, 32), (64, 48)),
    "mistral3": ((64, 64), (40, 100)),
    "pixtral": ((64, 64), (40, 100)),
    "lfm2_vl": ((64, 64), (90, 30)),
    "fast_vlm": ((192, 192), (64, 90)),
}


@dataclass(frozen=True)
class Proof:
    """What was found for one family."""

    kind: str
    tokens: str  # visual tokens of the two sizes, before -> after
    method: str
    eager: str  # equal greedy tokens of transformers' generate, of all compared
    logits: float  # worst absolute error of a logit, ONNX Runtime against float64
    onnx: str  # equal greedy tokens, of all compared
    rtx: str  # engines built
    run: str  # equal tokens in the torch-free run
    seconds: float


def buckets(kind: str) -> tuple[tuple[int, int], ...]:
    """The two sizes, or the first alone where the family makes the same of both."""
    try:
        api.inspect(f"tiny:{kind}", image_size=SIZES[kind])
    except VlmcutError as error:
        if "become the same" not in str(error):
            raise
        return SIZES[kind][:1]
    return SIZES[kind]


def pictures(kind: str) -> list[Image.Image]:
    """Two pictures of the family's sizes, seeded."""
    rng = np.random.default_rng(3)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in SIZES[kind]]


def request(kind: str, target: str) -> dict[str, Any]:
    """Half of the tokens, room for two images."""
    scored = describe(folder.load(f"tiny:{kind}").model).scored
    return {
        "prune": 0.5, "method": "fastervlm" if scored else "divprune", "image_size": buckets(kind), "images": 2,
        "text_tokens": 80, "new_tokens": TOKENS, "target": target,
    }  # fmt: skip


def cut_model(kind: str, bundle: Path) -> Loaded:
    """The eager model of a bundle: the tiny model, cut by its recipe."""
    loaded = folder.load(f"tiny:{kind}", sizes=buckets(kind))
    recipe.read(bundle / "recipe.toml").apply(loaded.model, None)
    return loaded


def eager_tokens(loaded: Loaded, images: list[Image.Image], text: str = PROMPT) -> tuple[list[int], Prompt, list[Seen]]:
    """Greedy tokens of vlmcut's eager reader, with the shrunk prompt and what the pictures became."""
    prompter = Prompter(loaded.processor, describe(loaded.model).layout)
    prompt, seen = see_all(loaded.model, prompter(images, text))
    talk = Talk.read(loaded.model, [prompt], [seen])
    return greedy(talk, TOKENS, stop_ids(loaded.model))[0], prompt, seen


@torch.no_grad()
def transformers_tokens(model: Any, prompt: Prompt, seen: list[Seen]) -> list[int]:
    """Greedy tokens of `generate`, given the features: transformers lays out positions, masks and cache itself."""
    ids, index = torch.from_numpy(prompt.input_ids), torch.from_numpy(prompt.visual_index)
    features: Any = tuple(s.features for s in seen)
    base = model.base_model
    if model.config.model_type in ("internvl", "paligemma", "gemma3", "fast_vlm"):  # these take one tensor
        features = torch.cat(features)[None]
    out = BaseModelOutputWithPooling(pooler_output=features)
    if seen[0].levels:
        out.deepstack_features = [tuple(s.levels[i] for s in seen) for i in range(len(seen[0].levels))]
    given: dict[str, Any] = {"mm_encoder_outputs": {"image": out}, "attention_mask": torch.ones_like(ids)}
    prefix = attached(model).family.prefix
    if prefix != "causal":
        given["token_type_ids"] = (index >= 0).long() if prefix == "image" else torch.zeros_like(ids)
    if prompt.layout.axes == 3:
        rows = torch.from_numpy(prompt.position_ids)[:, None]
        given["position_ids"] = torch.cat([torch.arange(ids.shape[1])[None, None], rows])
        base.rope_deltas = torch.zeros(1, 1, dtype=torch.int64)
    out = model.generate(input_ids=ids, max_new_tokens=TOKENS, do_sample=False, **given)
    said = out[0, ids.shape[1] :].tolist()
    stop = stop_ids(model)
    return said[: next((i for i, token in enumerate(said) if token in stop), len(said))]


_TORCH_FREE = """
import json, sys
for name in ("torch", "torchvision"):
    sys.modules[name] = None  # any import of it fails
from vlmcut.runtime.bundle import Bundle
bundle, prompt, alone, images = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:]
one = Bundle(bundle)
print(json.dumps([list(one.tokens(one.prompt(images, prompt))), list(one.tokens(one.prompt([], alone)))]))
"""


def run_tokens(bundle: Path, images: list[Image.Image]) -> list[int]:
    """Tokens of the bundle in a process without torch, after a prompt with pictures and after one without."""
    with tempfile.TemporaryDirectory() as place:
        paths = [Path(place) / f"{i}.png" for i in range(len(images))]
        for image, path in zip(images, paths, strict=True):
            image.save(path)
        command = [sys.executable, "-c", _TORCH_FREE, str(bundle), PROMPT, ALONE, *map(str, paths)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise RuntimeError(done.stderr)
    seen, alone = json.loads(done.stdout.strip().splitlines()[-1])
    return seen + alone


def _equal(have: list[int], want: list[int]) -> str:
    return f"{sum(a == b for a, b in zip(have, want, strict=False))}/{max(len(have), len(want))}"


def prove(kind: str, *, rtx: bool = True) -> Proof:
    """Everything about one family."""
    start = time.monotonic()
    images = pictures(kind)
    with tempfile.TemporaryDirectory() as place:
        bundle = Path(place) / "bundle"
        asked = request(kind, "onnx")
        manifest = api.convert(f"tiny:{kind}", bundle, **asked)
        loaded = cut_model(kind, bundle)
        said, prompt, seen = eager_tokens(loaded, images)
        theirs = transformers_tokens(loaded.model, prompt, seen)
        quiet, _, _ = eager_tokens(loaded, [], ALONE)
        ran = run_tokens(bundle, images)
        built = "-"
        if rtx:
            second = api.convert(f"tiny:{kind}", Path(place) / "rtx", **request(kind, "rtx"))
            plans = [graph.engine for graph in second.graphs.values()]
            built = f"{sum(plan is not None for plan in plans)}/{len(plans)}"
    logits = [row["max_abs"] for row in manifest.exactness["rows"] if row["output"] == "logits"]
    before = "+".join(str(attached(loaded.model).buckets[p.bucket(manifest.buckets)].tokens) for p in prompt.pictures)
    return Proof(
        kind=kind,
        tokens=f"{before} -> {'+'.join(map(str, prompt.counts))}",
        method=asked["method"],
        eager=_equal(theirs, said),
        logits=max(logits),
        onnx=f"{manifest.exactness['equal']}/{manifest.exactness['tokens']}",
        rtx=built,
        run=_equal(ran, said + quiet),
        seconds=time.monotonic() - start,
    )


_HEAD = (
    "| family | visual tokens of two images | method | transformers' `generate` | ONNX: worst logit error | "
    "ONNX: tokens | RTX engines | torch-free run | date |\n|---|---|---|---|---|---|---|---|---|"
)


def rows(proofs: list[Proof], day: str) -> dict[str, str]:
    """A Markdown row for each proof, by kind."""
    return {
        p.kind: f"| {p.kind} | {p.tokens} | {p.method} | {p.eager} | {p.logits:.1e} | {p.onnx} | {p.rtx} | {p.run} "
        f"| {day} |"
        for p in proofs
    }


_PAGE = Path(__file__).parents[1] / "docs" / "families.md"
_MARKS = ("<!-- made by benchmarks/families.py -->", "<!-- end -->")


def write(made: dict[str, str]) -> None:
    """Put rows between the marks of docs/families.md; rows of kinds that were not proven now stay, with their dates."""
    page = _PAGE.read_text()
    head, rest = page.split(_MARKS[0])
    old, tail = rest.split(_MARKS[1])
    kept = {line.split("|")[1].strip(): line for line in old.splitlines() if line.startswith("| ")}
    lines = [row for kind in SIZES if (row := (kept | made).get(kind))]
    text = "\n".join([_HEAD, *lines])
    _PAGE.write_text(f"{head}{_MARKS[0]}\n{text}\n{_MARKS[1]}{tail}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=list(SIZES))
    parser.add_argument("--write", action="store_true", help="write the rows into docs/families.md")
    options = parser.parse_args()
    made: dict[str, str] = {}
    with _quiet():
        for kind in options.kinds:
            proof = prove(kind)
            print(proof, file=sys.stderr, flush=True)
            made |= rows([proof], datetime.date.today().isoformat())
            if options.write:
                write(made)
    print("\n".join([_HEAD, *made.values()]))


if __name__ == "__main__":
    main()
