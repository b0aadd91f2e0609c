"""A bundle answers as the cut eager model does, with or without torch, and keeps no state between answers."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vlmcut
from PIL import Image
from transformers.modeling_outputs import BaseModelOutputWithPooling
from vlmcut.errors import BundleError
from vlmcut.passes import recipe
from vlmcut.prompt import Picture
from vlmcut.surgery.load import Loaded
from vlmcut.surgery.talk import see_picture

KEEP, FULL, NEW = 5, 16, 20


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))


PROMPTS = {
    "one image": ([0], "What is in the picture?"),
    "another image": ([1], "What is in the picture?"),
    "two images": ([0, 1], "left and right?"),
    "image in the middle": ([2], "Is <image> a red square?"),
    "two in the middle": ([3, 4], "a <image> b <image> c"),
    "image last, one first": ([5, 6], "What is <image>"),
    "text only": ([], "two blue circles"),
    "other letters": ([7], "Größe? 五 🎈"),
}


@pytest.fixture(scope="module", params=["llava", "llava-siglip-qwen2"])
def pair(
    request: pytest.FixtureRequest, tiny: Callable[[str], Loaded], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Loaded, vlmcut.Bundle]:
    """The cut model in Hugging Face's own code, and its bundle. The first, with tied embeddings, repeats one token."""
    if request.param == "llava":
        path = request.getfixturevalue("bundle")
    else:
        path = tmp_path_factory.mktemp("untied") / "bundle"
        vlmcut.convert(f"tiny:{request.param}", path, prune=0.7, images=2, text_tokens=24, new_tokens=NEW)
    loaded = tiny(request.param)
    recipe.read(path / "recipe.toml").apply(loaded.model, None)
    return loaded, vlmcut.Bundle(path)


@pytest.fixture(scope="module")
def model(bundle: Path) -> vlmcut.Bundle:
    return vlmcut.Bundle(bundle)


def pictures(pixels: torch.Tensor) -> list[Picture]:
    return [Picture(one[None].numpy(), {"pixel_values": (1, *one.shape)}) for one in pixels]


def eager_answer(loaded: Loaded, images: list[Image.Image], text: str) -> tuple[list[int], np.ndarray]:
    """Greedy tokens and their logits by `generate`, from a prompt that is put together here.

    Of each image transformers' own features enter, those of the tokens that the eager model chooses to keep.
    """
    pieces = text.split("<image>")
    first = len(images) - (len(pieces) - 1)
    rendered = "USER: " + "<image>\n" * first + pieces[0].strip()
    for piece in pieces[1:]:
        rendered += "<image>\n" + piece.strip()
    inputs = loaded.processor.inner(images=images or None, text=rendered + " ASSISTANT:", return_tensors="pt")
    ids: list[int] = []
    for token, run in itertools.groupby(inputs["input_ids"][0].tolist()):
        same = list(run)
        if token == loaded.model.config.image_token_id:  # each image brings FULL placeholders, KEEP remain
            assert len(same) % FULL == 0
            same = same[: len(same) // FULL * KEEP]
        ids += same
    wanted = torch.tensor([ids])
    pixels = {}
    if images:
        with torch.no_grad():
            whole = loaded.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
        kept = [see_picture(loaded.model, one).kept for one in pictures(inputs["pixel_values"])]
        features = tuple(one[choice] for one, choice in zip(whole, kept, strict=True))
        assert {tuple(one.shape) for one in features} == {(KEEP, loaded.model.config.text_config.hidden_size)}
        pixels["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=features)}  # type: ignore[arg-type]
    out = loaded.model.generate(
        input_ids=wanted, attention_mask=torch.ones_like(wanted), max_new_tokens=NEW, do_sample=False, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True, **pixels,
    )  # fmt: skip
    made = out.sequences[0, len(ids) :].tolist()
    end = loaded.model.generation_config.eos_token_id
    count = made.index(end) if end in made else len(made)
    return made[:count], torch.cat(out.logits).numpy()[:count]


def first_logits(model: vlmcut.Bundle, images: list[Image.Image], text: str) -> np.ndarray:
    return model.graphs.prefill(*model.see(model.prompt(images, text)))


@pytest.mark.parametrize("name", PROMPTS)
def test_same_as_the_eager_model(name: str, pair: tuple[Loaded, vlmcut.Bundle]) -> None:
    eager, model = pair
    seeds, text = PROMPTS[name]
    images = [picture(s) for s in seeds]
    want, want_logits = eager_answer(eager, images, text)
    assert len(want) > 1
    prompt = model.prompt(images, text)
    assert list(model.tokens(prompt)) == want
    logits = [first_logits(model, images, text)]
    shrunk, _ = model.see(prompt)
    logits += [model.graphs.decode(token, shrunk, count) for count, token in enumerate(want[:-1])]
    # float32, other orders of sums over 5 layers; measured 9.5e-6. Another picture moves them by 1.2.
    np.testing.assert_allclose(logits, want_logits, rtol=0, atol=5e-5)
    decoded = eager.processor.tokenizer.decode(want, skip_special_tokens=True)
    assert model.generate(images, text) == decoded.strip()
    assert "".join(model.stream(images, text)) == decoded


def test_answers_differ(pair: tuple[Loaded, vlmcut.Bundle]) -> None:
    """Else the test above would compare one constant."""
    _, model = pair
    said = {model.generate([picture(s) for s in seeds], text) for seeds, text in PROMPTS.values()}
    assert len(said) > 1 or model.manifest.source["id"] == "tiny:llava"


def test_pictures_and_words_matter(model: vlmcut.Bundle) -> None:
    base = first_logits(model, [picture(0)], "What?")
    for images, text in (([picture(1)], "What?"), ([], "What?"), ([picture(0)], "Where?"), ([picture(0)] * 2, "What?")):
        assert np.abs(first_logits(model, images, text) - base).max() > 1e-2


def test_order_of_pictures_matters(model: vlmcut.Bundle) -> None:
    one, other = picture(0), Image.new("RGB", (32, 32), "red")
    prompts = [model.prompt(pair, "x") for pair in ([one, other], [other, one])]
    seen = [model.see(p)[1] for p in prompts]
    np.testing.assert_array_equal(seen[0][0].features, seen[1][1].features)
    np.testing.assert_array_equal(seen[0][1].features, seen[1][0].features)
    logits = [first_logits(model, pair, "x") for pair in ([one, other], [other, one])]
    assert np.abs(logits[0] - logits[1]).max() > 1e-2


def test_stream_gives_pieces(model: vlmcut.Bundle) -> None:
    pieces = list(model.stream([picture(0)], "What is in the picture?"))
    assert len(pieces) > 2 and all(pieces)
    assert "".join(pieces).strip() == model.generate([picture(0)], "What is in the picture?")


class Bytes:
    """A tokenizer whose tokens are bytes of UTF-8."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize("cut", range(1, 12))
def test_stream_never_shows_half_a_character(cut: int, model: vlmcut.Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    data = list("aé五🎈b".encode())[:cut]
    monkeypatch.setattr(model, "tokens", lambda prompt, most: iter(data))
    monkeypatch.setattr(model.prompter.processor, "tokenizer", Bytes())
    monkeypatch.setattr(model, "prompt", lambda images, text, fit: None)
    pieces = list(model.stream([], "x"))
    assert "".join(pieces) == Bytes().decode(data)
    assert not any("�" in piece for piece in pieces[:-1])


def test_max_new_tokens(model: vlmcut.Bundle) -> None:
    prompt = model.prompt([picture(0)], "What is in the picture?")
    whole = list(model.tokens(prompt))
    for most in (1, 2, len(whole)):
        assert list(model.tokens(prompt, most)) == whole[:most]


def test_no_state_is_left(bundle: Path, model: vlmcut.Bundle) -> None:
    """Long, short, long again on one bundle, some of it broken off, equals one new bundle for each."""
    talks = [([0, 1], "left and right?"), ([], "two"), ([2], "Is <image> a red square?"), ([0, 1], "left and right?")]
    fresh = [vlmcut.Bundle(bundle).generate([picture(s) for s in seeds], text) for seeds, text in talks]
    assert [model.generate([picture(s) for s in seeds], text) for seeds, text in talks] == fresh
    next(model.stream([picture(3)], "broken off"))
    assert model.generate([picture(s) for s in talks[2][0]], talks[2][1]) == fresh[2]


def test_cache_is_written_in_place(model: vlmcut.Bundle) -> None:
    """A step changes its own row of every buffer, and no other row."""
    prompt, seen = model.see(model.prompt([picture(0)], "What is in the picture?"))
    model.graphs.prefill(prompt, seen)
    before = {name: value.copy() for name, value in model.graphs.states().items()}
    assert sorted(before) == sorted(f"{kind}_{layer}" for kind in ("key", "value") for layer in range(3))
    model.graphs.decode(7, prompt, 0)
    for name, new in model.graphs.states().items():
        changed = np.flatnonzero((before[name] != new).any(axis=(0, 1, 3)))
        assert changed.tolist() == [prompt.length]


def test_what_pads_a_prompt_does_not_matter(model: vlmcut.Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, seen = model.see(model.prompt([picture(0)], "What?"))
    plain = model.graphs.prefill(prompt, seen)
    step = model.graphs._step

    def noisy(role: str, inputs: dict[str, np.ndarray]) -> np.ndarray:
        ids, rows = inputs["input_ids"].copy(), inputs["position_ids"].copy()
        assert ids.shape[1] - prompt.length > 3
        ids[0, prompt.length :] = np.arange(ids.shape[1] - prompt.length) + 4
        rows[0, prompt.length :] = 9
        # The rest of the feature table belongs to an image that is not there.
        table = inputs["image_features"].copy()
        table[len(seen[0].features) :] = 3.0
        return step(role, {**inputs, "input_ids": ids, "position_ids": rows, "image_features": table})

    monkeypatch.setattr(model.graphs, "_step", noisy)
    # The same operators on the same rows; measured 0.0.
    np.testing.assert_array_equal(model.graphs.prefill(prompt, seen), plain)


def test_every_budget_answers(bundle_int8: Path) -> None:
    for keep in (5, 16):
        model = vlmcut.Bundle(bundle_int8, keep=keep)
        prompt, (sight,) = model.see(model.prompt([picture(0)], "What?"))
        assert len(sight.features) == len(sight.kept) == keep == model.budget.visual_tokens == prompt.counts[0]
        assert np.all(np.diff(sight.kept) > 0)
        assert len(list(model.tokens(model.prompt([picture(0)], "What?")))) > 1
    assert vlmcut.Bundle(bundle_int8).budget.visual_tokens == 5


def test_threads_do_not_change_the_answer(bundle: Path, model: vlmcut.Bundle) -> None:
    talk = ([picture(0)], "What is in the picture?")
    assert vlmcut.Bundle(bundle, threads=1).generate(*talk) == model.generate(*talk)


# --- image sizes ---


class Tall:
    """An image processor that leaves heights above 48 pixels as they are: another geometry."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, images: Any = None, **rest: Any) -> Any:
        made = self.inner(images=images, **rest)
        if images and max(image.height for image in images) > 48:
            made["pixel_values"] = np.concatenate([made["pixel_values"]] * 2, axis=2)
        return made


@pytest.fixture
def choosy(model: vlmcut.Bundle, monkeypatch: pytest.MonkeyPatch) -> vlmcut.Bundle:
    """The bundle, but its processor makes tall pictures into something that no bucket takes."""
    monkeypatch.setattr(model.prompter, "processor", Tall(model.prompter.processor))
    return model


def test_an_image_that_no_bucket_takes_is_refused(choosy: vlmcut.Bundle) -> None:
    tall = picture(0, (60, 40))
    with pytest.raises(BundleError, match=r"pixel_values 1x3x64x32, which no bucket has .*pixel_values 1x3x32x32") as e:
        choosy.generate([tall], "What?")
    assert e.value.hint and "--fit" in e.value.hint and "--image-size" in e.value.hint
    assert choosy.generate([picture(1)], "What?")  # others are taken


def test_fit_resizes_to_a_bucket(choosy: vlmcut.Bundle) -> None:
    tall, right = picture(0, (60, 40)), picture(1)
    resized = tall.resize((32, 32), Image.Resampling.BICUBIC)
    want = choosy.prompt([resized, right], "left and right?")
    have = choosy.prompt([tall, right], "left and right?", fit=True)
    for one, other in zip(want.pictures, have.pictures, strict=True):  # what fits already is not touched
        np.testing.assert_array_equal(one.pixel_values, other.pixel_values)
    question = "What is in the picture?"
    assert choosy.generate([tall], question, fit=True) == choosy.generate([resized], question)
    assert "".join(choosy.stream([tall], question, fit=True)).strip() == choosy.generate([resized], question)


@pytest.mark.parametrize(
    ("size", "name"),
    [((40, 90), "32x64"), ((90, 40), "64x32"), ((70, 60), "32x32"), ((60, 70), "32x32"), ((99, 1), "64x32")],
)
def test_fit_takes_the_bucket_of_the_nearest_shape(
    size: tuple[int, int], name: str, choosy: vlmcut.Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = choosy.manifest.buckets[0]
    sizes = [(32, 64), (64, 32), (16, 16), (32, 32)]
    made = [replace(first, size=s, geometry={"x": s}, tokens=s[0] * s[1]) for s in sizes]
    monkeypatch.setattr(choosy, "manifest", replace(choosy.manifest, buckets=tuple(made)))
    fitted = choosy._fitted(Image.new("RGB", (size[1], size[0])))
    assert f"{fitted.height}x{fitted.width}" == name  # of two alike the one with more tokens


@pytest.mark.gpu
def test_cuda_gives_the_same_answer(bundle: Path, model: vlmcut.Bundle) -> None:
    try:
        cuda = vlmcut.Bundle(bundle, provider="cuda")
    except BundleError as error:
        pytest.skip(f"no CUDA here: {error}")
    for seeds, text in PROMPTS.values():
        images = [picture(s) for s in seeds]
        assert cuda.generate(images, text) == model.generate(images, text)
    assert all(row.ok for row in vlmcut.verify(bundle, provider="cuda"))


# --- without torch ---

WITHOUT_TORCH = """
import contextlib, importlib.util, io, json, sys

BLOCKED = ("torch", "torchvision", "onnx", "onnxscript", "onnx_ir", "optimum")

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: (
    None if name.split(".")[0] in BLOCKED else find_spec(name, package)
)
sys.meta_path.insert(0, Block())
try:
    import torch
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("torch is not blocked")

from vlmcut import cli

results = []
for command in json.loads(sys.argv[1]):
    sys.argv = ["vlmcut", *command]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            cli.main()
        except SystemExit as stop:
            results.append([stop.code or 0, out.getvalue()])
assert not any(name in sys.modules for name in BLOCKED)
print(json.dumps(results))
"""


def test_everything_on_the_device_works_without_torch(bundle: Path, tmp_path: Path, model: vlmcut.Bundle) -> None:
    image, drawing = tmp_path / "i.png", tmp_path / "o.png"
    picture(0).save(image)
    commands = [
        ["verify", str(bundle), "--json"],
        ["run", str(bundle), "-i", str(image), "-p", "What is in the picture?"],
        ["overlay", str(bundle), "-i", str(image), "-o", str(drawing), "--fit"],
        ["bench", str(bundle), "--runs", "1", "--decode-tokens", "2", "--json"],
        ["verify", str(bundle), "--provider", "nonsense"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, json.dumps(commands)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    verified, answered, drawn, timed, refused = json.loads(done.stdout)
    assert [code for code, _ in (verified, answered, drawn, timed, refused)] == [0, 0, 0, 0, 1]
    rows = json.loads(verified[1])["rows"]
    with_torch = vlmcut.verify(bundle)
    assert [(r["graph"], r["output"], r["max_abs"], r["ok"]) for r in rows] == [
        (r.graph, r.output, r.max_abs, True) for r in with_torch
    ]
    assert answered[1].strip() == model.generate([image], "What is in the picture?")
    assert "5 of 16 tokens kept" in drawn[1]
    from vlmcut.runtime.overlay import overlay

    np.testing.assert_array_equal(np.asarray(Image.open(drawing)), np.asarray(overlay(model, image)[0]))
    assert json.loads(timed[1])[str(bundle)]["ttft_ms"] > 0
