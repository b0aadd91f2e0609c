"""Neurons that leave: against masked ones, planted ones, other processes of loading, and every must family."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vlmcut
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForImageTextToText
from vlmcut import pipeline
from vlmcut.errors import PassError
from vlmcut.passes import folder
from vlmcut.passes.base import PARTS
from vlmcut.passes.calibration import observe, read_calibration
from vlmcut.passes.drop_heads import DropHeads
from vlmcut.passes.drop_layers import DropLayers
from vlmcut.passes.drop_neurons import CHUNKS, DropNeurons, neuron_importance, shared_loss
from vlmcut.passes.importance import RANKINGS, best_of_all, best_of_each, over_mean
from vlmcut.passes.prune_tokens import PruneTokens
from vlmcut.passes.quantize import Quantize
from vlmcut.passes.recipe import make, parse
from vlmcut.pipeline import Request
from vlmcut.surgery import tiny as tiny_models
from vlmcut.surgery.costs import costs
from vlmcut.surgery.families import family_of
from vlmcut.surgery.load import Loaded, attach, describe, locate
from vlmcut.surgery.neurons import Mlp, find_mlp, solid
from vlmcut.surgery.selection import attached

from .cut_helpers import MUST, answered, cut, divergence, read

# float32: the same terms without the zeros, summed in another order; logits are of size 3. Measured on x86 with one
# thread: at most 3.4e-6.
ATOL = 2e-5


def mlps(model: Any, part: str) -> list[Mlp]:
    parts = locate(model)
    found = [find_mlp(block) for block in (parts.tower_layers if part == "vision" else parts.language_layers)]
    return [mlp for mlp in found if mlp is not None]


@contextmanager
def masked(model: Any, part: str, keep: Sequence[Sequence[int]]) -> Iterator[None]:
    """While inside, every other neuron is zero where it is read."""
    hooks = []
    for mlp, kept in zip(mlps(model, part), keep, strict=True):
        stays = torch.zeros(mlp.neurons)
        stays[list(kept)] = 1
        hooks.append(mlp.reads.register_forward_pre_hook(lambda _, args, stays=stays: (args[0] * stays, *args[1:])))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", MUST)
def test_neurons_equal_masked_activations(kind: str, part: str, tiny, prompt) -> None:
    """Gated MLPs and plain ones, with biases and without; prefill and 16 steps of decode."""
    shorter, whole = tiny(kind), tiny(kind)
    ranking = RANKINGS[MUST.index(kind) % 2]
    done = cut(shorter, DropNeurons(part=part, fraction=0.3, ranking=ranking)).passes[1]
    assert isinstance(done, DropNeurons) and done.keep is not None
    cut(whole)
    before, _ = read(whole, prompt(whole))
    have, tokens = read(shorter, prompt(shorter))
    with masked(whole.model, part, done.keep):
        want, _ = read(whole, prompt(whole), tokens)
    torch.testing.assert_close(have, want, rtol=0, atol=ATOL)
    assert (have[0] - before[0]).abs().max() > 1e-3


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl", "lfm2_vl"])
def test_planted_dead_neurons_go_first(kind: str, part: str, ranking: str, tiny) -> None:
    """Zero columns add nothing whatever is in them; and what they leave behind changes nothing."""
    loaded = tiny(kind)
    cut(loaded)
    found = mlps(loaded.model, part)
    total = found[0].neurons
    dead = [sorted({(7 * layer + 5 * i) % total for i in range(4)}) for layer in range(len(found))]
    for mlp, columns in zip(found, dead, strict=True):
        mlp.reads.weight.data[:, columns] = 0
    a = describe(loaded.model)
    step = DropNeurons(part=part, fraction=4 / total, ranking=ranking)
    done = step.resolve(loaded.model, a, read_calibration(loaded, None))
    assert done.keep == tuple(tuple(i for i in range(total) if i not in gone) for gone in dead)


@pytest.mark.parametrize("part", PARTS)
def test_importance_by_a_loop(part: str, tiny) -> None:
    """What the pass measures is the mean over every row of every prompt, in NumPy."""
    loaded = tiny("llava")
    cut(loaded)
    data = read_calibration(loaded, None)
    found = mlps(loaded.model, part)
    rows: list[list[np.ndarray]] = [[] for _ in found]
    observe(
        loaded.model, [mlp.reads for mlp in found], lambda i, args, _: rows[i].append(args[0].flatten(0, -2).numpy()),
        data,
    )  # fmt: skip
    keep = []
    for mlp, seen in zip(found, rows, strict=True):
        activations = np.concatenate(seen).astype(np.float64)
        assert len(activations) > 8 * 16
        weight = mlp.reads.weight.detach().numpy().astype(np.float64)
        importance = [
            np.mean([abs(row[i]) for row in activations]) * np.sqrt((weight[:, i] ** 2).sum())
            for i in range(mlp.neurons)
        ]
        order = np.argsort(-np.array(importance), kind="stable")
        keep.append(tuple(sorted(order[: mlp.neurons // 2].tolist())))
        got = neuron_importance(torch.from_numpy(np.abs(activations).mean(axis=0)), mlp.reads.weight.detach())
        np.testing.assert_allclose(got.numpy(), importance, rtol=1e-12)  # float64 both; measured 5e-16
    a = describe(loaded.model)
    assert DropNeurons(part=part, fraction=0.5).resolve(loaded.model, a, data).keep == tuple(keep)


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl", "internvl"])
def test_planted_silent_neurons_are_never_active(kind: str, part: str, ranking: str, tiny) -> None:
    """A neuron that is below 0 or 0 goes before one that is above at some token; of plain MLPs and gated ones."""
    loaded = tiny(kind)
    cut(loaded)
    found = mlps(loaded.model, part)
    total = found[0].neurons
    dead = [sorted({(7 * layer + 5 * i) % total for i in range(4)}) for layer in range(len(found))]
    for mlp, rows in zip(found, dead, strict=True):
        last = mlp.makes[-1]  # up, or fc1, whose activation makes -1 negative
        last.weight.data[rows] = 0
        if last.bias is not None:
            last.bias.data[rows] = 0 if len(mlp.makes) == 2 else -1
    a = describe(loaded.model)
    step = DropNeurons(part=part, fraction=4 / total, ranking=ranking, importance="activity")
    done = step.resolve(loaded.model, a, read_calibration(loaded, None))
    assert done.keep == tuple(tuple(i for i in range(total) if i not in gone) for gone in dead)


@pytest.mark.parametrize("part", PARTS)
def test_activity_by_a_loop(part: str, tiny) -> None:
    """The share of all rows of all prompts at which what the last projection reads is above 0, in NumPy."""
    loaded = tiny("llava")
    cut(loaded)
    data = read_calibration(loaded, None)
    reads = [mlp.reads for mlp in mlps(loaded.model, part)]
    rows: list[list[np.ndarray]] = [[] for _ in reads]
    observe(loaded.model, reads, lambda i, args, _: rows[i].append(args[0].flatten(0, -2).numpy()), data)
    shares = [(np.concatenate(seen) > 0).mean(axis=0) for seen in rows]
    a = describe(loaded.model)
    each = DropNeurons(part=part, fraction=0.5, importance="activity").resolve(loaded.model, a, data).keep
    half = [len(share) - round(len(share) / 2) for share in shares]
    order = [np.argsort(-share, kind="stable") for share in shares]
    assert each == tuple(tuple(sorted(o[:n].tolist())) for o, n in zip(order, half, strict=True))
    # Together: a share is a share in every layer, and is not divided by the layer's mean.
    step = DropNeurons(part=part, fraction=0.5, importance="activity", ranking="global")
    assert step.resolve(loaded.model, a, data).keep == best_of_all([torch.from_numpy(s) for s in shares], sum(half))


@pytest.mark.parametrize("part", PARTS)
def test_loss_is_what_the_answers_lose_without_a_chunk(part: str, tiny) -> None:
    """Masked neurons of the whole model, and the divergence of its answers by another loop, prompt by prompt."""
    loaded = tiny("llava")
    cut(loaded)
    data, found = read_calibration(loaded, None), mlps(loaded.model, part)
    before, said = answered(loaded)
    importance = []
    for layer, mlp in enumerate(found):
        rows: list[np.ndarray] = []
        observe(loaded.model, [mlp.reads], lambda i, args, _, to=rows: to.append(args[0].flatten(0, -2).numpy()), data)
        magnitude = np.abs(np.concatenate(rows).astype(np.float64)).mean(axis=0)
        worth = magnitude * np.linalg.norm(mlp.reads.weight.detach().numpy().astype(np.float64), axis=0)
        for chunk in np.array_split(np.argsort(-worth, kind="stable"), 8):
            stays = [tuple(range(one.neurons)) for one in found]
            stays[layer] = tuple(i for i in stays[layer] if i not in chunk)
            with masked(loaded.model, part, stays):
                worth[chunk] *= divergence(before, answered(loaded, said)[0]) / worth[chunk].sum()
        importance.append(torch.from_numpy(worth))
    a, half = describe(loaded.model), found[0].neurons // 2
    step = DropNeurons(part=part, fraction=0.5, importance="loss", ranking="global")
    done = step.resolve(loaded.model, a, data)
    assert done.keep == best_of_all(importance, half * len(found))
    assert done.keep is not None and len({len(kept) for kept in done.keep}) > 1  # widths follow the loss
    (note,) = [n for n in step.notes(a) if "left out once" in n]
    assert f"each of {8 * len(found)} chunks of neurons is left out once: {8 * len(found) + 1} answers" in note


@pytest.mark.parametrize("importance", ["activation", "activity", "loss"])
@pytest.mark.parametrize("ranking", RANKINGS)
def test_what_was_measured_is_written_out(importance: str, ranking: str, tiny) -> None:
    """The resolved recipe names the neurons, needs no data and makes the same model."""
    loaded, again = tiny("llava-siglip-qwen2"), tiny("llava-siglip-qwen2")
    steps = [DropNeurons(part=part, fraction=0.3, importance=importance, ranking=ranking) for part in PARTS]
    data = read_calibration(loaded, None)
    done = make(steps).apply(loaded.model, replace(data, prompts=data.prompts[:2]))
    assert not done.needs_calibration and parse(done.to_toml()) == done
    done.apply(again.model, None)
    assert describe(again.model) == describe(loaded.model) == done.plan(describe(tiny("llava-siglip-qwen2").model))
    state = again.model.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in loaded.model.state_dict().items())


@pytest.mark.parametrize("neurons", [1, 5, 8, 20])
def test_chunks_are_of_equal_size(neurons: int) -> None:
    """The most active first; a chunk's loss is shared out in proportion; noise below 0 counts as none."""
    activation = torch.arange(1, neurons + 1, dtype=torch.float64)
    chunks: list[list[int]] = []

    def loss(chunk: torch.Tensor) -> float:
        chunks.append(chunk.tolist())
        return -1e-18 if len(chunks) == 2 else float(len(chunks))

    found = shared_loss(activation, loss)
    assert len(chunks) == min(CHUNKS, neurons)
    assert [i for chunk in chunks for i in chunk] == list(range(neurons))[::-1]
    sizes = [len(chunk) for chunk in chunks]
    assert max(sizes) - min(sizes) <= 1
    for number, chunk in enumerate(chunks, start=1):
        part = [(i + 1) / sum(j + 1 for j in chunk) * (0 if number == 2 else number) for i in chunk]
        np.testing.assert_allclose(found[chunk], part, rtol=1e-15)  # float64: one product and one sum; measured 2e-16
    assert not shared_loss(torch.zeros(neurons, dtype=torch.float64), lambda _: 0.0).any()


def test_ties_go_to_the_lower_index() -> None:
    one = torch.tensor([2.0, 1.0, 2.0, 1.0, 1.0])
    assert best_of_each([one, one.flip(0)], [3, 1]) == ((0, 1, 2), (2,))
    assert best_of_all(over_mean([torch.ones(3), torch.ones(3)]), 4) == ((0, 1, 2), (0,))
    assert best_of_all(over_mean([torch.zeros(3), torch.ones(3)]), 4) == ((0,), (0, 1, 2))


@given(st.lists(st.lists(st.floats(0, 1e3), min_size=1, max_size=8), min_size=1, max_size=5), st.data())
def test_layers_are_ranked_together(layers: list[list[float]], data: st.DataObject) -> None:
    """As many as asked, a best one of each layer, and no dropped one above a kept one that nothing protects."""
    importance = [torch.tensor(layer, dtype=torch.float64) for layer in layers]
    count = data.draw(st.integers(len(layers), sum(map(len, layers))))
    keep = best_of_all(over_mean(importance), count)
    assert sum(map(len, keep)) == count and all(kept == tuple(sorted(set(kept))) for kept in keep)
    shares = [one / one.mean() if one.mean() > 0 else one for one in importance]
    assert all(float(one[list(kept)].max()) == float(one.max()) for one, kept in zip(importance, keep, strict=True))
    dropped = [float(s[i]) for s, kept in zip(shares, keep, strict=True) for i in range(len(s)) if i not in kept]
    free = [sorted(float(s[i]) for i in kept)[:-1] for s, kept in zip(shares, keep, strict=True)]
    assert max(dropped, default=0.0) <= min((v for found in free for v in found), default=float("inf"))


def test_layers_of_a_global_ranking_differ(tiny) -> None:
    """A layer whose neurons are alike keeps them; one that a few neurons carry loses the rest."""
    loaded = tiny("llava")
    cut(loaded)
    a = describe(loaded.model)
    first = mlps(loaded.model, "language")[0]
    first.reads.weight.data[:, 10:] *= 1e-3
    recipe = cut(loaded, DropNeurons(part="language", fraction=0.25, ranking="global"))
    widths = describe(loaded.model).language.intermediate
    assert sum(widths) == 180 and widths[0] < min(widths[1:])
    planned = make([DropNeurons(part="language", fraction=0.25, ranking="global")]).plan(a)
    assert planned.language.intermediate == (60, 60, 60)
    assert recipe.plan(a).language.intermediate == widths
    assert costs(planned) == costs(describe(loaded.model))  # by their sum, which is known before


def test_a_plan_of_unequal_layers_adds_up(tiny) -> None:
    a = describe(tiny("llava").model)
    a = replace(a, language=replace(a.language, intermediate=(80, 20, 41)))
    for fraction in (0.0, 0.1, 0.5, 0.9):
        left = DropNeurons(part="language", fraction=fraction, ranking="global").plan(a).language.intermediate
        assert sum(left) == 141 - round(141 * fraction) and len(left) == 3
        each = DropNeurons(part="language", fraction=fraction).plan(a).language.intermediate
        assert each == tuple(n - round(n * fraction) for n in (80, 20, 41))


PLAIN = {"qwen2_vl": 0.5}  # its tower's width is a whole multiple of `embed_dim`: 128 -> 64


@pytest.mark.parametrize("kind", MUST)
def test_saved_reloaded_and_read_by_transformers(kind: str, tiny, prompt, tmp_path: Path) -> None:
    """The folder gives the same bits back, with vlmcut.load and, widths being regular, with transformers alone."""
    loaded = tiny(kind)
    config = copy.deepcopy(loaded.model.config)
    steps = [
        DropNeurons(part="vision", fraction=PLAIN.get(kind, 0.3)),
        DropNeurons(part="language", fraction=0.3),
    ]
    done = cut(loaded, *steps)
    folder.save(loaded, tmp_path / "cut", config, done)
    want, tokens = read(loaded, prompt(loaded))
    again = vlmcut.load(tmp_path / "cut")
    assert describe(again.model) == describe(loaded.model)
    have, said = read(again, prompt(again))
    assert torch.equal(have, want) and said == tokens
    plain, report = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "cut", attn_implementation="sdpa", output_loading_info=True
    )
    # The trimmed tower has no final norm; transformers draws one, which nothing reads.
    assert all("post_layernorm" in key or "vision_model.head" in key for key in report["missing_keys"])
    assert not report["mismatched_keys"] and not report["unexpected_keys"]
    state = plain.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in loaded.model.state_dict().items())
    # transformers leaves weights where they lie in the file; behind an odd number of neurons that is no aligned place,
    # and a product there is summed in another order.
    for weight in plain.parameters():
        weight.data = weight.data.clone()
    theirs = attach(plain.eval(), attached(loaded.model).buckets)
    have, said = read(Loaded(theirs, loaded.processor, {}), prompt(loaded))
    assert torch.equal(have, want) and said == tokens


def test_transformers_generates_the_same(kind: str, tiny, stock, tmp_path: Path) -> None:
    loaded = tiny(kind)
    config = copy.deepcopy(loaded.model.config)
    folder.save(loaded, tmp_path / "cut", config, cut(loaded, *(DropNeurons(part=p, fraction=0.3) for p in PARTS)))
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "cut", attn_implementation="sdpa").eval()
    asked = stock(loaded) | {"max_new_tokens": 16, "do_sample": False}
    want = loaded.model.generate(**asked)
    assert want.shape[1] > asked["input_ids"].shape[1]
    assert torch.equal(plain.generate(**asked), want)
    assert torch.equal(vlmcut.load(tmp_path / "cut").model.generate(**asked), want)


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl", "smolvlm", "lfm2_vl", "gemma3"])
def test_unequal_layers_are_read_by_vlmcut_alone(kind: str, tiny, prompt, tmp_path: Path) -> None:
    loaded = tiny(kind)
    config = copy.deepcopy(loaded.model.config)
    done = cut(loaded, *(DropNeurons(part=part, fraction=0.3, ranking="global") for part in PARTS))
    a = describe(loaded.model)
    assert max(len(set(a.tower.intermediate)), len(set(a.language.intermediate))) > 1
    folder.save(loaded, tmp_path / "cut", config, done)
    again = vlmcut.load(tmp_path / "cut")
    have, want = (read(one, prompt(one)) for one in (again, loaded))
    assert torch.equal(have[0], want[0]) and have[1] == want[1]
    with pytest.raises(RuntimeError, match=r"size mismatch|mismatch"):
        AutoModelForImageTextToText.from_pretrained(tmp_path / "cut")


def test_a_width_that_the_config_cannot_say(tiny, tmp_path: Path) -> None:
    """Qwen2-VL's tower: 128 - 38 = 90 neurons are no multiple of 64. transformers stops; vlmcut reads it."""
    loaded = tiny("qwen2_vl")
    config = copy.deepcopy(loaded.model.config)
    done = cut(loaded, DropNeurons(part="vision", fraction=0.3))
    assert set(describe(loaded.model).tower.intermediate) == {90}
    folder.save(loaded, tmp_path / "cut", config, done)
    assert describe(vlmcut.load(tmp_path / "cut").model) == describe(loaded.model)
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForImageTextToText.from_pretrained(tmp_path / "cut")


def test_counts_and_configs_follow(kind: str, tiny) -> None:
    loaded = tiny(kind)
    cut(loaded, *(DropNeurons(part=part, fraction=0.25) for part in PARTS))
    a = describe(loaded.model)
    assert loaded.model.config.vision_config.intermediate_size == a.tower.intermediate[0]
    assert loaded.model.config.get_text_config().intermediate_size == a.language.intermediate[0]
    for part in PARTS:
        for mlp in mlps(loaded.model, part):
            for linear in (*mlp.makes, mlp.reads):
                assert linear.weight.shape == (linear.out_features, linear.in_features)
            assert getattr(mlp.module, "intermediate_size", mlp.neurons) == mlp.neurons
            assert all(linear.bias is None or len(linear.bias) == mlp.neurons for linear in mlp.makes)


@pytest.mark.parametrize("first", [True, False])
def test_it_goes_with_the_other_cuts(kind: str, first: bool, tiny, prompt) -> None:
    """Heads, layers and tokens in either order; layers take their own counts along."""
    loaded = tiny(kind)
    a = describe(loaded.model)
    neurons = [DropNeurons(part=part, fraction=0.3, ranking="global") for part in PARTS]
    others = [
        DropLayers(part="vision", count=1),
        DropHeads(part="vision", fraction=1 / a.tower.heads[0]),
        DropLayers(part="language", count=1),
    ]
    recipe = make([*(neurons + others if first else others + neurons), PruneTokens(keep=5), Quantize()])
    done = recipe.apply(loaded.model, read_calibration(loaded, None))
    found = describe(loaded.model)
    assert found == done.plan(a)
    assert found.tower.layers == len(found.tower.intermediate) == 3
    assert found.language.layers == len(found.language.intermediate) == a.language.layers - 1
    assert read(loaded, prompt(loaded))[0].isfinite().all()


@pytest.mark.parametrize("ranking", RANKINGS)
def test_the_predicted_work_falls(kind: str, ranking: str, tiny) -> None:
    """By exactly what the linears of the neurons that left would have done."""
    data = vlmcut.inspect(f"tiny:{kind}", drop_neurons={"vision": 0.25, "language": 0.5}, text_tokens=10)
    a = make([]).plan(describe(tiny(kind).model))
    (rows,) = a.segments[0]
    tower = a.tower.layers * (a.tower.intermediate[0] // 4) * 2 * a.tower.hidden
    language = a.language.layers * (a.language.intermediate[0] // 2) * 3 * a.language.hidden
    before, after = ({c["part"]: c for c in data[when]["costs"]} for when in ("before", "after"))
    assert before["vision tower"]["flops"] - after["vision tower"]["flops"] == 2 * rows * tower
    assert before["language model"]["flops"] - after["language model"]["flops"] == 2 * 26 * language
    assert before["language model"]["parameters"] - after["language model"]["parameters"] == language
    steps = [
        DropNeurons(part="vision", fraction=0.25, ranking=ranking),
        DropNeurons(part="language", fraction=0.5, ranking=ranking),
    ]
    assert costs(make(steps).plan(a), text_tokens=10)[2].flops == after["language model"]["flops"]


@pytest.mark.parametrize(
    ("steps", "more"),
    [
        ({"drop_neurons": {"vision": 0.25, "language": 0.3}, "prune": 0.5}, {}),
        ({"drop_neurons": {"vision": 0.25}, "drop_heads": {"vision": 0.5}, "drop_layers": {"language": 1}}, {}),
        ({"drop_neurons": {"language": 0.31}, "quantize": "int8"}, {}),
        ({"drop_neurons": {"vision": 0.25, "language": 0.3}}, {"target": "rtx", "defer_build": True}),
    ],
    ids=["tokens", "heads and layers", "int8", "standard operators"],
)
def test_convert_is_exact(steps: dict[str, Any], more: dict[str, Any], tmp_path: Path) -> None:
    small = {"text_tokens": 24, "new_tokens": 20}
    manifest = vlmcut.convert("tiny:llava", tmp_path / "out", **steps, **small, **more)
    assert all(row["ok"] for row in manifest.exactness["rows"])
    assert manifest.exactness["equal"] == manifest.exactness["tokens"] > 0
    assert any(table["name"] == "drop-neurons" for table in manifest.recipe)
    assert any("mlp" in name for name in manifest.anatomy["removed"])


def test_convert_of_a_global_ranking_is_exact(tmp_path: Path) -> None:
    """Its widths are known when they are measured: the manifest has the measured ones."""
    text = make([DropNeurons(part=part, fraction=0.3, ranking="global") for part in PARTS]).to_toml()
    (tmp_path / "recipe.toml").write_text(text)
    request = Request(model="tiny:llava", recipe=tmp_path / "recipe.toml", text_tokens=24, new_tokens=20)
    manifest = pipeline.convert(request, tmp_path / "out")
    assert manifest.exactness["equal"] == manifest.exactness["tokens"] > 0
    for part in ("tower", "language"):
        widths = manifest.anatomy[part]["intermediate"]
        planned = pipeline.plan(request).after.to_json()[part]["intermediate"]
        assert sum(widths) == sum(planned) and len(set(widths)) > 1


REFUSED = {
    "qwen3_vl_moe": "layer 0 is a mixture of experts",
    "llama4": "layer 0 is a mixture of experts",
    "glm4v_moe": "layer 1 is a mixture of experts",
    "glm4v": "layer 0 (`Glm4vTextDecoderLayer`) has no single MLP of gate_proj/up_proj/down_proj or ",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_understood_is_refused_by_name(kind: str, tiny) -> None:
    model = tiny_models.make_model(kind)
    why = solid(family_of(model.config).locate(model).language_layers)
    assert why is not None and REFUSED[kind] in why
    a = describe(tiny("llava").model)
    a = replace(a, family=kind, language=replace(a.language, solid=why))
    with pytest.raises(PassError) as caught:
        DropNeurons(part="language", fraction=0.5).plan(a)
    assert f"no neuron of the language part of `{kind}` can go: {why}" in str(caught.value)
    assert DropNeurons(part="vision", fraction=0.5).plan(a).tower.intermediate == (48,) * 5


def test_describing_draws_nothing(tiny) -> None:
    """Whether neurons are separate is tried with random numbers of its own; the caller's stay as they are."""
    loaded = tiny("llava")
    state = torch.random.get_rng_state()
    hooks = [len(m._forward_pre_hooks) for m in loaded.model.modules()]
    assert describe(loaded.model).language.solid is None
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [len(m._forward_pre_hooks) for m in loaded.model.modules()] == hooks
