"""The manifest: what is written is read back, sizes follow from the budget alone."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vlmcut.errors import BundleError
from vlmcut.manifest import (
    Bucket,
    GraphInfo,
    Layout,
    Manifest,
    Panel,
    TensorInfo,
    TokenBudget,
    check_files,
    digest,
    read,
)

sizes = st.integers(1, 10_000)
budgets = st.builds(TokenBudget, images=sizes, visual_tokens=sizes, text_tokens=sizes, new_tokens=sizes)
names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
tensors = st.builds(
    TensorInfo, name=names, dtype=st.sampled_from(["float32", "int64"]), shape=st.lists(sizes, max_size=4).map(tuple)
)
graphs = st.builds(
    GraphInfo,
    role=st.sampled_from(["vision", "prefill", "decode"]),
    budget=st.integers(0, 3),
    bucket=st.integers(0, 3),
    file=st.sampled_from(["graphs/a.onnx", "b.onnx"]),
    inputs=st.lists(tensors, max_size=3).map(tuple),
    outputs=st.lists(tensors, max_size=3).map(tuple),
    engine=st.sampled_from([None, "engines/rtx/a.plan"]),
)
small = st.integers(1, 9)
shares = st.floats(0, 1)
panels = st.builds(
    Panel, rows=small, columns=small, box=st.tuples(shares, shares, shares, shares), line_breaks=st.booleans()
)
shapes = st.lists(sizes, min_size=1, max_size=5).map(tuple)
buckets = st.builds(
    Bucket,
    size=st.tuples(sizes, sizes),
    geometry=st.fixed_dictionaries(
        {"pixel_values": shapes}, optional={"image_sizes": shapes, "image_grid_thw": shapes, "spatial_shapes": shapes}
    ),
    tokens=sizes,
    panels=st.lists(panels, max_size=4).map(tuple),
)
layouts = st.builds(
    Layout,
    image_token_id=sizes,
    positions=st.sampled_from(["compact", "mrope"]),
    first_position=st.integers(0, 1),
    merge=st.integers(1, 3),
)
manifests = st.builds(
    Manifest,
    source=st.fixed_dictionaries({"id": names, "revision": st.none(), "files": st.dictionaries(names, names)}),
    recipe=st.lists(st.fixed_dictionaries({"name": names, "keep": sizes}), max_size=3),
    target=st.sampled_from(["onnx", "rtx", "trt"]),
    dtype=st.sampled_from(["float32", "float16"]),
    layout=layouts,
    buckets=st.lists(buckets, min_size=1, max_size=3).map(tuple),
    budgets=st.lists(budgets, min_size=1, max_size=3).map(tuple),
    graphs=st.dictionaries(names, graphs, max_size=3),
    files=st.dictionaries(
        st.sampled_from(["config.json", "graphs/weights.bin"]), st.fixed_dictionaries({"sha256": names, "bytes": sizes})
    ),
    tools=st.dictionaries(names, names, max_size=3),
    exactness=st.dictionaries(names, st.floats(allow_nan=False), max_size=3),
    quality=st.none(),
    builds=st.just({"deferred": "asked for"}),
)


@given(budgets)
def test_sizes_follow_from_the_budget(budget: TokenBudget) -> None:
    assert budget.sequence == budget.images * budget.visual_tokens + budget.text_tokens
    assert budget.cache == budget.positions == budget.sequence + budget.new_tokens
    narrow = dataclasses.replace(budget, carriers=1)
    assert narrow.cache == budget.images + budget.text_tokens + budget.new_tokens
    assert (narrow.sequence, narrow.positions) == (budget.sequence, budget.positions)


@given(buckets)
def test_line_breaks_are_the_last_of_their_rows(bucket: Bucket) -> None:
    """Walk the panels token by token, as the family's rows are written."""
    walked = []
    position = 0
    for panel in bucket.panels:
        start = position
        for _ in range(panel.rows):
            position += panel.columns
            if panel.line_breaks:
                walked.append(position)
                position += 1
        assert position - start == panel.tokens
    assert bucket.line_breaks == tuple(walked)
    assert bucket.name == f"{bucket.size[0]}x{bucket.size[1]}"


@given(layouts)
def test_axes(layout: Layout) -> None:
    assert layout.axes == (3 if layout.positions == "mrope" else 1)


@given(manifests)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, manifest: Manifest) -> None:
    folder = tmp_path_factory.mktemp("manifest")
    manifest.save(folder)
    text = (folder / "manifest.json").read_text()
    assert read(folder) == manifest
    read(folder).save(folder)
    assert (folder / "manifest.json").read_text() == text  # and the same bytes again
    for stored, budget in zip(json.loads(text)["budgets"], manifest.budgets, strict=True):
        assert (stored["sequence"], stored["cache"]) == (budget.sequence, budget.cache)


@given(st.integers().filter(lambda n: n != 2))
def test_other_schemas_are_refused(tmp_path_factory: pytest.TempPathFactory, schema: int) -> None:
    folder = tmp_path_factory.mktemp("manifest")
    (folder / "manifest.json").write_text(json.dumps({"schema": schema}))
    with pytest.raises(BundleError, match=f"schema {schema}, this vlmcut reads schema 5"):
        read(folder)


@pytest.mark.parametrize("hashes", [True, False])
def test_check_files(bundle: Path, hashes: bool) -> None:
    manifest = read(bundle)
    check_files(bundle, manifest, hashes=hashes)
    name = "config.json"
    wrong = {"sha256": "0" * 64, "bytes": manifest.files[name]["bytes"]}
    changed = dataclasses.replace(manifest, files={**manifest.files, name: wrong})
    if hashes:
        with pytest.raises(BundleError, match=r"`config.json` was changed: sha256 .* the manifest says 000000000000"):
            check_files(bundle, changed, hashes=True)
    else:
        check_files(bundle, changed, hashes=False)


def test_manifest_of_a_bundle_lists_every_file(bundle: Path) -> None:
    manifest = read(bundle)
    there = {p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if p.is_file()}
    assert there - set(manifest.files) == {"manifest.json"} and set(manifest.files) <= there
    for name, entry in manifest.files.items():
        assert entry == {"sha256": digest(bundle / name), "bytes": os.path.getsize(bundle / name)}


def test_bundle_names_no_path_of_this_machine(bundle: Path) -> None:
    for path in bundle.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert str(bundle).encode() not in data and b"/work/" not in data and b"/venv/" not in data, path


def test_graph_by_role_and_budget(bundle_int8: Path) -> None:
    manifest = read(bundle_int8)
    for index, keep in enumerate((5, 16)):
        for role in ("vision", "prefill", "decode"):
            assert manifest.graph(role, index).file == f"graphs/{role}-{keep}.onnx"
    with pytest.raises(BundleError, match="no decode graph for budget 2, bucket 0"):
        manifest.graph("decode", 2)
    with pytest.raises(BundleError, match="no vision graph for budget 1, bucket 1"):
        manifest.graph("vision", 1, 1)


@given(manifests)
def test_a_graph_is_found_by_all_three(manifest: Manifest) -> None:
    """Role, budget and bucket together; a graph that agrees in two of them is another one."""
    there = {(g.role, g.budget, g.bucket) for g in manifest.graphs.values()}
    for wanted in there | {("vision", 0, 1), ("decode", 4, 0)}:
        if wanted in there:
            found = manifest.graph(*wanted)
            assert (found.role, found.budget, found.bucket) == wanted
            continue
        with pytest.raises(BundleError, match=f"no {wanted[0]} graph for budget {wanted[1]}, bucket {wanted[2]}"):
            manifest.graph(*wanted)
