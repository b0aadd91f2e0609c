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
from vlmcut.errors import ModelError, VlmcutError
from vlmcut.passes import folder
from vlmcut.passes.calibration import Calibration
from vlmcut.passes.drop_heads import DropHeads
from vlmcut.passes.drop_layers import DropLayers
from vlmcut.passes.drop_neurons import DropNeurons
from vlmcut.passes.prune_tokens import PruneTokens
from vlmcut.passes.quantize import Quantize
from vlmcut.passes.recipe import make
from vlmcut.passes.trim_vocabulary import TrimVocabulary
from vlmcut.prompt import Prompter
from vlmcut.surgery.families import FAMILIES
from vlmcut.surgery.load import Loaded, describe, family_of
from vlmcut.surgery.selection import attached
from vlmcut.surgery.structure import find_attention
from vlmcut.surgery.talk import Talk, see_all
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


def _steps(loaded: Loaded) -> dict[str, Any]:
    a = describe(loaded.model)
    kv = max(a.language.kv_heads)
    return {
        "prune": PruneTokens(keep=tuple(max(1, b.tokens // 2) for b in a.buckets)),
        "heads vision": DropHeads(part="vision", fraction=1 / max(a.tower.heads)),
        "heads language": DropHeads(part="language", fraction=1 / kv if kv > 1 else 0.9),
        "layers vision": DropLayers(part="vision", count=1),
        "layers language": DropLayers(part="language", count=1),
        "neurons vision": DropNeurons(part="vision", fraction=0.3),
        "neurons language": DropNeurons(part="language", fraction=0.3, ranking="global"),
        "vocabulary": TrimVocabulary(size=a.language.vocabulary - 5, unseen="unknown", unknown=0),
        "int8": Quantize(),
    }


@pytest.mark.parametrize("kind", LIGHT)
def test_every_pass_cuts_every_family_or_says_why_not(kind: str) -> None:
    """The laws: nothing to cut changes no bit, a cut changes the answer; described equals planned inside `apply`."""
    sizes = families.buckets(kind)
    original = folder.load(f"tiny:{kind}", sizes=sizes)
    prompter = Prompter(original.processor, describe(original.model).layout)
    prompt = prompter(families.pictures(kind), families.PROMPT)
    data = Calibration((prompt,), "test", original.processor.tokenizer)

    def answer(loaded: Loaded) -> torch.Tensor:
        shrunk, seen = see_all(loaded.model, prompt)
        return Talk.read(loaded.model, [shrunk], [seen]).logits[0]

    want = answer(original)
    trimmed = folder.load(f"tiny:{kind}", sizes=sizes)
    make([]).apply(trimmed.model, None)
    assert torch.equal(answer(trimmed), want)
    every = tuple(b.tokens for b in describe(trimmed.model).buckets)
    make([PruneTokens(keep=every, method="uniform")]).apply(trimmed.model, None)
    assert torch.equal(answer(trimmed), want)
    done = []
    for name, step in _steps(original).items():
        cut = folder.load(f"tiny:{kind}", sizes=sizes)
        try:
            make([step]).apply(cut.model, data)
        except VlmcutError as error:
            assert kind.split("_vl")[0] in str(error) or "leaves 0" in str(error) or "int8" in str(error), error
            continue
        done.append(name)
        assert (answer(cut) - want).abs().max() > 1e-3, name
    assert {
        "prune",
        "heads vision",
        "layers language",
        "neurons vision",
        "neurons language",
        "vocabulary",
        "int8",
    } <= set(done), done


@pytest.mark.parametrize("kind", LIGHT)
def test_a_field_that_no_reader_knows_is_refused_by_name(kind: str) -> None:
    config = folder.load(f"tiny:{kind}").model.config
    config.frobnication = 7
    with pytest.raises(ModelError, match="frobnication"):
        family_of(config).check(config)
