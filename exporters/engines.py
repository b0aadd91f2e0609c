"""Build TensorRT engines from ONNX files of fixed shape, on the device they will run on.

Needs the standard library and one of two runtimes, never torch or onnx, so that it starts on a bare device:

| flavour | module | where it builds | plan is bound to |
|---|---|---|---|
| `rtx` | tensorrt_rtx | any host, ahead of time, without a GPU or driver | its list of compute capabilities |
| `trt` | tensorrt | the target device only | that TensorRT version, system and GPU |

Engines are strongly typed: every dtype is the one written in the ONNX file. TensorRT 10 needs a flag for that;
TensorRT 11 and TensorRT for RTX know no other way, and their enum integers differ, so none is ever stored.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ExportError

Progress = Callable[[str, int, int], None]
"""Called as `progress(phase, done, total)`, phases nest, from a builder thread. What it raises cancels the build."""


@dataclass(frozen=True)
class Flavour:
    """One TensorRT product."""

    name: str
    module: str
    minimum: tuple[int, int]  # trt: importers of TensorScatter and RotaryEmbedding came with 10.15; rtx: oldest tried
    needs_gpu: bool
    compute_capabilities: tuple[str, ...]  # default list of an ahead-of-time build; empty: the GPU that is present


FLAVOURS: Mapping[str, Flavour] = {
    f.name: f
    for f in (
        # 8.7, 9.0, 10.0 and 11.0 are not in its ComputeCapability enum (1.7): those devices take `trt`.
        Flavour("rtx", "tensorrt_rtx", (1, 7), False, ("80", "86", "89", "120")),
        Flavour("trt", "tensorrt", (10, 15), True, ()),
    )
}

DTYPES: Mapping[str, str] = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT32": "int32",
    "INT64": "int64",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
    "FP8": "float8_e4m3fn",
    "INT4": "int4",
    "FP4": "float4_e2m1fn",
    "E8M0": "float8_e8m0fnu",
}
"""TensorRT's dtype names as numpy and ml_dtypes spell them."""

LINT_HINT = "`vlmcut lint` names the node and the fix for the causes known to us"


@dataclass(frozen=True)
class TensorInfo:
    """One graph input or output as the network sees it."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class EngineReport:
    """What was built, with what, for what."""

    flavour: str
    version: str  # of the TensorRT module; a plan of `trt` loads with exactly this one
    compute_capabilities: tuple[str, ...]  # empty: the GPU that was present
    seconds: float  # parse and build
    plan_bytes: int
    layers: int  # of the network as imported, before fusion
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    warnings: tuple[str, ...]  # of the importer and builder, without repetition


def available(flavour: str) -> str | None:
    """Say why engines of this flavour cannot be built here, or None when they can. Cheap; does not raise."""
    known = FLAVOURS.get(flavour)
    if known is None:
        return f"no engine flavour `{flavour}` (have: {', '.join(FLAVOURS)})"
    if importlib.util.find_spec(known.module) is None:
        return f"the Python module `{known.module}` is not installed"
    try:
        trt = importlib.import_module(known.module)
    except (ImportError, OSError, RuntimeError) as broken:  # a library it links to is missing or of another version
        return f"the Python module `{known.module}` is installed but does not import: {broken}"
    found = getattr(trt, "__version__", None)
    if found is None:  # an empty folder of that name on the path imports as a namespace package
        return f"the Python module `{known.module}` has no __version__: it is not TensorRT"
    if _version(found) < known.minimum:
        return f"`{known.module}` is {found}, older than {known.minimum[0]}.{known.minimum[1]}"
    return _no_gpu() if known.needs_gpu else None


def build_engine(
    onnx_path: str | os.PathLike[str],
    plan_path: str | os.PathLike[str],
    flavour: str,
    *,
    compute_capabilities: Sequence[str] | None = None,
    workspace_bytes: int | None = None,
    progress: Progress | None = None,
) -> EngineReport:
    """Build the engine of one ONNX file and write its plan.

    The plan appears under `plan_path` whole or not at all. Ctrl-C cancels the build at its next step. TF32 is
    cleared, so float32 graphs multiply in float32. A crash inside TensorRT takes the process along (1.7 of `rtx` does
    so when one graph input is Q and K of an Attention node): lint first.

    Args:
        onnx_path: graph of fixed shapes; external data is looked up beside it.
        plan_path: file to create; an existing one is refused.
        flavour: a key of `FLAVOURS`.
        compute_capabilities: such as ["86", "120"], for `rtx` only; the flavour's list when None.
        workspace_bytes: limit on scratch memory of the engine; without it TensorRT may take all device memory,
            which on a device with shared memory is the host's too.
        progress: told of every build step.

    Raises:
        ExportError: the flavour is not available, or the graph does not parse, or does not build.
    """
    onnx_path, plan_path = Path(onnx_path).resolve(), Path(plan_path)
    reason = available(flavour)
    if reason is not None:
        raise ExportError(f"cannot build `{onnx_path.name}`: {reason}", hint=_install_hint(flavour))
    if not onnx_path.is_file():
        raise ExportError(f"cannot build `{onnx_path}`: no such file", hint="export the graph first")
    if plan_path.exists():
        raise ExportError(f"`{plan_path}` exists", hint="choose another name or delete it")
    if not plan_path.parent.is_dir():
        raise ExportError(f"cannot write `{plan_path}`: no folder `{plan_path.parent}`", hint="create it first")

    known = FLAVOURS[flavour]
    trt: Any = importlib.import_module(known.module)
    capabilities = _capabilities(trt, known, compute_capabilities)
    started = time.perf_counter()
    # Each of these must outlive the next: TensorRT holds plain pointers.
    logger = _make_logger(trt)
    try:
        builder = trt.Builder(logger)
    except TypeError as failed:  # the bindings' way to say that the factory gave nothing
        raise ExportError(
            f"{known.module} {trt.__version__} gives no builder: {_cause(logger)}", hint=_install_hint(flavour)
        ) from failed
    typed = flavour == "trt" and _version(trt.__version__) < (11,)
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if typed else 0
    network = builder.create_network(flags)
    parser = _parse(trt, network, logger, onnx_path)
    inputs = tuple(_tensor(network.get_input(i)) for i in range(network.num_inputs))
    outputs = tuple(_tensor(network.get_output(i)) for i in range(network.num_outputs))
    for tensor in inputs:
        if -1 in tensor.shape:
            raise ExportError(
                f"`{onnx_path.name}`: input `{tensor.name}` has shape {list(tensor.shape)}, where -1 is not fixed",
                hint="export the graph with a token budget; engines here have one shape",
            )

    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default: it would round float32 products to 10 bits
    if workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes)
    if capabilities:
        config.num_compute_capabilities = len(capabilities)
        for i, capability in enumerate(capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability}"), i)
    monitor = _make_monitor(trt, progress)
    config.progress_monitor = monitor

    plan = _run_cancellable(builder, network, config, monitor)
    del parser
    if plan is None:
        raise ExportError(
            f"cannot build `{onnx_path.name}` with {known.module} {trt.__version__}: {_cause(logger)}",
            hint=LINT_HINT,
        )
    seconds = time.perf_counter() - started
    _write_whole(plan_path, plan)
    return EngineReport(
        flavour=flavour,
        version=trt.__version__,
        compute_capabilities=capabilities,
        seconds=seconds,
        plan_bytes=plan.nbytes,
        layers=network.num_layers,
        inputs=inputs,
        outputs=outputs,
        warnings=tuple(dict.fromkeys(text for severity, text in logger.records if severity == WARNING)),
    )


# Severities of ILogger as integers; the enum is nested in a class of each module and never renumbered.
ERROR, WARNING = 1, 2


def _make_logger(trt: Any) -> Any:
    """A logger that keeps warnings and errors: TensorRT tells causes nowhere else."""

    class Recorder(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # super() does not register the override with the bindings
            self.records: list[tuple[int, str]] = []

        def log(self, severity: Any, msg: str) -> None:  # from any thread; must not raise
            level = int(severity)
            if level <= WARNING:
                self.records.append((level, msg.strip()))

    return Recorder()


def _make_monitor(trt: Any, progress: Progress | None) -> Any:
    """A progress monitor that forwards steps and can cancel."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.cancel = False
            self.raised: BaseException | None = None
            self.totals: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.totals[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            if progress is not None and not self.cancel:
                try:
                    progress(phase_name, step + 1, self.totals.get(phase_name, 0))
                except BaseException as error:  # noqa: BLE001  must not unwind through C++; re-raised after it
                    self.raised, self.cancel = error, True
            return not self.cancel

        def phase_finish(self, phase_name: str) -> None:
            self.totals.pop(phase_name, None)

    return Monitor()


def _run_cancellable(builder: Any, network: Any, config: Any, monitor: Any) -> Any:
    """Build in a worker thread, so that this one is free to receive Ctrl-C. Returns the plan, or None on failure."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        running = pool.submit(builder.build_serialized_network, network, config)
        try:
            plan = running.result()
        except KeyboardInterrupt:
            monitor.cancel = True  # leaving the `with` waits for the builder to notice
            raise
    if monitor.raised is not None:
        raise monitor.raised
    return plan


def _parse(trt: Any, network: Any, logger: Any, onnx_path: Path) -> Any:
    """Fill the network from the file; the parser is returned because it owns the weights."""
    parser = trt.OnnxParser(network, logger)
    # The path form, not the bytes form: only this one looks for external data beside the file.
    if parser.parse_from_file(str(onnx_path)):
        return parser
    errors = [_parser_error(parser.get_error(i)) for i in range(parser.num_errors)] or ["no reason given"]
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    raise ExportError(
        f"cannot parse `{onnx_path.name}` with {trt.__name__} {trt.__version__}: {errors[0]}{more}", hint=LINT_HINT
    )


def _parser_error(error: Any) -> str:
    """Node, operator and reason of one importer error, without the complaint that follows on hosts without a GPU."""
    lines = [t for t in error.desc().splitlines() if "cudaError" not in t and not t.startswith("Invalid Node")]
    reason = _one_line(" ".join(lines))
    if reason in ("", "false"):  # a bare check of the importer that has no text
        reason = f"refused by {error.func()}"
    if not error.node_operator():
        return reason
    name = error.node_name() or f"#{error.node()}"
    return f"node `{name}` ({error.node_operator()}): {reason}"


def _cause(logger: Any) -> str:
    """The error record that explains the rest: later ones are consequences, or complaints that there is no GPU."""
    errors = [text for severity, text in logger.records if severity <= ERROR]
    told = [text for text in errors if "API Usage Error" in text or "Assertion failed" in text]
    rest = [text for text in errors if "cudaError" not in text and "CUDA" not in text]
    return _one_line((told or rest or errors or ["TensorRT logged no error"])[0])


def _one_line(text: str, limit: int = 400) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _capabilities(trt: Any, known: Flavour, asked: Sequence[str] | None) -> tuple[str, ...]:
    if known.needs_gpu:
        if asked:
            raise ExportError(
                f"compute capabilities {list(asked)} for flavour `{known.name}`, which builds for the GPU present only",
                hint="leave them out, or use `rtx`",
            )
        return ()
    chosen = known.compute_capabilities if asked is None else tuple(asked)
    have = [name[2:] for name in trt.ComputeCapability.__members__ if re.fullmatch(r"SM\d+", name)]
    unknown = [c for c in chosen if c not in have]
    if unknown or not chosen:
        raise ExportError(
            f"{known.module} {trt.__version__} cannot build for compute capabilities {unknown or 'of an empty list'}",
            hint=f"choose from {', '.join(have)}",
        )
    return chosen


def _tensor(tensor: Any) -> TensorInfo:
    return TensorInfo(tensor.name, tuple(int(d) for d in tensor.shape), DTYPES[tensor.dtype.name])


def _write_whole(path: Path, plan: Any) -> None:
    """Write beside `path`, then rename: no reader ever sees half a plan."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("xb") as file:
            file.write(plan)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text)[:3])


def _no_gpu() -> str | None:
    """Ask the CUDA driver, not TensorRT: creating its builder takes seconds and prints."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        cuda = ctypes.CDLL(name)
    except OSError:
        return f"no NVIDIA driver: `{name}` is not found"
    count = ctypes.c_int(0)
    code = cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count))
    if code:
        return f"the NVIDIA driver answers error {code} (CUresult)"
    return None if count.value else "the NVIDIA driver sees no GPU"


def _install_hint(flavour: str) -> str:
    if flavour == "rtx":
        return "pip install tensorrt_rtx (1.7 or newer); it needs no GPU to build"
    return "run this on the target device with TensorRT 10.15 or newer, or build `rtx` engines here"
