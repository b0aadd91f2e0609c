"""Methods with weights: each module against a transcription in NumPy, their files, and what becomes of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vlmcut
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn import functional
from vlmcut.errors import ModelError, PassError
from vlmcut.exporters import onnx
from vlmcut.exporters.components import components
from vlmcut.exporters.lint import lint
from vlmcut.exporters.operators import Standard
from vlmcut.exporters.weights import WeightFile, tensor_digests
from vlmcut.manifest import TokenBudget
from vlmcut.passes.prune_tokens import PruneTokens
from vlmcut.passes.recipe import make
from vlmcut.passes.tokens.learned import weights
from vlmcut.passes.tokens.learned.covipal import Covipal
from vlmcut.passes.tokens.learned.mqt import Folded
from vlmcut.passes.tokens.learned.task_conv import TaskConv, first_attention
from vlmcut.passes.tokens.learned.tokenflex import shape
from vlmcut.passes.tokens.learned.windows import adaptive, bilinear, centres
from vlmcut.passes.tokens.learned.wtc import WindowCompression
from vlmcut.passes.tokens.methods import METHODS, TableSelector
from vlmcut.passes.tokens.trained import ROWS
from vlmcut.pipeline import Request, convert, save_cut
from vlmcut.prompt import Picture
from vlmcut.runtime.sessions import open_session
from vlmcut.surgery.first_layer import first_layer
from vlmcut.surgery.load import Loaded, describe, locate
from vlmcut.surgery.selection import Tap, Text, TowerState
from vlmcut.surgery.talk import see_picture
from vlmcut.surgery.vision import look, prepare, read_question
from vlmcut.validation.complete import _digests

# Of tiny:llava: a tower of width 64 whose blocks 0 to 3 run, 4 x 4 tokens, a language model of width 48.
TINY: dict[str, dict[str, Any]] = {
    "covipal": {"hidden": 48, "inner": 10},
    "task-conv": {"channels": [4, 6, 8, 10, 12], "kernel": 3, "hidden": 48},
    "tokenpacker": {"width": 64, "hidden": 48, "inner": 12, "heads": 3, "blocks": [1, 2, 3], "window": 2},
    "query-compressor": {"width": 64, "hidden": 48, "inner": 12, "heads": 3, "blocks": [2, 3], "window": 2},
    "mqt": {"width": 64, "hidden": 48, "heads": 4, "blocks": [3], "side": 3, "grid": [4, 4]},
    "tokenflex": {"width": 64, "hidden": 48, "inner": 20, "blocks": [3]},
    "wtc": {"hidden": 48},
}
QUESTION = np.array([5, 9, 31])
KEEP = 4
Weights = Mapping[str, np.ndarray]


def random_module(method: str, arguments: Mapping[str, Any] | None = None, seed: int = 0) -> Any:
    kind = ROWS[method].module
    assert kind is not None
    return weights.seeded(kind, arguments or TINY[method], seed)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of random weights for each method; do not write into them."""
    folder = tmp_path_factory.mktemp("weights")
    for method, arguments in TINY.items():
        weights.save(random_module(method), arguments, folder / f"{method}.safetensors")
    return {method: folder / f"{method}.safetensors" for method in TINY}


def test_every_row_is_tested() -> None:
    assert set(TINY) == set(ROWS) == {name for name, row in METHODS.items() if row.module is not None}
    assert all(row.module is not None and row.module.method == name for name, row in ROWS.items())


# --- the modules, in float64 --------------------------------------------------------------------------------------


def exact(module: Any) -> tuple[Any, Weights]:
    """A module in float64, and its weights as NumPy knows them."""
    module = module.double().eval()
    return module, {name: t.detach().numpy() for name, t in module.state_dict().items()}


def rows(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def linear(w: Weights, name: str, x: np.ndarray) -> np.ndarray:
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)


def norm(w: Weights, name: str, x: np.ndarray) -> np.ndarray:
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def mlp(w: Weights, name: str, x: np.ndarray) -> np.ndarray:
    return linear(w, f"{name}.2", gelu(linear(w, f"{name}.0", x)))


def softmax(x: np.ndarray, axis: int = -1) -> np.ndarray:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def close(have: torch.Tensor, want: np.ndarray) -> None:
    """float64: sums in another order; measured at most 3e-15."""
    assert have.shape[0] == 1 and have.shape[1:] == want.shape
    np.testing.assert_allclose(have[0].detach().numpy(), want, rtol=0, atol=1e-12)


def window_members(rows_: int, columns: int, size: int) -> list[list[int]]:
    return [
        [(r + i) * columns + c + j for i in range(size) for j in range(size)]
        for r in range(0, rows_, size)
        for c in range(0, columns, size)
    ]


def attend(w: Weights, heads: int, query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """One query row [c] over its members [n, c]."""
    q, k, v = (linear(w, f"attention.{n}_proj", x) for n, x in (("q", query), ("k", key), ("v", value)))
    width = len(q) // heads
    out = np.zeros_like(q)
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        out[part] = softmax(k[:, part] @ q[part] / math.sqrt(width)) @ v[:, part]
    return linear(w, "attention.out_proj", out)


@pytest.mark.parametrize(("high", "wide", "size"), [(4, 6, 2), (3, 6, 3), (2, 2, 1)])
def test_tokenpacker_by_a_loop(high: int, wide: int, size: int) -> None:
    """methods.md C2; bilinear resizing is the mean of the four middle tokens of an even window."""
    arguments = {"width": 5, "hidden": 7, "inner": 6, "heads": 2, "blocks": [0, 1], "window": size}
    module, w = exact(random_module("tokenpacker", arguments))
    levels = [rows(i, high * wide, 5) for i in range(2)]
    want = []
    for r in range(0, high, size):
        for c in range(0, wide, size):
            low, up = (size - 1) // 2, size // 2
            middle = {(r + i) * wide + c + j for i in (low, up) for j in (low, up)}
            coarse = np.mean([levels[-1][m] for m in middle], axis=0)
            query = norm(w, "query.1", linear(w, "query.0", coarse))
            members = [(r + i) * wide + c + j for i in range(size) for j in range(size)]
            several = np.concatenate([level[members] for level in levels], axis=-1)
            key, value = (norm(w, f"{n}.3", mlp(w, n, several)) for n in ("key", "value"))
            want.append(mlp(w, "project", attend(w, 2, query, key, value)))
    close(module([torch.from_numpy(x)[None] for x in levels], high, wide), np.array(want))


@pytest.mark.parametrize("asked", [3, 0])
def test_query_compressor_by_a_loop(asked: int) -> None:
    """methods.md C3, with the mean of the question's embeddings; two columns of padding change nothing."""
    arguments = {"width": 5, "hidden": 7, "inner": 6, "heads": 2, "blocks": [0, 1], "window": 2}
    module, w = exact(random_module("query-compressor", arguments))
    levels, text = [rows(i, 4 * 6, 5) for i in range(2)], rows(9, asked + 2, 7)
    mean = text[:asked].mean(0) if asked else np.zeros(7)
    question = norm(w, "question.1", linear(w, "question.0", mean))
    fine = norm(w, "query.3", mlp(w, "query", levels[-1] + question))
    several = np.concatenate(levels, axis=-1)
    key, value = (norm(w, f"{n}.3", mlp(w, n, several)) for n in ("key", "value"))
    want = []
    for members in window_members(4, 6, 2):
        kernel = w["shrink.weight"].reshape(6, 4)
        query = np.array([kernel[c] @ fine[members, c] for c in range(6)]) + w["shrink.bias"]
        want.append(mlp(w, "project", attend(w, 2, query, key[members], value[members])))
    mask = torch.tensor([[1.0] * asked + [0.0] * 2]).double()
    given = Text(torch.from_numpy(text)[None], mask)
    close(module([torch.from_numpy(x)[None] for x in levels], given, 4, 6), np.array(want))


@pytest.mark.parametrize(("high", "wide", "keep"), [(4, 4, 4), (4, 4, 9), (3, 6, 8), (5, 5, 1)])
def test_tokenflex_by_a_loop(high: int, wide: int, keep: int) -> None:
    """methods.md C5: bins from floor(i h / n) to ceil((i + 1) h / n), then W3(silu(W1 x) * (W2 x))."""
    module, w = exact(random_module("tokenflex", {"width": 5, "hidden": 7, "inner": 6, "blocks": [0]}))
    x = rows(1, high, wide, 5)
    grid = shape(high, wide, keep)
    assert grid is not None and grid[0] * grid[1] == keep and grid[0] * wide == grid[1] * high
    want = []
    for i in range(grid[0]):
        for j in range(grid[1]):
            down = slice(math.floor(i * high / grid[0]), math.ceil((i + 1) * high / grid[0]))
            right = slice(math.floor(j * wide / grid[1]), math.ceil((j + 1) * wide / grid[1]))
            mean = x[down, right].reshape(-1, 5).mean(0)
            gate = linear(w, "gate", mean)
            want.append(linear(w, "out", gate / (1 + np.exp(-gate)) * linear(w, "up", mean)))
    close(module(torch.from_numpy(x.reshape(1, -1, 5)), high, wide, keep), np.array(want))


def test_wtc_by_a_loop() -> None:
    """methods.md B5: logits = MLP([x_i; mean]), softmax over the four for each channel, the weighted sum."""
    module, w = exact(random_module("wtc", {"hidden": 5}))
    x = rows(1, 4 * 6, 5)
    want = []
    for members in window_members(4, 6, 2):
        four = x[members]
        logits = mlp(w, "logits", np.concatenate([four, np.tile(four.mean(0), (4, 1))], axis=-1))
        want.append((four * softmax(logits, axis=0)).sum(0))
    close(module(torch.from_numpy(x)[None], 4, 6), np.array(want))


def test_wtc_begins_as_average_pooling() -> None:
    x = torch.randn(2, 16, 5, generator=torch.Generator().manual_seed(0))
    have = WindowCompression(hidden=5)(x, 4, 4)
    want = functional.avg_pool2d(x.transpose(1, 2).unflatten(-1, (4, 4)), 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(have, want, rtol=0, atol=1e-6)  # float32: four quarters in another order


def cubic(n: int, m: int) -> np.ndarray:
    """Bicubic weights [m, n], a = -0.75, half-pixel centres, borders repeated."""
    matrix = np.zeros((m, n))
    for i in range(m):
        at = (i + 0.5) * n / m - 0.5
        for tap in range(math.floor(at) - 1, math.floor(at) + 3):
            t, a = abs(at - tap), -0.75
            near = (a + 2) * t**3 - (a + 3) * t**2 + 1
            weight = near if t <= 1 else a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
            matrix[i, min(max(tap, 0), n - 1)] += weight
    return matrix


@pytest.mark.parametrize("keep", [1, 5, 9])
@pytest.mark.parametrize("grid", [(3, 3), (4, 6)])
def test_mqt_by_a_loop_and_folded(grid: tuple[int, int], keep: int) -> None:
    """methods.md C4, attention computed for the picture; the folded module, which never does, gives the same."""
    arguments = {"width": 6, "hidden": 7, "heads": 2, "blocks": [0], "side": 3, "grid": list(grid)}
    module, w = exact(random_module("mqt", arguments))
    x, places = rows(1, grid[0] * grid[1], 6), w["positions"].reshape(3, 3, 6)
    if grid != (3, 3):
        places = np.einsum("ij,kl,jlc->ikc", cubic(3, grid[0]), cubic(3, grid[1]), places)
    q = linear(w, "q_proj", norm(w, "query_norm", (w["queries"] + w["positions"])[:keep]))
    k = linear(w, "k_proj", norm(w, "key_norm", places.reshape(-1, 6)))
    v = linear(w, "v_proj", norm(w, "value_norm", x))
    heads = [slice(0, 3), slice(3, 6)]
    mixed = np.concatenate([softmax(q[:, h] @ k[:, h].T / math.sqrt(3)) @ v[:, h] for h in heads], axis=-1)
    want = linear(w, "project", linear(w, "out_proj", mixed))
    picture = torch.from_numpy(x)[None]
    folded = module.exported()
    assert isinstance(folded, Folded) and not {"queries", "positions", "q_proj.weight"} & set(folded.state_dict())
    close(module(picture, keep), want)
    close(folded(picture, keep), want)
    close(folded(picture, 9)[:, :keep], want)  # one file for every budget


def covipal(w: Weights, visual: np.ndarray, text: np.ndarray) -> np.ndarray:
    v = linear(w, "visual", norm(w, "visual_norm", visual))
    found = np.zeros_like(v)
    if len(text):
        t = norm(w, "text_norm", text)
        found = softmax(v @ linear(w, "key", t).T / math.sqrt(v.shape[1])) @ linear(w, "value", t)
    return mlp(w, "classify", np.concatenate([v, found, v * found], axis=-1))[:, 0]


@pytest.mark.parametrize("asked", [4, 1, 0])
def test_covipal_by_a_loop(asked: int) -> None:
    module, w = exact(random_module("covipal", {"hidden": 5, "inner": 6}))
    visual, text = rows(1, 11, 5), rows(2, asked + 3, 5)
    mask = torch.tensor([[1.0] * asked + [0.0] * 3]).double()
    have = module(torch.from_numpy(visual)[None], Text(torch.from_numpy(text)[None], mask))
    close(have, covipal(w, visual, text[:asked]))


def test_task_conv_by_a_loop() -> None:
    """methods.md A15: five depthwise-separable convolutions, a scalar head."""
    module, w = exact(random_module("task-conv", {"channels": [2, 3, 4, 5, 6], "kernel": 3, "hidden": 5}))
    attention = np.abs(rows(1, 13))
    x = (attention / attention.mean())[None]
    for i in range(5):
        padded = np.pad(x, ((0, 0), (1, 1)))
        taps = w[f"layers.{i}.0.weight"][:, 0]
        deep = np.stack([padded[:, j : j + 13] for j in range(3)], axis=-1)
        x = np.einsum("cnt,ct->cn", deep, taps) + w[f"layers.{i}.0.bias"][:, None]
        x = gelu(w[f"layers.{i}.1.weight"][..., 0] @ x + w[f"layers.{i}.1.bias"][:, None])
    want = (w["head.weight"][..., 0] @ x + w["head.bias"][:, None])[0]
    close(module(torch.from_numpy(attention)[None]), want)
    close(module(torch.from_numpy(7 * attention)[None]), want)  # the unit of attention is free


@given(n=st.integers(1, 12), m=st.integers(1, 12))
def test_matrices_of_resizing(n: int, m: int) -> None:
    x = torch.arange(n).double().square()[None, None]
    want = functional.adaptive_avg_pool1d(x, m)[0, 0].numpy()
    np.testing.assert_allclose(adaptive(n, m) @ x[0, 0].numpy(), want, rtol=0, atol=1e-10)
    want = functional.interpolate(x, m, mode="linear", align_corners=False)[0, 0].numpy()
    np.testing.assert_allclose(bilinear(n, m) @ x[0, 0].numpy(), want, rtol=0, atol=1e-10)


@given(high=st.integers(1, 6), wide=st.integers(1, 6), size=st.integers(1, 4))
def test_centres_lie_in_their_windows(high: int, wide: int, size: int) -> None:
    found = centres(high * size, wide * size, high, wide)
    assert found == sorted(set(found)) and len(found) == high * wide
    for place, members in zip(found, window_members(high * size, wide * size, size), strict=True):
        assert place == members[(size - 1) // 2 * size + (size - 1) // 2]


@pytest.mark.parametrize("method", TINY)
def test_images_do_not_see_each_other(method: str) -> None:
    module = random_module(method)
    rng = torch.Generator().manual_seed(0)
    tower, language = torch.randn(3, 16, 64, generator=rng), torch.randn(3, 16, 48, generator=rng)
    text = Text(torch.randn(3, 5, 48, generator=rng), torch.tensor([[1.0] * n + [0.0] * (5 - n) for n in (5, 2, 1)]))
    run: dict[str, Callable[[slice], torch.Tensor]] = {
        "covipal": lambda s: module(language[s], Text(text.embeddings[s], text.mask[s])),
        "task-conv": lambda s: module(tower[s, :, 0].abs()),
        "tokenpacker": lambda s: module([tower[s]] * 3, 4, 4),
        "query-compressor": lambda s: module([tower[s]] * 2, Text(text.embeddings[s], text.mask[s]), 4, 4),
        "mqt": lambda s: module(tower[s], 5),
        "tokenflex": lambda s: module(tower[s], 4, 4, 4),
        "wtc": lambda s: module(language[s], 4, 4),
    }
    one = torch.cat([run[method](slice(i, i + 1)) for i in range(3)])
    # float32: products of one and of three pictures are summed in other orders; measured 7e-7.
    torch.testing.assert_close(run[method](slice(0, 3)), one, rtol=0, atol=1e-5)


# --- scorers choose ------------------------------------------------------------------------------------------------


def planted(hidden: int, first: Callable[[torch.Tensor], Tap] | None = None) -> TowerState:
    tokens = torch.randn(1, 16, hidden, generator=torch.Generator().manual_seed(3))
    text = Text(torch.randn(1, 4, hidden, generator=torch.Generator().manual_seed(4)), torch.tensor([[1.0, 1, 1, 0]]))
    return TowerState(tokens, lambda x: x, text=text, first=first)


def test_a_planted_classifier_finds_planted_tokens() -> None:
    """All weights 0 but a road for channel 2: the tokens with most of it are kept, in the picture's order."""
    module = Covipal(hidden=6, inner=3)
    for parameter in module.parameters():
        parameter.data.zero_()
    module.visual_norm.weight.data.fill_(1)
    module.visual.weight.data[0, 2] = 1
    module.classify[0].weight.data[1, 0], module.classify[0].bias.data[1] = 1, 5  # type: ignore[union-attr, index]
    module.classify[2].weight.data[0, 1] = 1  # type: ignore[union-attr, index]
    state = planted(6)
    state.tokens[0, [3, 8, 14], 2] = 40.0
    with torch.no_grad():
        kept = TableSelector("covipal", module=module)(state, 3).kept
    assert kept.tolist() == [[3, 8, 14]]


def test_planted_convolutions_follow_the_questions_attention() -> None:
    """Weights that hand the attention on: what the question's real tokens attend to is kept, padding is not asked."""
    module = TaskConv(channels=[1], kernel=3, hidden=4)
    for parameter in module.parameters():
        parameter.data.zero_()
    module.layers[0][0].weight.data[0, 0, 1] = 1  # type: ignore[index, union-attr]
    module.layers[0][1].weight.data[:] = 1  # type: ignore[index, union-attr]
    module.head.weight.data[:] = 1

    def first(x: torch.Tensor) -> Tap:
        q, k = torch.zeros(1, 2, 20, 4), torch.zeros(1, 1, 20, 4)
        k[0, 0, [2, 7, 11], 0], k[0, 0, 5, 1] = 4.0, 9.0
        q[0, :, 16:19, 0], q[0, :, 19, 1] = 4.0, 9.0  # row 19 is padding, and would want token 5
        return Tap(0, ((q, k),), 0.5)

    with torch.no_grad():
        kept = TableSelector("task-conv", module=module)(planted(4, first), 3).kept
    assert kept.tolist() == [[2, 7, 11]]


@pytest.mark.parametrize("kind", ["llava", "llava-siglip-qwen2", "paligemma"])
def test_first_attention_is_the_language_models(tiny: Callable[[str], Loaded], kind: str) -> None:
    """Against the attention that transformers' own eager layer shows, and the model is left as it was."""
    loaded = tiny(kind)
    model, a = loaded.model, describe(loaded.model)
    tokens, asked = (torch.randn(1, n, a.language.hidden, generator=torch.Generator().manual_seed(n)) for n in (7, 5))
    state = TowerState(tokens, lambda x: x, text=Text(asked, torch.tensor([[1.0, 1, 1, 0, 0]])))
    before = model.state_dict().keys(), locate(model).language.config._attn_implementation
    with torch.no_grad():
        have = first_attention(replace(state, first=partial(first_layer, model)))
        assert before == (model.state_dict().keys(), locate(model).language.config._attn_implementation)
        locate(model).language.set_attn_implementation("eager")
        length = 12
        causal = torch.zeros(1, 1, length, length).masked_fill(~torch.ones(length, length).tril().bool(), -1e30)
        out = locate(model).language(
            inputs_embeds=torch.cat([tokens, asked], dim=1), attention_mask=causal, output_attentions=True,
            position_ids=torch.arange(length)[None] + a.layout.first_position, use_cache=False,
        )  # fmt: skip
    want = out.attentions[0][:, :, 7:10, :7].mean(dim=(1, 2))
    # float32: the same products in another order; measured 3e-8.
    torch.testing.assert_close(have, want, rtol=0, atol=1e-6)


# --- files ---------------------------------------------------------------------------------------------------------


def plan(spec: str, keep: int = KEEP, kind: str = "llava") -> Any:
    loaded = vlmcut.load(f"tiny:{kind}")
    return make([PruneTokens(keep=keep, method=spec)]).plan(describe(loaded.model))


def refused(spec: str, *words: object, keep: int = KEEP, kind: str = "llava") -> None:
    with pytest.raises(PassError) as caught:
        plan(spec, keep, kind)
    assert all(str(word) in str(caught.value) for word in words), str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize("method", TINY)
def test_files_are_read_back(files: dict[str, Path], method: str) -> None:
    kind = ROWS[method].module
    assert kind is not None
    have, want = weights.read(kind, str(files[method])).state_dict(), random_module(method).state_dict()
    assert have.keys() == want.keys() and all(torch.equal(have[name], t) for name, t in want.items())
    assert plan(f"{method}:weights={files[method]}").keep == (KEEP,)


@pytest.mark.parametrize("method", TINY)
def test_no_file(method: str, tmp_path: Path) -> None:
    refused(method, "needs weights")
    refused(f"{method}:weights={tmp_path / 'none.safetensors'}", "no file", "none.safetensors")
    (tmp_path / "noise").write_bytes(b"noise" * 9)
    refused(f"{method}:weights={tmp_path / 'noise'}", "is not a safetensors file")


@pytest.mark.parametrize(
    ("method", "change", "words"),
    [
        ("covipal", {"method": "mqt"}, ("`mqt`", "`covipal`")),
        ("covipal", {"method": None}, ("`None`", "`covipal`")),
        ("covipal", {"inner": None}, ("lack `inner`",)),
        ("covipal", {"depth": "3"}, ("unknown metadata `depth`",)),
        ("covipal", {"inner": "2.5"}, ("inner", "2.5")),
        ("covipal", {"inner": "0"}, ("inner", "'0'")),
        ("covipal", {"inner": "true"}, ("inner", "true")),
        ("covipal", {"inner": "[10]"}, ("inner", "a whole number")),
        ("tokenflex", {"blocks": "3"}, ("blocks", "a list")),
        ("covipal", {"inner": "12"}, ("[10, 48]", "[12, 48]")),
        ("task-conv", {"channels": "[]"}, ("channels",)),
        ("tokenpacker", {"heads": "5"}, ("5 heads", "12")),
        ("tokenpacker", {"blocks": "[1, 2, 4]"}, ("[1, 2, 4]", "0 to 3")),
        ("tokenflex", {"hidden": "47"}, ("[48, 20]", "[47, 20]")),
        ("mqt", {"grid": "[4, 5]"}, ("4x5", "4x4")),
        ("mqt", {"heads": "5"}, ("5 heads", "64")),
        ("mqt", {"blocks": "[2, 3]"}, ("one tower block", "2")),
        ("tokenflex", {"blocks": "[2, 3]"}, ("one tower block", "2")),
    ],
)
def test_wrong_metadata(
    files: dict[str, Path], tmp_path: Path, method: str, change: dict[str, str | None], words: tuple[str, ...]
) -> None:
    metadata = {"method": method} | {name: json.dumps(value) for name, value in TINY[method].items()}
    metadata = {name: value for name, value in (metadata | change).items() if value is not None}
    path = tmp_path / "changed.safetensors"
    save_file(load_file(files[method]), path, metadata=metadata)
    refused(f"{method}:weights={path}", *words)


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_wrong_tensors(files: dict[str, Path], tmp_path: Path, change: str) -> None:
    tensors = load_file(files["covipal"])
    if change == "missing":
        del tensors["key.bias"]
    elif change == "unknown":
        tensors["surplus"] = torch.zeros(2)
    else:
        tensors["key.bias"] = torch.zeros(11)
    path = tmp_path / "changed.safetensors"
    save_file(tensors, path, metadata={"method": "covipal", "hidden": "48", "inner": "10"})
    words = {"missing": ("`key.bias`", 13, 14), "unknown": ("`surplus`", 15, 14), "shape": ("[11]", "[10]")}
    refused(f"covipal:weights={path}", *words[change])


@pytest.mark.parametrize(
    ("method", "change", "words"),
    [
        ("covipal", {"hidden": 40}, (40, 48)),
        ("task-conv", {"hidden": 40}, (40, 48)),
        ("task-conv", {"kernel": 4}, (4,)),
        ("tokenpacker", {"width": 32}, (32, 64)),
        ("tokenpacker", {"window": 3}, ("3x3", "4x4")),
        ("query-compressor", {"window": 4}, ("4x4", "1 tokens", 4)),
        ("wtc", {"hidden": 40}, (40, 48)),
    ],
)
def test_weights_of_another_model(
    tmp_path: Path, method: str, change: dict[str, int], words: tuple[object, ...]
) -> None:
    arguments = TINY[method] | change
    weights.save(random_module(method, arguments), arguments, tmp_path / "w.safetensors")
    refused(f"{method}:weights={tmp_path / 'w.safetensors'}", *words)


@pytest.mark.parametrize(
    ("method", "keep", "words"),
    [
        ("tokenpacker", 5, ("4 tokens", 5)),
        ("query-compressor", 8, ("4 tokens", 8)),
        ("wtc", 3, ("4 tokens", 3)),
        ("tokenflex", 6, ("6 tokens", "4x4")),
        ("mqt", 10, ("9 queries", 10)),
    ],
)
def test_a_count_that_cannot_be_made(files: dict[str, Path], method: str, keep: int, words: tuple[object, ...]) -> None:
    refused(f"{method}:weights={files[method]}", *words, keep=keep)


COMPRESSORS = [name for name, row in ROWS.items() if row.merges]


@pytest.mark.parametrize("method", COMPRESSORS)
@pytest.mark.parametrize(("kind", "words"), [("qwen2_vl", ("3 axes", "M-RoPE")), ("llava_next", ("1 grid", "2 with"))])
def test_places_that_are_no_grid(files: dict[str, Path], method: str, kind: str, words: tuple[str, ...]) -> None:
    refused(f"{method}:weights={files[method]}", *words, kind=kind)


def test_tokens_that_are_no_patches(files: dict[str, Path]) -> None:
    refused(f"tokenflex:weights={files['tokenflex']}", "4 tokens of 16 patches", keep=1, kind="gemma3")
    refused(f"task-conv:weights={files['task-conv']}", "1 axis", "3", kind="qwen2_vl")


# --- in a model ----------------------------------------------------------------------------------------------------


def spec(files: dict[str, Path], method: str) -> str:
    return f"{method}:weights={files[method]}"


def picture(loaded: Loaded, seed: int) -> Picture:
    (bucket,) = describe(loaded.model).buckets
    pixels = np.random.default_rng(seed).standard_normal(bucket.pixels).astype(np.float32)
    return Picture(pixels, bucket.geometry, bucket.frames, QUESTION)


@pytest.fixture(scope="module")
def cut(files: dict[str, Path]) -> Callable[[str], Loaded]:
    """tiny:llava that keeps 4 tokens by a method; do not change it."""
    made: dict[str, Loaded] = {}

    def run(method: str) -> Loaded:
        if method not in made:
            made[method] = vlmcut.load("tiny:llava")
            make([PruneTokens(keep=KEEP, method=spec(files, method))]).apply(made[method].model, None)
        return made[method]

    return run


def test_outputs_are_the_towers(cut: Callable[[str], Loaded]) -> None:
    loaded = cut("tokenpacker")
    shown = picture(loaded, 0)
    pixels = torch.from_numpy(shown.pixel_values)
    with torch.no_grad():
        look(loaded.model, pixels, prepare(loaded.model, shown.geometry))  # transformers adds hooks of its own, once
        hooks = [dict(block._forward_hooks) for block in locate(loaded.model).tower_layers]
        _, state = look(loaded.model, pixels, prepare(loaded.model, shown.geometry))
        assert hooks == [dict(block._forward_hooks) for block in locate(loaded.model).tower_layers]
        hidden = locate(loaded.model).tower(pixels, output_hidden_states=True).hidden_states
    assert len(state.outputs) == 3
    for have, block in zip(state.outputs, (1, 2, 3), strict=True):
        assert torch.equal(have, hidden[block + 1][:, 1:])  # entry 0 is what enters block 0; row 0 is [CLS]
    assert torch.equal(state.outputs[-1], state.tokens)


@pytest.mark.parametrize("method", TINY)
def test_features_are_the_modules(cut: Callable[[str], Loaded], files: dict[str, Path], method: str) -> None:
    """What enters the language model, computed once more by hand from the file."""
    loaded = cut(method)
    shown, model = picture(loaded, 1), loaded.model
    kind = ROWS[method].module
    assert kind is not None
    module: Any = weights.read(kind, str(files[method]))
    with torch.no_grad():
        seen = see_picture(model, shown)
        text = read_question(model, shown.question)
        _, s = look(model, torch.from_numpy(shown.pixel_values), prepare(model, shown.geometry), text)
        projected = s.project(s.tokens)
        assert (text is not None) == ROWS[method].text
        made = {
            "tokenpacker": lambda: module(s.outputs, 4, 4),
            "query-compressor": lambda: module(s.outputs, text, 4, 4),
            "mqt": lambda: module(s.tokens, KEEP),
            "tokenflex": lambda: module(s.tokens, 4, 4, KEEP),
            "wtc": lambda: module(projected, 4, 4),
        }
        if method in made:
            # float32: the same products, in mqt with the attention of another call; measured 0
            torch.testing.assert_close(seen.features, made[method]()[0], rtol=0, atol=1e-6)
            assert seen.kept.tolist() == [0, 2, 8, 10]
        else:
            score = module(projected, text) if method == "covipal" else module(first_attention(s))
            assert seen.kept.tolist() == sorted(score[0].topk(KEEP).indices.tolist())


@pytest.mark.parametrize("method", TINY)
def test_a_method_lives_in_the_vision_graph(cut: Callable[[str], Loaded], method: str, tmp_path: Path) -> None:
    loaded = cut(method)
    budget = TokenBudget(images=1, visual_tokens=KEEP, text_tokens=8, new_tokens=2)
    vision = components(loaded.model, budget, [KEEP])[0]
    graph = onnx.export(vision, loaded.model, Standard())
    with WeightFile(tmp_path) as stored:
        stored.save(graph, "vision.onnx")
    # Every weight of the method is in the graph, byte for byte; the layers behind the first one are not.
    present = set(tensor_digests([tmp_path / "vision.onnx"]))
    state = loaded.model.state_dict()
    own = [name for name in state if name.startswith(weights.ATTRIBUTE)]
    assert own and [name for name in own if not _digests(state[name]) & present] == []
    stray = [n for n in state if "language_model" in n and n.endswith("down_proj.weight")]
    assert stray and not [n for n in stray if _digests(state[n]) & present]
    session = open_session(tmp_path / "vision.onnx", threads=1)
    for seed in range(3):
        shown = picture(loaded, seed)
        inputs: dict[str, Any] = {"pixel_values": shown.pixel_values}
        if ROWS[method].text:
            padded = np.pad(QUESTION, (0, budget.text_tokens - len(QUESTION)))
            inputs |= {"text_ids": padded[None], "text_length": np.array([len(QUESTION)])}
        features, kept = (torch.from_numpy(x) for x in session.run(["image_features", "kept"], inputs))
        want = see_picture(loaded.model, shown)
        assert torch.equal(kept[0], want.kept) and features.shape == (KEEP, 48)
        # float32, features below 3: products in another order. Measured on x86: at most 1.0e-6.
        torch.testing.assert_close(features, want.features, rtol=0, atol=1e-5)
    assert [f for f in lint(tmp_path / "vision.onnx", "rtx") if f.severity == "error"] == []


@pytest.mark.parametrize("method", TINY)
def test_a_folder_carries_the_weights(
    cut: Callable[[str], Loaded], files: dict[str, Path], method: str, tmp_path: Path
) -> None:
    """Reloaded to the bit, although the file that the recipe names is gone."""
    path = tmp_path / "own.safetensors"
    path.write_bytes(files[method].read_bytes())
    save_cut(Request(model="tiny:llava", keep=(KEEP,), method=f"{method}:weights={path}"), tmp_path / "cut")
    path.unlink()
    again, loaded = vlmcut.load(tmp_path / "cut"), cut(method)
    assert again.recipe[-1]["method"] == describe(again.model).method == f"{method}:weights={path}"
    for seed in range(3):
        have, want = (see_picture(x.model, picture(loaded, seed)) for x in (again, loaded))
        assert torch.equal(have.kept, want.kept) and torch.equal(have.features, want.features)
    (tmp_path / "cut" / "method.safetensors").unlink()
    with pytest.raises((PassError, ModelError)):
        vlmcut.load(tmp_path / "cut")


@pytest.mark.parametrize("method", ["task-conv", "mqt"])
def test_a_bundle_is_proven(files: dict[str, Path], method: str, tmp_path: Path) -> None:
    """The whole path: a scorer, and a compressor, which leaves the projector without a reader."""
    request = Request(
        model="tiny:llava", keep=(KEEP,), method=spec(files, method), text_tokens=12, new_tokens=3, questions=0
    )
    manifest = convert(request, tmp_path / "bundle")
    assert manifest.exactness["ok"] and manifest.recipe[-1]["method"] == spec(files, method)
