"""Recorded inputs with reference outputs, and the distance of running graphs from them. NumPy only.

The same code judges a fresh conversion and a bundle on a device: a case is what the cut eager model computed in
float64, wherever it is compared.
"""

from __future__ import annotations

import dataclasses
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import BundleError
from ..manifest import ExactnessRow, Layout
from ..prompt import Picture, Prompt
from ..runtime.sessions import Graphs, Sight

GREEDY = 16  # tokens compared after each prompt


@dataclass(frozen=True)
class Case:
    """One prompt with what the reference computes for it. L prompt tokens, T teacher-forced tokens."""

    prompt: Prompt  # shrunk to the kept tokens
    seen: tuple[Sight, ...]  # of each picture
    kept: tuple[np.ndarray, ...]  # at each rung of the ladder, the columns that went on, int64 [S]
    prefill_logits: np.ndarray  # [V]
    prefill_states: dict[str, np.ndarray]  # what the cache holds after the prompt; rows of key_i, value_i: L
    tokens: np.ndarray  # int64 [T], fed one by one
    decode_logits: np.ndarray  # [T, V], after each token
    decode_states: dict[str, np.ndarray]  # after all tokens; rows of key_i, value_i: T

    def save(self, path: Path) -> None:
        """Write as a compressed npz; references are stored in float32."""
        p = self.prompt
        arrays: dict[str, np.ndarray] = {
            "input_ids": p.input_ids,
            "visual_index": p.visual_index,
            "position_ids": p.position_ids,
            "next_position": np.array(p.next_position),
            "counts": np.array(p.counts, dtype=np.int64),
            "tokens": self.tokens,
            "prefill_logits": self.prefill_logits.astype(np.float32),
            "decode_logits": self.decode_logits.astype(np.float32),
        }
        arrays |= {f"kept/{i}": columns for i, columns in enumerate(self.kept)}
        for kind in ("prefill", "decode"):
            states = getattr(self, f"{kind}_states")
            arrays |= {f"{kind}_state/{name}": value.astype(np.float32) for name, value in states.items()}
        for i, (picture, sight) in enumerate(zip(p.pictures, self.seen, strict=True)):
            arrays |= {f"picture_{i}/pixels": picture.pixel_values, f"picture_{i}/question": picture.question}
            arrays[f"picture_{i}/frames"] = np.array(picture.frames)
            arrays |= {f"picture_{i}/geometry/{n}": np.array(v) for n, v in picture.geometry.items()}
            arrays |= {f"picture_{i}/kept": sight.kept, f"picture_{i}/features": sight.features.astype(np.float32)}
            arrays |= {f"picture_{i}/level_{j}": x.astype(np.float32) for j, x in enumerate(sight.levels)}
        np.savez_compressed(path, allow_pickle=False, **arrays)


def read_case(path: Path, layout: Layout) -> Case:
    """Read a case; pickles are refused.

    Raises:
        BundleError: a missing or damaged file.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            data = {name: file[name] for name in file.files}
        pictures, seen = [], []
        for i in range(len(data["counts"])):
            own = _below(data, f"picture_{i}/")
            geometry = {n: tuple(int(x) for x in v) for n, v in _below(own, "geometry/").items()}
            pictures.append(Picture(own["pixels"], geometry, int(own["frames"]), own["question"]))
            levels = tuple(own[f"level_{j}"] for j in range(sum(name.startswith("level_") for name in own)))
            seen.append(Sight(own["features"], own["kept"], levels))
        prompt = Prompt(
            data["input_ids"], data["visual_index"], data["position_ids"], int(data["next_position"]), tuple(pictures),
            tuple(int(n) for n in data["counts"]), layout,
        )  # fmt: skip
        return Case(
            prompt,
            tuple(seen),
            tuple(data[f"kept/{i}"] for i in range(sum(name.startswith("kept/") for name in data))),
            data["prefill_logits"],
            _below(data, "prefill_state/"),
            data["tokens"],
            data["decode_logits"],
            _below(data, "decode_state/"),
        )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise BundleError(f"`{path}` cannot be read: {error}", hint="copy the bundle again") from error


def _below(data: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): value for name, value in data.items() if name.startswith(prefix)}


Distances = dict[tuple[str, str], float]


def distances(graphs: Graphs, case: Case) -> Distances:
    """Largest absolute distance of every graph output from the reference, NaN if a graph gives NaN.

    Every graph is fed the reference's inputs, so that a fault is blamed on the graph that has it. `kept` counts
    positions that differ.
    """
    prompt, found = case.prompt, Distances()
    for picture, want in zip(prompt.pictures, case.seen, strict=True):
        have = graphs.vision(picture)
        one = {("vision", "image_features"): _distance(have.features, want.features)}
        one["vision", "kept"] = float((have.kept != want.kept).sum())
        for index, (mine, level) in enumerate(zip(have.levels, want.levels, strict=True)):
            one["vision", f"deepstack_{index}"] = _distance(mine, level)
        found = worst([found, one])
    logits = graphs.prefill(prompt, case.seen)
    found["prefill", "logits"] = _distance(logits, case.prefill_logits)
    for have, want in zip(graphs.kept, case.kept, strict=True):
        wrong = float(np.setxor1d(have, want).size)
        found["prefill", "kept"] = max(wrong, found.get(("prefill", "kept"), 0.0))
    budget = graphs.budget
    found |= _state_distance(
        "prefill", graphs.states(), case.prefill_states, lambda i: slice(0, prompt.rows(budget, i))
    )
    steps = []
    for count, token in enumerate(case.tokens):
        steps.append(graphs.decode(int(token), prompt, count))
    found["decode", "logits"] = _distance(np.stack(steps), case.decode_logits)

    def new(layer: int) -> slice:
        return slice(prompt.rows(budget, layer), prompt.rows(budget, layer) + len(case.tokens))

    return found | _state_distance("decode", graphs.states(), case.decode_states, new)


def state_kind(name: str) -> str:
    """key, value or conv: layers of one kind share a row of the report."""
    return name.rsplit("_", 1)[0]


def layer_of(name: str) -> int:
    """Of key_i, value_i or conv_i: i."""
    return int(name.rsplit("_", 1)[1])


def _state_distance(
    graph: str, have: Mapping[str, np.ndarray], want: Mapping[str, np.ndarray], rows: Callable[[int], slice]
) -> Distances:
    found: dict[tuple[str, str], list[float]] = {}
    for name, value in want.items():
        mine = have[name][0] if state_kind(name) == "conv" else have[name][0, :, rows(layer_of(name))]
        found.setdefault((graph, f"present_{state_kind(name)}"), []).append(_distance(mine, value))
    return {key: _largest(values) for key, values in found.items()}


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
