"""For tests of cuts of modules: the families that must work, how one is cut, and how it reads a prompt."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import vlmcut
from transformers import AutoModelForImageTextToText
from vlmcut.passes import folder
from vlmcut.passes.calibration import read_calibration
from vlmcut.passes.recipe import Recipe, make
from vlmcut.surgery.families import family_of
from vlmcut.surgery.load import Loaded, attach, describe, locate
from vlmcut.surgery.selection import attached
from vlmcut.surgery.talk import Talk, see_all
from vlmcut.surgery.tiny import weights

MUST: Sequence[str] = (
    "llava llava-siglip-qwen2 llava_next llava_onevision qwen2_vl qwen2_5_vl qwen3_vl internvl smolvlm idefics3 "
    "paligemma gemma3 mistral3 pixtral lfm2_vl"
).split()


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


def layers_of(model: Any, part: str) -> list[Any]:
    parts = locate(model)
    return parts.tower_layers if part == "vision" else parts.language_layers


def many_groups(tiny: Callable[[str], Loaded], kind: str) -> Loaded:
    """A tiny model with at least two KV heads in each layer: where it has one, as many as query heads."""
    loaded = tiny(kind)
    config = copy.deepcopy(loaded.model.config)
    text = config.get_text_config()
    if text.num_key_value_heads > 1:
        return loaded
    text.num_key_value_heads = text.num_attention_heads
    model = weights.draw(lambda: AutoModelForImageTextToText.from_config(config), 0, embeddings=0.05)
    model.generation_config = loaded.model.generation_config
    attach(model, attached(loaded.model).buckets)
    family_of(config).check(config)
    return Loaded(model, loaded.processor, loaded.source)


def saved_and_loaded(loaded: Loaded, source_config: Any, done: Recipe, out: Path) -> Loaded:
    """The same model through a folder; `describe` agrees."""
    folder.save(loaded, out, source_config, done)
    again = vlmcut.load(out)
    assert describe(again.model) == describe(loaded.model)
    return again
