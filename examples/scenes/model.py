"""The vision-language model of this folder: its configuration, its tokenizer and processor, and its [CLS] attention.

A LLaVA in small: a CLIP vision tower of seven layers, whose sixth layer's output (`hidden_states[-2]`) feeds an MLP
projector and a Llama language model of six layers. About 2.9 million parameters.
"""

import json
import random

import numpy as np
import torch
from scenes import GRID, KINDS, PATCH, SIZE, ask, sample_scenes
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

PAD, BOS, EOS, IMAGE = "<pad>", "<s>", "</s>", "<image>"
TOKENS = GRID * GRID  # visual tokens a picture
MEAN = STD = 0.5  # of the pictures' normalisation, for every channel
FEATURE_LAYER = -2
PREFIX = f"USER: {IMAGE * TOKENS}\n"  # what the processor puts before the question (after BOS)
TURN = " ASSISTANT:"  # what it puts after it
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}{{ ' ASSISTANT:' }}
{%- elif message['role'] == 'user' -%}{{ '' if loop.first else ' ' }}{{ 'USER: ' }}{%- endif -%}
{%- if message['content'] is string -%}
{{ (' ' if message['role'] == 'assistant' else '') + message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{{ '<image>\\n' if part['type'] == 'image' else (' ' if message['role'] == 'assistant' else '') + part['text'] }}
{%- endfor -%}
{%- endif -%}
{%- if message['role'] == 'assistant' -%}{{ '</s>' }}{%- elif message['role'] == 'system' -%}{{ '\\n' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ ' ASSISTANT:' }}{%- endif -%}"""


def build_processor():
    """The LLaVA processor: a byte-level BPE tokenizer of at most 512 tokens trained here, and CLIP's preprocessing."""
    rng = random.Random(0)
    scenes = sample_scenes("train", 4000, np.random.default_rng(0))
    turns = (ask(scenes.objects(index), kind, rng) for index in range(len(scenes)) for kind in KINDS)
    corpus = [f"USER: \n{question}{TURN} {answer}" for question, answer in turns]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = [AddedToken(token, normalized=False, special=True) for token in (PAD, BOS, EOS, IMAGE)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=special, initial_alphabet=alphabet)
    bpe.train_from_iterator(corpus, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        extra_special_tokens={"image_token": IMAGE},
        model_max_length=2048,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    side = {"height": SIZE, "width": SIZE}
    pictures = CLIPImageProcessor(
        size=side, do_center_crop=False, crop_size=side, image_mean=[MEAN] * 3, image_std=[STD] * 3, resample=3
    )
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer):
    """The untrained model."""
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}
    ids["eos_token_id"] = tokenizer.eos_token_id
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=7,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=128,
    )
    text = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        **ids,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=FEATURE_LAYER,
        vision_feature_select_strategy="default",
        image_seq_length=TOKENS,
        tie_word_embeddings=True,
        **ids,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=64, **ids)
    return model


def save(model, processor, folder):
    """Writes the folder that `from_pretrained` reads."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def normalise(pictures):
    """Pictures (B, 3, 96, 96) in 0..1 to the tower's pixel values, as the processor does."""
    return (pictures - MEAN) / STD


def cls_attention(tower, hidden_states):
    """How much [CLS] looks at every patch in the layer that makes `hidden_states[-2]`, mean over heads.

    Takes the tower's `hidden_states` (each (B, 1 + 144, D)); returns (B, 144), which with the [CLS] token's attention
    to itself (left out) sums to 1 in each row. Recomputed for the one row, since fused attention returns no weights.
    """
    layer = tower.encoder.layers[FEATURE_LAYER]
    attention = layer.self_attn
    states = layer.layer_norm1(hidden_states[FEATURE_LAYER - 1])
    batch, length, _ = states.shape
    query = attention.q_proj(states[:, :1]).view(batch, 1, attention.num_heads, attention.head_dim)
    key = attention.k_proj(states).view(batch, length, attention.num_heads, attention.head_dim)
    logits = torch.einsum("bqhd,bkhd->bhqk", query, key) * attention.scale
    return logits.softmax(dim=-1).mean(dim=1)[:, 0, 1:]


def read_questions(folder):
    """The list of dicts (image, kind, question, answer) of a folder's `questions.jsonl`."""
    with open(folder / "questions.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]
