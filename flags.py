"""Flags that several verbs share: how they are written, what they mean, and the cuts that they stand for.

A cut flag is declared in `cuts` and nowhere else; `with_cuts` gives a verb all of them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

Model = Annotated[str, typer.Argument(help="Folder, hub id, or tiny:llava (random, offline).")]
BundlePath = Annotated[Path, typer.Argument(help="Folder made by `vlmcut convert`.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="New folder; an existing one is refused.")]
Calibration = Annotated[Path | None, typer.Option("--calibration", help="Images that measure importance.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of method `random` and of the verification inputs.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Of a hub id.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that a hub id brings.")]
ImageSize = Annotated[
    str | None, typer.Option("--image-size", help="Pixels HxW of the images to take; several: 336x672,672x336.")
]
Images = Annotated[int, typer.Option("--images", help="Most images in one prompt.")]
TextTokens = Annotated[int, typer.Option("--text-tokens", help="Room for text in a prompt.")]
NewTokens = Annotated[int, typer.Option("--new-tokens", help="Most tokens of an answer.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Provider = Annotated[str, typer.Option("--provider", help="cpu or cuda.")]
Threads = Annotated[int, typer.Option("--threads", min=0, help="0 lets the runtime choose.")]
Fit = Annotated[bool, typer.Option("--fit", help="Resize an image whose size the bundle does not take.")]
OneKeep = Annotated[int | None, typer.Option("--keep", help="Which budget, by tokens kept per image.")]


def cuts(
    *,
    prune: Annotated[
        float | None, typer.Option("--prune", help="Fraction of visual tokens removed, 0 <= R < 1.")
    ] = None,
    keep: Annotated[
        str | None, typer.Option("--keep", help="Visual tokens kept per image; several: 25,50,100.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option("--method", help="How tokens are chosen, see `vlmcut passes`; by the tower if not given."),
    ] = None,
    drop_heads: Annotated[
        str | None, typer.Option("--drop-heads", help="Fractions removed: vision:0.25,language:0.25.")
    ] = None,
    drop_layers: Annotated[
        str | None, typer.Option("--drop-layers", help="Counts removed: vision:1,language:1.")
    ] = None,
    drop_neurons: Annotated[
        str | None, typer.Option("--drop-neurons", help="Fractions removed: vision:0.25,language:0.25.")
    ] = None,
    importance: Annotated[
        str | None,
        typer.Option("--importance", help="How it is measured what may be dropped: loss, …; by pass if not given."),
    ] = None,
    ranking: Annotated[
        str | None, typer.Option("--ranking", help="Of dropped heads and neurons: layer (default) or global.")
    ] = None,
    inside: Annotated[
        str | None, typer.Option("--inside", help="How visual tokens leave inside the language model: fastv, …")
    ] = None,
    ladder: Annotated[
        str | None, typer.Option("--ladder", help="At which layers, and what share goes on: 8:0.5,16:0.25,24:0.")
    ] = None,
    exit_layer: Annotated[
        int | None, typer.Option("--exit", help="Language layer from which no visual token goes on.")
    ] = None,
    skip_visual: Annotated[
        list[str] | None,
        typer.Option("--skip-visual", help="What visual tokens skip in how many layers: mlp:4; several are allowed."),
    ] = None,
    slim_visual: Annotated[
        str | None,
        typer.Option("--slim-visual", help="Fractions that visual tokens leave out: heads:0.5,neurons:0.5."),
    ] = None,
    carriers: Annotated[
        int | None, typer.Option("--carriers", help="Last tokens of an image through which text sees it; see --heal.")
    ] = None,
    heal: Annotated[
        int | None, typer.Option("--heal", help="Steps of training towards the uncut model, after the cuts.")
    ] = None,
    vocabulary: Annotated[
        int | None,
        typer.Option("--vocabulary", help="Rows of the embedding and of lm_head that stay: of tokens in use."),
    ] = None,
    quantize: Annotated[str, typer.Option("--quantize", help="none or int8.")] = "none",
    recipe: Annotated[
        Path | None, typer.Option("--recipe", "-r", help="TOML recipe; replaces the flags that cut.")
    ] = None,
    image_size: ImageSize = None,
    frames: Annotated[int, typer.Option("--frames", help="Images in a row that are one clip with one budget.")] = 1,
) -> dict[str, Any]:
    """What the flags that cut say, as fields of `pipeline.Request`."""
    return {
        "prune": prune,
        "keep": () if keep is None else tuple(numbers("--keep", keep.split(","), int)),
        "method": method,
        "drop_heads": pairs("--drop-heads", drop_heads, float),
        "drop_layers": pairs("--drop-layers", drop_layers, int),
        "drop_neurons": pairs("--drop-neurons", drop_neurons, float),
        "importance": importance,
        "ranking": ranking,
        "inside": inside,
        "ladder": _ladder(ladder),
        "exit_layer": exit_layer,
        "skip_visual": pairs(
            "--skip-visual", ",".join(skip_visual) if skip_visual else None, int, "what:layers, for example mlp:4"
        ),
        "slim_visual": pairs("--slim-visual", slim_visual, float, "what:fraction, for example neurons:0.5"),
        "carriers": carriers,
        "heal": heal,
        "vocabulary": vocabulary,
        "quantize": quantize,
        "recipe": recipe,
        "image_size": sizes(image_size),
        "frames": frames,
    }


def with_cuts(verb: Callable[..., None]) -> Callable[..., None]:
    """Give a verb the flags of `cuts` where it has the parameter `cut_flags`, and hand it there what they say."""
    flags = inspect.signature(cuts, eval_str=True).parameters
    own = inspect.signature(verb, eval_str=True).parameters

    @functools.wraps(verb)
    def call(**given: Any) -> None:
        said = cuts(**{name: given.pop(name) for name in flags})
        verb(**given, cut_flags=said)

    shown = [p for name in own for p in (flags.values() if name == "cut_flags" else [own[name]])]
    call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # what typer makes the options of
        [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in shown]
    )
    return call


def numbers(flag: str, texts: list[str], kind: type) -> list[Any]:
    """Several numbers of one flag."""
    try:
        return [kind(t) for t in texts]
    except ValueError as error:
        raise typer.BadParameter(f"{flag} {','.join(texts)}: {error}") from error


def sizes(text: str | None) -> tuple[tuple[int, int], ...]:
    """Pixels as `336x672,672x336`, height and width of each."""
    return () if text is None else tuple(_size(one) for one in text.split(","))


def _size(text: str) -> tuple[int, int]:
    height, cross, width = text.partition("x")
    if not (cross and height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise typer.BadParameter(f"--image-size {text}: write height x width in pixels, for example 336x672")
    return int(height), int(width)


def pairs(flag: str, text: str | None, kind: type, form: str = "part:number, for example vision:1") -> dict[str, Any]:
    """Names with a number each, as `vision:1,language:2`; `form` says so to who wrote it otherwise."""
    found = {}
    for item in [] if text is None else text.split(","):
        name, colon, number = item.partition(":")
        if not colon:
            raise typer.BadParameter(f"{flag} {text}: write {form}")
        if name in found:
            raise typer.BadParameter(f"{flag} {text}: names {name} twice")
        found[name] = numbers(flag, [number], kind)[0]
    return found


def _ladder(text: str | None) -> tuple[tuple[int, float], ...]:
    rungs = []
    for rung in [] if text is None else text.split(","):
        layer, colon, share = rung.partition(":")
        if not (colon and layer.isdecimal()):
            raise typer.BadParameter(f"--ladder {rung}: write layer:share, for example 8:0.5,16:0.25")
        rungs.append((int(layer), numbers("--ladder", [share], float)[0]))
    return tuple(rungs)
