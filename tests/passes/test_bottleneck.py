"""Text that sees a picture through its last tokens: against the uncut model with a mask, in eager and in graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from vlmcut.errors import PassError
from vlmcut.exporters import onnx
from vlmcut.exporters.components import components
from vlmcut.exporters.flops import count
from vlmcut.exporters.graphs import write_graphs
from vlmcut.exporters.operators import Contrib, Operators, Standard
from vlmcut.manifest import Manifest, TokenBudget
from vlmcut.passes.bottleneck import Bottleneck
from vlmcut.passes.prune_inside import PruneInside
from vlmcut.passes.prune_tokens import PruneTokens
from vlmcut.passes.recipe import make
from vlmcut.passes.skip_visual import SkipVisual
from vlmcut.prompt import Prompt
from vlmcut.runtime.sessions import Graphs
from vlmcut.surgery.costs import kv_bytes, predict
from vlmcut.surgery.load import Loaded, describe, locate
from vlmcut.surgery.talk import Talk, see_all
from vlmcut.validation import exactness

KINDS = "llava llava-siglip-qwen2 llava_next qwen2_vl qwen2_5_vl qwen3_vl internvl smolvlm paligemma mistral3".split()
STEPS = 16
# float32: fewer keys or masked ones, sums in another order; logits are of size 3.
ATOL = 2e-5


def said(loaded: Loaded, prompt: Prompt, tokens: Sequence[int]) -> tuple[Tensor, Talk]:
    """Logits after a prompt and after each token, [1 + T, V], and the last step."""
    shrunk, seen = see_all(loaded.model, prompt)
    talk = Talk.read(loaded.model, [shrunk], [seen])
    rows = [talk.logits[0]]
    for token in tokens:
        talk = talk.say(torch.tensor([token]))
        rows.append(talk.logits[0])
    return torch.stack(rows), talk


def hidden_columns(prompt: Prompt, carriers: int) -> np.ndarray:
    """Visual columns of a shrunk prompt that are no carriers, bool [S]; picture by picture."""
    index, hidden, start = prompt.visual_index[0], np.zeros(prompt.length, dtype=bool), 0
    for tokens in prompt.counts:
        for token in range(start, start + tokens - carriers):
            hidden[np.flatnonzero(index == token)] = True
        start += tokens
    return hidden


@contextmanager
def masked(loaded: Loaded, prompt: Prompt, carriers: int) -> Iterator[None]:
    """While inside, text rows of the uncut model are forbidden to see visual columns that are no carriers."""
    shrunk, _ = see_all(loaded.model, prompt)
    visual = torch.from_numpy(shrunk.visual_index[0] >= 0)
    hidden = torch.from_numpy(hidden_columns(shrunk, carriers))

    def hide(layer: int, args: Any, kwargs: dict[str, Any]) -> Any:
        n = torch.arange(len(visual))
        if args[0].shape[1] == len(visual):
            mask = kwargs.get("attention_mask")
            seen = n[:, None] >= n if mask is None else (mask if mask.dtype == torch.bool else mask == 0)[0, 0]
            seen = seen & (visual[:, None] | ~hidden)
        else:
            said = kwargs["past_key_values"].get_seq_length(layer) + 1 - len(visual)
            seen = torch.cat([~hidden, torch.ones(said, dtype=torch.bool)])[None]
        least = torch.finfo(args[0].dtype).min
        return args, kwargs | {"attention_mask": torch.where(seen, 0.0, least)[None, None]}

    hooks = [
        layer.register_forward_pre_hook(lambda _, args, kwargs, i=i: hide(i, args, kwargs), with_kwargs=True)
        for i, layer in enumerate(locate(loaded.model).language_layers)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("carriers", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bottleneck_is_a_mask(kind: str, carriers: int, tiny, prompt) -> None:
    """Prefill and 16 decode steps, two pictures, one of them inside the text."""
    cut, uncut = tiny(kind), tiny(kind)
    make([]).apply(uncut.model, None)
    before = describe(cut.model)
    step = Bottleneck(carriers=carriers)
    make([step]).apply(cut.model, None)
    assert describe(cut.model).carriers == carriers == step.plan(before).carriers
    made = prompt(cut)
    tokens = [7 * i % before.language.vocabulary for i in range(1, STEPS + 1)]
    mine, talk = said(cut, made, tokens)
    with masked(uncut, made, carriers):
        want, _ = said(uncut, made, tokens)
    torch.testing.assert_close(mine, want, rtol=0, atol=ATOL)
    assert not torch.allclose(mine, said(uncut, made, tokens)[0], atol=10 * ATOL)  # and it is another model
    text = int((made.visual_index < 0).sum())
    for entry in talk.cache.layers:
        assert entry.keys.shape[2] == entry.values.shape[2] == text + 2 * carriers + STEPS
