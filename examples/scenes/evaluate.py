"""Accuracy of the model of this folder on scenes with digits it was never trained on.

    python evaluate.py                                  # the 500 questions and 100 descriptions of heldout/
    python evaluate.py --scenes 1000                    # freshly generated scenes of the held-out digits
    python evaluate.py --drop-random 0.75               # without a random 75 % of the visual tokens
    python evaluate.py --drop-cls 0.75                  # without the 75 % that [CLS] looks at least

An answer counts when it is the expected one, character for character. Dropped tokens leave the sequence: the language
model sees a shorter prompt, at consecutive positions.
"""

import argparse
import json
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from model import FEATURE_LAYER, TOKENS, cls_attention, read_questions
from PIL import Image
from scenes import KINDS, PATCH, ask, scene_set, to_pil
from transformers import AutoModelForImageTextToText, AutoProcessor

HERE = Path(__file__).resolve().parent
FRESH_SEED = 1000  # of --scenes; heldout/ and images/ have other seeds
INKED = 0.1  # a patch with at least this share of ink is an object's


def folder_questions(folder):
    """The questions of a folder: a list of (PIL image, list of (kind, question, answer)), one item per picture."""
    asked = defaultdict(list)
    for item in read_questions(folder):
        asked[item["image"]].append((item["kind"], item["question"], item["answer"]))
    return [(Image.open(folder / name).convert("RGB"), questions) for name, questions in asked.items()]


def fresh_questions(count, patch=PATCH):
    """Questions about `count` new held-out scenes, as `folder_questions`, and their ink per patch (N, 144)."""
    scenes, pictures, ink = scene_set("heldout", count, FRESH_SEED, patch)
    rng = random.Random(FRESH_SEED)
    asked = [[(kind, *ask(scenes.objects(index), kind, rng)) for kind in KINDS] for index in range(count)]
    return [(to_pil(picture), questions) for picture, questions in zip(pictures, asked, strict=True)], ink.flatten(1)


def kept_tokens(attention, drop, how, generator):
    """Indices of the visual tokens to keep, in reading order: (B, K) int64, from the attention to each (B, N)."""
    count = round(attention.shape[1] * (1 - drop))
    score = torch.rand(attention.shape, generator=generator) if how == "random" else attention
    return score.topk(count, dim=1).indices.sort(dim=1).values


@torch.no_grad()
def answers(model, processor, images, questions, drop, how, generator):
    """The model's answers (strings) to one question per image, and the [CLS] attention (B, 144)."""
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
            add_generation_prompt=True,
        )
        for question in questions
    ]
    inputs = processor(images=images, text=texts, return_tensors="pt", padding=True)
    states = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    attention = cls_attention(model.model.vision_tower, states)
    visual = model.model.multi_modal_projector(states[FEATURE_LAYER][:, 1:])
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


def evaluate(answer, scenes, batch):
    """Right answers and questions per kind, {kind: [right, all]}, and the attention per scene (N, tokens).

    `answer` takes images and one question for each; it returns the answers and the attention to each token (B, N).
    """
    score, rows = {kind: [0, 0] for kind in KINDS}, {}
    flat = [(index, image, *item) for index, (image, items) in enumerate(scenes) for item in items]
    flat.sort(key=lambda item: item[2] == "description")  # batches of answers of similar length
    for start in range(0, len(flat), batch):
        part = flat[start : start + batch]
        indices, images, kinds, questions, expected = map(list, zip(*part, strict=True))
        given, attention = answer(images, questions)
        for index, kind, answered, right, row in zip(indices, kinds, given, expected, attention, strict=True):
            score[kind][0] += answered == right
            score[kind][1] += 1
            rows[index] = row
    return score, torch.stack([rows[index] for index in range(len(scenes))])


def attention_figures(attention, ink, whose):
    """How well the attention to each token (N, tokens) finds those with ink (N, tokens): shares in 0..1."""
    objects = ink >= INKED
    top = torch.zeros_like(objects).scatter(1, attention.topk(ink.shape[1] // 4, dim=1).indices, True)
    return {
        "patches that are objects'": objects.float().mean().item(),
        f"object patches in the top 25 % by {whose}": (top & objects).sum().item() / objects.sum().item(),
    }


def report(score):
    """{kind: [right, all]} with its sums as {name: {"right", "questions", "accuracy"}}."""
    short = [score[kind] for kind in KINDS[:-1]]
    table = {**score, "all short": np.sum(short, axis=0).tolist()}
    order = [*KINDS[:-1], "all short", KINDS[-1]]
    rows = {name: {"right": table[name][0], "questions": table[name][1]} for name in order}
    return {name: {**row, "accuracy": row["right"] / max(1, row["questions"])} for name, row in rows.items()}


def arguments(folder, score, what):
    """The command line's arguments; `score` (--drop-SCORE) ranks the visual tokens, by `what`."""
    parser = argparse.ArgumentParser(description="Accuracy on scenes of held-out digits.")
    parser.add_argument("--model", type=Path, default=folder, help="folder of the model (default: this one)")
    parser.add_argument("--images", type=Path, default=folder / "heldout", help="folder with questions.jsonl")
    parser.add_argument("--scenes", type=int, help="evaluate on that many fresh scenes instead")
    dropping = parser.add_mutually_exclusive_group()
    dropping.add_argument("--drop-random", type=float, metavar="SHARE", help="drop a random share of visual tokens")
    dropping.add_argument(f"--drop-{score}", dest="drop", type=float, default=0.0, metavar="SHARE", help=what)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    args.how = "random" if args.drop_random else score
    args.drop = args.drop_random or args.drop
    return args


def show(args, answer, whose, patch=PATCH):
    """Evaluates and prints; `whose` attention it is that `answer` returns, for tokens of `patch` pixels a side."""
    scenes, ink = fresh_questions(args.scenes, patch) if args.scenes else (folder_questions(args.images), None)
    score, attention = evaluate(answer, scenes, args.batch)
    result = {"accuracy": report(score)}
    if ink is not None:
        result["attention"] = attention_figures(attention, ink, whose)
    if args.json:
        print(json.dumps(result, indent=1))
        return
    for name, row in result["accuracy"].items():
        print(f"{name:12} {row['right']:5} of {row['questions']:5}  {100 * row['accuracy']:6.2f} %")
    for name, share in result.get("attention", {}).items():
        print(f"{name}: {100 * share:.1f} %")


def main():
    args = arguments(HERE, "cls", "drop the share [CLS] looks at least")
    processor = AutoProcessor.from_pretrained(args.model)
    model = AutoModelForImageTextToText.from_pretrained(args.model).eval()
    generator = torch.Generator().manual_seed(0)

    def answer(images, questions):
        return answers(model, processor, images, questions, args.drop, args.how, generator)

    show(args, answer, "[CLS] attention")


if __name__ == "__main__":
    main()
