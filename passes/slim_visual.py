"""Visual tokens use some heads, or some MLP neurons, of the language model; text uses all, and no token leaves.

| what | visual columns of a prompt |
|---|---|
| heads | ask with the kept query heads alone; nothing of the others reaches them. Keys and values stay whole |
| neurons | run through the kept neurons of the MLP |

Work leaves the graph: they are products of visual columns with fewer rows of the weights. Decode does not change.

A head is worth to visual tokens what text gives to them in it: the attention that the text behind the last image gives
to visual columns over what it gives to text, mean over calibration prompts. A neuron is worth its mean magnitude on
visual columns times the norm of its output column. In the last layer nobody reads what becomes of visual columns, so
that all is worth nothing there.

Source: YOPO, "Treat visual tokens as text? But your MLLM only needs fewer efforts to see" (arXiv:2410.06169), visual
heads and sparse FFN. We differ: a fixed number of heads has the best mean ratio, where the paper keeps those above a
threshold in the majority of samples; text still attends to visual columns in a dropped head, whose key others share,
so that decode is what it was. The paper fine-tunes and takes the first half of the neurons; we train nothing and
take those that do most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ..errors import PassError, nearest
from ..surgery.anatomy import Anatomy, Slim
from ..surgery.inside import Columns
from ..surgery.load import locate
from ..surgery.neurons import find_mlp
from ..surgery.selection import Members, attached
from ..surgery.structure import find_attention
from ..surgery.talk import Talk, blocks_of, see_all
from ..surgery.taps import Calls, tapping
from .base import Pass
from .calibration import MEASURED, Calibration
from .drop_neurons import neuron_importance
from .importance import RANKINGS, best_of_all, best_of_each, over_mean, spread
from .skip_visual import chosen_by, last_layer, visual_columns

WHATS = ("heads", "neurons")  # and the fields of Idle
FIRST = {"heads": 2, "neurons": 0}  # the first layer that may leave some out, where `first` does not say; the paper's


@dataclass(frozen=True, kw_only=True)
class SlimVisual(Pass):
    """Visual tokens leave out a fraction of `what` in the layers of the language model, or use those in `keep`."""

    name: ClassVar[str] = "slim-visual"
    summary: ClassVar[str] = "visual tokens use fewer heads or MLP neurons of the language model; none leaves"
    source: ClassVar[str] = "YOPO, arXiv:2410.06169, without its training"

    what: str  # heads or neurons
    fraction: float  # of them left out by visual tokens, 0 <= fraction < 1; rounded to whole ones
    keep: tuple[tuple[int, ...], ...] | None = None  # those that they use in each layer; measured when absent
    ranking: str = "layer"  # layer: every layer loses the same fraction; global: layers are ranked together
    first: int | None = None  # layers before this one keep all; 2 for heads and 0 for neurons when absent

    def plan(self, a: Anatomy) -> Anatomy:
        for key, given, known in (("what", self.what, WHATS), ("ranking", self.ranking, RANKINGS)):
            if given not in known:
                raise PassError(f"{self.name}: no {key} `{given}`", hint=nearest(given, known))
        self._refuse(a)
        if not 0 <= self.fraction < 1:
            raise PassError(
                f"{self.name}: fraction={self.fraction} of the {self.what}", hint="choose 0 <= fraction < 1"
            )
        if not 0 <= self._first < a.language.layers:
            raise PassError(
                f"{self.name}: first={self._first}, but the language model has {a.language.layers} layers",
                hint=f"choose first = 0 to {a.language.layers - 1}",
            )
        whole = self._whole(a)
        left = self._left(a) if self.keep is None else self._kept(a)
        some: Slim = tuple((i, n) for i, n in enumerate(left) if n < whole[i])
        return replace(a, idle=replace(a.idle, **{self.what: tuple(sorted((*getattr(a.idle, self.what), *some)))}))

    def _refuse(self, a: Anatomy) -> None:
        """Raise PassError for a model whose visual columns cannot do with less of it."""
        language = a.language
        if "language" in a.quantized:  # its weights say little of what a neuron is worth
            raise PassError(f"{self.name}: language is int8 already", hint="put quantize last")
        if self.what == "neurons" and language.solid is not None:
            raise PassError(f"{self.name}: no neuron of `{a.family}` can be left out: {language.solid}")
        if self.what == "neurons":
            return
        if a.carriers:
            raise PassError(
                f"{self.name}: {a.carriers} carriers of each image see the others with all heads, by `bottleneck`",
                hint='use what = "neurons", or leave one of the two passes out',
            )
        for why in (language.stiff, language.bound):
            if why is not None:
                raise PassError(f"{self.name}: no head of `{a.family}` can be left out: {why}")
        if language.window is not None:
            raise PassError(
                f"{self.name}: some layers of `{a.family}` see {language.window} columns back, and one that runs "
                "on text alone sees all",
                hint='use what = "neurons"',
            )

    def _whole(self, a: Anatomy) -> tuple[int, ...]:
        """Heads or neurons of each layer."""
        return a.language.heads if self.what == "heads" else a.language.intermediate

    @property
    def _first(self) -> int:
        return FIRST[self.what] if self.first is None else self.first

    def free(self, a: Anatomy) -> tuple[int, ...]:
        """Layers of which visual columns may leave some out.

        Not those before `first`, those where they do without already, or whose queries, keys or neurons choose who
        goes on.
        """
        taken = {*a.idle.layers, *a.idle.apart, *a.idle.near, *(layer for layer, _ in getattr(a.idle, self.what))}
        taken |= chosen_by(a, attention=self.what == "heads")
        if self.what == "neurons":
            taken |= set(a.idle.mlp)
        whole = self._whole(a)
        return tuple(i for i in range(self._first, last_layer(a)) if whole[i] and i not in taken)

    def _left(self, a: Anatomy) -> tuple[int, ...]:
        """What stays of each layer; where only the sum is known before it is measured, spread evenly."""
        whole, free = self._whole(a), self.free(a)
        if not free:
            raise PassError(
                f"{self.name}: of {len(whole)} layers, from layer {self._first} on, visual tokens can leave "
                f"{self.what} out of none",
                hint="leave this pass out, or give a lower `first`" if self._first else "leave this pass out",
            )
        room = tuple(n if i in free else 0 for i, n in enumerate(whole))
        if self.ranking == "global":
            stay = spread(sum(room) - round(sum(room) * self.fraction), room, least=0)
        else:
            stay = tuple(n - round(n * self.fraction) for n in room)
            least = min(n for n in room if n)
            if not all(n for n, total in zip(stay, room, strict=True) if total):
                raise PassError(
                    f"{self.name}: fraction={self.fraction} leaves 0 of {least} {self.what}",
                    hint=f'choose at most {math.floor((least - 1) / least * 1e4) / 1e4}, or ranking = "global"',
                )
        return tuple(n - r + s for n, r, s in zip(whole, room, stay, strict=True))

    def _kept(self, a: Anatomy) -> tuple[int, ...]:
        """What `keep` names of each layer."""
        assert self.keep is not None
        whole, counts, free = self._whole(a), tuple(len(k) for k in self.keep), self.free(a)
        legal = len(counts) == len(whole) and all(
            len(set(k)) == len(k) and set(k) <= set(range(n)) and (len(k) == n or i in free)
            for i, (k, n) in enumerate(zip(self.keep, whole, strict=True))
        )
        left = self._left(a)
        if not legal or (counts != left if self.ranking == "layer" else sum(counts) != sum(left)):
            stay = list(left) if self.ranking == "layer" else f"{sum(left)} in all"
            raise PassError(
                f"{self.name}: keep lists {list(counts)} {self.what} per layer, fraction={self.fraction} of "
                f"{list(whole)} leaves {stay}; some may be left out of layers {list(free)}",
                hint="leave `keep` out to have it measured",
            )
        return counts

    def notes(self, a: Anatomy) -> list[str]:
        if self.keep is not None:
            return []
        found = [f"which {self.what} visual tokens use is measured"]
        if self._first:
            found.append(f"before layer {self._first} they use all")
        if self.ranking == "global":
            found.append(f"of which layer they use how many {self.what} is measured; the plan spreads them evenly")
        return found

    @property
    def needs_calibration(self) -> bool:
        return self.keep is None

    def resolve(self, model: Any, a: Anatomy, calibration: Calibration) -> Self:
        if self.keep is not None:
            return self
        left, layers = self._left(a), self.free(a)
        measure = head_ratios if self.what == "heads" else visual_importance
        found = measure(model, layers, calibration)
        if layers[-1] == a.language.layers - 1:  # nobody reads what becomes of visual columns there
            found[layers[-1]] = torch.zeros_like(found[layers[-1]])
        if self.ranking == "layer":
            best = best_of_each([found[i] for i in layers], [left[i] for i in layers])
        else:
            # A ratio is one wherever its head sits; activations are as large as their layer's stream.
            worth = [found[i] for i in layers]
            best = best_of_all(
                worth if self.what == "heads" else over_mean(worth), sum(left[i] for i in layers), least=0
            )
        kept = dict(zip(layers, best, strict=True))
        return replace(self, keep=tuple(kept.get(i, tuple(range(n))) for i, n in enumerate(self._whole(a))))

    def apply(self, model: Any, a: Anatomy) -> None:
        assert self.keep is not None
        about, whole = attached(model), self._whole(a)
        mine: Members = {i: tuple(sorted(k)) for i, k in enumerate(self.keep) if len(k) < whole[i]}
        about.slim = {**about.slim, self.what: {**about.slim.get(self.what, {}), **mine}}
        about.idle = self.plan(a).idle


def head_ratio(tap: Calls, columns: Columns, visual: Tensor) -> Tensor:
    """Attention that text behind the last visual column gives to visual columns over what it gives to text.

    Args:
        tap: q and k of one prompt, [1, heads, S, head_dim] and [1, kv_heads, S, head_dim].
        columns: those that the layer sees.
        visual: which of them are visual, bool [S].

    Returns:
        One ratio per head, float64 [heads].
    """
    ((q, k),) = tap.rows
    asks = torch.arange(int(torch.nonzero(visual)[-1]) + 1, len(visual))
    if not len(asks):
        raise PassError(
            f"slim-visual: a calibration prompt of {len(visual)} columns ends in an image, and no text asks for it",
            hint="put the question behind the image",
        )
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    score = (q[0, :, asks].double() @ k[0].double().transpose(-1, -2)) * tap.scale
    share = torch.softmax(score.masked_fill(~columns.seen(asks[None])[0], -math.inf), dim=-1)
    seen = share[..., visual].sum(dim=(-1, -2))
    return seen / (share.sum(dim=(-1, -2)) - seen)


def head_ratios(model: Any, layers: Sequence[int], calibration: Calibration) -> dict[int, Tensor]:
    """`head_ratio` of these layers, mean over calibration prompts."""
    parts, prefix = locate(model), attached(model).family.prefix
    blocks: Any = parts.language_layers
    sums = {i: torch.zeros((), dtype=torch.float64) for i in layers}
    prompts = calibration.prompts[:MEASURED]
    for prompt in prompts:
        shrunk, pictures = see_all(model, prompt)
        visual, places = visual_columns(model, shrunk, pictures)
        each = blocks_of(prefix, [shrunk])
        with tapping({i: find_attention(blocks[i]) for i in layers}) as taps:
            Talk.read(model, [shrunk], [pictures])
        for i in layers:
            here = None if each is None else each[:, places[i]]
            count = len(places[i])
            columns = Columns(torch.arange(count)[None], visual[i][None], torch.tensor([count]), here)
            sums[i] = sums[i] + head_ratio(taps[i], columns, visual[i])
    return {i: total / len(prompts) for i, total in sums.items()}


def visual_importance(model: Any, layers: Sequence[int], calibration: Calibration) -> dict[int, Tensor]:
    """Mean norm of what each neuron of these layers adds to visual columns, float64 [neurons] each."""
    blocks: Any = locate(model).language_layers
    looked = [see_all(model, prompt) for prompt in calibration.prompts[:MEASURED]]
    columns = [visual_columns(model, shrunk, pictures)[0] for shrunk, pictures in looked]
    sums = {i: torch.zeros((), dtype=torch.float64) for i in layers}
    counts, visual = dict.fromkeys(layers, 0), columns[0]

    def record(layer: int, x: Tensor) -> None:
        seen = x[0][visual[layer]].detach().double().abs()
        sums[layer] = sums[layer] + seen.sum(dim=0)
        counts[layer] += len(seen)

    reads: dict[int, Any] = {}
    for i in layers:
        mlp = find_mlp(blocks[i])
        assert mlp is not None
        reads[i] = mlp.reads
    hooks = [m.register_forward_pre_hook(lambda _, args, i=i: record(i, args[0])) for i, m in reads.items()]
    try:
        for (shrunk, pictures), visual in zip(looked, columns, strict=True):  # noqa: B007  `record` reads it
            Talk.read(model, [shrunk], [pictures])
    finally:
        for hook in hooks:
            hook.remove()
    return {i: neuron_importance(sums[i] / counts[i], reads[i].weight.detach()) for i in layers}
