"""The recipes of `passes.py`: each cut alone, and visual work cut from several sides, with nothing left to measure."""

from __future__ import annotations

from collections.abc import Sequence

from vlmcut.passes.base import Pass
from vlmcut.passes.bottleneck import Bottleneck
from vlmcut.passes.drop_heads import DropHeads
from vlmcut.passes.drop_layers import DropLayers
from vlmcut.passes.drop_neurons import DropNeurons
from vlmcut.passes.prune_inside import PruneInside
from vlmcut.passes.prune_tokens import PruneTokens
from vlmcut.passes.skip_visual import SkipVisual
from vlmcut.passes.slim_visual import SlimVisual
from vlmcut.passes.trim_vocabulary import TrimVocabulary
from vlmcut.surgery.anatomy import Anatomy


def recipes(a: Anatomy) -> dict[str, tuple[Pass, ...]]:
    """Passes by name, with every choice written out that is usually measured."""

    def first(counts: Sequence[int], fraction: float) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(range(n - round(n * fraction))) for n in counts)

    def layers(part: str, count: int) -> DropLayers:
        return DropLayers(part=part, count=count, drop=tuple(range(1, 1 + count)))

    tower, lm = a.tower, a.language
    half, rows = lm.layers // 2, min(32000, lm.vocabulary // 2)
    early, late = tuple(range(half)), tuple(range(half, lm.layers))
    prune = PruneTokens(keep=round(a.visual_tokens / 4), method="divprune")
    leave = PruneInside(method="exit", layers=(half,), share=(0.0,))
    return {
        "drop-heads vision 0.25": (DropHeads(part="vision", fraction=0.25, keep=first(tower.heads, 0.25)),),
        f"drop-layers vision {max(1, tower.layers // 8)}": (layers("vision", max(1, tower.layers // 8)),),
        "drop-neurons vision 0.25": (DropNeurons(part="vision", fraction=0.25, keep=first(tower.intermediate, 0.25)),),
        "drop-heads language 0.5": (DropHeads(part="language", fraction=0.5, keep=first(lm.kv_heads, 0.5)),),
        f"drop-layers language {max(1, lm.layers // 8)}": (layers("language", max(1, lm.layers // 8)),),
        "drop-neurons language 0.25": (DropNeurons(part="language", fraction=0.25, keep=first(lm.intermediate, 0.25)),),
        f"trim-vocabulary {rows}": (TrimVocabulary(size=rows, tokens=f"0-{rows - 1}"),),
        "prune-tokens 0.75": (prune,),
        "fastv 2:0.5": (PruneInside(method="fastv", layers=(2,), share=(0.5,)),),
        "pyramiddrop": (PruneInside(method="pyramiddrop"),),
        f"exit {half}": (leave,),
        f"skip-visual mlp {half}": (SkipVisual(what="mlp", count=half, layers=late),),
        f"skip-visual layer {half}": (SkipVisual(what="layer", count=half, layers=late),),
        f"skip-visual near {half}": (SkipVisual(what="near", count=half, layers=late),),
        "bottleneck 16": (Bottleneck(carriers=16),),
        "slim-visual heads 0.5": (SlimVisual(what="heads", fraction=0.5, first=0, keep=first(lm.heads, 0.5)),),
        "slim-visual neurons 0.5": (SlimVisual(what="neurons", fraction=0.5, keep=first(lm.intermediate, 0.5)),),
        f"prune-tokens 0.75, exit {half}": (prune, leave),
        f"the same, skip-visual mlp {half}": (prune, leave, SkipVisual(what="mlp", count=half, layers=early)),
    }
