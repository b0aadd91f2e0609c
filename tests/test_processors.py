"""Processors opened without torch: the same tensors as the family's own, one error for videos, one for bad files."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    Gemma3nAudioFeatureExtractor,
    Gemma3nProcessor,
    LlavaProcessor,
    SiglipImageProcessorPil,
)
from vlmcut.errors import BundleError, ModelError
from vlmcut.processors import open_processor
from vlmcut.processors.lfm2 import Lfm2VlImageProcessorPil
from vlmcut.processors.no_video import NoVideo
from vlmcut.processors.opening import processor_class
from vlmcut.processors.perception import PerceptionLMImageProcessorPil
from vlmcut.surgery import tiny

KINDS = sorted({*tiny.families.FAMILIES, "fast_vlm", "gemma3n", "perception_lm"})
CASES: dict[str, list[tuple[int, int]]] = {  # width and height of each image of one prompt
    "small": [(40, 30)],
    "large": [(210, 130)],
    "two": [(40, 30), (90, 200)],
    "text": [],
}
REFUSED = {("perception_lm", "two")}  # images of different tile counts cannot be stacked
# transformers prepares these images with torchvision only. Pixels then differ by PIL's resampling, everything else is
# bit-equal: by how many of 255 levels at most (measured 1.0 and 2.0), and what the normalization divides by.
TWINS = {"lfm2_vl": (1.01, 0.5), "cohere2_vision": (2.1, 0.269), "perception_lm": (2.01, 0.5)}

SHARED = """
import json, sys
import numpy as np
from PIL import Image

folder, out, kinds, cases = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])

def pictures(case):
    draw = np.random.default_rng(7)
    small = [draw.integers(0, 256, (h // 5, w // 5, 3), dtype=np.uint8) for w, h in cases[case]]
    return [Image.fromarray(pixels).resize(size) for pixels, size in zip(small, cases[case], strict=True)]

def ask(images):
    return [{"role": "user", "content": [*images, {"type": "text", "text": "What is it?"}]}]

def answer(prepare):
    for kind in kinds:
        for case in cases:
            try:
                made = prepare(kind, pictures(case))
                made = {name: np.asarray(value) for name, value in made.items()}
            except Exception as error:
                made = {"error": np.array(f"{type(error).__name__}: {error}")}
            np.savez(f"{out}/{kind}.{case}.npz", **made)
"""

FREE = (
    """
import sys
sys.modules.update(dict.fromkeys(["torch", "torchvision", "num2words"]))
"""
    + SHARED
    + """
from vlmcut.processors import open_processor

opened = {kind: open_processor(f"{folder}/{kind}") for kind in kinds}

def prepare(kind, images):
    processor = opened[kind]
    text = processor.image_token * len(images) + "What is it?"
    if processor.chat_template:
        text = processor.apply_chat_template(ask([{"type": "image"} for _ in images]), add_generation_prompt=True)
    return processor(images=images, text=text, return_tensors="np")

answer(prepare)
assert not sys.modules["torch"] and not sys.modules["torchvision"]
"""
)

# `AutoProcessor` and the classes behind it as they are. Where torchvision is missing they run on what they use of it:
# `resize` and `normalize`, written with torch as torchvision writes them.
OWN = (
    SHARED
    + """
import enum, importlib.util, types
import torch

if importlib.util.find_spec("torchvision") is None:
    def module(name, **content):
        made = types.ModuleType(name)
        made.__spec__ = importlib.util.spec_from_loader(name, None)
        made.__path__, made.__file__ = [], name
        vars(made).update(content)
        sys.modules[name] = made
        return made

    class InterpolationMode(enum.Enum):
        NEAREST, NEAREST_EXACT, BILINEAR, BICUBIC = "nearest", "nearest-exact", "bilinear", "bicubic"
        BOX, HAMMING, LANCZOS = "box", "hamming", "lanczos"

    def resize(image, size, interpolation, antialias):
        return torch.nn.functional.interpolate(image, list(size), mode=interpolation.value, antialias=antialias)

    def normalize(image, mean, std, inplace=False):
        mean, std = (torch.as_tensor(value, dtype=image.dtype)[:, None, None] for value in (mean, std))
        return (image - mean) / std

    tv = {"resize": resize, "normalize": normalize, "InterpolationMode": InterpolationMode}
    functional = module("torchvision.transforms.v2.functional", **tv)
    v2 = module("torchvision.transforms.v2", functional=functional)
    plain = module("torchvision.transforms.functional", pil_to_tensor=None)
    transforms = module("torchvision.transforms", v2=v2, functional=plain, InterpolationMode=InterpolationMode)
    module("torchvision", transforms=transforms, io=module("torchvision.io"), __version__="0.28.0")
if importlib.util.find_spec("num2words") is None:
    from transformers.models.smolvlm import processing_smolvlm
    processing_smolvlm.num2words = str

from transformers import AutoImageProcessor, AutoProcessor

def load(kind):
    processor = AutoProcessor.from_pretrained(f"{folder}/{kind}")
    processor.image_processor = AutoImageProcessor.from_pretrained(f"{folder}/{kind}", backend="pil")
    return processor

opened = {kind: load(kind) for kind in kinds}

def prepare(kind, images):
    processor = opened[kind]
    if processor.chat_template and not (kind == "llava_onevision" and len(images) > 1):
        chat = ask([{"type": "image", "image": image} for image in images])
        options = dict(tokenize=True, return_dict=True, return_tensors="np", add_generation_prompt=True)
        return processor.apply_chat_template(chat, **options)
    # LLaVA-OneVision's shrinks every image of a chat that has several; given a list, it tiles each of them.
    text = processor.image_token * len(images) + "What is it?"
    if processor.chat_template:
        text = processor.apply_chat_template(ask([{"type": "image"} for _ in images]), add_generation_prompt=True)
    return processor(images=images or None, text=text, return_tensors="np")

answer(prepare)
"""
)


def python(code: str, *arguments: str) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny processors, one folder each; do not write into them."""
    root = tmp_path_factory.mktemp("processors")
    for kind in KINDS:
        made = OTHERS[kind]() if kind in OTHERS else tiny.make(kind)[1]
        made.save_pretrained(root / kind)
    return root


def fast_vlm() -> LlavaProcessor:
    """FastVLM's is a LLaVA processor; the tiny model would need timm."""
    llava = tiny.make("llava")[1]
    size = {"height": 192, "width": 192}
    images = CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False)
    settings = {"patch_size": 64, "vision_feature_select_strategy": "full", "chat_template": llava.chat_template}
    return LlavaProcessor(images, llava.tokenizer, **settings)


def gemma3n() -> Any:
    """No tiny model yet."""
    named = {f"{name}_token": f"<{name}>" for name in ("image", "boi", "eoi", "audio", "boa", "eoa")}
    tokenizer = tiny.processors.tokenizer(("<pad>", "<bos>", "<eos>", *named.values()), **named)
    images = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    chat = tiny.processors.template("{{ m['role'] }}\n", "<image>", "model\n", start="<bos>")
    return Gemma3nProcessor(Gemma3nAudioFeatureExtractor(), images, tokenizer, image_seq_length=4, chat_template=chat)


def perception_lm() -> Any:
    """No tiny model yet."""
    named = {"image_token": "<|image|>", "video_token": "<|video|>"}
    tokenizer = tiny.processors.tokenizer(("<pad>", "<s>", "</s>", *named.values()), **named)
    images = PerceptionLMImageProcessorPil(tile_size=28, max_num_tiles=4)
    video, chat = NoVideo(video_processor_type="PerceptionLMVideoProcessor"), ("", "<|image|>", "</s>")
    return processor_class("PerceptionLMProcessor")(
        video, images, tokenizer, patch_size=14, pooling_ratio=1, chat_template=tiny.processors.template(*chat)
    )


OTHERS = {"fast_vlm": fast_vlm, "gemma3n": gemma3n, "perception_lm": perception_lm}


@pytest.fixture(scope="module")
def tensors(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, str], dict[str, Any]]:
    """Inputs by (`free` or `own`, kind, case); an `error` instead where the processor refused."""
    outs = {}
    for name, code in {"free": FREE, "own": OWN}.items():
        outs[name] = tmp_path_factory.mktemp(name)
        python(code, str(folders), str(outs[name]), json.dumps(KINDS), json.dumps(CASES))
    return lambda name, kind, case: dict(np.load(outs[name] / f"{kind}.{case}.npz"))


def copy_folder(source: Path, target: Path) -> None:
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_the_familys_own(tensors: Callable[..., dict[str, Any]], kind: str, case: str) -> None:
    free, own = tensors("free", kind, case), tensors("own", kind, case)
    assert (own.pop("labels", None) is not None) == (kind == "paligemma" and case != "text")  # for training
    if (kind, case) == ("paligemma", "text"):  # its processor wants an image: the rest of such a prompt
        assert "`images` are expected" in str(own["error"])
        (ids,) = tensors("free", kind, "small")["input_ids"]
        assert free["input_ids"].tolist() == [ids[ids != ids[0]].tolist()]
        return
    refused = (kind, case) in REFUSED
    assert ("error" in own, "error" in free) == (refused, refused), (own.get("error"), free.get("error"))
    if refused:
        assert str(free["error"]).startswith("BundleError: the processor refuses the prompt: images of unlike")
        return
    assert free.keys() == own.keys() and ("pixel_values" in free) == (case != "text")
    for name in own:
        assert (free[name].shape, free[name].dtype) == (own[name].shape, own[name].dtype), name
        if name == "pixel_values" and kind in TWINS:
            most, deviation = TWINS[kind]
            levels = np.abs(free[name] - own[name]) * 255 * deviation
            assert levels.max() <= most and levels.mean() < 0.2  # measured 0.11
        else:
            assert np.array_equal(free[name], own[name]), name
    assert free["input_ids"].dtype == np.int64 and len(free["input_ids"]) == 1
    assert case == "text" or free["pixel_values"].dtype == np.float32


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_processor_is_the_same(folders: Path, tmp_path: Path, kind: str) -> None:
    """Nothing is lost by opening and saving, not even the settings for videos; only `labels` keep being left out."""
    first = open_processor(folders / kind)
    first.save_pretrained(tmp_path)
    saved, original = (json.loads((f / "processor_config.json").read_text()) for f in (tmp_path, folders / kind))
    assert saved == original
    assert open_processor(tmp_path).chat_template == first.chat_template


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "lfm2_vl", "idefics3"])
def test_old_folders_open(folders: Path, tmp_path: Path, kind: str) -> None:
    """As on the hub: one file per part, `Fast` in the image processor's name, the template in JSON."""
    copy_folder(folders / kind, tmp_path)
    config = json.loads((tmp_path / "processor_config.json").read_text())
    images, name = config.pop("image_processor"), config["processor_class"]
    config.pop("video_processor", None)
    images |= {"image_processor_type": images["image_processor_type"] + "Fast", "processor_class": name}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    (tmp_path / "processor_config.json").write_text(json.dumps(config))
    template = (tmp_path / "chat_template.jinja").read_text()
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    old, new = open_processor(tmp_path), open_processor(folders / kind)
    assert old.chat_template == new.chat_template and type(old.inner).__name__ == type(new.inner).__name__
    image = Image.effect_noise((90, 70), 80).convert("RGB")
    made = [p(images=[image], text=p.image_token) for p in (old, new)]
    assert made[0].keys() == made[1].keys()
    assert all(np.array_equal(made[0][name], made[1][name]) for name in made[0])


def test_the_class_is_found_by_the_models_type(folders: Path, tmp_path: Path) -> None:
    copy_folder(folders / "llava", tmp_path)
    for name in ("processor_config.json", "tokenizer_config.json"):
        config = json.loads((tmp_path / name).read_text())
        config.pop("processor_class", None)
        (tmp_path / name).write_text(json.dumps(config))
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    assert type(open_processor(tmp_path).inner).__name__ == "LlavaProcessor"
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="no file names a processor class"):
        open_processor(tmp_path)


def test_pixtrals_tokenizer_is_its_file(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers has it: `AutoTokenizer` believes other files of such folders, `tekken.json` or a class name."""
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: pytest.fail("AutoTokenizer was asked"))
    assert open_processor(folders / "pixtral").tokenizer("[IMG]")["input_ids"]


def test_a_folder_that_says_nothing_about_videos_opens(folders: Path, tmp_path: Path) -> None:
    copy_folder(folders / "qwen2_vl", tmp_path)
    config = json.loads((tmp_path / "processor_config.json").read_text())
    assert config.pop("video_processor")
    (tmp_path / "processor_config.json").write_text(json.dumps(config))
    assert open_processor(tmp_path).video_processor.to_dict() == {}


def test_a_copy_is_a_processor(folders: Path) -> None:
    processor = copy.deepcopy(open_processor(folders / "qwen2_vl"))
    assert processor(text="What is it?")["input_ids"].size > 0


# --- what is put into a prompt ---


def test_a_template_with_a_beginning_gets_no_second_one(folders: Path, tmp_path: Path) -> None:
    """Gemma's template writes `<bos>` and its tokenizer would, too."""
    copy_folder(folders / "gemma3", tmp_path)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    plain = open_processor(tmp_path)
    bos, bos_id = plain.tokenizer.bos_token, plain.tokenizer.bos_token_id
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    processor = open_processor(tmp_path)
    chat = [{"role": "user", "content": [{"type": "text", "text": "What is it?"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert text.startswith(bos)
    ids = processor(text=text)["input_ids"][0].tolist()
    assert ids.count(bos_id) == 1
    assert ids == list(processor.inner.apply_chat_template(chat, tokenize=True, add_generation_prompt=True)[0])
    assert processor(text="What is it?")["input_ids"][0].tolist().count(bos_id) == 1


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "llava_onevision", "smolvlm", "internvl"])
def test_a_video_is_refused(folders: Path, kind: str) -> None:
    processor = open_processor(folders / kind)
    frames = np.zeros((4, 3, 32, 32), np.uint8)
    chat = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What is it?"}]}]
    tries: list[Callable[[], Any]] = [
        lambda: processor(videos=[frames], text="What is it?"),
        lambda: processor.apply_chat_template(chat),
    ]
    if hasattr(processor, "video_processor"):
        tries.append(lambda: processor.video_processor([frames]))
    for attempt in tries:
        with pytest.raises(BundleError, match="a video was given, but vlmcut prepares images only"):
            attempt()


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"paligemma"}))
def test_placeholders_without_images_are_refused(folders: Path, kind: str, count: int) -> None:
    processor = open_processor(folders / kind)
    with pytest.raises(BundleError, match="refuses the prompt"):
        processor(images=[Image.new("RGB", (40, 30))] * count, text=f"{processor.image_token}What is it?")


def test_only_numpy_is_given(folders: Path) -> None:
    with pytest.raises(ValueError, match="NumPy only"):
        open_processor(folders / "llava")(text="What?", return_tensors="pt")


# --- files ---


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("processor_config.json", "{", ""),
        ("processor_config.json", "[]", "is not a JSON object"),
        ("processor_config.json", "{}", ""),
        ("processor_config.json", '{"processor_class": "NoSuchProcessor"}', "transformers has no `NoSuchProcessor`"),
        ("processor_config.json", '{"processor_class": "LlavaProcessor", "image_processor": null}', ""),
        ("processor_config.json", '{"processor_class": "LlavaProcessor", "image_processor": {"size": "large"}}', ""),
        ("processor_config.json", '{"processor_class": "CLIPModel"}', ""),
        (
            "processor_config.json",
            '{"processor_class": "InstructBlipProcessor", '
            '"image_processor": {"image_processor_type": "CLIPImageProcessor"}}',
            "wants a `qformer_tokenizer`",
        ),
        ("processor_config.json", None, ""),
        ("tokenizer.json", '{"version": "1.0"', ""),
        ("tokenizer.json", "{}", ""),
        ("tokenizer_config.json", "\udcff", ""),
    ],
)
def test_damaged_files_are_named_without_a_traceback(
    folders: Path, tmp_path: Path, name: str, content: str | None, says: str
) -> None:
    copy_folder(folders / "llava", tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content, errors="surrogateescape")
    with pytest.raises(ModelError, match=f"no processor: .*{says}") as caught:
        open_processor(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.hint and caught.value.__cause__ is not None


def test_an_image_processor_of_torchvision_is_refused(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torchvision is installed `backend="pil"` is a wish: what has no PIL backend opens with the other."""
    monkeypatch.setattr(CLIPImageProcessorPil, "backend", "torchvision")
    with pytest.raises(ModelError, match="`CLIPImageProcessorPil` needs torchvision"):
        open_processor(folders / "llava")


@pytest.mark.parametrize("name", ["", "missing"])
def test_a_folder_without_a_processor_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match="no processor"):
        open_processor(tmp_path / name)


def test_code_of_a_folder_runs_only_when_trusted(folders: Path, tmp_path: Path) -> None:
    copy_folder(folders / "llava", tmp_path)
    config = json.loads((tmp_path / "processor_config.json").read_text())
    config |= {"processor_class": "OwnProcessor", "auto_map": {"AutoProcessor": "own.OwnProcessor"}}
    (tmp_path / "processor_config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(
        "from transformers import LlavaProcessor\nclass OwnProcessor(LlavaProcessor): ...\n"
    )
    with pytest.raises(ModelError, match="transformers has no `OwnProcessor`"):
        open_processor(tmp_path)
    opened = open_processor(tmp_path, trust_remote_code=True)
    assert type(opened.inner).__name__ == "OwnProcessor"
    assert type(opened.image_processor).__name__.endswith("Pil")


# --- image processors of our own ---

# Width, height -> rows, columns of tiles, size (height, width) of the whole: transformers 5.23's own image processor
# under torchvision 0.28, tile_size=32, encoder_patch_size=4, min_image_tokens=4, max_image_tokens=16, max_tiles=4.
GRIDS = {
    (4, 4): (1, 1, 16, 16),
    (10, 7): (1, 1, 16, 24),
    (7, 10): (1, 1, 24, 16),
    (16, 16): (1, 1, 16, 16),
    (33, 31): (1, 1, 32, 32),
    (40, 30): (1, 1, 24, 32),
    (31, 64): (1, 1, 40, 16),
    (45, 46): (2, 2, 32, 24),
    (60, 60): (2, 2, 32, 32),
    (100, 80): (2, 2, 24, 32),
    (80, 100): (2, 2, 32, 24),
    (125, 100): (2, 2, 24, 32),
    (100, 125): (2, 2, 32, 24),
    (64, 64): (2, 2, 32, 32),
    (200, 50): (1, 4, 16, 64),
    (50, 200): (4, 1, 64, 16),
    (300, 299): (2, 2, 24, 32),
    (160, 200): (2, 2, 32, 24),
    (30, 120): (4, 1, 64, 16),
}


def lfm2(size: tuple[int, int], **settings: Any) -> dict[str, Any]:
    """One image through LFM2-VL's image processing, with 4x4 patches and tiles of 32x32 pixels."""
    processor = Lfm2VlImageProcessorPil(
        tile_size=32, encoder_patch_size=4, min_image_tokens=4, max_image_tokens=16, **settings
    )
    assert processor.max_num_patches == 64
    return dict(processor([Image.new("RGB", size)], return_row_col_info=True, return_tensors="np"))


@pytest.mark.parametrize("size", GRIDS)
def test_lfm2_grids_are_torchvisions(size: tuple[int, int]) -> None:
    made = lfm2(size, max_tiles=4)
    rows, columns, height, width = GRIDS[size]
    assert (made["image_rows"].item(), made["image_cols"].item()) == (rows, columns)
    assert made["image_sizes"].tolist() == [[height, width]]
    tiles = 1 if rows * columns == 1 else rows * columns + 1
    assert made["pixel_values"].shape == (tiles, 64, 48)
    assert made["spatial_shapes"][-1].tolist() == [height // 4, width // 4]
    assert made["pixel_attention_mask"].sum(axis=1).tolist() == made["spatial_shapes"].prod(axis=1).tolist()


@pytest.mark.parametrize(
    ("settings", "rows", "columns", "tiles", "last"),
    [
        ({"max_tiles": 2}, 1, 2, 3, [6, 8]),  # 5:4 is as far from two tiles abreast as from two tiles stacked
        ({"max_tiles": 4, "use_thumbnail": False}, 2, 2, 4, [8, 8]),
        ({"min_tiles": 1, "max_tiles": 1}, 1, 1, 1, [6, 8]),
        ({"do_image_splitting": False}, 1, 1, 1, [6, 8]),
    ],
)
def test_lfm2_settings_are_torchvisions(
    settings: dict[str, Any], rows: int, columns: int, tiles: int, last: list[int]
) -> None:
    made = lfm2((100, 80), **settings)
    assert (made["image_rows"].item(), made["image_cols"].item(), len(made["pixel_values"])) == (rows, columns, tiles)
    assert made["image_sizes"].tolist() == [[24, 32]] and made["spatial_shapes"][-1].tolist() == last


def test_lfm2_tells_of_its_grid_only_when_asked() -> None:
    processor = Lfm2VlImageProcessorPil()
    made = processor([Image.new("RGB", (40, 30))], return_tensors="np")
    assert set(made) == {"pixel_values", "pixel_attention_mask", "spatial_shapes"} == set(processor.model_input_names)


def test_lfm2_refuses_what_its_rows_cannot_hold() -> None:
    processor = Lfm2VlImageProcessorPil(tile_size=32, encoder_patch_size=4, min_image_tokens=4, max_image_tokens=16)
    with pytest.raises(ValueError, match="too elongated: 224 patches, at most 64"):
        processor([Image.new("RGB", (1, 200))], return_tensors="np")
    with pytest.raises(ValueError, match="min_tiles"):
        processor([Image.new("RGB", (40, 30))], min_tiles=5, max_tiles=4, return_tensors="np")


@pytest.mark.parametrize(
    ("size", "rows", "columns"),
    [
        # enlarged: the image fits into a grid
        ((3, 19), 6, 1), ((19, 3), 1, 7), ((16, 16), 2, 2), ((10, 40), 4, 1), ((33, 31), 2, 3), ((60, 20), 2, 4),
        # shrunk: none is large enough
        ((100, 80), 2, 2), ((500, 20), 1, 8), ((20, 500), 8, 1), ((90, 31), 2, 4),
    ],
)  # fmt: skip
def test_perception_lms_grids_are_torchvisions(size: tuple[int, int], rows: int, columns: int) -> None:
    image = Image.new("RGB", size)
    image.putpixel((0, 0), (255, 255, 255))
    processor = PerceptionLMImageProcessorPil(tile_size=16, max_num_tiles=8)
    (tiles,) = processor([image], return_tensors="np")["pixel_values"]
    large = np.asarray(image.resize((columns * 16, rows * 16), Image.Resampling.BICUBIC))
    cells = large.reshape(rows, 16, columns, 16, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, 16, 16)
    assert tiles.shape == (1 + rows * columns, 3, 16, 16)
    assert np.array_equal(np.round((tiles[1:] * 0.5 + 0.5) * 255), cells)
