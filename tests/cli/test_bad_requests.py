"""Requests that are refused before anything is written: numbers, names, recipes, models, places, data."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vlmcut.surgery.families import FAMILIES

CONVERT = ("convert", "tiny:llava", "-o", "out")
Refuses = Callable[..., Any]

# tiny:llava: 16 visual tokens per image, 2 vision heads, 4 live tower layers, 3 language layers, 512 positions.
FLAGS = {
    "--prune 1.0": ("--prune 1 ", "0 <= R < 1"),
    "--prune -0.1": ("--prune -0.1", "0 <= R < 1"),
    "--prune 1.5": ("--prune 1.5", "0 <= R < 1"),
    "--prune nan": ("--prune nan", "0 <= R < 1"),
    "--keep 0": ("--keep 0", "16 visual tokens", "choose 1 to 16"),
    "--keep 17": ("--keep 17", "16 visual tokens"),
    "--keep 5,17": ("--keep 17", "16 visual tokens"),
    "--keep 5,5": ("--keep 5,5", "twice"),
    "--keep 5 --prune 0.5": ("--prune and --keep",),
    "--prune 0.5 --method fastvlm": ("fastvlm", "did you mean `fastervlm`?"),
    "--method divprun": ("divprun", "did you mean `divprune`?"),
    "--target rtxx": ("rtxx", "did you mean `rtx`?"),
    "--dtype float61": ("float61", "did you mean `float16`?"),
    "--quantize int9": ("int9", "did you mean `int8`?"),
    "--drop-heads vison:0.5": ("vison", "did you mean `vision`?"),
    "--drop-heads vision:0.9": ("0.9", "leaves 0 of 2 vision heads", "choose at most 0.5"),
    "--drop-heads vision:-0.5": ("-0.5", "0 <= fraction < 1"),
    "--drop-neurons vison:0.5": ("vison", "did you mean `vision`?"),
    "--drop-neurons vision:0.999": ("0.999", "leaves 0 of 96 vision neurons", "choose at most 0.9895"),
    "--drop-neurons language:1": ("fraction=1.0", "0 <= fraction < 1"),
    "--inside fastvv": ("no method `fastvv`", "did you mean `fastv`?"),
    "--inside pyramiddrop": ("no layer 3", "the language model has 3", "choose 1 to 2"),
    "--ladder 1:0.5": ("--ladder keeps tokens, and nothing says which", "add --inside fastv"),
    "--inside fastv --ladder 1:0.5,2:0.6": ("a ladder cannot grow", "choose less than 0.5"),
    "--inside fastv --ladder 1:1": ("share=[1.0]", "0 <= share < 1"),
    "--exit 0": ("cannot leave at layer 0 of 3", "choose 1 to 2"),
    "--exit 3": ("no layer 3, the language model has 3", "choose 1 to 2"),
    "--inside dart --images 2": ("`dart` merges or compares the tokens of one image", "may have 2 images of 16 tokens"),
    "--slim-visual haeds:0.5": ("no what `haeds`", "did you mean `heads`?"),
    "--slim-visual neurons:1.0": ("slim-visual: fraction=1.0", "choose 0 <= fraction < 1"),
    "--carriers 16": ("carriers=16 of an image that has 16", "choose 1 to 15"),
    "--skip-visual mpl:1": ("nothing to skip is called `mpl`", "did you mean `mlp`?"),
    "--skip-visual mlp:0": ("skip-visual: count=0", "3 of 3 layers", "choose 1 to 3"),
    "--skip-visual mlp:1 --skip-visual layer:4": ("skip-visual: count=4", "2 of 3 layers"),
    "--importance loss": ("--importance loss: nothing is dropped", "add --drop-layers or --drop-heads"),
    "--importance loss --drop-layers vision:0": ("--importance loss: nothing is dropped",),
    "--importance losss --drop-layers vision:1": ("drop-layers: no importance `losss`", "did you mean `loss`?"),
    "--importance activation --drop-heads vision:0.5 --drop-layers vision:1": (
        "drop-layers: no importance `activation`",
        "known: influence, loss",
    ),
    "--ranking global --drop-layers vision:1": ("--ranking global", "add --drop-heads or --drop-neurons"),
    "--ranking globl --drop-neurons vision:0.5": ("no ranking `globl`", "did you mean `global`?"),
    "--heal 5": ("no pass before it cuts anything", "after the cuts"),
    "--prune 0.5 --heal 0": ("heal: steps=0", "choose 1 or more"),
    "--vocabulary 1": ("size=1", "320 tokens", "choose 2 to 320"),
    "--vocabulary 321": ("size=321", "320 tokens", "choose 2 to 320"),
    "--drop-layers vision:9": ("count=9", "4 layers of which 3 can go", "choose 1 to 3"),
    "--drop-layers language:3": ("count=3", "3 layers of which 2 can go"),
    "--drop-layers tower:1": ("tower", "known: language, vision"),
    "--images 0": ("--images 0", "choose 1 or more"),
    "--text-tokens 7": ("--text-tokens 7", "choose 8 or more"),
    "--new-tokens 1": ("--new-tokens 1", "choose 2 or more"),
    "--images 20 --prune 0": ("20 images of 16", "make 576 positions", "512"),
    "--prune 0.7 --text-tokens 500": ("1 images of 5", "make 633 positions", "512"),
    "--quantize int8 --target rtx --defer-build": ("int8", "--target rtx", "--target onnx"),
    "--quantize int8 --dtype float16": ("int8", "--dtype float16", "--dtype float32"),
    "--image-size 32x32,64x64": ("images of 32x32 and 64x64 pixels become the same", "--image-size"),
    "--image-size 40x40,40x40": ("images of 40x40 and 40x40 pixels become the same",),
    "--image-size 100000x100000": ("100000x100000", "1 to 67,108,864 pixels"),
    "--quality nowhere": ("nowhere", "questions.jsonl"),
    "--recipe nowhere.toml": ("nowhere.toml", "No such file"),
}


@pytest.mark.parametrize("flags", FLAGS)
def test_flag_is_refused_with_both_numbers(flags: str, refuses: Refuses) -> None:
    result = refuses(*CONVERT, *flags.split(), says=FLAGS[flags])
    assert "loading" not in result.err  # no work was done


USAGE = {
    "--prune abc": "--prune",
    "--keep x": "--keep x",
    "--keep 5,": "--keep 5,",
    "--keep=": "--keep",
    "--drop-heads nonsense": "part:number",
    "--drop-heads vision:x": "--drop-heads x",
    "--drop-heads vision:0.5,vision:0.5": "twice",
    "--drop-heads=": "part:number",
    "--drop-neurons nonsense": "part:number",
    "--drop-neurons vision:x": "--drop-neurons x",
    "--heal x": "--heal",
    "--ladder 1": "--ladder 1: write layer:share",
    "--ladder 1:x": "--ladder x",
    "--ladder x:0.5": "--ladder x:0.5: write layer:share",
    "--exit x": "--exit",
    "--skip-visual mlp": "--skip-visual mlp: write what:layers",
    "--skip-visual mlp:x": "--skip-visual x",
    "--skip-visual mlp:1 --skip-visual mlp:2": "names mlp twice",
    "--drop-layers vision:1.5": "--drop-layers 1.5",
    "--image-size 32": "--image-size 32: write height x width",
    "--image-size 32x": "--image-size 32x:",
    "--image-size x32": "--image-size x32:",
    "--image-size 32x32x3": "--image-size 32x32x3:",
    "--image-size 32*32": "--image-size 32*32:",
    "--image-size 0x32": "--image-size 0x32:",
    "--image-size 32x-32": "--image-size 32x-32:",
    "--image-size 32.5x32": "--image-size 32.5x32:",
    "--image-size 32x32,": "--image-size :",
    "--image-size=": "--image-size :",
    "--seed -1": "--seed",
    "--questions -1": "--questions",
    "--images many": "--images",
    "--nonsense": "--nonsense",
}


@pytest.mark.parametrize("flags", USAGE)
def test_wrong_usage(flags: str, refuses: Refuses) -> None:
    refuses(*CONVERT, *flags.split(), code=2, says=(USAGE[flags],))


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("convert", "tiny:llava"), "-o OUT"),
        (("convert",), "Missing argument"),
        (("cut", "tiny:llava"), "--out"),
        (("cut", "tiny:llava", "-o", "out", "--keep", "5,6"), "one --keep"),
        (("cut", "tiny:llava", "-o", "out", "--image-size", "32"), "--image-size 32:"),
        (("inspect", "tiny:llava", "--image-size", "32"), "--image-size 32:"),
        (("bench", "bundle", "--runs", "0"), "--runs"),
        (("run", "bundle"), "--prompt"),
        (("run", "bundle", "-p", "x", "--threads", "-1"), "--threads"),
        (("verify", "bundle", "--seed", "-1"), "--seed"),
        (("nonsense",), "nonsense"),
    ],
)
def test_wrong_usage_of_other_verbs(args: tuple[str, ...], says: str, refuses: Refuses) -> None:
    refuses(*args, code=2, says=(says,))


RECIPES = {
    "not TOML": ("[[pass", ("is not TOML",)),
    "not text": (b"\xff\xfe\x00", ("cannot be read",)),
    "no list": ('[pass]\nname = "trim-tower"', ("[[pass]], with two brackets",)),
    "unknown pass": ('[[pass]]\nname = "prune-token"', ("pass 1", "did you mean `prune-tokens`?")),
    "unknown key": ('[[pass]]\nname = "prune-tokens"\nkeeps = 5', ("keeps", "did you mean `keep`?")),
    "unknown top key": ("passes = 1", ("unknown key `passes`",)),
    "no name": ("[[pass]]\nkeep = 5", ("needs a `name`",)),
    "no keep": ('[[pass]]\nname = "prune-tokens"', ("`keep` is not set",)),
    "wrong type": ('[[pass]]\nname = "prune-tokens"\nkeep = "5"', ("keep = '5'", "int")),
    "too many": ('[[pass]]\nname = "prune-tokens"\nkeep = 17', ("keep=17", "16 visual tokens")),
    "unknown method": ('[[pass]]\nname = "prune-tokens"\nkeep = 5\nmethod = "unifrm"', ("did you mean `uniform`?",)),
    "twice": ('[[pass]]\nname = "prune-tokens"\nkeep = 5\n' * 2, ("already keeps 5 of 16",)),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_refused(name: str, refuses: Refuses, tmp_path: Path) -> None:
    text, says = RECIPES[name]
    (tmp_path / "r.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    refuses(*CONVERT, "--recipe", "r.toml", says=says)


@pytest.mark.parametrize(
    "flag",
    [
        "--prune 0.5",
        "--keep 5",
        "--quantize int8",
        "--drop-layers vision:1",
        "--drop-neurons vision:0.5",
        "--heal 5",
        "--vocabulary 200",
        "--skip-visual mlp:1",
        "--slim-visual heads:0.5",
        "--carriers 2",
        "--importance loss",
        "--method random",
    ],
)
def test_recipe_and_cutting_flag(flag: str, refuses: Refuses, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('[[pass]]\nname = "trim-tower"\n')
    refuses(*CONVERT, "--recipe", "r.toml", *flag.split(), says=("both given",))


# --- models ---


def test_misspelt_model_is_not_looked_up_on_the_hub(refuses: Refuses) -> None:
    refuses("convert", "tiny:lava", "-o", "out", says=("did you mean `llava`?",))
    for name in ("nowhere", "./nowhere", "no/where/at-all"):
        refuses("convert", name, "-o", "out", says=("is not a folder", "config.json"))


def test_layouts_without_a_reader(refuses: Refuses) -> None:
    """What does not follow transformers' conventions is refused, and says which."""
    kinds = {
        "mllama": "cannot describe `mllama`: it has no get_image_features",
        "got_ocr2": "`tiny:got_ocr2` has random weights, but no processor",
    }
    for kind, says in kinds.items():
        refuses("inspect", f"tiny:{kind}", says=(says,))


CONFIGS = {
    "no config": (None, "no config.json"),
    "not JSON": ("{", "is not JSON"),
    "a list": ("[1]", "config.json"),
    "no type": ("{}", "config.json"),
    "text only": ('{"model_type": "llama"}', "text-only"),
    "no processor": ('{"model_type": "llava"}', "no processor"),
    "unknown": ('{"model_type": "nonsense"}', "cannot be loaded"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config_is_refused(name: str, refuses: Refuses, tmp_path: Path) -> None:
    text, says = CONFIGS[name]
    (tmp_path / "model").mkdir()
    if text is not None:
        (tmp_path / "model" / "config.json").write_text(text)
    for verb in (("convert", "model", "-o", "out"), ("inspect", "model")):
        refuses(*verb, says=(says,))


def test_default_configs_are_understood(refuses: Refuses, tmp_path: Path) -> None:
    """What a family's config classes write of themselves is no unknown field: the missing processor comes next."""
    (tmp_path / "model").mkdir()
    for kind in sorted(set(FAMILIES) - {"pixtral"}):  # which is `llava` with another tower
        (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": kind}))
        refuses("inspect", "model", says=("no processor",))


def test_missing_shard(refuses: Refuses, saved: Path, copied: Callable[[Path], Path]) -> None:
    model = copied(saved)
    shard = sorted(model.glob("*.safetensors"))[1]
    shard.unlink()
    refuses("convert", model, "-o", "out", says=("1 of ", shard.name))


@pytest.mark.parametrize("left", [0, 4, 100, -1])
def test_truncated_shard(left: int, refuses: Refuses, saved: Path, copied: Callable[[Path], Path]) -> None:
    model = copied(saved)
    shard = sorted(model.glob("*.safetensors"))[0]
    size = shard.stat().st_size
    short = left if left >= 0 else size + left
    os.truncate(shard, short)
    refuses("convert", model, "-o", "out", says=(shard.name, f"{short:,} bytes"))


def test_shard_of_garbage(refuses: Refuses, saved: Path, copied: Callable[[Path], Path]) -> None:
    model = copied(saved)
    shard = sorted(model.glob("*.safetensors"))[0]
    shard.write_bytes((100).to_bytes(8, "little") + b"\xff" * (shard.stat().st_size - 8))
    refuses("convert", model, "-o", "out", says=(shard.name, "not a safetensors file"))


def test_missing_weight_is_not_made_up(refuses: Refuses, saved: Path, copied: Callable[[Path], Path]) -> None:
    from safetensors.torch import load_file, save_file

    model = copied(saved)
    for shard in model.glob("*.safetensors"):
        weights = load_file(shard)
        name = next((n for n in weights if n.endswith("linear_1.bias")), None)
        if name is not None:
            del weights[name]
            save_file(weights, shard, metadata={"format": "pt"})
    refuses("convert", model, "-o", "out", says=("1 weights are missing", "linear_1.bias"))


def test_missing_processor(refuses: Refuses, saved: Path, copied: Callable[[Path], Path]) -> None:
    model = copied(saved)
    for path in model.glob("*processor*"):
        path.unlink()
    refuses("convert", model, "-o", "out", says=("no processor",))


# --- places ---


@pytest.mark.parametrize("kind", ["file", "folder", "link", "dangling link"])
@pytest.mark.parametrize("verb", ["convert", "cut", "overlay"])
def test_existing_path_is_not_overwritten(verb: str, kind: str, refuses: Refuses, bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "there").mkdir()
    if kind == "file":
        out.write_text("mine")
    elif kind == "folder":
        out.mkdir()
    else:
        out.symlink_to("there" if kind == "link" else "nowhere")
    args = ("overlay", bundle, "-i", "x.png") if verb == "overlay" else (verb, "tiny:llava", "--prune", "0.7")
    result = refuses(*args, "-o", "out", says=("`out` exists",))
    assert "loading" not in result.err


def test_parent_is_a_file(refuses: Refuses, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    refuses("convert", "tiny:llava", "-o", "file/out", says=("file` is not a folder that can be written",))
    refuses("convert", "tiny:llava", "-o", "file/deep/out", says=("file` is not a folder that can be written",))


def test_parent_is_not_writable(refuses: Refuses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    if os.geteuid() == 0:  # root may write anywhere
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked")
    refuses("convert", "tiny:llava", "-o", "locked/out", says=("locked` is not a folder that can be written",))


# --- data ---

LINES = {
    "not JSON": (b"nonsense", "line 2 is not a JSON object"),
    "not UTF-8": (b"\xff\xfe", "line 2 is not a JSON object"),
    "a list": (b"[]", "line 2 is not a JSON object"),
    "empty": (b"", "line 2 is not a JSON object"),
    "no question": (b'{"image": "picture.png"}', "line 2: `question` is None"),
    "a number": (b'{"image": 5, "question": "x"}', "line 2: `image` is 5"),
    "no such image": (b'{"image": "no.png", "question": "x", "answer": "y"}', "no image"),
}


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("flag", ["--calibration", "--quality"])
def test_bad_question_line(name: str, flag: str, refuses: Refuses, picture: Path) -> None:
    line, says = LINES[name]
    good = json.dumps({"image": picture.name, "question": "What?", "answer": "This."}).encode()
    (picture.parent / "questions.jsonl").write_bytes(b"\n".join([good, line, good]))
    cut = ("--drop-layers", "language:1") if flag == "--calibration" else ()
    refuses(*CONVERT, *cut, flag, ".", says=(says,))


def test_calibration_without_images(refuses: Refuses, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "nowhere"):
        refuses(*CONVERT, "--drop-heads", "language:0.34", "--calibration", folder, says=(f"`{folder}` has no images",))


def test_corrupt_calibration_image(refuses: Refuses, picture: Path) -> None:
    bad = picture.with_name("bad.png")
    for data in (b"no image", picture.read_bytes()[:60], b""):
        bad.write_bytes(data)
        refuses(*CONVERT, "--drop-layers", "vision:1", "--calibration", ".", says=("bad.png` is not a readable image",))


def test_questions_without_answers(refuses: Refuses, picture: Path) -> None:
    (picture.parent / "questions.jsonl").write_text(json.dumps({"image": picture.name, "question": "What?"}))
    refuses(*CONVERT, "--quality", ".", says=("no questions with answers",))


# --- TensorRT ---


def test_trt_without_tensorrt_offers_deferring(refuses: Refuses, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "the Python module `tensorrt` is not installed"
    monkeypatch.setattr("vlmcut.exporters.engines.available", lambda flavour: reason)
    result = refuses(*CONVERT, "--target", "trt", says=(reason, "--defer-build"))
    assert "loading" not in result.err


def test_cut_model_is_not_cut_for_tokens_again(run: Any, refuses: Refuses, tmp_path: Path) -> None:
    assert run("cut", "tiny:llava", "--prune", "0.7", "-o", tmp_path / "cut").code == 0
    for flags in (("--prune", "0.5"), ("--keep", "4")):
        refuses("convert", "cut", "-o", "out", *flags, says=("is a cut model already",))
    refuses("convert", "cut", "-o", "out", "--image-size", "40x30", says=("was cut for images of 32x32, not 40x30",))


def test_cut_model_with_a_ladder_takes_the_images_that_its_recipe_takes(
    run: Any, refuses: Refuses, tmp_path: Path
) -> None:
    """What one layer of the cut model could not tell apart is refused as for the recipe, and nothing else is."""
    says = ("`dart` merges or compares the tokens of one image", "may have 2 images of 16 tokens")
    for method in ("dart", "fastv"):
        assert run("cut", "tiny:llava", "--inside", method, "--ladder", "1:0.5", "-o", tmp_path / method).code == 0
    result = refuses("convert", "dart", "-o", "out", "--images", "2", says=says)
    assert "loading" not in result.err
    for model, images in (("dart", 1), ("fastv", 2)):
        assert run("inspect", tmp_path / model, "--images", images).code == 0


def test_cut_model_of_int8_is_for_what_its_recipe_is_for(run: Any, refuses: Refuses, tmp_path: Path) -> None:
    assert run("cut", "tiny:llava", "--quantize", "int8", "-o", tmp_path / "int8").code == 0
    for flags in (("--target", "rtx", "--defer-build"), ("--dtype", "float16")):
        result = refuses("convert", "int8", "-o", "out", *flags, says=("int8 with", *flags[:2], "--target onnx"))
        assert "loading" not in result.err
