"""Methods inside the tower: schedules, merging by loops, the whole tower in NumPy, graphs, and what is refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from vlmcut.errors import ModelError, PassError
from vlmcut.exporters.components import components
from vlmcut.exporters.graphs import keeping
from vlmcut.exporters.onnx import export
from vlmcut.exporters.operators import Contrib, Operators, Standard
from vlmcut.manifest import TokenBudget
from vlmcut.passes.drop_heads import DropHeads
from vlmcut.passes.drop_layers import DropLayers
from vlmcut.passes.prune_tokens import PruneTokens
from vlmcut.passes.quantize import Quantize
from vlmcut.passes.recipe import make
from vlmcut.passes.tokens.methods import METHODS, TableSelector
from vlmcut.passes.tokens.tower import attended, depart, even, ladder, least, merge
from vlmcut.prompt import Picture
from vlmcut.surgery.costs import costs
from vlmcut.surgery.load import Loaded, describe, locate
from vlmcut.surgery.merging import between, pre_norm, prove, rigid
from vlmcut.surgery.selection import Rows, Tap, attached
from vlmcut.surgery.vision import Seen, prepare, see
from vlmcut.validation import reference
from vlmcut.validation.exactness import _Kept

SPECS = ("tome", "tome:proportional=false", "turbo", "turbo:alpha=0.5", "early-exit", "early-exit:fuse=true")


# --- how many leave where -------------------------------------------------------------------------------------------


@given(st.integers(1, 700), st.integers(1, 27), st.data())
def test_even_reaches_every_count_that_pairs_can(tokens: int, blocks: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(least(tokens, blocks), tokens))
    found, left = even(tokens, keep, blocks), tokens
    assert len(found) == blocks and sum(found) == tokens - keep
    for count in found:
        assert 0 <= count <= left // 2
        left -= count
    if found[-1] * 2 < left:  # nobody was short of pairs: alike, the remainder first
        assert max(found) - min(found) <= 1 and list(found) == sorted(found, reverse=True)


def test_least_is_the_least() -> None:
    assert [least(16, blocks) for blocks in (1, 2, 3, 4, 5)] == [8, 4, 2, 1, 1]
    assert least(577, 2) == 145  # odd counts keep the odd one: 577, 289, 145
    assert even(16, 1, 4) == (8, 4, 2, 1) and even(16, 9, 4) == (2, 2, 2, 1) and even(16, 16, 4) == (0, 0, 0, 0)


@given(st.integers(1, 700), st.integers(1, 27), st.data())
def test_ladder_counts(tokens: int, blocks: int, data: st.DataObject) -> None:
    keep, steps = data.draw(st.integers(1, tokens)), data.draw(st.integers(1, blocks))
    found = ladder(tokens, keep, blocks, steps)
    assert len(found) == blocks and sum(found) == tokens - keep and min(found) >= 0
    assert sum(count > 0 for count in found) <= steps


def test_ladder_is_evits() -> None:
    """Twelve blocks: the fourth, seventh and tenth, by the same fraction, here a half each."""
    assert ladder(64, 8, 12, 3) == (0, 0, 0, 32, 0, 0, 16, 0, 0, 8, 0, 0)


# --- one step, by loops ---------------------------------------------------------------------------------------------


def synthetic(n: int, cls: bool, seed: int, duplicates: bool, batch: int = 1) -> Rows:
    """Rows as a block would show them, float64; sizes and places as earlier merges may have left them."""
    rng = np.random.default_rng(seed)
    alike = rng.integers(0, max(1, n // 2), n) if duplicates else np.arange(n)

    def draw(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape)[..., alike, :])

    size = torch.from_numpy(rng.integers(1, 5, (batch, n)).astype(float))
    place = torch.from_numpy(np.stack([rng.permutation(2 * n)[:n] for _ in range(batch)]))
    if cls:
        place[:, 0], size[:, 0] = -1, 1
    tap = Tap(0, ((draw(batch, 2, n, 3), draw(batch, 2, n, 3)),), 0.7)
    return Rows(draw(batch, n, 4), size, place, cls, 2 * n, proportional=bool(seed % 2), tap=tap)


ROWS = st.builds(synthetic, st.integers(4, 13), st.booleans(), st.integers(0, 99), st.just(False))
COPIES = st.builds(synthetic, st.integers(6, 13), st.booleans(), st.integers(0, 99), st.just(True))


def key_cosine(k: np.ndarray, a: int, b: int) -> float:
    """methods.md B1: keys averaged over heads; cosine, norms clamped at 1e-8."""
    x, y = k[:, a].mean(axis=0), k[:, b].mean(axis=0)
    return float((x / max(1e-8, np.linalg.norm(x))) @ (y / max(1e-8, np.linalg.norm(y))))


def received(q: np.ndarray, k: np.ndarray, scale: float, log_size: np.ndarray, cls: bool) -> np.ndarray:
    """Attention of row 0, or of all rows, mean over heads and rows; q, k [heads, n, head_dim]."""
    total = np.zeros(k.shape[1])
    asking = [0] if cls else range(q.shape[1])
    for head in range(len(q)):
        for row in asking:
            e = np.exp(np.array([q[head, row] @ k[head, j] for j in range(k.shape[1])]) * scale + log_size)
            total += e / e.sum()
    return total / (len(q) * len(asking))


State = tuple[np.ndarray, list[float], list[int]]  # rows [n, d], size and place of each


def merge_by_loops(x: np.ndarray, size: Any, place: Any, k: np.ndarray, penalty: Any, cls: bool, count: int) -> State:
    """methods.md B1 and B2."""
    n = len(x)
    evens, odds = range(0, n, 2), list(range(1, n, 2))
    best: dict[int, tuple[float, int]] = {}
    for a in evens:
        cosines = [key_cosine(k, a, b) for b in odds]
        b = max(range(len(odds)), key=lambda j: (cosines[j], -j))
        best[a] = -math.inf if cls and a == 0 else cosines[b] - penalty[a], odds[b]
    sources = sorted(evens, key=lambda a: (-best[a][0], a))[:count]
    out, sizes, places = [], [], []
    for row in [a for a in evens if a not in sources] + odds:
        group = [row] + [a for a in sources if best[a][1] == row and row % 2]
        sizes.append(sum(size[i] for i in group))
        out.append(sum(size[i] * x[i] for i in group) / sizes[-1])
        places.append(place[row])
    return np.array(out), sizes, places


def exit_by_loops(x: np.ndarray, size: Any, place: Any, score: np.ndarray, cls: bool, count: int, fuse: bool) -> State:
    """EViT, section 3.2; the fused token is a mean, and stands where the best of those that leave stood."""
    order = sorted(range(int(cls), len(x)), key=lambda i: (-float(score[i]), i))
    left = len(order) - count - fuse
    stay = [0] * cls + sorted(order[:left])
    out, sizes, places = [x[i] for i in stay], [size[i] for i in stay], [place[i] for i in stay]
    if fuse:
        gone = order[left:]
        out.append(sum(score[i] * x[i] for i in gone) / sum(score[i] for i in gone))
        sizes.append(sum(size[i] for i in gone))
        places.append(place[gone[0]])
    return np.array(out), sizes, places


def plain(rows: Rows) -> dict[str, Any]:
    return {"x": rows.x[0].numpy(), "size": rows.size[0].tolist(), "place": rows.place[0].tolist()}


def taps(rows: Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    assert rows.tap is not None
    ((q, k),) = rows.tap.rows
    return q[0].numpy(), k[0].numpy(), np.log(rows.size[0].numpy()) if rows.proportional else np.zeros(q.shape[2])


def equal(rows: Rows, want: State) -> None:
    assert rows.place[0].tolist() == want[2] and rows.size[0].tolist() == want[1]  # sums of small integers: exact
    np.testing.assert_allclose(rows.x[0].numpy(), want[0], rtol=0, atol=1e-12)  # float64, few terms; measured 1e-15


@given(ROWS, st.data())
def test_merge_by_loops(rows: Rows, data: st.DataObject) -> None:
    n = rows.x.shape[1]
    count = data.draw(st.integers(1, (n - rows.has_cls) // 2))
    q, k, log_size = taps(rows)
    penalty = torch.zeros(1, n, dtype=torch.float64)
    if data.draw(st.booleans()):
        penalty = 3 * attended(rows)
        want = 3 * received(q, k, 0.7, log_size, rows.has_cls)
        np.testing.assert_allclose(penalty[0].numpy(), want, rtol=0, atol=1e-12)  # float64; measured 4e-16
    cut = merge(rows, count, penalty)
    equal(cut, merge_by_loops(**plain(rows), k=k, penalty=penalty[0].tolist(), cls=rows.has_cls, count=count))
    assert cut.x.shape[1] == n - count and float(cut.size.sum()) == float(rows.size.sum())
    if rows.has_cls:
        assert torch.equal(cut.x[:, 0], rows.x[:, 0]) and int(cut.place[0, 0]) == -1
    total = (rows.x * rows.size[..., None]).sum(dim=1)  # weighted by size, nothing is lost
    torch.testing.assert_close((cut.x * cut.size[..., None]).sum(dim=1), total, rtol=0, atol=1e-12)


@given(COPIES)
def test_copies_merge_first(rows: Rows) -> None:
    """As many as have a copy at an odd place: no row changes, for a mean of copies is their value."""
    x = rows.x[0]
    twins = [a for a in range(2 * rows.has_cls, len(x), 2) if any(torch.equal(x[a], x[b]) for b in range(1, len(x), 2))]
    cut = merge(rows, len(twins)) if twins else rows
    assert cut.x.shape[1] == len(x) - len(twins)
    far = (cut.x[0][:, None] - x[None]).abs().amax(dim=-1).amin(dim=-1)
    assert float(far.max()) < 1e-12  # float64 means; measured 1e-15
    more = (len(x) - rows.has_cls) // 2
    if len(twins) < more:  # one more has no copy, and is mixed with another
        far = (merge(rows, len(twins) + 1).x[0][:, None] - x[None]).abs().amax(dim=-1).amin(dim=-1)
        assert float(far.max()) > 1e-6


@given(ROWS, st.data())
def test_depart_by_loops(rows: Rows, data: st.DataObject) -> None:
    n, fuse = rows.x.shape[1], data.draw(st.booleans())
    count = data.draw(st.integers(1, n - rows.has_cls - 1))
    q, k, log_size = taps(rows)
    score = received(q, k, 0.7, log_size, rows.has_cls)
    cut = depart(rows, count, fuse)
    equal(cut, exit_by_loops(**plain(rows), score=score, cls=rows.has_cls, count=count, fuse=fuse))
    assert len(set(cut.place[0].tolist())) == n - count


@pytest.mark.parametrize("step", [lambda r: merge(r, 3), lambda r: depart(r, 3, True), lambda r: depart(r, 3, False)])
@pytest.mark.parametrize("cls", [True, False])
def test_pictures_of_a_batch_do_not_see_each_other(step: Callable[[Rows], Rows], cls: bool) -> None:
    rows = synthetic(9, cls, 3, False, batch=3)
    assert rows.tap is not None
    ((q, k),) = rows.tap.rows
    whole = step(rows)
    for i in range(3):
        one = slice(i, i + 1)
        alone = replace(
            rows, x=rows.x[one], size=rows.size[one], place=rows.place[one],
            tap=replace(rows.tap, rows=((q[one], k[one]),)),
        )  # fmt: skip
        for have, want in zip(vars(whole).values(), vars(step(alone)).values(), strict=True):
            if isinstance(have, torch.Tensor):
                torch.testing.assert_close(have[one], want, rtol=0, atol=1e-12)  # float64, as above


def test_ties_go_to_the_lower_place() -> None:
    """All keys and queries alike: the first pairs merge, all into the first odd row, and the first tokens stay."""
    rows = synthetic(9, True, 0, False)
    alike = torch.ones(1, 2, 9, 3, dtype=torch.float64)
    rows = replace(rows, place=torch.arange(9)[None] - 1, tap=Tap(0, ((alike, alike),), 1.0))
    cut = merge(rows, 2)
    assert cut.place[0].tolist() == [-1, 5, 7, 0, 2, 4, 6]  # rows 2 and 4, places 1 and 3, met row 1
    assert depart(rows, 5, False).place[0].tolist() == [-1, 0, 1, 2]


def test_half_precision_comes_back_and_is_summed_wide() -> None:
    rows = synthetic(9, True, 4, False)
    half = rows.x.half()
    small = Rows.whole(half, True).seen(Tap(0, ((half[:, None], half[:, None]),), 1.0))
    for cut in (merge(small, 3), depart(small, 3, True)):
        assert cut.x.dtype == torch.float16 and cut.size.dtype == torch.float32
        assert cut.x.isfinite().all()
    bias = replace(merge(small, 3), proportional=True).bias(torch.float16)
    assert bias is not None and bias.dtype == torch.float16 and bias.shape == (1, 1, 1, 6)


# --- in a tower -----------------------------------------------------------------------------------------------------


def pruned(loaded: Loaded, keep: int, method: str) -> Loaded:
    make([PruneTokens(keep=keep, method=method)]).apply(loaded.model, None)
    return loaded


def pixels(model: Any, seed: int = 5) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(attached(model).buckets[0].geometry["pixel_values"], generator=rng, dtype=torch.float64)


@torch.no_grad()
def seen_by(model: Any, seed: int = 5) -> Seen:
    about = attached(model)
    return see(model, pixels(model, seed).to(model.dtype), prepare(model, about.buckets[0].geometry), about.keep(0))


def never(rows: Rows, count: int) -> Rows:
    raise AssertionError("nothing was to leave")


NOTHING: Any = (dict.fromkeys(range(4)), (0,) * 4, never, False)  # of the four blocks of either tower


@pytest.mark.parametrize("spec", SPECS)
def test_nothing_leaves_nothing_changes(kind: str, spec: str, tiny) -> None:
    want = seen_by(tiny(kind).model)
    loaded = pruned(tiny(kind), 16, spec)
    assert describe(loaded.model).leaving == ()
    assert torch.equal(seen_by(loaded.model).features, want.features)
    # And through the hook, which `keep = all` goes round: no step is asked, no bit moves.
    layers, about = locate(loaded.model).tower_layers, attached(loaded.model)
    about.selection = None
    with between(layers, *NOTHING):
        again = seen_by(loaded.model)
    assert torch.equal(again.features, want.features)
    assert not any("forward" in vars(layer) for layer in layers)


def test_the_hook_leaves_blocks_alone_after_an_error(tiny) -> None:
    layers = locate(tiny("llava").model).tower_layers[:4]
    with pytest.raises(ZeroDivisionError), between(layers, *NOTHING):
        assert all("forward" in vars(layer) for layer in layers)
        raise ZeroDivisionError
    assert not any("forward" in vars(layer) for layer in layers)


def tower_by_loops(model: Any, x: np.ndarray, spec: str, leaving: tuple[int, ...]) -> tuple[np.ndarray, list[int]]:
    """The whole tower in NumPy from what its embeddings gave, [n, d]: blocks as CLIP and SigLIP write them."""
    name, *given = spec.split(":")
    options = dict(pair.split("=") for pair in given)
    proportional = name in ("tome", "turbo") and options.get("proportional") != "false"
    vision, cls = model.config.vision_config, model.config.vision_config.model_type == "clip_vision_model"
    size, place, heads = [1.0] * len(x), list(range(-cls, len(x) - cls)), vision.num_attention_heads
    patches, merged = len(x) - cls, False

    def weights(module: Any) -> tuple[np.ndarray, np.ndarray]:
        return module.weight.detach().numpy(), module.bias.detach().numpy()

    def linear(module: Any, x: np.ndarray) -> np.ndarray:
        w, b = weights(module)
        return x @ w.T + b

    def norm(module: Any, x: np.ndarray) -> np.ndarray:
        w, b = weights(module)
        mean, var = x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True)
        return (x - mean) / np.sqrt(var + module.eps) * w + b

    def activation(x: np.ndarray) -> np.ndarray:
        if vision.hidden_act == "quick_gelu":
            return x / (1 + np.exp(-1.702 * x))
        assert vision.hidden_act == "gelu_pytorch_tanh"
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    for block, count in zip(locate(model).tower_layers, leaving, strict=True):
        y, attention = norm(block.layer_norm1, x), block.self_attn
        q, k, v = (
            linear(m, y).reshape(len(x), heads, -1).transpose(1, 0, 2)
            for m in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        scale = q.shape[-1] ** -0.5
        log_size = np.log(size) if proportional and merged else np.zeros(len(x))
        e = np.exp(q @ k.transpose(0, 2, 1) * scale + log_size)
        mixed = (e / e.sum(axis=-1, keepdims=True)) @ v
        x = x + linear(attention.out_proj, mixed.transpose(1, 0, 2).reshape(len(x), -1))
        if count:
            got = received(q, k, scale, log_size, cls)
            if name == "early-exit":
                x, size, place = exit_by_loops(x, size, place, got, cls, count, options.get("fuse") == "true")
            else:
                factor = 30 * float(options.get("alpha", 5)) * (patches + 1) / 577 if name == "turbo" else 0.0
                x, size, place = merge_by_loops(x, size, place, k, factor * got, cls, count)
            merged = True
        x = x + linear(block.mlp.fc2, activation(linear(block.mlp.fc1, norm(block.layer_norm2, x))))
    x, place = x[int(cls) :], place[int(cls) :]
    order = np.argsort(place)
    return x[order], [place[i] for i in order]


@pytest.mark.parametrize("keep", [1, 7, 15])
@pytest.mark.parametrize("spec", SPECS)
def test_a_whole_tower_by_loops(kind: str, spec: str, keep: int, tiny) -> None:
    loaded = pruned(tiny(kind), keep, spec)
    exact, a = reference.truth(loaded.model), describe(loaded.model)
    found: list[np.ndarray] = []
    hook = locate(exact).tower_layers[0].register_forward_pre_hook(lambda m, args: found.append(args[0][0].numpy()))
    mine = seen_by(exact)
    hook.remove()
    x, place = tower_by_loops(exact, found[0], spec, a.leaving[0])
    assert mine.kept.tolist() == place == sorted(set(place)) and len(place) == keep
    projector = locate(exact).projector
    assert projector is not None
    with torch.no_grad():
        want = projector(torch.from_numpy(x)[None])[0]
    torch.testing.assert_close(mine.features, want, rtol=0, atol=1e-10)  # float64 through four blocks; measured 1e-14


def test_two_identical_tokens_are_one_of_size_two(kind: str, tiny) -> None:
    """methods.md 7: with sizes in the attention, merging copies changes what nobody sees."""
    block = copy.deepcopy(locate(tiny(kind).model).tower_layers[0]).double()
    parts = pre_norm(block)
    assert parts is not None
    rng = torch.Generator().manual_seed(0)
    width: Any = parts.norm1.weight
    x = torch.randn(1, 6, len(width), generator=rng, dtype=torch.float64)
    x[:, 2] = x[:, 1]
    with torch.no_grad():
        q = parts.norm1(x)[:, None]  # keys whose cosine is 1 for copies alone
        rows = merge(Rows.whole(x, False).seen(Tap(0, ((q, q),), 1.0)), 1)
        assert rows.place.tolist() == [[0, 4, 1, 3, 5]] and rows.size.tolist() == [[1, 1, 2, 1, 1]]
        whole = parts.think(parts.attend(x, None))[:, [0, 4, 1, 3, 5]]
        sized = parts.think(parts.attend(rows.x, replace(rows, proportional=True).bias(torch.float64)))
        plain = parts.think(parts.attend(rows.x, None))
    torch.testing.assert_close(sized, whole, rtol=0, atol=1e-12)  # float64; measured 1e-15
    assert float((plain - whole).abs().max()) > 1e-3


def test_turbo_without_alpha_is_tome(kind: str, tiny) -> None:
    want, have, other = (seen_by(pruned(tiny(kind), 6, m).model) for m in ("tome", "turbo:alpha=0", "turbo"))
    assert torch.equal(have.kept, want.kept) and torch.equal(have.features, want.features)
    assert not torch.equal(other.features, want.features)


@pytest.mark.parametrize("spec", SPECS)
def test_it_fires(kind: str, spec: str, tiny, logits) -> None:
    """Fewer columns, other logits, other features than the same places taken after the whole tower."""
    before = logits(tiny(kind))
    loaded = pruned(tiny(kind), 8, spec)
    after = logits(loaded)
    assert before.shape[1] - after.shape[1] == 2 * 8 and not torch.equal(after[:, -1], before[:, -1])
    mine, whole = seen_by(loaded.model), seen_by(tiny(kind).model)
    assert mine.features.shape[0] == 8
    assert float((mine.features - whole.features[mine.kept]).abs().max()) > 1e-4


@pytest.mark.parametrize("spec", ["tome", "early-exit"])
def test_work_falls(kind: str, spec: str, tiny) -> None:
    """Predicted as a loop over blocks counts it."""
    loaded = tiny(kind)
    make([]).apply(loaded.model, None)
    full, cut = describe(loaded.model), describe(pruned(loaded, 8, spec).model)
    t, n = full.tower, sum(full.segments[0])
    saved, left = 0, 0
    for heads, neurons, count in zip(t.heads, t.intermediate, cut.leaving[0], strict=True):
        width = heads * t.head_dim
        saved += 2 * left * 4 * t.hidden * width + 4 * (n**2 - (n - left) ** 2) * width
        left += count
        saved += 2 * left * t.matrices * t.hidden * neurons
    assert left == 8 and saved > 0
    assert costs(full)[0].flops - costs(cut)[0].flops == saved
    assert costs(full)[0].parameters == costs(cut)[0].parameters


# --- in a graph -----------------------------------------------------------------------------------------------------

BUDGET = TokenBudget(images=1, visual_tokens=7, text_tokens=9, new_tokens=4)


def vision_graph(loaded: Loaded, operators: Operators) -> Any:
    """The vision graph as ONNX Runtime's session."""
    with keeping(loaded.model, (BUDGET.visual_tokens,)):
        made = export(components(loaded.model, BUDGET, (BUDGET.visual_tokens,))[0], loaded.model, operators)
    assert not {node.op_type for node in made.graph} & {"NonZero", "Loop", "If", "Unique", "ScatterND"}
    for value in (*made.graph.inputs, *made.graph.outputs):
        assert value.shape is not None and all(isinstance(d, int) for d in value.shape)
    return ort.InferenceSession(ir.to_proto(made).SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    ("model", "spec", "operators"),
    [
        ("llava", "turbo", Contrib()),
        ("llava", "tome", Standard()),
        ("llava-siglip-qwen2", "tome", Contrib()),
        ("llava-siglip-qwen2", "early-exit:fuse=true", Contrib()),
    ],
)
def test_graphs_are_eager(model: str, spec: str, operators: Operators, tiny) -> None:
    loaded = pruned(tiny(model), BUDGET.visual_tokens, spec)
    session = vision_graph(loaded, operators)
    for seed in range(4):
        want = seen_by(loaded.model, seed)
        feeds = {"pixel_values": pixels(loaded.model, seed).float().numpy()}
        features, kept = session.run(["image_features", "kept"], feeds)
        assert kept.tolist() == [want.kept.tolist()]
        # float32 through four blocks, sums in another order; measured 1.2e-6
        np.testing.assert_allclose(features, want.features.numpy(), rtol=0, atol=1e-5)


def test_what_a_runtime_kept_is_judged_exactly(tiny) -> None:
    loaded = pruned(tiny("llava"), 7, "tome")
    exact, picture = reference.truth(loaded.model), Picture(
        pixels(loaded.model).float().numpy(), attached(loaded.model).buckets[0].geometry
    )  # fmt: skip
    right = reference.see(exact, picture).kept[None]
    verdict = _Kept()
    verdict.look(loaded.model, exact, picture, right)
    assert verdict.regret == 0 and verdict.note == "equal on 1 images"
    other = right.clone()
    other[0, -1] = next(i for i in range(15, 0, -1) if i not in right[0].tolist())
    verdict.look(loaded.model, exact, picture, other.sort().values)
    assert verdict.regret == math.inf
    assert verdict.note == "other tokens on 1 of 2 images; inside the tower near ties cannot be judged"
    # What comes after is compared on the model's own tokens, whatever a runtime kept.
    forced = reference.see(loaded.model, picture, other.sort().values)
    assert torch.equal(forced.kept, right[0])


# --- with other passes, and refusals --------------------------------------------------------------------------------


def test_with_other_cuts(kind: str, tiny, logits) -> None:
    """Layers before, heads before or after: planned whole, found after."""
    loaded = tiny(kind)
    full = describe(loaded.model)
    one = 1 / full.tower.heads[0]
    last = [i for i in range(full.tower.heads[0]) if i]
    recipe = make(
        [
            DropLayers(part="vision", count=1, drop=(1,)),
            PruneTokens(keep=6, method="tome"),
            DropHeads(part="vision", fraction=one, keep=(tuple(last),) * 3),
            DropLayers(part="language", count=1, drop=(0,)),
            Quantize(parts=("language",)),
        ]
    )
    planned = recipe.plan(full)
    assert planned.leaving == ((4, 3, 3),)
    recipe.apply(loaded.model, None)
    assert describe(loaded.model) == planned
    assert logits(loaded).isfinite().all()


def refused(a: Any, *passes: Any) -> str:
    with pytest.raises(PassError) as error:
        make(passes).plan(a)
    return str(error.value)


@pytest.mark.parametrize("family", ["llava_next", "gemma3", "qwen2_vl", "idefics3", "internvl"])
@pytest.mark.parametrize("spec", ["tome", "turbo", "early-exit"])
def test_families_whose_tokens_are_no_rows(family: str, spec: str, tiny) -> None:
    a = describe(tiny(family).model)
    assert "one for one, so none can leave inside it" in refused(
        a, PruneTokens(keep=a.visual_tokens - 1, method=spec, line_breaks="compete")
    )


def test_paligemma_can(tiny) -> None:
    loaded = pruned(tiny("paligemma"), 6, "tome")
    assert describe(loaded.model).tower.rigid is None and seen_by(loaded.model).features.shape[0] == 6


def test_budgets_that_cannot_be_met(tiny) -> None:
    a = describe(tiny("llava").model)
    assert refused(replace(a, tower=replace(a.tower, heads=a.tower.heads[:3], feature_layer=3)),
                   PruneTokens(keep=1, method="tome")) == (
        "prune-tokens: keep=1, but merging pairs in 3 blocks leaves 2 of 16 tokens"
    )  # fmt: skip
    for steps in (0, 5):
        assert f"steps={steps} in a tower of 4 blocks" in refused(
            a, PruneTokens(keep=4, method=f"early-exit:steps={steps}")
        )
    with pytest.raises(PassError, match="still has 5 layers of which 4"):
        PruneTokens(keep=8, method="tome").plan(a)
    clip = replace(a.buckets[0], frames=2)
    assert "a clip of 2 frames" in refused(replace(a, buckets=(clip,)), PruneTokens(keep=8, method="tome"))


def test_order_of_passes(tiny) -> None:
    a = describe(tiny("llava").model)
    tome = PruneTokens(keep=8, method="tome")
    assert "`tome` counts on the 4 blocks" in refused(a, tome, DropLayers(part="vision", count=1))
    assert "int8 already" in refused(a, Quantize(), tome)
    assert "int8 steps move which ones" in refused(a, tome, Quantize())
    make([PruneTokens(keep=16, method="tome"), Quantize()]).plan(a)  # nothing leaves
    assert "near ties cannot be judged" in tome.notes(a)[-1]


def test_only_plain_blocks_are_taken(tiny) -> None:
    blocks = locate(tiny("llava").model).tower_layers
    assert rigid(blocks) is None and rigid([]) is not None
    prove(blocks)
    scaled = copy.deepcopy(blocks)
    scaled[1].lambda_1 = nn.Parameter(torch.ones(4))
    assert rigid(scaled) == "its tower is not a stack of plain pre-norm blocks"
    third = copy.deepcopy(blocks)
    third[0].extra = nn.Linear(2, 2)
    assert rigid(third) is not None


def test_a_block_that_computes_something_else_is_found(tiny) -> None:
    """Negative control: the same four modules, put together in another way."""
    blocks = locate(tiny("llava").model).tower_layers

    class Parallel(type(blocks[0])):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor, attention_mask: Any, **_: Any) -> torch.Tensor:
            out = hidden_states + self.self_attn(hidden_states=self.layer_norm1(hidden_states))[0]
            return out + self.mlp(self.layer_norm2(hidden_states))

    before = {n: p.clone() for n, p in blocks[2].named_parameters()}
    blocks[2].__class__ = Parallel
    assert rigid(blocks) is None
    with pytest.raises(ModelError, match="tower block 2 of type `Parallel`"):
        prove(blocks)
    assert all(torch.equal(p, before[n]) for n, p in blocks[2].named_parameters())  # proved on a copy


def test_rows_say_where_they_work() -> None:
    inside = {name for name, row in METHODS.items() if row.inside is not None}
    assert inside == {"tome", "turbo", "early-exit"}
    for name, row in METHODS.items():
        assert (row.stage == "inside the tower") == (name in inside)
        assert (TableSelector(name).leaving(16, 8, 4) != ()) == (name in inside)
