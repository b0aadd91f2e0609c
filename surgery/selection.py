"""Which visual tokens stay and what they are made of: what a method may look at, and where a model keeps its choice.

Tokens leave after the family has packed them (pixel shuffle, tiles, merges, line breaks), so one rule serves every
family; a projector that works token by token still runs on the kept ones only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..manifest import Bucket, Panel
from ..vocabulary import Vocabulary
from .anatomy import Idle
from .picking import Judge, Picker


@dataclass(frozen=True)
class Tap:
    """Queries and keys of one tower block, as its attention takes them: norms and rotary embeddings done."""

    block: int
    rows: tuple[tuple[Tensor, Tensor], ...]  # q and k of each call, [segments, heads, rows, head_dim]
    scale: float


@dataclass(frozen=True)
class Rows:
    """The n rows of a tower between attention and MLP of a block: [CLS] where it has one, then the tokens left."""

    x: Tensor  # [1, n, d]
    size: Tensor  # float32 or wider, [1, n]: patches that each row stands for
    place: Tensor  # int64 [1, n]: the patch whose place each row takes; -1 for [CLS]
    has_cls: bool
    patches: int  # at the start
    proportional: bool = False  # whether later blocks attend to a row as to all the patches that it stands for
    tap: Tap | None = None  # of this block

    @classmethod
    def whole(cls, x: Tensor, has_cls: bool) -> Rows:
        """All rows of a picture, each a patch."""
        n = x.shape[1]
        size = torch.ones(1, n, dtype=torch.promote_types(x.dtype, torch.float32))
        return cls(x, size, torch.arange(n)[None] - int(has_cls), has_cls, n - has_cls)

    def now(self, x: Tensor) -> Rows:
        """The same rows in a later block."""
        return replace(self, x=x)

    def seen(self, tap: Tap) -> Rows:
        """The same rows with what their block's attention took."""
        return replace(self, tap=tap)

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """What attention adds to the scores of each key, [1, 1, 1, n]: log of its size (ToMe, arXiv:2210.09461)."""
        return self.size.log().to(dtype)[:, None, None] if self.proportional else None


@dataclass(frozen=True)
class Text:
    """The question, for methods that depend on it: M columns, of which `mask` is 1 on the real ones."""

    embeddings: Tensor  # [1, M, hidden]
    mask: Tensor  # [1, M], 0 or 1, in the embeddings' dtype


@dataclass(frozen=True)
class TowerState:
    """What a method may look at for one image, or one clip of frames. N visual tokens; the leading axis is 1."""

    tokens: Tensor  # features of the visual tokens, before a per-token projector, [1, N, d]
    project: Callable[[Tensor], Tensor]  # [1, N, d] -> [1, N, hidden]; the identity where they are projected already
    taps: tuple[Tap, ...] = ()  # of the blocks that the method names, in order
    has_cls: bool = False  # row 0 of each segment is [CLS]
    members: np.ndarray | None = None  # int64 [N, u]: the patches behind each token, counted over segments; -1 for none
    panels: tuple[Panel, ...] = ()  # where tokens lie in the picture; empty: not known
    places: np.ndarray | None = None  # int64 [N, 3]: panel, row, column of each token
    frames: int = 1  # a clip of so many images of one size; panels and patches count through them
    text: Text | None = None
    outputs: tuple[Tensor, ...] = ()  # of the tower blocks that the method names: [1, patches, width], without [CLS]
    first: Callable[[Tensor], Tap] | None = None  # see surgery/first_layer.py
    arrived: Tensor | None = None  # int64 [1, K]: of a method inside the tower, whose places the K tokens left take
    pick: Picker = Picker()  # noqa: RUF009  (has no state)

    @property
    def count(self) -> int:
        return self.tokens.shape[1]

    def top(self, score: Tensor, count: int) -> Tensor:
        """The `count` best of [1, N], best first: int64 [1, count]. For positions that will be kept."""
        return self.pick.top(score, count)

    def only(self, positions: Sequence[int] | np.ndarray) -> TowerState:
        """The same with these tokens alone; known when a graph is made."""
        chosen = np.asarray(positions, dtype=np.int64)
        index = torch.from_numpy(chosen)
        return replace(
            self,
            tokens=self.tokens.index_select(1, index),
            members=None if self.members is None else self.members[chosen],
            places=None if self.places is None else self.places[chosen],
            pick=self.pick.only(index),
        )


def places(panels: Sequence[Panel]) -> np.ndarray:
    """Panel, row and column of each token, int64 [N, 3]; a line break has the column behind the last one."""
    found = []
    for number, panel in enumerate(panels):
        row, column = np.indices((panel.rows, panel.columns + panel.line_breaks)).reshape(2, -1)
        found.append(np.stack([np.full(row.shape, number), row, column], axis=1))
    return np.concatenate(found)


@dataclass(frozen=True)
class Choice:
    """The T tokens that go on.

    `kept` names the token whose place each one takes. Without `mix` it is that token; with it, a weighted sum of the
    image's tokens, which says every merge and every grid transform alike: m1 to m5 and g1 of the literature's pieces.
    `features` stand for themselves: what a trained compressor made, in the language model's width.
    """

    kept: Tensor  # int64 [1, T], ascending
    mix: Tensor | None = None  # float [1, T, N]
    features: Tensor | None = None  # [1, T, hidden]

    def take(self, x: Tensor) -> Tensor:
        """The tokens that go on, of [N, d]: [T, d]."""
        if self.mix is None:
            return x.index_select(0, self.kept[0])
        return (self.mix[0] @ x.to(self.mix.dtype)).to(x.dtype)

    def within(self, positions: np.ndarray, count: int) -> Choice:
        """A choice among `positions` as one among all `count` tokens that they are positions of."""
        kept = torch.from_numpy(positions)[self.kept]
        if self.mix is None:
            return replace(self, kept=kept)
        back = torch.zeros(len(positions), count, dtype=self.mix.dtype)
        back[np.arange(len(positions)), positions] = 1
        return replace(self, kept=kept, mix=self.mix @ back)


class Selector(Protocol):
    """Chooses tokens; composed in `passes/tokens`."""

    @property
    def method(self) -> str:
        """Its name in the table of methods, with its options."""
        ...

    @property
    def text(self) -> bool:
        """Whether it looks at the question."""
        ...

    @property
    def outputs(self) -> Sequence[int]:
        """The tower blocks whose outputs it wants."""
        ...

    def blocks(self, scored: Sequence[int]) -> Sequence[int]:
        """The tower blocks whose queries and keys it wants, of those whose attention belongs to tokens."""
        ...

    def leaving(self, tokens: int, keep: int, blocks: int) -> tuple[int, ...]:
        """How many tokens leave the tower in each of its blocks; empty for a method that works behind the tower."""
        ...

    def projected(self, tokens: int, keep: int) -> int:
        """How many rows go through a projector that works token by token: those that are kept, or looked at."""
        ...

    def inside(self, rows: Rows, leave: int) -> Rows:
        """What goes on from attention to MLP of a block, `leave` tokens fewer."""
        ...

    def __call__(self, state: TowerState, keep: int) -> Choice:
        """What goes on; every position that is kept is picked by `state.top`, or constant."""
        ...


LINE_BREAKS = ("drop", "keep", "compete")  # what becomes of newline tokens; see passes/prune_tokens.py


@dataclass
class Selection:
    """A selector, how many tokens it keeps of an image of each bucket, and what it does with line breaks."""

    selector: Selector
    keep: tuple[int, ...]
    line_breaks: str = "drop"
    forced: Tensor | None = None  # int64 [1, K]: keep these, whatever the method says; for comparing what comes after

    def choose(self, state: TowerState, keep: int, breaks: tuple[int, ...] = ()) -> Choice:
        """What goes on of an image. `breaks` are the positions of newline tokens."""
        if state.arrived is not None:  # chosen already, and `mix` cannot say of what
            return Choice(state.arrived)
        if keep == state.count:
            return Choice(torch.arange(keep)[None])
        if self.forced is not None:
            state = replace(state, pick=judge(self.forced, state.count))
        if not breaks or self.line_breaks == "compete":
            return self.selector(state, keep)
        others = np.array(sorted(set(range(state.count)) - set(breaks)))
        pinned = torch.tensor(breaks if self.line_breaks == "keep" else (), dtype=torch.int64)
        chosen = self.selector(state.only(others), keep - len(pinned)).within(others, state.count)
        if not len(pinned):
            return chosen
        kept, order = torch.sort(torch.cat([chosen.kept, pinned[None]], dim=1), dim=1)
        if chosen.mix is None:
            return Choice(kept)
        own = torch.nn.functional.one_hot(pinned, state.count).to(chosen.mix.dtype)
        return Choice(kept, torch.cat([chosen.mix, own[None]], dim=1)[:, order[0]])


def judge(kept: Tensor, count: int) -> Judge:
    """A picker confined to `kept`, int64 [1, K], of `count` tokens."""
    return Judge(torch.zeros(1, count, dtype=torch.bool).scatter(1, kept, True))


Members = Mapping[int, tuple[int, ...]]  # language layer -> heads or neurons of it, ascending


@dataclass
class Attached:
    """What vlmcut knows about a model beside its modules; `model.vlmcut`."""

    family: Any  # surgery.families.base.Family
    buckets: tuple[Bucket, ...]
    selection: Selection | None = None
    inside: Any = None  # surgery.inside.Inside
    idle: Idle = field(default_factory=Idle)
    carriers: int = 0  # see surgery/bottleneck.py
    slim: Mapping[str, Members] = field(default_factory=dict)  # heads, neurons: those that visual tokens use
    measured: Any = None  # for each bucket; see surgery/measure.py
    vocabulary: Vocabulary | None = None  # of a model whose vocabulary was cut

    def keep(self, bucket: int) -> int:
        """Visual tokens that an image of this bucket keeps."""
        return self.selection.keep[bucket] if self.selection else self.buckets[bucket].tokens

    def bucket(self, geometry: Mapping[str, tuple[int, ...]]) -> Bucket:
        """The bucket of images of this geometry."""
        return next(bucket for bucket in self.buckets if bucket.geometry == geometry)


def leaving(
    selector: Selector, buckets: Sequence[Bucket], keep: Sequence[int], blocks: int
) -> tuple[tuple[int, ...], ...]:
    """For each bucket, tokens that leave the tower in each of its blocks; empty for a method behind the tower."""
    found = tuple(selector.leaving(b.tokens, count, blocks) for b, count in zip(buckets, keep, strict=True))
    return found if any(map(any, found)) else ()


def projected(selector: Selector, buckets: Sequence[Bucket], keep: Sequence[int]) -> tuple[int, ...]:
    """For each bucket, rows that go through a projector that works token by token; all where nothing is chosen."""
    return tuple(
        count if count == bucket.tokens else selector.projected(bucket.tokens, count)
        for bucket, count in zip(buckets, keep, strict=True)
    )


def attached(model: Any) -> Attached:
    """What vlmcut attached to a model when it was loaded."""
    return model.vlmcut
