"""Which operators a graph is made of: the one difference between the ONNX Runtime and the TensorRT form.

Hugging Face models call their attention through a registry and their rotary embedding and RMS norm through names that
can be replaced. `emitting` puts ours there while a graph is traced and restores everything after. Nothing depends on
a pattern being recognised later.

| piece | ONNX Runtime (`contrib`) | TensorRT, opset 24 (`standard`) |
|---|---|---|
| tower attention | com.microsoft MultiHeadAttention | Attention (float16) or MatMul, Softmax, MatMul (float32) |
| cache attention | com.microsoft GroupQueryAttention, in place | TensorScatter, then as above |
| rotary embedding | RotaryEmbedding | RotaryEmbedding |
| RMS norm | RMSNormalization | RMSNormalization |
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.onnx import ops
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import ExportError
from ..surgery.load import locate
from ..surgery.norms import epsilon, offset
from ..surgery.rows import take
from ..surgery.selection import attached

_NAME = "vlmcut"  # of our attention in transformers' registry
OPSET = 24


@dataclass
class CacheStep:
    """What the language model's layers need in one call of a graph; lives for one trace. S query columns."""

    past: Mapping[str, Tensor]  # key_i, value_i [1, kv_heads, C, head_dim]; conv_i [1, channels, taps]; {}: no cache
    length: Tensor  # int64 [1]: rows in the cache after this step
    prefill: bool  # S columns from row 0, or 1 column at row length - 1
    valid: Tensor | None = None  # [1, S, 1]: 0 for padding columns; set when int8 scales must not see padding
    blocks: Tensor | None = None  # int64 [1, S]: columns that see each other whole; -1 none; None all is causal
    window_over_blocks: bool = False  # whether a sliding window cuts blocks too (Gemma 3) or not (PaliGemma 2)
    windowed_blocks: bool = False  # whether layers without a window are causal whatever the blocks (Gemma 4)
    asks: Tensor | None = None  # bool [1, 1, n, S]: the columns that the layer's n query columns see; None: all ask
    rows: Tensor | None = None  # int64 [1, n]: the columns whose answers are wanted, where all come; None: all
    present: dict[str, Tensor] = field(default_factory=dict)

    @contextmanager
    def asking(self, seen: Tensor, columns: Tensor) -> Iterator[None]:
        """While inside, only these columns ask, int64 [1, n], and see what `seen` says."""
        valid, self.asks = self.valid, seen
        self.valid = None if valid is None else take(valid, columns, -2, -3)
        yield
        self.valid, self.asks = valid, None

    def among(self, columns: Tensor) -> CacheStep:
        """The same where there are no other columns than these, int64 [1, n]."""
        valid, blocks = self.valid, self.blocks
        return replace(
            self,
            valid=None if valid is None else take(valid, columns, -2, -3),
            blocks=None if blocks is None else take(blocks, columns, -1, -2),
        )

    def beside(self, seen: Tensor, columns: Tensor) -> CacheStep:
        """A step that caches nothing and answers these columns alone, int64 [1, n], which see what `seen` says."""
        valid = None if self.valid is None else take(self.valid, columns, -2, -3)
        return replace(self, past={}, present={}, valid=valid, asks=seen, rows=columns)

    def seen_blocks(self, window: int | None) -> Tensor | None:
        """The blocks that a layer with this window has."""
        return None if self.windowed_blocks and window is None else self.blocks

    def mask(self, columns: int, window: int | None) -> Tensor | None:
        """Which of the prompt's columns see which, [1, 1, S, S]; None if that is causal and no more."""
        if self.asks is not None:
            return self.asks
        blocks = self.seen_blocks(window)
        if blocks is None and window is None:
            return None
        column = torch.arange(columns)
        near = None if window is None else column[:, None] - column < window
        seen = column[:, None] >= column
        if near is not None and not self.window_over_blocks:
            seen = seen & near
        if blocks is not None:
            seen = seen | ((blocks[0][:, None] == blocks[0]) & (blocks[0] >= 0))
        if near is not None and self.window_over_blocks:
            seen = seen & near
        return seen[None, None]


class PassThrough:
    """Stands in for a transformers `Cache`: hands k and v on, since the attention operator owns the buffers.

    A short convolution has no operator of its own; its state is the last columns before `length`.
    """

    is_compileable = False

    def __init__(self, step: CacheStep) -> None:
        self._step = step

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return k, v

    def get_seq_length(self, *args: Any) -> int:
        return 0

    def is_recording_past(self, *args: Any) -> bool:
        return False

    def has_previous_state(self, *args: Any) -> bool:
        return False

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """None: every step takes the road that concatenates, which needs no state edited in place."""

    def update_conv_state(self, new: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Columns that the convolution sees: [1, channels, S], in decode [1, channels, taps + 1]."""
        name = f"conv_{layer_idx}"
        past = self._step.past[name]
        taps = past.shape[-1]
        if not self._step.prefill:
            whole = torch.cat([past, new], dim=-1)
            self._step.present[name] = whole[..., 1:]
            return whole
        columns = self._step.length + torch.arange(taps)
        self._step.present[name] = torch.nn.functional.pad(new, (taps, 0)).index_select(-1, columns)
        return new


def _columns(t: Tensor) -> Tensor:
    """[B, heads, S, head_dim] -> [B, S, heads * head_dim]."""
    return t.transpose(1, 2).flatten(2)


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = (q @ k.transpose(-1, -2)).float() * scale
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask.float()
    elif mask is not None:
        scores = torch.where(mask, scores, torch.finfo(scores.dtype).min)
    return torch.softmax(scores, dim=-1).to(v.dtype) @ v


def _scatter(past: Tensor, new: Tensor, row: Tensor) -> Tensor:
    """Write `new` [1, heads, S, head_dim] into the cache from `row`, int64 [1]."""
    attributes = {"axis": -2, "mode": "linear"}
    return ops.symbolic(
        "TensorScatter", (past, new, row), attributes, dtype=past.dtype, shape=past.shape, version=OPSET
    )


def _filled(past: Tensor, new: Tensor) -> Tensor:
    """The cache whose first rows are `new`; those behind are copied onto themselves: past and present may be one."""
    return torch.cat([new, past[:, :, new.shape[2] :]], dim=2)


class Contrib:
    """Operators of ONNX Runtime."""

    name = "contrib"

    @staticmethod
    def causal(dtype: torch.dtype, head_dim: int) -> bool:
        """Whether a prompt is read by an operator that is causal by itself; else every pair of rows is multiplied."""
        return True

    def tower(self, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
        """[B, heads, N, head_dim] three times, mask bool [B, 1, N, N] -> [B, N, heads, head_dim]."""
        if mask is not None or k.shape[1] != q.shape[1]:
            return _softmax_attention(q, k, v, mask, scale).transpose(1, 2)
        inputs = (_columns(q), _columns(k), _columns(v))
        attributes = {"num_heads": q.shape[1], "scale": scale}
        out = ops.symbolic(
            "com.microsoft::MultiHeadAttention", inputs, attributes, dtype=q.dtype, shape=inputs[0].shape, version=1
        )
        return out.unflatten(-1, (q.shape[1], -1))

    def cached(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, layer: int, step: CacheStep, window: int | None
    ) -> Tensor:
        """[1, heads, S, head_dim] against the cache -> [1, S, heads, head_dim]; adds to `step.present`."""
        columns = q.shape[2]
        if step.prefill and (
            step.asks is not None or step.seen_blocks(window) is not None
        ):  # the operator knows causal masks only
            return self._masked(q, k, v, scale, layer, step, window)
        past_key, past_value = step.past.get(f"key_{layer}"), step.past.get(f"value_{layer}")
        shape = k.shape if past_key is None else past_key.shape
        if step.prefill:  # padding columns write rows that decode overwrites before they can be seen
            rows = torch.tensor([columns - 1], dtype=torch.int32)
            total = torch.tensor(columns, dtype=torch.int32)
        else:
            rows = (step.length - 1).to(torch.int32)
            total = step.length.to(torch.int32).squeeze(0)
        attributes = {"num_heads": q.shape[1], "kv_num_heads": k.shape[1], "scale": scale}
        if window is not None:
            attributes["local_window_size"] = window
        out, key, value = ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            (_columns(q), _columns(k), _columns(v), past_key, past_value, rows, total),
            attributes,
            dtypes=(q.dtype,) * 3,
            shapes=((1, columns, q.shape[1] * q.shape[3]), shape, shape),
            version=1,
        )
        step.present |= {f"key_{layer}": key, f"value_{layer}": value}
        return out.unflatten(-1, (q.shape[1], -1))

    def _masked(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, layer: int, step: CacheStep, window: int | None
    ) -> Tensor:
        for name, new in ((f"key_{layer}", k), (f"value_{layer}", v)) if step.past else ():
            step.present[name] = _filled(step.past[name], new)
        return _softmax_attention(q, k, v, step.mask(k.shape[2], window), scale).transpose(1, 2)


class Standard:
    """Operators of the ONNX standard alone, in the forms that TensorRT's importer and builder take."""

    name = "standard"

    @staticmethod
    def causal(dtype: torch.dtype, head_dim: int) -> bool:
        return dtype == torch.float16 and 32 <= head_dim <= 256

    def tower(self, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
        return self._attention(q, k, v, scale, mask=mask).transpose(1, 2)

    def cached(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, layer: int, step: CacheStep, window: int | None
    ) -> Tensor:
        if not step.past:
            return self._attention(q, k, v, scale, mask=step.asks, causal=step.asks is None).transpose(1, 2)
        write = torch.zeros(1, dtype=torch.int64) if step.prefill else step.length - 1
        past_key, past_value = step.past[f"key_{layer}"], step.past[f"value_{layer}"]
        if step.asks is None:
            key, value = _scatter(past_key, k, write), _scatter(past_value, v, write)
        else:  # TensorRT-RTX 1.7.1 dies of a scatter here in float16 with one KV head; decode overwrites what is behind
            key, value = _filled(past_key, k), _filled(past_value, v)
        step.present |= {f"key_{layer}": key, f"value_{layer}": value}
        if step.prefill:  # the cache is empty before: the columns see each other
            mask = step.mask(q.shape[2], window)
            return self._attention(q, k, v, scale, mask=mask, causal=mask is None).transpose(1, 2)
        slots = torch.arange(key.shape[2]).reshape(1, 1, 1, -1)
        seen = slots < step.length.reshape(1, 1, 1, 1)
        if window is not None:
            seen = seen & (slots >= step.length.reshape(1, 1, 1, 1) - window)
        return self._attention(q, key, value, scale, mask=seen).transpose(1, 2)

    def _attention(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        if not self._fused(q):
            if causal:
                mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()[None, None]
            return _softmax_attention(q, k, v, mask, scale)
        if mask is not None and mask.shape[-2] != q.shape[2]:  # ONNX lets it be broadcast, ONNX Runtime does not
            mask = mask.expand(-1, -1, q.shape[2], -1)
        inputs = (q, k, v) if mask is None else (q, k, v, mask)
        attributes = {"scale": scale, "is_causal": int(causal)}
        return ops.symbolic("Attention", inputs, attributes, dtype=q.dtype, shape=q.shape, version=OPSET)

    @staticmethod
    def _fused(q: Tensor) -> bool:
        """Whether TensorRT has a kernel for this attention; found by building it with TensorRT-RTX 1.7.1.

        None for float32, for head_dim outside 32 to 256, for one head, and for one query row with fewer than four.
        """
        _, heads, rows, head_dim = q.shape
        return Standard.causal(q.dtype, head_dim) and heads >= (2 if rows > 1 else 4)


Operators = Contrib | Standard


def for_target(target: str) -> Operators:
    """The operators of onnx, rtx or trt."""
    return Contrib() if target == "onnx" else Standard()


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNormalization over the last axis, computed in float32."""
    attributes = {"axis": -1, "epsilon": epsilon, "stash_type": 1}
    return ops.symbolic("RMSNormalization", (x, weight), attributes, dtype=x.dtype, shape=x.shape, version=OPSET)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """RotaryEmbedding of q and k [B, heads, S, head_dim] with tables [B, S, width], both halves alike.

    Columns of a head beyond `width` are not rotated.
    """
    width = cos.shape[-1]
    half = width // 2
    tables = (cos[..., :half], sin[..., :half])

    def rotate(x: Tensor) -> Tensor:
        if width < x.shape[-1]:
            return torch.cat([rotate(x[..., :width]), x[..., width:]], dim=-1)
        return ops.symbolic("RotaryEmbedding", (x, *tables), {}, dtype=x.dtype, shape=x.shape, version=OPSET)

    return rotate(q), rotate(k)


@contextmanager
def emitting(model: Any, operators: Operators) -> Iterator[None]:
    """While inside, tracing `model` emits `operators`. The model and transformers are as before on the way out."""
    parts = locate(model)
    language = {id(m) for m in parts.language.modules()}
    about = attached(model)
    masked = about.family.tower_mask
    # Some towers hand on to their attention what they were given of the geometry; eager attention ignores it too.
    constants = {name for bucket in about.buckets for name in about.family.constants(model, bucket.geometry)}
    harmless = _HARMLESS | constants | {name.removeprefix("image_") for name in constants}

    def attention(
        module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any = None, **given: Any
    ) -> tuple[Tensor, None]:
        step, window = given.pop("step", None), given.pop("sliding_window", None)
        scale = given.pop("scaling", None) or q.shape[-1] ** -0.5
        if unknown := sorted(n for n, x in given.items() if n not in harmless and x is not None and x is not False):
            raise ExportError(
                f"the attention of `{type(module).__name__}` takes `{unknown[0]}`, which no operator here computes",
                hint="this model cannot be exported yet; ask for it with its config",
            )
        if id(module) not in language:
            return operators.tower(q, k, v, scale, _boolean(attention_mask) if masked else None), None
        if step is None:
            raise ExportError(
                f"`{type(module).__name__}` does not get the cache's step: its model keeps keyword arguments to itself",
                hint="this model cannot be exported yet; ask for it with its config",
            )
        few = step.rows
        if few is not None and operators.causal(q.dtype, q.shape[-1]) and step.seen_blocks(window) is None:
            # All rows, causally, multiply fewer pairs than most of them with a mask.
            out = operators.cached(q, k, v, scale, module.layer_idx, replace(step, asks=None), window)
            out = take(out.flatten(2), few, -2, -3).unflatten(-1, out.shape[2:])
        else:
            q = q if few is None else take(q, few, -2, -4)
            out = operators.cached(q, k, v, scale, module.layer_idx, step, window)
        return (out if step.valid is None else out * step.valid.unsqueeze(-1)), None

    def dot_product(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, *_: Any, **given: Any) -> Tensor:
        """In the place of torch's own, which towers of timm call without transformers' table."""
        if given.get("is_causal") or q.dim() != 4:
            return original_product(q, k, v, attn_mask, **given)
        scale = given.get("scale") or q.shape[-1] ** -0.5
        return operators.tower(q, k, v, scale, _boolean(attn_mask)).transpose(1, 2)

    original_product = functional.scaled_dot_product_attention
    configs = [parts.language.config, *([parts.tower.config] if hasattr(parts.tower, "config") else [])]
    before = [c._attn_implementation for c in configs]
    norms: list[tuple[Any, float]] = [(m, c) for m in parts.language.modules() if (c := offset(m)) is not None]
    whole: list[Any] = [m for m in parts.tower.modules() if isinstance(m, nn.Conv2d | nn.Conv3d) and _is_patch(m)]
    modeling: Any = sys.modules[type(parts.language).__module__]
    original_rotary = getattr(modeling, "apply_rotary_pos_emb", None)
    plain = original_rotary is not None and _is_plain_rotary(original_rotary)
    ALL_ATTENTION_FUNCTIONS[_NAME] = attention
    if masked:  # without one of its name a tower's mask is dropped silently
        ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    try:
        for config in configs:
            config._attn_implementation_internal = _NAME
        if plain:
            modeling.apply_rotary_pos_emb = rotary
        functional.scaled_dot_product_attention = dot_product
        for norm, c in norms:
            norm.forward = lambda x, n=norm, c=c: rms_norm(x, c + n.weight if c else n.weight, epsilon(n))
        for conv in whole:
            conv.forward = lambda x, m=conv: _patch_product(m, x)
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name
        if plain:
            modeling.apply_rotary_pos_emb = original_rotary
        functional.scaled_dot_product_attention = original_product
        for module in (*(norm for norm, _ in norms), *whole):
            del module.forward
        del ALL_ATTENTION_FUNCTIONS[_NAME]
        if masked:
            del ALL_MASK_ATTENTION_FUNCTIONS._global_mapping[_NAME]


def _is_patch(conv: Any) -> bool:
    """Whether a convolution embeds patches: stride of the kernel, no padding, one group."""
    return conv.stride == conv.kernel_size and conv.groups == 1 and set(conv.padding) == {0}


def _patch_product(conv: Any, x: Tensor) -> Tensor:
    """A convolution over patches that stand one by one along the leading axis (Qwen) is a matrix product."""
    if x.shape[2:] != conv.kernel_size:
        return type(conv).forward(conv, x)
    out = torch.nn.functional.linear(x.flatten(1), conv.weight.flatten(1), conv.bias)
    return out.reshape(*out.shape, *(1,) * (x.dim() - 2))


def _boolean(mask: Tensor | None) -> Tensor | None:
    """A tower's mask, bool or added to the scores, as bool; one row for all queries (sizes of merged tokens) stays."""
    return mask if mask is None or mask.dtype == torch.bool or mask.shape[-2] == 1 else mask == 0


# Arguments of an attention function that change nothing here: one prompt, no training, masks of our own.
_HARMLESS = frozenset(
    "dropout is_causal position_ids use_cache cache_position output_attentions output_hidden_states return_dict".split()
)


def _is_plain_rotary(function: Any) -> bool:
    """Whether a family's rotary function computes what the operator does; asked of the function, not of its name."""
    rng = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 2, 3, 8, generator=rng), torch.randn(1, 1, 3, 8, generator=rng)
    angle = torch.randn(1, 3, 4, generator=rng).repeat(1, 1, 2)
    try:
        found = function(q, k, angle.cos(), angle.sin())
    except (TypeError, ValueError, RuntimeError, IndexError):  # another signature
        return False
    if not (isinstance(found, tuple) and len(found) == 2):
        return False
    for x, have in zip((q, k), found, strict=True):
        half = torch.cat([-x[..., 4:], x[..., :4]], dim=-1)
        want = x * angle.cos()[:, None] + half * angle.sin()[:, None]
        if have.shape != want.shape or not torch.allclose(have, want, atol=1e-6):
            return False
    return True
