"""Run the graphs of one budget with ONNX Runtime: fixed shapes, KV buffers bound in place.

`past_…` and its `present_…` are bound to the same memory, so a step writes its row into the cache and nothing is
copied. Padding rows of a prompt write rows that decode overwrites before they can be seen.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ..errors import BundleError, nearest
from ..manifest import GraphInfo, Manifest, TokenBudget, visual_hidden, visual_left
from ..prompt import Picture, Prompt

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


def _question(ids: np.ndarray, room: int) -> dict[str, np.ndarray]:
    if len(ids) > room:
        raise BundleError(
            f"the question has {len(ids)} tokens, the vision graph takes {room}",
            hint=f"shorten it, or convert again with --text-tokens {len(ids)}",
        )
    return {"text_ids": np.pad(ids, (0, room - len(ids)))[None], "text_length": np.array([len(ids)])}


@dataclass(frozen=True)
class Sight:
    """What one picture became."""

    features: np.ndarray  # [K, hidden]
    kept: np.ndarray  # int64 [K], ascending
    levels: tuple[np.ndarray, ...] = ()  # DeepStack features, [K, hidden] each


class Graphs:
    """The graphs of one budget and the buffers of what its language model remembers.

    Args:
        folder: of the bundle. budget: index into the manifest's budgets.
        provider: cpu or cuda. threads: of one operator, 0 lets ONNX Runtime choose.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, budget: int = 0, *, provider: str = "cpu", threads: int = 0
    ) -> None:
        self.budget: TokenBudget = manifest.budgets[budget]
        self.buckets = manifest.buckets
        self.vocabulary = manifest.layout.vocabulary
        self.device = provider
        self._open = partial(self._session, folder, provider, threads)
        self._vision = [manifest.graph("vision", budget, i) for i in range(len(self.buckets))]
        self._info = {role: manifest.graph(role, budget) for role in ("prefill", "decode")}
        self._sessions: dict[str, ort.InferenceSession] = {}
        for info in (*self._vision, *self._info.values()):
            self._open(info)
        self.dtype = np.dtype(manifest.dtype)
        self._states = {
            tensor.name.removeprefix("past_"): ort.OrtValue.ortvalue_from_numpy(
                np.zeros(tensor.shape, self.dtype), provider, 0
            )
            for tensor in self._info["decode"].inputs
            if tensor.name.startswith("past_")
        }
        self._bindings = {role: self._bind_states(role) for role in self._info}
        self.kept: tuple[np.ndarray, ...] = ()  # of the last prompt, for each rung: its columns that went on, int64 [S]

    def _session(self, folder: Path, provider: str, threads: int, info: GraphInfo) -> ort.InferenceSession:
        if info.file not in self._sessions:
            session = open_session(folder / info.file, provider, threads)
            _check_tensors(info, session)
            self._sessions[info.file] = session
        return self._sessions[info.file]

    def _bind_states(self, role: str) -> ort.IOBinding:
        binding = self._open(self._info[role]).io_binding()
        for name, buffer in self._states.items():
            binding.bind_ortvalue_input(f"past_{name}", buffer)
            binding.bind_ortvalue_output(f"present_{name}", buffer)
        for name in [*self._rungs(role), "logits"]:
            binding.bind_output(name, "cpu")
        return binding

    def _rungs(self, role: str) -> list[str]:
        """Outputs of prefill that say which columns went on."""
        return [tensor.name for tensor in self._info[role].outputs if tensor.name.startswith("kept_")]

    def vision(self, picture: Picture) -> Sight:
        """Encode one picture.

        Raises:
            BundleError: no bucket has its geometry, or a question that is too long for the graph.
        """
        info = self._vision[picture.bucket(self.buckets)]
        inputs = {"pixel_values": picture.pixel_values.astype(self.dtype)}
        for tensor in info.inputs:
            if tensor.name == "text_ids":
                if self.vocabulary is not None:
                    self.vocabulary.check(picture.question)
                inputs |= _question(picture.question, tensor.shape[1])
        found = self._open(info).run([t.name for t in info.outputs], inputs)
        features, kept, *levels = map(np.asarray, found)
        return Sight(features, kept[0], tuple(levels))

    def prefill(self, prompt: Prompt, seen: Sequence[Sight]) -> np.ndarray:
        """A shrunk prompt with what its pictures became -> logits of its last token, float32 [V].

        Raises:
            BundleError: a prompt over budget.
        """
        k, inputs = self.budget.visual_tokens, dict(prompt.pad(self.budget))
        for tensor in self._info["prefill"].inputs:
            if tensor.name == "image_features" or tensor.name.startswith("deepstack_"):
                table = np.zeros(tensor.shape, self.dtype)
                for index, sight in enumerate(seen):
                    level = tensor.name.removeprefix("deepstack_")
                    rows = sight.features if tensor.name == "image_features" else sight.levels[int(level)]
                    table[index * k : index * k + len(rows)] = rows
                inputs[tensor.name] = table
        logits = self._step("prefill", inputs | self._left(prompt))
        outputs = self._bindings["prefill"].get_outputs()[-1 - len(self.budget.ladder) : -1]
        places = [value.numpy()[0] for value in outputs]
        self.kept = tuple(place[place < prompt.length] for place in places)
        return logits

    def _left(self, prompt: Prompt) -> dict[str, np.ndarray]:
        ladder = self.budget.ladder
        return {"left": np.array([visual_left(ladder, prompt.counts, rung.layer) for rung in ladder])} if ladder else {}

    def decode(self, token: int, prompt: Prompt, count: int) -> np.ndarray:
        """One token; `count` were fed since the prompt -> logits of the next token, float32 [V]."""
        position = np.full((prompt.layout.axes, 1), prompt.next_position + count)
        hidden = visual_hidden(self.budget.carriers, prompt.counts)
        length = np.array([prompt.length - hidden + count + 1])
        inputs = {"input_ids": np.array([[token]]), "position_ids": position, "length": length}
        return self._step("decode", inputs | self._left(prompt))

    def states(self) -> dict[str, np.ndarray]:
        """Copies of what the language model remembers: key_i, value_i [1, kv_heads, C, head_dim], conv_i."""
        return {name: buffer.numpy() for name, buffer in self._states.items()}

    def _step(self, role: str, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        binding = self._bindings[role]
        for name, value in inputs.items():
            binding.bind_cpu_input(name, value)
        self._open(self._info[role]).run_with_iobinding(binding)
        return binding.get_outputs()[-1].numpy()[0].astype(np.float32)
