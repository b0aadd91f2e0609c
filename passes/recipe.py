"""Recipes: a list of passes as TOML, from flags or from a file; planned whole before anything is edited.

    [[pass]]
    name = "prune-tokens"
    keep = 36
    method = "fastervlm"

The schema of a table is the fields of its pass. Unknown names and keys are errors with the nearest known one.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import PassError, nearest
from ..surgery.anatomy import Anatomy
from ..surgery.load import describe
from .base import PARTS, Pass, keys
from .bottleneck import Bottleneck
from .calibration import Calibration
from .drop_heads import DropHeads
from .drop_layers import DropLayers
from .drop_neurons import DropNeurons
from .heal import Heal
from .lessons import listen
from .prune_inside import PruneInside
from .prune_inside import from_flags as inside_from_flags
from .prune_tokens import PruneTokens, kept_tokens, usual_method
from .quantize import SCHEMES, Quantize
from .skip_visual import SkipVisual
from .slim_visual import SlimVisual
from .tokens.method import parse as parse_method
from .tokens.methods import METHODS
from .trim_tower import TrimTower
from .trim_vocabulary import TrimVocabulary

PASSES: dict[str, type[Pass]] = {
    p.name: p
    for p in (
        TrimTower,
        DropLayers,
        DropHeads,
        DropNeurons,
        PruneTokens,
        PruneInside,
        SkipVisual,
        Bottleneck,
        SlimVisual,
        Heal,
        TrimVocabulary,
        Quantize,
    )
}


@dataclass(frozen=True)
class Recipe:
    """Passes in the order in which they are applied."""

    passes: tuple[Pass, ...]

    def plan(self, a: Anatomy) -> Anatomy:
        """The anatomy this recipe will produce; refuses before anything is edited."""
        self.check_order()
        for step in self.passes:
            a = step.plan(a)
        return a

    def check_order(self) -> None:
        """Refuse a vocabulary cut twice, and a training that nothing needs, that is made twice, or undone by a cut."""
        vocabularies = [step.size for step in self.passes if isinstance(step, TrimVocabulary)]
        if len(vocabularies) > 1:
            raise PassError(
                f"{TrimVocabulary.name}: {len(vocabularies)} of them, to {' and '.join(map(str, vocabularies))} rows",
                hint="name the pass once, with the smallest size",
            )
        places = [i for i, step in enumerate(self.passes) if isinstance(step, Heal)]
        if not places:
            return
        if len(places) > 1:
            raise PassError(f"{Heal.name}: {len(places)} of them", hint="heal once, after the last cut")
        before, after = self.passes[: places[0]], self.passes[places[0] + 1 :]
        if all(isinstance(step, TrimTower) for step in before):
            raise PassError(f"{Heal.name}: no pass before it cuts anything", hint="put it after the cuts")
        if late := [step.name for step in after if not isinstance(step, TrimVocabulary | Quantize)]:
            raise PassError(
                f"{Heal.name}: `{late[0]}` comes after it",
                hint="put it after every cut; only trim-vocabulary and quantize may follow",
            )
        if early := [step.name for step in before if isinstance(step, TrimVocabulary)]:
            raise PassError(
                f"{Heal.name}: `{early[0]}` comes before it, and the uncut model knows all tokens",
                hint=f"put {early[0]} behind heal",
            )

    @property
    def heals(self) -> bool:
        return any(isinstance(step, Heal) for step in self.passes)

    def unhealed(self) -> Recipe:
        """The same without its training."""
        return Recipe(tuple(step for step in self.passes if not isinstance(step, Heal)))

    def keeping(self, keep: tuple[int, ...]) -> Recipe:
        """The same with so many tokens of an image of each bucket: one recipe serves several budgets."""
        return Recipe(
            tuple(dataclasses.replace(p, keep=keep) if isinstance(p, PruneTokens) else p for p in self.passes)
        )

    def notes(self, a: Anatomy) -> list[str]:
        """What the user should know about each pass, in order."""
        found = []
        for step in self.passes:
            found += step.notes(a)
            a = step.plan(a)
        return found

    @property
    def needs_calibration(self) -> bool:
        return any(step.needs_calibration for step in self.passes)

    def apply(self, model: Any, calibration: Calibration | None) -> Recipe:
        """Apply every pass to the model in place.

        Args:
            calibration: needed if `needs_calibration`.

        Returns:
            The resolved recipe: applying it again to the same weights needs no data and gives the same model.

        Raises:
            PassError: a pass cannot do what it should, or must look at data and there are none.
        """
        a = describe(model)
        self.plan(a)
        if blind := [step.name for step in self.passes if step.needs_calibration and calibration is None]:
            raise PassError(
                f"{blind[0]}: there are no calibration prompts",
                hint="give them; where a recipe heals, it makes the same model again only from the same ones",
            )
        if self.heals and calibration is not None:  # before anything is cut
            calibration = dataclasses.replace(calibration, lessons=listen(model, calibration.prompts))
        done = []
        for step in self.passes:
            if step.needs_calibration:
                assert calibration is not None
                step = step.resolve(model, a, calibration)
            planned = step.plan(a)
            step.apply(model, a)
            a = describe(model)
            if a != planned:
                raise PassError(f"{step.name}: the model is not what was planned", hint="report this as a bug")
            done.append(step)
        return Recipe(tuple(done))

    def tables(self) -> list[dict[str, Any]]:
        """The recipe as plain data, one dict per pass, without keys that are unset."""
        return [
            {"name": step.name} | {k: _plain(v) for k in keys(type(step)) if (v := getattr(step, k)) is not None}
            for step in self.passes
        ]

    def to_toml(self) -> str:
        """The recipe as TOML; `parse` reads it back to an equal recipe."""
        lines = []
        for table in self.tables():
            lines += ["[[pass]]", *(f"{key} = {_toml(value)}" for key, value in table.items()), ""]
        return "\n".join(lines)


def parse(text: str, where: str = "recipe") -> Recipe:
    """Read a recipe. A trim-tower pass is put first if it is not there: it is exact and every other relies on it.

    Raises:
        PassError: not TOML, an unknown pass or key, a value of the wrong type.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PassError(f"{where} is not TOML: {error}", hint="see docs/recipes.md for an example") from error
    if unknown := sorted(set(data) - {"pass"}):
        raise PassError(f"{where}: unknown key `{unknown[0]}`", hint="a recipe is a list of [[pass]] tables")
    tables = data.get("pass", [])
    if not isinstance(tables, list):
        raise PassError(f"{where}: `pass` is one table", hint="write [[pass]], with two brackets")
    return from_tables(tables, where)


def from_tables(tables: Sequence[Any], where: str = "recipe") -> Recipe:
    """A recipe from plain data, one dict per pass."""
    return make([_build(table, f"{where}, pass {i}") for i, table in enumerate(tables, start=1)])


def make(passes: Sequence[Pass]) -> Recipe:
    """A recipe of these passes, with trim-tower first."""
    rest = [p for p in passes if not isinstance(p, TrimTower)]
    return Recipe((TrimTower(), *rest))


def read(path: Path) -> Recipe:
    """Read a recipe file."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise PassError(f"`{path}` cannot be read: {error}", hint="give a TOML file") from error
    return parse(text, f"`{path}`")


def from_flags(
    a: Anatomy,
    *,
    prune: float | None = None,
    keep: int | tuple[int, ...] | None = None,
    method: str | None = None,
    drop_heads: Mapping[str, float] | None = None,
    drop_layers: Mapping[str, int] | None = None,
    drop_neurons: Mapping[str, float] | None = None,
    importance: str | None = None,
    ranking: str | None = None,
    inside: str | None = None,
    ladder: Sequence[tuple[int, float]] = (),
    exit_layer: int | None = None,
    skip_visual: Mapping[str, int] | None = None,
    slim_visual: Mapping[str, float] | None = None,
    carriers: int | None = None,
    heal: int | None = None,
    vocabulary: int | None = None,
    quantize: str = "none",
    seed: int = 0,
) -> Recipe:
    """The recipe that the command line's flags stand for: vision cuts, tokens, language cuts, training, quantization.

    Args:
        method: how tokens are chosen; `usual_method` for None.
        importance: of every pass that drops something. ranking: of those of them that can rank by layer or globally.
        inside: how tokens leave inside the language model, at the layers of `ladder` or at the method's own.
        exit_layer: from which no visual token goes on; rungs from there on are left out of a method's own ladder.
        skip_visual: what visual tokens skip, in how many layers.
        slim_visual: what visual tokens use less of, and the fraction that they leave out.
        carriers: tokens of an image through which text sees it.
        heal: steps of training of the parts that are cut; the language model is one of them if it sees fewer tokens.

    Raises:
        PassError: a ratio outside 0 <= R < 1, both `prune` and `keep`, an unknown part, scheme or importance.
    """
    drops: dict[str, tuple[type[Pass], str, Mapping[str, float]]] = {
        "--drop-layers": (DropLayers, "count", drop_layers or {}),
        "--drop-heads": (DropHeads, "fraction", drop_heads or {}),
        "--drop-neurons": (DropNeurons, "fraction", drop_neurons or {}),
    }
    for flag, (_, _, given) in drops.items():
        if unknown := sorted(set(given) - set(PARTS)):
            raise PassError(f"{flag}: no part `{unknown[0]}`", hint=nearest(unknown[0], PARTS))
    how = {key: said for key, said in (("importance", importance), ("ranking", ranking)) if said is not None}
    for key, said in how.items():
        know = {flag: given for flag, (kind, _, given) in drops.items() if key in keys(kind)}
        if not any(any(given.values()) for given in know.values()):
            raise PassError(f"--{key} {said}: nothing is dropped that it could rank", hint=f"add {' or '.join(know)}")
    method = method or usual_method(a)
    parse_method(method, METHODS, "--method")
    if prune is not None and keep is not None:
        raise PassError("--prune and --keep are both given", hint="give one of them")
    if prune is not None:
        if not 0 <= prune < 1:
            raise PassError(
                f"--prune {prune:g} is not a fraction of the tokens to remove",
                hint="choose 0 <= R < 1, for example 0.75 to keep a quarter",
            )
        counts = tuple(kept_tokens(bucket.tokens, prune) for bucket in a.buckets)
        keep = counts[0] if len(counts) == 1 else counts

    def cuts(part: str) -> list[Pass]:
        return [
            kind(**{"part": part, amount: given[part]}, **{k: v for k, v in how.items() if k in keys(kind)})
            for kind, amount, given in drops.values()
            if given.get(part)
        ]

    passes = cuts("vision")
    tokens = tuple(bucket.tokens for bucket in a.buckets)
    if keep is not None and (keep if isinstance(keep, tuple) else (keep,) * len(tokens)) != tokens:
        passes.append(PruneTokens(keep=keep, method=method, seed=seed))
    passes += cuts("language")
    if inside is not None or ladder or exit_layer is not None:
        kept = a.language.layers - (drop_layers or {}).get("language", 0)
        passes.append(inside_from_flags(inside, ladder, exit_layer, kept, a.language.levels))
    passes += [SkipVisual(what=what, count=count) for what, count in (skip_visual or {}).items()]
    passes += [SlimVisual(what=what, fraction=share) for what, share in (slim_visual or {}).items()]
    if carriers is not None:
        passes.append(Bottleneck(carriers=carriers))
    if heal is not None:
        touched = {getattr(p, "part", "language") for p in passes}  # tokens leave the language model
        passes.append(Heal(steps=heal, parts=tuple(part for part in PARTS if part in touched) or PARTS))
    if vocabulary is not None and vocabulary != a.language.vocabulary:
        passes.append(TrimVocabulary(size=vocabulary))
    if quantize != "none":
        if quantize not in SCHEMES:
            raise PassError(f"--quantize {quantize}: unknown scheme", hint=nearest(quantize, ("none", *SCHEMES)))
        passes.append(Quantize(scheme=quantize))
    return make(passes)


def _build(table: Any, where: str) -> Pass:
    if not isinstance(table, dict) or "name" not in table:
        raise PassError(f"{where}: a pass needs a `name`", hint=f"known: {', '.join(sorted(PASSES))}")
    name = table["name"]
    if name not in PASSES:
        raise PassError(f"{where}: no pass `{name}`", hint=nearest(str(name), PASSES))
    kind = PASSES[name]
    types_ = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind) if f.name in keys(kind)}
    values = {}
    for key, value in table.items():
        if key == "name":
            continue
        if key not in fields:
            raise PassError(f"{where} `{name}`: unknown key `{key}`", hint=nearest(key, fields) if fields else None)
        values[key] = _typed(value, types_[key], f"{where} `{name}`: {key}")
    required = [n for n, f in fields.items() if f.default is dataclasses.MISSING]
    if missing := [n for n in required if n not in values]:
        raise PassError(f"{where} `{name}`: `{missing[0]}` is not set", hint=f"it needs: {', '.join(required)}")
    return kind(**values)


def _typed(value: Any, want: Any, where: str) -> Any:
    origin, args = typing.get_origin(want), typing.get_args(want)
    if origin in (types.UnionType, typing.Union):
        wanted = [a for a in args if a is not type(None)]
        lists = [a for a in wanted if typing.get_origin(a) is tuple]
        return _typed(value, lists[0] if lists and isinstance(value, list) else wanted[0], where)
    if origin is tuple and isinstance(value, list):
        return tuple(_typed(v, args[0], where) for v in value)
    if want is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(want, type) or not isinstance(value, want) or isinstance(value, bool):
        name = getattr(want, "__name__", str(want)) if origin is None else "list"
        raise PassError(f"{where} = {value!r} is not of type {name}", hint="see docs/recipes.md")
    return value


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _toml(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML escapes as JSON, and DEL too
    if isinstance(value, list):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    return repr(value)
