"""HyperCLOVA X Vision: a Qwen2.5-VL tower, positions of one axis, and a factor that multiplies the logits."""

from __future__ import annotations

from .base import Family


class HyperClovaX(Family):
    """Granite, the other family with `logits_scaling`, divides by it."""

    logits_scaling = 1
