"""Visual columns that use fewer heads and neurons: against the uncut model with hooks, in eager and in graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor
from vlmcut.errors import PassError
from vlmcut.exporters import onnx
from vlmcut.exporters.components import components
from vlmcut.exporters.flops import count
from vlmcut.exporters.operators import Contrib, Operators, Standard
from vlmcut.manifest import TokenBudget
from vlmcut.passes import folder
from vlmcut.passes.calibration import read_calibration
from vlmcut.passes.drop_heads import DropHeads
from vlmcut.passes.drop_layers import DropLayers
from vlmcut.passes.drop_neurons import DropNeurons
from vlmcut.passes.prune_inside import PruneInside
from vlmcut.passes.quantize import Quantize
from vlmcut.passes.recipe import make, parse
from vlmcut.passes.skip_visual import SkipVisual
from vlmcut.passes.slim_visual import WHATS, SlimVisual, head_ratio, head_ratios, visual_importance
from vlmcut.prompt import Prompt, Prompter
from vlmcut.surgery.anatomy import Anatomy, Idle
from vlmcut.surgery.costs import costs, predict
from vlmcut.surgery.inside import Columns
from vlmcut.surgery.load import Loaded, describe, locate
from vlmcut.surgery.neurons import find_mlp
from vlmcut.surgery.selection import attached
from vlmcut.surgery.structure import find_attention, head_dim, output_name
from vlmcut.surgery.talk import Talk, see_all
from vlmcut.surgery.taps import Calls

KINDS = "llava llava-siglip-qwen2 llava_next qwen2_vl qwen2_5_vl qwen3_vl internvl smolvlm paligemma mistral3".split()
STEPS = 16
# float32: products over fewer rows and columns, sums in another order; logits are of size 3. Measured on x86: 0.
ATOL = 2e-5


def whole(a: Anatomy, what: str) -> tuple[int, ...]:
    return a.language.heads if what == "heads" else a.language.intermediate


def some(a: Anatomy, what: str) -> SlimVisual:
    """Every other head of layer 0 and one of the last layer, or neurons of both; nothing out of those between."""
    numbers = whole(a, what)
    keep = [tuple(range(n)) for n in numbers]
    keep[0], keep[-1] = keep[0][1::2], keep[-1][1:]
    gone = sum(numbers) - sum(map(len, keep))
    return SlimVisual(what=what, fraction=gone / sum(numbers), keep=tuple(keep), ranking="global", first=0)


def nothing(a: Anatomy, what: str) -> SlimVisual:
    """Nothing is left for visual columns in layer 0."""
    numbers = whole(a, what)
    keep = [tuple(range(n)) for n in numbers]
    keep[0] = ()
    return SlimVisual(what=what, fraction=numbers[0] / sum(numbers), keep=tuple(keep), ranking="global", first=0)


def said(loaded: Loaded, prompt: Prompt, tokens: Sequence[int]) -> Tensor:
    """Logits after a prompt and after each token, [1 + T, V]."""
    shrunk, seen = see_all(loaded.model, prompt)
    talk = Talk.read(loaded.model, [shrunk], [seen])
    rows = [talk.logits[0]]
    for token in tokens:
        talk = talk.say(torch.tensor([token]))
        rows.append(talk.logits[0])
    return torch.stack(rows)


@contextmanager
def without(loaded: Loaded, prompt: Prompt, what: str, keep: Sequence[Sequence[int]]) -> Iterator[None]:
    """While inside, the uncut model computes everything, and what visual rows may not use is zero where it is read."""
    shrunk, _ = see_all(loaded.model, prompt)
    visual = torch.from_numpy(shrunk.visual_index[0] >= 0)

    def silence(linear: Any, kept: Sequence[int], width: int) -> Any:
        gone = torch.ones(linear.in_features // width, dtype=torch.bool)
        gone[list(kept)] = False
        columns = gone.repeat_interleave(width)

        def hook(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            (x,) = args
            if x.shape[1] != len(visual):  # a step of decode
                return args
            return (x.masked_fill(visual[:, None] & columns, 0),)

        return linear.register_forward_pre_hook(hook)

    hooks = []
    for block, kept in zip(locate(loaded.model).language_layers, keep, strict=True):
        if what == "heads":
            attention = find_attention(block)
            hooks.append(silence(getattr(attention, output_name(attention)), kept, head_dim(attention)))
        else:
            mlp = find_mlp(block)
            assert mlp is not None
            hooks.append(silence(mlp.reads, kept, 1))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("maker", [some, nothing])
@pytest.mark.parametrize("what", WHATS)
@pytest.mark.parametrize("kind", KINDS)
def test_fewer_are_the_others_silent(kind: str, what: str, maker: Callable[..., SlimVisual], tiny, prompt) -> None:
    """Prefill and 16 decode steps."""
    cut, uncut = tiny(kind), tiny(kind)
    make([]).apply(uncut.model, None)
    before = describe(cut.model)
    step = maker(before, what)
    make([step]).apply(cut.model, None)
    after = describe(cut.model)
    assert step.keep is not None
    fewer = [
        (i, len(kept)) for i, (kept, n) in enumerate(zip(step.keep, whole(before, what), strict=True)) if len(kept) < n
    ]
    assert after.idle == Idle(**{what: tuple(fewer)}) == step.plan(before).idle
    made = prompt(cut)
    tokens = [7 * i % before.language.vocabulary for i in range(1, STEPS + 1)]
    mine = said(cut, made, tokens)
    with without(uncut, made, what, step.keep):
        want = said(uncut, made, tokens)
    torch.testing.assert_close(mine, want, rtol=0, atol=ATOL)
    assert not torch.allclose(mine, said(uncut, made, tokens), atol=10 * ATOL)  # and it is another model
    flops = [sum(c.flops for c in costs(a, text_tokens=1) if c.part == "language model") for a in (before, after)]
    assert flops[1] < flops[0]
