"""The whole path: what is planned is what comes out, twice the same, and every model answers the same questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vlmcut
from PIL import Image
from vlmcut import api, pipeline, tables
from vlmcut.errors import ExportError, ModelError, PassError, VlmcutError
from vlmcut.exporters.lint import Finding
from vlmcut.manifest import Manifest, read
from vlmcut.pipeline import Request
from vlmcut.surgery.costs import costs, kv_bytes
from vlmcut.surgery.load import describe
from vlmcut.surgery.selection import attached

SMALL = {"images": 2, "text_tokens": 24, "new_tokens": 20}


@pytest.mark.parametrize(
    ("prune", "kept"), [(0.0, 16), (0.03, 16), (0.5, 8), (0.7, 5), (0.75, 4), (0.9, 2), (0.97, 1), (0.999, 1)]
)
def test_prune_is_the_fraction_removed(prune: float, kept: int) -> None:
    planned = pipeline.plan(Request(model="tiny:llava", prune=prune))
    assert [b.visual_tokens for b in planned.budgets] == [kept]
    assert planned.keeps == (planned.after.keep,) == ((kept,),)


def test_a_budget_knows_where_visual_tokens_do_less() -> None:
    """Text of such a prompt must not take the room of images: `Prompt.pad` refuses it."""
    for cuts, idle in (({"skip_visual": {"mlp": 1}}, True), ({}, False)):
        (budget,) = pipeline.plan(Request(model="tiny:llava", **cuts)).budgets
        assert budget.idle is idle


def test_several_budgets() -> None:
    planned = pipeline.plan(Request(model="tiny:llava", keep=(9, 3, 16), **SMALL))
    assert [(b.visual_tokens, b.sequence, b.cache) for b in planned.budgets] == [
        (9, 42, 62),
        (3, 30, 50),
        (16, 56, 76),
    ]
    assert planned.after.keep == (3,) and planned.keeps == ((9,), (3,), (16,))


def test_image_sizes_are_buckets() -> None:
    """A family of one fixed size takes any picture; the bucket remembers which one it was made for."""
    for size in ((32, 32), (30, 40), (700, 20)):
        planned = pipeline.plan(Request(model="tiny:llava", prune=0.7, image_size=(size,)))
        (bucket,) = planned.before.buckets
        assert (bucket.size, bucket.tokens, bucket.name) == (size, 16, f"{size[0]}x{size[1]}")
        assert bucket.geometry == {"pixel_values": (1, 3, 32, 32)}
        assert [(p.rows, p.columns, p.box) for p in bucket.panels] == [(4, 4, (0, 0, 1, 1))]
        (had,) = vlmcut.inspect("tiny:llava", image_size=(size,))["before"]["anatomy"]["buckets"]
        assert had["size"] == list(size)
    assert pipeline.plan(Request(model="tiny:llava")).before.buckets[0].size == (32, 32)


@pytest.mark.parametrize("size", [(0, 32), (32, 0), (-1, 32), (1 << 14, 1 << 14)])
def test_no_such_image_size(size: tuple[int, int]) -> None:
    with pytest.raises(ExportError, match=f"--image-size {size[0]}x{size[1]}: an image has 1 to"):
        pipeline.plan(Request(model="tiny:llava", image_size=(size,)))


def test_plan_reads_no_weight(tmp_path: Path, tiny: Any) -> None:
    """A folder with the config and the processor is enough to plan, and not enough to convert."""
    loaded = tiny("llava")
    loaded.model.config.save_pretrained(tmp_path / "model")
    loaded.processor.save_pretrained(tmp_path / "model")
    assert not list((tmp_path / "model").glob("*.safetensors"))
    planned = pipeline.plan(Request(model=str(tmp_path / "model"), prune=0.7))
    assert planned == pipeline.plan(Request(model="tiny:llava", prune=0.7))
    with pytest.raises(VlmcutError, match=r"model\.safetensors"):
        pipeline.convert(Request(model=str(tmp_path / "model"), prune=0.7), tmp_path / "out")


def test_most_positions_are_allowed_and_one_more_is_not() -> None:
    fits = {"model": "tiny:llava", "prune": 0.7, "images": 1, "text_tokens": 479}
    assert pipeline.plan(Request(**fits, new_tokens=28)).budgets[0].cache == 512
    with pytest.raises(ExportError, match="make 513 positions, the model knows 512"):
        pipeline.plan(Request(**fits, new_tokens=29))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prune": 0.5, "keep": (5,)}, "both given"),
        ({"keep": (5, 5)}, "twice"),
        ({"quantize": "int8", "target": "trt"}, "int8"),
        ({"drop_layers": {"language": 3}}, "3 layers of which 2"),
    ],
)
def test_api_refuses_what_the_command_line_refuses(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    for call in (
        lambda: vlmcut.inspect("tiny:llava", **fields),
        lambda: vlmcut.convert("tiny:llava", tmp_path / "o", **fields),
    ):
        with pytest.raises((PassError, ExportError), match=message):
            call()
    assert list(tmp_path.iterdir()) == []


def test_inspect_is_plain_data_that_adds_up() -> None:
    data = vlmcut.inspect("tiny:llava", prune=0.7, **SMALL)
    assert json.loads(json.dumps(data)) == data
    planned = pipeline.plan(Request(model="tiny:llava", prune=0.7, **SMALL))
    assert data["budgets"][0]["sequence"] == 2 * 5 + 24
    assert data["after"]["kv_bytes"] == kv_bytes(planned.after, planned.budgets[0])
    for name, a in (("before", planned.before), ("after", planned.after)):
        assert sum(c["flops"] for c in data[name]["costs"]) == sum(c.flops for c in costs(a, images=2, text_tokens=24))
    assert {v["name"] for v in data["passes"]} == {v.name for v in api.verdicts(planned.before)}


def test_inspect_predicts_what_the_bundle_was_predicted_to_do(bundle: Path) -> None:
    """From the config alone and from the cut model: the same numbers; a line of text for each graph says them."""
    data = vlmcut.inspect("tiny:llava", prune=0.7, **SMALL)
    manifest = read(bundle)
    after = {name.partition("-")[0]: w["predicted"] for name, w in manifest.anatomy["work"].items()}
    assert data["after"]["graphs"] == after and set(after) == {"vision", "prefill", "decode"}
    before = data["before"]["graphs"]
    assert all(after[name]["flops"] < before[name]["flops"] for name in after)
    assert all(after[name]["state_bytes"] < before[name]["state_bytes"] for name in ("prefill", "decode"))
    said = tables.plan("tiny:llava", pipeline.plan(Request(model="tiny:llava", prune=0.7, **SMALL))).splitlines()
    assert [line.split()[1] for line in said if line.startswith("graph ")] == list(before)
    assert f"{before['prefill']['flops'] / 1e9:.4g} ->" in next(line for line in said if "graph    prefill" in line)
    lines = [line for line in tables.verdict(manifest).splitlines() if line.startswith("work ")]
    assert len(lines) == len(manifest.graphs) and all("GFLOP counted" in line for line in lines)


def test_every_size_of_picture_has_its_vision_graph() -> None:
    data = vlmcut.inspect("tiny:qwen2_vl", image_size=((64, 64), (96, 64)), prune=0.5)
    small, large = (data["after"]["graphs"][f"vision {size}"]["flops"] for size in ("64x64", "96x64"))
    assert small < large and {"prefill", "decode"} < set(data["before"]["graphs"])


def test_bundle_is_what_was_planned(bundle: Path, tiny: Any) -> None:
    manifest = read(bundle)
    planned = pipeline.plan(Request(model="tiny:llava", prune=0.7, **SMALL))
    assert manifest.budgets == planned.budgets
    assert manifest.recipe == planned.recipe.tables()
    assert manifest.source["id"] == "tiny:llava"
    assert {k: manifest.anatomy[k] for k in planned.after.to_json()} == planned.after.to_json()
    (budget,) = manifest.budgets
    assert (manifest.layout, manifest.buckets) == (planned.before.layout, planned.before.buckets)
    language = planned.after.language
    kv = {
        f"{kind}_{layer}": (1, heads, budget.cache, language.head_dim)
        for layer, heads in enumerate(language.kv_heads)
        for kind in ("key", "value")
    }
    for role, columns in (("prefill", budget.sequence), ("decode", 1)):
        graph = manifest.graph(role, 0)
        shapes = {t.name: t.shape for t in graph.inputs}
        assert shapes["input_ids"] == (1, columns)
        assert {n.removeprefix("past_"): s for n, s in shapes.items() if n.startswith("past_")} == kv
        present = {t.name.removeprefix("present_"): t.shape for t in graph.outputs if t.name != "logits"}
        assert present == kv
        assert shapes["position_ids"] == (1, columns) and shapes["length"] == (1,)
    assert {t.name: t.shape for t in manifest.graph("vision", 0).outputs} == {"image_features": (5, 48), "kept": (1, 5)}
    assert manifest.exactness["ok"] and manifest.exactness["equal"] == manifest.exactness["tokens"] == 64
    assert {"torch", "transformers", "vlmcut", "python"} <= set(manifest.tools)


def test_several_budgets_share_one_weight_file(bundle_int8: Path) -> None:
    assert [p.name for p in (bundle_int8 / "graphs").glob("*.bin")] == ["weights.bin"]
    rows = vlmcut.verify(bundle_int8)
    assert all(row.ok for row in rows)
    assert {row.graph for row in rows} == {f"{k}/{g}" for k in (5, 16) for g in ("vision", "prefill", "decode")}


@pytest.mark.parametrize("name", ["bundle", "bundle_int8", "bundle_rtx_graphs"])
def test_verify_with_fresh_inputs(name: str, request: pytest.FixtureRequest) -> None:
    rows = vlmcut.verify(request.getfixturevalue(name), against="tiny:llava", seed=7)
    assert [row for row in rows if not row.ok] == []
    greedy = [row for row in rows if row.output == "tokens"]
    assert len(greedy) == (2 if name == "bundle_int8" else 1)
    assert all("64 of 64 equal" in row.note or "near ties" in row.note for row in greedy)


# --- quality, and the same bytes twice ---


@pytest.fixture(scope="module")
def asked(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """The request of `bundle` again, with questions whose right answer is what that bundle says."""
    folder = tmp_path_factory.mktemp("questions")
    model = vlmcut.Bundle(bundle)
    rng = np.random.default_rng(5)
    lines = []
    for index, question in enumerate(("What is in the picture?", "left", "left or right?")):
        image = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
        image.save(folder / f"{index}.png")
        lines.append({"image": f"{index}.png", "question": question, "answer": model.generate([image], question)})
    lines[2]["answer"] = "no model says this"
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = folder / "bundle"
    seen: list[str] = []
    manifest = vlmcut.convert("tiny:llava", out, prune=0.7, quality=folder, progress=seen.append, **SMALL)
    assert seen[:2] == ["loading the model", "checking that vlmcut reads this model as transformers does"]
    assert seen[-1] == "publishing"
    return out, manifest


def test_quality_of_all_three_models(asked: tuple[Path, Manifest]) -> None:
    out, manifest = asked
    assert read(out) == manifest
    quality = manifest.quality
    assert quality is not None and quality["questions"] == 3
    assert list(quality["accuracy"]) == ["original", "cut eager", "bundle"]
    assert quality["accuracy"]["bundle"] == quality["accuracy"]["cut eager"] == pytest.approx(2 / 3)
    assert quality["agreement"]["original"] == 1
    assert "Quality on 3 questions" in (out / "report" / "index.html").read_text()


def test_same_request_gives_the_same_bytes(asked: tuple[Path, Manifest], bundle: Path) -> None:
    files, again = read(bundle).files, asked[1].files
    assert set(files) == set(again)
    different = [name for name in files if files[name] != again[name]]
    assert set(different) <= {"report/index.html"}  # which shows the quality table


def test_lint_stops_a_conversion(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finding = Finding(severity="error", rule="R1", node="n", message="no", fix="do that")
    monkeypatch.setattr(pipeline, "lint", lambda path, target: [finding, finding])
    with pytest.raises(ExportError, match="2 lint errors for onnx, first R1 at `n`: no") as caught:
        pipeline.check_lint(read(bundle), bundle)
    assert caught.value.hint == "do that"


def test_cut_folder_converts_to_the_same_graphs(bundle: Path, tmp_path: Path) -> None:
    """Surgery, saved and reloaded, then exported, is the same as all at once."""
    pipeline.save_cut(Request(model="tiny:llava", prune=0.7), tmp_path / "cut")
    cut = vlmcut.load(tmp_path / "cut")
    assert describe(cut.model) == pipeline.plan(Request(model="tiny:llava", prune=0.7)).after
    manifest = vlmcut.convert(str(tmp_path / "cut"), tmp_path / "out", **SMALL)
    weights = "graphs/weights.bin"
    assert manifest.files[weights] == read(bundle).files[weights]
    assert manifest.recipe[-1] == read(bundle).recipe[-1]


def test_image_size_goes_all_the_way(tmp_path: Path) -> None:
    """Into the cut folder, the bundle, and the inputs that verify it again."""
    size = {"image_size": ((30, 40),)}
    pipeline.save_cut(Request(model="tiny:llava", prune=0.7, **size), tmp_path / "cut")
    (bucket,) = attached(vlmcut.load(tmp_path / "cut").model).buckets
    assert bucket.size == (30, 40)
    with pytest.raises(ModelError, match="was cut for images of 30x40, not 32x32"):
        pipeline.plan(Request(model=str(tmp_path / "cut"), image_size=((32, 32),)))
    manifest = vlmcut.convert(str(tmp_path / "cut"), tmp_path / "out", **size, **SMALL)
    assert manifest.buckets == (bucket,) == read(tmp_path / "out").buckets
    assert [row for row in vlmcut.verify(tmp_path / "out", against="tiny:llava") if not row.ok] == []
