"""Synthetic images for methods, and a method as a graph of its own that ONNX Runtime runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
import vlmcut
from torch import Tensor, nn
from vlmcut.exporters.components import Component
from vlmcut.exporters.onnx import export
from vlmcut.exporters.operators import Contrib, Operators
from vlmcut.manifest import Bucket, Panel
from vlmcut.passes.tokens.method import Place, parse
from vlmcut.passes.tokens.methods import METHODS, TableSelector
from vlmcut.surgery.load import describe
from vlmcut.surgery.selection import Choice, Selector, Tap, Text, TowerState, places


def state(
    n: int | Sequence[tuple[int, int]] = 12,
    *,
    cls: bool = True,
    taps: int = 1,
    blocks: Sequence[int] | None = None,
    heads: int = 2,
    kv_heads: int | None = None,
    head_dim: int = 4,
    width: int = 6,
    frames: int = 1,
    seed: int = 1,
    duplicates: bool = False,
    text: int = 0,
    padding: int = 0,
    merge: int = 1,
    constant: bool = False,
    dtype: torch.dtype = torch.float32,
    project: Callable[[Tensor], Tensor] | None = None,
) -> TowerState:
    """One image: every panel is a segment of its own in the tower, one patch (or `merge`) behind each token.

    Args:
        n: tokens without a known place, or rows and columns of each panel.
        taps: how many blocks were looked at; `blocks` names them, 0, 1, … otherwise.
        frames: the panels repeat so many times.
        duplicates: tokens are copies of few, and so are queries and keys.
        text: columns of the question, of which the last `padding` are empty.
        merge: patches behind each token.
        constant: queries are zero, so that all attention is equal to the bit.
    """
    rng = np.random.default_rng(seed)
    panels = () if isinstance(n, int) else tuple(Panel(rows=r, columns=c) for r, c in n) * frames
    segments = [n] if isinstance(n, int) else [panel.tokens for panel in panels]
    total = sum(segments)

    def draw(*shape: int) -> Tensor:
        x = rng.standard_normal(shape)
        if duplicates and shape[-2] > 1:
            x = x[..., rng.integers(0, max(2, shape[-2] // 3), shape[-2]), :]
        return torch.from_numpy(x).to(dtype)

    def rows() -> tuple[tuple[Tensor, Tensor], ...]:
        found = []
        for size in segments:
            length = size * merge + cls
            q, k = draw(1, heads, length, head_dim), draw(1, kv_heads or heads, length, head_dim)
            found.append((torch.zeros_like(q) if constant else q, k))
        return tuple(found)

    numbers = range(taps) if blocks is None else blocks
    mask = torch.ones(1, text, dtype=dtype)
    mask[:, text - padding :] = 0
    return TowerState(
        tokens=draw(1, total, width),
        project=project or (lambda x: x),
        taps=tuple(Tap(block, rows(), head_dim**-0.5) for block in numbers),
        has_cls=cls,
        members=np.arange(total * merge).reshape(total, merge),
        panels=panels,
        places=places(panels) if panels else None,
        frames=frames,
        text=Text(draw(1, text, width), mask) if text else None,
    )


def tapped(
    spec: str, n: int | Sequence[tuple[int, int]] = 12, scored: Sequence[int] = (0, 1, 2), **given: Any
) -> TowerState:
    """A state with the blocks that a method wants, of those that can score."""
    return state(n, blocks=tuple(dict.fromkeys(TableSelector(spec).blocks(scored))), **given)


def place(seen: TowerState, keep: int, scored: Sequence[int] = (0, 1, 2)) -> Place:
    """What `plan` would know of a state."""
    bucket = Bucket(
        size=(8, 8), geometry={"pixel_values": (1,)}, tokens=seen.count, panels=seen.panels, frames=seen.frames
    )
    a = replace(describe(tiny()), buckets=(bucket,), scored=tuple(scored))
    return Place(a, bucket, seen.count, keep, max(1, len(seen.panels)), seen.frames)


def legal(spec: str, seen: TowerState) -> list[int]:
    """The numbers of tokens that a method can keep of a state, without all of them."""
    row, options = parse(spec, METHODS, "test")
    if row.grid and not seen.panels:
        return []
    return [keep for keep in range(1, seen.count) if row.refuse(place(seen, keep), options) is None]


def inputs(seen: TowerState) -> dict[str, Tensor]:
    """The tensors of a state, by name, as a graph takes them."""
    found = {"tokens": seen.tokens}
    for tap in seen.taps:
        for call, (q, k) in enumerate(tap.rows):
            found |= {f"q_{tap.block}_{call}": q, f"k_{tap.block}_{call}": k}
    if seen.text is not None:
        found |= {"text": seen.text.embeddings, "text_mask": seen.text.mask}
    return found


def with_inputs(seen: TowerState, given: Sequence[Tensor]) -> TowerState:
    """The same state, of other tensors; order as `inputs`."""
    rest = iter(given)
    tokens = next(rest)
    taps = tuple(replace(tap, rows=tuple((next(rest), next(rest)) for _ in tap.rows)) for tap in seen.taps)
    text = None if seen.text is None else Text(next(rest), next(rest))
    return replace(seen, tokens=tokens, taps=taps, text=text)


class Chooser(nn.Module):
    """A selector on a state, of plain tensors: kept, then mix and features if there are."""

    def __init__(self, selector: Selector, seen: TowerState, keep: int) -> None:
        super().__init__()
        self.selector, self.seen, self.keep = selector, seen, keep

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        choice = self.selector(with_inputs(self.seen, given), self.keep)
        # An input that a method does not look at is still an input of the graph.
        used = sum(x.flatten()[0].to(torch.float32) * 0 for x in given)
        made = tuple(x for x in (choice.mix, choice.features) if x is not None)
        return choice.kept.clone(), *(x.clone() for x in made), torch.as_tensor(used).reshape(1)


@dataclass(frozen=True)
class Graph:
    """A method as ONNX Runtime runs it; call it on any state of the same shapes."""

    proto: Any
    session: ort.InferenceSession
    mix: bool
    features: bool

    def __call__(self, seen: TowerState) -> Choice:
        feeds = {name: x.numpy() for name, x in inputs(seen).items()}
        outputs = [name for name in ("kept", "mix", "features") if name == "kept" or getattr(self, name)]
        made: Any = self.session.run(outputs, feeds)
        found = dict(zip(outputs, map(torch.from_numpy, made), strict=True))
        return Choice(found["kept"], found.get("mix"), found.get("features"))


@cache
def tiny() -> Any:
    """A model for what wants one; never changed."""
    return vlmcut.load("tiny:llava").model


def graph(spec: str | Selector, seen: TowerState, keep: int, operators: Operators | None = None) -> Graph:
    """A method on states of these shapes, exported by the project's own exporter."""
    selector = TableSelector(spec) if isinstance(spec, str) else spec
    with torch.no_grad():
        choice = selector(seen, keep)
    mix, features = choice.mix is not None, choice.features is not None
    names = ("kept", *(("mix",) if mix else ()), *(("features",) if features else ()), "used")
    component = Component(role="vision", module=Chooser(selector, seen, keep), inputs=inputs(seen), outputs=names)
    made = export(
        component, tiny(), operators or Contrib()
    )  # a model: some of its modules are replaced while it traces
    for value in (*made.graph.inputs, *made.graph.outputs):
        assert value.shape is not None and all(isinstance(d, int) for d in value.shape), value  # static
    proto = ir.to_proto(made)
    session = ort.InferenceSession(proto.SerializeToString(), _quiet(), providers=["CPUExecutionProvider"])
    return Graph(proto, session, mix, features)


def _quiet() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return options


def exported(
    spec: str | Selector, seen: TowerState, keep: int, operators: Operators | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """What ONNX Runtime keeps of a state, and its mix if the method merges: int64 [1, T], float [1, T, N]."""
    choice = graph(spec, seen, keep, operators)(seen)
    return choice.kept.numpy(), None if choice.mix is None else choice.mix.numpy()


def same(spec: str | Selector, seen: TowerState, keep: int, atol: float = 1e-5) -> float:
    """Assert that ONNX Runtime keeps what eager keeps, of the same mixture.

    Returns:
        The largest difference of a weight, 0 where nothing is mixed.
    """
    selector = TableSelector(spec) if isinstance(spec, str) else spec
    with torch.no_grad():
        want = selector(seen, keep)
    kept, mix = exported(spec, seen, keep)
    np.testing.assert_array_equal(kept, want.kept.numpy())
    assert (mix is None) == (want.mix is None)
    if mix is None or want.mix is None:
        return 0.0
    worst = float(np.abs(mix - want.mix.numpy()).max())
    assert worst <= atol, f"{selector.method}: mix differs by {worst}"
    return worst


def valid(choice: Choice, keep: int, count: int) -> list[int]:
    """Assert that a choice keeps its promises: exactly `keep` ascending positions, a finite mix of the right shape.

    Returns:
        The positions.
    """
    assert choice.kept.shape == (1, keep) and choice.kept.dtype == torch.int64
    kept = choice.kept[0].tolist()
    assert kept == sorted(set(kept)) and kept[0] >= 0 and kept[-1] < count
    if choice.mix is not None:
        assert choice.mix.shape == (1, keep, count) and choice.mix.is_floating_point()
        assert choice.mix.isfinite().all()
    if choice.features is not None:
        assert choice.features.shape[:2] == (1, keep) and choice.features.isfinite().all()
    return kept


def chosen(spec: str | Selector, seen: TowerState, keep: int, seed: int = 0) -> Choice:
    """A method in eager, its promises checked."""
    selector = TableSelector(spec, seed=seed) if isinstance(spec, str) else spec
    with torch.no_grad():
        choice = selector(seen, keep)
    valid(choice, keep, seen.count)
    return choice
