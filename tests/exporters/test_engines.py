"""Engines are built for real by TensorRT for RTX, which needs no GPU; TensorRT itself is absent on a plain host."""

from __future__ import annotations

import ast
import importlib.util
import signal
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from vlmcut.errors import ExportError
from vlmcut.exporters import engines
from vlmcut.exporters.engines import TensorInfo, available, build_engine

needs_rtx = pytest.mark.skipif(
    available("rtx") is not None, reason=f"needs TensorRT for RTX (pip install tensorrt_rtx): {available('rtx')}"
)


def save(folder: Path, op: str = "MatMul", dtype: type = np.float16, rows: int | str = 2) -> Path:
    """x [rows, 64] op w [64, 64], the weight in `graph.data` beside the file."""
    rng = np.random.default_rng(0)
    w = numpy_helper.from_array(rng.standard_normal((64, 64)).astype(dtype), "w")
    x, y = (helper.make_tensor_value_info(n, w.data_type, [rows, 64]) for n in "xy")
    graph = helper.make_graph([helper.make_node(op, ["x", "w"], ["y"], name="the_node")], "g", [x], [y], [w])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)
    path = folder / "graph.onnx"
    onnx.save(model, path, save_as_external_data=True, location="graph.data", size_threshold=0)
    return path


@needs_rtx
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_builds_with_external_weights(dtype: type, tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    path, plan = save(tmp_path, dtype=dtype), tmp_path / "graph.plan"
    report = build_engine(path, plan, "rtx", progress=lambda *step: steps.append(step))
    assert report.plan_bytes == plan.stat().st_size > 64 * 64 * np.dtype(dtype).itemsize  # the weights are inside
    assert report.inputs == (TensorInfo("x", (2, 64), np.dtype(dtype).name),)
    assert report.outputs == (TensorInfo("y", (2, 64), np.dtype(dtype).name),)
    assert report.compute_capabilities == ("80", "86", "89", "120") and report.seconds > 0 and report.layers > 0
    assert ("Building engine", 6, 6) in steps or ("Building engine", 5, 6) in steps
    assert {p.name for p in tmp_path.iterdir()} == {"graph.onnx", "graph.data", "graph.plan"}


@needs_rtx
@pytest.mark.parametrize("op", ["BitwiseAnd", "NoSuchOperator"])
def test_a_refused_operator_is_named(op: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=rf"graph\.onnx.*node `the_node` \({op}\)") as caught:
        build_engine(save(tmp_path, op, np.int32), tmp_path / "graph.plan", "rtx")
    assert caught.value.hint and "cudaError" not in str(caught.value)
    assert not (tmp_path / "graph.plan").exists()


@needs_rtx
def test_a_builder_failure_tells_its_cause(tmp_path: Path) -> None:
    """K over the limit parses; only the builder refuses it, through the logger."""
    k = numpy_helper.from_array(np.array([4000]), "k")
    info = helper.make_tensor_value_info
    x, v, i = info("x", 1, [1, 5000]), info("v", 1, [1, 4000]), info("i", TensorProto.INT64, [1, 4000])
    graph = helper.make_graph([helper.make_node("TopK", ["x", "k"], ["v", "i"], name="top")], "g", [x], [v, i], [k])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10), tmp_path / "k.onnx")
    with pytest.raises(ExportError, match=r"k\.onnx.*API Usage Error.*top: K exceeds.*3840"):
        build_engine(tmp_path / "k.onnx", tmp_path / "k.plan", "rtx")


@needs_rtx
def test_missing_external_data_is_an_error(tmp_path: Path) -> None:
    path = save(tmp_path)
    (tmp_path / "graph.data").unlink()
    with pytest.raises(ExportError, match=r"graph\.onnx"):
        build_engine(path, tmp_path / "graph.plan", "rtx")


@needs_rtx
def test_an_open_shape_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"input `x` has shape \[-1, 64\]"):
        build_engine(save(tmp_path, rows="n"), tmp_path / "graph.plan", "rtx")


@needs_rtx
def test_unknown_compute_capability_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="87") as caught:
        build_engine(save(tmp_path), tmp_path / "graph.plan", "rtx", compute_capabilities=["86", "87"])
    assert caught.value.hint and "120" in caught.value.hint


@needs_rtx
def test_workspace_limit_and_one_capability(tmp_path: Path) -> None:
    report = build_engine(
        save(tmp_path), tmp_path / "graph.plan", "rtx", compute_capabilities=["120"], workspace_bytes=64 << 20
    )
    assert report.compute_capabilities == ("120",)


@needs_rtx
def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "graph.plan").write_text("mine")
    with pytest.raises(ExportError, match="exists"):
        build_engine(save(tmp_path), tmp_path / "graph.plan", "rtx")
    assert (tmp_path / "graph.plan").read_text() == "mine"


@needs_rtx
def test_an_error_in_progress_cancels_and_comes_back(tmp_path: Path) -> None:
    def fail(phase: str, done: int, total: int) -> None:
        raise ZeroDivisionError(phase)

    with pytest.raises(ZeroDivisionError):
        build_engine(save(tmp_path), tmp_path / "graph.plan", "rtx", progress=fail)
    assert {p.name for p in tmp_path.iterdir()} == {"graph.onnx", "graph.data"}


@needs_rtx
def test_ctrl_c_cancels_and_leaves_nothing(tmp_path: Path) -> None:
    steps: list[str] = []
    interrupted = threading.Event()

    def interrupt(phase: str, done: int, total: int) -> None:
        steps.append(phase)
        if not interrupted.is_set():
            interrupted.set()
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            threading.Event().wait(0.3)  # lets the main thread take the signal

    with pytest.raises(KeyboardInterrupt):
        build_engine(save(tmp_path), tmp_path / "graph.plan", "rtx", progress=interrupt)
    assert len(steps) == 1, "the builder went on after Ctrl-C"
    assert {p.name for p in tmp_path.iterdir()} == {"graph.onnx", "graph.data"}


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="tensorrt is installed here")
def test_absent_tensorrt_has_a_reason(tmp_path: Path) -> None:
    reason = available("trt")
    assert reason is not None and "`tensorrt` is not installed" in reason
    with pytest.raises(ExportError, match="`tensorrt` is not installed") as caught:
        build_engine(save(tmp_path), tmp_path / "graph.plan", "trt")
    assert caught.value.hint


def test_unusable_modules_have_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    fakes = {
        "fake_old": ("__version__ = '10.3.0'", "10.3.0, older than 10.15"),
        "fake_broken": ("raise OSError('libnvinfer.so.10 is absent')", "does not import: libnvinfer.so.10 is absent"),
        "fake_empty": ("", "no __version__"),
    }
    for module, (source, reason) in fakes.items():
        (tmp_path / f"{module}.py").write_text(source)
        fake = engines.Flavour(module, module, (10, 15), True, ())
        monkeypatch.setattr(engines, "FLAVOURS", {module: fake})
        assert reason in (available(module) or "")
    assert "no engine flavour `trt`" in (available("trt") or "")


def test_a_new_enough_module_without_gpu_has_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "fake_new.py").write_text("__version__ = '11.4.0.106'")
    monkeypatch.setattr(engines, "FLAVOURS", {"trt": engines.Flavour("trt", "fake_new", (10, 15), True, ())})
    assert available("trt") == engines._no_gpu()


def test_uses_no_name_that_tensorrt_11_removed() -> None:
    tree = ast.parse(Path(engines.__file__).read_text())
    used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    gone = {
        "FP16", "BF16", "INT8", "FP8", "INT4", "EXPLICIT_BATCH", "OBEY_PRECISION_CONSTRAINTS", "max_workspace_size",
        "build_engine", "build_cuda_engine", "execute_async", "execute_async_v2", "supports_model", "precision",
        "parse_with_weight_descriptors", "device_memory_size", "set_output_type", "dynamic_range",
    }  # fmt: skip
    assert not used & gone
    assert not [name for name in used if "binding" in name]


def test_imports_only_the_standard_library_at_module_level() -> None:
    tree = ast.parse(Path(engines.__file__).read_text())
    names = {a.name for n in tree.body if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module or "" for n in tree.body if isinstance(n, ast.ImportFrom) and n.level == 0}
    assert not {n.split(".")[0] for n in names} & {"torch", "onnx", "onnx_ir", "tensorrt", "tensorrt_rtx"}
