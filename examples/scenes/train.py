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
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
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
from scenes import COLOURS, GRID, KINDS, Scenes, ask, render, sample_scenes
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

NONE_DIGIT, NONE_COLOUR = 10, len(COLOURS)
DIGITS, PAINTS = NONE_DIGIT + 1, NONE_COLOUR + 1  # classes, "none" included
IGNORE = -100
INKED = 0.02  # a patch with more ink than this is not background
FEWEST = 28  # visual tokens that always stay
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


@dataclass
class Batch:
    """A batch of B scenes and, in the language stage, their questions as one sequence of L tokens per picture."""

    scenes: Scenes
    ids: np.ndarray | None = None  # (B, L) int64
    segment: np.ndarray | None = None  # (B, L) int64: 0 the shared prefix, k the k-th question, -1 padding
    position: np.ndarray | None = None  # (B, L) int64
    labels: np.ndarray | None = None  # (B, L) int64: the token at the same place, or IGNORE
    tokens: int = TOKENS  # how many visual tokens of each picture stay


class Stream(IterableDataset):
    """Endless batches: scenes, and with a tokenizer also `questions` questions each.

    The share of descriptions falls from 0.7 to 0.25 over the first `mix` batches. A share `drop` of the batches keeps
    between FEWEST and all visual tokens.
    """

    def __init__(self, split, batch, seed, augment, tokenizer=None, questions=4, mix=1, drop=0.5):
        self.split, self.batch, self.seed, self.augment = split, batch, seed, augment
        self.tokenizer, self.questions, self.mix, self.drop = tokenizer, questions, mix, drop

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        index, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        rng, words = np.random.default_rng((self.seed, index)), random.Random(self.seed * 1000 + index)
        while True:
            scenes = sample_scenes(self.split, self.batch, rng, self.augment)
            if self.tokenizer is None:
                yield Batch(scenes)
            else:
                yield self._with_questions(scenes, words, 0.7 - 0.45 * min(1, index / self.mix))
            index += stride

    def _with_questions(self, scenes, words, descriptions):
        turns = []
        for row in range(len(scenes)):
            objects = scenes.objects(row)
            for _ in range(self.questions):
                kind = KINDS[-1] if words.random() < descriptions else words.choice(KINDS[:-1])
                turns.append(ask(objects, kind, words))
        encode = self.tokenizer.encode_batch
        prefix = encode([PREFIX])[0].ids
        asked = encode([question + TURN for question, _ in turns], add_special_tokens=False)
        answers = encode([f" {answer}{EOS}" for _, answer in turns], add_special_tokens=False)
        rows = []
        for row in range(len(scenes)):
            ids, segment, position = list(prefix), [0] * len(prefix), list(range(len(prefix)))
            labels = [IGNORE] * len(prefix)
            for k in range(self.questions):
                question, answer = (part[row * self.questions + k].ids for part in (asked, answers))
                length = len(question) + len(answer)
                ids += question + answer
                segment += [k + 1] * length
                position += range(len(prefix), len(prefix) + length)
                labels += [IGNORE] * len(question) + answer
            rows.append((ids, segment, position, labels))
        tokens = words.randrange(FEWEST, TOKENS) if words.random() < self.drop else TOKENS
        columns = (_pad([row[field] for row in rows], (0, -1, 0, IGNORE)[field]) for field in range(4))
        return Batch(scenes, *columns, tokens)


def _pad(rows, value):
    length = max(map(len, rows))
    return np.array([row + [value] * (length - len(row)) for row in rows])


def batches(stream, workers):
    return iter(DataLoader(stream, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None))


def tower_loss(tower, heads, scenes, device):
    """The tower stage's loss and its figures, a dict of scalars (tensors)."""
    pictures, ink = render(scenes, device)
    states = tower(normalise(pictures), output_hidden_states=True).hidden_states
    present, digit, colour = (
        torch.from_numpy(value).to(device) for value in (scenes.present, scenes.digit, scenes.colour)
    )
    digit, colour = digit.masked_fill(~present, NONE_DIGIT), colour.masked_fill(~present, NONE_COLOUR)

    # A patch belongs to its quadrant's digit if it has at least half as much ink as the one with most.
    half = GRID // 2
    tiles = ink.view(-1, 2, half, 2, half).permute(0, 1, 3, 2, 4).reshape(-1, 4, half * half)
    core = (tiles >= 0.5 * tiles.amax(-1, keepdim=True)) & present[..., None]
    features = states[FEATURE_LAYER][:, 1:].view(len(ink), 2, half, 2, half, -1).transpose(2, 3)
    features = features.reshape(*tiles.shape, -1)
    digit_logits, colour_logits, place_logits = heads.patch(features).split((DIGITS, PAINTS, 4), dim=-1)
    digit_target = torch.where(core, digit[..., None], NONE_DIGIT)
    colour_target = torch.where(core, colour[..., None], NONE_COLOUR)
    place_target = torch.arange(4, device=device)[None, :, None].expand_as(core)
    weight = core / core.sum() + 0.5 * ~core / (~core).sum()

    def patch_loss(logits, target):
        return (F.cross_entropy(logits.flatten(0, 2), target.flatten(), reduction="none") * weight.flatten()).sum()

    loss = patch_loss(digit_logits, digit_target) + patch_loss(colour_logits, colour_target)
    loss = loss + 0.2 * patch_loss(place_logits, place_target)

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
        votes = (digit_logits.softmax(-1)[..., :NONE_DIGIT] * core[..., None]).sum(2).argmax(-1)
        kept = row.topk(TOKENS // 4).indices
        figures = {
            "digit": (votes == digit)[present].float().mean(),
            "colour": (colour_logits.argmax(-1) == colour_target)[core].float().mean(),
            "core found": (digit_logits.argmax(-1) < NONE_DIGIT)[core].float().mean(),
            "ink in top quarter": goal.gather(1, kept).sum(1).mean(),
            "attention on ink": (row * (ink.flatten(1) > 0.1)).sum(1).mean(),
        }
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
    length = segment.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    visible = (segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None])
    states = model.model.language_model(
        inputs_embeds=embedded, attention_mask=(causal & visible)[:, None], position_ids=position, use_cache=False
    ).last_hidden_state
    target = labels[:, 1:]
    asked = target != IGNORE
    logits = model.lm_head(states[:, :-1][asked])
    losses = F.cross_entropy(logits, target[asked], reduction="none")
    with torch.no_grad():  # every token right, given the right ones before it: what greedy decoding would answer
        questions = int(segment.max())
        key = (torch.arange(len(ids), device=device)[:, None] * questions + segment[:, 1:] - 1)[asked]
        wrong = torch.zeros(len(ids) * questions, device=device)
        wrong.index_add_(0, key, (logits.argmax(-1) != target[asked]).float())
    return losses.mean(), {"exact": (wrong == 0).float().mean()}


def rate(step, steps, peak, warmup=200):
    """The learning rate: linear warm-up, then a cosine down to a hundredth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


class Stage:
    """One stage's loop: optimiser, schedule, log, checkpoints."""

    def __init__(self, name, parameters, peak, steps):
        self.name, self.parameters, self.peak, self.steps, self.step = name, list(parameters), peak, steps, 0
        fused = self.parameters[0].is_cuda
        self.optimizer = torch.optim.AdamW(self.parameters, lr=peak, betas=(0.9, 0.98), weight_decay=0.05, fused=fused)

    def run(self, stream, workers, loss_of, check_of, checkpoint, save_every, log_every=100):
        """Trains; `loss_of` takes a batch, `check_of()` returns figures on held-out digits for the log."""
        source, started, since = batches(stream, workers), time.perf_counter(), self.step
        while self.step < self.steps:
            for group in self.optimizer.param_groups:
                group["lr"] = rate(self.step, self.steps, self.peak)
            loss, figures = loss_of(next(source))
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.step += 1
            if self.step % log_every == 0 or self.step == self.steps:
                seconds = (time.perf_counter() - started) / (self.step - since)
                text = ", ".join(f"{name} {value:.4f}" for name, value in {"loss": loss.item(), **figures}.items())
                print(f"{self.name} {self.step}/{self.steps}: {text} ({seconds:.3f} s a step)", flush=True)
            if self.step % save_every == 0 or self.step == self.steps:
                with torch.no_grad():
                    text = ", ".join(f"{name} {value:.4f}" for name, value in check_of().items())
                print(f"{self.name} {self.step}/{self.steps} held out: {text}", flush=True)
                checkpoint()


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
            loss, figures = loss_of(next(batches(stream(stage, "heldout", **options, drop=0.0), 0)))
            return {"loss": loss.item(), **figures}

        stage.run(stream(stage, **options), args.workers, loss_of, check, checkpoint, args.save_every)

    tower_stage, language_stage = stages
    run(tower_stage, lambda batch: tower_loss(tower, heads, batch.scenes, device))
    run(
        language_stage,
        lambda batch: language_loss(model, batch, device),
        tokenizer=processor.tokenizer.backend_tokenizer,
        mix=args.language_steps // 2,
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
