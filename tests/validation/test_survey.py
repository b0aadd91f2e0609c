"""Every image-text-to-text type of transformers is tried; what does not work says why; nothing ends in a traceback."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from vlmcut import api
from vlmcut.errors import VlmcutError
from vlmcut.surgery import tiny
from vlmcut.surgery.families import STRUCTURAL, family_of
from vlmcut.surgery.known import Known, known
from vlmcut.surgery.load import attach
from vlmcut.surgery.tiny import shrink
from vlmcut.validation import complete, survey
from vlmcut.validation.sketch import sketch
from vlmcut.validation.survey import LOGITS, Row

LEAST = 40  # types that must be read as transformers reads them


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """All types, read only."""
    return list(survey.survey(export=False))


def test_every_registered_type_has_a_row(rows: list[Row]) -> None:
    assert [row.kind for row in rows] == shrink.kinds()
    assert len(rows) > 90


def test_enough_types_are_read_as_transformers_reads_them(rows: list[Row]) -> None:
    works = [row for row in rows if row.works]
    assert len(works) >= LEAST, survey.counts(rows)
    assert all(row.stock is not None and row.stock < 1e-5 and not row.reason for row in works)
    assert any(row.processor for row in works) and not all(row.processor for row in works)


def test_every_refusal_has_a_reason(rows: list[Row]) -> None:
    for row in rows:
        if not row.works:
            assert len(row.reason) > 10 and "\n" not in row.reason and row.stock is None, row


def test_no_refusal_is_an_accident(rows: list[Row]) -> None:
    """The broad catch is for types to come: of this transformers' types none needs it."""
    assert [row for row in rows if row.reason.startswith("trying it raised")] == []


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("mllama", "get_image_features"),
        ("fuyu", "vision tower"),
        ("florence2", "encoder"),
        ("qwen3_5", "linear_attention"),
        ("blip", "image token"),
        ("hunyuan_vl", "4 axes"),
    ],
)
def test_the_missing_convention_is_named(kind: str, why: str, rows: list[Row]) -> None:
    (row,) = [row for row in rows if row.kind == kind]
    assert not row.works and why in row.reason


@pytest.mark.parametrize("kind", ["exaone4_5", "vipllava"])  # a grid of flattened patches; one square image
def test_a_type_in_full(kind: str) -> None:
    """No reader of its own, no processor: read, cut, exported, proven."""
    assert family_of(shrink.config(kind)) is STRUCTURAL
    (row,) = survey.survey([kind])
    assert row.works, row.reason
    assert row.logits is not None and 0 < row.logits <= LOGITS
    assert row.tokens == 64 and row.method == "uniform"


def test_what_transformers_raises_becomes_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        try:
            raise KeyError("inner")
        except KeyError as error:
            raise RuntimeError("outer\nand a page of words") from error

    monkeypatch.setattr("vlmcut.validation.survey.tiny.make", fail)
    (row,) = survey.survey(["llava"])
    assert not row.works and row.reason == "trying it raised KeyError: 'inner'"


@pytest.mark.parametrize("kind", shrink.kinds())
def test_inspect_never_crashes(kind: str) -> None:
    try:
        api.inspect(f"tiny:{kind}")
    except VlmcutError as error:
        assert len(str(error)) > 10 and "\n" not in str(error)


def test_a_sketched_image_tells_rows_from_columns() -> None:
    model = tiny.make_model("exaone4_5")
    attach(model, ())
    bucket = sketch(model)
    _, rows, columns = bucket.geometry["image_grid_thw"]
    assert rows != columns and bucket.tokens == rows * columns // 4


def test_markdown_holds_every_row() -> None:
    found = [
        Row("llava", True, stock=1e-7, logits=2e-6, tokens=64, method="uniform", processor=True),
        Row("mllama", False, "it has no a|b"),
    ]
    text = survey.markdown(found).splitlines()
    assert len(text) == 4 and len({line.count("|") for line in text}) == 1
    assert "2.0e-06" in text[2] and "refused: it has no a/b" in text[3]
    assert survey.counts(found) == "1 of 2 types work, 1 are refused"
    assert survey.line(found[0]).startswith("llava") and "refused because" in survey.line(found[1])
    assert json.dumps([row.__dict__ for row in found])


def test_known_numbers_stay_known() -> None:
    grid = known(torch.tensor([[1, 4, 6]]))
    assert isinstance(grid.prod(-1), Known) and (grid.prod(-1) // 4).tolist() == [6]
    assert isinstance(grid[:, 1:].unbind(-1)[0], Known)
    mixed = torch.ones(3) * grid[0]
    assert type(mixed) is torch.Tensor and mixed.tolist() == [1.0, 4.0, 6.0]


def test_a_weight_that_nobody_reads_is_told_from_one_that_was_lost() -> None:
    model = tiny.make_model("aria")
    attach(model, ())
    attach(model, (sketch(model),))
    dead, read = "model.vision_tower.post_layernorm.bias", "model.language_model.norm.weight"
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if name in (dead, read)}
    assert complete.unread_weights(model, [dead, read]) == {dead}
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
