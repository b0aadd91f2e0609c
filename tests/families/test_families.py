"""Every family end to end on its tiny model: the same proof that writes docs/families.md, with its bars."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.utils import is_timm_available
from vlmcut.errors import ModelError
from vlmcut.passes import folder
from vlmcut.passes.recipe import make
from vlmcut.surgery.families import FAMILIES
from vlmcut.surgery.load import Loaded, family_of
from vlmcut.surgery.selection import attached
from vlmcut.surgery.structure import find_attention
from vlmcut.surgery.vision import look, prepare
from vlmcut.validation import stock

_PATH = Path(__file__).parents[2] / "benchmarks" / "families.py"
_SPEC = importlib.util.spec_from_file_location("families_benchmark", _PATH)
assert _SPEC and _SPEC.loader
families: Any = importlib.util.module_from_spec(_SPEC)
sys.modules["families_benchmark"] = families
_SPEC.loader.exec_module(families)

MUST = set(
    "llava llava_next llava_onevision qwen2_vl qwen2_5_vl qwen3_vl internvl smolvlm idefics3 paligemma gemma3 mistral3 "
    "pixtral lfm2_vl fast_vlm".split()
)
_TIMM = pytest.mark.skipif(not is_timm_available(), reason="fast_vlm needs timm and torchvision")
KINDS = [pytest.param(kind, marks=_TIMM if kind == "fast_vlm" else ()) for kind in families.SIZES]
LIGHT = [kind for kind in families.SIZES if kind != "fast_vlm"]


def test_every_must_family_has_a_proof_and_a_reader() -> None:
    assert set(families.SIZES) >= MUST
    assert set(FAMILIES) >= MUST


@pytest.mark.parametrize("kind", KINDS)
def test_a_family_goes_the_whole_way(kind: str) -> None:
    proof = families.prove(kind)
    for said in (proof.eager, proof.onnx, proof.run, proof.rtx):
        have, of = said.split("/")
        assert have == of and int(of) > 0, proof
    assert proof.logits <= families.TOLERANCE, proof  # float32; measured 1.5e-6 to 2.0e-5
    assert abs(proof.work - 1) <= 0.05, proof  # measured 0.971 to 1: what chooses tokens is not predicted


def test_the_table_in_the_docs_has_every_family() -> None:
    page = (_PATH.parents[1] / "docs" / "families.md").read_text()
    rows = re.findall(r"^\| (\S+) \| [\d+]+ -> ", page, re.MULTILINE)
    assert set(rows) >= MUST
    for row in page.splitlines():
        if re.match(r"^\| \S+ \| [\d+]+ -> ", row):
            cells = [cell.strip() for cell in row.strip("|").split("|")]
            assert float(cells[4]) <= families.TOLERANCE, row
            for index in (3, 5, 6, 7):
                have, of = cells[index].split("/")
                assert have == of, row


@pytest.fixture(scope="module", params=LIGHT)
def loaded(request: pytest.FixtureRequest) -> Loaded:
    return folder.load(f"tiny:{request.param}", sizes=families.buckets(request.param))


def test_vlmcut_reads_it_as_transformers_does(loaded: Loaded) -> None:
    assert stock.check(loaded) <= 1e-5  # of the largest logit, float32; measured 2e-7 to 5e-7


def test_members_are_the_patches_that_a_token_is_made_of(loaded: Loaded) -> None:
    """One row of the tower's last block is disturbed at a time: exactly the tokens that it is a member of change."""
    model = folder.load(loaded.source["id"], sizes=tuple(b.size for b in attached(loaded.model).buckets)).model
    make([]).apply(model, None)  # the last layer is the one whose features are taken
    about, family = attached(model), attached(model).family
    kind = model.config.model_type
    for bucket in about.buckets:
        members = family.members(model.config, bucket.geometry)
        assert members is not None and len(members) == bucket.tokens
        if kind == "llava_onevision" and bucket is about.buckets[0]:
            continue  # this grid is interpolated down and mixes patches; members are the nearest ones
        pixels = torch.randn(bucket.geometry["pixel_values"], generator=torch.Generator().manual_seed(1))
        last = find_attention(family.locate(model).tower_layers[-1])
        rows = int(members.max()) + 1
        for patch in {0, 1, rows // 2, rows - 1}:
            changed = _tokens_changed_by(model, last, pixels, bucket.geometry, patch, family.has_cls(model.config))
            want = np.flatnonzero((members == patch).any(axis=1))
            assert set(changed) == set(want.tolist()), (kind, bucket.name, patch)


@torch.no_grad()
def _tokens_changed_by(
    model: Any, attention: Any, pixels: torch.Tensor, geometry: Any, patch: int, has_cls: bool
) -> list[int]:
    """Visual tokens that change when the attention output of one patch is disturbed in the scored block."""
    prepared = prepare(model, geometry)
    output = next(
        getattr(attention, n) for n in ("o_proj", "out_proj", "proj", "projection_layer") if hasattr(attention, n)
    )
    before = look(model, pixels, prepared)[0]
    done = 0

    def disturb(_: Any, __: Any, out: torch.Tensor) -> torch.Tensor:
        nonlocal done
        rows = out.reshape(-1, out.shape[-1]).clone()
        per = out.shape[-2] - has_cls
        segments = rows.shape[0] // out.shape[-2]
        local = patch - done
        if 0 <= local < segments * per:
            noise = torch.randn(out.shape[-1], generator=torch.Generator().manual_seed(2))  # a constant is normed away
            rows[local // per * out.shape[-2] + local % per + has_cls] += noise
        done += segments * per
        return rows.reshape(out.shape)

    hook = output.register_forward_hook(disturb)
    try:
        after = look(model, pixels, prepared)[0]
    finally:
        hook.remove()

    def final(encoded: Any) -> torch.Tensor:
        return encoded.tokens if encoded.project is None else encoded.project(encoded.tokens)

    moved = (final(before) - final(after)).abs().amax(dim=-1)
    return torch.nonzero(moved > 1e-5).flatten().tolist()


@pytest.mark.parametrize("kind", LIGHT)
def test_a_field_that_no_reader_knows_is_refused_by_name(kind: str) -> None:
    config = folder.load(f"tiny:{kind}").model.config
    config.frobnication = 7
    with pytest.raises(ModelError, match="frobnication"):
        family_of(config).check(config)
