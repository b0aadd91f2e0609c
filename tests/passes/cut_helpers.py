"""For tests of cuts of modules: the families that must work, how one is cut, and how it reads a prompt."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import vlmcut
from vlmcut.exporters.engines import available
from vlmcut.passes import folder
from vlmcut.passes.calibration import read_calibration
from vlmcut.passes.recipe import Recipe, make
from vlmcut.surgery.load import Loaded, describe, locate
from vlmcut.surgery.talk import Talk, see_all

MUST: Sequence[str] = (
    "llava llava-siglip-qwen2 llava_next llava_onevision qwen2_vl qwen2_5_vl qwen3_vl internvl smolvlm idefics3 "
    "paligemma gemma3 mistral3 pixtral lfm2_vl"
).split()

# tensorrt_rtx is one of the test tools; where it cannot be loaded, the reason is shown.
needs_rtx = pytest.mark.skipif(available("rtx") is not None, reason=f"needs TensorRT for RTX: {available('rtx')}")


def cut(loaded: Loaded, *steps: Any) -> Recipe:
    """Trim the tower, then apply these passes; calibrated on noise where one measures."""
    recipe = make(list(steps))
    return recipe.apply(loaded.model, read_calibration(loaded, None) if recipe.needs_calibration else None)


def read(
    loaded: Loaded, prompt: Any, tokens: list[torch.Tensor] | None = None, steps: int = 16
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits after the prompt and after each of `steps` tokens, [1 + steps, V], and the tokens: greedy unless given."""
    shrunk, seen = see_all(loaded.model, prompt)
    talk = Talk.read(loaded.model, [shrunk], [seen])
    rows, fed = [talk.logits[0]], []
    for step in range(steps):
        fed.append(talk.logits.argmax(dim=-1) if tokens is None else tokens[step])
        talk = talk.say(fed[-1])
        rows.append(talk.logits[0])
    return torch.stack(rows), fed


def said(loaded: Loaded, prompt: Any, tokens: Sequence[int]) -> torch.Tensor:
    """Logits after a prompt and after each token, [1 + T, V]."""
    shrunk, seen = see_all(loaded.model, prompt)
    talk = Talk.read(loaded.model, [shrunk], [seen])
    rows = [talk.logits[0]]
    for token in tokens:
        talk = talk.say(torch.tensor([token]))
        rows.append(talk.logits[0])
    return torch.stack(rows)


def layers_of(model: Any, part: str) -> list[Any]:
    parts = locate(model)
    return parts.tower_layers if part == "vision" else parts.language_layers


def script(name: str) -> Any:
    """A module of benchmarks/, which finds its neighbours as scripts do."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


def many_groups(tiny: Callable[[str], Loaded], kind: str) -> Loaded:
    """A tiny model with at least two KV heads in each layer: where it has one, as many as query heads."""
    return script("builds").many_groups(tiny(kind))


def saved_and_loaded(loaded: Loaded, source_config: Any, done: Recipe, out: Path) -> Loaded:
    """The same model through a folder; `describe` agrees."""
    folder.save(loaded, out, source_config, done)
    again = vlmcut.load(out)
    assert describe(again.model) == describe(loaded.model)
    return again


def answered(loaded: Loaded, said: list[torch.Tensor] | None = None) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """transformers' own model on the calibration prompts of noise, and nothing of `Talk`.

    Returns:
        For each prompt log-probabilities of the next token after it and after each of `said`, float64 [1 + tokens, V],
        and what was said: 8 greedy tokens of `generate`, up to its stop token, unless given.
    """
    found, answers = [], []
    for i, prompt in enumerate(read_calibration(loaded, None).prompts):
        (picture,) = prompt.pictures
        ids, pixels = torch.from_numpy(prompt.input_ids), torch.from_numpy(picture.pixel_values)
        if said is None:
            made = loaded.model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=8, do_sample=False)
            new = made[0, ids.shape[1] :]
            answers.append(new[new != loaded.model.generation_config.eos_token_id])
        else:
            answers.append(said[i])
        with torch.no_grad():
            logits = loaded.model(input_ids=torch.cat([ids, answers[-1][None]], dim=1), pixel_values=pixels).logits
        found.append(logits[0, ids.shape[1] - 1 :].double().log_softmax(dim=-1))
    return found, answers


def divergence(before: list[torch.Tensor], now: list[torch.Tensor]) -> float:
    """Mean KL divergence in nats: over tokens, then prompts."""
    each = [
        torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum") / len(p)
        for p, q in zip(before, now, strict=True)
    ]
    return float(sum(each)) / len(each)
