"""`manifest.json`: what a bundle holds, as plain dataclasses shared by the writer and the torch-free runner.

Schema 5. Shapes are lists of ints, dtypes are NumPy names, paths are relative to the bundle and use `/`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import BundleError
from .vocabulary import Vocabulary

SCHEMA = 5
MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A raster of visual tokens that follow each other, and the part of the picture that they show."""

    rows: int
    columns: int
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)  # top, left, bottom, right, of the picture's size
    line_breaks: bool = False  # whether one more token ends each row

    @property
    def tokens(self) -> int:
        return self.rows * (self.columns + self.line_breaks)


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """One geometry that an image may have; every number of it is a constant in the vision graph.

    A family with one fixed image size has one bucket, into which every picture falls.
    """

    size: tuple[int, int]  # pixels, height and width of a picture that falls into it
    geometry: dict[str, tuple[int, ...]]  # what the processor makes of it: shape of pixel_values, image_sizes, grids
    tokens: int  # visual tokens before pruning; placeholders that the processor writes
    panels: tuple[Panel, ...] = ()  # where its tokens lie in the picture, in order; empty if nobody knows
    frames: int = 1  # images that are seen together as a clip; tokens and panels count through them

    @property
    def line_breaks(self) -> tuple[int, ...]:
        """Positions of the tokens that only say that a row ends."""
        found, start = [], 0
        for panel in self.panels:
            width = panel.columns + panel.line_breaks
            found += [start + (row + 1) * width - 1 for row in range(panel.rows) if panel.line_breaks]
            start += panel.tokens
        return tuple(found)

    @property
    def name(self) -> str:
        return f"{self.size[0]}x{self.size[1]}"

    @property
    def pixels(self) -> tuple[int, ...]:
        """Shape of what the vision graph takes: of one image, or [frames, …] of a clip."""
        one = self.geometry["pixel_values"]
        return one if self.frames == 1 else (self.frames, *one)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a family lays out a prompt; the host computes it, the graphs do not."""

    image_token_id: int  # the placeholder
    positions: str = "compact"  # compact: 0, 1, 2, … after the cut; mrope: rows t, h, w of the full prompt, gathered
    first_position: int = 0
    merge: int = 1  # patches along one side of a visual token; what M-RoPE grids are divided by
    frames: int = 1  # so many images in a row are a clip: seen together, with one budget
    vocabulary: Vocabulary | None = None  # the ids that have a row, if not all do

    @property
    def axes(self) -> int:
        """Rows of `position_ids`."""
        return 3 if self.positions == "mrope" else 1


@dataclass(frozen=True)
class Rung:
    """A layer of the language model at whose entry visual tokens leave."""

    layer: int  # from 0; the layers before it see every visual token that is left
    share: float  # of an image's visual tokens that entered the language model: what stays from here on; 0 for none

    def stay(self, tokens: int) -> int:
        """Of so many visual tokens of one image, those that go on."""
        return max(1, round(tokens * self.share)) if self.share else 0


@dataclass(frozen=True, kw_only=True)
class TokenBudget:
    """The only source of sizes. Counts are tokens unless said otherwise.

    A prompt may use fewer images and less text than its budget; it is padded to `sequence`, never truncated.
    """

    images: int  # most images, or clips of frames, in one prompt
    visual_tokens: int  # tokens that one of them keeps, at most (in the largest bucket)
    text_tokens: int  # room for everything that is not an image
    new_tokens: int  # most tokens generated after the prompt
    ladder: tuple[Rung, ...] = ()  # where visual tokens leave inside the language model
    carriers: int = 0  # the last visual tokens of an image, the only ones of it that are cached; 0: all are
    idle: bool = False  # visual tokens do less than text in some layers of a prompt

    @property
    def sequence(self) -> int:
        """Columns of the prefill graph, S."""
        return self.images * self.visual_tokens + self.text_tokens

    @property
    def positions(self) -> int:
        """Columns of a prompt and its answer."""
        return self.sequence + self.new_tokens

    @property
    def cache(self) -> int:
        """Rows of each KV buffer, C; of the layers before the first rung."""
        return self.positions - visual_hidden(self.carriers, (self.visual_tokens,) * self.images)

    def left(self, layer: int) -> int:
        """Of the budget's columns, the visual ones that a language layer no longer sees."""
        return visual_left(self.ladder, (self.visual_tokens,) * self.images, layer)


def visual_left(ladder: Sequence[Rung], counts: Sequence[int], layer: int) -> int:
    """Visual tokens of a prompt that a language layer no longer sees.

    Args:
        counts: of each image, visual tokens that entered the language model.
    """
    passed = [rung for rung in ladder if rung.layer <= layer]
    return sum(count - passed[-1].stay(count) for count in counts) if passed else 0


def visual_hidden(carriers: int, counts: Sequence[int]) -> int:
    """Visual tokens of a prompt that no language layer caches: all but the last `carriers` of each image; 0 for none.

    Args:
        counts: of each image, visual tokens that entered the language model.
    """
    return sum(count - carriers for count in counts) if carriers else 0


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
    bucket: int  # index into `buckets`; 0 for prefill and decode, which serve them all
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
    layout: Layout
    buckets: tuple[Bucket, ...]
    budgets: tuple[TokenBudget, ...]
    graphs: dict[str, GraphInfo]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # path -> {sha256, bytes}
    tools: dict[str, str] = field(default_factory=dict)
    exactness: dict[str, Any] = field(default_factory=dict)  # {ok, rows, tokens, ...}
    quality: dict[str, Any] | None = None
    anatomy: dict[str, Any] = field(default_factory=dict)
    builds: dict[str, Any] = field(default_factory=dict)  # engine name -> build report; "deferred" when not built
    schema: int = SCHEMA

    def graph(self, role: str, budget: int, bucket: int = 0) -> GraphInfo:
        """The graph of `role` for the budget and the bucket with these indices."""
        wanted = (role, budget, bucket)
        found = next((g for g in self.graphs.values() if (g.role, g.budget, g.bucket) == wanted), None)
        if found is None:
            raise BundleError(
                f"the manifest has no {role} graph for budget {budget}, bucket {bucket}", hint="convert the model again"
            )
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
    fields["budgets"] = tuple(_budget(b) for b in data["budgets"])
    fields["graphs"] = {name: _graph(g) for name, g in data["graphs"].items()}
    fields["files"] = {n: {"sha256": str(f["sha256"]), "bytes": int(f["bytes"])} for n, f in data["files"].items()}
    fields["layout"] = _layout(data["layout"])
    fields["buckets"] = tuple(_bucket(b) for b in data["buckets"])
    return Manifest(**fields)


def _budget(data: Mapping[str, Any]) -> TokenBudget:
    given = {name: value for name, value in data.items() if name not in ("sequence", "cache", "ladder")}
    return TokenBudget(**given, ladder=tuple(Rung(int(x["layer"]), float(x["share"])) for x in data["ladder"]))


def _layout(data: Mapping[str, Any]) -> Layout:
    vocabulary = Vocabulary(**data["vocabulary"]) if data.get("vocabulary") else None
    if vocabulary is not None:
        len(vocabulary.ids)  # or damaged runs would be found when somebody asks
    return Layout(**{**data, "vocabulary": vocabulary})


def _bucket(data: Mapping[str, Any]) -> Bucket:
    geometry = {name: tuple(int(n) for n in numbers) for name, numbers in data["geometry"].items()}
    height, width = data["size"]
    panels = tuple(Panel(**{**panel, "box": tuple(panel["box"])}) for panel in data["panels"])
    return Bucket(
        size=(int(height), int(width)), geometry=geometry, tokens=int(data["tokens"]), panels=panels,
        frames=int(data["frames"]),
    )  # fmt: skip


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
