"""Why attention received from all tokens keeps background: where the last tower block of the examples looks.

    python benchmarks/attention.py

A patch counts as part of a digit if its contrast is at least half of the picture's largest. Printed for 40 held-out
pictures: the share of all digit tokens that the best quarter by each score holds, and how much of a patch's attention
goes to background.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import vlmcut
from vlmcut.passes.prune_tokens import PruneTokens
from vlmcut.passes.recipe import make
from vlmcut.passes.tokens.scores import attention_rows, of_tokens
from vlmcut.prompt import Prompter, open_image
from vlmcut.surgery.load import describe
from vlmcut.surgery.picking import topk
from vlmcut.surgery.vision import look, prepare

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@torch.no_grad()
def main() -> None:
    """Print one table for both examples."""
    print("| example | digit tokens held by [CLS] | by all rows | by digits' rows | by background's rows | by chance |")
    print("|---|---|---|---|---|---|")
    for example in ("scenes", "scenes-smol"):
        loaded = vlmcut.load(EXAMPLES / example)
        a = describe(loaded.model)
        keep = a.visual_tokens // 4
        make([PruneTokens(keep=keep, method="fastervlm")]).apply(loaded.model, None)
        prompter = Prompter(loaded.processor, a.layout)
        held: dict[str, list[float]] = {"cls": [], "all": [], "digits": [], "background": []}
        astray: list[float] = []
        for path in sorted((EXAMPLES / example / "heldout").glob("*.png"))[:40]:
            picture, _ = prompter.look(open_image(path))
            pixels = torch.from_numpy(picture.pixel_values)
            _, state = look(loaded.model, pixels, prepare(loaded.model, picture.geometry))
            assert state.members is not None
            digit = torch.from_numpy(_digits(picture.pixel_values, int(state.members.max()) + 1))
            (tap,), cls = state.taps, int(state.has_cls)
            rows = attention_rows(*tap.rows[0], tap.scale).mean(dim=1)[0]
            patches = rows[cls:, cls:]
            scores = {"all": patches.mean(0), "digits": patches[digit].mean(0), "background": patches[~digit].mean(0)}
            scores |= {"cls": rows[0, 1:]} if cls else {}
            tokens = of_tokens(state, digit.float()[:, None])[..., 0] > 0
            for name, score in scores.items():
                best = topk(of_tokens(state, score[:, None])[..., 0], keep)
                held[name].append(float(tokens.gather(1, best).sum() / tokens.sum()))
            astray.append(float(patches[:, ~digit].sum(dim=1).mean()))
        cells = [f"{100 * np.mean(values):.0f} %" if values else "-" for values in held.values()]
        print(f"| {example} | {' | '.join(cells)} | {100 * keep / a.visual_tokens:.0f} % |")
        print(f"{example}: {100 * np.mean(astray):.0f} % of a patch's attention goes to background patches")


def _digits(pixel_values: np.ndarray, patches: int) -> np.ndarray:
    """Which patches of a square picture have contrast, bool [patches]."""
    pixels = pixel_values.reshape(-1, *pixel_values.shape[-3:])[0]
    side = round(patches**0.5)
    size = pixels.shape[-1] // side
    contrast = pixels.reshape(3, side, size, side, size).transpose(1, 3, 0, 2, 4).reshape(patches, -1).std(axis=1)
    return contrast > 0.5 * contrast.max()


if __name__ == "__main__":
    main()
