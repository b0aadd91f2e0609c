"""What a tiny model reads with: a tokenizer trained in process, PIL image processors, chat templates.

All of it offline and without torchvision. Video halves of processors are left out: transformers has them for
torchvision alone, and vlmcut reads images.
"""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace
from typing import Any
from unittest import mock

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils import is_torchvision_available

_CORPUS = ["USER: <image>\nWhat is in the picture? ASSISTANT: a red square and two blue circles on the left."]


def tokenizer(special: tuple[str, ...], **named: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE; `special` opens with padding, beginning and end, `named` tokens become attributes."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=316 + len(special),
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(_CORPUS, trainer)
    pad, bos, eos = special[:3]
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token=pad, bos_token=bos, eos_token=eos, extra_special_tokens=named
    )


_TEMPLATE = (
    "START{% for m in messages %}TURN{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %}END{% endfor %}{% if add_generation_prompt %}REPLY{% endif %}"
)


def template(turn: str, image: str, reply: str, *, start: str = "", end: str = "") -> str:
    """A chat template.

    Args:
        turn: opens a message; `{role}` is replaced by Jinja for the role's name.
        image: stands for an image, where the message has it.
        reply: asks for the answer.
        start: opens the conversation.
        end: closes a message.
    """
    text = _TEMPLATE
    for word, part in {"START": start, "TURN": turn, "IMAGE": image, "END": end, "REPLY": reply}.items():
        text = text.replace(word, part, 1)
    return text


def image_only(stock: Any, video: str, images: Any, tokenizer: Any, **options: Any) -> Any:
    """A processor of transformers without its video half, which torchvision alone could build.

    It keeps the stock name, and saves the name of the `video` processor too, so that what it saves is a folder as any
    other: loading it with `AutoProcessor` asks for the video half, with the class of this processor does not.
    """

    class ImageOnly(stock):
        video_processor = SimpleNamespace(num_frames=None, fps=None)  # SmolVLM's `apply_chat_template` reads them

        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if name != "video_processor"]

        @classmethod
        def from_args_and_dict(cls, args: list[Any], processor_dict: dict[str, Any], **kwargs: Any) -> Any:
            found = {key: value for key, value in processor_dict.items() if key != "video_processor"}
            return super().from_args_and_dict([*args, None], found, **kwargs)

        def to_dict(self) -> dict[str, Any]:
            return super().to_dict() | {"video_processor": {"video_processor_type": video}}

    ImageOnly.__name__ = ImageOnly.__qualname__ = stock.__name__
    return ImageOnly(images, tokenizer, video_processor=None, **options)


def pixtral() -> Any:
    """`PixtralProcessor`, which asks for torchvision only to import one function that the PIL file has as well."""
    if is_torchvision_available():
        return transformers.PixtralProcessor
    from transformers.models.pixtral import image_processing_pil_pixtral as pil

    with mock.patch.dict(sys.modules, {"transformers.models.pixtral.image_processing_pixtral": pil}):
        return importlib.import_module("transformers.models.pixtral.processing_pixtral").PixtralProcessor
