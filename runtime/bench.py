"""How fast a bundle answers here: time to first token by graph, decode speed, peak memory.

Runs of two bundles are interleaved, so that a drifting clock hits both; medians and ratios are what counts.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..prompt import Prompt
from .bundle import Bundle


@dataclass(frozen=True)
class Speed:
    """Medians over all runs; times in ms."""

    images: int
    prompt_tokens: int  # with placeholders, before padding
    vision_ms: float  # all images, selection of tokens included
    prefill_ms: float
    ttft_ms: float
    decode_ms: float  # per token
    tokens_per_second: float  # of decode
    peak_rss_mb: float  # of this process since it started

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def full_prompt(bundle: Bundle, seed: int = 0) -> Prompt:
    """A prompt of random tokens and noise images that fills the budget."""
    budget, rng = bundle.budget, np.random.default_rng(seed)
    size = next(t.shape for t in bundle.manifest.graph("vision", bundle.budget_index).inputs)[1:]
    placeholders = budget.images * budget.visual_tokens
    index = np.concatenate([np.arange(placeholders), np.full(budget.text_tokens, -1)])
    ids = np.where(index >= 0, bundle.manifest.image_token_id, rng.integers(5, 100, len(index)))
    pixels = rng.normal(0, 1, (budget.images, *size)).astype(np.float32)
    return Prompt(ids[None], index[None], pixels, budget.images, budget.visual_tokens)


def bench(bundles: Sequence[Bundle], *, runs: int = 10, decode_tokens: int = 16, warmup: int = 2) -> list[Speed]:
    """Time bundles in turn, one run of each at a time.

    Args:
        runs: counted runs of each bundle, after `warmup` uncounted ones.
        decode_tokens: tokens decoded per run; at most the budget's new tokens.
    """
    prompts = [full_prompt(b) for b in bundles]
    samples: list[list[tuple[float, float, float]]] = [[] for _ in bundles]
    for run in range(warmup + runs):
        for bundle, prompt, kept in zip(bundles, prompts, samples, strict=True):
            sample = _once(bundle, prompt, min(decode_tokens, bundle.budget.new_tokens))
            if run >= warmup:
                kept.append(sample)
    return [_speed(p, s) for p, s in zip(prompts, samples, strict=True)]


def _once(bundle: Bundle, prompt: Prompt, tokens: int) -> tuple[float, float, float]:
    ids, index = prompt.pad(bundle.budget)
    start = time.perf_counter()
    features, _ = bundle.see(prompt)
    seen = time.perf_counter()
    logits = bundle.graphs.prefill(ids, index, features, prompt.length)
    first = time.perf_counter()
    for count in range(1, tokens + 1):
        logits = bundle.graphs.decode(int(logits.argmax()), prompt.length + count)
    return seen - start, first - seen, (time.perf_counter() - first) / tokens


def _speed(prompt: Prompt, samples: Sequence[tuple[float, float, float]]) -> Speed:
    vision, prefill, decode = (1000 * statistics.median(column) for column in zip(*samples, strict=True))
    ttft = 1000 * statistics.median(v + p for v, p, _ in samples)
    return Speed(prompt.images, prompt.length, vision, prefill, ttft, decode, 1000 / decode, peak_rss_mb())


def peak_rss_mb() -> float:
    """Peak resident memory of this process in MB (10^6 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
