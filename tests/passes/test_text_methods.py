"""Methods that depend on the question, against brute force in NumPy; padding and an empty question leave no trace."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vlmcut.passes.tokens.method import Place
from vlmcut.passes.tokens.scores import mean_shares, min_max, shares, to_text
from vlmcut.passes.tokens.text import ROWS, conditional
from vlmcut.surgery.selection import Text, TowerState

from .token_helpers import chosen, graph, state

METHODS = ("cdpruner", "mmtok")
OPTIONS = {name: dict(ROWS[name].options) for name in METHODS}


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(a, axis=-1)[:, None] * np.linalg.norm(b, axis=-1)
    return a @ b.T / length


def _question(seen: TowerState) -> np.ndarray:
    """The real columns, float64 [m, c]."""
    assert seen.text is not None
    return seen.text.embeddings[0].double().numpy()[seen.text.mask[0].numpy() > 0]


def _projected(seen: TowerState) -> np.ndarray:
    return seen.project(seen.tokens)[0].double().numpy()


def _relevance(seen: TowerState, sign: int) -> np.ndarray:
    tokens, question = _projected(seen), _question(seen)
    if not len(question):
        return np.ones(len(tokens))
    r = (sign * _cosines(tokens, question)).mean(axis=1)
    return (r - r.min() + 1e-6) / (r.max() - r.min() + 1e-6)


def _cdpruner(seen: TowerState, keep: int, sign: int = 1, theta: float = 0.5) -> list[int]:
    """Each step tries every token, and takes the one with the largest determinant of the whole kernel."""
    r = np.exp(theta / (2 * (1 - theta)) * _relevance(seen, sign))
    tokens = _projected(seen)
    cosines = _cosines(tokens, tokens)
    np.fill_diagonal(cosines, 1)  # to the bit: without a question the first pick is a tie
    kernel = r[:, None] * cosines * r
    taken: list[int] = []
    for _ in range(keep):
        free = [j for j in range(len(tokens)) if j not in taken]
        taken.append(max(free, key=lambda j: np.linalg.det(kernel[np.ix_([*taken, j], [*taken, j])])))
    return sorted(taken)


def _mmtok(seen: TowerState, keep: int, alpha: float = 0.5, tau_vv: float = 0.2, tau_tv: float = 0.02) -> list[int]:
    """Each step tries every token, and takes the one with the largest cover of all rows."""

    def softmax(x: np.ndarray) -> np.ndarray:
        e = np.exp(x - x.max(axis=1, keepdims=True))
        return e / e.sum(axis=1, keepdims=True)

    question, features = _question(seen), seen.tokens[0].double().numpy()
    cover = [alpha * softmax(_cosines(features, features) / tau_vv) / len(features)]
    if len(question):
        cover.append(softmax(_cosines(question, _projected(seen)) / tau_tv) / len(question))
    rows = np.concatenate(cover)
    taken: list[int] = []
    for _ in range(keep):
        free = [j for j in range(len(features)) if j not in taken]
        taken.append(max(free, key=lambda j: rows[:, [*taken, j]].max(axis=1).sum()))
    return sorted(taken)


ORACLES = {"cdpruner": _cdpruner, "mmtok": _mmtok}


def _state(n: int = 14, text: int = 5, padding: int = 0, seed: int = 1, width: int = 16) -> TowerState:
    """A state whose projector changes what is like what: rounding apart, no two roads agree by chance."""
    weights = torch.from_numpy(np.random.default_rng(99).standard_normal((width, width))).float()

    def project(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ weights.to(x.dtype))

    return state(n, taps=0, width=width, text=text, padding=padding, seed=seed, project=project)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("keep", [1, 5, 13])
@pytest.mark.parametrize("padding", [0, 2, 5])
def test_a_method_is_its_formula(name: str, keep: int, padding: int) -> None:
    for seed in range(4):
        seen = _state(padding=padding, seed=seed)
        assert chosen(name, seen, keep).kept[0].tolist() == ORACLES[name](seen, keep)


def test_options_are_those_of_the_formula() -> None:
    seen = _state(seed=5)
    plain = {name: chosen(name, seen, 6).kept for name in METHODS}
    for spec, want in {
        "cdpruner:sign=-1": _cdpruner(seen, 6, sign=-1),
        "cdpruner:theta=0.9": _cdpruner(seen, 6, theta=0.9),
        "mmtok:alpha=0": _mmtok(seen, 6, alpha=0),
        "mmtok:tau_vv=0.4:tau_tv=0.5": _mmtok(seen, 6, tau_vv=0.4, tau_tv=0.5),
    }.items():
        kept = chosen(spec, seen, 6).kept
        assert kept[0].tolist() == want
        assert not torch.equal(kept, plain[spec.partition(":")[0]]), f"{spec} changes nothing here"


@pytest.mark.parametrize("name", METHODS)
def test_another_question_keeps_other_tokens(name: str) -> None:
    seen = _state()
    assert seen.text is not None
    other = replace(seen, text=Text(seen.text.embeddings.flip(-1), seen.text.mask))
    assert not torch.equal(chosen(name, seen, 6).kept, chosen(name, other, 6).kept)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("content", [1e4, float("nan"), float("inf")])
def test_what_padding_says_does_not_matter(name: str, content: float) -> None:
    seen = _state(padding=2)
    assert seen.text is not None
    embeddings = seen.text.embeddings.clone()
    embeddings[:, 3:] = content
    other = replace(seen, text=Text(embeddings, seen.text.mask))
    assert torch.equal(chosen(name, seen, 6).kept, chosen(name, other, 6).kept)


@given(st.integers(0, 2**32 - 1), st.integers(0, 3))
def test_text_scores_are_equal_to_the_bit_whatever_padding_says(seed: int, real: int) -> None:
    rng = np.random.default_rng(seed)
    tokens, text = (torch.from_numpy(rng.standard_normal((2, n, 4))).float() for n in (6, 3))
    mask = (torch.arange(3) < real).float().expand(2, 3)
    other = text.clone()
    other[:, real:] = torch.from_numpy(rng.standard_normal((2, 3 - real, 4))).float() * 1e6
    assert torch.equal(to_text(tokens, text, mask), to_text(tokens, other, mask))
    assert torch.equal(mean_shares(text, tokens, 0.02, mask), mean_shares(other, tokens, 0.02, mask))
    # Fewer columns are the same question: another length of sum, float32, cosines up to 1; measured 0.0.
    fewer = to_text(tokens, text[:, :real], mask[:, :real])
    torch.testing.assert_close(fewer, to_text(tokens, text, mask), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_room_for_a_longer_question_changes_nothing(name: str) -> None:
    short = _state(text=3)
    assert short.text is not None
    room = torch.cat([short.text.embeddings, torch.full((1, 6, 16), 7.0)], dim=1)
    mask = torch.cat([short.text.mask, torch.zeros(1, 6)], dim=1)
    long = replace(short, text=Text(room, mask))
    assert torch.equal(chosen(name, short, 7).kept, chosen(name, long, 7).kept)


def test_an_empty_question_leaves_diversity_alone() -> None:
    empty = _state(padding=5)
    assert chosen("cdpruner", empty, 6).kept[0].tolist() == _cdpruner(_state(), 6, theta=0)
    assert torch.equal(chosen("cdpruner", empty, 6).kept, chosen("cdpruner:theta=0", _state(), 6).kept)
    assert chosen("mmtok", empty, 6).kept[0].tolist() == _mmtok(empty, 6)


def _with_tokens(tokens: np.ndarray, text: np.ndarray) -> TowerState:
    """A state of these rows, each of float32."""
    question = torch.from_numpy(text).float()[None]
    return replace(
        state(len(tokens), taps=0, width=tokens.shape[1], text=len(text)),
        tokens=torch.from_numpy(tokens).float()[None],
        text=Text(question, torch.ones(1, len(text))),
    )


@pytest.mark.parametrize("sign", [1, -1])
def test_of_orthogonal_tokens_the_most_relevant_are_kept(sign: int) -> None:
    text = np.array([[0.1, 0.9, 0.3, 0.8, 0.2, 0.5]])
    kept = chosen(f"cdpruner:sign={sign}", _with_tokens(np.eye(6), text), 3).kept[0].tolist()
    assert kept == ([1, 3, 5] if sign == 1 else [0, 2, 4])


def test_duplicates_are_not_kept_while_there_is_another() -> None:
    rng = np.random.default_rng(3)
    few = rng.standard_normal((4, 8))
    which = np.array([0, 1, 0, 2, 1, 3, 0, 2])
    seen = _with_tokens(few[which], rng.standard_normal((2, 8)))
    kept = chosen("cdpruner", seen, 4).kept[0].tolist()
    assert sorted(which[kept]) == [0, 1, 2, 3]
    assert kept == [0, 1, 3, 5]  # the first of each


@pytest.mark.parametrize("name", METHODS)
def test_equal_tokens_are_taken_in_their_order(name: str) -> None:
    seen = _with_tokens(np.ones((6, 4)), np.ones((2, 4)))
    assert chosen(name, seen, 1).kept[0].tolist() == [0]


def test_mmtok_covers_each_word_with_its_token() -> None:
    """With a low temperature each word is covered by the one token most like it, and by no other."""
    tokens = np.eye(8)
    text = tokens[[6, 2, 5]] + 0.1
    assert chosen("mmtok:alpha=0:tau_tv=0.001", _with_tokens(tokens, text), 3).kept[0].tolist() == [2, 5, 6]


@given(st.integers(1, 3), st.integers(1, 7), st.integers(0, 2**32 - 1))
def test_pieces_take_batches(batch: int, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tokens, text = rng.standard_normal((batch, n, 3)), rng.standard_normal((batch, 4, 3))
    mask = rng.integers(0, 2, (batch, 4)).astype(np.float64)
    given_, words, real = map(torch.from_numpy, (tokens, text, mask))
    relevance = torch.from_numpy(rng.random((batch, n)))
    for b in range(batch):
        cosines = _cosines(text[b], tokens[b])
        many = max(1, mask[b].sum())
        # float64, a handful of operations: measured 4e-16 at most.
        close = {"rtol": 0, "atol": 1e-12}
        np.testing.assert_allclose(to_text(given_, words, real)[b], mask[b] @ cosines / many, **close)
        e = np.exp(cosines / 0.5)
        spread = e / e.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(shares(words, given_, 0.5)[b], spread, **close)
        np.testing.assert_allclose(mean_shares(words, given_, 0.5, real)[b], mask[b][:, None] * spread / many, **close)
        r = relevance[b].numpy()
        kernel = r[:, None] * _cosines(tokens[b], tokens[b]) * r
        np.testing.assert_allclose(conditional(given_, relevance)[b], kernel, **close)
        low, high = r.min(), r.max()
        np.testing.assert_allclose(min_max(relevance)[b], (r - low + 1e-6) / (high - low + 1e-6), rtol=0, atol=1e-8)


def test_equal_scores_are_all_one() -> None:
    assert torch.equal(min_max(torch.full((2, 3), -0.4)), torch.ones(2, 3))
    made = min_max(torch.tensor([[2.0, 5.0, 3.0]]))
    assert made.argmax() == 1 and made.max() == 1 and 0 < made.min() < 1e-6


@pytest.mark.parametrize("spec", [*METHODS, "cdpruner:sign=-1"])
def test_onnx_runtime_keeps_the_same(spec: str) -> None:
    """One graph of one size serves long, short and empty questions."""
    run = graph(spec, _state(), 6)
    for padding in (0, 3, 5):
        for seed in range(3):
            seen = _state(padding=padding, seed=seed)
            assert torch.equal(run(seen).kept, chosen(spec, seen, 6).kept)


@pytest.mark.parametrize(
    ("name", "given", "cause"),
    [
        ("cdpruner", {"sign": 0}, "sign=0"),
        ("cdpruner", {"theta": 1.0}, "theta=1.0"),
        ("cdpruner", {"theta": -0.1}, "theta=-0.1"),
        ("mmtok", {"tau_vv": 0.0}, "tau_vv=0.0"),
        ("mmtok", {"tau_tv": float("nan")}, "tau_tv=nan"),
        ("mmtok", {"alpha": -1.0}, "alpha=-1.0"),
    ],
)
def test_senseless_options_are_refused(name: str, given: dict[str, float], cause: str) -> None:
    place: Place = None  # type: ignore[assignment]  # options alone decide
    refused = ROWS[name].refuse(place, OPTIONS[name] | given)
    assert refused is not None and refused[0] == cause and refused[1].startswith("choose")
    assert ROWS[name].refuse(place, OPTIONS[name]) is None
