"""The report of a conversion: JSON for machines, JUnit for CI, one HTML page for people, a few lines for terminals."""

from __future__ import annotations

import dataclasses
import html
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ..manifest import ExactnessRow, Manifest
from .exactness import MULTIPLE, MULTIPLE_INT8, Exactness


def exactness_json(verdict: Exactness) -> dict[str, Any]:
    """The `exactness` field of a manifest."""
    return {
        "ok": verdict.ok,
        "tokens": verdict.tokens,
        "equal": verdict.equal,
        "near_ties": verdict.near_ties,
        "rows": [dataclasses.asdict(row) for row in verdict.rows],
    }


def rows_of(manifest: Manifest) -> list[ExactnessRow]:
    """The exactness rows of a manifest."""
    return [ExactnessRow(**row) for row in manifest.exactness.get("rows", [])]


def line(row: ExactnessRow) -> str:
    """One row as text: graph, output, distance, floor, tolerance."""
    mark = "ok  " if row.ok else "FAIL"
    name = f"{row.graph}.{row.output}"
    text = f"{mark} {name:<28} {row.max_abs:9.2e}  floor {row.floor:8.1e}  allowed {row.tolerance:8.1e}"
    return f"{text}  {row.note}" if row.note else text


def failure(verdict: Exactness) -> str:
    """Why a conversion failed: the worst rows and the tokens that differ."""
    failing = [line(row) for row in verdict.worst() if not row.ok]
    head = "the graphs do not compute what the cut eager model computes"
    return "\n  ".join([head, *failing, *verdict.wrong[:5]])


def write(manifest: Manifest, folder: Path) -> None:
    """Write `report/verify.json`, `report/junit.xml` and `report/index.html`."""
    place = folder / "report"
    place.mkdir(exist_ok=True)
    rows = rows_of(manifest)
    (place / "verify.json").write_text(json.dumps(manifest.exactness, indent=1) + "\n")
    (place / "junit.xml").write_bytes(junit(rows))
    (place / "index.html").write_text(page(manifest, rows))


def junit(rows: list[ExactnessRow]) -> bytes:
    """One test case per graph output."""
    suite = ElementTree.Element(
        "testsuite", name="vlmcut exactness", tests=str(len(rows)), failures=str(sum(not r.ok for r in rows))
    )
    for row in rows:
        case = ElementTree.SubElement(suite, "testcase", classname=row.graph, name=row.output)
        if not row.ok:
            ElementTree.SubElement(case, "failure", message=line(row))
    return ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True)


_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.25em .8em;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}td{white-space:nowrap}td:last-child{white-space:normal}.ok{color:#176f2c}.bad{color:#b00020;font-weight:600}
pre{background:#f5f5f5;padding:1em;overflow:auto}"""


def page(manifest: Manifest, rows: list[ExactnessRow]) -> str:
    """The report as one HTML page without scripts or links."""
    ok = manifest.exactness.get("ok")
    verdict = f'<span class="{"ok" if ok else "bad"}">{"exact" if ok else "NOT exact"}</span>'
    tokens = f"{manifest.exactness.get('equal')} of {manifest.exactness.get('tokens')} greedy tokens equal"
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>vlmcut report</title>",
        f"<style>{_STYLE}</style><h1>{html.escape(str(manifest.source.get('id')))}: {verdict}</h1>",
        f"<p>Target {manifest.target}, {manifest.dtype}. {tokens}. A graph may be {MULTIPLE} times (int8: "
        f"{MULTIPLE_INT8} times) as far from the float64 reference as the eager model in its own dtype is (the floor)."
        "</p>",
        _table(
            ["budget", "images", "tokens per image", "text", "new", "prompt columns", "cache rows"],
            [
                [
                    str(i),
                    str(b.images),
                    f"{b.visual_tokens} of {max(bucket.tokens for bucket in manifest.buckets)}",
                    str(b.text_tokens),
                    str(b.new_tokens),
                    str(b.sequence),
                    str(b.cache),
                ]
                for i, b in enumerate(manifest.budgets)
            ],
        ),
        "<h2>Exactness</h2>",
        _table(
            ["graph and output", "distance", "floor", "allowed", "verdict", "note"],
            [
                [
                    f"{r.graph}.{r.output}",
                    f"{r.max_abs:.2e}",
                    f"{r.floor:.1e}",
                    f"{r.tolerance:.1e}",
                    "ok" if r.ok else "FAIL",
                    r.note,
                ]
                for r in rows
            ],
        ),
    ]
    if manifest.exactness.get("near_ties"):
        parts.append("<h2>Near ties</h2><ul>")
        parts += [f"<li>{html.escape(text)}</li>" for text in manifest.exactness["near_ties"]]
        parts.append("</ul>")
    if work := manifest.anatomy.get("work"):
        parts += ["<h2>Work of one call</h2>", _table(_WORK, [_work_cells(name, one) for name, one in work.items()])]
    if manifest.quality:
        q = manifest.quality
        parts += [
            f"<h2>Quality on {q['questions']} questions</h2>",
            _table(
                ["model", "answers right", "agrees with the original"],
                [[n, f"{100 * v:.1f} %", f"{100 * q['agreement'][n]:.1f} %"] for n, v in q["accuracy"].items()],
            ),
        ]
    sizes = [[name, f"{file['bytes']:,}"] for name, file in manifest.files.items() if file["bytes"] > 100_000]
    parts += ["<h2>Files above 100 kB</h2>", _table(["file", "bytes"], sizes)]
    recipe = json.dumps(manifest.recipe, indent=1)
    parts += [f"<h2>Recipe</h2><pre>{html.escape(recipe)}</pre>"]
    parts += ["<h2>Made with</h2>", _table(["tool", "version"], [[k, v] for k, v in manifest.tools.items()]), "</html>"]
    return "\n".join(parts)


_WORK = ["graph", "GFLOP counted", "predicted", "ratio", "MB of weights read", "MB of states"]


def _work_cells(name: str, work: dict[str, Any]) -> list[str]:
    """A row of the table of work; see `work.py`."""
    have = work["counted"]
    flops = [f"{one['flops'] / 1e9:.4g}" for one in (have, work["predicted"])]
    sizes = [f"{have[key] / 1e6:.3f}" for key in ("weight_bytes", "state_bytes")]
    return [name, *flops, f"{work['ratio']:.3f}", *sizes]


def _table(head: list[str], rows: list[list[str]]) -> str:
    def cells(tag: str, values: list[str]) -> str:
        return "".join(f"<{tag}>{html.escape(v)}</{tag}>" for v in values)

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><tr>{cells('th', head)}</tr>{body}</table>"
