"""Every image-text-to-text type that transformers registers, tried with a tiny random model: works, or refused because.

A type works if vlmcut reads it as transformers does, cuts its visual tokens by half, exports it, and the graphs compute
what the cut model computes. Nothing here knows a type by name: it is the check of the shared conventions themselves.
"""

from __future__ import annotations

import logging
import re
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ParityError, VlmcutError
from ..exporters.graphs import write_graphs
from ..exporters.operators import Contrib
from ..manifest import Manifest, TokenBudget
from ..passes import recipe as recipes
from ..surgery import tiny
from ..surgery.families import family_of
from ..surgery.load import attach, describe, load
from ..surgery.tiny import shrink
from . import stock
from .prove import prove
from .sketch import sketch

LOGITS = 1e-4  # most absolute distance of a float32 graph's logits from the cut model in float64
_PRUNE = 0.5
_TEXT, _NEW = 24, 17  # tokens; 16 are compared after the first


@dataclass(frozen=True)
class Row:
    """What became of one type."""

    kind: str
    works: bool
    reason: str = ""  # one sentence; empty if it works
    stock: float | None = None  # worst distance from transformers' own forward, in units of the largest logit
    logits: float | None = None  # worst absolute distance of a graph's logits; None if nothing was exported
    tokens: int = 0  # greedy tokens compared, all equal
    method: str = ""  # of choosing tokens: by attention in the tower where it is known which belongs to whom
    processor: bool = False  # whether the tiny model has one; without, pixels are shaped from the tower
    seconds: float = 0.0


def survey(kinds: Iterable[str] | None = None, *, export: bool = True) -> Iterator[Row]:
    """Try types one by one; a row as soon as one is done.

    Args:
        kinds: model types; all that transformers registers for None.
        export: also cut, export and prove; otherwise describe and compare with transformers only.
    """
    for kind in shrink.kinds() if kinds is None else kinds:
        yield _row(kind, export)


def line(row: Row) -> str:
    """A row as text."""
    said = f"refused because {row.reason}"
    if row.works:
        said = f"works   from transformers {row.stock:.0e}"
        if row.logits is not None:
            said += f", logits {row.logits:.0e}, {row.tokens} tokens equal, {row.method}"
    return f"{row.kind:<24} {said} ({row.seconds:.0f} s)"


def counts(rows: Sequence[Row]) -> str:
    """How many work."""
    works = sum(row.works for row in rows)
    return f"{works} of {len(rows)} types work, {len(rows) - works} are refused"


def markdown(rows: Sequence[Row]) -> str:
    """A table of every type."""
    lines = ["| type | verdict | from transformers | worst logit error | tokens equal | method | pixels from |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [f"`{row.kind}`", f"refused: {row.reason.replace('|', '/')}", "", "", "", "", ""]
        if row.works:
            cells[1:3] = ["works", f"{row.stock:.1e}"]
            if row.logits is not None:
                cells[3:6] = [f"{row.logits:.1e}", str(row.tokens), row.method]
            cells[6] = "its processor" if row.processor else "the tower's shape"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _row(kind: str, export: bool) -> Row:
    started = time.perf_counter()
    try:
        with _quiet():
            found = _try(kind, export)
    except VlmcutError as error:
        found = {"works": False, "reason": _sentence(str(error), kind)}
    # These are other people's models, run in ways that they may not foresee: whatever comes out of them says that this
    # type does not follow the conventions, and must not end the survey of the others.
    except Exception as caught:  # noqa: BLE001
        error: BaseException = caught
        while error.__cause__ is not None:  # an exporter wraps what went wrong several times
            error = error.__cause__
        words = _sentence(str(error), kind) or "no words"
        found = {"works": False, "reason": f"trying it raised {type(error).__name__}: {words}"}
    return Row(kind, **found, seconds=time.perf_counter() - started)


def _try(kind: str, export: bool) -> dict[str, Any]:
    model, processor = tiny.make(kind)
    family = family_of(model.config)
    family.layout(model.config)  # the plainest reason first: no placeholder
    attach(model.eval(), ())
    describe(model)
    family.check(model.config)
    if processor is None:
        attach(model, (sketch(model),))
        distance = stock.check_bare(model)
    else:
        loaded = load(f"tiny:{kind}")
        model, distance = loaded.model, stock.check(loaded)
    found = {"works": True, "processor": processor is not None, "stock": distance}
    if not export:
        return found
    method = "fastervlm" if describe(model).scored else "uniform"  # the first needs more of the tower
    worst, tokens = _export(model, method)
    return found | {"logits": worst, "tokens": tokens, "method": method}


def _export(model: Any, method: str) -> tuple[float, int]:
    """Cut, export and prove; the worst distance of logits, and how many greedy tokens were compared."""
    recipe = recipes.from_flags(describe(model), prune=_PRUNE, method=method).apply(model, None)
    a = describe(model)
    budget = TokenBudget(images=1, visual_tokens=max(a.keep), text_tokens=_TEXT, new_tokens=_NEW)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        graphs = write_graphs(model, (budget,), (a.keep,), Contrib(), folder)
        manifest = Manifest(
            source={},
            recipe=recipe.tables(),
            target="onnx",
            dtype="float32",
            layout=a.layout,
            buckets=a.buckets,
            budgets=(budget,),
            graphs=graphs,
            tools={},
            anatomy=a.to_json(),
        )
        verdict = prove(model, a, manifest, folder, seed=0, progress=lambda _: None)
    worst = max(row.max_abs for row in verdict.rows if row.output == "logits")
    if not worst <= LOGITS:
        raise ParityError(f"{method}: logits of the graphs are {worst:.1e} from the cut model's, {LOGITS:.0e} allowed")
    if verdict.equal != verdict.tokens:
        raise ParityError(f"{method}: {verdict.equal} of {verdict.tokens} greedy tokens are equal")
    return worst, verdict.tokens


def _sentence(text: str, kind: str) -> str:
    """The first line of an error on one line, without what names the type or this machine again."""
    line = " ".join((text.strip().splitlines() or [""])[0].split())
    line = re.sub(rf"^(cannot describe )?`?{re.escape(kind)}`?:? ", "", line)
    line = re.sub(r"^(cannot|has) ", r"it \1 ", line.removesuffix(" You can install it with pip:"))
    return line if len(line) <= 240 else line[:239] + "…"


@contextmanager
def _quiet() -> Iterator[None]:
    """A trace that fails logs its whole graph; the reason in the row is enough."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
