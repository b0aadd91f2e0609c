"""Making what is measured: the model, the stock ONNX export, the vlmcut bundles. One function, one fresh process.

What stock (`transformers.exporters`) does here, and what it does not:

- `export_for_generation` with a static cache and `ort_fusions="cpu"` gives `language_model`, `lm_head`, `decode`; it
  leaves the vision tower and the projector out without a word, because `generate` encodes images before the forward
  that it captures. They are exported as a fourth graph, through a wrapper of `get_image_features`.
- It has no graph for the embedding and none for the merge of image features: the host does both.
- It traces `lm_head` on every token of the prompt. Exported with one dynamic axis instead, it serves the last row
  alone, which is what runs here: the faster form.
- Its int8 is ONNX Runtime's `quantize_dynamic`: signed weights, per channel, MatMul and Attention. The fused tied
  output matrix of `decode` is no MatMul and stays fp32.
- Each graph has its own weight file, so what `language_model`, `lm_head` and `decode` share is stored again.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from contenders import NEW_TOKENS, TEXT_TOKENS, quarter, read_inputs
from vlmcut.runtime.bench import peak_rss_mb

# SigLIP-so400m/14 at 384 pixels as LLaVA-OneVision uses it (26 layers, no head), and Qwen2-0.5B.
VISION = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26, "num_attention_heads": 16,
          "image_size": 384, "patch_size": 14}  # fmt: skip
LANGUAGE = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
            "num_key_value_heads": 2, "vocab_size": 151936}  # fmt: skip
SMALL_VISION = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 3,
                "image_size": 98, "patch_size": 14}  # fmt: skip
SMALL_LANGUAGE = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
                  "num_key_value_heads": 2, "vocab_size": 1024}  # fmt: skip


def build(out: Path, small: bool, seed: int = 0) -> dict[str, Any]:
    """Write a LLaVA folder with random weights and an offline processor.

    A second folder, `<out>-bf16`, holds the same weights rounded: a bfloat16 user has such a checkpoint.

    Returns:
        `parameters` (count) and `bytes` on disk of `out`.
    """
    import torch
    from transformers import (
        GenerationConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )
    from vlmcut.surgery import tiny

    processor: Any = tiny.make("llava-siglip-qwen2")[1]
    tokenizer = processor.tokenizer
    vision = SiglipVisionConfig(**(SMALL_VISION if small else VISION), vision_use_head=False)
    text = Qwen2Config(**(SMALL_LANGUAGE if small else LANGUAGE), tie_word_embeddings=True)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
    )
    torch.manual_seed(seed)
    model: Any = LlavaForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:  # keeps activations near 1 through all layers; norms and biases stay as they are
            parameter.data.normal_(0, 0.5 / parameter[0].numel() ** 0.5)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, do_sample=False)
    model.save_pretrained(out, max_shard_size="50GB")
    size = {"height": vision.image_size, "width": vision.image_size}
    processor.image_processor, processor.patch_size = type(processor.image_processor)(size=size), vision.patch_size
    processor.save_pretrained(out)
    model.to(torch.bfloat16).save_pretrained(f"{out}-bf16", max_shard_size="50GB")
    return {"parameters": sum(p.numel() for p in model.parameters()), "bytes": folder_bytes(out)}


def export_stock(model_folder: Path, out: Path, scheme: str) -> dict[str, Any]:
    """The stock export of every visual token, one graph per step, saved to `out`.

    Args:
        scheme: onnx (fp32) or int8.
    """
    import torch
    from transformers import GenerationConfig, LlavaForConditionalGeneration
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    class Vision(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixel_values: Any) -> dict[str, Any]:
            return {"image_features": self.model.get_image_features(pixel_values, return_dict=True).pooler_output[0]}

    inputs = read_inputs(model_folder)
    model: Any = LlavaForConditionalGeneration.from_pretrained(
        model_folder, dtype=torch.float32, attn_implementation="sdpa"
    )
    model.eval()
    loaded = peak_rss_mb()
    prompt = inputs.prompt(inputs.visual_tokens)
    ids, pixels = torch.from_numpy(prompt.input_ids), torch.from_numpy(inputs.pixel_values)
    quantizer = _stock_int8() if scheme == "int8" else None
    fused, last_row = OnnxConfig(ort_fusions="cpu", quantizer=quantizer), OnnxConfig(dynamic=True, quantizer=quantizer)
    out.mkdir()
    start = time.perf_counter()
    exporter = OnnxExporter()
    exported = exporter.export_for_generation(
        model,
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels},
        {"language_model": fused, "lm_head": last_row, "decode": fused},
        generation_config=GenerationConfig(
            cache_implementation="static", max_cache_len=prompt.length + NEW_TOKENS, do_sample=False
        ),
    )
    parts = {name: part.program for name, part in exported.components.items()}
    left_out = "vision" if not {"image_encoder", "vision"} & parts.keys() else "nothing"
    parts["vision"] = exporter.export(Vision(model), {"pixel_values": pixels}, fused).program
    for name, program in parts.items():
        exporter.save_program(program, out / f"{name}.onnx")
    seconds = time.perf_counter() - start
    return _figures(out, seconds, loaded) | {"left_out_by_export_for_generation": left_out}


def _stock_int8() -> Any:
    from onnxruntime.quantization import QuantType
    from transformers.exporters import OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer

    operators = ["MatMul", "Attention"]  # by default also Conv and Gather, which ONNX Runtime runs slower as int8
    return OnnxRuntimeQuantizer(
        OnnxRuntimeDynamicConfig(op_types_to_quantize=operators, weight_type=QuantType.QInt8, per_channel=True)
    )


def export_graphs(model_folder: Path, keep: tuple[int, ...]) -> dict[str, Any]:
    """vlmcut's graph export alone, fp32: loading, cutting, verifying and sealing are not in `seconds`."""
    from vlmcut import pipeline
    from vlmcut.exporters.graphs import write_graphs
    from vlmcut.exporters.operators import Contrib

    request = pipeline.Request(**_request(model_folder, keep))
    planned = pipeline.plan(request)
    loaded = pipeline.cut(request)[0]
    peak = peak_rss_mb()
    with tempfile.TemporaryDirectory(dir=model_folder.parent) as place:
        start = time.perf_counter()
        write_graphs(loaded.model, planned.budgets, planned.keeps, Contrib(), Path(place))
        seconds = time.perf_counter() - start
        return _figures(Path(place), seconds, peak)


def convert(model_folder: Path, out: Path, scheme: str) -> dict[str, Any]:
    """The whole conversion with its float64 verification: two budgets, 100 % and 25 % of the visual tokens.

    Args:
        scheme: fp32 or int8.
    """
    import vlmcut

    tokens = read_inputs(model_folder).visual_tokens
    steps: list[tuple[str, float]] = []
    progress: Callable[[str], None] = lambda line: steps.append((line, time.perf_counter()))  # noqa: E731
    start = time.perf_counter()
    quantize = "int8" if scheme == "int8" else "none"
    request = _request(model_folder, (quarter(tokens), tokens))
    manifest = vlmcut.convert(out=out, progress=progress, quantize=quantize, **request)
    end = time.perf_counter()
    ends = [*(t for _, t in steps[1:]), end]
    return _figures(out, end - start, 0.0) | {
        "exact": manifest.exactness["ok"],
        "steps_s": {name: round(stop - begin, 2) for (name, begin), stop in zip(steps, ends, strict=True)},
    }


def _request(model_folder: Path, keep: tuple[int, ...]) -> dict[str, Any]:
    return {
        "model": str(model_folder), "keep": keep, "method": "fastervlm", "target": "onnx", "images": 1,
        "text_tokens": TEXT_TOKENS, "new_tokens": NEW_TOKENS, "questions": 0,
    }  # fmt: skip


def _figures(folder: Path, seconds: float, loaded: float) -> dict[str, Any]:
    """Seconds, MB (10^6 bytes) of peak resident memory before and after, bytes on disk, weights stored twice."""
    figures = {"seconds": seconds, "loaded_rss_mb": loaded, "peak_rss_mb": peak_rss_mb()}
    names, size = repeated(folder)
    return figures | {
        "graph_files": len(list(folder.rglob("*.onnx"))),
        "bytes": folder_bytes(folder),
        "repeated_bytes": size,
        "repeated_weights": names,
    }


def folder_bytes(folder: Path) -> int:
    """Bytes of all files."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def _places(folder: Path) -> dict[str, dict[tuple[Path, int, int], str]]:
    """Every stored weight by content: sha256 -> {(file, offset, bytes) -> its name in the first graph that reads it}.

    A matrix and its transpose count as the same content; a packed form (q, k and v in one) does not.
    """
    import numpy as np
    import onnx_ir as ir

    found: dict[str, dict[tuple[Path, int, int], str]] = {}
    seen = set()
    for path in sorted(folder.rglob("*.onnx")):
        for value in ir.load(path).graph.initializers.values():
            tensor = value.const_value
            if not isinstance(tensor, ir.ExternalTensor):  # small ones stay in the graph file
                continue
            place = (Path(tensor.path).resolve(), tensor.offset or 0, tensor.nbytes)
            if place in seen:
                continue
            seen.add(place)
            array = tensor.numpy()
            views = [array, array.T] if array.ndim == 2 else [array]
            digest = min(hashlib.sha256(np.ascontiguousarray(v).data).hexdigest() for v in views)
            found.setdefault(digest, {})[place] = f"{path.stem}: {value.name}"
    return found


def repeated(folder: Path) -> tuple[list[str], int]:
    """Weights that are stored more than once, as they are or transposed: their names, and the bytes of the repeats."""
    again = [places for places in _places(folder).values() if len(places) > 1]
    names = [" = ".join(places.values()) for places in again]
    return names, sum(length for places in again for _, _, length in list(places)[1:])


def run(task: str, work: Path, small: bool) -> dict[str, Any]:
    """One task by name into the work folder; what a failed attempt left there is removed first.

    Args:
        task: model, stock-onnx, stock-int8, bundle-fp32, bundle-int8, or graphs: vlmcut's graph export of one budget,
            whose files are deleted again.
    """
    model, out = work / "model", work / task
    if out.exists():
        shutil.rmtree(out)
    if task == "model":
        return build(out, small)
    if task.startswith("stock-"):
        return export_stock(model, out, task.removeprefix("stock-"))
    if task == "graphs":
        return export_graphs(model, (read_inputs(model).visual_tokens,))
    return convert(model, out, task.removeprefix("bundle-"))
