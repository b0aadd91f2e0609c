"""docs/methods.md: every method of `prune-tokens`, and which family takes which; from the table of methods itself.

    python benchmarks/methods_page.py [--write]

Families are planned at a quarter of the visual tokens of one picture (of a clip of four for methods that compare
frames), on tiny models without weights: what `plan` refuses stands in a note, with its fix.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping
from pathlib import Path

from families import SIZES
from vlmcut import pipeline
from vlmcut.errors import PassError, VlmcutError
from vlmcut.passes.prune_tokens import PruneTokens, kept_tokens
from vlmcut.passes.tokens.method import Method
from vlmcut.passes.tokens.methods import METHODS, TableSelector
from vlmcut.passes.trim_tower import TrimTower
from vlmcut.surgery.anatomy import Anatomy

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"
FRAMES = 4  # of a clip
_RATIO = 0.75  # of the tokens removed
_BLOCKS = 24  # of CLIP-L, for naming which ones a method looks at
KINDS = [kind for kind in SIZES if kind != "fast_vlm"]  # its tiny model needs timm, which tests do without
_HEAD = """# Methods

How `prune-tokens` chooses the visual tokens of an image: `--method NAME`, or `--method NAME:option=value:…`. Each is a
row of one table in `passes/tokens/`, from which this page is made (`python benchmarks/methods_page.py --write`). What
they are worth on a model is for `vlmcut sweep MODEL` to say; `random` and `uniform` are the baselines to beat.

"""
_TAKES = f"""
## Which family takes which

Planned on a tiny model of each family with one picture, a quarter of its tokens kept; methods that compare frames with
a clip of {FRAMES}. A number is a note below: what `plan` says instead, and the fix. `fast_vlm` is not shown: its
tower has no attention that belongs to tokens, so methods that look at attention are refused.

"""


def inputs(name: str, row: Method) -> str:
    """What a method looks at, beside the tokens."""
    found = []
    if row.blocks is not None:
        blocks = list(dict.fromkeys(row.blocks(range(_BLOCKS), dict(row.options) | {"seed": 0})))
        found.append(f"attention: {_blocks(blocks)}")
    if row.inside is not None:
        found.append("keys in every block" if row.merges else "attention in some blocks")
    if outputs := TableSelector(name).outputs:
        found.append(f"outputs of blocks {', '.join(map(str, outputs))}")
    if row.without_cls:
        found.append("[CLS]")
    found += [word for word, there in (("grid", row.grid), ("question", row.text), ("frames", row.frames)) if there]
    if "weights" in row.options:
        found.append("trained weights")
    return ", ".join(found) or "-"


def _blocks(blocks: list[int]) -> str:
    """Numbers of a tower of 24 blocks, as whoever reads about CLIP-L knows them."""
    if blocks == [_BLOCKS - 1]:
        return "last block"
    if len(blocks) > 2 and blocks == list(range(blocks[0], blocks[-1] + 1)):
        return f"blocks {blocks[0]} to {blocks[-1]} of {_BLOCKS}"
    return f"blocks {' and '.join(map(str, blocks))} of {_BLOCKS}"


def methods_table() -> str:
    """What each method is."""
    lines = [
        "| method | paper | source | works | looks at | options | differs from the paper | without [CLS] |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in METHODS.items():
        options = ", ".join(f"`{key}={_option(value)}`" for key, value in row.options.items())
        cells = (
            f"`{name}`: {row.summary}", row.title, _linked(row.source), row.stage, inputs(name, row), options or "-",
            row.differs or "-", row.without_cls or "-",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines)


def _option(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _linked(source: str) -> str:
    return re.sub(r"arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", source)


def anatomies(frames: int) -> dict[str, Anatomy | str]:
    """Every family's tiny model, trimmed, for one picture or one clip, or why it takes none; no weight is kept."""
    found: dict[str, Anatomy | str] = {}
    for kind in KINDS:
        request = pipeline.Request(
            model=f"tiny:{kind}", image_size=SIZES[kind][:1], frames=frames, text_tokens=8, new_tokens=2
        )
        try:
            found[kind] = TrimTower().plan(pipeline.plan(request).before)
        except VlmcutError as error:
            found[kind] = _said(error)
    return found


def refusal(name: str, a: Anatomy | str) -> str | None:
    """Why a family does not take a method at a quarter of its tokens, with the fix; None if it does."""
    if isinstance(a, str):
        return a
    try:
        PruneTokens(keep=kept_tokens(a.visual_tokens, _RATIO), method=name).plan(a)
    except PassError as error:
        return _said(error).replace(f"`{a.family}`", "the model")
    return None


def _said(error: VlmcutError) -> str:
    text = str(error).removeprefix(f"{PruneTokens.name}: ")
    return text if error.hint is None else f"{text}; {error.hint}"


def families_table(pictures: Mapping[str, Anatomy | str], clips: Mapping[str, Anatomy | str]) -> str:
    """Methods by families, and the notes."""
    notes: dict[str, int] = {}
    lines = [f"| method | {' | '.join(pictures)} |", f"|---|{'---|' * len(pictures)}"]
    for name, row in METHODS.items():
        found = [refusal(name, a) for a in (clips if row.frames else pictures).values()]
        cells = ["yes" if why is None else str(notes.setdefault(why, len(notes) + 1)) for why in found]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{number}. {why}" for why, number in notes.items())])


def page() -> str:
    """The whole of docs/methods.md."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    table = families_table(anatomies(1), anatomies(FRAMES))
    return f"{_HEAD}{methods_table()}\n{_TAKES}{table}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/methods.md instead of printing it")
    text = page()
    if parser.parse_args().write:
        PAGE.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
