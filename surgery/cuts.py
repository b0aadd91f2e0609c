"""Primitive cuts: take rows and columns of linears, take layers. Counts are corrected, nothing stale is left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .neurons import Mlp
from .structure import head_dim, kv_heads, output_name, query_heads


def take_heads(attention: Any, keep: Sequence[int]) -> None:
    """Shrink one tower attention block in place to the heads in `keep`; head_dim and scale do not change."""
    width = head_dim(attention)
    rows = _rows(keep, width)
    if hasattr(attention, "qkv"):  # one matrix, q above k above v
        full = attention.qkv.out_features // 3
        take_rows(attention.qkv, torch.cat([rows, rows + full, rows + 2 * full]))
    else:
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            take_rows(projection, rows)
    # The output projection sums over heads into the residual stream: it loses input columns and keeps its bias.
    take_columns(getattr(attention, output_name(attention)), rows)
    attention.num_heads = len(keep)
    for name in ("dim", "embed_dim"):  # some forwards reshape to the width of all heads
        if hasattr(attention, name):
            setattr(attention, name, len(rows))


def take_kv_groups(attention: Any, keep: Sequence[int]) -> None:
    """Shrink one grouped-query attention block in place to the KV heads in `keep`, each with all its query heads.

    Query heads per group cannot change: a grouped-query kernel has one ratio per layer.
    """
    width = head_dim(attention)
    group = query_heads(attention) // kv_heads(attention)
    queries = _rows([g * group + i for g in sorted(keep) for i in range(group)], width)
    pairs = _rows(keep, width)
    take_rows(attention.q_proj, queries)
    take_rows(attention.k_proj, pairs)
    take_rows(attention.v_proj, pairs)
    take_columns(getattr(attention, output_name(attention)), queries)


def take_neurons(mlp: Mlp, keep: Sequence[int]) -> None:
    """Shrink one MLP in place to the neurons in `keep`, in their order."""
    rows = torch.tensor(sorted(keep))
    for linear in mlp.makes:
        take_rows(linear, rows)
    # The last projection sums over neurons into the residual stream: it loses input columns and keeps its bias.
    take_columns(mlp.reads, rows)
    if hasattr(mlp.module, "intermediate_size"):
        mlp.module.intermediate_size = len(rows)


def take_layers(layers: nn.ModuleList, keep: Sequence[int]) -> nn.ModuleList:
    """The layers in `keep`, in order, with `layer_idx` renumbered so that each owns the right KV buffer."""
    taken = nn.ModuleList(layers[i] for i in sorted(keep))
    for index, layer in enumerate(taken):
        numbered: list[Any] = [m for m in layer.modules() if hasattr(m, "layer_idx")]
        for module in numbered:
            module.layer_idx = index
    return taken


def count_layers(config: Any, layers: int) -> None:
    """Write the number of layers into a config, whatever its family calls it."""
    for name in ("num_hidden_layers", "depth"):
        if hasattr(config, name):
            setattr(config, name, layers)


def count_neurons(config: Any, neurons: int) -> None:
    """Write the width of every MLP into a config, if it can say it.

    A width that it cannot say leaves it as it is: plain `from_pretrained` then stops at a weight of another shape.
    """
    if hasattr(config, "intermediate_size"):
        config.intermediate_size = neurons
        if hasattr(config, "block_auto_adjust_ff_dim"):  # LFM2 makes another width of the one that is written
            config.block_auto_adjust_ff_dim = False
    elif hasattr(config, "mlp_ratio") and neurons % config.embed_dim == 0:  # Qwen2-VL: whole multiples only
        config.mlp_ratio = neurons // config.embed_dim


def take_rows(linear: nn.Linear, rows: Tensor) -> None:
    """Keep only these outputs of a linear."""
    linear.weight = _parameter(linear.weight[rows])
    if linear.bias is not None:
        linear.bias = _parameter(linear.bias[rows])
    linear.out_features = len(rows)


def take_columns(linear: nn.Linear, columns: Tensor) -> None:
    """Keep only these inputs of a linear."""
    linear.weight = _parameter(linear.weight[:, columns])
    linear.in_features = len(columns)


def _rows(heads: Sequence[int], head_dim: int) -> Tensor:
    return torch.cat([torch.arange(h * head_dim, (h + 1) * head_dim) for h in sorted(heads)])


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(), requires_grad=False)
