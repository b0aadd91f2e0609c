"""Trains the model of this folder on generated scenes, starting from the weights of the one in `scenes/`.

    python train.py -o DIR [--device cuda|cpu] [--resume]

Two stages, one after the other:

1. Tower. Its six layers start as the first six of `scenes/` (its seventh does nothing there). The patches are smaller
   now and there is no [CLS], so it learns again, with heads that are thrown away afterwards: every patch says which
   digit and which colour it belongs to, if any, and where. In the first half a term of falling weight also pulls the
   features towards those of the first model, interpolated.
2. Language. The tower is frozen; the connector (fitted by least squares to the first model's visual tokens) and the
   language model (the first one's) learn to answer, always from all visual tokens.

Nothing here prepares the model for token pruning: no term on attention, no visual token is ever dropped.

DIR holds a checkpoint that `from_pretrained` loads, and `training_state.pt` to resume from, every --save-every steps.
Both stages run under bfloat16 autocast; the weights stay fp32. The defaults for one CPU core take about an hour; those
for a GPU were never run.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from smol import (
    BOS,
    END,
    GRID,
    IMAGE,
    PATCH,
    PREFIX,
    TOKENS,
    TURN,
    First,
    build_model,
    build_processor,
    normalise,
    save,
)
from torch import nn

from scenes import render  # isort: skip  (found through smol)
from training import DIGITS, PAINTS, Form, Stage, Stream, answer_loss, batches, objects_of, patch_loss  # isort: skip

DEFAULTS = {  # pictures a step and steps of the two stages
    "cuda": {"tower_batch": 512, "tower_steps": 2000, "language_batch": 512, "language_steps": 2000, "workers": 8},
    "cpu": {"tower_batch": 32, "tower_steps": 1000, "language_batch": 16, "language_steps": 900, "workers": 0},
}


def patch_features(model, pictures):
    """The tower's features of pictures in 0..1: (B, 256, 128)."""
    return model.model.vision_model(normalise(pictures)).last_hidden_state.float()


def imitation(features, target):
    """How far the features (B, 256, 128) are from the first model's (B, 128, 12, 12), each patch's normalised."""
    target = F.interpolate(target, size=(GRID, GRID), mode="bilinear").flatten(2).transpose(1, 2)
    return F.mse_loss(features, F.layer_norm(target, target.shape[-1:]))


def tower_loss(model, head, first, pull, scenes, device):
    """The tower stage's loss and its figures, a dict of scalars (tensors); `pull` is the weight of the imitation."""
    pictures, ink = render(scenes, device, patch=PATCH)
    features = patch_features(model, pictures)
    logits = head(features).float().split((DIGITS, PAINTS, 4), dim=-1)
    loss, figures = patch_loss(logits, ink, *objects_of(scenes, device))
    if pull > 0:
        apart = imitation(features, first.features(normalise(pictures)))
        loss, figures = loss + pull * apart, {**figures, "apart": apart.detach()}
    return loss, figures


def language_loss(model, batch, device):
    """The language stage's loss and its figures, a dict of scalars (tensors)."""
    pictures, _ = render(batch.scenes, device)
    with torch.no_grad():
        features = patch_features(model, pictures)
    ids, segment, position, labels = (
        torch.from_numpy(value).to(device) for value in (batch.ids, batch.segment, batch.position, batch.labels)
    )
    visual = model.model.connector(features).float()
    image = ids == model.config.image_token_id
    embedded = model.get_input_embeddings()(ids).masked_scatter(image[..., None], visual)
    return answer_loss(model.model.text_model, model.lm_head, embedded, segment, position, labels)


def train(args):
    device = args.device
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    processor = build_processor()
    check_format(processor)
    model = build_model(processor.tokenizer).to(device)
    if device == "cpu":
        model.set_attn_implementation("eager")  # faster there than the fused one, backwards
    first = First(device)
    head = nn.Linear(model.config.vision_config.hidden_size, DIGITS + PAINTS + 4).to(device)
    language = [model.model.connector, model.model.text_model]  # lm_head is tied to the embedding
    tower_stage = Stage(
        "tower", [*model.model.vision_model.parameters(), *head.parameters()], args.tower_rate, args.tower_steps
    )
    language_stage = Stage(
        "language", [p for part in language for p in part.parameters()], args.language_rate, args.language_steps
    )
    stages = [tower_stage, language_stage]
    state_path = args.output / "training_state.pt"
    if args.resume and state_path.exists():
        state = torch.load(state_path, map_location=device)
        model.load_state_dict(state["model"])
        head.load_state_dict(state["head"])
        for stage, (step, optimizer) in zip(stages, state["stages"], strict=True):
            stage.step = step
            stage.optimizer.load_state_dict(optimizer)

    def checkpoint():
        save(model, processor, args.output)
        states = [(stage.step, stage.optimizer.state_dict()) for stage in stages]
        torch.save({"model": model.state_dict(), "head": head.state_dict(), "stages": states}, state_path)

    def stream(stage, split="train", **options):
        # A resumed run continues with other scenes than the ones it has seen.
        augment = split == "train"
        batch = args.tower_batch if stage is tower_stage else args.language_batch
        return Stream(split, batch, 10_000 * augment + stage.step, augment, **options)

    def run(stage, loss_of, **options):
        def loss_in_bf16(batch):
            with torch.autocast(device, torch.bfloat16):
                return loss_of(batch)

        def check():
            loss, figures = loss_in_bf16(next(batches(stream(stage, "heldout", **options), 0)))
            return {"loss": loss.item(), **figures}

        stage.run(stream(stage, **options), args.workers, loss_in_bf16, check, checkpoint, args.save_every)

    def examples():
        """Pictures to start from (256, 3, 96, 96)."""
        return render(next(iter(Stream("train", 256, 5, True))).scenes, device)[0]

    def pull():
        return 1 - 2 * tower_stage.step / tower_stage.steps

    if tower_stage.step == 0:
        first.start(model, normalise(examples()))
    run(tower_stage, lambda batch: tower_loss(model, head, first, pull(), batch.scenes, device))
    if language_stage.step == 0:
        with torch.no_grad():
            pictures = examples()
            first.fit_connector(model, patch_features(model, pictures), first.features(normalise(pictures)))
    run(
        language_stage,
        lambda batch: language_loss(model, batch, device),
        tokenizer=processor.tokenizer.backend_tokenizer,
        form=Form(PREFIX, TURN, END, TOKENS),
        mix=args.language_steps // 2,
    )


def check_format(processor):
    """Raises AssertionError unless training's prompt is token for token what the chat template and processor make."""
    question = "Which digit is red?"
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    encode = processor.tokenizer.backend_tokenizer.encode
    ids = encode(PREFIX).ids + encode(question + TURN, add_special_tokens=False).ids
    assert text.startswith(f"User:{IMAGE}{question}"), text
    assert encode(text.replace(f"User:{IMAGE}", PREFIX)).ids == ids
    assert ids[0] == processor.tokenizer.convert_tokens_to_ids(BOS)


def main():
    parser = argparse.ArgumentParser(description="Train the model of this folder, from the weights of scenes/.")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resume", action="store_true", help="continue from DIR/training_state.pt")
    parser.add_argument("--save-every", type=int, default=200, metavar="STEPS")
    for number, (stage, peak) in enumerate((("tower", 6e-4), ("language", 1e-3)), start=1):
        parser.add_argument(f"--{stage}-batch", type=int, help=f"pictures a step of stage {number}")
        parser.add_argument(f"--{stage}-steps", type=int, help=f"steps of stage {number}")
        parser.add_argument(f"--{stage}-rate", type=float, default=peak, help=f"peak learning rate of stage {number}")
    parser.add_argument("--workers", type=int, help="processes that word the questions")
    args = parser.parse_args()
    for name, value in DEFAULTS[args.device].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.output.mkdir(parents=True, exist_ok=True)
    train(args)


if __name__ == "__main__":
    main()
