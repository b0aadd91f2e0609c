"""Bundles that are damaged, foreign or asked for more than they hold."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from vlmcut.exporters.build import seal
from vlmcut.manifest import read
from vlmcut.surgery import tiny as tiny_models

Refuses = Callable[..., Any]
Copied = Callable[[Path], Path]

# The bundle holds 2 images of 5 tokens and 24 of text: 34 columns, and 20 new tokens.
REQUESTS = {
    "long prompt": (("-p", "word " * 30), ("0 images of 0", "of text", "the budget holds 34", "--text-tokens")),
    "long with image": (("-p", "word " * 30, "-i", "picture.png"), ("1 images of 5", "the budget holds 34")),
    "three images": (("-p", "x", *("-i", "picture.png") * 3), ("3 images", "the budget holds 2", "--images 3")),
    "tag without image": (("-p", "<image> x"), ("1 <image> tags for 0 images", "--image")),
    "two tags": (("-p", "<image> x <image>", "-i", "picture.png"), ("2 <image> tags for 1 images",)),
    "missing image": (("-p", "x", "-i", "no.png"), ("no image `no.png`",)),
    "folder as image": (("-p", "x", "-i", "."), ("is not a readable image",)),
    "too many tokens": (("-p", "x", "--max-new-tokens", "21"), ("max_new_tokens=21", "holds 20", "--new-tokens")),
    "no tokens": (("-p", "x", "--max-new-tokens", "0"), ("max_new_tokens=0", "choose 1 to 20")),
    "no such budget": (("-p", "x", "--keep", "6"), ("no budget keeps 6", "has 5")),
    "provider": (("-p", "x", "--provider", "cdua"), ("cdua", "did you mean `cuda`?")),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_run_refuses(name: str, refuses: Refuses, bundle: Path, picture: Path) -> None:
    args, says = REQUESTS[name]
    assert refuses("run", bundle, *args, says=says).out == ""


def test_corrupt_image(refuses: Refuses, bundle: Path, picture: Path) -> None:
    for count, data in enumerate((b"", b"no image at all", picture.read_bytes()[:80], b"\x89PNG\r\n\x1a\n")):
        bad = picture.with_name(f"bad{count}.png")
        bad.write_bytes(data)
        for verb in (("run", bundle, "-p", "x"), ("overlay", bundle, "-o", "out.png")):
            refuses(*verb, "-i", bad.name, says=(f"`{bad.name}` is not a readable image",))


def test_budget_that_is_not_there(refuses: Refuses, bundle_int8: Path, picture: Path) -> None:
    for verb in (("bench", bundle_int8), ("overlay", bundle_int8, "-i", picture, "-o", "out.png")):
        refuses(*verb, "--keep", "6", says=("no budget keeps 6", "has 5, 16"))


@pytest.mark.parametrize("verb", ["verify", "run", "bench"])
def test_no_cuda_is_no_silent_cpu(verb: str, refuses: Refuses, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    prompt = ("-p", "x") if verb == "run" else ()
    result = refuses(verb, bundle, *prompt, "--provider", "cuda", says=("CUDAExecutionProvider", "onnxruntime-gpu"))
    assert result.out == ""


VERBS = {
    "verify": (),
    "run": ("-p", "x"),
    "bench": ("--runs", "1"),
    "overlay": ("-i", "picture.png", "-o", "out.png"),
    "build": (),
    "lint": (),
}


@pytest.mark.parametrize("verb", VERBS)
def test_not_a_bundle(verb: str, refuses: Refuses, picture: Path) -> None:
    (picture.parent / "empty").mkdir()
    for folder in ("empty", "nowhere"):
        refuses(verb, folder, *VERBS[verb], says=(f"`{folder}` is not a bundle", "manifest.json"))


def _leave(name: str) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        first = next(iter(data["graphs"].values()))
        if name == "file":
            data["files"]["../weights.bin"] = {"sha256": "", "bytes": 1}
        elif name == "absolute":
            data["files"]["/etc/passwd"] = {"sha256": "", "bytes": 1}
        else:
            first["file" if name == "graph" else "engine"] = "graphs/../../other.onnx"

    return change


def _forget(data: dict[str, Any]) -> None:
    inputs = data["graphs"]["decode-5"]["inputs"]
    inputs.remove(next(tensor for tensor in inputs if tensor["name"] == "past_key_0"))


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], Any], tuple[str, ...]]] = {
    "schema 1": (lambda d: d.update(schema=1), ("schema 1", "reads schema 5")),
    "no schema": (lambda d: d.pop("schema"), ("schema None", "reads schema 5")),
    "missing field": (lambda d: d.pop("graphs"), ("cannot be read", "graphs")),
    "unknown field": (lambda d: d.update(extra=1), ("cannot be read", "extra")),
    "wrong type": (lambda d: d.update(files=[1]), ("cannot be read",)),
    "file without size": (lambda d: d["files"]["config.json"].pop("bytes"), ("cannot be read", "bytes")),
    "no layout": (lambda d: d.pop("layout"), ("cannot be read", "layout")),
    "unknown layout": (lambda d: d["layout"].update(extra=1), ("cannot be read", "extra")),
    "bad bucket size": (lambda d: d["buckets"][0].update(size=[1]), ("cannot be read",)),
    "bad geometry": (lambda d: d["buckets"][0].update(geometry={"pixel_values": ["x"]}), ("cannot be read",)),
    "no decode graph": (lambda d: d["graphs"].pop("decode-5"), ("no decode graph for budget 0, bucket 0",)),
    "no vision graph": (lambda d: d["graphs"].pop("vision-5"), ("no vision graph for budget 0, bucket 0",)),
    "a bucket more": (lambda d: d["buckets"].append(d["buckets"][0]), ("no vision graph for budget 0, bucket 1",)),
    "a state less": (_forget, ("`graphs/decode-5.onnx`", "differing: past_key_0")),
    "file leaves": (_leave("file"), ("`../weights.bin`, which leaves the bundle",)),
    "absolute file": (_leave("absolute"), ("`/etc/passwd`, which leaves the bundle",)),
    "graph leaves": (_leave("graph"), ("`graphs/../../other.onnx`, which leaves",)),
    "engine leaves": (_leave("engine"), ("`graphs/../../other.onnx`, which leaves",)),
    "no rows": (lambda d: d.update(exactness={}), ("no exactness rows",)),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifest_is_refused(name: str, refuses: Refuses, bundle: Path, copied: Copied) -> None:
    change, says = MANIFESTS[name]
    path = copied(bundle) / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    refuses("verify", path.parent, says=says)
    if name != "no rows":
        refuses("run", path.parent, "-p", "x", says=says)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff\xfe"])
def test_manifest_is_not_json(text: bytes, refuses: Refuses, bundle: Path, copied: Copied) -> None:
    path = copied(bundle) / "manifest.json"
    path.write_bytes(text)
    refuses("verify", path.parent, says=("manifest.json` cannot be read",))


def _files(bundle: Path) -> list[str]:
    return sorted(read(bundle).files)


def test_every_missing_file_is_named(refuses: Refuses, bundle: Path, copied: Copied) -> None:
    folder = copied(bundle)
    for name in _files(bundle):
        (folder / name).rename(folder / "away")
        refuses("verify", folder, says=(f"`{name}` is missing",))
        refuses("run", folder, "-p", "x", says=(f"`{name}` is missing",))
        (folder / "away").rename(folder / name)


def test_every_shortened_file_is_named_with_both_sizes(refuses: Refuses, bundle: Path, copied: Copied) -> None:
    folder = copied(bundle)
    for name in _files(bundle):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:-1])
        says = (f"`{name}` has {len(data) - 1:,} bytes", f"{len(data):,}")
        refuses("verify", folder, says=says)
        refuses("run", folder, "-p", "x", says=says)
        (folder / name).write_bytes(data)


def test_every_changed_byte_is_found(refuses: Refuses, bundle: Path, copied: Copied) -> None:
    folder = copied(bundle)
    for name in _files(bundle):
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)
        refuses("verify", folder, says=(f"`{name}` was changed", "sha256"))
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)


def test_extra_file_is_ignored(run: Any, bundle: Path, copied: Copied) -> None:
    """What the manifest does not list is never read, so a note beside a bundle does no harm."""
    folder = copied(bundle)
    (folder / "NOTES.txt").write_text("mine")
    assert run("verify", folder).code == 0


@pytest.mark.parametrize("data", [b"", b"\xff" * 100, None])
def test_graph_that_onnxruntime_cannot_load(data: bytes | None, refuses: Refuses, bundle: Path, copied: Copied) -> None:
    folder = copied(bundle)
    graph = folder / "graphs" / "decode-5.onnx"
    graph.write_bytes(graph.read_bytes()[:-500] if data is None else data)
    seal(read(folder), folder)
    for verb in (("verify", folder), ("run", folder, "-p", "x")):
        refuses(*verb, says=("cannot load `decode-5.onnx`",))


@pytest.mark.parametrize("location", ["../../outside.bin", "/outside.bin"])
def test_weights_outside_the_bundle(location: str, refuses: Refuses, bundle: Path, copied: Copied) -> None:
    folder = copied(bundle)
    shutil.copy(folder / "graphs" / "weights.bin", folder.parent / "outside.bin")
    model = onnx.load(folder / "graphs" / "decode-5.onnx", load_external_data=False)
    outside = location if location.startswith("..") else str(folder.parent / "outside.bin")
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = outside
    (folder / "graphs" / "decode-5.onnx").write_bytes(model.SerializeToString())
    seal(read(folder), folder)
    refuses("run", folder, "-p", "x", says=("cannot load `decode-5.onnx`",))


def test_golden_tensors_are_never_unpickled(refuses: Refuses, bundle: Path, copied: Copied) -> None:
    folder = copied(bundle)
    trap = folder.parent / "trap"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(trap),)

    np.savez(folder / "golden" / "5.npz", input_ids=np.array([Trap()], dtype=object))
    assert not trap.exists()
    seal(read(folder), folder)
    refuses("verify", folder, says=("5.npz` cannot be read",))
    assert not trap.exists()


@pytest.mark.parametrize("data", [b"", b"nonsense", None])
def test_damaged_golden_tensors(data: bytes | None, refuses: Refuses, bundle: Path, copied: Copied) -> None:
    folder = copied(bundle)
    path = folder / "golden" / "5.npz"
    path.write_bytes(path.read_bytes()[:1000] if data is None else data)
    seal(read(folder), folder)
    refuses("verify", folder, says=("5.npz` cannot be read",))


def test_onnx_bundle_has_no_engines_to_build(refuses: Refuses, bundle: Path) -> None:
    refuses("build", bundle, says=("ONNX Runtime graphs", "--target rtx"))


def test_verify_against_another_shape_of_model(refuses: Refuses, bundle: Path) -> None:
    refuses("verify", bundle, "--against", "tiny:llava-siglip-qwen2", says=("is not the model of this bundle",))


def test_verify_against_other_weights(refuses: Refuses, bundle: Path, tmp_path: Path) -> None:
    model, processor = tiny_models.make("llava", seed=1)
    model.save_pretrained(tmp_path / "other")
    processor.save_pretrained(tmp_path / "other")
    result = refuses("verify", bundle, "--against", "other", says=("rows are beyond their tolerance",))
    assert "FAIL decode.logits" in result.out and "FAIL vision.image_features" in result.out
