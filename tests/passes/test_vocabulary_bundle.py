"""A bundle that knows some of the tokens: exact, smaller, refusing by name; and a wrong map does not get through."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import vlmcut
from onnx import numpy_helper
from vlmcut import pipeline
from vlmcut.errors import BundleError, ParityError
from vlmcut.manifest import Manifest
from vlmcut.manifest import read as read_manifest
from vlmcut.passes import recipe
from vlmcut.passes.calibration import read_calibration
from vlmcut.passes.recipe import make
from vlmcut.passes.trim_vocabulary import TrimVocabulary
from vlmcut.pipeline import Request
from vlmcut.prompt import Prompter
from vlmcut.surgery.load import describe
from vlmcut.surgery.talk import Talk, greedy, see_all
from vlmcut.validation.fresh import verify_fresh

from .cut_helpers import needs_rtx

EXAMPLES = Path(__file__).parents[2] / "examples"
ROWS = 200
SMALL: dict[str, Any] = {"vocabulary": ROWS, "text_tokens": 24, "new_tokens": 20}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny:llava that knows 200 of 320 tokens; do not write into it."""
    out = tmp_path_factory.mktemp("vocabulary") / "bundle"
    vlmcut.convert("tiny:llava", out, prune=0.5, **SMALL)
    return out


def check(folder: Path) -> Manifest:
    """Exact; logits of every id; rows that left are in no file, and the others once."""
    manifest = read_manifest(folder)
    assert all(row["ok"] for row in manifest.exactness["rows"])
    assert manifest.exactness["equal"] + len(manifest.exactness["near_ties"]) == manifest.exactness["tokens"] > 0
    vocabulary = manifest.layout.vocabulary
    assert vocabulary is not None and len(vocabulary.ids) == manifest.anatomy["language"]["vocabulary"] == ROWS
    (logits,) = (t.shape for t in manifest.graph("decode", 0).outputs if t.name == "logits")
    assert logits == (1, vocabulary.size) and vocabulary.size > ROWS
    hidden, tied = (manifest.anatomy["language"][key] for key in ("hidden", "tied"))
    places = set()
    for path in (folder / "graphs").glob("*.onnx"):
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            shape = tuple(tensor.dims)
            assert shape not in {(vocabulary.size, hidden), (hidden, vocabulary.size)}
            if shape in {(ROWS, hidden), (hidden, ROWS)}:
                where = {entry.key: entry.value for entry in tensor.external_data}
                places.add((where["offset"], where["length"]))
    assert len(places) == (1 if tied else 2)
    return manifest


def test_a_bundle_is_exact(bundle: Path) -> None:
    check(bundle)


@pytest.mark.parametrize(
    ("model", "more"),
    [
        ("llava", {"prune": 0.5, "quantize": "int8"}),
        ("llava-siglip-qwen2", {"quantize": "int8", "drop_neurons": {"language": 0.3}}),
        ("gemma3", {}),
    ],
    ids=["int8, tied", "int8, untied", "scaled"],
)
def test_other_bundles_are_exact(model: str, more: dict[str, Any], tmp_path: Path) -> None:
    vlmcut.convert(f"tiny:{model}", tmp_path / "out", **SMALL, **more)
    check(tmp_path / "out")


@pytest.mark.parametrize("name", ["scenes", "scenes-smol"])
def test_the_examples_answer_as_before(name: str, tmp_path: Path) -> None:
    """Half of 512 rows, found on the calibration questions: held-out questions through ONNX Runtime."""
    manifest = vlmcut.convert(str(EXAMPLES / name), tmp_path / "out", vocabulary=256, questions=16, new_tokens=16)
    assert manifest.quality is not None and manifest.quality["questions"] == 16
    assert manifest.quality["agreement"] == {"original": 1.0, "cut eager": 1.0, "bundle": 1.0}
    assert manifest.exactness["equal"] == manifest.exactness["tokens"] > 0


def test_a_prompt_that_amplifies_rounding_is_no_alarm(tmp_path: Path) -> None:
    """Decode's logits are 4.1e-5 from the reference: 11 times as far as eager, which rounds luckily in one run."""
    manifest = vlmcut.convert(str(EXAMPLES / "scenes"), tmp_path / "out", vocabulary=128, questions=0, seed=0)
    assert manifest.exactness["equal"] == manifest.exactness["tokens"] > 0


@needs_rtx
def test_an_engine_is_built_in_float16(tmp_path: Path) -> None:
    vlmcut.convert("tiny:llava-siglip-qwen2", tmp_path / "out", target="rtx", dtype="float16", **SMALL)
    engines = {g.role: g.engine for g in check(tmp_path / "out").graphs.values()}
    assert set(engines) == {"vision", "prefill", "decode"}
    assert all(engine and (tmp_path / "out" / engine).stat().st_size for engine in engines.values())


def test_the_runner_refuses_by_text_and_id(bundle: Path, tiny: Callable[..., Any]) -> None:
    tokenizer, model = tiny("llava").processor.tokenizer, vlmcut.Bundle(bundle)
    vocabulary = model.manifest.layout.vocabulary
    assert vocabulary is not None
    lost = next(i for i in tokenizer(" two", add_special_tokens=False)["input_ids"] if i not in vocabulary.ids)
    with pytest.raises(BundleError) as caught:
        model.generate([], "Describe two.")
    assert f"{tokenizer.decode([lost])!r} (id {lost}); 200 of 320 ids have one" in str(caught.value)
    assert "trim-vocabulary" in (caught.value.hint or "")


def test_the_bundle_says_what_the_eager_model_says(bundle: Path, tiny: Callable[..., Any]) -> None:
    loaded, model = tiny("llava"), vlmcut.Bundle(bundle)
    recipe.read(bundle / "recipe.toml").apply(loaded.model, None)
    prompt = Prompter(loaded.processor, describe(loaded.model).layout)([], "Describe the image.")
    shrunk, seen = see_all(loaded.model, prompt)
    want = greedy(Talk.read(loaded.model, [shrunk], [seen]), 16, model.stop)
    assert [list(model.tokens(prompt, 16))] == want


def test_it_is_verified_against_its_model(bundle: Path) -> None:
    rows = verify_fresh(
        bundle, read_manifest(bundle), "tiny:llava", provider="cpu", seed=3, progress=lambda _: None
    )  # fmt: skip
    assert rows and all(row.ok for row in rows)


def test_damaged_runs_are_a_damaged_manifest(bundle: Path, tmp_path: Path) -> None:
    data = json.loads((bundle / "manifest.json").read_text())
    data["layout"]["vocabulary"]["kept"] = "5,4"
    (tmp_path / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(BundleError, match="cannot be read: `4` stands behind 5"):
        read_manifest(tmp_path)


def test_unknown_words_in_a_bundle(tmp_path: Path, tiny: Callable[..., Any]) -> None:
    """With a token that serves the others every prompt is taken, and fresh inputs have tokens without a row."""
    steps = [TrimVocabulary(size=ROWS, unseen="unknown", unknown=0)]
    (tmp_path / "r.toml").write_text(make(steps).to_toml())
    request = Request(model="tiny:llava", recipe=tmp_path / "r.toml", text_tokens=24, new_tokens=20)
    pipeline.convert(request, tmp_path / "out")
    manifest, loaded = check(tmp_path / "out"), tiny("llava")
    assert make(steps).apply(loaded.model, read_calibration(loaded, None)).tables() == manifest.recipe
    text, model = "two blue circles", vlmcut.Bundle(tmp_path / "out")
    prompt = Prompter(loaded.processor, describe(loaded.model).layout)([], text)
    vocabulary = manifest.layout.vocabulary
    assert vocabulary is not None and not np.isin(prompt.input_ids, vocabulary.ids).all()
    shrunk, seen = see_all(loaded.model, prompt)
    want = greedy(Talk.read(loaded.model, [shrunk], [seen]), 16, model.stop)
    assert [list(model.tokens(model.prompt([], text), 16))] == want


def swap_rows(path: Path, way: str) -> None:
    """Fifty ids of one graph change their rows: on the way `in`, where they are looked up, or on the way `out`."""
    model = onnx.load(path)
    maps = {t.name: t for t in model.graph.initializer if list(t.dims) == [320]}
    (node,) = (n for n in model.graph.node if set(n.input) & set(maps) and (n.input[0] in maps) == (way == "in"))
    index = next(i for i, name in enumerate(node.input) if name in maps)
    rows = numpy_helper.to_array(maps[node.input[index]]).copy()
    rows[10:60] = rows[10:60][::-1].copy()
    model.graph.initializer.append(numpy_helper.from_array(rows, "swapped"))
    node.input[index] = "swapped"
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize(("role", "way"), [("prefill", "in"), ("decode", "out")])
def test_a_wrong_map_is_caught(
    role: str, way: str, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_graphs(*given: Any) -> Any:
        out = given[4]
        shutil.copytree(bundle / "graphs", out / "graphs")
        swap_rows(out / read_manifest(bundle).graph(role, 0).file, way)
        return read_manifest(bundle).graphs

    monkeypatch.setattr(pipeline, "write_graphs", write_graphs)
    with pytest.raises(ParityError, match=f"{role}.logits|{role}.present"):
        pipeline.convert(Request(model="tiny:llava", prune=0.5, **SMALL), tmp_path / "out")
    assert not (tmp_path / "out").exists()
