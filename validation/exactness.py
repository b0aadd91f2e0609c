"""The gate: do the graphs compute what the cut eager model computes?

Inputs are fresh: seeded images and prompts that no trace has seen, at full budget, short, text only, with images in
the middle. The reference runs in float64. How far the eager model in the graph's own dtype is from it, as it is and
with inputs changed in their last bit, is the noise floor of each output; a graph may be `MULTIPLE` times as far, no
more. Which tokens are kept must be equal, unless the runtime's choice is within rounding of the reference's own scores:
at each pick, by how much the kept tokens fall short of the best (`surgery/picking.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from ..manifest import ExactnessRow, TokenBudget
from ..prompt import Picture, Prompt, assemble
from ..runtime.sessions import Graphs, Sight
from ..surgery.anatomy import Anatomy
from ..surgery.inside import choosing
from ..surgery.picking import Follow
from ..surgery.selection import attached, judge
from ..surgery.talk import Talk, unchanged
from ..surgery.vision import Seen
from . import cases, reference
from .cases import GREEDY, Case, Distances

MULTIPLE = 8  # of the noise floor; eager and runtime round in other orders, neither is the better one
MULTIPLE_INT8 = 4  # here the floor already holds whole quantization steps
_NUDGE_INT8 = 1e-5  # relative, about a hundred times float32 rounding
_MORE = 8  # runs with changed inputs beside the first two, where a graph is farther away than those allow
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
    kept, kept_inside = _Kept(), _Inside()
    # Rounding to int8 steps is all or nothing: one value on an edge moves a whole step in one run and not in the
    # other. Larger nudges show how far such a step goes, whether or not this run met one.
    nudge = _NUDGE_INT8 if a.quantized else torch.finfo(model.dtype).eps
    for whole in fresh_prompts(a, budget, seed):
        choice = [graphs.vision(picture).kept for picture in whole.pictures]
        for picture, positions in zip(whole.pictures, choice, strict=True):
            again = seed + 1 if "vision" in a.quantized else None
            kept.look(model, exact, picture, torch.from_numpy(positions)[None], again)
        case = _record(exact, graphs, whole.shrink(choice), choice, min(GREEDY, budget.new_tokens))
        kept_inside.look(model, exact, case)
        recorded.append(case)
        found.append(cases.distances(graphs, case))
        # One run may round luckily. Inputs that differ in the last bit show how far rounding goes in this prompt.
        floors += [_floor(model, case), *(_floor(model, case, nudge, seed + i) for i in (1, 2))]
        flips += _compare_tokens(verdict, model, graphs, case, name, steps="vision" in a.quantized)
    far, floor = cases.worst(found), cases.worst(floors)
    multiple = MULTIPLE_INT8 if a.quantized else MULTIPLE
    if any(not far[output] <= multiple * max(least, _LEAST) for output, least in floor.items()):
        # Before that is called a fault: is it a rare step that these runs did not meet?
        floors += [_floor(model, case, nudge, seed + i) for case in recorded for i in range(3, 3 + _MORE)]
        floor = cases.worst(floors)
    far["vision", "kept"], floor["vision", "kept"] = kept.regret, kept.noise
    if budget.ladder:
        far["prefill", "kept"], floor["prefill", "kept"] = kept_inside.regret, kept_inside.noise
    notes = {("vision", "kept"): kept.note, ("prefill", "kept"): kept_inside.note}
    for (graph, output), value in far.items():
        tolerance = multiple * max(floor[graph, output], _LEAST)
        verdict.rows.append(
            ExactnessRow(
                graph=name + graph,
                output=output,
                max_abs=value,
                floor=floor[graph, output],
                tolerance=tolerance,
                ok=bool(value <= tolerance),
                note=notes.get((graph, output), ""),
            )
        )
    # A flip between two logits that rounding alone may swap is a near tie, not a fault; it is counted and shown.
    close = 2 * max(row.tolerance for row in verdict.rows if row.output == "logits")
    verdict.near_ties = [text for gap, text in flips if gap <= close]
    verdict.wrong = [text for gap, text in flips if not gap <= close]
    return verdict, recorded


def fresh_prompts(a: Anatomy, budget: TokenBudget, seed: int) -> list[Prompt]:
    """Seeded whole prompts: every column used; one image in the middle; text only; a short one with the image last.

    Images take the buckets in turn, so that unequal ones meet in a prompt; every bucket has its turn.
    """
    rng = np.random.default_rng([seed, budget.visual_tokens])
    text, turn = budget.text_tokens, 0
    known = a.layout.vocabulary.readable if a.layout.vocabulary else np.arange(a.language.vocabulary)
    layouts = [
        (budget.images, text, "spread"),
        (1, max(2, text // 2), "spread"),
        (0, max(2, text // 3), "spread"),
        (1, max(2, text // 4), "last"),
    ]
    layouts += [(1, max(2, text // 4), "spread")] * max(0, len(a.buckets) - budget.images - 2)
    prompts = []
    for images, words, where in layouts:
        ids = known[rng.integers(0, len(known), words)]
        after = (np.searchsorted(known, a.layout.image_token_id) + 1) % len(known)
        ids[ids == a.layout.image_token_id] = known[after]
        places = sorted(rng.integers(1, words, images)) if where == "spread" else [words - 1] * images
        buckets = [a.buckets[(turn + i) % len(a.buckets)] for i in range(images)]
        turn += images
        columns = np.split(ids, places)
        tokens = [columns[0]]
        for bucket, rest in zip(buckets, columns[1:], strict=True):
            tokens += [np.full(bucket.tokens, a.layout.image_token_id), rest]
        pictures = [Picture(_picture(rng, b.pixels), b.geometry, b.frames, ids) for b in buckets]
        prompts.append(assemble(a.layout, np.concatenate(tokens)[None], pictures, [b.tokens for b in buckets]))
    return prompts


def _picture(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Seeded values with structure at two scales, normalised like a processor's output, float32 of `shape`."""
    fine = rng.normal(0, 0.5, shape)
    if len(shape) >= 4:  # an image or tiles: coarse squares
        height, width = shape[-2:]
        coarse = rng.normal(0, 1, (*shape[:-2], 4, 4))
        coarse = coarse.repeat(-(-height // 4), axis=-2).repeat(-(-width // 4), axis=-1)[..., :height, :width]
    else:  # patches in rows: runs of alike ones
        rows = fine.shape[-2]
        coarse = rng.normal(0, 1, (*fine.shape[:-2], -(-rows // 5), 1)).repeat(5, axis=-2)[..., :rows, :]
    return (coarse + fine).astype(np.float32)


def _record(exact: Any, graphs: Graphs, prompt: Prompt, choice: Sequence[np.ndarray], count: int) -> Case:
    seen = [
        reference.see(exact, picture, torch.from_numpy(kept)[None])
        for picture, kept in zip(prompt.pictures, choice, strict=True)
    ]
    sights = [Sight(s.features.numpy(), s.kept.numpy(), tuple(x.numpy() for x in s.levels)) for s in seen]
    graphs.prefill(prompt, sights)  # who goes on inside the language model is the runtime's choice too
    kept, budget = graphs.kept, graphs.budget
    with reference.passing(exact, prompt, kept):
        talk = Talk.read(exact, [prompt], [seen])
    first, before = talk.logits[0], _states(talk, lambda layer: slice(0, prompt.rows(budget, layer)))
    tokens, steps = [], []
    for _ in range(count):
        tokens.append(int(talk.logits[0].argmax()))
        talk = talk.say(torch.tensor([tokens[-1]]))
        steps.append(talk.logits[0])
    return Case(
        prompt,
        tuple(sights),
        kept,
        first.numpy(),
        {name: x.numpy() for name, x in before.items()},
        np.array(tokens),
        torch.stack(steps).numpy(),
        {name: x.numpy() for name, x in _states(talk, lambda i: slice(prompt.rows(budget, i), None)).items()},
    )


def _states(talk: Talk, rows: Callable[[int], slice]) -> dict[str, torch.Tensor]:
    """What is remembered, these rows of each layer; copies, since a convolution's state is edited in place."""
    return {
        name: (x if cases.state_kind(name) == "conv" else x[:, rows(cases.layer_of(name))]).clone()
        for name, x in talk.states().items()
    }


def _nudge(x: torch.Tensor, size: float, seed: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return x * (1 + size * torch.randn(x.shape, generator=rng, dtype=x.dtype))


def _floor(model: Any, case: Case, nudge: float = 0.0, seed: int = 0) -> Distances:
    """Distances of the eager model in its own dtype from the reference.

    Args:
        nudge: relative change of every input, drawn from `seed`; 0 for none.
    """

    def nudged(x: torch.Tensor) -> torch.Tensor:
        return _nudge(x, nudge, seed) if nudge else x

    def far(have: torch.Tensor, want: np.ndarray) -> float:
        return float((have.double() - torch.from_numpy(want).double()).abs().max()) if want.size else 0.0

    found: Distances = {}
    for picture, want in zip(case.prompt.pictures, case.seen, strict=True):
        mine = reference.see(model, picture, torch.from_numpy(want.kept)[None], nudged)
        one = {("vision", "image_features"): far(mine.features, want.features)}
        for index, (have, level) in enumerate(zip(mine.levels, want.levels, strict=True)):
            one["vision", f"deepstack_{index}"] = far(have, level)
        found = cases.worst([found, one])
    exact = _given(case.seen, model.dtype)
    with reference.passing(model, case.prompt, case.kept):
        talk = Talk.read(model, [case.prompt], [exact], nudged)
    found["prefill", "logits"] = far(talk.logits[0], case.prefill_logits)
    lengths = {cases.layer_of(n): 0 if x.ndim < 3 else x.shape[1] for n, x in case.prefill_states.items()}
    found |= _far_states("prefill", _states(talk, lambda i: slice(0, lengths[i])), case.prefill_states, far)
    steps = []
    for token in case.tokens:
        talk = talk.say(torch.tensor([int(token)]), nudged)
        steps.append(talk.logits[0])
    found["decode", "logits"] = far(torch.stack(steps), case.decode_logits)
    return found | _far_states("decode", _states(talk, lambda i: slice(lengths[i], None)), case.decode_states, far)


def _tensors(levels: Sequence[np.ndarray], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return tuple(torch.from_numpy(level).to(dtype) for level in levels)


def _far_states(
    graph: str,
    have: Mapping[str, torch.Tensor],
    want: Mapping[str, np.ndarray],
    far: Callable[[torch.Tensor, np.ndarray], float],
) -> Distances:
    return cases.worst(
        [{(graph, f"present_{cases.state_kind(name)}"): far(have[name], value)} for name, value in want.items()]
    )


@dataclass
class _Inside:
    """Who went on inside the language model, judged by the reference's own scores."""

    prompts: int = 0
    other: int = 0
    regret: float = 0.0
    noise: float = 0.0

    def look(self, model: Any, exact: Any, case: Case) -> None:
        """Judge what the runtime kept of a prompt whose features were the reference's."""
        if not case.kept:
            return
        self.prompts += 1
        judges = reference.judges(case.prompt, case.kept)
        with choosing(exact, judges):
            again = _read(exact, case).kept
        self.other += any(
            not np.array_equal(mine[0], kept) for mine, kept in zip(_read(exact, case).kept, case.kept, strict=True)
        )
        if any(not np.array_equal(mine[0], kept) for mine, kept in zip(again, case.kept, strict=True)):
            self.regret = float("inf")  # no score excuses it
            return
        follows = [Follow(judge.calls) for judge in judges]
        with choosing(model, follows):
            _read(model, case)
        for judged, follow in zip(judges, follows, strict=True):
            for call, one in zip(judged.calls, follow.noise, strict=True):
                if call.shortfall / max(one, _LEAST) >= self.regret / max(self.noise, _LEAST):
                    self.regret, self.noise = call.shortfall, one if call.shortfall else max(self.noise, one)

    @property
    def note(self) -> str:
        if not self.other:
            return f"equal on {self.prompts} prompts"
        return (
            f"other tokens on {self.other} of {self.prompts} prompts; the distance is what their scores fall short by"
        )


def _read(model: Any, case: Case) -> Talk:
    """The prompt of a case with the reference's features."""
    return Talk.read(model, [case.prompt], [_given(case.seen, model.dtype)])


def _given(sights: Sequence[Sight], dtype: torch.dtype) -> list[Seen]:
    """What a graph or the reference saw, for an eager model."""
    return [
        Seen(torch.from_numpy(s.features).to(dtype), torch.from_numpy(s.kept), _tensors(s.levels, dtype))
        for s in sights
    ]


@dataclass
class _Kept:
    """Which tokens the runtime kept, judged by the reference's own scores."""

    images: int = 0
    other: int = 0
    inside: bool = False  # tokens left inside the tower
    regret: float = 0.0
    noise: float = 0.0

    @torch.no_grad()
    def look(self, model: Any, exact: Any, picture: Picture, kept: torch.Tensor, nudge: int | None = None) -> None:
        """Judge the positions [1, K] that the runtime kept of a picture.

        Args:
            nudge: seed of a small change of the image, whose scores count as noise too; None for none.
        """
        about = attached(exact)
        self.images += 1
        keep = about.keep(picture.bucket(about.buckets))
        if about.selection is None or keep == kept.shape[1] == about.bucket(picture.geometry).tokens:
            equal = torch.equal(kept[0], torch.arange(kept.shape[1]))
            self.regret = max(self.regret, 0.0 if equal else float("inf"))
            return
        breaks = about.bucket(picture.geometry).line_breaks
        state = reference.state(exact, picture)
        if state.arrived is not None:  # which tokens met in the tower cannot be told from those that came out of it
            equal, self.inside = torch.equal(kept, state.arrived), True
            self.other += not equal
            self.regret = max(self.regret, 0.0 if equal else float("inf"))
            return
        self.other += not torch.equal(kept, about.selection.choose(state, keep, breaks).kept)
        judged = judge(kept, state.count)
        again = about.selection.choose(replace(state, pick=judged), keep, breaks).kept
        if not torch.equal(again, kept):  # no score excuses it: a constant choice, a line break
            self.regret = float("inf")
            return
        # How far the eager model's scores are from the reference's: the noise in which a choice may differ.
        own = attached(model).selection  # its weights have the model's dtype
        assert own is not None
        changes = [unchanged] if nudge is None else [unchanged, lambda x: _nudge(x, _NUDGE_INT8, nudge)]
        noise = [0.0] * len(judged.calls)
        for change in changes:
            follow = Follow(judged.calls)
            own.choose(replace(reference.state(model, picture, change), pick=follow), keep, breaks)
            noise = [max(pair) for pair in zip(noise, follow.noise, strict=True)]
        for call, one in zip(judged.calls, noise, strict=True):
            if call.shortfall / max(one, _LEAST) >= self.regret / max(self.noise, _LEAST):
                self.regret, self.noise = call.shortfall, one if call.shortfall else max(self.noise, one)

    @property
    def note(self) -> str:
        if not self.other:
            return f"equal on {self.images} images"
        if self.inside:
            return f"other tokens on {self.other} of {self.images} images; inside the tower near ties cannot be judged"
        return f"other tokens on {self.other} of {self.images} images; the distance is what their scores fall short by"


def _compare_tokens(
    verdict: Exactness, model: Any, graphs: Graphs, case: Case, name: str, *, steps: bool = False
) -> list[tuple[float, str]]:
    """Greedy tokens of the graphs, end to end from pixels, against the eager model in the same dtype.

    Args:
        steps: whether features may differ by whole int8 steps. They are judged themselves; what the eager model makes
            of the graph's is no fault of the language model's graphs.

    Returns:
        For each token that differs: how far apart the eager logits of the two are, beyond what such steps move them,
        and where it happened.
    """
    sights = [graphs.vision(picture) for picture in case.prompt.pictures]
    seen = [
        reference.see(model, picture, torch.from_numpy(sight.kept)[None])
        for picture, sight in zip(case.prompt.pictures, sights, strict=True)
    ]
    logits = graphs.prefill(case.prompt, sights)
    with reference.passing(model, case.prompt, graphs.kept):
        talk = Talk.read(model, [case.prompt], [seen])
        theirs = Talk.read(model, [case.prompt], [_given(sights, model.dtype)]) if steps else talk
    flips = []
    for step in range(len(case.tokens)):
        want, have = int(talk.logits[0].argmax()), int(logits.argmax())
        verdict.tokens += 1
        verdict.equal += want == have
        if want != have:
            gap = float(talk.logits[0, want] - talk.logits[0, have])
            moved = 2 * float((talk.logits - theirs.logits).abs().max())
            text = f"{name}token {step}: eager {want}, graph {have}, eager logits {gap:.3g} apart"
            flips.append((gap - moved, text + f", {moved:.3g} by int8 features" * steps))
        if step + 1 < len(case.tokens):  # continue on the eager model's token, so that one flip is counted once
            said = torch.tensor([want])
            talk, theirs = (one.say(said) for one in (talk, theirs)) if steps else [talk.say(said)] * 2
            logits = graphs.decode(want, case.prompt, step)
    return flips
