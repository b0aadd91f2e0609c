"""Prompts read by parts: what transformers' own `generate` says, alone or in a batch, whole or cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from vlmcut.errors import PassError
from vlmcut.passes.prune_tokens import PruneTokens
from vlmcut.passes.recipe import make
from vlmcut.passes.tokens.methods import METHODS
from vlmcut.passes.trim_tower import TrimTower
from vlmcut.prompt import Prompt, Prompter
from vlmcut.surgery.load import Loaded, describe
from vlmcut.surgery.selection import attached
from vlmcut.surgery.talk import Talk, greedy, see_all

# One of each: compact and M-RoPE positions, DeepStack, images and prompts that see themselves whole, sliding windows,
# short convolutions, tiles, newlines, pictures of any size.
EVERY = (
    "llava", "llava-siglip-qwen2", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl",
    "idefics3", "smolvlm", "paligemma", "gemma3", "pixtral", "mistral3", "lfm2_vl",
)  # fmt: skip
# Float32 through other kernels, or the same with other columns beside; logits are at most 5, whose last bit is 4.8e-7.
# Measured on x86 with one thread: 1.5e-6 for a batch against one by one.
ATOL = 2e-5
TOKENS = 6


@pytest.fixture(scope="module")
def made(tiny: Callable[[str], Loaded]) -> Callable[[str], Loaded]:
    """Uncut models, loaded once; nothing here changes them."""
    kept: dict[str, Loaded] = {}
    return lambda kind: kept.setdefault(kind, tiny(kind))


def pictures(loaded: Loaded, count: int, seed: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    size = attached(loaded.model).buckets[0].size
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for _ in range(count)]


def prompter(loaded: Loaded) -> Prompter:
    return Prompter(loaded.processor, attached(loaded.model).family.layout(loaded.model.config))


def raw(loaded: Loaded, images: Sequence[Image.Image], text: str) -> dict[str, torch.Tensor]:
    """What a user of transformers gives to `generate`."""
    found = prompter(loaded).raw(images, text)
    return {name: torch.as_tensor(np.asarray(value)) for name, value in found.items() if name != "labels"}


def read(loaded: Loaded, *prompts: Prompt) -> Talk:
    both = [see_all(loaded.model, prompt) for prompt in prompts]
    return Talk.read(loaded.model, [shrunk for shrunk, _ in both], [seen for _, seen in both])


def generate(model: Any, inputs: dict[str, Any], count: int = TOKENS) -> list[int]:
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=count, do_sample=False, eos_token_id=None)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("kind", EVERY)
def test_an_uncut_model_says_what_transformers_says(kind: str, images: int, made: Any) -> None:
    """The processor's own inputs through `generate`: positions, masks, merges and the cache are transformers'."""
    loaded = made(kind)
    shown, text = pictures(loaded, images), "Is the red square left?"
    said = greedy(read(loaded, prompter(loaded)(shown, text)), TOKENS)
    assert said == [generate(loaded.model, raw(loaded, shown, text))]
    # Negative control: another picture is another answer, or at least other scores.
    other = read(loaded, prompter(loaded)(pictures(loaded, images, seed=1), text))
    assert not torch.allclose(other.logits, read(loaded, prompter(loaded)(shown, text)).logits, rtol=0, atol=1e-3)


def test_text_alone(made: Any) -> None:
    for kind in ("llava", "qwen2_vl", "gemma3", "lfm2_vl"):
        loaded = made(kind)
        said = greedy(read(loaded, prompter(loaded)([], "What is it?")), TOKENS)
        assert said == [generate(loaded.model, raw(loaded, [], "What is it?"))], kind


PLAIN = [name for name, row in METHODS.items() if not row.frames and row.module is None]
PLAIN[PLAIN.index("mustdrop-vision")] += ":window=2"  # which divides the 4 x 4 tokens of tiny models


def kept_by(method: str, loaded: Loaded) -> int:
    """The first number of tokens, from 5 up, that a method can keep."""
    a = TrimTower().plan(describe(loaded.model))
    for keep in range(5, a.visual_tokens):
        try:
            return PruneTokens(keep=keep, method=method).plan(a).keep[0]
        except PassError:
            continue
    raise AssertionError(f"{method} can keep no number of {a.visual_tokens} tokens")


@pytest.mark.parametrize("method", PLAIN)
def test_a_cut_model_says_what_transformers_says(kind: str, method: str, tiny, prompt, seen) -> None:
    """`generate` and whole forward passes, on the shrunk prompt and the features that were kept."""
    loaded = tiny(kind)
    make([PruneTokens(keep=kept_by(method, loaded), method=method)]).apply(loaded.model, None)
    inputs = seen(loaded)
    said = greedy(read(loaded, prompt(loaded)), TOKENS)
    assert said == [generate(loaded.model, inputs)]
    ids = inputs["input_ids"]
    with torch.no_grad():
        for _ in range(TOKENS):
            logits = loaded.model(**inputs | {"input_ids": ids}).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(dim=-1)], dim=1)
    assert ids[0, inputs["input_ids"].shape[1] :].tolist() == said[0]


@pytest.mark.parametrize("kind", ["llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "pixtral"])
def test_pruned_is_the_whole_prompt_with_columns_hidden(kind: str, tiny) -> None:
    """transformers reads every token of both images, and a mask hides the dropped ones: nothing else has changed.

    Positions are given: those of a shorter prompt where they are compact, the whole prompt's where they are M-RoPE.
    """
    loaded, plain = tiny(kind), tiny(kind)
    count = attached(loaded.model).buckets[0].tokens
    make([PruneTokens(keep=max(2, count // 3), method="divprune")]).apply(loaded.model, None)
    shown, text = pictures(loaded, 2), "Is the red <image> left?"
    whole = prompter(loaded)(shown, text)
    shrunk, seen = see_all(loaded.model, whole)
    got = Talk.read(loaded.model, [shrunk], [seen]).logits
    starts = np.cumsum((0, *whole.counts))[:-1]
    chosen = np.concatenate([start + s.kept.numpy() for start, s in zip(starts, seen, strict=True)])
    column = (whole.visual_index[0] < 0) | np.isin(whole.visual_index[0], chosen)
    assert column.sum() == shrunk.length < whole.length
    axes = attached(plain.model).family.layout(plain.model.config).axes
    places = whole.position_ids.copy()
    if axes == 1:
        places[:, column] = np.arange(column.sum())
    position_ids = torch.from_numpy(places if axes == 1 else places[:, None])
    inputs = raw(plain, shown, text) | {"attention_mask": torch.from_numpy(column.astype(np.int64))[None]}
    with torch.no_grad():
        want = plain.model(**inputs, position_ids=position_ids).logits[:, -1]
        everything = plain.model(**raw(plain, shown, text)).logits[:, -1]
    torch.testing.assert_close(got, want, rtol=0, atol=ATOL)
    assert (got - everything).abs().max() > 100 * ATOL  # negative control: the dropped tokens did matter


@pytest.mark.parametrize("kind", EVERY)
def test_a_batch_is_one_by_one(kind: str, made: Any) -> None:
    """Prompts of one length together: other pictures, images in other places, the same logits, caches and words."""
    loaded = made(kind)
    ask = prompter(loaded)
    texts = ("Is <image> left of <image> here", "Is <image> left of <image> here", "Is <image> here <image> left of")
    prompts = [ask(pictures(loaded, 2, seed), text) for seed, text in enumerate(texts)]
    assert len({p.length for p in prompts}) == 1 and not np.array_equal(prompts[0].input_ids, prompts[2].input_ids)
    together, alone = read(loaded, *prompts), [read(loaded, p) for p in prompts]
    assert together.logits.shape[0] == 3 and together.positions.tolist() == [p.next_position for p in prompts]
    for row, one in enumerate(alone):
        torch.testing.assert_close(together.logits[row], one.logits[0], rtol=0, atol=ATOL)
        others = [other.logits[0] for other in alone if other is not one]
        assert all((together.logits[row] - other).abs().max() > 100 * ATOL for other in others)
    assert greedy(together, TOKENS) == [greedy(one, TOKENS)[0] for one in alone]


def test_a_batch_of_a_cut_model(kind: str, tiny) -> None:
    """Each picture keeps its own tokens, whatever the others keep."""
    loaded = tiny(kind)
    make([PruneTokens(keep=5, method="divprune")]).apply(loaded.model, None)
    prompts = [prompter(loaded)(pictures(loaded, 2, seed), "Is the red <image> left?") for seed in range(3)]
    kept = [[s.kept.tolist() for s in see_all(loaded.model, p)[1]] for p in prompts]
    assert len({tuple(places) for both in kept for places in both}) > 1
    together = read(loaded, *prompts)
    for row, one in enumerate(prompts):
        torch.testing.assert_close(together.logits[row], read(loaded, one).logits[0], rtol=0, atol=ATOL)


def test_stop_tokens_end_one_prompt_and_not_the_others(made: Any) -> None:
    loaded = made("llava")
    prompts = [prompter(loaded)(pictures(loaded, 1, seed), "What is it?") for seed in range(4)]
    free = greedy(read(loaded, *prompts), TOKENS)
    assert all(len(said) == TOKENS for said in free)
    for stop in ({free[0][0]}, {free[0][2]}, {token for said in free for token in said}, {10**6}):
        want = []
        for said in free:
            ends = [i for i, token in enumerate(said) if token in stop]
            want.append(said[: ends[0]] if ends else said)
        assert greedy(read(loaded, *prompts), TOKENS, frozenset(stop)) == want
    assert greedy(read(loaded, *prompts), 0) == [[]] * 4


def test_changes_are_heard(made: Any) -> None:
    """`change` edits what enters the language model; the identity edits nothing."""
    loaded = made("llava")
    shrunk, seen = see_all(loaded.model, prompter(loaded)(pictures(loaded, 1), "What is it?"))
    plain = Talk.read(loaded.model, [shrunk], [seen])
    same = Talk.read(loaded.model, [shrunk], [seen], change=lambda x: x)
    louder = Talk.read(loaded.model, [shrunk], [seen], change=lambda x: 2 * x)
    assert torch.equal(plain.logits, same.logits) and not torch.equal(plain.logits, louder.logits)
    token = plain.logits.argmax(dim=-1)
    one, other = same.say(token), plain.say(token, change=lambda x: 2 * x)
    assert not torch.equal(one.logits, other.logits)


@pytest.mark.parametrize("kind", EVERY)
def test_what_is_remembered(kind: str, made: Any) -> None:
    """Names and shapes are the family's, and no layer forgets: a window masks, it does not drop rows."""
    loaded = made(kind)
    prompt = prompter(loaded)(pictures(loaded, 2), "What is it?")
    talk = read(loaded, prompt)
    for rows in (prompt.length, prompt.length + 1):
        want = attached(loaded.model).family.states(loaded.model, [rows] * describe(loaded.model).language.layers)
        assert {name: (1, *t.shape) for name, t in talk.states().items()} == want
        talk = talk.say(talk.logits.argmax(dim=-1))
    kv = [kv for kv in describe(loaded.model).language.kv_heads if kv]
    assert len([n for n in talk.states() if n.startswith("key_")]) == len(kv)
