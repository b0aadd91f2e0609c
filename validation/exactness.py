"""The gate: do the graphs compute what the cut eager model computes?

Inputs are fresh: seeded images and prompts that no trace has seen, at full budget, short, text only, with images in
the middle. The reference runs in float64; how far the eager model in the graph's own dtype is from it is the noise
floor of each output; a graph may be `MULTIPLE` times as far, no more. Which tokens are kept must be equal, unless the
runtime's choice is within rounding of the reference's own scores (`regret`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..manifest import ExactnessRow, TokenBudget
from ..prompt import Prompt
from ..runtime.sessions import Graphs
from ..surgery.anatomy import Anatomy
from ..surgery.load import locate
from . import cases, reference
from .cases import GREEDY, Case, Distances

MULTIPLE = 8  # of the noise floor; eager and runtime round in other orders, neither is the better one
MULTIPLE_INT8 = 4  # here the floor already holds whole quantization steps
_NUDGE = 1e-5  # relative, about a hundred times float32 rounding
_LEAST = 1e-7  # a floor is never below the last bit of float32 at 1


@dataclass
class Exactness:
    """The verdict over one or several budgets."""

    rows: list[ExactnessRow] = field(default_factory=list)
    tokens: int = 0  # greedy tokens compared
    equal: int = 0
    near_ties: list[str] = field(default_factory=list)  # a token that differs where two logits are closer than noise
    wrong: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return bool(self.rows) and all(row.ok for row in self.rows) and not self.wrong

    def merge(self, other: Exactness) -> None:
        """Add the verdict of another budget."""
        self.rows += other.rows
        self.tokens += other.tokens
        self.equal += other.equal
        self.near_ties += other.near_ties
        self.wrong += other.wrong

    def worst(self, count: int = 5) -> list[ExactnessRow]:
        """Rows by how far they are beyond their tolerance; a NaN first."""
        return sorted(self.rows, key=lambda r: -(np.inf if np.isnan(r.max_abs) else r.max_abs / r.tolerance))[:count]


def measure(
    model: Any, a: Anatomy, budget: TokenBudget, graphs: Graphs, *, seed: int = 0, name: str = ""
) -> tuple[Exactness, list[Case]]:
    """Judge the three graphs of one budget against the cut model.

    Args:
        model: the cut model in the graph's dtype; its selection keeps `budget.visual_tokens`.
        name: prefix of the graph names in the rows.

    Returns:
        The verdict, and the cases with their float64 references.
    """
    exact = reference.truth(model)
    found: list[Distances] = []
    floors: list[Distances] = []
    recorded = []
    flips: list[tuple[float, str]] = []
    verdict = Exactness()
    kept = _Kept()
    for prompt in fresh_prompts(a, budget, seed):
        choice = [graphs.vision(image[None])[1] for image in _images(prompt)]
        for image, positions in zip(_images(prompt), choice, strict=True):
            nudge = seed + 1 if "vision" in a.quantized else None  # see below
            kept.look(model, exact, torch.from_numpy(image)[None], torch.from_numpy(positions), nudge)
        case = _record(exact, prompt, choice, min(GREEDY, budget.new_tokens))
        recorded.append(case)
        found.append(cases.distances(graphs, case))
        floors.append(_floor(model, case))
        if a.quantized:
            # Rounding to int8 steps is all or nothing: one value on an edge moves a whole step in one run and not
            # in the other. Nudged inputs show how far such a step goes, whether or not this run met one.
            floors += [_floor(model, case, nudge=seed + i) for i in (1, 2)]
        flips += _compare_tokens(verdict, model, graphs, case, name)
    far, floor = cases.worst(found), cases.worst(floors)
    far["vision", "kept"], floor["vision", "kept"] = kept.regret, kept.noise
    multiple = MULTIPLE_INT8 if a.quantized else MULTIPLE
    for (graph, output), value in far.items():
        tolerance = multiple * max(floor[graph, output], _LEAST)
        note = kept.note if output == "kept" else ""
        verdict.rows.append(
            ExactnessRow(
                graph=name + graph,
                output=output,
                max_abs=value,
                floor=floor[graph, output],
                tolerance=tolerance,
                ok=bool(value <= tolerance),
                note=note,
            )
        )
    # A flip between two logits that rounding alone may swap is a near tie, not a fault; it is counted and shown.
    close = 2 * max(row.tolerance for row in verdict.rows if row.output == "logits")
    verdict.near_ties = [text for gap, text in flips if gap <= close]
    verdict.wrong = [text for gap, text in flips if not gap <= close]
    return verdict, recorded


def fresh_prompts(a: Anatomy, budget: TokenBudget, seed: int) -> list[Prompt]:
    """Four seeded prompts: every column used; one image in the middle; text only; a short one with the image last."""
    rng = np.random.default_rng([seed, budget.visual_tokens])
    k, text = budget.visual_tokens, budget.text_tokens
    layouts = [
        (budget.images, text, "spread"),
        (1, max(2, text // 2), "spread"),
        (0, max(2, text // 3), "spread"),
        (1, max(2, text // 4), "last"),
    ]
    prompts = []
    for images, words, where in layouts:
        ids = rng.integers(0, a.language.vocabulary, words)
        ids[ids == a.image_token_id] = (a.image_token_id + 1) % a.language.vocabulary
        places = sorted(rng.integers(1, words, images)) if where == "spread" else [words - 1] * images
        columns = np.split(ids, places)
        index = [np.full(len(columns[0]), -1)]
        tokens = [columns[0]]
        for number in range(images):
            tokens += [np.full(k, a.image_token_id), columns[number + 1]]
            index += [np.arange(number * k, (number + 1) * k), np.full(len(columns[number + 1]), -1)]
        pixels = np.stack([_picture(rng, a.tower.image_size) for _ in range(images)]) if images else None
        prompts.append(Prompt(np.concatenate(tokens)[None], np.concatenate(index)[None], pixels, images, k))
    return prompts


def _picture(rng: np.random.Generator, size: int) -> np.ndarray:
    """A seeded picture with structure at two scales, normalised like a processor's output, float32 [3, size, size]."""
    coarse = rng.normal(0, 1, (3, 4, 4)).repeat(-(-size // 4), axis=1).repeat(-(-size // 4), axis=2)[:, :size, :size]
    return (coarse + rng.normal(0, 0.5, (3, size, size))).astype(np.float32)


def _images(prompt: Prompt) -> list[np.ndarray]:
    return [] if prompt.pixel_values is None else list(prompt.pixel_values)


def _record(exact: Any, prompt: Prompt, choice: list[np.ndarray], count: int) -> Case:
    seen = [
        reference.see(exact, torch.from_numpy(image)[None], torch.from_numpy(kept))
        for image, kept in zip(_images(prompt), choice, strict=True)
    ]
    hidden = exact.config.text_config.hidden_size
    features = torch.stack([f for f, _ in seen]) if seen else torch.zeros(0, prompt.per_image, hidden)
    talk = _read(exact, prompt, features)
    first = talk.logits
    tokens, steps = [], []
    for _ in range(count):
        tokens.append(int(talk.logits.argmax()))
        talk = talk.say(tokens[-1])
        steps.append(talk.logits)
    return Case(
        prompt,
        np.stack([k.numpy() for _, k in seen]) if seen else np.zeros((0, prompt.per_image), np.int64),
        features.numpy(),
        first.numpy(),
        [t.numpy() for t in talk.rows()],
        np.array(tokens),
        torch.stack(steps).numpy(),
    )


def _nudge(x: torch.Tensor, seed: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return x * (1 + _NUDGE * torch.randn(x.shape, generator=rng, dtype=x.dtype))


def _read(
    model: Any, prompt: Prompt, features: torch.Tensor, change: reference.Change = reference.unchanged
) -> reference.Talk:
    ids, index = torch.from_numpy(prompt.input_ids), torch.from_numpy(prompt.visual_index)
    return reference.Talk.read(model, ids, index, features, change)


def _floor(model: Any, case: Case, nudge: int | None = None) -> Distances:
    """Distances of the eager model in its own dtype from the reference.

    Args:
        nudge: seed of a relative change of `_NUDGE` to every input; None for none.
    """

    def nudged(x: torch.Tensor) -> torch.Tensor:
        return x if nudge is None else _nudge(x, nudge)

    def far(have: torch.Tensor, want: np.ndarray) -> float:
        return float((have.double() - torch.from_numpy(want).double()).abs().max()) if want.size else 0.0

    found: Distances = {}
    images = _images(case.prompt)
    if images:
        seen = [
            reference.see(model, nudged(torch.from_numpy(image)[None]), torch.from_numpy(kept)[None])[0]
            for image, kept in zip(images, case.kept, strict=True)
        ]
        found["vision", "image_features"] = far(torch.stack(seen), case.features)
    talk = _read(model, case.prompt, torch.from_numpy(case.features).to(model.dtype), nudged)
    found["prefill", "logits"] = far(talk.logits, case.prefill_logits)
    steps = []
    for token in case.tokens:
        talk = talk.say(int(token), nudged)
        steps.append(talk.logits)
    found["decode", "logits"] = far(torch.stack(steps), case.decode_logits)
    length = case.prompt.length
    for start, kind in enumerate(("key", "value")):
        pairs = list(zip(talk.rows()[start::2], case.cache[start::2], strict=True))
        found["prefill", f"present_{kind}"] = max(far(h[:, :length], w[:, :length]) for h, w in pairs)
        found["decode", f"present_{kind}"] = max(far(h[:, length:], w[:, length:]) for h, w in pairs)
    return found


@dataclass
class _Kept:
    """Which tokens the runtime kept, judged by the reference's own scores."""

    images: int = 0
    other: int = 0
    regret: float = 0.0
    noise: float = 0.0

    @torch.no_grad()
    def look(self, model: Any, exact: Any, pixels: torch.Tensor, kept: torch.Tensor, nudge: int | None = None) -> None:
        """Judge the positions [1, K] that the runtime kept of an image [1, 3, height, width].

        Args:
            nudge: seed of a small change of the image, whose scores count as noise too; None for none.
        """
        selection = locate(exact).selection
        self.images += 1
        if selection is None:
            equal = torch.equal(kept[0], torch.arange(kept.shape[1]))
            self.regret = max(self.regret, 0.0 if equal else float("inf"))
            return
        state = reference.tower_state(exact, pixels)
        assert state is not None
        self.other += not torch.equal(kept, selection.selector(state, selection.keep))
        self.regret = max(self.regret, float(selection.selector.regret(state, kept)))
        # How far the eager model's scores are from the reference's: the noise in which a choice may differ.
        want = selection.selector.scores(state)
        for image in [pixels] if nudge is None else [pixels, _nudge(pixels, nudge)]:
            have = reference.scores(model, image)
            if want is not None and have is not None:
                self.noise = max(self.noise, float((have.double() - want).abs().max()))

    @property
    def note(self) -> str:
        if not self.other:
            return f"equal on {self.images} images"
        return f"other tokens on {self.other} of {self.images} images; the distance is what their scores fall short by"


def _compare_tokens(verdict: Exactness, model: Any, graphs: Graphs, case: Case, name: str) -> list[tuple[float, str]]:
    """Greedy tokens of the graphs, end to end from pixels, against the eager model in the same dtype.

    Returns:
        For each token that differs: how far apart the eager logits of the two are, and where it happened.
    """
    features, seen = [], []
    for image in _images(case.prompt):
        one, kept = graphs.vision(image[None])
        features.append(one)
        seen.append(reference.see(model, torch.from_numpy(image)[None], torch.from_numpy(kept))[0])
    empty = torch.zeros(0, case.prompt.per_image, model.config.text_config.hidden_size)
    talk = _read(model, case.prompt, torch.stack(seen) if seen else empty)
    logits = graphs.prefill(*case.prompt.pad(graphs.budget), features, case.prompt.length)
    flips = []
    for step in range(len(case.tokens)):
        want, have = int(talk.logits.argmax()), int(logits.argmax())
        verdict.tokens += 1
        verdict.equal += want == have
        if want != have:
            gap = float(talk.logits[want] - talk.logits[have])
            flips.append((gap, f"{name}token {step}: eager {want}, graph {have}, eager logits {gap:.3g} apart"))
        if step + 1 < len(case.tokens):  # continue on the eager model's token, so that one flip is counted once
            talk = talk.say(want)
            logits = graphs.decode(want, case.prompt.length + step + 1)
    return flips
