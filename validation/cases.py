"""Recorded inputs with reference outputs, and the distance of running graphs from them. NumPy only.

The same code judges a fresh conversion and a bundle on a device: a case is what the cut eager model computed in
float64, wherever it is compared.
"""

from __future__ import annotations

import dataclasses
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import BundleError
from ..manifest import ExactnessRow
from ..prompt import Prompt
from ..runtime.sessions import Graphs

GREEDY = 16  # tokens compared after each prompt


@dataclass(frozen=True)
class Case:
    """One prompt with what the reference computes for it. L prompt tokens, T teacher-forced tokens."""

    prompt: Prompt
    kept: np.ndarray  # int64 [images, K]
    features: np.ndarray  # [images, K, hidden]
    prefill_logits: np.ndarray  # [V]
    cache: list[np.ndarray]  # key 0, value 0, …: [kv_heads, L + T, head_dim], rows of prompt and tokens
    tokens: np.ndarray  # int64 [T], fed one by one
    decode_logits: np.ndarray  # [T, V], after each token

    def save(self, path: Path) -> None:
        """Write as a compressed npz; references are stored in float32."""
        arrays = {
            "input_ids": self.prompt.input_ids,
            "visual_index": self.prompt.visual_index,
            "per_image": np.array(self.prompt.per_image),
            "kept": self.kept,
            "tokens": self.tokens,
            **{
                name: getattr(self, name).astype(np.float32) for name in ("features", "prefill_logits", "decode_logits")
            },
            **{f"cache_{i}": c.astype(np.float32) for i, c in enumerate(self.cache)},
        }
        if self.prompt.pixel_values is not None:
            arrays["pixel_values"] = self.prompt.pixel_values
        np.savez_compressed(path, allow_pickle=False, **arrays)


def read_case(path: Path) -> Case:
    """Read a case; pickles are refused.

    Raises:
        BundleError: a missing or damaged file.
    """
    try:
        with np.load(path, allow_pickle=False) as data:
            pixels = data.get("pixel_values")
            prompt = Prompt(data["input_ids"], data["visual_index"], pixels, len(data["kept"]), int(data["per_image"]))
            count = sum(name.startswith("cache_") for name in data.files)
            return Case(
                prompt,
                data["kept"],
                data["features"],
                data["prefill_logits"],
                [data[f"cache_{i}"] for i in range(count)],
                data["tokens"],
                data["decode_logits"],
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise BundleError(f"`{path}` cannot be read: {error}", hint="copy the bundle again") from error


Distances = dict[tuple[str, str], float]


def distances(graphs: Graphs, case: Case) -> Distances:
    """Largest absolute distance of every graph output from the reference, NaN if a graph gives NaN.

    Every graph is fed the reference's inputs, so that a fault is blamed on the graph that has it. `kept` counts
    positions that differ.
    """
    prompt, found = case.prompt, {}
    if prompt.pixel_values is not None:
        pairs = [graphs.vision(image[None]) for image in prompt.pixel_values]
        found["vision", "image_features"] = _distance(np.stack([f for f, _ in pairs]), case.features)
        found["vision", "kept"] = float((np.concatenate([k for _, k in pairs]) != case.kept).sum())
    logits = graphs.prefill(*prompt.pad(graphs.budget), list(case.features), prompt.length)
    found["prefill", "logits"] = _distance(logits, case.prefill_logits)
    length = prompt.length
    found |= _cache_distance("prefill", graphs.cache(), case.cache, slice(0, length))
    steps = []
    for token in case.tokens:
        length += 1
        steps.append(graphs.decode(int(token), length))
    found["decode", "logits"] = _distance(np.stack(steps), case.decode_logits)
    return found | _cache_distance("decode", graphs.cache(), case.cache, slice(prompt.length, length))


def _cache_distance(graph: str, have: Sequence[np.ndarray], want: Sequence[np.ndarray], rows: slice) -> Distances:
    return {
        (graph, f"present_{kind}"): _largest(
            [_distance(h[0, :, rows], w[:, rows]) for h, w in zip(have[start::2], want[start::2], strict=True)]
        )
        for start, kind in enumerate(("key", "value"))
    }


def _largest(values: Sequence[float]) -> float:
    return float(np.max(values))  # unlike the built-in, NaN wins wherever it stands


def _distance(have: np.ndarray, want: np.ndarray) -> float:
    if have.shape != want.shape:
        raise BundleError(f"a graph gives shape {list(have.shape)}, the reference {list(want.shape)}")
    return float(np.abs(have.astype(np.float64) - want.astype(np.float64)).max(initial=0.0))


def worst(found: Sequence[Distances]) -> Distances:
    """The largest distance of each output over all cases; NaN wins."""
    keys = {key for one in found for key in one}
    return {key: _largest([one[key] for one in found if key in one]) for key in sorted(keys)}


def judge(found: Distances, rows: Sequence[ExactnessRow]) -> list[ExactnessRow]:
    """The rows of a manifest with new distances: ok if no output is farther away than its tolerance."""
    known = {(row.graph, row.output): row for row in rows}
    if missing := sorted(set(known) - set(found)):
        raise BundleError(f"no distance for {missing[0][0]}.{missing[0][1]}", hint="the golden tensors are incomplete")
    return [
        dataclasses.replace(row, max_abs=found[key], ok=bool(found[key] <= row.tolerance)) for key, row in known.items()
    ]
