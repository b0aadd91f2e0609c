"""The smallest budget answers first, and a larger one only where it was not sure.

Source: VisionThink, arXiv:2507.13348, and AdaptVision: look at little first, ask for more where that is not enough.
We differ: their models are trained to ask; here a rule decides, on any bundle with several budgets. An answer is as
sure as its least sure step, the smallest softmax probability of a greedy token, the one that ends it included. Nothing
of a smaller budget is reused: where the worst comes, all of them are paid for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import BundleError
from ..manifest import read
from ..prompt import Prompt
from .bundle import Bundle

CONFIDENCE = 0.95  # see docs/adaptive.md for what other thresholds give


@dataclass(frozen=True)
class Answer:
    """What was said, and by which budget."""

    text: str
    keep: int  # tokens per image of the budget that said it
    confidence: float  # the smallest probability of one of its tokens, 0..1
    tried: tuple[tuple[int, float], ...]  # all budgets in order with their confidence; where one gave up, so far


class Adaptive:
    """A bundle with several budgets that answers with the smallest that is sure enough.

    The graphs of a budget are opened when it is needed first, so one that is never needed takes no memory.

    Args:
        path: the bundle, made with `--keep` of several numbers.
        confidence: an answer below it is given again by the next larger budget; 0 never, 1 always.
        provider: `cpu` or `cuda`.
        threads: of one operator, 0 lets the runtime choose.

    Raises:
        BundleError: no bundle, one with a single budget, or a confidence outside 0..1.
    """

    def __init__(
        self, path: str | Path, *, confidence: float = CONFIDENCE, provider: str = "cpu", threads: int = 0
    ) -> None:
        if not 0 <= confidence <= 1:
            raise BundleError(f"confidence={confidence} is not a probability", hint="choose 0 to 1")
        self.keeps = sorted(budget.visual_tokens for budget in read(Path(path)).budgets)
        if len(self.keeps) == 1:
            raise BundleError(
                f"`{path}` has 1 budget of {self.keeps[0]} tokens per image, answering adaptively needs 2 or more",
                hint="convert again with several, such as --keep 36,144",
            )
        self.path = Path(path)
        self.confidence = confidence
        self._options = {"provider": provider, "threads": threads}
        self._opened: dict[int, Bundle] = {}

    def bundle(self, keep: int) -> Bundle:
        """The bundle with this budget, opened once."""
        if keep not in self._opened:
            self._opened[keep] = Bundle(self.path, keep=keep, **self._options)
        return self._opened[keep]

    def generate(
        self,
        images: Sequence[Image.Image | str | Path],
        prompt: str,
        max_new_tokens: int | None = None,
        *,
        fit: bool = False,
    ) -> Answer:
        """The answer of the smallest budget that is sure enough, or of the largest.

        Args:
            images, prompt, max_new_tokens, fit: as of `Bundle.generate`.
        """
        whole = self.bundle(self.keeps[0]).prompt(images, prompt, fit=fit)
        keeps = self.keeps if whole.pictures else self.keeps[:1]  # without a picture all say the same
        tried: list[tuple[int, float]] = []
        ids: list[int] = []
        for keep in keeps:
            needed = self.confidence if keep != keeps[-1] else 0.0
            ids, sure = answer(self.bundle(keep), whole, needed, max_new_tokens)
            tried.append((keep, sure))
            if sure >= needed:
                break
        tokenizer = self.bundle(self.keeps[0]).prompter.processor.tokenizer
        text = tokenizer.decode(ids, skip_special_tokens=True).strip()
        return Answer(text, *tried[-1], tuple(tried))


def answer(
    bundle: Bundle, prompt: Prompt, needed: float = 0.0, max_new_tokens: int | None = None
) -> tuple[list[int], float]:
    """Greedy token ids and the smallest probability of them; broken off as soon as that is below `needed`."""
    ids: list[int] = []
    sure = 1.0
    for token, logits in bundle.steps(prompt, max_new_tokens):
        sure = min(sure, probability(logits))
        if sure < needed:
            break
        if token not in bundle.stop:
            ids.append(token)
    return ids, sure


def probability(logits: np.ndarray) -> float:
    """Softmax probability of the largest of [V], computed in float64."""
    wide = logits.astype(np.float64)
    return 1 / math.fsum(np.exp(wide - wide.max()))


def account(answer: Answer, needed: float) -> str:
    """One line on which budget answered, how sure it was, and what was tried before."""
    *given_up, (keep, sure) = answer.tried
    before = [f"{k} tokens per image: {p:.2f}, below {needed:g}" for k, p in given_up]
    return "; ".join([*before, f"answered with {keep} tokens per image, least probability {sure:.2f}"])
