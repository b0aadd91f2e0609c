"""Visual tokens leave inside the language model: from some layers on, fewer columns of the prompt go on.

The layers between two rungs of the ladder are a segment: they see the same columns and cache as many rows. Tokens keep
the positions that they entered with (methods: `keep`), so that one position serves all segments in decode, rotary keys
in the cache stay right, and leaving at a layer is the same as being masked from that layer on.

One code for eager and for graphs: hooks before the layers take the columns that go on from all that a layer is given.
In eager a prompt has no padding and numbers of columns are its own; in a graph they are the budget's, and how many of
the visual ones are real comes as a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import ModelError
from ..manifest import Rung
from .bottleneck import Neck, narrowing
from .neurons import find_mlp
from .picking import Picker, topk
from .rows import AXES, BESIDE, Split, idling, of_columns, of_columns_by_name, take
from .selection import Tap, attached
from .slim import slimming
from .structure import find_attention
from .taps import Calls, peek, tapping


@dataclass(frozen=True)
class Columns:
    """The columns of B prompts that a language layer sees: S of each."""

    place: Tensor  # int64 [B, S], ascending: where they stood when they entered
    visual: Tensor  # bool [B, S]
    length: Tensor  # int64 [1]: how many are real; padding follows them
    blocks: Tensor | None = None  # int64 [B, S]: columns that see each other whole, -1 for none; None: all is causal

    @property
    def count(self) -> int:
        return self.place.shape[1]

    @property
    def real(self) -> Tensor:
        """Which are no padding, bool [1, S]."""
        return torch.arange(self.count)[None] < self.length

    def seen(self, rows: Tensor) -> Tensor:
        """Which columns these ones see, int64 [B, n] -> bool [B, n, S]."""
        column = torch.arange(self.count)
        found = (column <= rows[..., None]) & self.real[:, None]
        if self.blocks is None:
            return found
        mine, other = take(self.blocks, rows, -1, -2)[..., None], self.blocks[:, None]
        return found | ((mine == other) & (mine >= 0))

    def row(self, b: int) -> Columns:
        """Those of one prompt."""
        if self.place.shape[0] == 1:
            return self
        blocks = None if self.blocks is None else self.blocks[b : b + 1]
        return replace(self, place=self.place[b : b + 1], visual=self.visual[b : b + 1], blocks=blocks)

    def take(self, index: Tensor, length: Tensor) -> Columns:
        """The columns at these places of them, int64 [B, n]."""
        blocks = None if self.blocks is None else take(self.blocks, index, -1, -2)
        return Columns(take(self.place, index, -1, -2), take(self.visual, index, -1, -2), length, blocks)


@dataclass(frozen=True)
class LayerState:
    """What a method may look at before a layer, of one prompt. S columns."""

    x: Tensor  # what enters the layer, [1, S, hidden]
    embedded: Tensor  # what entered the language model in these columns, [1, S, hidden]
    columns: Columns
    visual: int  # visual columns; of a graph, at most
    norm: Callable[[Tensor], Tensor]  # behind the last layer
    before: Tap | None  # q and k of the layer before; None where it was not asked for
    neurons: Tensor | None  # of the MLP of the layer before, [1, S, neurons]; None where they were not asked for
    own: Callable[[Tensor | None], Tap]  # those that the layer itself would make of `x`; q of one column [1], or of all
    pick: Picker = Picker()  # noqa: RUF009  (has no state)

    def top(self, score: Tensor, count: int) -> Tensor:
        """The `count` best of [1, S], best first: int64 [1, count]. For columns that go on."""
        return self.pick.top(score, count)

    def attention(self, tap: Tap, query: Tensor | None = None) -> Tensor:
        """What query columns give to all columns, softmax in float32 or wider; all of them, or one.

        Args:
            query: int64 [1], the one column that asks.

        Returns:
            [heads, S, S], or [heads, 1, S].
        """
        ((q, k),) = tap.rows
        asks = torch.arange(self.columns.count) if query is None else query
        if query is not None and q.shape[2] > 1:
            q = q.index_select(2, query)
        if k.shape[1] != q.shape[1]:
            k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        wide = torch.promote_types(q.dtype, torch.float32)
        score = (q.to(wide) @ k.to(wide).transpose(-1, -2) * tap.scale)[0]
        seen = self.columns.seen(asks[None])[0]
        return torch.softmax(torch.where(seen, score, torch.finfo(wide).min), dim=-1)

    @property
    def last(self) -> Tensor:
        """The last real column, int64 [1]."""
        return self.columns.length - 1


@dataclass(frozen=True)
class Going:
    """The visual columns that go on, best first: where a prompt has fewer than its budget, the last of them do not."""

    columns: Tensor  # int64 [1, n]
    mix: Tensor | None = None  # float [1, n, S]: what each becomes, a weighted sum of columns; itself for None


class Leaver(Protocol):
    """Chooses who goes on at a rung; composed in `passes/inside`."""

    @property
    def method(self) -> str:
        """Its name in the table, with its options."""
        ...

    @property
    def before(self) -> bool:
        """Whether it wants the queries and keys of the layer before a rung."""
        ...

    @property
    def neurons(self) -> bool:
        """Whether it wants the neurons of that layer's MLP."""
        ...

    def __call__(self, state: LayerState, keep: int) -> Going:
        """Who goes on, `keep` columns, at least 1; every one is picked by `state.top`, or constant."""
        ...


@dataclass
class Inside:
    """A ladder and who chooses on it; `attached(model).inside`."""

    leaver: Leaver
    ladder: tuple[Rung, ...]
    picks: Sequence[Picker] = ()  # for each rung, in place of the best; positions are places in the prompt


@contextmanager
def choosing(model: Any, picks: Sequence[Picker]) -> Iterator[None]:
    """While inside, these pick who goes on at each rung; for comparing what comes after."""
    inside: Inside = attached(model).inside
    inside.picks = picks
    try:
        yield
    finally:
        inside.picks = ()


@dataclass(frozen=True)
class Landing:
    """What goes on from a rung."""

    columns: int  # of each prompt
    visual: int  # of them; of a graph, at most
    left: Tensor  # int64 [1]: visual columns that have left so far


@dataclass(frozen=True)
class Before:
    """What a leaver wants of the layer before a rung; None for nothing."""

    calls: Calls | None
    neurons: Tensor | None  # [B, S, neurons]


Own = Callable[["Tensor | None"], Calls]  # the q and k of a layer: q of one column [1], or of all


@contextmanager
def passing(model: Any, passage: Passage) -> Iterator[Passage]:
    """While inside, the language model reads the prompts of `passage`, of which some columns leave or idle."""
    about = attached(model)
    parts = about.family.locate(model)
    layers = list(parts.language_layers)
    ladder = about.inside.ladder if about.inside else ()
    asking = {rung.layer - 1 for rung in ladder if rung.share}
    attentions = {i: find_attention(layers[i]) for i in asking if about.inside.leaver.before}
    neurons: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for i in asking if about.inside and about.inside.leaver.neurons else ():
            stack.callback(_watch_neurons(layers[i], i, neurons).remove)
        stack.enter_context(idling(layers, parts.language.config, about.idle, about.buckets[0].panels, passage))
        if passage.neck is not None:
            stack.enter_context(narrowing(parts.language.config, passage.neck, passage))
        stack.enter_context(slimming(layers, parts.language.config, about.slim, passage))
        taps = stack.enter_context(tapping(attentions))
        for index in range(ladder[0].layer, len(layers)) if ladder else ():
            rung = next((i for i, r in enumerate(ladder) if r.layer == index), None)

            def hook(module: Any, args: Any, kwargs: Any, rung: int | None = rung, index: int = index) -> Any:
                x, *rest = args
                if rung is not None:
                    before = Before(taps.get(index - 1), neurons.get(index - 1))
                    x = passage.leave(x, rung, before, lambda query: passage.peek(module, x, rest, kwargs, query))
                return (x, *passage.beside(rest)), passage.narrowed(kwargs)

            stack.callback(layers[index].register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield passage


class Passage:
    """B prompts on their way through the layers.

    Args:
        x: what enters the first layer, [B, S, hidden].
        columns: those that enter.
        visual: columns of each prompt that are visual tokens; of a graph, at most.
        landings: one for each rung.
        arrived: told at each rung what goes on, and which of the columns before the rung that is, int64 [B, n].
        neck: of a bottleneck.
    """

    def __init__(
        self,
        model: Any,
        x: Tensor,
        columns: Columns,
        visual: int,
        landings: Sequence[Landing],
        arrived: Callable[[Columns, Tensor], None] = lambda columns, index: None,
        neck: Neck | None = None,
    ) -> None:
        self.inside: Inside | None = attached(model).inside
        self.language = attached(model).family.locate(model).language
        self.embedded = x
        self.total = columns.visual[:1].sum(dim=-1)  # all prompts have as many
        self.length = columns.length
        self.columns = columns
        self.visual = visual
        self.landings = landings
        self.arrived = arrived
        self.neck = neck
        self.split = Split.of(columns.visual, columns.real, visual)
        self.kept: list[Tensor] = []  # at each rung, places of the columns that went on, [B, S]

    def seen(self, rows: Tensor) -> Tensor:
        """Which columns these ones see, int64 [B, n] -> bool [B, 1, n, S]."""
        return self.columns.seen(rows)[:, None]

    def real(self, rows: Tensor) -> Tensor:
        """Which of these columns are no padding, int64 [B, n] -> bool [B, n]."""
        return rows < self.columns.length

    def leave(self, x: Tensor, rung: int, before: Before, own: Own) -> Tensor:
        """What goes on of [B, S, hidden] at a rung."""
        landing, now = self.landings[rung], self.columns
        rows = [self._choose(x[b : b + 1], now.row(b), rung, b, before, own) for b in range(len(x))]
        index, x = torch.cat([i for i, _ in rows]), torch.cat([one for _, one in rows])
        self.columns = now.take(index, self.length - landing.left)
        self.split = Split.of(self.columns.visual, self.columns.real, landing.visual)
        self.kept.append(self.columns.place)
        self.arrived(self.columns, index)
        return take(x, index, -2, -3)

    def _choose(
        self,
        x: Tensor,
        columns: Columns,
        rung: int,
        b: int,
        before: Before,
        own: Own,
    ) -> tuple[Tensor, Tensor]:
        """Which columns of one prompt go on, int64 [1, n] ascending, and all of them with those merged."""
        landing = self.landings[rung]
        stays = torch.zeros_like(columns.place)
        assert self.inside is not None
        if landing.visual:
            picker = self.inside.picks[rung] if self.inside.picks else Picker()
            state = LayerState(
                x=x,
                embedded=take(self.embedded[b : b + 1], columns.place, -2, -3),
                columns=columns,
                visual=self.landings[rung - 1].visual if rung else self.visual,
                norm=self.language.norm,
                before=None if before.calls is None else _tap(before.calls, b),
                neurons=None if before.neurons is None else before.neurons[b : b + 1],
                own=lambda query: _tap(own(query), b),
                pick=picker.only(columns.place[0]),
            )
            going = self.inside.leaver(state, landing.visual)
            lives = torch.arange(landing.visual)[None] < self.total - landing.left
            stays = stays.scatter(1, going.columns, lives.to(stays.dtype))
            if going.mix is not None:
                mixed = (going.mix @ x.to(going.mix.dtype)).to(x.dtype)
                mixed = torch.where(lives[..., None], mixed, take(x, going.columns, -2, -3))
                x = x.scatter(1, going.columns[..., None].expand_as(mixed), mixed)
        # Text and who goes on come first, padding fills up, visual columns that leave are last.
        rank = torch.where(columns.visual, 2 * stays, 1 + columns.real.to(stays.dtype))
        return torch.sort(topk(rank.to(torch.float32), landing.columns), dim=-1).values, x

    def peek(
        self, layer: Any, x: Tensor, rest: Sequence[Any], kwargs: Mapping[str, Any], query: Tensor | None
    ) -> Calls:
        """The q and k that a layer would make of the columns before its rung; q of one column, or of all."""
        beside, given = self.beside(rest), self.narrowed(kwargs) | {"past_key_values": None, "use_cache": False}
        config = self.language.config
        found = peek(config, lambda: layer.forward(x, *beside, **given))
        if query is None:
            return found
        one = query[None].expand(len(x), -1)
        asked = peek(config, lambda: layer.forward(*of_columns(one, x, *beside), **of_columns_by_name(one, given)))
        ((q, _),), ((_, k),) = asked.rows, found.rows
        return Calls([(q, k)], scale=found.scale)

    def narrowed(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """What a layer is given, for the columns that it sees."""
        return {name: self.narrow(value, *AXES.get(name, ())) for name, value in kwargs.items()}

    def beside(self, given: Sequence[Any]) -> list[Any]:
        """What a layer is given behind its hidden states, by place: more of the same columns (Gemma 4)."""
        return [self.narrow(value, *BESIDE) for value in given]

    def narrow(self, value: Any, axes: tuple[int, ...] = (), prompts: int = 0) -> Any:
        """A value with the columns that are left on these axes."""
        if isinstance(value, tuple):
            return tuple(self.narrow(v, axes, prompts) for v in value)
        if not isinstance(value, Tensor):
            return value
        whole = self.embedded.shape[1]
        if not axes and whole in value.shape:
            raise ModelError(
                f"a language layer of `{self.language.config.model_type}` is given {list(value.shape)} beside its "
                f"{whole} columns, and vlmcut does not know which of them are columns",
                hint="leave prune-inside out; ask for this model with its config",
            )
        for axis in axes:
            if value.shape[axis] == whole != self.columns.count:  # else it stands for all columns alike
                value = take(value, self.columns.place, axis, prompts)
        return value


def _watch_neurons(layer: Any, index: int, found: dict[int, Tensor]) -> Any:
    """Keep what the linear that reads neurons is given; the hook, to be removed."""
    mlp = find_mlp(layer)
    assert mlp is not None
    return mlp.reads.register_forward_pre_hook(lambda _, args: found.update({index: args[0]}))


def _tap(calls: Calls, b: int) -> Tap:
    """Of one prompt."""
    ((q, k),) = calls.rows
    return Tap(-1, ((q[b : b + 1], k[b : b + 1]),), calls.scale)
