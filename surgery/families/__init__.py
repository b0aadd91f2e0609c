"""One reader per family on a structural base. The table below is the list of families; a file of its own adds one."""

from __future__ import annotations

from typing import Any

from .anyres import LlavaNext, LlavaOnevision
from .base import Family
from .fast_vlm import FastVlm
from .gemma import Gemma3, PaliGemma
from .gemma4 import Gemma4, Gemma4Vision
from .granite_docling import GraniteDocling
from .hyperclovax import HyperClovaX
from .idefics2 import Idefics2
from .lfm2 import Lfm2VL
from .llava import Llava
from .muse_spark import MuseSpark
from .ovis2 import Ovis2
from .pixtral import Mistral3, Pixtral
from .qwen import Qwen2VL, Qwen3VL, Qwen25VL
from .tiles import Idefics3, InternVL

FAMILIES: dict[str, Family] = {
    "llava": Llava(),
    "llava_next": LlavaNext(),
    "llava_onevision": LlavaOnevision(),
    "qwen2_vl": Qwen2VL(),
    "qwen2_5_vl": Qwen25VL(),
    "qwen3_vl": Qwen3VL(),
    "internvl": InternVL(),
    "idefics3": Idefics3(),
    "smolvlm": Idefics3(),
    "idefics2": Idefics2(),
    "ovis2": Ovis2(),
    "granite_docling": GraniteDocling(),
    "gemma4": Gemma4(),
    "hyperclovax_vision_v2": HyperClovaX(),
    "muse_spark": MuseSpark(),
    "paligemma": PaliGemma(),
    "gemma3": Gemma3(),
    "shieldgemma2": Gemma3(),
    "mistral3": Mistral3(),
    "pixtral": Pixtral(),  # a `llava` config with this tower
    "lfm2_vl": Lfm2VL(),
    "fast_vlm": FastVlm(),
}
STRUCTURAL = Family()
GEMMA4_VISION = Gemma4Vision()


def family_of(config: Any) -> Family:
    """The reader of a model type; the structural base for a type without one of its own."""
    kind = config.model_type
    if kind == "llava" and getattr(config.vision_config, "model_type", None) == "pixtral":
        kind = "pixtral"
    if kind == "gemma4" and config.get_text_config().use_bidirectional_attention == "vision":
        return GEMMA4_VISION
    return FAMILIES.get(kind, STRUCTURAL)
