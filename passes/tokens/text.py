"""Methods that depend on the question.

They read it as the language model does, from its table of embeddings: towers without a text model of their own work
too, and nothing is added to the bundle.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...surgery.selection import Choice, TowerState
from .method import Method, Options, Place, Refusal, every_row
from .scores import mean_shares, min_max, shares, to_text, unit
from .select import coverage, dpp, greedy


def conditional(tokens: Tensor, relevance: Tensor) -> Tensor:
    """Kernel of a determinantal point process: cosines, weighted by the relevance of both: [B, N, d] -> [B, N, N].

    Args:
        relevance: not negative, [B, N].
    """
    rows = unit(tokens)
    index = torch.arange(rows.shape[1])
    similar = rows @ rows.transpose(1, 2)
    # A token is exactly like itself (or is all zeros): with equal relevance, rounding would choose the first token.
    similar = torch.where(index[:, None] == index, similar.round(), similar)
    return relevance[:, :, None] * similar * relevance[:, None]


def _cdpruner(state: TowerState, keep: int, options: Options) -> Choice:
    assert state.text is not None
    tokens, text = state.project(state.tokens), state.text
    # Of an empty question all cosines are 0, so that the relevance is 1 everywhere: diversity alone.
    relevance = min_max(options["sign"] * to_text(tokens, text.embeddings, text.mask))
    relevance = (options["theta"] / (2 * (1 - options["theta"])) * relevance).exp()
    return Choice(greedy(state, dpp(conditional(tokens, relevance)), keep))


def _refuse_cdpruner(place: Place, options: Options) -> Refusal | None:
    if options["sign"] not in (1, -1):
        return f"sign={options['sign']}", "choose 1, or -1 if a larger cosine means less relevance"
    if not 0 <= options["theta"] < 1:
        return f"theta={options['theta']}", "choose from 0, diversity alone, to less than 1"
    return None


def _mmtok(state: TowerState, keep: int, options: Options) -> Choice:
    assert state.text is not None
    text = mean_shares(state.text.embeddings, state.project(state.tokens), options["tau_tv"], state.text.mask)
    picture = shares(state.tokens, state.tokens, options["tau_vv"]) / state.count
    return Choice(greedy(state, coverage(torch.cat([text, options["alpha"] * picture], dim=1)), keep))


def _refuse_mmtok(place: Place, options: Options) -> Refusal | None:
    for name in ("tau_vv", "tau_tv"):
        if not options[name] > 0:
            return f"{name}={options[name]}", "choose a temperature above 0"
    if not options["alpha"] >= 0:
        return f"alpha={options['alpha']}", "choose 0, the question alone, or more"
    return None


ROWS = {
    "cdpruner": Method(
        title="CDPruner",
        source="arXiv:2506.10967",
        summary="tokens that are diverse and relevant to the question together, by a determinantal point process",
        projects=every_row,
        choose=_cdpruner,
        options={"sign": 1, "theta": 0.5},
        text=True,
        refuse=_refuse_cdpruner,
        differs="relevance is the cosine of projected tokens to the question's embeddings, the paper's way for towers "
        "without a text model, not that of CLIP's two towers; sign=1 takes a larger cosine for more relevance, the "
        "paper's CLIP form is sign=-1, and which one is right must be measured for each model; padding and an empty "
        "question leave no trace; theta weighs the relevance as exp(theta / (2 (1 - theta)) r)",
    ),
    "mmtok": Method(
        title="MMTok",
        source="arXiv:2508.18264",
        summary="tokens that cover both the question and the picture best, greedily",
        projects=every_row,
        choose=_mmtok,
        options={"alpha": 0.5, "tau_vv": 0.2, "tau_tv": 0.02},
        text=True,
        refuse=_refuse_mmtok,
        differs="the whole question counts: no words are left out and no other model rewrites it; the paper takes "
        "tau_tv=0.01 for Qwen",
    ),
}
