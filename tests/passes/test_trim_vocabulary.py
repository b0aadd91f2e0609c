"""Rows of the vocabulary that leave: the rest computes the same, on every must family, and nobody reads a wrong row."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vlmcut
from PIL import Image
from transformers import AutoModelForImageTextToText
from vlmcut import pipeline
from vlmcut.errors import BundleError, PassError, VlmcutError
from vlmcut.passes import folder
from vlmcut.passes.calibration import read_calibration
from vlmcut.passes.prune_tokens import PruneTokens
from vlmcut.passes.quantize import Quantize
from vlmcut.passes.recipe import Recipe, make
from vlmcut.passes.trim_vocabulary import TrimVocabulary, named, special
from vlmcut.pipeline import Request
from vlmcut.prompt import Prompt
from vlmcut.surgery import tiny as tiny_models
from vlmcut.surgery.costs import costs
from vlmcut.surgery.families import family_of
from vlmcut.surgery.load import Loaded, describe, locate
from vlmcut.surgery.selection import attached
from vlmcut.surgery.talk import Talk, see_all
from vlmcut.surgery.vocabulary import whole
from vlmcut.validation import complete
from vlmcut.vocabulary import LOW, Vocabulary, write_runs

MUST = (
    "llava llava-siglip-qwen2 llava_next llava_onevision qwen2_vl qwen2_5_vl qwen3_vl internvl smolvlm idefics3 "
    "paligemma gemma3 mistral3 pixtral lfm2_vl"
).split()
STEPS = 16


def cut(loaded: Loaded, *steps: Any) -> Recipe:
    recipe = make(list(steps))
    return recipe.apply(loaded.model, read_calibration(loaded, None) if recipe.needs_calibration else None)


def trim(loaded: Loaded, prompt: Prompt, **more: Any) -> TrimVocabulary:
    """Keeps every third id, what the prompt says, and what a model cannot be without."""
    size = describe(loaded.model).language.vocabulary
    tokenizer = loaded.processor.tokenizer
    ids = {*range(0, size, 3), *prompt.input_ids[0].tolist(), *named(loaded.model), *special(tokenizer)}
    ids = sorted(i for i in ids if i < size)
    assert len(ids) < size
    return TrimVocabulary(size=len(ids), tokens=write_runs(ids), **more)


def kept_ids(loaded: Loaded) -> np.ndarray:
    vocabulary = attached(loaded.model).vocabulary
    assert vocabulary is not None
    return vocabulary.ids


def read(loaded: Loaded, prompt: Prompt, only: np.ndarray | None = None) -> tuple[torch.Tensor, list[int]]:
    """Logits after the prompt and after each of 16 greedy tokens, [1 + 16, V]; the largest of `only` is said."""
    shrunk, seen = see_all(loaded.model, prompt)
    talk = Talk.read(loaded.model, [shrunk], [seen])
    rows, said = [talk.logits[0]], []
    for _ in range(STEPS):
        allowed = np.arange(len(rows[-1])) if only is None else only
        said.append(int(allowed[int(rows[-1][allowed].argmax())]))
        talk = talk.say(torch.tensor([said[-1]]))
        rows.append(talk.logits[0])
    return torch.stack(rows), said


@pytest.mark.parametrize("kind", MUST)
def test_kept_tokens_compute_the_same(kind: str, tiny, prompt) -> None:
    """Against the whole model with the other logits masked: prefill and 16 steps; tied and not, scaled embeddings."""
    whole, fewer = tiny(kind), tiny(kind)
    asked = prompt(whole)
    cut(whole)
    step = trim(whole, asked)
    cut(fewer, step)
    ids = kept_ids(fewer)
    want, tokens = read(whole, asked, only=ids)
    have, said = read(fewer, prompt(fewer))
    assert said == tokens and have.shape == want.shape
    # float32: the last rows of a product that is no whole number of vectors high are summed in another order; logits
    # are of size 5. Measured on x86 with one thread: at most 2.4e-7, three kinds equal to the bit.
    torch.testing.assert_close(have[:, ids], want[:, ids], rtol=0, atol=2e-6)
    others = np.setdiff1d(np.arange(have.shape[1]), ids)
    assert len(others) and (have[:, others] == LOW).all() and want.min() > LOW
    a, full = describe(fewer.model), describe(whole.model)
    assert a.language.vocabulary == step.size and a.language.tied == full.language.tied
    parts = locate(fewer.model)
    assert len(parts.language.get_input_embeddings().weight) == len(parts.head.weight) == step.size


@pytest.mark.parametrize("kind", MUST)
def test_saved_and_reloaded(kind: str, tiny, prompt, tmp_path: Path) -> None:
    """The folder gives the same bits back with vlmcut.load; plain transformers stops at the first weight."""
    loaded = tiny(kind)
    config, asked = copy.deepcopy(loaded.model.config), prompt(loaded)
    folder.save(loaded, tmp_path / "cut", config, cut(loaded, trim(loaded, asked)))
    again = vlmcut.load(tmp_path / "cut")
    assert describe(again.model) == describe(loaded.model)
    (have, said), (want, tokens) = read(again, prompt(again)), read(loaded, prompt(loaded))
    assert torch.equal(have, want) and said == tokens
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForImageTextToText.from_pretrained(tmp_path / "cut")


def test_transformers_generates_the_same(kind: str, tiny, prompt, stock, tmp_path: Path) -> None:
    """Its own `generate` on the reloaded model says what it says on the whole one that may say kept tokens only."""
    whole, loaded = tiny(kind), tiny(kind)
    config = copy.deepcopy(loaded.model.config)
    folder.save(loaded, tmp_path / "cut", config, cut(loaded, trim(loaded, prompt(loaded))))
    asked = stock(whole) | {"max_new_tokens": STEPS, "do_sample": False}
    allowed = kept_ids(loaded).tolist()
    want = whole.model.generate(**asked, prefix_allowed_tokens_fn=lambda *_: allowed)
    assert want.shape[1] > asked["input_ids"].shape[1]
    assert torch.equal(vlmcut.load(tmp_path / "cut").model.generate(**asked), want)


def test_int8_follows(kind: str, tiny, prompt, tmp_path: Path) -> None:
    """An int8 row has its own scale, so that kept rows are the same integers; the map goes along."""
    whole, fewer = tiny(kind), tiny(kind)
    config, asked = copy.deepcopy(fewer.model.config), prompt(fewer)
    step = trim(whole, asked)
    cut(whole, Quantize())
    done = cut(fewer, step, Quantize())
    ids = kept_ids(fewer)
    want, tokens = read(whole, asked, only=ids)
    have, said = read(fewer, prompt(fewer))
    assert said == tokens and torch.equal(have[:, ids], want[:, ids])
    folder.save(fewer, tmp_path / "cut", config, done)
    again = vlmcut.load(tmp_path / "cut")
    assert torch.equal(read(again, prompt(again))[0], have)


def test_unknown_tokens_are_read_as_the_named_one(kind: str, tiny, prompt) -> None:
    loaded, whole = tiny(kind), tiny(kind)
    asked = prompt(loaded)
    ids = sorted({0, *named(loaded.model), *range(3, 40)})
    words = int((~np.isin(asked.input_ids, ids)).sum())
    assert words > 5
    cut(whole)
    cut(loaded, TrimVocabulary(size=len(ids), tokens=write_runs(ids), unseen="unknown", unknown=7))
    replaced = copy.copy(asked)
    object.__setattr__(replaced, "input_ids", np.where(np.isin(asked.input_ids, ids), asked.input_ids, 7))
    have, want = read(loaded, prompt(loaded))[0][0], read(whole, replaced)[0][0]
    # float32, as above.
    torch.testing.assert_close(have[ids], want[ids], rtol=0, atol=2e-6)


def test_what_stays(tiny, tmp_path: Path) -> None:
    """Special and added tokens, the template, questions and answers in both forms, the corpus; then the lowest ids."""
    loaded = tiny("llava")
    tokenizer, a = loaded.processor.tokenizer, describe(loaded.model)
    loaded.processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<x>"]})

    def ids(text: str) -> set[int]:
        return set(tokenizer(text, add_special_tokens=False)["input_ids"])

    line = {"image": "a.png", "question": "two blue", "answer": "circles"}
    tiny_picture = np.zeros((*a.smallest.size, 3), np.uint8)
    Image.fromarray(tiny_picture).save(tmp_path / "a.png")
    (tmp_path / "questions.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "corpus.txt").write_text("left square\nÄ\n")
    data = read_calibration(loaded, tmp_path)
    step = TrimVocabulary(size=120, corpus=str(tmp_path / "corpus.txt")).resolve(loaded.model, a, data)
    kept = Vocabulary(size=320, kept=step.tokens or "").ids.tolist()
    used = {0, *named(loaded.model), *special(tokenizer), *data.prompts[0].input_ids[0].tolist()}
    for text in ("Describe the image.", "two blue", "circles", "left square", "Ä"):
        used |= ids(text) | ids(" " + text)
    used = {i for i in used if i < 320}
    assert ids("circles") != ids(" circles") and tokenizer.convert_tokens_to_ids("<x>") >= 320
    rest = [i for i in range(320) if i not in used]
    assert kept == sorted(used | set(rest[: 120 - len(used)]))
    plain = TrimVocabulary(size=120).resolve(loaded.model, a, data)
    assert ids("Ä") - set(Vocabulary(size=320, kept=plain.tokens or "").ids.tolist())
    exact = TrimVocabulary(size=len(used), corpus=step.corpus).resolve(loaded.model, a, data)
    assert Vocabulary(size=320, kept=exact.tokens or "").ids.tolist() == sorted(used)
    with pytest.raises(PassError) as caught:
        TrimVocabulary(size=len(used) - 1, corpus=step.corpus).resolve(loaded.model, a, data)
    assert f"size={len(used) - 1}, but special tokens" in str(caught.value) and f"use {len(used)} of 320" in str(caught)
    assert f"choose {len(used)} to 320" in (caught.value.hint or "")
    Path(step.corpus or "").unlink()  # what is resolved needs it no more
    assert step.resolve(loaded.model, a, data) is step and step.plan(a).language.vocabulary == 120


def test_resolving_refuses_by_name(tiny, tmp_path: Path) -> None:
    loaded = tiny("llava")
    a, data = describe(loaded.model), read_calibration(loaded, None)
    with pytest.raises(PassError, match="the tokenizer has no unknown token") as caught:
        TrimVocabulary(size=200, unseen="unknown").resolve(loaded.model, a, data)
    assert caught.value.hint == "name one: unknown = ID"
    loaded.processor.tokenizer.unk_token = "!"
    step = TrimVocabulary(size=200, tokens="0-199", unseen="unknown").resolve(loaded.model, a, data)
    assert step.unknown == loaded.processor.tokenizer.convert_tokens_to_ids("!") and not step.needs_calibration
    (tmp_path / "corpus.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(PassError, match="is not UTF-8"):
        TrimVocabulary(size=200, corpus=str(tmp_path / "corpus.txt")).resolve(loaded.model, a, data)
    with pytest.raises(PassError, match="tokens leaves out id 2, which begins, ends or pads an answer"):
        cut(loaded, TrimVocabulary(size=4, tokens="0-1,3-4"))
    assert describe(loaded.model).language.vocabulary == 320


REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "none": ({"size": 0}, ("size=0, but `llava` has 320 tokens", "choose 2 to 320")),
    "one": ({"size": 1}, ("size=1, but `llava` has 320 tokens", "choose 2 to 320")),
    "too many": ({"size": 321}, ("size=321, but `llava` has 320 tokens", "choose 2 to 320")),
    "policy": ({"size": 9, "unseen": "unknwon"}, ("unseen='unknwon'", "did you mean `unknown`?")),
    "unknown and error": ({"size": 9, "unknown": 3}, ("unknown=3 with unseen='error'", 'set unseen = "unknown"')),
    "unknown id": ({"size": 9, "unseen": "unknown", "unknown": 320}, ("unknown=320", "320 tokens", "choose 0 to 319")),
    "corpus": ({"size": 9, "corpus": "nowhere.txt"}, ("no corpus `nowhere.txt`", "text file")),
    "runs": ({"size": 9, "tokens": "0-8x"}, ("`0-8x` is no id", "leave `tokens` out")),
    "order": ({"size": 3, "tokens": "0,5,4"}, ("`4` stands behind 5", "leave `tokens` out")),
    "range": ({"size": 3, "tokens": "0,5,320"}, ("`320` is not below the 320 ids", "leave `tokens` out")),
    "count": ({"size": 4, "tokens": "0,5,6"}, ("tokens lists 3 ids, size=4", "set size = 3")),
    "zero": ({"size": 2, "tokens": "5-6"}, ("tokens begins with 5: id 0 fills", "add 0")),
    "unknown left": (
        {"size": 2, "tokens": "0-1", "unseen": "unknown", "unknown": 3},
        ("token 3 stands for unknown ones and is not kept", "leave `tokens` out"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_plan_refuses(name: str, tiny) -> None:
    keys, says = REFUSED[name]
    with pytest.raises(PassError) as caught:
        TrimVocabulary(**keys).plan(describe(tiny("llava").model))
    text = f"{caught.value} {caught.value.hint}"
    assert all(part in text for part in says), text


def test_the_plan_refuses_what_was_done_before(tiny) -> None:
    loaded = tiny("llava")
    step = TrimVocabulary(size=200, tokens="0-199")
    quantized = Quantize().plan(describe(loaded.model))
    with pytest.raises(PassError, match="language is int8 already"):
        step.plan(quantized)
    cut(loaded, step)
    with pytest.raises(PassError, match="the vocabulary has 200 of 320 rows already"):
        TrimVocabulary(size=100).plan(describe(loaded.model))


def test_a_second_table_by_token_is_refused(tiny) -> None:
    """Gemma 4: every layer has embeddings of its own."""
    why = "`embed_tokens_per_layer` may be looked up by token too"
    assert describe(tiny("gemma4").model).language.whole == why
    with pytest.raises(PassError, match="no row of the vocabulary of `gemma4` can go: `embed_tokens_per_layer`"):
        TrimVocabulary(size=100).plan(describe(tiny("gemma4").model))


def test_tables_of_unequal_height_are_refused() -> None:
    model, _ = tiny_models.make("llava-siglip-qwen2")
    parts = family_of(model.config).locate(model)
    assert whole(parts) is None
    parts.language.set_input_embeddings(torch.nn.Embedding(328, 96))
    assert whole(parts) == "the embedding has 328 rows, the output projection 320"


def test_old_prompts_meet_the_cut_model(tiny, prompt) -> None:
    """The eager model refuses a token without a row, whoever made the prompt; so does the host that makes one."""
    loaded = tiny("llava")
    old = prompt(loaded)
    cut(loaded, TrimVocabulary(size=200, tokens="0-199"))
    with pytest.raises(
        BundleError, match=r"tokens have no row in this model, first \(id \d+\); 200 of 320 ids have one"
    ):
        read(loaded, old)
    with pytest.raises(BundleError, match=r"first .+ \(id \d+\); 200 of 320 ids have one"):
        prompt(loaded)
    shrunk, seen = see_all(loaded.model, old)
    with pytest.raises(IndexError):  # a row that is not there, wherever else it is asked for
        locate(loaded.model).language.get_input_embeddings()(torch.from_numpy(shrunk.input_ids))
    assert seen


def test_the_question_of_a_method_is_checked_too(tiny, prompt) -> None:
    loaded = tiny("llava")
    old = prompt(loaded)
    cut(loaded, PruneTokens(keep=5, method="cdpruner"), TrimVocabulary(size=200, tokens="0-199"))
    with pytest.raises(BundleError, match="have no row"):
        see_all(loaded.model, old)


def test_the_predicted_work_falls(kind: str, tiny) -> None:
    a = make([]).plan(describe(tiny(kind).model))
    after = make([TrimVocabulary(size=200)]).plan(a)
    before, have = costs(a)[3], costs(after)[3]
    assert before.flops - have.flops == 2 * 120 * a.language.hidden
    assert before.parameters - have.parameters == 120 * a.language.hidden * (1 if a.language.tied else 2)
    assert costs(a)[:3] == costs(after)[:3]


def test_removed_weights_are_the_rows(kind: str, tiny) -> None:
    loaded = tiny(kind)
    cut(loaded)
    shapes = {n: tuple(t.shape) for n, t in complete.state_dict(loaded.model).items()}
    hidden = describe(loaded.model).language.hidden
    cut(loaded, TrimVocabulary(size=200))
    names = {"model.language_model.embed_tokens.weight"} | ({"lm_head.weight"} if "qwen2" in kind else set())
    assert complete.removed_weights(shapes, loaded.model) == dict.fromkeys(names, 120 * hidden)


def test_recipe_and_flag(tiny, tmp_path: Path) -> None:
    a = describe(tiny("llava").model)
    assert pipeline.recipes.from_flags(a, vocabulary=200, quantize="int8").passes[1:] == (
        TrimVocabulary(size=200), Quantize(),
    )  # fmt: skip
    assert len(pipeline.recipes.from_flags(a, vocabulary=320).passes) == 1  # neutral
    made = make([TrimVocabulary(size=3, tokens="0-2", unseen="unknown", unknown=1)])
    assert pipeline.recipes.parse(made.to_toml()) == made
    notes = TrimVocabulary(size=3).notes(a)
    assert "only vlmcut.load reads back" in notes[0] and "will be refused" in notes[1]
    assert len(TrimVocabulary(size=3, unseen="unknown", unknown=0).notes(a)) == 1
    (tmp_path / "r.toml").write_text('[[pass]]\nname = "trim-vocabulary"\nsize = 200\n')
    with pytest.raises(VlmcutError, match="both given"):
        pipeline.plan(Request(model="tiny:llava", recipe=tmp_path / "r.toml", vocabulary=100))
    assert vlmcut.inspect("tiny:llava", vocabulary=200)["after"]["anatomy"]["language"]["vocabulary"] == 200
