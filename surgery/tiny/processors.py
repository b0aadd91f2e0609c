"""What a tiny model reads with: a tokenizer trained in process, PIL image processors, chat templates.

All of it offline and without torchvision.
"""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ...processors.no_video import NoVideo
from ...processors.opening import processor_class

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


def image_only(name: str, video: str, images: Any, tokenizer: Any, **options: Any) -> Any:
    """A processor of transformers with a stand-in for its `video` half, which torchvision alone could build."""
    stock = processor_class(name)
    return stock(
        image_processor=images, tokenizer=tokenizer, video_processor=NoVideo(video_processor_type=video), **options
    )
