"""Trains the model of this folder from scratch on generated scenes.

    python train.py -o DIR [--device cuda|cpu] [--resume]

Two stages, one after the other:

1. Tower. The vision tower alone, with heads that are thrown away afterwards: every patch of layer -2 says which digit
   and which colour it belongs to, if any, and where; [CLS] of layer -2 and of the last layer says what each quadrant
   holds, which (digit, colour) pairs are present, and how many digits there are. A further term pulls the [CLS]
   attention of layer -2 (mean over heads) towards the patches with ink.
2. Language. The tower is frozen; projector and language model learn to answer. A picture's questions share its
   visual tokens in one sequence, and a mask keeps them from seeing each other, so each is one turn of its own. In
   half of the batches patches without ink are dropped at random, so that no answer leans on the background or on a
   token's place in the sequence.

DIR holds a checkpoint that `from_pretrained` loads, and `training_state.pt` to resume from, every --save-every steps.

On one H200 the defaults take about ten minutes. On two CPU cores they take about 2.7 hours, by the measured 0.51 s a
step of stage 1 and 1.28 s a step of stage 2, for batches of 32 pictures instead of 512; not run to the end.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from model import (
    EOS,
    FEATURE_LAYER,
    IMAGE,
    PREFIX,
    TOKENS,
    TURN,
    build_model,
    build_processor,
    cls_attention,
    normalise,
    save,
)
from scenes import COLOURS, render
from torch import nn
from training import DIGITS, PAINTS, Form, Stage, Stream, answer_loss, batches, objects_of, patch_loss

INKED = 0.02  # a patch with more ink than this is not background
DEFAULTS = {  # batch size and steps of the two stages
    "cuda": {"batch": 512, "tower_steps": 4600, "language_steps": 3000, "workers": 8},
    "cpu": {"batch": 32, "tower_steps": 8000, "language_steps": 4500, "workers": 0},
}


class Heads(nn.Module):
    """What supervises the tower; not part of the model."""

    def __init__(self, width):
        super().__init__()
        self.patch = nn.Linear(width, DIGITS + PAINTS + 4)
        self.cls = nn.ModuleList(nn.Linear(width, 4 * (DIGITS + PAINTS) + 10 * len(COLOURS) + 5) for _ in range(2))


def tower_loss(tower, heads, scenes, device):
    """The tower stage's loss and its figures, a dict of scalars (tensors)."""
    pictures, ink = render(scenes, device)
    states = tower(normalise(pictures), output_hidden_states=True).hidden_states
    present, digit, colour = objects_of(scenes, device)
    logits = heads.patch(states[FEATURE_LAYER][:, 1:]).split((DIGITS, PAINTS, 4), dim=-1)
    loss, figures = patch_loss(logits, ink, present, digit, colour)

    pairs = torch.zeros(len(ink), 10 * len(COLOURS), device=device)
    pairs.scatter_add_(1, (digit * len(COLOURS) + colour).masked_fill(~present, 0), present.float())
    for head, layer in zip(heads.cls, (FEATURE_LAYER, -1), strict=True):
        quadrants, pair_logits, count_logits = head(states[layer][:, 0]).split(
            (4 * (DIGITS + PAINTS), 10 * len(COLOURS), 5), dim=-1
        )
        digits, colours = quadrants.reshape(-1, DIGITS + PAINTS).split((DIGITS, PAINTS), dim=-1)
        loss = loss + 0.5 * F.cross_entropy(digits, digit.flatten())
        loss = loss + 0.5 * F.cross_entropy(colours, colour.flatten())
        loss = loss + 2 * F.binary_cross_entropy_with_logits(pair_logits, pairs.clamp(max=1))
        loss = loss + 0.2 * F.cross_entropy(count_logits, present.sum(1))

    row = cls_attention(tower, states)
    goal = ink.flatten(1) / ink.sum((1, 2))[:, None]
    attention = -(goal * row.clamp(min=1e-6).log()).sum(1).mean()
    with torch.no_grad():
        kept = row.topk(TOKENS // 4).indices
        figures["ink in top quarter"] = goal.gather(1, kept).sum(1).mean()
        figures["attention on ink"] = (row * (ink.flatten(1) > 0.1)).sum(1).mean()
    return loss + 0.1 * attention, figures


def language_loss(model, batch, device):
    """The language stage's loss and its figures, a dict of scalars (tensors)."""
    pictures, ink = render(batch.scenes, device)
    with torch.no_grad():
        tower = model.model.vision_tower
        features = tower(normalise(pictures), output_hidden_states=True).hidden_states[FEATURE_LAYER][:, 1:]
    ids, segment, position, labels = (
        torch.from_numpy(value).to(device) for value in (batch.ids, batch.segment, batch.position, batch.labels)
    )
    image = ids == model.config.image_token_id
    visual = model.model.multi_modal_projector(features)
    embedded = model.get_input_embeddings()(ids).masked_scatter(image[..., None], visual)
    if batch.tokens < TOKENS:
        # Patches with ink come first, most ink first; then patches of the background, at random.
        score = torch.where(ink > INKED, 1 + ink, torch.rand_like(ink)).flatten(1)
        keep = ~image
        keep[image] = torch.zeros_like(score).scatter(1, score.topk(batch.tokens).indices, 1).bool().flatten()
        position = position - (~keep).long().cumsum(1)
        embedded, segment, position, labels = (
            values[keep].view(len(ids), -1, *values.shape[2:]) for values in (embedded, segment, position, labels)
        )
    return answer_loss(model.model.language_model, model.lm_head, embedded, segment, position, labels)


def train(args):
    device = args.device
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    processor = build_processor()
    check_format(processor)
    model = build_model(processor.tokenizer).to(device)
    tower = model.model.vision_tower
    heads = Heads(model.config.vision_config.hidden_size).to(device)
    language = [model.model.multi_modal_projector, model.model.language_model]  # lm_head is tied to the embedding
    stages = [
        Stage("tower", [*tower.parameters(), *heads.parameters()], 1e-3, args.tower_steps),
        Stage("language", [p for part in language for p in part.parameters()], 1.5e-3, args.language_steps),
    ]
    state_path = args.output / "training_state.pt"
    if args.resume and state_path.exists():
        state = torch.load(state_path, map_location=device)
        model.load_state_dict(state["model"])
        heads.load_state_dict(state["heads"])
        for stage, (step, optimizer) in zip(stages, state["stages"], strict=True):
            stage.step = step
            stage.optimizer.load_state_dict(optimizer)

    def checkpoint():
        save(model, processor, args.output)
        states = [(stage.step, stage.optimizer.state_dict()) for stage in stages]
        torch.save({"model": model.state_dict(), "heads": heads.state_dict(), "stages": states}, state_path)

    def stream(stage, split="train", **options):
        # A resumed run continues with other scenes than the ones it has seen.
        augment = split == "train"
        return Stream(split, args.batch, 10_000 * augment + stage.step, augment, **options)

    def run(stage, loss_of, **options):
        def check():
            loss, figures = loss_of(next(batches(stream(stage, "heldout", **{**options, "drop": 0.0}), 0)))
            return {"loss": loss.item(), **figures}

        stage.run(stream(stage, **options), args.workers, loss_of, check, checkpoint, args.save_every)

    tower_stage, language_stage = stages
    run(tower_stage, lambda batch: tower_loss(tower, heads, batch.scenes, device))
    run(
        language_stage,
        lambda batch: language_loss(model, batch, device),
        tokenizer=processor.tokenizer.backend_tokenizer,
        form=Form(PREFIX, TURN, EOS, TOKENS),
        mix=args.language_steps // 2,
        drop=0.5,
    )


def check_format(processor):
    """Raises AssertionError unless training's prompt is token for token what the chat template and processor make."""
    question = "Which digit is red?"
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    encode = processor.tokenizer.backend_tokenizer.encode
    ids = encode(PREFIX).ids + encode(question + TURN, add_special_tokens=False).ids
    assert encode(text.replace(IMAGE, IMAGE * TOKENS)).ids == ids


def main():
    parser = argparse.ArgumentParser(description="Train the model of this folder from scratch.")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resume", action="store_true", help="continue from DIR/training_state.pt")
    parser.add_argument("--save-every", type=int, default=500, metavar="STEPS")
    for name, what in (("batch", "pictures a step"), ("tower-steps", "steps of stage 1")):
        parser.add_argument(f"--{name}", type=int, help=what)
    parser.add_argument("--language-steps", type=int, help="steps of stage 2")
    parser.add_argument("--workers", type=int, help="processes that word the questions")
    args = parser.parse_args()
    for name, value in DEFAULTS[args.device].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.output.mkdir(parents=True, exist_ok=True)
    train(args)


if __name__ == "__main__":
    main()
