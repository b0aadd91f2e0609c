"""The module around the tower: it hands on rows as they are, for every caller, and disappears from saved names."""

from __future__ import annotations

import pytest
import torch
from vlmcut.passes.prune_tokens import PruneTokens
from vlmcut.passes.recipe import make
from vlmcut.passes.tokens.methods import METHODS
from vlmcut.surgery.load import describe, locate, state_dict


@pytest.mark.parametrize("method", METHODS)
def test_every_image_keeps_its_own(kind: str, tiny, prompt, method: str) -> None:
    """One image alone gives what it gives beside another."""
    loaded = tiny(kind)
    make([PruneTokens(keep=5, method=method)]).apply(loaded.model, None)
    pixels = prompt(loaded)["pixel_values"]
    with torch.no_grad():
        both = loaded.model.get_image_features(pixels, return_dict=True)
        alone = [loaded.model.get_image_features(p[None], return_dict=True) for p in pixels]
    assert both.kept.shape == (2, 5)
    for image in range(2):
        assert torch.equal(both.kept[image], alone[image].kept[0])
        # float32: the tower's products over one image or two; features are of size 6, measured 0.0.
        torch.testing.assert_close(both.pooler_output[image], alone[image].pooler_output[0], rtol=0, atol=5e-6)


def test_content_decides(kind: str, tiny, prompt) -> None:
    """Two different images keep different tokens; a constant choice does not look."""
    for method, row in METHODS.items():
        loaded = tiny(kind)
        make([PruneTokens(keep=5, method=method)]).apply(loaded.model, None)
        with torch.no_grad():
            kept = loaded.model.get_image_features(prompt(loaded)["pixel_values"], return_dict=True).kept
        assert torch.equal(kept[0], kept[1]) == (row.constant is not None), method


def test_the_projector_is_registered_once(kind: str, tiny) -> None:
    loaded = tiny(kind)
    make([]).apply(loaded.model, None)
    names = set(state_dict(loaded.model))
    count = sum(p.numel() for p in loaded.model.parameters())
    PruneTokens(keep=5).apply(loaded.model, describe(loaded.model))
    assert set(state_dict(loaded.model)) == names
    assert sum(p.numel() for p in loaded.model.parameters()) == count
    assert any(".wrapped." in n for n in loaded.model.state_dict())
    assert (
        locate(loaded.model).selection is not None and locate(loaded.model).tower is not locate(loaded.model).selection
    )


def test_a_prompt_with_the_wrong_number_of_placeholders_is_refused(tiny, prompt) -> None:
    """transformers itself checks; a silent misalignment would be worse than any error."""
    loaded = tiny("llava")
    whole = prompt(loaded)
    make([PruneTokens(keep=5)]).apply(loaded.model, None)
    with pytest.raises(ValueError, match="Image features and image tokens do not match, tokens: 32"):
        loaded.model(**whole)


def test_generation_works_on_a_cut_model(kind: str, tiny, prompt) -> None:
    """`generate` with its cache gives the tokens of whole forward passes."""
    loaded = tiny(kind)
    make([PruneTokens(keep=5)]).apply(loaded.model, None)
    inputs = prompt(loaded)
    with torch.no_grad():
        made = loaded.model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
        ids = inputs["input_ids"]
        for _ in range(4):
            logits = loaded.model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(dim=-1)], dim=1)
    assert made.shape == ids.shape and torch.equal(made, ids)
