"""Primitive cuts: the rows and columns that stay are copied, and every count follows."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from vlmcut.surgery.cuts import take_columns, take_heads, take_kv_groups, take_layers, take_rows
from vlmcut.surgery.load import locate


@pytest.mark.parametrize("bias", [True, False])
def test_rows_and_columns(bias: bool) -> None:
    linear = nn.Linear(6, 5, bias=bias)
    weight = linear.weight.detach().clone()
    before = None if linear.bias is None else linear.bias.detach().clone()
    take_rows(linear, torch.tensor([0, 3]))
    assert torch.equal(linear.weight, weight[[0, 3]]) and (linear.in_features, linear.out_features) == (6, 2)
    if before is not None:
        assert torch.equal(linear.bias, before[[0, 3]])
    take_columns(linear, torch.tensor([1, 2, 5]))
    assert torch.equal(linear.weight, weight[[0, 3]][:, [1, 2, 5]]) and linear.in_features == 3
    assert linear(torch.zeros(1, 3)).shape == (1, 2)
    # The old storage is free to go: a view would keep, and save, all of it.
    assert linear.weight.untyped_storage().nbytes() == 2 * 3 * 4 and linear.weight.is_contiguous()


def test_heads_may_be_named_in_any_order(kind: str, tiny) -> None:
    one, other = (locate(tiny(kind).model).tower_layers[0].self_attn for _ in range(2))
    heads = list(range(one.num_heads))
    before = one.q_proj.weight.detach().clone()
    take_heads(one, heads[::-1])
    assert torch.equal(one.q_proj.weight, before)  # order is the model's, not the list's
    take_heads(other, heads[1:])
    assert other.num_heads == len(heads) - 1
    width = other.head_dim
    assert torch.equal(other.q_proj.weight, before[width:])
    assert other.out_proj.in_features == other.q_proj.out_features == width * (len(heads) - 1)
    assert other.out_proj.bias is not None and other.out_proj.bias.shape == (before.shape[0],)


def test_groups_keep_their_queries(tiny) -> None:
    """Llama, 6 heads in 3 groups: group 2 owns query heads 4 and 5."""
    attention = locate(tiny("llava").model).language_layers[0].self_attn
    q, k, o = (p.weight.detach().clone() for p in (attention.q_proj, attention.k_proj, attention.o_proj))
    take_kv_groups(attention, [2, 0])
    width = attention.head_dim
    rows = [h * width + i for h in (0, 1, 4, 5) for i in range(width)]
    pairs = [h * width + i for h in (0, 2) for i in range(width)]
    assert torch.equal(attention.q_proj.weight, q[rows]) and torch.equal(attention.k_proj.weight, k[pairs])
    assert torch.equal(attention.o_proj.weight, o[:, rows])
    assert attention.num_key_value_groups == 2


def test_layers_are_renumbered(tiny) -> None:
    layers = locate(tiny("llava").model).language_layers
    last = layers[2]
    taken = take_layers(layers, [2, 0])
    assert len(taken) == 2 and taken[1] is last
    assert [layer.self_attn.layer_idx for layer in taken] == [0, 1]
