"""`vlmcut build`: engines on the device, from the graphs of a bundle, with the real TensorRT-RTX builder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from vlmcut.errors import ExportError
from vlmcut.exporters import build, engines
from vlmcut.manifest import check_files, read

NAMES = ("decode-5", "prefill-5", "vision-5")


def test_deferred_bundle_is_whole(run: Any, bundle_rtx_graphs: Path) -> None:
    manifest = read(bundle_rtx_graphs)
    assert manifest.builds == {"deferred": "asked for"} and manifest.target == "rtx"
    assert all(g.engine is None for g in manifest.graphs.values())
    assert not (bundle_rtx_graphs / "engines").exists()
    result = run("verify", bundle_rtx_graphs)
    assert result.code == 0 and result.out.count("ok  ") == 8
    assert run("lint", bundle_rtx_graphs, "--target", "rtx").code == 0
    assert run("run", bundle_rtx_graphs, "-p", "What?").code == 0


@pytest.fixture(scope="module")
def built(bundle_rtx_graphs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the bundle with engines."""
    pytest.importorskip("tensorrt_rtx")
    folder = Path(shutil.copytree(bundle_rtx_graphs, tmp_path_factory.mktemp("built") / "bundle"))
    build.build_bundle(folder)
    return folder


def test_engines_are_listed_and_verified(run: Any, built: Path, bundle_rtx_graphs: Path) -> None:
    before, manifest = read(bundle_rtx_graphs), read(built)
    check_files(built, manifest, hashes=True)
    plans = {f"engines/rtx/{name}.plan" for name in NAMES}
    assert set(manifest.files) - set(before.files) == plans
    assert {name: manifest.files[name] for name in before.files} == before.files
    assert sorted(manifest.builds) == sorted(manifest.graphs) == sorted(NAMES)
    for name, graph in manifest.graphs.items():
        assert graph.engine == f"engines/rtx/{name}.plan"
        size = (built / graph.engine).stat().st_size
        assert manifest.builds[name]["plan_bytes"] == size > 10_000
        assert manifest.builds[name]["seconds"] > 0
    assert not list(built.rglob("*partial*"))
    result = run("verify", built)
    assert result.code == 0 and result.out.count("ok  ") == 8


def test_second_build_is_refused(refuses: Any, built: Path, copied: Any) -> None:
    refuses("build", copied(built), says=("engines/rtx` exists", "remove it"))


def test_build_without_tensorrt(refuses: Any, bundle_rtx_graphs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "available", lambda flavour: f"no {flavour} here")
    refuses("build", bundle_rtx_graphs, says=("cannot build rtx engines: no rtx here", "on the device"))
    refuses("build", bundle_rtx_graphs, "--target", "trt", says=("cannot build trt engines: no trt here",))


def test_changed_plan_is_found(refuses: Any, built: Path, copied: Any) -> None:
    folder = copied(built)
    plan = folder / "engines" / "rtx" / "decode-5.plan"
    data = bytearray(plan.read_bytes())
    data[len(data) // 2] ^= 1
    plan.write_bytes(data)
    refuses("verify", folder, says=("`engines/rtx/decode-5.plan` was changed",))


def test_build_through_the_command_line(
    run: Any, bundle_rtx_graphs: Path, copied: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything but the builder itself, which the tests above run."""
    folder = copied(bundle_rtx_graphs)
    monkeypatch.setattr(engines, "available", lambda flavour: None)
    monkeypatch.setattr(engines, "build_engine", _stand_in)
    result = run("build", folder)
    assert result.code == 0
    assert [line.split(":")[0] for line in sorted(result.out.splitlines())] == sorted(NAMES)
    assert run("verify", folder).code == 0


def _stand_in(onnx: Path, plan: Path, flavour: str) -> engines.EngineReport:
    plan.write_bytes(b"plan")
    return engines.EngineReport(flavour, "1.7", (), 1.0, 4, 3, (), (), ())


@pytest.mark.parametrize("fail_at", [0, 2, "seal"])
def test_failed_build_leaves_the_bundle_as_it_was(
    fail_at: int | str, refuses: Any, bundle_rtx_graphs: Path, copied: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(bundle_rtx_graphs)
    made = []

    def build_engine(onnx: Path, plan: Path, flavour: str) -> engines.EngineReport:
        if len(made) == fail_at:
            raise ExportError(f"TensorRT refuses `{onnx.name}`", hint="see its message")
        made.append(plan)
        return _stand_in(onnx, plan, flavour)

    def seal(*_: object) -> None:
        raise ExportError("no manifest today", hint="try tomorrow")

    monkeypatch.setattr(engines, "available", lambda flavour: None)
    monkeypatch.setattr(engines, "build_engine", build_engine)
    if fail_at == "seal":
        monkeypatch.setattr(build, "seal", seal)
    refuses("build", folder, says=("no manifest today" if fail_at == "seal" else "TensorRT refuses",))
    assert not (folder / "engines").exists()
    check_files(folder, read(folder), hashes=True)
    assert "deferred" in read(folder).builds
