"""While a graph is traced the model emits our operators; afterwards nothing of ours is left anywhere."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from transformers import Gemma3TextConfig
from transformers.cache_utils import LinearAttentionLayer
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.cohere import modeling_cohere
from transformers.models.gemma3.modeling_gemma3 import create_masks_for_vision_model
from transformers.models.glm import modeling_glm
from transformers.models.llama import modeling_llama
from transformers.models.llama4 import modeling_llama4
from transformers.models.qwen2_vl import modeling_qwen2_vl
from vlmcut.errors import ExportError
from vlmcut.exporters import operators
from vlmcut.exporters.operators import CacheStep, Contrib, PassThrough, Standard, emitting
from vlmcut.surgery.load import locate

FORMS = [Contrib(), Standard()]


def fingerprint(model: Any) -> dict[str, Any]:
    """Everything that `emitting` touches."""
    parts = locate(model)
    modeling = sys.modules[type(parts.language).__module__]
    return {
        "registry": dict(ALL_ATTENTION_FUNCTIONS.items()),
        "configs": [c._attn_implementation for c in (parts.tower.config, parts.language.config, model.config)],
        "rotary": modeling.apply_rotary_pos_emb,
        "forwards": {n: m.__dict__.get("forward") for n, m in model.named_modules()},
    }


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.name)
def test_everything_is_restored(kind: str, tiny, logits, form: Any) -> None:
    loaded = tiny(kind)
    before, answer = fingerprint(loaded.model), logits(loaded)
    with emitting(loaded.model, form):
        inside = fingerprint(loaded.model)
    assert fingerprint(loaded.model) == before
    assert torch.equal(logits(loaded), answer)
    # Negative control: inside, all of it was different.
    assert all(inside[key] != before[key] for key in before)
    assert len(inside["registry"]) == len(before["registry"]) + 1
    changed = [n for n, f in inside["forwards"].items() if f is not None]
    norms = [n for n in changed if n.startswith("model.language_model.")]
    assert len(norms) == 2 * len(locate(loaded.model).language_layers) + 1
    assert {n.rpartition(".")[2] for n in changed if n not in norms} <= {"patch_embedding"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_everything_is_restored_after_an_error(kind: str, tiny, logits, error: type[BaseException]) -> None:
    loaded = tiny(kind)
    before, answer = fingerprint(loaded.model), logits(loaded)
    with pytest.raises(error), emitting(loaded.model, Standard()):
        raise error
    assert fingerprint(loaded.model) == before
    assert torch.equal(logits(loaded), answer)


def test_an_implementation_that_was_chosen_stays(tiny) -> None:
    loaded = tiny("llava")
    loaded.model.set_attn_implementation("eager")
    with emitting(loaded.model, Contrib()):
        assert locate(loaded.model).tower.config._attn_implementation == "vlmcut"
    assert fingerprint(loaded.model)["configs"][:2] == ["eager", "eager"]


@pytest.mark.parametrize(
    ("heads", "rows", "width", "dtype", "fused"),
    [
        (6, 30, 32, torch.float16, True),
        (6, 30, 256, torch.float16, True),
        (4, 1, 64, torch.float16, True),
        (3, 1, 64, torch.float16, False),  # one row needs four heads
        (3, 2, 64, torch.float16, True),
        (2, 30, 64, torch.float16, True),
        (1, 30, 64, torch.float16, False),  # nor is there one for a single head
        (6, 30, 16, torch.float16, False),
        (6, 30, 257, torch.float16, False),
        (6, 30, 64, torch.float32, False),
        (6, 30, 64, torch.bfloat16, False),
    ],
)
def test_where_tensorrt_has_a_kernel(heads: int, rows: int, width: int, dtype: torch.dtype, fused: bool) -> None:
    assert Standard._fused(torch.zeros(1, heads, rows, width, dtype=dtype)) == fused


@pytest.mark.parametrize("group", [1, 3])
def test_unfused_attention_is_attention(group: int) -> None:
    """Against PyTorch's own, causal over a prompt and masked over a cache, with grouped queries."""
    rng = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 1, 2, 7, 8, generator=rng)
    attend = torch.nn.functional.scaled_dot_product_attention
    for rows in (7, 1):
        q = torch.randn(1, 2 * group, rows, 8, generator=rng)
        mask = (
            torch.ones(7, 7, dtype=torch.bool).tril()[None, None]
            if rows == 7
            else (torch.arange(7) < 5)[None, None, None]
        )
        want = attend(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True)
        got = (
            Standard()._attention(q, k, v, 0.3, causal=True)
            if rows == 7
            else Standard()._attention(q, k, v, 0.3, mask=mask)
        )
        # float32: a softmax over 7 and a sum of 7; measured 2.4e-7
        torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.name)
@pytest.mark.parametrize("prefill", [True, False])
def test_the_cache_is_appended_layer_by_layer(form: Any, prefill: bool) -> None:
    past = {f"{kind}_{layer}": torch.zeros(1, 2, 9, 32) for layer in range(2) for kind in ("key", "value")}
    step = CacheStep(past=past, length=torch.tensor([5]), prefill=prefill)
    rows = 5 if prefill else 1
    for layer in range(2):
        out = form.cached(torch.zeros(1, 6, rows, 32), *torch.zeros(2, 1, 2, rows, 32), 0.1, layer, step, None)
        assert out.shape == (1, rows, 6, 32)
        assert list(step.present) == [f"{kind}_{i}" for i in range(layer + 1) for kind in ("key", "value")]
    assert {n: t.shape for n, t in step.present.items()} == {n: t.shape for n, t in past.items()}


def test_the_stand_in_for_a_cache_keeps_nothing() -> None:
    k, v = torch.zeros(1), torch.ones(1)
    cache = PassThrough(CacheStep(past={}, length=torch.tensor([1]), prefill=True))
    assert cache.update(k, v, 3) == (k, v) and cache.get_seq_length() == 0
    assert cache.get_conv_state(0) is None and not cache.has_previous_state(0)


# --- who sees whom ---

BLOCKS = {
    "none": None,
    "one image": [-1, -1, 0, 0, 0, 0, -1, -1, -1],
    "two images": [0, 0, -1, 1, 1, 1, -1, -1, -1],
    "images that touch": [-1, 0, 0, 0, 1, 1, 1, 1, -1],
    "everything": [0] * 9,
    "padding": [0, 0, 0, 0, 0, 0, -1, -1, -1],
}
WINDOWS = (None, 1, 3, 8, 9, 100)


def sees(i: int, j: int, blocks: list[int] | None, window: int | None, over_blocks: bool) -> bool:
    """Whether column i of a prompt sees column j, written out."""
    causal = j <= i
    near = window is None or i - j < window
    together = blocks is not None and blocks[i] == blocks[j] >= 0
    return (causal or together) and near if over_blocks else (causal and near) or together


def square(blocks: list[int] | None, window: int | None, over_blocks: bool, columns: int = 9) -> np.ndarray:
    """bool [columns, columns] of `sees`."""
    pairs = range(columns)
    return np.array([[sees(i, j, blocks, window, over_blocks) for j in pairs] for i in pairs])


def prompt_step(blocks: list[int] | None, over_blocks: bool) -> CacheStep:
    given = None if blocks is None else torch.tensor([blocks])
    return CacheStep(past={}, length=torch.tensor([9]), prefill=True, blocks=given, window_over_blocks=over_blocks)


@pytest.mark.parametrize("over_blocks", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", BLOCKS)
def test_masks(name: str, window: int | None, over_blocks: bool) -> None:
    blocks = BLOCKS[name]
    mask = prompt_step(blocks, over_blocks).mask(9, window)
    if blocks is None and window is None:
        assert mask is None  # causal: the operator's own attribute says so
        return
    assert mask is not None and mask.shape == (1, 1, 9, 9)
    np.testing.assert_array_equal(mask[0, 0], square(blocks, window, over_blocks))


@pytest.mark.parametrize("window", [3, 8])
@pytest.mark.parametrize("name", [n for n in BLOCKS if n != "none"])
def test_masks_are_those_of_transformers(name: str, window: int) -> None:
    """Gemma 3 cuts blocks by its window, everybody else does not; asked of the functions that its models call."""
    config = Gemma3TextConfig(
        layer_types=["full_attention", "sliding_attention"], num_hidden_layers=2, sliding_window=window
    )
    config._attn_implementation = "eager"  # sdpa leaves a mask out where a flag says the same
    given = {
        "config": config, "inputs_embeds": torch.zeros(1, 9, 4), "attention_mask": None, "past_key_values": None,
        "position_ids": torch.arange(9)[None], "block_sequence_ids": torch.tensor([BLOCKS[name]]),
    }  # fmt: skip
    for over_blocks, theirs in (
        (True, create_masks_for_vision_model(**given)),
        (False, create_masks_for_generate(**given)),
    ):
        step = prompt_step(BLOCKS[name], over_blocks)
        for layer, mine in (("full_attention", step.mask(9, None)), ("sliding_attention", step.mask(9, window))):
            assert mine is not None
            np.testing.assert_array_equal(mine[0, 0], (theirs[layer] == 0)[0, 0], err_msg=f"{layer} {over_blocks}")


# --- attention through the cache, as ONNX Runtime computes it ---

HEADS, KV_HEADS, WIDTH, ROWS = 4, 2, 32, 12  # rows of the cache; a prompt is padded to 9 columns


class Step(torch.nn.Module):
    """One call of a layer's attention."""

    def __init__(self, form: Any, prefill: bool, window: int | None, over_blocks: bool, blocked: bool) -> None:
        super().__init__()
        self.form, self.prefill, self.window = form, prefill, window
        self.over_blocks, self.blocked = over_blocks, blocked

    def forward(self, q: Any, k: Any, v: Any, key: Any, value: Any, length: Any, blocks: Any) -> tuple[Any, Any, Any]:
        step = CacheStep(
            past={"key_0": key, "value_0": value}, length=length, prefill=self.prefill,
            blocks=blocks if self.blocked else None, window_over_blocks=self.over_blocks,
        )  # fmt: skip
        out = self.form.cached(q, k, v, WIDTH**-0.5, 0, step, self.window)
        return out * 1.0, step.present["key_0"], step.present["value_0"]


def session(module: Step, dtype: torch.dtype) -> ort.InferenceSession:
    columns = 9 if module.prefill else 1
    shapes = [(1, n, columns, WIDTH) for n in (HEADS, KV_HEADS, KV_HEADS)] + [(1, KV_HEADS, ROWS, WIDTH)] * 2
    args = (*(torch.zeros(s, dtype=dtype) for s in shapes), torch.tensor([5]), torch.zeros(1, 9, dtype=torch.int64))
    program = torch.export.export(module, args, strict=False)
    made = torch.onnx.export(program, args=(), opset_version=operators.OPSET, optimize=False, verbose=False)
    assert made is not None
    return ort.InferenceSession(ir.to_proto(made.model).SerializeToString(), providers=["CPUExecutionProvider"])


def call(graph: ort.InferenceSession, *given: np.ndarray) -> list[np.ndarray]:
    names = [i.name for i in graph.get_inputs()]
    return [np.asarray(x) for x in graph.run(None, dict(zip(names, given, strict=True)))]


def attended(q: np.ndarray, k: np.ndarray, v: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """[heads, S, d], [kv_heads, T, d] twice, bool [S, T] -> [S, heads, d], row by row in float64."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    out = np.zeros((q.shape[1], q.shape[0], q.shape[2]))
    for head in range(q.shape[0]):
        other = head // (q.shape[0] // k.shape[0])
        for row in range(q.shape[1]):
            rows = np.flatnonzero(seen[row])
            scores = k[other, rows] @ q[head, row] * WIDTH**-0.5
            weights = np.exp(scores - scores.max())
            out[row, head] = weights / weights.sum() @ v[other, rows]
    return out


@pytest.mark.parametrize(
    ("name", "window"),
    [("none", None), ("none", 1), ("none", 4), ("one image", None), ("one image", 4), ("everything", 4)],
)
@pytest.mark.parametrize("form", ["contrib", "standard", "standard16"])
def test_cached_attention(form: str, name: str, window: int | None) -> None:
    """A prompt of 7 tokens in 9 columns, then three tokens one by one, in the cache that each step hands on."""
    made = Contrib() if form == "contrib" else Standard()
    dtype = torch.float16 if form == "standard16" else torch.float32
    blocks = BLOCKS[name]
    rng = np.random.default_rng(0)

    def draw(heads: int, columns: int) -> np.ndarray:
        return rng.standard_normal((1, heads, columns, WIDTH)).astype(np.float16).astype(str(dtype).split(".")[1])

    q, k, v = draw(HEADS, 9), draw(KV_HEADS, 9), draw(KV_HEADS, 9)
    cache = [np.zeros((1, KV_HEADS, ROWS, WIDTH), q.dtype)] * 2
    # float32, one softmax over at most 10; measured 3.5e-7. float16: 1.0e-3.
    close = {"rtol": 0, "atol": 2e-6 if dtype == torch.float32 else 4e-3}
    length, index = 7, np.array([blocks or [0] * 9])
    graph = session(Step(made, True, window, True, blocks is not None), dtype)
    out, *cache = call(graph, q, k, v, *cache, np.array([length]), index)
    want = attended(q[0], k[0], v[0], square(blocks, window, True))
    np.testing.assert_allclose(out[0, :length], want[:length], **close)
    for have, new in zip(cache, (k, v), strict=True):
        np.testing.assert_array_equal(have[:, :, :length], new[:, :, :length])

    if blocks is not None:
        return  # one column has no block: the case without blocks says it all
    graph = session(Step(made, False, window, True, False), dtype)
    keys, values = k[0, :, :length], v[0, :, :length]
    for _ in range(3):
        q, k, v = draw(HEADS, 1), draw(KV_HEADS, 1), draw(KV_HEADS, 1)
        length += 1
        out, *cache = call(graph, q, k, v, *cache, np.array([length]), index)
        keys, values = np.concatenate([keys, k[0]], axis=1), np.concatenate([values, v[0]], axis=1)
        near = np.array([[window is None or length - 1 - row < window for row in range(length)]])
        np.testing.assert_allclose(out[0], attended(q[0], keys, values, near), **close)
        np.testing.assert_array_equal(cache[0][0, :, :length], keys)


# --- short convolutions ---


def convolved(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Causal depthwise convolution of [channels, columns], term by term."""
    channels, columns = x.shape
    taps = weight.shape[1]
    out = np.zeros_like(x)
    for c in range(channels):
        for t in range(columns):
            for tap in range(taps):
                if (past := t - taps + 1 + tap) >= 0:
                    out[c, t] += weight[c, tap] * x[c, past]
    return out


@pytest.mark.parametrize("length", [1, 2, 3, 6, 8])
def test_convolution_state(length: int) -> None:
    """A prompt of `length` in 8 columns, then tokens one by one, are one long convolution; transformers' state too."""
    rng = np.random.default_rng(1)
    x, weight = rng.standard_normal((5, length + 4)), rng.standard_normal((5, 3))
    want = convolved(x, weight)
    own = LinearAttentionLayer()
    padded = np.concatenate([x[:, :length], rng.standard_normal((5, 8 - length))], axis=1)  # padding says nothing
    past = torch.zeros(1, 5, 3, dtype=torch.float64)
    step = CacheStep(past={"conv_4": past}, length=torch.tensor([length]), prefill=True)
    seen = PassThrough(step).update_conv_state(torch.from_numpy(padded)[None], 4, conv_kernel_size=3)
    assert seen.shape == (1, 5, 8)
    np.testing.assert_array_equal(convolved(seen[0].numpy(), weight)[:, :length], want[:, :length])
    own.update_conv_state(torch.from_numpy(x[:, :length])[None], conv_kernel_size=3)
    for count in range(4):
        state = step.present["conv_4"]
        assert torch.equal(state, own.conv_states[0]), count
        new = torch.from_numpy(x[:, length + count])[None, :, None]
        step = CacheStep(past={"conv_4": state}, length=torch.tensor([length + count + 1]), prefill=False)
        seen = PassThrough(step).update_conv_state(new, 4, conv_kernel_size=3)
        # The convolution runs over all four columns and only its last result is used.
        np.testing.assert_allclose(convolved(seen[0].numpy(), weight)[:, -1], want[:, length + count], rtol=1e-12)
        own.update_conv_state(new)


# --- what a family's code may ask of us ---


def test_plain_rotary_is_asked_of_the_function() -> None:
    llama = modeling_llama.apply_rotary_pos_emb
    refused = {
        "interleaved": modeling_cohere.apply_rotary_pos_emb,
        "interleaved, of a part": modeling_glm.apply_rotary_pos_emb,
        "heads behind rows": modeling_qwen2_vl.apply_rotary_pos_emb_vision,
        "complex numbers": modeling_llama4.apply_rotary_emb,
        "q alone": lambda q, k, cos, sin: (llama(q, k, cos, sin)[0], k),
        "k alone": lambda q, k, cos, sin: (q, llama(q, k, cos, sin)[1]),
        "the other way": lambda q, k, cos, sin: llama(q, k, cos, -sin),
        "scaled": lambda q, k, cos, sin: tuple(1.01 * x for x in llama(q, k, cos, sin)),
        "one result": lambda q, k, cos, sin: llama(q, k, cos, sin)[0],
        "nothing": lambda q, k, cos, sin: None,
    }
    assert operators._is_plain_rotary(llama)
    assert operators._is_plain_rotary(modeling_qwen2_vl.apply_rotary_pos_emb)
    assert [name for name, function in refused.items() if operators._is_plain_rotary(function)] == []


@pytest.mark.parametrize("part", ["tower", "language"])
@pytest.mark.parametrize("argument", ["softcap", "s_aux", "position_bias", "an_argument_of_tomorrow"])
def test_unknown_attention_arguments_are_named(part: str, argument: str, tiny) -> None:
    model = tiny("llava").model
    parts = locate(model)
    layer = (parts.tower_layers if part == "tower" else parts.language_layers)[1]
    q, k, v = torch.zeros(1, 6, 9, 32), torch.zeros(1, 6, 9, 32), torch.zeros(1, 6, 9, 32)
    step = CacheStep(past={f"{n}_1": torch.zeros(1, 6, 12, 32) for n in ("key", "value")}, length=torch.tensor([9]),
                     prefill=True)  # fmt: skip
    given = {"scaling": 0.2, "dropout": 0.0, "is_causal": True, argument: None}
    if part == "language":
        given["step"] = step
    with emitting(model, Standard()):
        attention = ALL_ATTENTION_FUNCTIONS["vlmcut"]
        out, _ = attention(layer.self_attn, q, k, v, None, **given)  # None asks for nothing
        assert out.shape == (1, 9, 6, 32)
        with pytest.raises(
            ExportError, match=f"Attention` takes `{argument}`, which no operator here computes"
        ) as caught:
            attention(layer.self_attn, q, k, v, None, **(given | {argument: torch.ones(1)}))
    assert caught.value.hint


def test_a_layer_that_hides_the_step_is_named(tiny) -> None:
    model = tiny("llava").model
    q = torch.zeros(1, 6, 9, 32)
    with emitting(model, Contrib()), pytest.raises(ExportError, match="`LlamaAttention` does not get the cache's step"):
        ALL_ATTENTION_FUNCTIONS["vlmcut"](locate(model).language_layers[0].self_attn, q, q, q, None)


def test_the_name_is_free() -> None:
    assert operators._NAME not in ALL_ATTENTION_FUNCTIONS
