"""Ladders that are measured: against loops over the model's own maps and answers, and in the whole path."""

from __future__ import annotations

import math
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from vlmcut import pipeline
from vlmcut.errors import PassError
from vlmcut.manifest import Rung, read
from vlmcut.passes.calibration import Calibration, read_calibration
from vlmcut.passes.importance import TOKENS
from vlmcut.passes.inside import scores
from vlmcut.passes.inside.ladders import Watcher, above_elbow, climbing, few_rungs, left, work_of
from vlmcut.passes.prune_inside import PruneInside, from_flags
from vlmcut.passes.prune_tokens import PruneTokens
from vlmcut.passes.recipe import make, parse
from vlmcut.passes.trim_tower import TrimTower
from vlmcut.pipeline import Request
from vlmcut.surgery.inside import Inside
from vlmcut.surgery.load import Loaded, describe, locate
from vlmcut.surgery.neurons import find_mlp
from vlmcut.surgery.selection import attached
from vlmcut.surgery.talk import Talk, greedy, see_all, stop_ids

from .test_inside import MUST, recorded, wide_window

MEASURED = {"exit": "exit:tolerance=1e9", "fitprune": "fitprune:work=0.8", "core": "core:elbow=true"}


@pytest.mark.parametrize("method", MEASURED)
@pytest.mark.parametrize("kind", MUST)
def test_what_was_measured_is_written_out(kind: str, method: str, tiny, prompt) -> None:
    """The resolved recipe needs no data, makes the same model, and its ladder is legal and no more work than asked."""
    loaded, again = wide_window(tiny(kind)), wide_window(tiny(kind))
    a = describe(loaded.model)
    recipe = make([PruneInside(method=MEASURED[method])])
    assert recipe.needs_calibration
    done = recipe.apply(loaded.model, Calibration((prompt(loaded),), "one prompt", loaded.processor.tokenizer))
    assert not done.needs_calibration and parse(done.to_toml()) == done
    done.apply(again.model, None)
    made, found = describe(again.model), describe(loaded.model)
    assert made == found == done.plan(a) and found.inside == MEASURED[method]
    first = max(1, a.language.levels)
    if method == "exit":
        assert found.ladder == (Rung(first, 0.0),)  # every tolerance is met there
    elif method == "core":
        assert isinstance(done.passes[-1], PruneInside)
        assert found.ladder == done.passes[-1].ladder(a)
        assert [rung.layer for rung in found.ladder] == [max(first, round(5 / 32 * a.language.layers))]
    else:
        assert found.ladder and work_of(found.ladder, a.language.layers) <= 0.8
        assert all(first <= rung.layer < a.language.layers for rung in found.ladder)


# --- exit


def divergence(loaded: Loaded, calibration: Calibration, layer: int) -> float:
    """What leaving at a layer moves, by a loop over cut and uncut answers."""
    model, found = loaded.model, []
    for made in calibration.prompts:
        shrunk, seen = see_all(model, made)
        told = greedy(Talk.read(model, [shrunk], [seen]), TOKENS, stop_ids(model))[0]
        rows = []
        for ladder in ((), (Rung(layer, 0.0),)):
            attached(model).inside = None
            if ladder:
                make([PruneInside(method="exit", layers=(layer,), share=(0.0,))]).apply(model, None)
            talk = Talk.read(model, [shrunk], [seen])
            logits = [talk.logits[0]]
            for token in told:
                talk = talk.say(torch.tensor([token]))
                logits.append(talk.logits[0])
            rows.append(torch.softmax(torch.stack(logits).double(), dim=-1).numpy())
        attached(model).inside = None
        found.append(np.mean([(p * np.log(p / q)).sum() for p, q in zip(*rows, strict=True)]))
    return float(np.mean(found))


def test_the_first_layer_within_the_tolerance_is_the_exit(tiny) -> None:
    loaded = tiny("llava")
    make([]).apply(loaded.model, None)
    calibration = read_calibration(loaded, None)
    moved = [divergence(loaded, calibration, layer) for layer in (1, 2)]
    assert moved[0] > moved[1] > 0
    a = describe(loaded.model)
    for tolerance, layer in ((moved[0] * 1.001, 1), (moved[0] * 0.999, 2), (moved[1] * 1.001, 2)):
        done = PruneInside(method=f"exit:tolerance={tolerance}").resolve(loaded.model, a, calibration)
        assert done.layers == (layer,) and done.share == (0.0,)
    assert attached(loaded.model).inside is None  # and nothing is left behind
    with pytest.raises(PassError, match="leaving at the last layer moves the answers by") as error:
        PruneInside(method=f"exit:tolerance={moved[1] * 0.999}").resolve(loaded.model, a, calibration)
    assert f"choose {moved[1]:.3g} or more" in (error.value.hint or "")


# --- FitPrune


def test_masses_are_those_of_the_models_own_maps(tiny, prompt) -> None:
    """Largest of the heads; text behind the first image, summed; visual tokens, their mean; by a loop."""
    loaded, eager = tiny("llava-siglip-qwen2"), tiny("llava-siglip-qwen2")
    made = prompt(loaded)
    shrunk, seen = see_all(loaded.model, made)
    watcher = Watcher()
    layers = describe(loaded.model).language.layers
    with climbing(loaded.model, Inside(watcher, tuple(Rung(i, 1.0) for i in range(1, layers)))):
        Talk.read(loaded.model, [shrunk], [seen])
    with recorded(eager.model) as calls:
        Talk.read(eager.model, [shrunk], [seen])
    language = locate(eager.model).language
    language.set_attn_implementation("eager")
    given = {name: calls[0][1][name] for name in ("inputs_embeds", "position_ids")}
    with torch.no_grad():
        maps = language(**given, use_cache=False, output_attentions=True).attentions
    index = shrunk.visual_index[0]
    visual = np.flatnonzero(index >= 0)
    words = [i for i in range(len(index)) if index[i] < 0 and i > visual[0]]
    assert len(watcher.cross) == layers - 1
    for layer in range(layers - 1):
        rows = maps[layer][0].numpy().max(axis=0)
        cross = [sum(rows[word, column] for word in words) for column in visual]
        own = [sum(rows[other, column] for other in visual) / len(visual) for column in visual]
        # float32: the fused layers before it, another order of sums. Measured 1.2e-7.
        np.testing.assert_allclose(watcher.cross[layer].numpy(), cross, rtol=0, atol=1e-6)
        np.testing.assert_allclose(watcher.own[layer].numpy(), own, rtol=0, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.05, 0.2, 0.5, 0.9, 1.0])
def test_masses_that_stay(alpha: float) -> None:
    """By a loop: the smallest leave one by one while enough is left, and only those that are in both lists."""
    rng = np.random.default_rng(int(alpha * 100))
    cross, own = rng.random((4, 20)) ** 3, rng.random((4, 20)) ** 3
    here, counts = set(range(20)), []
    for masses in zip(cross, own, strict=True):
        lists = []
        for mass in masses:
            staying, gone = set(here), set()
            for token in sorted(here, key=lambda i: mass[i]):
                if sum(mass[i] for i in staying - {token}) < (1 - alpha) * mass.sum() - 1e-12:
                    break
                staying.remove(token)
                gone.add(token)
            lists.append(gone)
        out = lists[0] & lists[1]
        here -= out
        counts.append(len(here))
        if out:
            assert all(sum(mass[i] for i in here) >= (1 - alpha) * mass.sum() - 1e-12 for mass in masses)
    found = left([torch.from_numpy(c) for c in cross], [torch.from_numpy(o) for o in own], alpha)
    assert found == counts
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == (20 if not alpha else 0 if alpha == 1 else counts[0])


@pytest.mark.parametrize("most", [1, 2, 3, 9])
def test_few_rungs_leave_least_work_and_keep_what_the_curve_keeps(most: int) -> None:
    """Against every ladder that there is."""
    curve, keep = [0.95, 0.9, 0.55, 0.5, 0.5, 0.2, 0.0, 0.0], (10, 16)
    ladder = few_rungs(curve, 2, keep, most)
    layers = 2 + len(curve)

    def legal(rungs: tuple[Rung, ...]) -> bool:
        stays = [[n, *(rung.stay(n) for rung in rungs)] for n in keep]
        return all(one > other for each in stays for one, other in pairwise(each))

    every = [
        tuple(Rung(2 + i, curve[i]) for i in chosen)
        for count in range(1, most + 1)
        for chosen in combinations(range(len(curve)), count)
    ]
    assert work_of(ladder, layers) == pytest.approx(min(work_of(r, layers) for r in every if legal(r)))
    assert legal(ladder) and len(ladder) <= most
    for layer, share in enumerate(curve, start=2):
        passed = [rung.share for rung in ladder if rung.layer <= layer]
        assert (passed[-1] if passed else 1.0) >= share


@pytest.mark.parametrize("work", [0.9, 0.7, 0.4])
def test_fitprune_leaves_the_work_that_is_asked_for(work: float, tiny) -> None:
    loaded = tiny("llava")
    calibration, a = read_calibration(loaded, None), describe(loaded.model)
    done = PruneInside(method=f"fitprune:work={work}").resolve(loaded.model, a, calibration)
    ladder = done.ladder(a)
    # Bisection ends within 0.01 of its number; a tiny model's counts are whole tokens.
    assert 1 <= len(ladder) <= 2 and work - 0.1 < work_of(ladder, 3) <= work
    assert done.plan(a).ladder == ladder and attached(loaded.model).inside is None


# --- CoreMatching


def farthest(counts: np.ndarray) -> int:
    """How many stand before the point that is farthest from the chord, by distances in the plane."""
    curve = np.sort(counts)[::-1].astype(float)
    first, last = np.array([0.0, curve[0]]), np.array([len(curve) - 1.0, curve[-1]])
    chord = (last - first) / np.linalg.norm(last - first)
    away = []
    for x, y in enumerate(curve):
        to = np.array([x, y]) - first
        away.append(np.linalg.norm(to - (to @ chord) * chord))
    return int(np.argmax(np.round(away, 9))) if max(away) > 1e-9 else len(curve)


@pytest.mark.parametrize(
    ("curve", "count"),
    [
        ([9, 9, 9, 1, 1, 1, 0], 3),  # three stand above the bend
        ([9, 2, 1, 0], 1),
        ([9, 9, 8, 8, 0], 3),  # it bulges: the corner itself is below
        ([5, 5, 5, 5], 4),  # no bend: all stay
        ([6, 4, 2, 0], 4),
        ([3, 1], 2),
    ],
)
def test_where_a_curve_bends(curve: list[float], count: int) -> None:
    shuffled = np.random.default_rng(0).permutation(np.array(curve, dtype=float))
    assert above_elbow(torch.from_numpy(shuffled)) == farthest(shuffled) == count


def test_elbows_of_many_curves() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        counts = np.floor(40 * rng.random(rng.integers(3, 40)) ** rng.integers(1, 6))
        assert above_elbow(torch.from_numpy(counts)) == farthest(counts)


def test_the_share_is_the_mean_of_the_elbows(tiny) -> None:
    """Counts of neurons in common from hooks on transformers' own model, prompt by prompt."""
    loaded, plain = tiny("llava"), tiny("llava")
    calibration, a = read_calibration(loaded, None), describe(loaded.model)
    done = PruneInside(method="core:elbow=true").resolve(loaded.model, a, calibration)
    mlp = find_mlp(locate(plain.model).language_layers[0])
    assert mlp is not None and done.layers == (1,)
    neurons: list[np.ndarray] = []
    hook = mlp.reads.register_forward_pre_hook(lambda _, args: neurons.append(args[0][0].numpy()))
    shares = []
    for made in calibration.prompts:
        pixels = torch.from_numpy(np.concatenate([p.pixel_values for p in made.pictures]))
        with torch.no_grad():
            plain.model(input_ids=torch.from_numpy(made.input_ids), pixel_values=pixels)
        active = neurons.pop() > 0
        counts = (active & active[-1]).sum(axis=1)[made.visual_index[0] >= 0]
        shares.append(farthest(counts) / len(counts))
    hook.remove()
    assert len(set(shares)) > 1
    assert done.share == (math.ceil(np.mean(shares) * 1e4 - 1e-9) / 1e4,)
    assert done.plan(a).ladder[0].stay(16) < 16 and attached(loaded.model).inside is None


def test_scores_that_do_not_bend_are_refused(tiny, monkeypatch) -> None:
    loaded = tiny("llava")
    monkeypatch.setattr(scores, "in_common", lambda state: torch.ones(state.columns.count))
    step = PruneInside(method="core:elbow=true")
    with pytest.raises(PassError, match="scores at layer 1 do not bend: 1 of 16 visual tokens are all") as error:
        step.resolve(loaded.model, describe(loaded.model), read_calibration(loaded, None))
    assert error.value.hint == "give layers and share"


# --- the whole path


def test_budgets_have_the_measured_ladder(tmp_path: Path) -> None:
    """The plan expects layer 2; the bundle's budgets, graphs and recipe have what was measured."""
    request = Request(model="tiny:llava", inside="exit:tolerance=1e9", text_tokens=24, new_tokens=20, questions=0)
    planned = pipeline.plan(request)
    assert planned.budgets[0].ladder == (Rung(2, 0.0),)
    assert any("is measured" in note for note in planned.notes)
    pipeline.convert(request, tmp_path / "out")
    manifest = read(tmp_path / "out")
    assert manifest.budgets[0].ladder == (Rung(1, 0.0),)
    assert manifest.recipe[-1] == {
        "name": "prune-inside", "method": "exit:tolerance=1e9", "layers": [1], "share": [0.0],
    }  # fmt: skip
    rebuilt = Request(model="tiny:llava", recipe=tmp_path / "out/recipe.toml", text_tokens=24, new_tokens=20)
    assert pipeline.plan(rebuilt).budgets == manifest.budgets
    assert manifest.exactness is not None and manifest.exactness["ok"]
    shapes = {i.name: i.shape for g in manifest.graphs.values() if g.role == "decode" for i in g.inputs}
    assert shapes["past_key_0"][2] == shapes["past_key_1"][2] + manifest.budgets[0].visual_tokens


def test_a_measured_ladder_that_does_not_suit_a_budget_is_refused(tmp_path: Path, monkeypatch) -> None:
    ladder = {"layers": (1, 2), "share": (0.6251, 0.6249)}  # of 4 tokens 3 and 2 stay, of 16 tokens 10 and 10
    monkeypatch.setattr(PruneInside, "resolve", lambda step, *_: PruneInside(method=step.method, **ladder))
    request = Request(
        model="tiny:llava", keep=(4, 16), inside="fitprune:work=0.5", text_tokens=24, new_tokens=20, questions=0
    )
    with pytest.raises(PassError, match=r"of 16 tokens .* leaves 10 behind layer 2, where 10 arrive"):
        pipeline.convert(request, tmp_path / "out")
    assert not (tmp_path / "out").exists()


REFUSED = {
    "exit:tolerance=-1": ("exit:tolerance=-1.0 is no divergence", "choose 0.05"),
    "exit:tolerance=nan": ("exit:tolerance=nan is no divergence", "choose 0.05"),
    "fitprune:work=1.5": ("work=1.5: 1 of 3 layers see every visual token", "more than 0.333 and less than 1"),
    "fitprune:work=0.3": ("work=0.3: 1 of 3 layers see every visual token", "more than 0.333 and less than 1"),
    "core:elbow=yes": ("option elbow = 'yes' is not true or false", "the default is false"),
    "fitprune:work=0.99": ("leaves 16 behind layer 1, where 16 arrive", "choose less work"),
}


@pytest.mark.parametrize("method", REFUSED)
def test_refusals(method: str, tiny) -> None:
    cause, fix = REFUSED[method]
    with pytest.raises(PassError, match=cause) as error:
        PruneInside(method=method).plan(describe(tiny("llava").model))
    assert fix in (error.value.hint or "")


def test_two_points_have_no_bend(tiny) -> None:
    a = TrimTower().plan(describe(tiny("llava").model))
    step = PruneInside(method="core:elbow=true")
    assert step.plan(PruneTokens(keep=3).plan(a)).ladder == (Rung(1, 0.25),)
    with pytest.raises(PassError, match="in the scores of 2 visual tokens, 3 at least") as error:
        step.plan(PruneTokens(keep=2).plan(a))
    assert error.value.hint == "give layers and share"


def test_a_ladder_is_given_or_measured() -> None:
    assert from_flags("exit", (), 2, 4, 0) == PruneInside(method="exit", layers=(2,), share=(0.0,))
    assert from_flags("exit:tolerance=0.1", (), None, 4, 0) == PruneInside(method="exit:tolerance=0.1")
    for method, ladder, last in (
        ("exit:tolerance=0.1", (), 2),
        ("fitprune:work=0.5", ((1, 0.5),), None),
        ("core:elbow=true", ((1, 0.5),), None),
    ):
        with pytest.raises(PassError, match="asks for a measured ladder") as error:
            from_flags(method, ladder, last, 4, 0)
        assert f"{method.partition(':')[0]} alone takes a ladder" in (error.value.hint or "")


def test_what_is_asked_of_the_model_as_it_is(tiny) -> None:
    """Fewer tokens reach the language model, and their shares are counted of those."""
    loaded = tiny("llava")
    recipe = make([PruneTokens(keep=5), PruneInside(method="fitprune:work=0.6")])
    recipe.apply(loaded.model, read_calibration(loaded, None))
    a = describe(loaded.model)
    assert a.keep == (5,) and all(rung.stay(5) < 5 for rung in a.ladder)
