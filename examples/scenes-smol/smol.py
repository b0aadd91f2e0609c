"""The vision-language model of this folder: its configuration, its tokenizer and processor, and where it starts from.

An Idefics3 (the layout of SmolVLM) in small: a SigLIP-like vision tower of six layers without [CLS], whose 16x16
patches a pixel shuffle folds into 8x8 visual tokens; one linear connector; a Llama language model of six layers.

The scenes come from the sibling folder `scenes/`, and so do the weights that training starts from.
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer
from transformers import (
    GenerationConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

HERE = Path(__file__).resolve().parent
SCENES = HERE.parent / "scenes"
sys.path.insert(0, str(SCENES))

from scenes import SIZE  # noqa: E402

PATCH = 6  # pixels a side of the vision tower's patches
GRID = SIZE // PATCH  # patches a side
SHUFFLE = 2  # patches a side that the pixel shuffle makes one visual token of
SIDE = GRID // SHUFFLE  # visual tokens a side
TOKENS = SIDE * SIDE  # visual tokens a picture
MEAN = STD = 0.5  # of the pictures' normalisation, for every channel
PAD, BOS, END, IMAGE = "<pad>", "<s>", "<end_of_utterance>", "<image>"
FAKE, GLOBAL = "<fake_token_around_image>", "<global-img>"
PREFIX = f"User:{FAKE}{GLOBAL}{IMAGE * TOKENS}{FAKE}"  # what the processor puts before the question (after BOS)
TURN = f"{END}\nAssistant:"  # what it puts after it
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ message['role'] | capitalize }}:
{%- if message['content'] is string -%}{{ ' ' + message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{ '<image>' }}
{%- else -%}{{ (' ' if loop.first else '') + part['text'] }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<end_of_utterance>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'Assistant:' }}{%- endif -%}"""


def build_processor():
    """The Idefics3 processor: the tokenizer of `scenes/` with this layout's marks, and one picture as one grid."""
    state = json.loads((SCENES / "tokenizer.json").read_text(encoding="utf-8"))
    # The mark that ends an answer keeps its number and its embedding, under this layout's name.
    vocabulary = state["model"]["vocab"]
    vocabulary[END] = vocabulary.pop("</s>")
    next(token for token in state["added_tokens"] if token["content"] == "</s>")["content"] = END
    tokens = Tokenizer.from_str(json.dumps(state))
    tokens.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (FAKE, GLOBAL)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END,
        model_max_length=2048,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    side = {"longest_edge": SIZE}
    pictures = Idefics3ImageProcessorPil(
        size=side, max_image_size=side, do_image_splitting=False, image_mean=[MEAN] * 3, image_std=[STD] * 3
    )
    return Idefics3Processor(pictures, tokenizer, image_seq_len=TOKENS, chat_template=CHAT_TEMPLATE)


def build_model(tokenizer):
    """The untrained model."""
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}
    ids["eos_token_id"] = tokenizer.eos_token_id
    config = Idefics3Config(
        vision_config={
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "image_size": SIZE,
            "patch_size": PATCH,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": 512,
            "hidden_size": 128,
            "intermediate_size": 320,
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 32,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
            **ids,
        },
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        scale_factor=SHUFFLE,
        tie_word_embeddings=True,
        **ids,
    )
    model = Idefics3ForConditionalGeneration(config)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=64, **ids)
    return model


def save(model, processor, folder):
    """Writes the folder that `from_pretrained` reads."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def normalise(pictures):
    """Pictures (B, 3, 96, 96) in 0..1 to the tower's pixel values, as the processor does."""
    return (pictures - MEAN) / STD


class First:
    """The model of `scenes/`, which this one starts from and whose tower it imitates at first."""

    def __init__(self, device="cpu"):
        self.model = LlavaForConditionalGeneration.from_pretrained(SCENES).eval().to(device)
        self.layer = self.model.config.vision_feature_layer

    @torch.no_grad()
    def features(self, pixel_values):
        """The features of its patches, as a map (B, 128, 12, 12)."""
        states = self.model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states[self.layer]
        return _map(states[:, 1:].float())

    @torch.no_grad()
    def start(self, model, pixel_values):
        """Gives a new model this one's tower layers, language model and embeddings.

        What has no counterpart is approximated: the patch embedding is resized, the position embeddings interpolated,
        and the tower's first normalisation, of which the new one has none, folded into both, with the mean scale it
        has on `pixel_values`. The connector is left to `fit_connector`.
        """
        old, new = self.model.model.vision_tower, model.model.vision_model
        weight = old.embeddings.patch_embedding.weight
        position = old.embeddings.position_embedding.weight[1:]
        embedded = old.embeddings(pixel_values)[:, 1:]
        norm = old.pre_layrnorm
        scale = norm.weight / (embedded.var(-1, correction=0) + norm.eps).sqrt().mean()
        weight = (
            F.interpolate(weight, size=(PATCH, PATCH), mode="bicubic", antialias=True) * (weight.shape[-1] / PATCH) ** 2
        )
        new.embeddings.patch_embedding.weight.copy_((weight - weight.mean(0)) * scale[:, None, None, None])
        new.embeddings.patch_embedding.bias.zero_()
        position = F.interpolate(_map(position[None]), size=(GRID, GRID), mode="bicubic").flatten(2)[0].T
        position = (position - position.mean(-1, keepdim=True)) * scale + norm.bias
        new.embeddings.position_embedding.weight.copy_(position)
        layers = old.encoder.layers.state_dict()
        new.encoder.layers.load_state_dict({name: layers[name] for name in new.encoder.layers.state_dict()})
        model.model.text_model.load_state_dict(self.model.model.language_model.state_dict())
        model.tie_weights()

    @torch.no_grad()
    def fit_connector(self, model, features, target):
        """Sets the connector so that `features` (B, 256, 128) come close to the first model's visual tokens.

        `target` is the map of its features (B, 128, 12, 12); the least-squares fit is towards its 12x12 visual tokens
        averaged to 8x8.
        """
        visual = _map(self.model.model.multi_modal_projector(target.flatten(2).transpose(1, 2)))
        visual = F.interpolate(visual, size=(SIDE, SIDE), mode="bilinear", antialias=True)
        inputs = model.model.connector.pixel_shuffle(features, SHUFFLE).flatten(0, 1).double()
        outputs = visual.flatten(2).transpose(1, 2).flatten(0, 1).double()
        gram = inputs.T @ inputs
        gram = gram + 1e-4 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        solution = torch.linalg.solve(gram, inputs.T @ outputs)
        model.model.connector.modality_projection.proj.weight.copy_(solution.T)


def _map(states):
    """Patches in reading order (B, N, D) as a map (B, D, sqrt N, sqrt N)."""
    side = round(states.shape[1] ** 0.5)
    return states.transpose(1, 2).unflatten(2, (side, side))
