"""Take rows of the vocabulary: the input embedding and the output projection keep those of chosen tokens.

Ids in and logits out stay those of the tokenizer. What stands in between are two hooks of the modules themselves, so
that transformers' own forward and every family's scaling work as before, and weights keep their names and ties: ids
become rows before the embedding, scores [.., V'] become logits [.., V] behind the projection, `LOW` where no row is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..vocabulary import LOW, Vocabulary
from .cuts import take_rows
from .selection import attached
from .structure import Parts


def take_vocabulary(model: Any, vocabulary: Vocabulary) -> None:
    """Shrink a model in place to the rows that `vocabulary` keeps, and remember it beside the model."""
    parts: Parts = attached(model).family.locate(model)
    embedding, head = parts.language.get_input_embeddings(), parts.head
    keep = torch.from_numpy(vocabulary.ids)
    tied = head.weight is embedding.weight
    take_rows(head, keep)
    embedding.weight = head.weight if tied else nn.Parameter(embedding.weight.detach()[keep], requires_grad=False)
    embedding.num_embeddings = len(keep)
    embedding.padding_idx = None  # of training alone, and it names an id, not a row
    find_rows(embedding, vocabulary)
    spread_scores(head, vocabulary)
    attached(model).vocabulary = vocabulary


def find_rows(embedding: Any, vocabulary: Vocabulary) -> None:
    """Make an embedding of V' rows take ids, int64 of any shape, below V."""
    rows = torch.from_numpy(vocabulary.rows).clone()
    if vocabulary.unknown is not None:
        rows[rows == len(vocabulary.ids)] = rows[vocabulary.unknown].clone()
    embedding.register_buffer("rows", rows, persistent=False)  # the recipe says it
    embedding.register_forward_pre_hook(_find)


def spread_scores(head: Any, vocabulary: Vocabulary) -> None:
    """Make an output projection of V' rows give logits [.., V]."""
    head.register_buffer("rows", torch.from_numpy(vocabulary.rows).clone(), persistent=False)
    head.register_forward_hook(_spread)


def _find(embedding: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (embedding.rows[args[0]], *args[1:])


def _spread(head: Any, args: Any, scores: Tensor) -> Tensor:
    low = torch.full_like(scores[..., :1], LOW)  # the row behind the last one
    return torch.cat([scores, low], dim=-1).index_select(-1, head.rows)


def whole(parts: Parts) -> str | None:
    """Why no row of the vocabulary can go; None if any can. Works on the meta device."""
    embedding, head = parts.language.get_input_embeddings(), parts.head
    others = [n for n, m in parts.language.named_modules() if isinstance(m, nn.Embedding) and m is not embedding]
    if others:
        return f"`{others[0]}` may be looked up by token too"
    if len(embedding.weight) != head.out_features:
        return f"the embedding has {len(embedding.weight)} rows, the output projection {head.out_features}"
    return None
