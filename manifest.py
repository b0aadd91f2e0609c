"""`manifest.json`: what a bundle holds, as plain dataclasses shared by the writer and the torch-free runner.

Schema 1. Shapes are lists of ints, dtypes are NumPy names, paths are relative to the bundle and use `/`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import BundleError

SCHEMA = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class TokenBudget:
    """The only source of sizes. Counts are tokens unless said otherwise.

    A prompt may use fewer images and less text than its budget; it is padded to `sequence`, never truncated.
    """

    images: int  # most images in one prompt
    visual_tokens: int  # tokens that one image keeps
    text_tokens: int  # room for everything that is not an image
    new_tokens: int  # most tokens generated after the prompt

    @property
    def sequence(self) -> int:
        """Columns of the prefill graph, S."""
        return self.images * self.visual_tokens + self.text_tokens

    @property
    def cache(self) -> int:
        """Rows of each KV buffer, C."""
        return self.sequence + self.new_tokens


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One graph input or output."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class GraphInfo:
    """One ONNX file of one budget; `role` is vision, prefill or decode."""

    role: str
    budget: int  # index into `budgets`
    file: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    engine: str | None = None  # TensorRT plan made from this graph, if any


@dataclass(frozen=True, kw_only=True)
class ExactnessRow:
    """Worst distance of one graph output from the cut eager model in float64, over all cases."""

    graph: str
    output: str
    max_abs: float  # exported graph against the float64 reference
    floor: float  # the eager model in the graph's own dtype against the float64 reference
    tolerance: float
    ok: bool
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything a runner needs to know, and everything a reader wants to know about where it came from."""

    source: dict[str, Any]  # id, revision, files {name -> sha256}
    recipe: list[dict[str, Any]]  # resolved, as in recipe.toml
    target: str  # onnx, rtx, trt
    dtype: str  # float32, float16
    image_token_id: int
    visual_tokens_full: int  # tokens one image makes before pruning; what the processor writes
    grid: tuple[int, int]  # rows, columns of patches, for drawing kept tokens
    budgets: tuple[TokenBudget, ...]
    graphs: dict[str, GraphInfo]
    cache_shapes: tuple[tuple[int, int], ...]  # (KV heads, head_dim) per language layer
    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # path -> {sha256, bytes}
    tools: dict[str, str] = field(default_factory=dict)
    exactness: dict[str, Any] = field(default_factory=dict)  # {ok, rows, tokens, ...}
    quality: dict[str, Any] | None = None
    anatomy: dict[str, Any] = field(default_factory=dict)
    builds: dict[str, Any] = field(default_factory=dict)  # engine name -> build report; "deferred" when not built
    schema: int = SCHEMA

    def graph(self, role: str, budget: int) -> GraphInfo:
        """The graph of `role` for the budget with index `budget`."""
        found = next((g for g in self.graphs.values() if g.role == role and g.budget == budget), None)
        if found is None:
            raise BundleError(f"the manifest has no {role} graph for budget {budget}", hint="convert the model again")
        return found

    def save(self, folder: Path) -> None:
        data = asdict(self)
        data["budgets"] = [asdict(b) | {"sequence": b.sequence, "cache": b.cache} for b in self.budgets]
        (folder / MANIFEST).write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")


def read(folder: Path) -> Manifest:
    """Read and check the manifest of a bundle.

    Raises:
        BundleError: no manifest, unreadable JSON, another schema, missing or unknown fields, or a path that
            leaves the bundle.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise BundleError(f"`{folder}` is not a bundle: it has no {MANIFEST}", hint="make one with `vlmcut convert`")
    try:
        data = json.loads(path.read_text())
        if data.get("schema") != SCHEMA:
            raise BundleError(
                f"`{path}` has schema {data.get('schema')}, this vlmcut reads schema {SCHEMA}",
                hint="convert the model again with this version",
            )
        manifest = _from_json(data)
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # bad JSON and bad UTF-8 are ValueErrors
        raise BundleError(f"`{path}` cannot be read: {error}", hint="copy the bundle again") from error
    graphs = manifest.graphs.values()
    for name in [*manifest.files, *(g.file for g in graphs), *(g.engine for g in graphs if g.engine)]:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise BundleError(f"`{path}` names `{name}`, which leaves the bundle", hint="do not use this bundle")
    return manifest


def _from_json(data: Mapping[str, Any]) -> Manifest:
    fields = dict(data)
    fields["budgets"] = tuple(
        TokenBudget(**{k: v for k, v in b.items() if k not in ("sequence", "cache")}) for b in data["budgets"]
    )
    fields["graphs"] = {name: _graph(g) for name, g in data["graphs"].items()}
    fields["files"] = {n: {"sha256": str(f["sha256"]), "bytes": int(f["bytes"])} for n, f in data["files"].items()}
    fields["grid"] = tuple(data["grid"])
    fields["cache_shapes"] = tuple((int(h), int(d)) for h, d in data["cache_shapes"])
    return Manifest(**fields)


def _graph(data: Mapping[str, Any]) -> GraphInfo:
    def tensors(items: list[dict[str, Any]]) -> tuple[TensorInfo, ...]:
        return tuple(TensorInfo(name=t["name"], dtype=t["dtype"], shape=tuple(t["shape"])) for t in items)

    return GraphInfo(**{**data, "inputs": tensors(data["inputs"]), "outputs": tensors(data["outputs"])})


def digest(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_files(folder: Path, manifest: Manifest, *, hashes: bool) -> None:
    """Check that every listed file is there with its size and, if asked, its sha256.

    Raises:
        BundleError: naming the first file that differs and both values.
    """
    for name, want in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise BundleError(f"`{name}` is missing from `{folder}`", hint="copy the bundle again")
        size = path.stat().st_size
        if size != want["bytes"]:
            raise BundleError(
                f"`{name}` has {size:,} bytes, the manifest says {want['bytes']:,}", hint="copy the bundle again"
            )
        if hashes and (have := digest(path)) != want["sha256"]:
            raise BundleError(
                f"`{name}` was changed: sha256 {have[:12]}…, the manifest says {want['sha256'][:12]}…",
                hint="copy the bundle again, or convert again",
            )
