"""Run the graphs of one budget with ONNX Runtime: fixed shapes, KV buffers bound in place.

`past_key_i` and `present_key_i` are bound to the same memory, so a step writes its row into the cache and nothing is
copied. Padding rows of a prompt write rows that decode overwrites before they can be seen.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ..errors import BundleError, nearest
from ..manifest import GraphInfo, Manifest, TokenBudget

_state: Any = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")  # has no type stub
_ORT_ERRORS = (
    _state.Fail, _state.InvalidArgument, _state.InvalidGraph, _state.InvalidProtobuf, _state.NoSuchFile,
    _state.NotImplemented, _state.RuntimeException,
)  # fmt: skip
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def providers(provider: str) -> list[str]:
    """ONNX Runtime's provider list for `cpu` or `cuda`.

    Raises:
        BundleError: an unknown name, or a provider that this machine does not have; there is no silent fallback.
    """
    if provider not in PROVIDERS:
        raise BundleError(f"no provider `{provider}`", hint=nearest(provider, PROVIDERS))
    name = PROVIDERS[provider]
    if name not in ort.get_available_providers():
        raise BundleError(
            f"{name} is not in this ONNX Runtime, which has {', '.join(ort.get_available_providers())}",
            hint="install onnxruntime-gpu, or use --provider cpu",
        )
    return [name] if provider == "cpu" else [name, PROVIDERS["cpu"]]


def open_session(
    path: Path, provider: str = "cpu", threads: int = 0, profile: Path | None = None
) -> ort.InferenceSession:
    """Open one graph.

    Args:
        threads: of one operator; 0 lets ONNX Runtime choose.
        profile: prefix of a Chrome trace to write.

    Raises:
        BundleError: ONNX Runtime cannot load the file, or did not get the provider that was asked for.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    wanted = providers(provider)
    try:
        session = ort.InferenceSession(str(path), options, providers=wanted)
    except _ORT_ERRORS as error:
        raise BundleError(f"ONNX Runtime cannot load `{path.name}`: {error}", hint="convert the model again") from error
    if session.get_providers()[0] != wanted[0]:
        raise BundleError(
            f"{wanted[0]} did not start; ONNX Runtime offers {', '.join(session.get_providers())}",
            hint="check the GPU driver and CUDA libraries, or use --provider cpu",
        )
    return session


def _check_tensors(info: GraphInfo, session: ort.InferenceSession) -> None:
    """Binding a name that a graph does not have fails late and obscurely, so names and shapes are compared first."""
    for kind, want, have in (
        ("inputs", info.inputs, session.get_inputs()),
        ("outputs", info.outputs, session.get_outputs()),
    ):
        promised, found = {(t.name, t.shape) for t in want}, {(t.name, tuple(t.shape)) for t in have}
        if promised != found:
            raise BundleError(
                f"`{info.file}` has {len(found)} {kind}, the manifest promises {len(promised)}; "
                f"differing: {', '.join(sorted({name for name, _ in promised ^ found}))}",
                hint="convert the model again",
            )


class Graphs:
    """The three graphs of one budget and their KV buffers.

    Args:
        folder: of the bundle. budget: index into the manifest's budgets.
        provider: cpu or cuda. threads: of one operator, 0 lets ONNX Runtime choose.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, budget: int = 0, *, provider: str = "cpu", threads: int = 0
    ) -> None:
        self.budget: TokenBudget = manifest.budgets[budget]
        self.device = provider
        self._sessions: dict[str, ort.InferenceSession] = {}
        self._info: dict[str, GraphInfo] = {}
        for role in ("vision", "prefill", "decode"):
            info = manifest.graph(role, budget)
            self._sessions[role] = open_session(folder / info.file, provider, threads)
            self._info[role] = info
            _check_tensors(info, self._sessions[role])
        self.dtype = np.dtype(manifest.dtype)
        self._cache = [
            ort.OrtValue.ortvalue_from_numpy(np.zeros((1, heads, self.budget.cache, dim), self.dtype), provider, 0)
            for heads, dim in manifest.cache_shapes
            for _ in ("key", "value")
        ]
        self._bindings = {role: self._bind_cache(role) for role in ("prefill", "decode")}

    def _bind_cache(self, role: str) -> ort.IOBinding:
        binding = self._sessions[role].io_binding()
        for index, buffer in enumerate(self._cache):
            kind = f"{('key', 'value')[index % 2]}_{index // 2}"
            binding.bind_ortvalue_input(f"past_{kind}", buffer)
            binding.bind_ortvalue_output(f"present_{kind}", buffer)
        binding.bind_output("logits", "cpu")
        return binding

    def vision(self, pixel_values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One image, [1, 3, height, width] -> features [K, hidden], kept positions [1, K]."""
        features, kept = self._sessions["vision"].run(
            ["image_features", "kept"], {"pixel_values": pixel_values.astype(self.dtype)}
        )
        return np.asarray(features), np.asarray(kept)

    def prefill(
        self, input_ids: np.ndarray, visual_index: np.ndarray, features: Sequence[np.ndarray], length: int
    ) -> np.ndarray:
        """A padded prompt, [1, S] twice, with the features of its images -> logits of its last token, float32 [V]."""
        k, rows = self.budget.visual_tokens, self.budget.images * self.budget.visual_tokens
        hidden = self._shape("prefill", "image_features")[1]
        table = np.zeros((rows, hidden), self.dtype)
        for index, image in enumerate(features):
            table[index * k : (index + 1) * k] = image
        return self._step(
            "prefill",
            {
                "input_ids": input_ids,
                "visual_index": visual_index,
                "position_ids": np.arange(input_ids.shape[1])[None],
                "image_features": table,
                "length": np.array([length]),
            },
        )

    def decode(self, token: int, length: int) -> np.ndarray:
        """One token; `length` counts the cache after it -> logits of the next token, float32 [V]."""
        return self._step(
            "decode",
            {"input_ids": np.array([[token]]), "position_ids": np.array([[length - 1]]), "length": np.array([length])},
        )

    def cache(self) -> list[np.ndarray]:
        """Copies of the KV buffers, key 0, value 0, key 1, …, each [1, kv_heads, C, head_dim]."""
        return [buffer.numpy() for buffer in self._cache]

    def _step(self, role: str, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        binding = self._bindings[role]
        for name, value in inputs.items():
            binding.bind_cpu_input(name, value)
        self._sessions[role].run_with_iobinding(binding)
        return binding.get_outputs()[-1].numpy()[0].astype(np.float32)

    def _shape(self, role: str, name: str) -> tuple[int, ...]:
        return next(t.shape for t in self._info[role].inputs if t.name == name)
