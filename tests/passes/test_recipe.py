"""Recipes: what goes in comes out, nothing unknown goes in, and flags mean what they say."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch
import vlmcut
from hypothesis import given
from hypothesis import strategies as st
from vlmcut.errors import PassError
from vlmcut.manifest import Panel
from vlmcut.passes import recipe
from vlmcut.passes.base import PARTS, Pass
from vlmcut.passes.drop_heads import DropHeads
from vlmcut.passes.drop_layers import DropLayers
from vlmcut.passes.drop_neurons import DropNeurons
from vlmcut.passes.heal import Heal
from vlmcut.passes.importance import RANKINGS
from vlmcut.passes.prune_tokens import PruneTokens, kept_tokens
from vlmcut.passes.quantize import Quantize
from vlmcut.passes.recipe import PASSES, Recipe, from_flags, make, parse
from vlmcut.passes.skip_visual import SkipVisual
from vlmcut.passes.slim_visual import SlimVisual
from vlmcut.passes.tokens.method import parse as parse_method
from vlmcut.passes.tokens.methods import METHODS
from vlmcut.passes.trim_tower import TrimTower
from vlmcut.passes.trim_vocabulary import TrimVocabulary
from vlmcut.surgery.load import describe
from vlmcut.surgery.selection import LINE_BREAKS

ROOM = Path(recipe.__file__).parent

indices = st.lists(st.integers(0, 30), max_size=5, unique=True).map(lambda v: tuple(sorted(v)))
PASS = st.one_of(
    st.builds(
        DropHeads,
        part=st.sampled_from(PARTS),
        fraction=st.floats(0, 0.99),
        keep=st.none() | st.lists(indices, max_size=3).map(tuple),
    ),
    st.builds(
        DropNeurons,
        part=st.sampled_from(PARTS),
        fraction=st.floats(0, 0.99),
        keep=st.none() | st.lists(indices, max_size=3).map(tuple),
        ranking=st.sampled_from(RANKINGS),
    ),
    st.builds(DropLayers, part=st.sampled_from(PARTS), count=st.integers(1, 40), drop=st.none() | indices),
    st.builds(
        PruneTokens,
        keep=st.integers(1, 3000) | st.lists(st.integers(1, 3000), min_size=1, max_size=3).map(tuple),
        method=st.sampled_from(list(METHODS)),
        seed=st.integers(0, 2**31),
        line_breaks=st.sampled_from(LINE_BREAKS),
    ),
    st.builds(Quantize, parts=st.lists(st.sampled_from(PARTS), max_size=2, unique=True).map(tuple)),
)


@given(st.lists(PASS, max_size=6))
def test_toml_round_trip(passes: list[Pass]) -> None:
    made = make(passes)
    assert parse(made.to_toml()) == made
    assert recipe.from_tables(made.tables()) == made
    assert parse(made.to_toml()).to_toml() == made.to_toml()


@given(st.text(max_size=20))
def test_strings_survive_toml(text: str) -> None:
    """A name that is not a method is refused by `plan`, not garbled by the writer."""
    made = make([PruneTokens(keep=1, method=text)])
    assert parse(made.to_toml()) == made


def test_every_pass_in_the_folder_is_in_the_table() -> None:
    found = set()
    for path in ROOM.glob("*.py"):
        module = importlib.import_module("vlmcut.passes" if path.stem == "__init__" else f"vlmcut.passes.{path.stem}")
        classes = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
        found |= {c for c in classes if issubclass(c, Pass) and not inspect.isabstract(c)}
    assert found == set(PASSES.values()) and len(found) >= 5
    for name, kind in PASSES.items():
        assert kind.name == name and kind.summary and kind.source
        assert dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen


def test_trim_tower_is_always_first() -> None:
    steps = [PruneTokens(keep=4), TrimTower(), Quantize()]
    assert make(steps) == Recipe((TrimTower(), PruneTokens(keep=4), Quantize()))
    assert parse("") == Recipe((TrimTower(),))
    assert [t["name"] for t in parse('[[pass]]\nname = "quantize"\n').tables()] == ["trim-tower", "quantize"]


BAD = [
    ("[[pass]", "not TOML", "docs/recipes.md"),
    ("passes = 3", "unknown key `passes`", "[[pass]]"),
    ('[pass]\nname = "quantize"', "`pass` is one table", "two brackets"),
    ("[[pass]]\nkeep = 3", "pass 1: a pass needs a `name`", "prune-tokens"),
    ("pass = [3]", "pass 1: a pass needs a `name`", "prune-tokens"),
    ('[[pass]]\nname = "prune-token"\nkeep = 3', "pass 1: no pass `prune-token`", "did you mean `prune-tokens`?"),
    ('[[pass]]\nname = "drop-head"', "no pass `drop-head`", "did you mean `drop-heads`?"),
    (
        '[[pass]]\nname = "zzz"',
        "no pass `zzz`",
        "known: bottleneck, drop-heads, drop-layers, drop-neurons, heal, prune-inside, ",
    ),
    ("[[pass]]\nname = 3", "no pass `3`", "known"),
    ('[[pass]]\nname = "trim-tower"\nx = 1', "unknown key `x`", None),
    ('[[pass]]\nname = "prune-tokens"\nkep = 3', "`prune-tokens`: unknown key `kep`", "did you mean `keep`?"),
    ('[[pass]]\nname = "prune-tokens"', "`keep` is not set", "it needs: keep"),
    ('[[pass]]\nname = "drop-layers"\npart = "vision"', "`count` is not set", "it needs: part, count"),
    ('[[pass]]\nname = "prune-tokens"\nkeep = "3"', "keep = '3' is not of type int", "docs/recipes.md"),
    ('[[pass]]\nname = "prune-tokens"\nkeep = 3.0', "keep = 3.0 is not of type int", "docs/recipes.md"),
    ('[[pass]]\nname = "prune-tokens"\nkeep = true', "keep = True is not of type int", "docs/recipes.md"),
    ('[[pass]]\nname = "prune-tokens"\nkeep = 3\nmethod = 1', "method = 1 is not of type str", "docs/recipes.md"),
    ('[[pass]]\nname = "drop-heads"\npart = "vision"\nfraction = "x"', "fraction = 'x' is not of type float", "docs"),
    ('[[pass]]\nname = "drop-heads"\npart = "vision"\nfraction = true', "fraction = True is not of type float", "docs"),
    ('[[pass]]\nname = "drop-layers"\npart = "vision"\ncount = 1\ndrop = 2', "drop = 2 is not of type list", "docs"),
    (
        '[[pass]]\nname = "drop-layers"\npart = "vision"\ncount = 1\ndrop = ["a"]',
        "drop = 'a' is not of type int",
        "docs",
    ),
    ('[[pass]]\nname = "quantize"\nparts = "vision"', "parts = 'vision' is not of type list", "docs"),
]


@pytest.mark.parametrize(("text", "message", "hint"), BAD)
def test_a_bad_recipe_is_named(text: str, message: str, hint: str | None) -> None:
    with pytest.raises(PassError) as caught:
        parse(text)
    assert message in str(caught.value)
    assert caught.value.hint is None if hint is None else hint in (caught.value.hint or "")


def test_an_integer_is_a_float_where_one_is_wanted() -> None:
    made = parse('[[pass]]\nname = "drop-heads"\npart = "vision"\nfraction = 0')
    assert made.passes[1] == DropHeads(part="vision", fraction=0.0) and "fraction = 0.0" in made.to_toml()


def test_the_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    with pytest.raises(PassError, match=r"r\.toml` cannot be read"):
        recipe.read(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(PassError, match=r"r\.toml` cannot be read"):
        recipe.read(path)
    path.write_text('[[pass]]\nname = "x"')
    with pytest.raises(PassError, match=r"r.toml`, pass 1: no pass `x`"):
        recipe.read(path)
    path.write_text(make([PruneTokens(keep=3)]).to_toml())
    assert recipe.read(path) == make([PruneTokens(keep=3)])


def test_flags_become_a_recipe_in_order(tiny) -> None:
    a = describe(tiny("llava").model)
    made = from_flags(
        a, prune=0.75, method="divprune", drop_heads={"language": 0.3, "vision": 0.5},
        drop_layers={"language": 1, "vision": 2}, drop_neurons={"language": 0.2, "vision": 0.4}, quantize="int8",
        seed=4,
    )  # fmt: skip
    assert made.passes == (
        TrimTower(),
        DropLayers(part="vision", count=2),
        DropHeads(part="vision", fraction=0.5),
        DropNeurons(part="vision", fraction=0.4),
        PruneTokens(keep=4, method="divprune", seed=4),
        DropLayers(part="language", count=1),
        DropHeads(part="language", fraction=0.3),
        DropNeurons(part="language", fraction=0.2),
        Quantize(),
    )
    assert from_flags(a).passes == (TrimTower(),)
    assert from_flags(a, keep=5).passes[1] == PruneTokens(keep=5)
    # Neutral flags add no pass.
    assert from_flags(a, prune=0.0, drop_heads={"vision": 0.0}, drop_layers={"vision": 0}).passes == (TrimTower(),)
    assert from_flags(a, drop_neurons={"vision": 0.0, "language": 0}).passes == (TrimTower(),)
    assert from_flags(a, keep=16).passes == (TrimTower(),)


def test_how_importance_is_measured_goes_to_every_pass_that_can(tiny) -> None:
    """Layers are not ranked by layer or globally, so `ranking` is not for them."""
    made = from_flags(
        describe(tiny("llava").model), drop_layers={"language": 1}, drop_heads={"vision": 0.5, "language": 0.3},
        importance="loss", ranking="global",
    )  # fmt: skip
    assert made.passes[1:] == (
        DropHeads(part="vision", fraction=0.5, importance="loss", ranking="global"),
        DropLayers(part="language", count=1, importance="loss"),
        DropHeads(part="language", fraction=0.3, importance="loss", ranking="global"),
    )
    (neurons,) = from_flags(describe(tiny("llava").model), drop_neurons={"vision": 0.5}, ranking="global").passes[1:]
    assert neurons == DropNeurons(part="vision", fraction=0.5, ranking="global")


def test_what_visual_tokens_skip_comes_behind_the_ladder_and_before_healing(tiny) -> None:
    made = from_flags(
        describe(tiny("llava").model), exit_layer=2, skip_visual={"mlp": 1, "apart": 2},
        slim_visual={"neurons": 0.5}, heal=3, quantize="int8",
    )  # fmt: skip
    assert made.passes[2:] == (
        SkipVisual(what="mlp", count=1),
        SkipVisual(what="apart", count=2),
        SlimVisual(what="neurons", fraction=0.5),
        Heal(steps=3, parts=("language",)),
        Quantize(),
    )


FLAGS = [
    ({"prune": 1.0}, "--prune 1 ", "0 <= R < 1"),
    ({"prune": -0.1}, "--prune -0.1 ", "0 <= R < 1"),
    ({"prune": 75}, "--prune 75 ", "0.75"),
    ({"prune": float("nan")}, "--prune nan ", "0 <= R < 1"),
    ({"prune": 0.5, "keep": 4}, "--prune and --keep", "one of them"),
    ({"drop_heads": {"visoin": 0.5}}, "--drop-heads: no part `visoin`", "did you mean `vision`?"),
    ({"drop_neurons": {"visoin": 0.5}}, "--drop-neurons: no part `visoin`", "did you mean `vision`?"),
    ({"drop_layers": {"lang": 1}}, "--drop-layers: no part `lang`", "language"),
    ({"method": "divprun"}, "--method: no method `divprun`", "did you mean `divprune`?"),
    ({"quantize": "int9"}, "--quantize int9: unknown scheme", "did you mean `int8`?"),
]


@pytest.mark.parametrize(("flags", "message", "hint"), FLAGS)
def test_wrong_flags_are_refused(tiny, flags: dict, message: str, hint: str) -> None:
    with pytest.raises(PassError) as caught:
        from_flags(describe(tiny("llava").model), **flags)
    assert message in str(caught.value) and hint in (caught.value.hint or "")


def test_too_many_tokens_names_both_numbers(tiny) -> None:
    a = describe(tiny("llava").model)
    with pytest.raises(PassError, match=r"keep=17.*16") as caught:
        from_flags(a, keep=17).plan(a)
    assert caught.value.hint == "choose 1 to 16"


# Every refusal of every pass: the pass, and what its message and hint must hold.
REFUSALS: list[tuple[Pass, str, str]] = [
    (PruneTokens(keep=0), "keep=0, but `llava` makes 16", "choose 1 to 16"),
    (PruneTokens(keep=17), "keep=17, but `llava` makes 16", "choose 1 to 16"),
    (PruneTokens(keep=-3), "keep=-3", "choose 1 to 16"),
    (PruneTokens(keep=3, seed=-1), "seed=-1", "0 or more"),
    (PruneTokens(keep=3, line_breaks="drpo"), "no policy `drpo` for line_breaks", "did you mean `drop`?"),
    (PruneTokens(keep=(3, 4)), "keep names 2 numbers for 1 image sizes", "one for each --image-size"),
    (PruneTokens(keep=()), "keep names 0 numbers for 1 image sizes", "one for each --image-size"),
    (PruneTokens(keep=3, method="fastvlm"), "no method `fastvlm`", "did you mean `fastervlm`?"),
    (DropLayers(part="sight", count=1), "part='sight'", "`vision` or `language`"),
    (DropLayers(part="vision", count=0), "count=0, but vision has 4 layers of which 3 can go", "choose 1 to 3"),
    (DropLayers(part="vision", count=4), "count=4, but vision has 4 layers of which 3 can go", "choose 1 to 3"),
    (DropLayers(part="vision", count=-1), "count=-1", "choose 1 to 3"),
    (DropLayers(part="language", count=3), "count=3, but language has 3 layers of which 2 can go", "choose 1 to 2"),
    (
        DropLayers(part="vision", count=1, drop=(3,)),
        "drop=[3] names vision layer 3, which must stay: the projector reads its output",
        "choose from [0, 1, 2]",
    ),
    (DropLayers(part="vision", count=2, drop=(1,)), "drop=[1] must be 2 different layers of [0, 1, 2]", "leave `drop`"),
    (DropLayers(part="vision", count=1, importance="los"), "no importance `los`", "did you mean `loss`?"),
    (DropLayers(part="vision", count=2, drop=(1, 1)), "drop=[1, 1] must be 2 different", "leave `drop` out"),
    (DropLayers(part="language", count=1, drop=(-1,)), "drop=[-1]", "leave `drop` out"),
    (DropHeads(part="audio", fraction=0.5), "part='audio'", "`vision` or `language`"),
    (DropHeads(part="vision", fraction=1.0), "fraction=1.0 of the vision heads", "0 <= fraction < 1"),
    (DropHeads(part="vision", fraction=-0.5), "fraction=-0.5", "0 <= fraction < 1"),
    (DropHeads(part="vision", fraction=0.9), "fraction=0.9 leaves 0 of 2 vision heads", "at most 0.5"),
    (DropHeads(part="language", fraction=0.9), "leaves 0 of 3 language KV heads", "at most 0.6666"),
    (DropHeads(part="vision", fraction=0.5, keep=((0,),)), "keep lists [1] heads per layer", "leave `keep` out"),
    (DropHeads(part="vision", fraction=0.5, keep=((0, 1),) * 4), "leaves [1, 1, 1, 1]", "leave `keep` out"),
    (DropHeads(part="vision", fraction=0.5, keep=((2,),) * 4), "of [2, 2, 2, 2]", "leave `keep` out"),
    (DropHeads(part="language", fraction=0.34, keep=((0, 0),) * 3), "keep lists [2, 2, 2] KV heads", "leave `keep`"),
    (DropHeads(part="vision", fraction=0.5, ranking="globl"), "no ranking `globl`", "did you mean `global`?"),
    (DropHeads(part="vision", fraction=0.5, importance="los"), "no importance `los`", "did you mean `loss`?"),
    (
        DropHeads(part="vision", fraction=0.6, ranking="global"),
        "fraction=0.6 leaves 3 of 8 vision heads for 4 layers",
        "choose at most 0.5",
    ),
    (
        DropHeads(part="language", fraction=0.8, ranking="global"),
        "fraction=0.8 leaves 2 of 9 language KV heads for 3 layers",
        "choose at most 0.6666",
    ),
    (
        DropHeads(part="language", fraction=4 / 9, keep=((0, 1, 2), (), (0, 1)), ranking="global"),
        "keep lists [3, 0, 2] KV heads per layer",
        "leave `keep` out",
    ),
    (
        DropHeads(part="language", fraction=4 / 9, keep=((0, 1, 2), (0,), (0, 3)), ranking="global"),
        "keep lists [3, 1, 2] KV heads per layer",
        "leave `keep` out",
    ),
    (
        DropHeads(part="language", fraction=4 / 9, keep=((0, 1, 2), (0,), (0, 1)), ranking="global"),
        "keep lists [3, 1, 2] KV heads per layer, fraction=0.4444444444444444 of [3, 3, 3] leaves 5 in all",
        "leave `keep` out",
    ),
    (DropNeurons(part="audio", fraction=0.5), "part='audio'", "`vision` or `language`"),
    (DropNeurons(part="vision", fraction=0.5, ranking="globl"), "no ranking `globl`", "did you mean `global`?"),
    (DropNeurons(part="vision", fraction=0.5, importance="activty"), "no importance `activty`", "mean `activity`?"),
    (DropHeads(part="vision", fraction=0.5, importance="activity"), "no importance `activity`", "mean `activation`?"),
    (DropNeurons(part="vision", fraction=1.0), "fraction=1.0 of the vision neurons", "0 <= fraction < 1"),
    (DropNeurons(part="language", fraction=-0.5), "fraction=-0.5 of the language neurons", "0 <= fraction < 1"),
    (DropNeurons(part="vision", fraction=0.999), "fraction=0.999 leaves 0 of 96 vision neurons", "at most 0.9895"),
    (DropNeurons(part="language", fraction=0.999), "fraction=0.999 leaves 0 of 80 language", "at most 0.9875"),
    (
        DropNeurons(part="language", fraction=0.999, ranking="global"),
        "fraction=0.999 leaves 0 of 240 language neurons for 3 layers",
        "at most 0.9875",
    ),
    (DropNeurons(part="language", fraction=0.99, keep=((0,),)), "keep lists [1] neurons per layer", "leave `keep` out"),
    (DropNeurons(part="language", fraction=0.9, keep=((0,),) * 3), "leaves [8, 8, 8]", "leave `keep` out"),
    (DropNeurons(part="language", fraction=0.975, keep=((0, 80),) * 3), "of [80, 80, 80]", "leave `keep` out"),
    (DropNeurons(part="language", fraction=0.975, keep=((0, 0),) * 3), "keep lists [2, 2, 2] neurons", "leave `keep`"),
    (DropNeurons(part="language", fraction=0.975, keep=((-1, 0),) * 3), "keep lists [2, 2, 2] neurons", "leave `keep`"),
    (
        DropNeurons(part="language", fraction=0.975, keep=((0, 1, 2, 3), (), (0, 1)), ranking="global"),
        "keep lists [4, 0, 2] neurons per layer",
        "leave `keep` out",
    ),
    (
        DropNeurons(part="language", fraction=0.975, keep=((0, 1, 2, 3), (0,), (0, 1)), ranking="global"),
        "keep lists [4, 1, 2] neurons per layer, fraction=0.975 of [80, 80, 80] leaves 6 in all",
        "leave `keep` out",
    ),
    (Quantize(scheme="int7"), "no scheme `int7`", "did you mean `int8`?"),
    (Quantize(parts=("vision", "ears")), "part='ears'", "`vision` or `language`"),
]


@pytest.mark.parametrize(("step", "message", "hint"), REFUSALS, ids=lambda v: repr(v) if isinstance(v, Pass) else "")
def test_plan_refuses(tiny, step: Pass, message: str, hint: str) -> None:
    a = TrimTower().plan(describe(tiny("llava").model))
    with pytest.raises(PassError) as caught:
        step.plan(a)
    assert message in str(caught.value) and hint in (caught.value.hint or "")


# 20 tokens, 4 of them line breaks.
BROKEN_ROWS: list[tuple[PruneTokens, str | None]] = [
    (PruneTokens(keep=16), None),
    (PruneTokens(keep=17), "choose 1 to 16, or 20 for all"),
    (PruneTokens(keep=19), "choose 1 to 16, or 20 for all"),
    (PruneTokens(keep=20), None),
    (PruneTokens(keep=4, line_breaks="keep"), "choose 5 to 20, or 20 for all"),
    (PruneTokens(keep=1, line_breaks="keep"), "choose 5 to 20, or 20 for all"),
    (PruneTokens(keep=5, line_breaks="keep"), None),
    (PruneTokens(keep=19, line_breaks="keep"), None),
    (PruneTokens(keep=1, line_breaks="compete"), None),
    (PruneTokens(keep=19, line_breaks="compete"), None),
]


@pytest.mark.parametrize(("step", "hint"), BROKEN_ROWS)
def test_line_breaks_limit_what_can_be_kept(tiny, step: PruneTokens, hint: str | None) -> None:
    a = TrimTower().plan(describe(tiny("llava").model))
    bucket = dataclasses.replace(a.buckets[0], tokens=20, panels=(Panel(rows=4, columns=4, line_breaks=True),))
    a = dataclasses.replace(a, buckets=(bucket,), breaks=(len(bucket.line_breaks),), keep=(20,))
    assert a.breaks == (4,)
    if hint is None:
        assert step.plan(a).keep == (step.keep,)
        return
    with pytest.raises(PassError, match=f"keep={step.keep} of 20 tokens, 4 of them line breaks") as caught:
        step.plan(a)
    assert caught.value.hint == hint


def test_one_number_serves_every_bucket() -> None:
    a = TrimTower().plan(describe(vlmcut.load("tiny:qwen2_vl", sizes=((64, 64), (96, 64))).model))
    assert PruneTokens(keep=4).plan(a).keep == (4, 4)
    assert PruneTokens(keep=(4, 6)).plan(a).keep == (4, 6)
    small, large = (bucket.tokens for bucket in a.buckets)
    with pytest.raises(PassError, match=f"keep={large}, but `qwen2_vl` makes {small} visual tokens"):
        PruneTokens(keep=large).plan(a)
    assert from_flags(a, prune=0.5).plan(a).keep == (kept_tokens(small, 0.5), kept_tokens(large, 0.5))
    with pytest.raises(PassError, match=f"already keeps 4/6 of {small}/{large} tokens by `fastervlm`"):
        make([PruneTokens(keep=(4, 6)), PruneTokens(keep=3)]).plan(a)


def test_methods_that_need_attention_are_refused_without(tiny) -> None:
    a = dataclasses.replace(TrimTower().plan(describe(tiny("llava").model)), scored=())
    scoring = [name for name, row in METHODS.items() if row.blocks is not None and not row.frames]
    assert len(scoring) > 5
    for name in ("divprune", "random", "uniform"):
        assert PruneTokens(keep=3, method=name).plan(a).method == name
    for name in scoring:
        with pytest.raises(
            PassError, match=f"`{re.escape(name)}` scores tokens by attention in the vision tower"
        ) as caught:
            PruneTokens(keep=3, method=name).plan(a)
        assert caught.value.hint == "use divprune, random or uniform"


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (PruneTokens(keep=3), "already keeps 3 of 16 tokens by `fastervlm`"),
        (TrimVocabulary(size=200), "trim-vocabulary: 2 of them, to 200 and 200 rows"),
        (Quantize(), "vision is int8 already"),
        (Quantize(parts=("language",)), "language is int8 already"),
    ],
)
def test_a_pass_that_cannot_come_twice(tiny, step: Pass, message: str) -> None:
    a = describe(tiny("llava").model)
    with pytest.raises(PassError) as caught:
        make([step, step]).plan(a)
    assert message in str(caught.value) and caught.value.hint


@pytest.mark.parametrize("part", ["vision", "language"])
@pytest.mark.parametrize("cut", [DropHeads, DropNeurons])
def test_rows_cannot_leave_an_int8_linear(tiny, part: str, cut: type[DropHeads | DropNeurons]) -> None:
    """Its scales would keep their length; refused, so that quantize comes last."""
    a = describe(tiny("llava").model)
    with pytest.raises(PassError, match=f"{part} is int8 already") as caught:
        make([Quantize(parts=(part,)), cut(part=part, fraction=0.5)]).plan(a)
    assert caught.value.hint == "put quantize last"


def test_layers_and_tokens_can_leave_an_int8_model(tiny, logits) -> None:
    """Whole layers and rows do not touch a scale: the order does not matter, to the bit."""
    cuts = [DropLayers(part="vision", count=1, drop=(1,)), PruneTokens(keep=5)]
    one, other = tiny("llava"), tiny("llava")
    make([Quantize(), *cuts]).apply(one.model, None)
    make([*cuts, Quantize()]).apply(other.model, None)
    assert torch.equal(logits(one), logits(other))


def test_tokens_are_chosen_behind_the_last_layer(tiny) -> None:
    """Without trim-tower the model would read its features from an earlier layer, all of them."""
    with pytest.raises(PassError, match="the tower still has 5 layers of which 4 are used") as caught:
        PruneTokens(keep=4).plan(describe(tiny("llava").model))
    assert caught.value.hint == "put trim-tower first"


def test_a_refusal_edits_nothing(tiny) -> None:
    """The whole recipe is planned before the first pass is applied."""
    loaded = tiny("llava")
    before = describe(loaded.model)
    with pytest.raises(PassError):
        make([PruneTokens(keep=3), DropLayers(part="language", count=9)]).apply(loaded.model, None)
    assert describe(loaded.model) == before


def test_names_are_importable() -> None:
    assert vlmcut.load is importlib.import_module("vlmcut.passes.folder").load


def test_a_method_that_reads_the_question_says_so(tiny) -> None:
    """In the plan, in the model's description, and in words, with what it means for a conversation."""
    loaded = tiny("llava")
    a = TrimTower().plan(describe(loaded.model))
    step = PruneTokens(keep=5, method="mmtok")
    assert step.plan(a).query_dependent and not PruneTokens(keep=5).plan(a).query_dependent
    (note,) = step.notes(a)
    assert "another question needs another look" in note and "later turns" in note
    make([step]).apply(loaded.model, None)
    assert describe(loaded.model).query_dependent


def test_options_of_a_method_are_read_apart_from_paths() -> None:
    """A colon separates options; one inside a value that is a path does not."""
    assert parse_method("divprune:block=4:groups=2", METHODS, "x")[1] == {"block": 4, "groups": 2}
    assert parse_method("covipal:weights=/a:b/c.safetensors", METHODS, "x")[1] == {"weights": "/a:b/c.safetensors"}
    with pytest.raises(PassError, match="`divprune` has no option `bogus`"):
        parse_method("divprune:bogus", METHODS, "x")
