"""Every image-text-to-text type of transformers, tried on a tiny random model; writes docs/transformers.md.

    python benchmarks/transformers_types.py [TYPE …] [--eager] [--write]

For each type: vlmcut's own reading against `model.forward`, half of the visual tokens cut, export to ONNX, the graphs
against the cut model in float64 on inputs that no trace has seen, and greedy tokens. Half an hour on one core.
"""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path

import torch
import transformers
from vlmcut.api import survey
from vlmcut.validation.survey import LOGITS, Row, counts, line, markdown

PAGE = Path(__file__).parents[1] / "docs" / "transformers.md"


def page(rows: list[Row]) -> str:
    """The whole page; no cell of it is written by hand."""
    return f"""# Every image-text-to-text type of transformers {transformers.__version__}

Written by `python benchmarks/transformers_types.py --write` on {datetime.date.today()} with torch {torch.__version__}.
The same check is `vlmcut inspect --all-transformers`.

{counts(rows)}. A type works if, on a tiny random model of it, vlmcut reads it as transformers' own `forward` does (the
distance of the logits is in units of the largest), half of the visual tokens are cut, the model is exported, and the
graphs give the cut model's logits to {LOGITS:.0e} and every one of its greedy tokens. A type that is refused says which
convention it lacks. A tiny model says nothing about the quality of a checkpoint; [families.md](families.md) has what
was tried further.

{markdown(rows)}
"""


def main() -> None:
    """Print a line per type; with --write, the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*")
    parser.add_argument("--eager", action="store_true", help="read only, export nothing")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    options = parser.parse_args()
    if options.write and (options.kinds or options.eager):
        parser.error("--write needs all types, exported")
    rows = []
    for row in survey(options.kinds or None, export=not options.eager):
        print(line(row), flush=True)
        rows.append(row)
    print(counts(rows))
    if options.write:
        PAGE.write_text(page(rows))


if __name__ == "__main__":
    main()
