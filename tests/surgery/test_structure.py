"""Parts are found by what they are; what does not follow the conventions is refused by the one that is missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn
from vlmcut.errors import ModelError
from vlmcut.surgery import structure
from vlmcut.surgery import tiny as tiny_models
from vlmcut.surgery.structure import find_attention, find_layers, find_parts

KINDS = (
    "llava", "llava-siglip-qwen2", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl",
    "idefics3", "smolvlm", "paligemma", "gemma3", "pixtral", "mistral3", "lfm2_vl",
)  # fmt: skip


@pytest.fixture(scope="module")
def bare() -> Callable[[str], Any]:
    kept: dict[str, Any] = {}
    return lambda kind: kept.setdefault(kind, tiny_models.make_model(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_has_its_parts(kind: str, bare: Any) -> None:
    """The stacks are those that the config counts, and every weight of a stack lies inside its part."""
    model = bare(kind)
    parts = find_parts(model)
    text, vision = model.config.get_text_config(), model.config.vision_config
    depth = vision.depth if hasattr(vision, "depth") else vision.num_hidden_layers
    assert (len(parts.tower_layers), len(parts.language_layers)) == (depth, text.num_hidden_layers)
    inside = {id(m) for m in parts.tower.modules()}, {id(m) for m in parts.language.modules()}
    assert not inside[0] & inside[1]
    assert all(id(b) in inside[0] for b in parts.tower_layers) and all(
        id(b) in inside[1] for b in parts.language_layers
    )
    assert parts.head is model.get_output_embeddings() and parts.head.out_features == text.vocab_size
    assert parts.projector is None or id(parts.projector) not in inside[0] | inside[1]
    assert (parts.projector is None) == kind.startswith("qwen")  # whose tower ends with its merger
    # What is neither: the projector, the output projection, and single parameters such as LLaVA-NeXT's newline.
    known = inside[0] | inside[1] | {id(m) for m in (parts.projector or nn.Module()).modules()} | {id(parts.head)}
    left = [n for n, m in model.named_modules() if id(m) not in known and list(m.parameters(recurse=False))]
    assert left in ([], ["model"]) and (left == ["model"]) == hasattr(parts.base, "image_newline")


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_attention(kind: str, bare: Any) -> None:
    """Heads and widths of every block against the config."""
    model = bare(kind)
    parts = find_parts(model)
    text = model.config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    for block in parts.language_layers:
        attention = find_attention(block)
        if attention is None:
            assert kind == "lfm2_vl" and any(isinstance(m, nn.Conv1d) for m in block.modules())
            continue
        assert structure.head_dim(attention) == width
        assert structure.query_heads(attention) == text.num_attention_heads
        assert structure.kv_heads(attention) == text.num_key_value_heads
        assert getattr(attention, structure.output_name(attention)).out_features == text.hidden_size
    vision = model.config.vision_config
    heads = getattr(vision, "num_heads", None) or vision.num_attention_heads
    for block in parts.tower_layers:
        attention = find_attention(block)
        assert structure.query_heads(attention) == structure.kv_heads(attention) == heads
        assert structure.head_dim(attention) * heads == structure.output_columns(attention)


def test_stacks_are_found_and_replaced(bare: Any) -> None:
    """`Layers` names the place, not only the list: another list put there is the model's."""
    model = tiny_models.make_model("qwen2_vl")
    stack = find_parts(model).language_stack
    first = stack.modules[0]
    stack.replace(nn.ModuleList([first]))
    assert list(find_parts(model).language_stack.modules) == [first] == list(model.model.language_model.layers)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 4)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Attention()


def test_the_longest_stack_of_attention() -> None:
    """Convolutions are no layers, and a short stack beside a long one is not the model's."""
    root: Any = nn.Module()
    assert find_layers(root) is None
    root.convs = nn.ModuleList(nn.Conv1d(4, 4, 1) for _ in range(9))
    assert find_layers(root) is None
    root.resampler = nn.ModuleList(Block() for _ in range(2))
    root.encoder = nn.Module()
    root.encoder.blocks = nn.ModuleList(Block() for _ in range(3))
    found = find_layers(root)
    assert found is not None and (found.owner, found.name) == (root.encoder, "blocks")
    assert find_attention(root.convs[0]) is None and find_attention(root.resampler[0]) is root.resampler[0].inner


class Stackless(nn.Linear):
    """A language model that is no stack of layers."""

    def get_output_embeddings(self) -> None:
        """None, as every decoder without its head says."""


def without(model: Any, name: str, value: Any) -> Any:
    """The model with one method of it answering otherwise."""
    setattr(model, name, lambda *args, **kwargs: value)
    return model


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "tower is the model": (lambda m: without(m, "get_encoder", m), "vision tower"),
    "tower is the base": (lambda m: without(m, "get_encoder", m.model), "vision tower"),
    "language is the model": (lambda m: without(m, "get_decoder", m), "language model"),
    "language is the base": (lambda m: without(m, "get_decoder", m.model), "language model"),
    "no head": (lambda m: without(m, "get_output_embeddings", None), "output projection"),
    "no stack": (lambda m: without(m, "get_decoder", Stackless(2, 2)), "stack of decoder layers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_missing_is_named(name: str) -> None:
    change, missing = REFUSED[name]
    model = tiny_models.make_model("llava")
    find_parts(model)
    with pytest.raises(ModelError) as caught:
        find_parts(change(model))
    assert f"cannot describe `llava`: it has no {missing} where transformers' families keep it" in str(caught.value)
    assert "image tokens" in (caught.value.hint or "")


def test_a_model_without_image_features() -> None:
    """Mllama attends to its images: no feature takes the place of a token."""
    with pytest.raises(ModelError, match="cannot describe `mllama`: it has no get_image_features"):
        find_parts(tiny_models.make_model("mllama"))


def test_what_get_image_features_takes(bare: Any) -> None:
    """Options with defaults of their own are not counted; what must be given is marked."""
    assert structure.image_parameters(bare("llava")) == {"pixel_values": True, "image_sizes": False}
    qwen = structure.image_parameters(bare("qwen2_vl"))
    assert qwen["pixel_values"] and "image_grid_thw" in qwen and not set(qwen) & {"vision_feature_layer", "kwargs"}
    assert structure.image_parameters(tiny_models.make_model("mllama")) == {}
