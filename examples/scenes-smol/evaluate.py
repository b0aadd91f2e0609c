"""Accuracy of the model of this folder on scenes with digits it was never trained on.

    python evaluate.py                                  # the 500 questions and 100 descriptions of heldout/
    python evaluate.py --scenes 1000                    # freshly generated scenes of the held-out digits
    python evaluate.py --drop-random 0.75               # without a random 75 % of the visual tokens
    python evaluate.py --drop-received 0.75             # without the 75 % that receive least attention in the tower

An answer counts when it is the expected one, character for character. Dropped tokens leave the sequence: the language
model sees a shorter prompt, at consecutive positions.
"""

import torch
import torch.nn.functional as F
from smol import GRID, HERE, PATCH, SHUFFLE, TOKENS
from transformers import AutoModelForImageTextToText, AutoProcessor

from evaluate import arguments, kept_tokens, show  # isort: skip  (of scenes/, which smol puts first on the path)


def received(attention):
    """How much attention each visual token receives, (B, 64), from a tower layer's (B, heads, 256, 256).

    The mean over heads, over all patches that attend, and over the patches that make the token.
    """
    patches = attention.mean(dim=(1, 2)).view(-1, GRID, GRID)
    return F.avg_pool2d(patches, SHUFFLE).flatten(1)


@torch.no_grad()
def answers(model, processor, images, questions, drop, how, generator):
    """The model's answers (strings) to one question per image, and the attention that each token receives (B, 64)."""
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
            add_generation_prompt=True,
        )
        for question in questions
    ]
    inputs = processor(images=[[image] for image in images], text=texts, return_tensors="pt", padding=True)
    states = model.model.vision_model(inputs["pixel_values"].flatten(0, 1), output_attentions=True)
    attention = received(states.attentions[-1])
    visual = model.model.connector(states.last_hidden_state)
    image = inputs["input_ids"] == model.config.image_token_id
    embedded = model.get_input_embeddings()(inputs["input_ids"]).masked_scatter(image[..., None], visual)
    kept = kept_tokens(attention, drop, how, generator)
    keep = ~image
    keep[image] = torch.zeros(len(images), TOKENS, dtype=torch.bool).scatter(1, kept, True).flatten()
    length = int(keep[0].sum())  # the same in every row: rows differ in padding only
    embedded = embedded[keep].view(len(images), length, -1)
    mask = inputs["attention_mask"][keep].view(len(images), length)
    ids = model.generate(inputs_embeds=embedded, attention_mask=mask)
    return [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)], attention


def main():
    args = arguments(HERE, "received", "drop the share that receives least attention in the tower's last layer")
    processor = AutoProcessor.from_pretrained(args.model, backend="pil")
    model = AutoModelForImageTextToText.from_pretrained(
        args.model, attn_implementation={"vision_config": "eager"}
    ).eval()
    generator = torch.Generator().manual_seed(0)

    def answer(images, questions):
        return answers(model, processor, images, questions, args.drop, args.how, generator)

    show(args, answer, "attention received", PATCH * SHUFFLE)


if __name__ == "__main__":
    main()
