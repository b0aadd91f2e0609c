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

from ..prompt import Picture, Prompt, assemble
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
    budget, rng, layout = bundle.budget, np.random.default_rng(seed), bundle.manifest.layout
    bucket = max(bundle.manifest.buckets, key=lambda b: b.tokens)
    placeholders = np.full(budget.images * bucket.tokens, layout.image_token_id)
    words = rng.integers(5, 100, budget.text_tokens)
    words[words == layout.image_token_id] += 1
    pixels = [rng.normal(0, 1, bucket.pixels).astype(np.float32) for _ in range(budget.images)]
    pictures = [Picture(p, bucket.geometry, bucket.frames, words) for p in pixels]
    ids = np.concatenate([placeholders, words])[None]
    return assemble(layout, ids, pictures, [bucket.tokens] * budget.images)


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
    return [_speed(b, p, s) for b, p, s in zip(bundles, prompts, samples, strict=True)]


def _once(bundle: Bundle, prompt: Prompt, tokens: int) -> tuple[float, float, float]:
    start = time.perf_counter()
    shrunk, sights = bundle.see(prompt)
    seen = time.perf_counter()
    logits = bundle.graphs.prefill(shrunk, sights)
    first = time.perf_counter()
    for count in range(tokens):
        logits = bundle.graphs.decode(int(logits.argmax()), shrunk, count)
    return seen - start, first - seen, (time.perf_counter() - first) / tokens


def _speed(bundle: Bundle, prompt: Prompt, samples: Sequence[tuple[float, float, float]]) -> Speed:
    vision, prefill, decode = (1000 * statistics.median(column) for column in zip(*samples, strict=True))
    prompt_tokens = prompt.length - sum(prompt.counts) + len(prompt.pictures) * bundle.budget.visual_tokens
    ttft = 1000 * statistics.median(v + p for v, p, _ in samples)
    return Speed(len(prompt.pictures), prompt_tokens, vision, prefill, ttft, decode, 1000 / decode, peak_rss_mb())


def peak_rss_mb() -> float:
    """Peak resident memory of this process in MB (10^6 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
