"""Loading: a folder gives the model that was saved; whatever is wrong with one is a ModelError with the numbers."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vlmcut
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, BertConfig, LlamaConfig
from vlmcut.errors import ModelError
from vlmcut.manifest import digest
from vlmcut.prompt import Prompter
from vlmcut.surgery import tiny as tiny_models
from vlmcut.surgery.load import attach, check_folder, describe, load_config, skeleton, state_dict
from vlmcut.surgery.selection import attached
from vlmcut.surgery.talk import Talk, greedy, see_all


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny:llava as a Hugging Face folder; copied by every test that breaks it."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    loaded = tiny("llava")
    loaded.model.save_pretrained(folder)
    loaded.processor.save_pretrained(folder)
    return folder


@pytest.fixture
def broken(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "broken"))


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def refused(folder: Path | str, *parts: str) -> str:
    """Loading raises ModelError; its message holds all `parts`."""
    with pytest.raises(ModelError) as caught:
        vlmcut.load(folder)
    for part in parts:
        assert part in str(caught.value), str(caught.value)
    assert caught.value.hint
    return caught.value.hint


def test_a_folder_is_the_model_that_was_saved(kind: str, tiny, logits, tmp_path: Path) -> None:
    loaded = tiny(kind)
    loaded.model.save_pretrained(tmp_path / "m")
    loaded.processor.save_pretrained(tmp_path / "m")
    again = vlmcut.load(tmp_path / "m")
    assert describe(again.model) == describe(loaded.model)
    assert torch.equal(logits(again), logits(loaded))
    assert again.source["id"] == "m" and again.recipe == [] and not again.model.training
    assert again.source["files"] == {"model.safetensors": digest(tmp_path / "m" / "model.safetensors")}


def test_a_tiny_model_is_the_same_every_time(kind: str, tiny, logits) -> None:
    state = torch.random.get_rng_state()
    one, other = tiny(kind), tiny(kind)
    assert torch.equal(torch.random.get_rng_state(), state)  # and leaves the caller's randomness alone
    assert torch.equal(logits(one), logits(other))
    assert one.model is not other.model
    assert logits(one).std() > 0.1  # not degenerate


def test_another_seed_is_another_model() -> None:
    one, other = tiny_models.make("llava", seed=0)[0], tiny_models.make("llava", seed=1)[0]
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


def test_unknown_tiny() -> None:
    assert "did you mean `llava-siglip-qwen2`" in refused("tiny:llava-siglip-qwen", "no tiny model `llava-siglip-qwen`")


def test_dtype(tiny) -> None:
    assert vlmcut.load("tiny:llava", dtype=torch.float16).model.dtype == torch.float16


def test_describe_needs_no_weights(kind: str, tiny) -> None:
    loaded = tiny(kind)
    with torch.device("meta"):
        empty = attach(skeleton(load_config(f"tiny:{kind}")), attached(loaded.model).buckets)
    assert describe(empty) == describe(loaded.model)
    assert {p.device.type for p in empty.parameters()} == {"meta"}


# --- folders that are not models


def test_not_a_folder(tmp_path: Path) -> None:
    assert "tiny:llava" in refused(tmp_path / "nothing", "nothing` is not a folder")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "file` is not a folder")
    refused("nothing", "`nothing` is not a folder")  # no owner/name: never asked from the hub


def test_no_config(broken: Path) -> None:
    (broken / "config.json").unlink()
    refused(broken, "has no config.json")


@pytest.mark.parametrize("text", ["{", "", "\udcff"])
def test_config_is_not_json(broken: Path, text: str) -> None:
    (broken / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(broken, "config.json` is not JSON")


@pytest.mark.parametrize("text", ["[]", "3", "null"])
def test_config_is_not_an_object(broken: Path, text: str) -> None:
    (broken / "config.json").write_text(text)
    refused(broken, f"config.json` is not a JSON object: {json.loads(text)!r}")


def test_text_only(tmp_path: Path) -> None:
    LlamaConfig(hidden_size=8, num_attention_heads=2, intermediate_size=8).save_pretrained(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    refused(tmp_path, "`llama` is a text-only model")
    BertConfig(hidden_size=8, num_attention_heads=2).save_pretrained(tmp_path)
    refused(tmp_path, "`bert` is a text-only model")


def test_a_layout_that_is_not_described(tmp_path: Path) -> None:
    """Mllama attends to its images: no feature takes a token's place. Small, since its weights are read first."""
    model, processor = tiny_models.make("mllama")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    refused(tmp_path, "cannot describe `mllama`: it has no get_image_features")


def test_unknown_model_type(broken: Path) -> None:
    edit(broken, lambda c: c.update(model_type="lava"))
    refused(broken, "broken", "cannot be loaded", "lava")


def test_no_model_type(broken: Path) -> None:
    edit(broken, lambda c: c.pop("model_type"))
    refused(broken, "cannot be loaded")


def test_own_code_is_refused(broken: Path) -> None:
    edit(broken, lambda c: c.update(auto_map={"AutoModelForImageTextToText": "modeling.Evil"}))
    (broken / "modeling.py").write_text("raise SystemExit('ran remote code')")
    assert "--trust-remote-code" in refused(broken, "brings its own code")


def test_no_processor(broken: Path) -> None:
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (broken / name).unlink()
    refused(broken, "no processor")


# --- weights


def shard(folder: Path, missing: str | None = None) -> None:
    """Split the weights in two files with an index, as large models are; leave one file out."""
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    half = {n: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, n in enumerate(names)}
    for file in set(half.values()):
        if file != missing:
            save_file({n: weights[n] for n in names if half[n] == file}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(t.numel() * 4 for t in weights.values())}, "weight_map": half}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def test_shards(saved: Path, broken: Path, logits) -> None:
    shard(broken)
    assert torch.equal(logits(vlmcut.load(broken)), logits(vlmcut.load(saved)))


def test_missing_shard(broken: Path) -> None:
    shard(broken, missing="model-00002-of-00002.safetensors")
    refused(broken, "1 of 2 weight files are missing", "`model-00002-of-00002.safetensors`")


def test_no_weights(broken: Path) -> None:
    (broken / "model.safetensors").unlink()
    refused(broken, "1 of 1 weight files are missing", "`model.safetensors`")


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": 3}'])
def test_a_broken_index(broken: Path, text: str) -> None:
    (broken / "model.safetensors.index.json").write_text(text)
    refused(broken, "model.safetensors.index.json")


def test_truncated_weights(broken: Path) -> None:
    path = broken / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1000])
    refused(broken, f"{len(data) - 1000:,} bytes", f"{len(data):,}")


def test_truncated_header(broken: Path) -> None:
    path = broken / "model.safetensors"
    data = path.read_bytes()
    need = int.from_bytes(data[:8], "little") + 8
    path.write_bytes(data[:100])
    refused(broken, "truncated", "100 bytes", f"{need:,}")
    path.write_bytes(data[:5])
    refused(broken, "truncated", "5 bytes")
    path.write_bytes(b"")
    refused(broken, "truncated", "0 bytes")


def test_not_safetensors(broken: Path) -> None:
    (broken / "model.safetensors").write_bytes((16).to_bytes(8, "little") + b"x" * 40)
    refused(broken, "is not a safetensors file")


@pytest.mark.parametrize("header", [b"[]", b"3", b'{"w": 3}', b'{"w": {"dtype": "F32"}}'])
def test_a_header_of_another_shape(broken: Path, header: bytes) -> None:
    (broken / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    refused(broken, "is not a safetensors file")


def test_trailing_bytes(broken: Path) -> None:
    path = broken / "model.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + b"\0" * 8)
    refused(broken, "damaged", f"{size + 8:,} bytes", f"{size:,}")


def test_a_missing_weight(broken: Path) -> None:
    """`from_pretrained` would fill it with random numbers."""
    path = broken / "model.safetensors"
    weights = load_file(path)
    name = next(n for n in sorted(weights) if "layers.1.mlp.up_proj" in n)
    del weights[name]
    save_file(weights, path, metadata={"format": "pt"})
    refused(broken, "1 weights are missing", "layers.1.mlp.up_proj.weight")


def test_a_weight_of_another_shape(broken: Path) -> None:
    path = broken / "model.safetensors"
    weights = load_file(path)
    name = next(n for n in sorted(weights) if "layers.1.mlp.up_proj" in n)
    weights[name] = torch.zeros(3, 3)
    save_file(weights, path, metadata={"format": "pt"})
    refused(broken, "1 weights are mismatched", "layers.1.mlp.up_proj.weight", "[3, 3]", "[80, 48]")


# --- configs that a reader does not fully understand

CONFIGS: list[tuple[str, Callable[[dict[str, Any]], object], tuple[str, ...]]] = [
    (
        "unknown llava field",
        lambda c: c.update(pixel_unshuffle=2),
        ("llava: `LlavaConfig` field `pixel_unshuffle` = 2",),
    ),
    (
        "unknown vision field",
        lambda c: c["vision_config"].update(window=7),
        ("llava: `CLIPVisionConfig` field `window` = 7 is not understood",),
    ),
    (
        "unknown text field",
        lambda c: c["text_config"].update(soft_cap=9.0),
        ("llava: `LlamaConfig` field `soft_cap` = 9.0 is not understood",),
    ),
    (
        "a field of another class",
        lambda c: c["text_config"].update(final_logit_softcapping=30.0),
        ("`LlamaConfig` field `final_logit_softcapping` = 30.0",),
    ),
    (
        "several layers",
        lambda c: c.update(vision_feature_layer=[-2, -1]),
        ("vision_feature_layer = [-2, -1]", "several"),
    ),
    (
        "another kind of layer",
        lambda c: c.update(
            text_config=dict(
                vocab_size=320,
                hidden_size=48,
                num_hidden_layers=3,
                model_type="qwen2",
                layer_types=["full_attention", "chunked_attention", "chunked_attention"],
            )
        ),
        ("language layers of type `chunked_attention` are not supported",),
    ),
    (
        "four axes",
        lambda c: c["text_config"].update(
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 4, 4, 4]}
        ),
        ("positions of 4 axes are not supported",),
    ),
    (
        "dynamic rope",
        lambda c: c["text_config"].update(
            rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
        ),
        ("rope_type `dynamic`",),
    ),
    (
        "longrope",
        lambda c: c["text_config"].update(
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "factor": 2.0,
                "short_factor": [1.0] * 16,
                "long_factor": [2.0] * 16,
                "original_max_position_embeddings": 64,
            }
        ),
        ("rope_type `longrope`",),
    ),
    (
        "strategy",
        lambda c: c.update(vision_feature_select_strategy="full"),
        ("= 'full' with a `clip_vision_model`", "[CLS]"),
    ),
    ("tower", lambda c: c.update(vision_config={"model_type": "dinov2"}), ("vision tower `dinov2` has no reader",)),
]


@pytest.mark.parametrize(("change", "parts"), [(c, p) for _, c, p in CONFIGS], ids=[n for n, _, _ in CONFIGS])
def test_a_config_that_is_not_understood(broken: Path, change: Callable, parts: tuple[str, ...]) -> None:
    edit(broken, change)
    refused(broken, *parts)
    with pytest.raises(ModelError, match=re.escape(parts[0])):  # before any weight is read
        load_config(str(broken))


def test_a_default_is_not_unknown(broken: Path) -> None:
    """A field that says what the default says changes nothing; one that says nothing neither."""
    edit(broken, lambda c: c["text_config"].update(attention_bias=False, mlp_bias=False, of_tomorrow=None))
    check_folder(broken)
    vlmcut.load(broken)


QWEN2 = dict(
    model_type="qwen2", vocab_size=320, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
    num_attention_heads=6, num_key_value_heads=3, use_sliding_window=True, sliding_window=8, max_window_layers=1,
    layer_types=["full_attention", "sliding_attention", "sliding_attention"], tie_word_embeddings=False,
)  # fmt: skip
DECLARED: dict[str, Callable[[dict[str, Any]], object]] = {
    "attention_bias": lambda c: c["text_config"].update(attention_bias=True, mlp_bias=True),
    "sliding window": lambda c: c.update(text_config=QWEN2, tie_word_embeddings=False),
    "linear rope": lambda c: c["text_config"].update(
        rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}
    ),
}


@pytest.mark.parametrize("name", DECLARED)
def test_a_declared_field_is_heard(broken: Path, name: str) -> None:
    """What the config's class declares, its modules compute, and they are what vlmcut reads: `generate` says the same.

    Without weights for it, and where it would change the answer, the field is not passed over.
    """
    edit(broken, DECLARED[name])
    if name != "linear rope":
        assert "download it again" in refused(broken, "weights are ")
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(load_config(str(broken)))
    for _, parameter in model.named_parameters():
        parameter.data.normal_(0, 0.15)
    model.save_pretrained(broken)
    loaded = vlmcut.load(broken)
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    prompt = Prompter(loaded.processor, describe(loaded.model).layout)([image], "Is the red square left?")
    assert prompt.length > QWEN2["sliding_window"]  # type: ignore[operator]
    inputs = {"input_ids": torch.from_numpy(prompt.input_ids)}
    inputs["pixel_values"] = torch.from_numpy(prompt.pictures[0].pixel_values)
    said = loaded.model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)
    shrunk, seen = see_all(loaded.model, prompt)
    talk = Talk.read(loaded.model, [shrunk], [seen])
    with torch.no_grad():
        want = loaded.model(**inputs).logits[0, -1]
    # float32, one row of the output projection or all; logits below 1. Measured on x86 with one thread: 1.2e-7.
    torch.testing.assert_close(talk.logits[0], want, rtol=0, atol=2e-6)
    assert greedy(talk, 5) == [said[0, prompt.length :].tolist()]


def test_weights_of_another_language_model(broken: Path) -> None:
    """A config whose text part was exchanged: nothing is filled with random numbers."""
    edit(
        broken, lambda c: c.update(text_config=QWEN2 | {"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4})
    )
    refused(broken, "weights are missing", "model.language_model.layers.")


# --- names


def test_names_on_disk_are_hugging_faces(kind: str, tiny) -> None:
    loaded = tiny(kind)
    names = set(state_dict(loaded.model))
    assert names == set(dict(loaded.model.state_dict())) - ({"lm_head.weight"} if kind == "llava" else set())


def test_skeleton_has_real_tables(kind: str, tiny) -> None:
    """Rotary tables are no weights: nothing would fill them later."""
    loaded = tiny(kind)
    made = skeleton(loaded.model.config)
    want = {n: b for n, b in loaded.model.named_buffers() if "inv_freq" in n}
    assert want
    for name, buffer in made.named_buffers():
        if name in want:
            assert torch.equal(buffer, want[name])


def test_hub_ids_are_not_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`owner/name` that is not here is a hub id; offline, that is one ModelError too."""
    monkeypatch.chdir(tmp_path)
    refused("nobody/such-model-exists", "`nobody/such-model-exists` cannot be loaded")
    (tmp_path / "nobody" / "such-model-exists").mkdir(parents=True)
    refused("nobody/such-model-exists", "has no config.json")
