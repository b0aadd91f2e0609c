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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.onnx import ops
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..surgery.load import locate

_NAME = "vlmcut"  # of our attention in transformers' registry
OPSET = 24


@dataclass
class CacheStep:
    """What the language model's attention needs in one call of a graph; lives for one trace.

    Shapes: past [1, kv_heads, C, head_dim] per layer, two entries per layer; S query columns.
    """

    past: Sequence[Tensor]  # key 0, value 0, key 1, ...
    length: Tensor  # int64 [1]: rows in the cache after this step
    prefill: bool  # S columns from row 0, or 1 column at row length - 1
    valid: Tensor | None = None  # [1, S, 1]: 0 for padding columns; set when int8 scales must not see padding
    present: list[Tensor] = field(default_factory=list)


class PassThrough:
    """Stands in for a transformers `Cache`: hands k and v on, since the attention operator owns the buffers."""

    is_compileable = False

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return k, v

    def get_seq_length(self, *args: Any) -> int:
        return 0


def _columns(t: Tensor) -> Tensor:
    """[B, heads, S, head_dim] -> [B, S, heads * head_dim]."""
    return t.transpose(1, 2).flatten(2)


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = (q @ k.transpose(-1, -2)).float() * scale
    if mask is not None:
        scores = torch.where(mask, scores, torch.finfo(scores.dtype).min)
    return torch.softmax(scores, dim=-1).to(v.dtype) @ v


def _scatter(past: Tensor, new: Tensor, row: Tensor) -> Tensor:
    """Write `new` [1, heads, S, head_dim] into the cache from `row`, int64 [1]."""
    attributes = {"axis": -2, "mode": "linear"}
    return ops.symbolic(
        "TensorScatter", (past, new, row), attributes, dtype=past.dtype, shape=past.shape, version=OPSET
    )


class Contrib:
    """Operators of ONNX Runtime."""

    name = "contrib"

    def tower(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """[B, heads, N, head_dim] three times -> [B, N, heads, head_dim]."""
        inputs = (_columns(q), _columns(k), _columns(v))
        attributes = {"num_heads": q.shape[1], "scale": scale}
        out = ops.symbolic(
            "com.microsoft::MultiHeadAttention", inputs, attributes, dtype=q.dtype, shape=inputs[0].shape, version=1
        )
        return out.unflatten(-1, (q.shape[1], -1))

    def cached(self, q: Tensor, k: Tensor, v: Tensor, scale: float, layer: int, step: CacheStep) -> Tensor:
        """[1, heads, S, head_dim] against the cache -> [1, S, heads, head_dim]; appends to `step.present`."""
        past_key, past_value = step.past[2 * layer : 2 * layer + 2]
        columns = q.shape[2]
        if step.prefill:  # padding columns write rows that decode overwrites before they can be seen
            rows = torch.tensor([columns - 1], dtype=torch.int32)
            total = torch.tensor(columns, dtype=torch.int32)
        else:
            rows = (step.length - 1).to(torch.int32)
            total = step.length.to(torch.int32).squeeze(0)
        out, key, value = ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            (_columns(q), _columns(k), _columns(v), past_key, past_value, rows, total),
            {"num_heads": q.shape[1], "kv_num_heads": k.shape[1], "scale": scale},
            dtypes=(q.dtype,) * 3,
            shapes=((1, columns, q.shape[1] * q.shape[3]), past_key.shape, past_value.shape),
            version=1,
        )
        step.present += [key, value]
        return out.unflatten(-1, (q.shape[1], -1))


class Standard:
    """Operators of the ONNX standard alone, in the forms that TensorRT's importer and builder take."""

    name = "standard"

    def tower(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return self._attention(q, k, v, scale).transpose(1, 2)

    def cached(self, q: Tensor, k: Tensor, v: Tensor, scale: float, layer: int, step: CacheStep) -> Tensor:
        write = torch.zeros(1, dtype=torch.int64) if step.prefill else step.length - 1
        past_key, past_value = step.past[2 * layer : 2 * layer + 2]
        key, value = _scatter(past_key, k, write), _scatter(past_value, v, write)
        step.present += [key, value]
        if step.prefill:  # the cache is empty before: the columns see each other
            return self._attention(q, k, v, scale, causal=True).transpose(1, 2)
        slots = torch.arange(key.shape[2]).reshape(1, 1, 1, -1)
        return self._attention(q, key, value, scale, mask=slots < step.length.reshape(1, 1, 1, 1)).transpose(1, 2)

    def _attention(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        if not self._fused(q):
            if causal:
                mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()[None, None]
            return _softmax_attention(q, k, v, mask, scale)
        inputs = (q, k, v) if mask is None else (q, k, v, mask)
        attributes = {"scale": scale, "is_causal": int(causal)}
        return ops.symbolic("Attention", inputs, attributes, dtype=q.dtype, shape=q.shape, version=OPSET)

    @staticmethod
    def _fused(q: Tensor) -> bool:
        """Whether TensorRT has a kernel for this attention; found by building it with TensorRT-RTX 1.7.1.

        None for float32, for head_dim outside 32 to 256, and for one query row with fewer than four heads.
        """
        _, heads, rows, head_dim = q.shape
        return q.dtype == torch.float16 and 32 <= head_dim <= 256 and (rows > 1 or heads >= 4)


Operators = Contrib | Standard


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNormalization over the last axis, computed in float32."""
    attributes = {"axis": -1, "epsilon": epsilon, "stash_type": 1}
    return ops.symbolic("RMSNormalization", (x, weight), attributes, dtype=x.dtype, shape=x.shape, version=OPSET)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """RotaryEmbedding of q and k [B, heads, S, head_dim] with tables [B, S, head_dim], both halves alike."""
    half = cos.shape[-1] // 2
    tables = (cos[..., :half], sin[..., :half])

    def rotate(x: Tensor) -> Tensor:
        return ops.symbolic("RotaryEmbedding", (x, *tables), {}, dtype=x.dtype, shape=x.shape, version=OPSET)

    return rotate(q), rotate(k)


@contextmanager
def emitting(model: Any, operators: Operators) -> Iterator[None]:
    """While inside, tracing `model` emits `operators`. The model and transformers are as before on the way out."""

    def attention(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, *, scaling: float, step: Any = None, **_: Any
    ) -> tuple[Tensor, None]:
        if step is None:
            return operators.tower(q, k, v, scaling), None
        out = operators.cached(q, k, v, scaling, module.layer_idx, step)
        return (out if step.valid is None else out * step.valid.unsqueeze(-1)), None

    parts = locate(model)
    configs = (parts.tower.config, parts.language.config)
    before = [c._attn_implementation for c in configs]
    norms = [m for m in parts.language.modules() if type(m).__name__.endswith("RMSNorm")]
    modeling: Any = sys.modules[type(parts.language).__module__]
    original_rotary = modeling.apply_rotary_pos_emb
    ALL_ATTENTION_FUNCTIONS[_NAME] = attention
    try:
        for config in configs:
            config._attn_implementation = _NAME
        modeling.apply_rotary_pos_emb = rotary
        for norm in norms:
            norm.forward = lambda x, n=norm: rms_norm(x, n.weight, n.variance_epsilon)
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name
        modeling.apply_rotary_pos_emb = original_rotary
        for norm in norms:
            del norm.forward
        del ALL_ATTENTION_FUNCTIONS[_NAME]
