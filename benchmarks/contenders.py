"""The contenders: one model and one prompt for all, three steps each (vision, prefill, decode of one token).

- eager-fp32, eager-bf16: the Hugging Face model, sdpa attention, DynamicCache. Vision is `get_image_features`, prefill
  one `forward` over the prompt with `logits_to_keep=1`, decode one `forward` per token.
- stock-onnx, stock-int8: the stock ONNX export (see `exports.py`). Vision is one graph. Prefill is: embedding rows and
  the merge of image features on the host, the graph `language_model`, the graph `lm_head` on the last row. Decode is
  one graph, on the buffers that prefill wrote.
- vlmcut-fp32-100, -25, vlmcut-int8-100, -25: a verified bundle at 100 % or 25 % of the visual tokens. Three graphs; at
  100 % too the vision graph scores its tokens.

No process loads a tokenizer or an image processor. All read the same pixels and the same text tokens, and decode the
same given tokens, so that they do equal work and their logits can be compared. A contender that keeps 25 % of the
visual tokens reads that many placeholders.
"""

from __future__ import annotations

import functools
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import numpy as np
from vlmcut.manifest import Layout, read
from vlmcut.prompt import Picture, Prompt, assemble
from vlmcut.runtime import sessions
from vlmcut.runtime.bench import peak_rss_mb
from vlmcut.runtime.bundle import find_budget

TEXT_TOKENS, NEW_TOKENS, DECODED = 64, 32, 16  # tokens: of text in the prompt, of room in the cache, timed
EAGER = ("eager-fp32", "eager-bf16")
STOCK = ("stock-onnx", "stock-int8")
CUT = ("vlmcut-fp32-100", "vlmcut-fp32-25", "vlmcut-int8-100", "vlmcut-int8-25")
NAMES = (*EAGER, *STOCK, *CUT)


@dataclass(frozen=True)
class Inputs:
    """What every contender is fed."""

    pixel_values: np.ndarray  # float32 [1, 3, size, size]
    text: np.ndarray  # int64 [TEXT_TOKENS]; the image stands after a quarter of it
    answer: np.ndarray  # int64 [DECODED], decoded whatever the logits say
    image_token: int
    visual_tokens: int  # of one image, before pruning

    def prompt(self, keep: int) -> Prompt:
        """The prompt with `keep` placeholders; which tokens they stand for makes no difference to it."""
        before, after = np.split(self.text, [TEXT_TOKENS // 4])
        ids = np.concatenate([before, np.full(self.visual_tokens, self.image_token), after])
        picture = Picture(self.pixel_values, {"pixel_values": self.pixel_values.shape})
        whole = assemble(Layout(image_token_id=self.image_token), ids[None], [picture], [self.visual_tokens])
        return whole.shrink([np.arange(keep)])


def read_inputs(model: Path, seed: int = 0) -> Inputs:
    """Noise pixels and random tokens, equal in every process."""
    config = json.loads((model / "config.json").read_text())
    vision, vocabulary = config["vision_config"], config["text_config"]["vocab_size"]
    image = config.get("image_token_index", config.get("image_token_id"))
    rng = np.random.default_rng(seed)
    tokens = rng.integers(5, vocabulary, TEXT_TOKENS + DECODED)
    tokens[tokens == image] = image + 1
    size = vision["image_size"]
    pixels = rng.normal(0, 1, (1, 3, size, size)).astype(np.float32)
    count = (size // vision["patch_size"]) ** 2
    return Inputs(pixels, tokens[:TEXT_TOKENS], tokens[TEXT_TOKENS:], image, count)


class Contender(Protocol):
    """Three steps; `prefill` and `decode` return the logits of the last token, float32 [vocabulary]."""

    def vision(self) -> Any: ...
    def prefill(self, features: Any) -> np.ndarray: ...
    def decode(self, token: int, length: int) -> np.ndarray:
        """`length` counts the cache after this token."""
        ...


class Eager:
    """The Hugging Face model: sdpa attention, DynamicCache, every visual token."""

    def __init__(self, model: Path, inputs: Inputs, dtype: str) -> None:
        import torch
        from transformers import DynamicCache, LlavaForConditionalGeneration

        self.torch = torch
        made: Any = LlavaForConditionalGeneration.from_pretrained(
            model, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
        self.model = made.eval()
        self.new_cache = lambda: DynamicCache(config=self.model.config.text_config)
        self.cache = self.new_cache()
        self.ids = torch.from_numpy(inputs.prompt(inputs.visual_tokens).input_ids)
        self.pixels = torch.from_numpy(inputs.pixel_values).to(self.model.dtype)

    def vision(self) -> Any:
        with self.torch.inference_mode():
            return self.model.get_image_features(self.pixels, return_dict=True)

    def prefill(self, features: Any) -> np.ndarray:
        self.cache = self.new_cache()
        return self._forward(self.ids, mm_encoder_outputs={"image": features})

    def decode(self, token: int, length: int) -> np.ndarray:
        return self._forward(self.torch.tensor([[token]]))

    def _forward(self, ids: Any, **options: Any) -> np.ndarray:
        with self.torch.inference_mode():
            out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1, **options)
        return out.logits[0, -1].float().numpy()


class Cut:
    """A vlmcut bundle, through its runner."""

    def __init__(self, bundle: Path, inputs: Inputs, keep: int, threads: int) -> None:
        manifest = read(bundle)
        self.graphs = sessions.Graphs(bundle, manifest, find_budget(manifest, keep), threads=threads)
        self.prompt = inputs.prompt(keep)

    def vision(self) -> Any:
        return self.graphs.vision(self.prompt.pictures[0])

    def prefill(self, features: Any) -> np.ndarray:
        return self.graphs.prefill(self.prompt, [features])

    def decode(self, token: int, length: int) -> np.ndarray:
        return self.graphs.decode(token, self.prompt, length - self.prompt.length - 1)


class Stock:
    """The graphs of `exports.export_stock` in ONNX Runtime, with the session options of vlmcut's runner.

    The KV buffers that `language_model` writes are bound as inputs and as outputs of `decode`, so a step copies no
    cache if the graph can work in place. Embedding rows come from the mapped checkpoint: stock exports no graph for
    them.
    """

    def __init__(self, folder: Path, model: Path, inputs: Inputs, threads: int) -> None:
        import onnxruntime as ort

        self.ort = ort
        names = ("vision", "language_model", "lm_head", "decode")
        self.sessions = {name: sessions.open_session(folder / f"{name}.onnx", threads=threads) for name in names}
        self.columns = {n: s.get_inputs() for n, s in self.sessions.items()}
        self.table = _embedding(model)
        prompt = inputs.prompt(inputs.visual_tokens)
        self.ids, self.place = prompt.input_ids[0], prompt.visual_index[0] >= 0
        self.pixels = inputs.pixel_values
        cache = next(i for i in self.columns["decode"] if i.name.endswith("keys"))
        self.rows = int(cache.shape[2])  # of a KV buffer
        self.prefilled = self._bind_prefill(cache.shape)
        self.step = self._bind_step()

    def _bind_prefill(self, shape: Sequence[int]) -> Any:
        binding = self.sessions["language_model"].io_binding()
        self.cache: dict[str, Any] = {}
        for output in self.sessions["language_model"].get_outputs():
            name = output.name.removeprefix("output.")
            if name.endswith(("keys", "values")):
                self.cache[name] = self.ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
                binding.bind_ortvalue_output(output.name, self.cache[name])
            else:
                binding.bind_output(output.name, "cpu")
        return binding

    def _bind_step(self) -> Any:
        binding = self.sessions["decode"].io_binding()
        for column in self.columns["decode"]:
            if (name := column.name.removeprefix("input.")) in self.cache:
                binding.bind_ortvalue_input(column.name, self.cache[name])
        for output in self.sessions["decode"].get_outputs():
            if (name := output.name.removeprefix("output.")) in self.cache:
                binding.bind_ortvalue_output(output.name, self.cache[name])
            else:
                binding.bind_output(output.name, "cpu")
        return binding

    def vision(self) -> Any:
        return np.asarray(self.sessions["vision"].run(None, {"pixel_values": self.pixels})[0])

    def prefill(self, features: Any) -> np.ndarray:
        x = self.table[self.ids]
        x[self.place] = features.reshape(-1, x.shape[-1])
        position = np.arange(len(self.ids))[None]
        self._feed("language_model", self.prefilled, {"inputs_embeds": x[None], "position_ids": position}, start=0)
        self.sessions["language_model"].run_with_iobinding(self.prefilled)
        names = [o.name for o in self.sessions["language_model"].get_outputs()]
        hidden = self.prefilled.get_outputs()[names.index("last_hidden_state")].numpy()
        head = self.sessions["lm_head"]
        return np.asarray(head.run(None, {head.get_inputs()[0].name: hidden[:, -1:]})[0])[0, -1]

    def decode(self, token: int, length: int) -> np.ndarray:
        mask = (np.arange(self.rows) < length)[None, None, None]
        values = {"input_ids": np.array([[token]]), "position_ids": np.array([[length - 1]]), "attention_mask": mask}
        self._feed("decode", self.step, values, start=length - 1)
        self.sessions["decode"].run_with_iobinding(self.step)
        names = [o.name for o in self.sessions["decode"].get_outputs()]
        return self.step.get_outputs()[names.index("logits")].numpy()[0, -1]

    def _feed(self, graph: str, binding: Any, values: dict[str, np.ndarray], start: int) -> None:
        """Bind the small inputs; each layer has its own counter of cached rows, which is `start` before this call."""
        for column in self.columns[graph]:
            name = column.name.removeprefix("input.")
            if name.endswith("cumulative_length"):
                binding.bind_cpu_input(column.name, np.full(column.shape, start, np.int64))
            elif (key := name.split(".")[0]) in values:  # `attention_mask.full_attention` is the attention_mask
                binding.bind_cpu_input(column.name, np.ascontiguousarray(values[key]))


def _embedding(model: Path) -> np.ndarray:
    """The token embedding table [vocabulary, hidden], mapped, not read."""
    path = model / "model.safetensors"
    with path.open("rb") as file:
        start = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start))
    entry = next(v for k, v in header.items() if k.endswith("embed_tokens.weight"))
    assert entry["dtype"] == "F32"
    return np.memmap(path, np.float32, "r", 8 + start + entry["data_offsets"][0], tuple(entry["shape"]))


def make(name: str, work: Path, inputs: Inputs, threads: int) -> Contender:
    """Load one contender.

    Args:
        work: the work folder, with what the stages build and export wrote.
    """
    if name in EAGER:
        import torch

        torch.set_num_threads(threads)
        folder, dtype = {"eager-fp32": ("model", "float32"), "eager-bf16": ("model-bf16", "bfloat16")}[name]
        return Eager(work / folder, inputs, dtype)
    if name in STOCK:
        return Stock(work / name, work / "model", inputs, threads)
    keep = inputs.visual_tokens if name.endswith("-100") else quarter(inputs.visual_tokens)
    return Cut(work / f"bundle-{name.split('-')[1]}", inputs, keep, threads)


def quarter(tokens: int) -> int:
    """How many visual tokens are 25 %."""
    return max(1, round(tokens / 4))


def prompt_tokens(name: str, inputs: Inputs) -> int:
    """Tokens in the prompt of a contender."""
    return TEXT_TOKENS + (quarter(inputs.visual_tokens) if name.endswith("-25") else inputs.visual_tokens)


def run_once(contender: Contender, inputs: Inputs, length: int) -> tuple[dict[str, float], np.ndarray]:
    """One image, one prompt of `length` tokens, DECODED tokens.

    Returns:
        ms: `vision`, `prefill`, and `decode` per token; and the logits after prefill and after the last token,
        float32 [2, vocabulary].
    """
    start = time.perf_counter()
    features = contender.vision()
    seen = time.perf_counter()
    first = np.array(contender.prefill(features))
    read = time.perf_counter()
    logits = first
    for count, token in enumerate(inputs.answer, 1):
        logits = contender.decode(int(token), length + count)
    end = time.perf_counter()
    ms = {"vision": seen - start, "prefill": read - seen, "decode": (end - read) / len(inputs.answer)}
    return {k: 1000 * v for k, v in ms.items()}, np.stack([first, logits])


def measure(name: str, work: Path, *, runs: int, warmup: int, threads: int) -> dict[str, Any]:
    """Time one contender in this process.

    Returns:
        `samples` (ms), `load_s`, `peak_rss_mb` (10^6 bytes) of this process; saves the logits to `work/logits`.
    """
    inputs = read_inputs(work / "model")
    start = time.perf_counter()
    contender = make(name, work, inputs, threads)
    load_s = time.perf_counter() - start
    length = prompt_tokens(name, inputs)
    done = [run_once(contender, inputs, length) for _ in range(warmup + runs)][warmup:]
    (work / "logits").mkdir(exist_ok=True)
    np.save(work / "logits" / f"{name}.npy", done[-1][1])
    return {
        "prompt_tokens": length,
        "samples": [ms for ms, _ in done],
        "load_s": load_s,
        "peak_rss_mb": peak_rss_mb(),
    }


def profile(name: str, work: Path, *, runs: int, warmup: int, threads: int) -> dict[str, dict[str, tuple[float, int]]]:
    """Where the time of one vlmcut contender goes, by ONNX Runtime's own clock, which slows small operators a little.

    Returns:
        For vision, prefill and decode: operator type -> (ms per call of the graph, nodes), slowest first.
    """
    inputs = read_inputs(work / "model")
    with tempfile.TemporaryDirectory() as place:
        opened = functools.partial(sessions.open_session, profile=Path(place) / "trace")
        with mock.patch.object(sessions, "open_session", opened):
            contender = make(name, work, inputs, threads)
        assert isinstance(contender, Cut)
        for _ in range(warmup + runs):
            run_once(contender, inputs, prompt_tokens(name, inputs))
        found = {}
        for file, session in contender.graphs._sessions.items():
            role = Path(file).stem.partition("-")[0]
            skip = warmup * (DECODED if role == "decode" else 1)
            found[role] = _by_operator(json.loads(Path(session.end_profiling()).read_text()), skip)
    return found


def _by_operator(events: list[dict[str, Any]], skip: int) -> dict[str, tuple[float, int]]:
    """ms per call and node count by operator type, without the first `skip` calls; `whole call` is the wall time."""
    calls = sorted((e["ts"], e["dur"]) for e in events if e["name"] == "model_run")[skip:]
    us: dict[str, float] = defaultdict(float)
    nodes: dict[str, set[str]] = defaultdict(set)
    for event in events:
        if event["name"].endswith("_kernel_time") and event["ts"] >= calls[0][0]:
            operator = event["args"]["op_name"]
            us[operator] += event["dur"]
            nodes[operator].add(event["name"])
    ranked = {k: (us[k] / len(calls) / 1000, len(nodes[k])) for k in sorted(us, key=lambda k: -us[k])}
    return {"whole call": (sum(d for _, d in calls) / len(calls) / 1000, sum(map(len, nodes.values())))} | ranked
