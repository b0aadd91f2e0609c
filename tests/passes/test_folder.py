"""A cut model as a folder: what was saved is what is loaded, to the bit."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import vlmcut
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
from vlmcut.errors import ModelError
from vlmcut.passes import folder
from vlmcut.passes.base import Pass
from vlmcut.passes.calibration import read_calibration
from vlmcut.passes.drop_heads import DropHeads
from vlmcut.passes.drop_layers import DropLayers
from vlmcut.passes.drop_neurons import DropNeurons
from vlmcut.passes.prune_tokens import PruneTokens
from vlmcut.passes.quantize import Quantize
from vlmcut.passes.recipe import make
from vlmcut.surgery.load import Loaded, describe

RECIPES: dict[str, list[Pass]] = {
    "trim": [],
    "tokens": [PruneTokens(keep=5)],
    "divprune": [PruneTokens(keep=7, method="divprune")],
    "random seed": [PruneTokens(keep=7, method="random", seed=9)],
    "vision": [DropLayers(part="vision", count=1), DropHeads(part="vision", fraction=0.4)],
    "language": [DropLayers(part="language", count=1)],
    "neurons": [DropNeurons(part="vision", fraction=0.3), DropNeurons(part="language", fraction=0.3)],
    "neurons of unequal layers": [
        DropNeurons(part="vision", fraction=0.3, ranking="global"),
        DropNeurons(part="language", fraction=0.3, ranking="global"),
    ],
    "int8": [Quantize()],
    "int8 language": [PruneTokens(keep=6), Quantize(parts=("language",))],
    "everything": [
        DropLayers(part="vision", count=1),
        DropHeads(part="vision", fraction=0.4),
        DropNeurons(part="vision", fraction=0.3),
        PruneTokens(keep=5),
        DropLayers(part="language", count=1),
        DropNeurons(part="language", fraction=0.3, ranking="global"),
        Quantize(),
    ],
}


def save(loaded: Loaded, steps: list[Pass], out: Path) -> Path:
    config = copy.deepcopy(loaded.model.config)
    done = make(steps).apply(loaded.model, read_calibration(loaded, None))
    folder.save(loaded, out, config, done)
    return out


@pytest.mark.parametrize("name", RECIPES)
def test_saved_is_loaded(kind: str, tiny, logits, tmp_path: Path, name: str) -> None:
    loaded = tiny(kind)
    again = vlmcut.load(save(loaded, RECIPES[name], tmp_path / "cut"))
    assert describe(again.model) == describe(loaded.model)
    assert again.recipe == make([]).tables() + again.recipe[1:] and len(again.recipe) == len(RECIPES[name]) + 1
    assert again.source == loaded.source
    assert torch.equal(logits(again), logits(loaded))
    # ... and what was loaded is saved the same.
    assert again.model.generation_config.eos_token_id == loaded.model.generation_config.eos_token_id


def test_language_heads_are_saved(tiny, logits, tmp_path: Path) -> None:
    loaded = tiny("llava")
    again = vlmcut.load(save(loaded, [DropHeads(part="language", fraction=0.34)], tmp_path / "cut"))
    assert describe(again.model).language.kv_heads == (2, 2, 2)
    assert torch.equal(logits(again), logits(loaded))


@pytest.mark.parametrize(
    "steps",
    [
        [],
        [DropLayers(part="language", count=1)],
        [DropLayers(part="vision", count=1)],
        [DropHeads(part="language", fraction=0.34)],
        [DropLayers(part="language", count=1), DropHeads(part="language", fraction=0.34)],
        [DropNeurons(part="vision", fraction=0.3), DropNeurons(part="language", fraction=0.3)],
    ],
    ids=["trim", "language layers", "vision layers", "language heads", "both", "neurons"],
)
def test_regular_cuts_load_without_vlmcut(kind: str, tiny, logits, stock, tmp_path: Path, steps: list[Pass]) -> None:
    loaded = tiny(kind)
    if kind == "llava-siglip-qwen2":
        steps = [s for s in steps if not isinstance(s, DropHeads)]  # one KV head per layer
    save(loaded, steps, tmp_path / "cut")
    plain, report = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "cut", attn_implementation="sdpa", output_loading_info=True
    )
    assert not report["missing_keys"] or all("post_layernorm" in key for key in report["missing_keys"])
    assert not report["mismatched_keys"] and not report["unexpected_keys"]
    assert not hasattr(plain, "vlmcut")
    with torch.no_grad():
        theirs, ours = (model(**stock(loaded)).logits for model in (plain.eval(), loaded.model))
    assert torch.equal(theirs, ours)
    # ... and it is what vlmcut reads by parts, which sees one image at a time. float32, logits of size 3.
    torch.testing.assert_close(logits(loaded), theirs, rtol=0, atol=2e-5)


def test_dtype(tiny, tmp_path: Path) -> None:
    save(tiny("llava"), [PruneTokens(keep=5)], tmp_path / "cut")
    half = vlmcut.load(tmp_path / "cut", dtype=torch.float16)
    assert half.model.dtype == torch.float16


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_weights_that_do_not_fit(tiny, tmp_path: Path, change: str) -> None:
    path = save(tiny("llava"), [PruneTokens(keep=5)], tmp_path / "cut") / "model.safetensors"
    weights = load_file(path)
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    if change == "missing":
        del weights[name]
    elif change == "extra":
        weights["model.surplus"] = torch.zeros(2)
    else:
        weights[name] = torch.zeros(3, 3)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelError) as caught:
        vlmcut.load(tmp_path / "cut")
    assert ("model.surplus" if change == "extra" else name) in str(caught.value) and caught.value.hint


def test_sizes_are_saved(tmp_path: Path) -> None:
    """A cut is made for sizes of pictures: the folder knows them, and refuses others with both."""
    loaded = vlmcut.load("tiny:qwen2_vl", sizes=((64, 64), (96, 64)))
    out = save(loaded, [PruneTokens(keep=(4, 6), method="divprune")], tmp_path / "cut")
    for again in (vlmcut.load(out), vlmcut.load(out, sizes=((64, 64), (96, 64)))):
        assert describe(again.model) == describe(loaded.model) and describe(again.model).keep == (4, 6)
        assert again.source == loaded.source  # where the sizes were written is nobody's business
    for asked in ((96, 64),), ((96, 64), (64, 64)):
        with pytest.raises(ModelError, match="was cut for images of 64x64, 96x64, not 96x64"):
            vlmcut.load(out, sizes=asked)


def test_a_truncated_cut_folder(tiny, tmp_path: Path) -> None:
    path = save(tiny("llava"), [], tmp_path / "cut") / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    with pytest.raises(ModelError, match=f"{len(data) - 100:,} bytes.*{len(data):,}"):
        vlmcut.load(tmp_path / "cut")


def test_no_machine_path_in_a_cut_folder(tiny, tmp_path: Path) -> None:
    out = save(tiny("llava"), RECIPES["everything"], tmp_path / "cut")
    for path in out.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name
    assert json.loads((out / "source.json").read_text())["id"] == "tiny:llava"
