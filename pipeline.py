"""The whole path in order: load, plan, apply, export, build, verify, publish. The command line only prints.

Measure twice, cut once: everything that arithmetic can refuse is refused before a weight is read, and the bundle
appears only after its graphs were proven.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import inspect
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .errors import ExportError, PassError, VlmcutError, nearest
from .exporters import engines
from .exporters.build import build_engines, seal
from .exporters.graphs import keeping, write_graphs
from .exporters.lint import lint
from .exporters.operators import for_target
from .exporters.staging import refuse_existing, staged
from .manifest import Manifest, TokenBudget
from .passes import folder as cut_folder
from .passes import recipe as recipes
from .passes.calibration import MEASURED, read_calibration
from .passes.heal import Heal
from .passes.prune_inside import PruneInside
from .passes.recipe import Recipe
from .runtime.bundle import Bundle
from .surgery.anatomy import Anatomy, Idle
from .surgery.load import Loaded, attach, describe, load_config, load_processor, make_buckets, skeleton, state_dict
from .validation import complete, quality, report, stock, work
from .validation.prove import prove

TARGETS = ("onnx", "rtx", "trt")
DTYPES = {"float32": torch.float32, "float16": torch.float16}
_TOOLS = ("torch", "transformers", "onnx", "onnxscript", "onnx-ir", "onnxruntime-gpu", "onnxruntime", "tensorrt",
          "tensorrt_rtx", "numpy", "vlmcut")  # fmt: skip
_CUTS = inspect.signature(recipes.from_flags).parameters.keys() - {"a", "seed"}  # a request says them in these words
_MOST_PIXELS = 1 << 26  # of one image; more would fill the memory before anything could be said

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to convert into what. Counts are tokens; the same words as the command line's flags."""

    model: str
    recipe: Path | None = None
    prune: float | None = None
    keep: tuple[int, ...] = ()
    method: str | None = None  # the usual one of the model's tower
    drop_heads: Mapping[str, float] = field(default_factory=dict)
    drop_layers: Mapping[str, int] = field(default_factory=dict)
    drop_neurons: Mapping[str, float] = field(default_factory=dict)
    importance: str | None = None  # how it is measured what is dropped; each pass's own if not given
    ranking: str | None = None  # of heads and neurons: by layer or global; each pass's own if not given
    inside: str | None = None  # how tokens leave inside the language model
    ladder: tuple[tuple[int, float], ...] = ()  # layers and shares; the method's own if empty
    exit_layer: int | None = None  # from which no visual token goes on
    skip_visual: Mapping[str, int] = field(default_factory=dict)  # what visual tokens skip in how many layers
    slim_visual: Mapping[str, float] = field(default_factory=dict)  # what they use less of, and the fraction left out
    carriers: int | None = None  # tokens of an image through which text sees it
    heal: int | None = None  # steps of training
    vocabulary: int | None = None  # rows of it that stay
    quantize: str = "none"
    target: str = "onnx"
    dtype: str = "float32"
    image_size: tuple[tuple[int, int], ...] = ()  # pixels, height and width; a bucket each, the family's own for none
    frames: int = 1  # images that are seen together as a clip and share a budget
    images: int = 1  # or clips
    text_tokens: int = 128
    new_tokens: int = 128
    calibration: Path | None = None
    quality: Path | None = None
    questions: int = 100  # of the quality set, 0 for none
    defer_build: bool = False
    seed: int = 0
    revision: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Plan:
    """What a request will do, by arithmetic alone."""

    before: Anatomy
    after: Anatomy
    recipe: Recipe
    budgets: tuple[TokenBudget, ...]
    keeps: tuple[tuple[int, ...], ...]  # for each budget, visual tokens of an image of each bucket
    notes: tuple[str, ...]
    target: str
    dtype: str


def plan(request: Request) -> Plan:
    """Check a request and predict its result; reads the config, no weights.

    Raises:
        VlmcutError: everything that can be refused without weights.
    """
    if request.target not in TARGETS:
        raise ExportError(f"no target `{request.target}`", hint=nearest(request.target, TARGETS))
    if request.dtype not in DTYPES:
        raise ExportError(f"no dtype `{request.dtype}`", hint=nearest(request.dtype, DTYPES))
    for name, least in (("frames", 1), ("images", 1), ("text_tokens", 8), ("new_tokens", 2)):
        if getattr(request, name) < least:
            flag = "--" + name.replace("_", "-")
            raise ExportError(f"{flag} {getattr(request, name)} is too small", hint=f"choose {least} or more")
    before, made = _describe(request)
    if made and (request.recipe or request.prune is not None or request.keep):
        raise PassError(f"`{request.model}` is a cut model already", hint="cut the original model instead")
    recipe = _recipe(request, before)
    whole = recipes.make([*recipes.from_tables(made).passes, *recipe.passes])
    whole.check_order()
    after = recipe.plan(before)
    keeps = tuple((k,) * len(before.buckets) for k in request.keep) or (after.keep,)
    for keep in keeps:
        recipe.keeping(keep).plan(before)  # a method may take one number and not another
    budgets = tuple(
        TokenBudget(
            images=request.images,
            visual_tokens=max(keep),
            text_tokens=request.text_tokens,
            new_tokens=request.new_tokens,
            ladder=after.ladder,
            carriers=after.carriers,
            idle=after.idle != Idle(),
        )
        for keep in keeps
    )
    _check_ladder(whole, after, budgets, keeps)
    for budget in budgets:
        if budget.positions > before.language.max_positions:
            raise ExportError(
                f"{budget.images} images of {budget.visual_tokens} tokens, {budget.text_tokens} text and "
                f"{budget.new_tokens} new tokens make {budget.positions} positions, the model knows "
                f"{before.language.max_positions}",
                hint="lower --images, --text-tokens or --new-tokens",
            )
    if "int8" in _schemes(whole) and (request.target != "onnx" or request.dtype != "float32"):
        raise ExportError(
            f"int8 with --target {request.target} --dtype {request.dtype}: dynamic int8 is ONNX Runtime's, "
            "on float32 activations",
            hint="use --target onnx --dtype float32, or --dtype float16 without int8",
        )
    notes = recipe.notes(before)
    if request.method is None and request.recipe is None and after.method is not None and before.method is None:
        which = "a" if before.tower.has_cls else "no"
        notes.insert(0, f"no --method was given: `{after.method}`, for a tower that has {which} [CLS] token")
    return Plan(before, after, recipe, budgets, keeps, tuple(notes), request.target, request.dtype)


def _check_ladder(recipe: Recipe, a: Anatomy, budgets: Sequence[TokenBudget], keeps: Sequence[tuple[int, ...]]) -> None:
    """Refuse what no layer of a cut language model could see as it should."""
    for step in recipe.passes:
        if not isinstance(step, PruneInside):
            continue
        for budget, keep in zip(budgets, keeps, strict=True):
            if not step.ranked and (budget.images > 1 or len(set(keep)) > 1):
                raise PassError(
                    f"{step.name}: `{step.method}` merges or compares the tokens of one image, and a prompt may have "
                    f"{budget.images} images of {' or '.join(map(str, sorted(set(keep))))} tokens",
                    hint="use fastv, pyramiddrop, fitprune or exit, or convert for one image of one size",
                )
            if a.language.window is not None and budget.cache > a.language.window:
                raise PassError(
                    f"{step.name}: sliding layers of `{a.family}` see {a.language.window} columns back, the cache has "
                    f"{budget.cache}: once tokens have left, columns are no longer counted as they were",
                    hint="lower --images, --text-tokens or --new-tokens",
                )


def _schemes(recipe: Recipe) -> list[str]:
    return [table["scheme"] for table in recipe.tables() if table["name"] == "quantize"]


def _load(request: Request) -> Loaded:
    return cut_folder.load(
        request.model,
        sizes=request.image_size,
        frames=request.frames,
        revision=request.revision,
        trust_remote_code=request.trust_remote_code,
    )


def _describe(request: Request) -> tuple[Anatomy, list[dict[str, Any]]]:
    """Anatomy from the config and the processor alone, with the cuts already made if it is a cut model's folder."""
    for height, width in request.image_size:
        if min(height, width) < 1 or height * width > _MOST_PIXELS:
            raise ExportError(
                f"--image-size {height}x{width}: an image has 1 to {_MOST_PIXELS:,} pixels",
                hint="write height x width in pixels, for example 336x672",
            )
    if (Path(request.model) / cut_folder.SOURCE_CONFIG).is_file():
        loaded = _load(request)
        return describe(loaded.model), loaded.recipe
    options = {"revision": request.revision, "trust_remote_code": request.trust_remote_code}
    config = load_config(request.model, **options)
    buckets = make_buckets(config, load_processor(request.model, **options), request.image_size, request.frames)
    with torch.device("meta"):
        bare = skeleton(config)
    return describe(attach(bare, buckets)), []


def _recipe(request: Request, a: Anatomy) -> Recipe:
    flags: dict[str, Any] = {name: getattr(request, name) for name in _CUTS}
    if request.recipe is not None:
        if flags != {name: getattr(Request(model=request.model), name) for name in _CUTS}:
            raise PassError("--recipe and flags that cut are both given", hint="put every cut into the recipe")
        return recipes.read(request.recipe)
    if len(set(request.keep)) != len(request.keep):
        raise PassError(f"--keep {','.join(map(str, request.keep))} names a budget twice", hint="name each once")
    for k in request.keep:
        if not 1 <= k <= a.visual_tokens:
            raise PassError(
                f"--keep {k}: `{a.family}` makes {a.visual_tokens} visual tokens of an image of {a.smallest.name} "
                "pixels",
                hint=f"choose 1 to {a.visual_tokens}",
            )
    # One model serves every budget; the smallest decides whether tokens are pruned at all.
    flags["keep"] = min(request.keep) if request.keep else None
    return recipes.from_flags(a, **flags, seed=request.seed)


def cut(request: Request, progress: Progress = lambda _: None) -> tuple[Loaded, Any, Recipe, dict[str, Any]]:
    """Load and cut a model.

    Returns:
        The cut model, the config before the cuts, the resolved recipe, and notes for the report: which data
        calibrated it and which weights were removed.
    """
    planned = plan(request)
    progress("loading the model")
    loaded = _load(request)
    return (loaded, *_apply(request, planned, loaded, progress))


def _apply(request: Request, planned: Plan, loaded: Loaded, progress: Progress) -> tuple[Any, Recipe, dict[str, Any]]:
    source_config = copy.deepcopy(loaded.model.config)
    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict(loaded.model).items()}
    notes: dict[str, Any] = {}
    calibration = None
    if planned.recipe.needs_calibration:
        folder = request.calibration or _beside(request.model, "calibration")
        calibration = read_calibration(loaded, folder, None if planned.recipe.heals else MEASURED)
        notes["calibration"] = f"{len(calibration.prompts)} prompts from {calibration.origin}"
        progress(f"calibrating on {notes['calibration']}")
        calibration = dataclasses.replace(calibration, progress=progress)
    done = planned.recipe.apply(loaded.model, calibration)
    if describe(loaded.model) != done.plan(planned.before):  # which knows what was measured
        raise PassError("the cut model is not what was planned", hint="report this as a bug")
    for keep in planned.keeps:  # a measured ladder may suit one number of tokens and not another
        done.keeping(keep).plan(planned.before)
    for step in done.passes:
        if isinstance(step, Heal):
            notes["heal"] = step.report()
    notes["removed"] = complete.removed_weights(shapes, loaded.model)
    return source_config, recipes.make([*_made(loaded), *done.passes]), notes


def _made(loaded: Loaded) -> tuple[Any, ...]:
    """Passes that were applied before, when the source is a cut model."""
    if not loaded.recipe:
        return ()
    return tuple(p for p in recipes.from_tables(loaded.recipe).passes)


def save_cut(request: Request, out: Path, progress: Progress = lambda _: None) -> None:
    """`vlmcut cut`: write the cut model as a folder that `vlmcut.load` reloads bit-equal."""
    refuse_existing(out)
    if (Path(request.model) / cut_folder.SOURCE_CONFIG).is_file():  # whose config before the cuts is not at hand
        raise PassError(
            f"`{request.model}` is a cut model already", hint="put its recipe.toml and the new cuts into one recipe"
        )
    loaded, source_config, recipe, _ = cut(request, progress)
    with staged(out) as folder:
        cut_folder.save(loaded, folder, source_config, recipe)


def convert(request: Request, out: Path, progress: Progress = lambda _: None) -> Manifest:
    """Convert a model into a bundle at `out`.

    Raises:
        ParityError: a graph does not compute what the cut eager model computes; no bundle is left.
        VlmcutError: any other expected failure; nothing is left either.
    """
    refuse_existing(out)
    planned = plan(request)
    deferred = check_engines(request)
    questions_folder = _questions(request)
    progress("loading the model")
    loaded = _load(request)
    progress("checking that vlmcut reads this model as transformers does")
    stock.check(loaded)
    questions = quality.read_set(loaded, questions_folder, request.questions) if questions_folder else []
    answers: dict[str, list[str]] = {}
    most = min(quality.ANSWER, request.new_tokens)  # a bundle cannot say more, so no model may
    for question in questions:  # refuses one that is over budget before any work
        first = [
            np.arange(planned.keeps[0][picture.bucket(planned.before.buckets)]) for picture in question.prompt.pictures
        ]
        question.prompt.shrink(first).pad(planned.budgets[0])
    if questions:
        progress(f"answering {len(questions)} questions with the original model")
        answers["original"] = quality.eager_answers(loaded, questions, most)
    _, recipe, notes = _apply(request, planned, loaded, progress)
    model = loaded.model.to(DTYPES[request.dtype])
    a = describe(model)
    budgets = tuple(dataclasses.replace(budget, ladder=a.ladder) for budget in planned.budgets)  # it may be measured
    if questions:
        progress("answering with the cut model")
        if planned.recipe.heals:  # the weights were trained in place
            answers["cut eager"] = _unhealed_answers(request, planned, recipe, questions)
        with keeping(model, planned.keeps[0]):
            name = "healed eager" if planned.recipe.heals else "cut eager"
            answers[name] = quality.eager_answers(loaded, questions, most)
    with staged(out) as folder:
        graphs = write_graphs(
            model,
            budgets,
            planned.keeps,
            for_target(request.target),
            folder,
            progress,
        )
        _save_processor(loaded, folder)
        (folder / "recipe.toml").write_text(recipe.to_toml())
        manifest = Manifest(
            source=loaded.source,
            recipe=recipe.tables(),
            target=request.target,
            dtype=request.dtype,
            layout=a.layout,
            buckets=a.buckets,
            budgets=budgets,
            graphs=graphs,
            tools=tools(),
            anatomy=a.to_json() | notes,
        )
        manifest.anatomy["work"] = work.compare(model, manifest, folder)
        verdict = prove(model, a, manifest, folder, seed=request.seed, progress=progress)
        manifest = dataclasses.replace(manifest, exactness=report.exactness_json(verdict))
        if request.target != "onnx":
            check_lint(manifest, folder)
            if deferred is None:
                manifest = build_engines(manifest, folder, progress)
            else:
                manifest = dataclasses.replace(manifest, builds={"deferred": deferred})
        manifest = seal(manifest, folder)
        if questions:
            progress("answering with the bundle")
            answers["bundle"] = quality.bundle_answers(Bundle(folder), questions)
            manifest = dataclasses.replace(manifest, quality=quality.table(answers, questions))
        report.write(manifest, folder)
        manifest = seal(manifest, folder)
        progress("publishing")
    return manifest


def _unhealed_answers(request: Request, planned: Plan, recipe: Recipe, questions: list[quality.Question]) -> list[str]:
    """What the same cuts answer without training, made from the source's weights once more."""
    loaded = _load(request)
    recipes.make(recipe.passes[len(loaded.recipe) :]).unhealed().apply(loaded.model, None)
    with keeping(loaded.model.to(DTYPES[request.dtype]), planned.keeps[0]):
        return quality.eager_answers(loaded, questions, min(quality.ANSWER, request.new_tokens))


def check_engines(request: Request) -> str | None:
    """Whether engines can be built here; before any work.

    Returns:
        None if they will be built, or why they are deferred.

    Raises:
        ExportError: they cannot be built here and `--defer-build` was not given.
    """
    if request.target == "onnx":
        return None
    if request.defer_build:
        return "asked for"
    reason = engines.available(request.target)
    if reason is not None:
        raise ExportError(
            f"--target {request.target}: {reason}",
            hint="add --defer-build for a whole bundle whose engines `vlmcut build` makes on the device",
        )
    return None


def check_lint(manifest: Manifest, folder: Path) -> None:
    """Refuse graphs that the target's TensorRT would refuse or misread."""
    for graph in manifest.graphs.values():
        errors = [f for f in lint(folder / graph.file, manifest.target) if f.severity == "error"]
        if errors:
            first = errors[0]
            raise ExportError(
                f"{graph.file}: {len(errors)} lint errors for {manifest.target}, first {first.rule} at "
                f"`{first.node}`: {first.message}",
                hint=first.fix,
            )


def tools() -> dict[str, str]:
    """Versions of what made the bundle."""
    found = {"python": platform.python_version()}
    for name in _TOOLS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _save_processor(loaded: Loaded, folder: Path) -> None:
    loaded.processor.save_pretrained(folder / "processor")
    loaded.model.config.save_pretrained(folder)
    if loaded.model.generation_config is not None:
        loaded.model.generation_config.save_pretrained(folder)


def _beside(model: str, name: str) -> Path | None:
    folder = Path(model) / name
    return folder if folder.is_dir() else None


def _questions(request: Request) -> Path | None:
    if request.questions == 0:
        return None
    beside = _beside(request.model, "heldout") if request.frames == 1 else None  # its questions have one image each
    folder = request.quality or beside
    if request.quality is not None and not (request.quality / "questions.jsonl").is_file():
        raise VlmcutError(f"`{request.quality}` has no questions.jsonl", hint="see docs/bundle.md for its format")
    return folder
