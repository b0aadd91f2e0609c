"""The command line: parse, call the API, print. Data on stdout, everything else on stderr; no logic lives here."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from vlmcut import flags
from vlmcut.errors import VlmcutError

if TYPE_CHECKING:
    from vlmcut.pipeline import Plan
    from vlmcut.surgery.anatomy import Anatomy

app = typer.Typer(
    name="vlmcut",
    help="Make a Hugging Face vision-language model small and fast, and prove that it is still the same model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": 120},  # of --help, on a terminal that is as wide
    rich_markup_mode=None,
)


@app.command()
@flags.with_cuts
def convert(
    *,
    model: flags.Model,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="New folder; an existing one is refused.")] = None,
    cut_flags: dict[str, Any],
    target: Annotated[str, typer.Option("--target", help="onnx, rtx or trt.")] = "onnx",
    dtype: Annotated[str, typer.Option("--dtype", help="float32 or float16.")] = "float32",
    images: flags.Images = 1,
    text_tokens: flags.TextTokens = 128,
    new_tokens: flags.NewTokens = 128,
    calibration: flags.Calibration = None,
    quality: Annotated[
        Path | None, typer.Option("--quality", help="Images and questions.jsonl; MODEL/heldout if it is there.")
    ] = None,
    questions: Annotated[int, typer.Option("--questions", min=0, help="How many of them; 0 for none.")] = 100,
    defer_build: Annotated[bool, typer.Option("--defer-build", help="Leave engines to `vlmcut build`.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop; no weight is read.")] = False,
    seed: flags.Seed = 0,
    as_json: flags.AsJson = False,
    revision: flags.Revision = None,
    trust_remote_code: flags.Trust = False,
) -> None:
    """Cut a model, export it, verify it, and write a bundle that runs without torch."""
    from vlmcut import pipeline as api

    request = api.Request(
        model=model,
        **cut_flags,
        target=target,
        dtype=dtype,
        images=images,
        text_tokens=text_tokens,
        new_tokens=new_tokens,
        calibration=calibration,
        quality=quality,
        questions=questions,
        defer_build=defer_build,
        seed=seed,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    if out is None and not dry_run:
        raise typer.BadParameter("convert needs -o OUT (or --dry-run)")
    planned = api.plan(request)
    if dry_run:
        _print_plan(planned, as_json, model)
        return
    assert out is not None
    _print_plan(planned, False, model)
    manifest = api.convert(request, out, progress=_progress)
    if as_json:
        print((out / "manifest.json").read_text(), end="")
        return
    from vlmcut import tables

    print(tables.verdict(manifest))
    print(f"bundle   {out}")


@app.command()
@flags.with_cuts
def inspect(
    *,
    model: Annotated[str | None, typer.Argument(help="Folder, hub id, or tiny:llava (random, offline).")] = None,
    cut_flags: dict[str, Any],
    images: flags.Images = 1,
    text_tokens: flags.TextTokens = 128,
    new_tokens: flags.NewTokens = 128,
    all_transformers: Annotated[
        bool, typer.Option("--all-transformers", help="Try every type that transformers registers, on tiny models.")
    ] = False,
    eager: Annotated[bool, typer.Option("--eager", help="With --all-transformers: read only, export nothing.")] = False,
    as_json: flags.AsJson = False,
    revision: flags.Revision = None,
    trust_remote_code: flags.Trust = False,
) -> None:
    """Show what a model is made of, where its work goes, what applies to it, and what a recipe would change."""
    from vlmcut import pipeline as api
    from vlmcut import tables
    from vlmcut.api import verdicts

    if all_transformers:
        if model is not None:
            raise typer.BadParameter("--all-transformers takes no MODEL")
        _survey(eager, as_json)
        return
    if model is None:
        raise typer.BadParameter("inspect needs a MODEL (or --all-transformers)")
    if eager:
        raise typer.BadParameter("--eager goes with --all-transformers")
    request = api.Request(
        model=model,
        **cut_flags,
        images=images,
        text_tokens=text_tokens,
        new_tokens=new_tokens,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    planned = api.plan(request)
    _print_plan(planned, as_json, model)
    if not as_json:
        print(f"\n{tables.applies(verdicts(planned.before))}")


@app.command()
@flags.with_cuts
def cut(
    *,
    model: flags.Model,
    out: flags.Out,
    cut_flags: dict[str, Any],
    calibration: flags.Calibration = None,
    seed: flags.Seed = 0,
    revision: flags.Revision = None,
    trust_remote_code: flags.Trust = False,
) -> None:
    """Surgery only: save the cut model as a folder that `vlmcut.load` reloads bit-equal."""
    from vlmcut import pipeline as api

    request = api.Request(
        model=model,
        **cut_flags,
        calibration=calibration,
        seed=seed,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    if len(request.keep) > 1:
        raise typer.BadParameter("cut makes one model: give one --keep")
    _print_plan(api.plan(request), False, model)
    api.save_cut(request, out, progress=_progress)
    print(out)


@app.command()
def verify(
    bundle: flags.BundlePath,
    against: Annotated[str | None, typer.Option("--against", help="Source model: fresh inputs, needs torch.")] = None,
    provider: flags.Provider = "cpu",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the fresh inputs.")] = 1,
    as_json: flags.AsJson = False,
) -> None:
    """Check every file and every graph again, from the golden tensors or against the model. Exit 1 if one is off."""
    import dataclasses

    from vlmcut import tables
    from vlmcut.validation.verify import verify as run_verify

    rows = run_verify(bundle, against=against, provider=provider, seed=seed, progress=_progress)
    if as_json:
        print(json.dumps({"ok": all(r.ok for r in rows), "rows": [dataclasses.asdict(r) for r in rows]}, indent=1))
    else:
        print(tables.exactness(rows))
    if bad := [r for r in rows if not r.ok]:
        raise VlmcutError(
            f"{len(bad)} of {len(rows)} rows are beyond their tolerance", hint="this bundle must not be deployed here"
        )


@app.command()
def run(
    bundle: flags.BundlePath,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The question; <image> places an image in it.")],
    image: Annotated[list[Path] | None, typer.Option("--image", "-i", help="An image; several are allowed.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", help="At most the budget's.")] = None,
    keep: flags.OneKeep = None,
    adaptive: Annotated[bool, typer.Option("--adaptive", help="Smallest budget first, larger where unsure.")] = False,
    confidence: Annotated[float | None, typer.Option("--confidence", help="Of --adaptive, 0..1.")] = None,
    frames_of: Annotated[Path | None, typer.Option("--frames-of", help="Folder of a video's frames.")] = None,
    similarity: Annotated[Path | None, typer.Option("--similarity", help="How each frame fits the question.")] = None,
    key_frames: Annotated[int | None, typer.Option("--key-frames", help="Most frames shown of --frames-of.")] = None,
    provider: flags.Provider = "cpu",
    threads: flags.Threads = 0,
    fit: flags.Fit = False,
) -> None:
    """Answer a question about pictures, streaming; needs no torch."""
    from vlmcut.runtime.bundle import Bundle

    images = image or []
    if (frames_of, similarity, key_frames) != (None, None, None):
        if frames_of is None or similarity is None or key_frames is None or image:
            raise typer.BadParameter("--frames-of, --similarity and --key-frames go together, without --image")
        from vlmcut.runtime.key_clips import key_frames as choose

        images = choose(frames_of, similarity, key_frames)
        print(f"frames: {', '.join(path.name for path in images)}", file=sys.stderr)
    if adaptive:
        if keep is not None:
            raise typer.BadParameter("--adaptive chooses the budget: give no --keep")
        from vlmcut.runtime import adaptive as policy

        needed = policy.CONFIDENCE if confidence is None else confidence
        chooser = policy.Adaptive(bundle, confidence=needed, provider=provider, threads=threads)
        answer = chooser.generate(images, prompt, max_new_tokens, fit=fit)
        print(policy.account(answer, needed), file=sys.stderr)
        print(answer.text)
        return
    if confidence is not None:
        raise typer.BadParameter("--confidence goes with --adaptive")
    model = Bundle(bundle, keep=keep, provider=provider, threads=threads)
    started = False
    for piece in model.stream(images, prompt, max_new_tokens, fit=fit):
        print(piece if started else piece.lstrip(), end="", flush=True)
        started = True
    print()


@app.command()
def bench(
    bundle: flags.BundlePath,
    vs: Annotated[Path | None, typer.Option("--vs", help="Another bundle, interleaved.")] = None,
    runs: Annotated[int, typer.Option("--runs", min=1, help="Counted runs of each.")] = 10,
    decode_tokens: Annotated[int, typer.Option("--decode-tokens", min=1, help="Tokens decoded per run.")] = 16,
    keep: flags.OneKeep = None,
    provider: flags.Provider = "cpu",
    threads: flags.Threads = 0,
    as_json: flags.AsJson = False,
) -> None:
    """Time to first token by graph, decode speed and peak memory, medians of full-budget prompts."""
    from vlmcut import tables
    from vlmcut.runtime.bench import bench as measure
    from vlmcut.runtime.bundle import Bundle

    paths = [bundle] if vs is None else [bundle, vs]
    opened = [Bundle(p, keep=keep if i == 0 else None, provider=provider, threads=threads) for i, p in enumerate(paths)]
    speeds = measure(opened, runs=runs, decode_tokens=decode_tokens)
    if as_json:
        print(json.dumps({str(p): s.to_json() for p, s in zip(paths, speeds, strict=True)}, indent=1))
        return
    print(tables.speeds(paths, speeds))


@app.command()
def overlay(
    source: Annotated[str, typer.Argument(help="A bundle; or with --method a model: folder, hub id or tiny:llava.")],
    image: Annotated[list[Path], typer.Option("--image", "-i", help="An image, or all frames of a clip.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="PNG to write; an existing one is refused.")],
    method: Annotated[str | None, typer.Option("--method", help="Of a model; several side by side: a,b,c.")] = None,
    prune: Annotated[float | None, typer.Option("--prune", help="Of a model: fraction of tokens removed.")] = None,
    keep: Annotated[int | None, typer.Option("--keep", help="Visual tokens kept; of a bundle, which budget.")] = None,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Where the choice depends on the question.")] = "",
    fit: flags.Fit = False,
    revision: flags.Revision = None,
    trust_remote_code: flags.Trust = False,
) -> None:
    """Draw on the picture which tokens reach the language model and go on in it: of a bundle, or of several methods."""
    from vlmcut.exporters.staging import refuse_existing, staged_file

    refuse_existing(out)
    if method is None:
        if prune is not None:
            raise typer.BadParameter("--prune goes with --method; a bundle has made its choice")
        from vlmcut.runtime.bundle import Bundle
        from vlmcut.runtime.overlay import overlay as draw

        drawing, found = draw(Bundle(Path(source), keep=keep), *image, question=prompt, fit=fit)
    else:
        if (prune is None) == (keep is None):
            raise typer.BadParameter("--method needs one of --prune and --keep")
        if len(image) != 1:
            raise typer.BadParameter(f"--method draws one --image, not {len(image)}")
        from vlmcut import pipeline as api
        from vlmcut.prompt import open_image
        from vlmcut.validation.gallery import gallery

        opened = open_image(image[0])
        hub = {"revision": revision, "trust_remote_code": trust_remote_code}
        size = (opened.height, opened.width)  # the model is looked at for this very picture, so that none is too large
        asked = api.Request(
            model=source, image_size=(size,), method="uniform", prune=prune, keep=() if keep is None else (keep,),
            text_tokens=8, new_tokens=2, **hub,
        )  # fmt: skip
        planned = api.plan(asked)
        drawing, found = gallery(
            source, planned.before, opened, method.split(","), planned.keeps[0], question=prompt, **hub
        )
    with staged_file(out) as path:
        drawing.save(path, format="PNG")
    for one in found:
        print(f"{out}: {one.name + ': ' if one.name else ''}{len(one.positions)} of {one.tokens} tokens kept")


@app.command()
def sweep(
    model: flags.Model,
    out: flags.Out,
    methods: Annotated[str | None, typer.Option("--methods", help="a,b:option=2,c; all that apply otherwise.")] = None,
    prune: Annotated[str | None, typer.Option("--prune", help="Fractions removed; 0.5,0.75,0.9 if not given.")] = None,
    keep: Annotated[str | None, typer.Option("--keep", help="Visual tokens kept per image instead: 36,72.")] = None,
    quality: Annotated[
        Path | None,
        typer.Option(
            "--quality", help="Images and questions.jsonl; MODEL/heldout if not given, with --search MODEL/calibration."
        ),
    ] = None,
    questions: Annotated[int, typer.Option("--questions", min=1, help="How many of them, at most.")] = 500,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Draws of the methods that draw.")] = 3,
    no_timing: Annotated[bool, typer.Option("--no-timing", help="Answers only; no graph is made.")] = False,
    search: Annotated[
        bool, typer.Option("--search", help="Search the cheapest combination of all passes that keeps the answers.")
    ] = False,
    min_quality: Annotated[
        float | None, typer.Option("--min-quality", help="Of --search: right answers, of the original's; 0.98.")
    ] = None,
    objective: Annotated[
        str | None, typer.Option("--objective", help="Of --search: ttft (default), decode, size or flops.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option("--minutes", help="Of --search: then nothing new is asked; 30.")
    ] = None,
    beam: Annotated[
        int | None, typer.Option("--beam", min=1, help="Of --search: recipes that grow at once; 4.")
    ] = None,
    confirm: Annotated[
        Path | None, typer.Option("--confirm", help="Of --search: held-out questions; MODEL/heldout if not given.")
    ] = None,
    calibration: flags.Calibration = None,
    threads: flags.Threads = 0,
    image_size: flags.ImageSize = None,
    as_json: flags.AsJson = False,
    revision: flags.Revision = None,
    trust_remote_code: flags.Trust = False,
) -> None:
    """Try methods of choosing tokens at several budgets; or --search the best combination of all passes."""
    from vlmcut import pipeline as api
    from vlmcut.exporters.staging import staged

    sizes = flags.sizes(image_size)
    hub = {"revision": revision, "trust_remote_code": trust_remote_code}
    asked = {
        "model": model, "quality": quality, "questions": questions, "seeds": seeds, "threads": threads, "sizes": sizes,
        **hub,
    }  # fmt: skip
    tokens = {
        "methods": () if methods is None else tuple(methods.split(",")),
        "prune": () if prune is None else tuple(flags.numbers("--prune", prune.split(","), float)),
        "keep": () if keep is None else tuple(flags.numbers("--keep", keep.split(","), int)),
    }
    only = {"min_quality": min_quality, "objective": objective, "minutes": minutes, "width": beam, "confirm": confirm,
            "calibration": calibration}  # fmt: skip
    given = {name: value for name, value in only.items() if value is not None}
    if given and not search:
        flag = next(iter(given)).replace("width", "beam").replace("_", "-")
        raise typer.BadParameter(f"--{flag} goes with --search")
    if search and no_timing:
        raise typer.BadParameter("--no-timing does not go with --search: choose --objective flops or size")
    from vlmcut.validation import search_report, search_run, sweep_report
    from vlmcut.validation import sweep as sweeping
    from vlmcut.validation.sweep_plan import design

    def original() -> Anatomy:
        return api.plan(api.Request(model=model, image_size=sizes, text_tokens=8, new_tokens=2, **hub)).before

    with staged(out) as folder:
        if search:
            wanted = search_run.Wanted(**asked, **tokens, **given)
            wanted.check()  # before a model is read
            best = search_run.run(wanted, original(), _progress)
            search_report.write(best, folder)
            data, text = search_report.to_json(best), search_report.summary(best)
            same = "" if image_size is None else f" --image-size {image_size}"
            text += f"\nConvert it: vlmcut convert {model} --recipe {out / 'recipe.toml'}{same} -o BUNDLE\n"
            if as_json:
                _progress(search_report.heldout(best))
        else:
            request = sweeping.Asked(**asked, timing=not no_timing)
            request.folder  # noqa: B018  refused before a model is read
            found = sweeping.run(request, design(original(), **tokens), _progress)
            sweep_report.write(found, folder)
            data, text = sweep_report.to_json(found), sweep_report.table(found)
    print(json.dumps(data, indent=1) if as_json else f"{text}\n{out}")


@app.command()
def build(
    bundle: flags.BundlePath,
    target: Annotated[str | None, typer.Option("--target", help="trt or rtx; the bundle's own if not given.")] = None,
) -> None:
    """On the device: build the engines that a bundle deferred. Needs TensorRT, not torch."""
    from vlmcut.exporters.build import build_bundle

    manifest = build_bundle(bundle, target=target, progress=_progress)
    for name, report in manifest.builds.items():
        print(f"{name}: {report['plan_bytes']:,} bytes in {report['seconds']:.1f} s")


@app.command()
def lint(
    path: Annotated[Path, typer.Argument(help="An ONNX file or a bundle.")],
    target: Annotated[str, typer.Option("--target", help="rtx or trt.")] = "trt",
) -> None:
    """Will these graphs build on that TensorRT? Every finding names the node and the fix. Exit 1 on an error."""
    from vlmcut.exporters.lint import lint as check
    from vlmcut.manifest import read

    files = [path] if path.is_file() else [path / g.file for g in read(path).graphs.values()]
    errors = 0
    for file in files:
        for finding in check(file, target):
            errors += finding.severity == "error"
            print(f"{file.name}: {finding.severity} {finding.rule} {finding.node}: {finding.message}; {finding.fix}")
    if errors:
        raise VlmcutError(f"{errors} lint errors for {target}", hint="see the fixes above")
    print(f"{len(files)} graphs: nothing to fix for {target}")


@app.command()
def passes(as_json: flags.AsJson = False) -> None:
    """List every pass and method with its source."""
    from vlmcut import tables

    print(json.dumps(tables.catalogue(), indent=1) if as_json else tables.passes())


def _survey(eager: bool, as_json: bool) -> None:
    import dataclasses

    from vlmcut.api import survey
    from vlmcut.validation.survey import counts, line

    found = []
    for row in survey(export=not eager):
        found.append(row)
        if not as_json:
            print(line(row), flush=True)
    if as_json:
        print(json.dumps([dataclasses.asdict(row) for row in found], indent=1))
    else:
        print(counts(found))


def _progress(text: str) -> None:
    print(f"… {text}", file=sys.stderr, flush=True)


def _print_plan(planned: Plan, as_json: bool, model: str) -> None:
    from vlmcut import tables
    from vlmcut.api import to_json

    print(json.dumps(to_json(planned), indent=1) if as_json else tables.plan(model, planned))


def _fail(error: VlmcutError) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    if error.hint:
        print(f"\nhint: {error.hint}", file=sys.stderr)
    sys.exit(1)


def main() -> None:
    """Entry point. Exit 0 done, 1 an expected failure, 2 wrong usage."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # A stopped job (docker stop, a CI timeout) cleans up like Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app()
    except VlmcutError as error:
        _fail(error)
    except OSError as error:  # a name that is too long, a folder that may not be read
        _fail(VlmcutError(str(error), hint="check the path, its permissions and the space on its disk"))


if __name__ == "__main__":
    main()
