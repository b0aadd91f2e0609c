"""Engines from the graphs of a bundle: part of `convert`, or alone on the device. Needs TensorRT, not torch."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import BundleError, ExportError
from ..manifest import MANIFEST, GraphInfo, Manifest, check_files, digest, read
from . import engines

Progress = Callable[[str], None]


def build_bundle(path: Path, *, target: str | None = None, progress: Progress = lambda _: None) -> Manifest:
    """Build the engines that a bundle deferred.

    Args:
        target: trt or rtx; the bundle's own if not given.

    Raises:
        BundleError: a damaged bundle, one whose graphs are not TensorRT's, or one that has engines already.
        ExportError: TensorRT is missing here, or refuses a graph; the bundle stays as it was.
    """
    manifest = read(path)
    check_files(path, manifest, hashes=True)
    target = target or manifest.target
    if manifest.target == "onnx":
        raise BundleError(
            f"`{path}` holds ONNX Runtime graphs, which TensorRT does not read",
            hint="convert again with --target rtx or --target trt",
        )
    place = path / "engines" / target
    if place.exists():
        raise ExportError(f"`{place}` exists", hint="remove it to build again")
    if (reason := engines.available(target)) is not None:
        raise ExportError(f"cannot build {target} engines: {reason}", hint="run `vlmcut build` on the device")
    stage = Path(tempfile.mkdtemp(prefix=".engines.partial-", dir=path))
    done = False
    try:
        built = build_engines(manifest, path, progress, place=stage, target=target)
        place.parent.mkdir(exist_ok=True)
        stage.chmod(0o755)
        stage.rename(place)
        fresh = Path(tempfile.mkdtemp(prefix=".manifest.partial-", dir=path))
        try:
            listed = seal(built, path, fresh)
            os.replace(fresh / MANIFEST, path / MANIFEST)
            done = True
        finally:
            shutil.rmtree(fresh)
    finally:
        for left in [stage] if done else [stage, place]:
            if left.exists():
                shutil.rmtree(left)
        if not done and place.parent.exists() and not any(place.parent.iterdir()):
            place.parent.rmdir()
    return listed


def build_engines(
    manifest: Manifest,
    folder: Path,
    progress: Progress = lambda _: None,
    *,
    place: Path | None = None,
    target: str | None = None,
) -> Manifest:
    """Build an engine from every graph of `folder`.

    Args:
        place: where the plans are written; `folder/engines/<target>` if not given. The manifest names that place.

    Returns:
        The manifest with each graph's engine and the build reports.
    """
    target = target or manifest.target
    final = folder / "engines" / target
    place = place or final
    place.mkdir(parents=True, exist_ok=True)
    graphs: dict[str, GraphInfo] = {}
    builds: dict[str, Any] = {}
    for name, graph in manifest.graphs.items():
        progress(f"building the {target} engine of {name}")
        report = engines.build_engine(folder / graph.file, place / f"{name}.plan", target)
        skipped = ("inputs", "outputs", "warnings")
        builds[name] = {k: v for k, v in dataclasses.asdict(report).items() if k not in skipped}
        engine = (final / f"{name}.plan").relative_to(folder).as_posix()
        graphs[name] = dataclasses.replace(graph, engine=engine)
    return dataclasses.replace(manifest, graphs=graphs, builds=builds)


def seal(manifest: Manifest, folder: Path, into: Path | None = None) -> Manifest:
    """List every file of `folder` with its size and sha256, and write the manifest (into `into`, if given)."""
    files = {
        path.relative_to(folder).as_posix(): {"sha256": digest(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST and ".partial-" not in path.relative_to(folder).as_posix()
    }
    manifest = dataclasses.replace(manifest, files=files)
    manifest.save(into or folder)
    return manifest
