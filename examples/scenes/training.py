"""What training the models of `scenes/` and `scenes-smol/` has in common: batches, losses, and the loop of a stage."""

import math
import random
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scenes import COLOURS, KINDS, Scenes, ask, sample_scenes
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

NONE_DIGIT, NONE_COLOUR = 10, len(COLOURS)
DIGITS, PAINTS = NONE_DIGIT + 1, NONE_COLOUR + 1  # classes, "none" included
IGNORE = -100
FEWEST = 28  # visual tokens that always stay


@dataclass
class Form:
    """How a prompt is put together: prefix (picture included), question, turn, a space, answer, end."""

    prefix: str
    turn: str
    end: str
    tokens: int  # visual tokens a picture


@dataclass
class Batch:
    """A batch of B scenes and, in the language stage, their questions as one sequence of L tokens per picture."""

    scenes: Scenes
    ids: np.ndarray | None = None  # (B, L) int64
    segment: np.ndarray | None = None  # (B, L) int64: 0 the shared prefix, k the k-th question, -1 padding
    position: np.ndarray | None = None  # (B, L) int64
    labels: np.ndarray | None = None  # (B, L) int64: the token at the same place, or IGNORE
    tokens: int = 0  # how many visual tokens of each picture stay


class Stream(IterableDataset):
    """Endless batches: scenes, and with a tokenizer (and the Form of a prompt) also `questions` questions each.

    The share of descriptions falls from 0.7 to 0.25 over the first `mix` batches. A share `drop` of the batches keeps
    between FEWEST and all visual tokens.
    """

    def __init__(self, split, batch, seed, augment, tokenizer=None, form=None, questions=4, mix=1, drop=0.0):
        self.split, self.batch, self.seed, self.augment = split, batch, seed, augment
        self.tokenizer, self.form, self.questions, self.mix, self.drop = tokenizer, form, questions, mix, drop

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
        prefix = encode([self.form.prefix])[0].ids
        asked = encode([question + self.form.turn for question, _ in turns], add_special_tokens=False)
        answers = encode([f" {answer}{self.form.end}" for _, answer in turns], add_special_tokens=False)
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
        tokens = self.form.tokens
        if words.random() < self.drop:
            tokens = words.randrange(FEWEST, tokens)
        columns = (_pad([row[field] for row in rows], (0, -1, 0, IGNORE)[field]) for field in range(4))
        return Batch(scenes, *columns, tokens)


def _pad(rows, value):
    length = max(map(len, rows))
    return np.array([row + [value] * (length - len(row)) for row in rows])


def batches(stream, workers):
    return iter(DataLoader(stream, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None))


def objects_of(scenes, device):
    """What the quadrants of B scenes hold: present (bool), digit and colour, NONE_* where nothing is; each (B, 4)."""
    present, digit, colour = (
        torch.from_numpy(value).to(device) for value in (scenes.present, scenes.digit, scenes.colour)
    )
    return present, digit.masked_fill(~present, NONE_DIGIT), colour.masked_fill(~present, NONE_COLOUR)


def patch_loss(logits, ink, present, digit, colour):
    """The loss of patches that say which digit and which colour they belong to, if any, and in which quadrant.

    `logits` are those of the three answers, each (B, N, classes) in reading order, and `ink` is (B, G, G) with
    G * G = N. A patch belongs to its quadrant's digit if it has at least half as much ink as the one with most.
    Returns the loss and figures, a dict of scalars (tensors).
    """
    half = ink.shape[1] // 2

    def tiles(values):
        """(B, N, ...) in reading order to (B, 4, N / 4, ...), a quadrant after the other."""
        grid = values.reshape(len(ink), 2, half, 2, half, -1).transpose(2, 3)
        return grid.reshape(len(ink), 4, half * half, *values.shape[2:])

    amount = tiles(ink.flatten(1))
    core = (amount >= 0.5 * amount.amax(-1, keepdim=True)) & present[..., None]
    digit_logits, colour_logits, place_logits = map(tiles, logits)
    digit_target = torch.where(core, digit[..., None], NONE_DIGIT)
    colour_target = torch.where(core, colour[..., None], NONE_COLOUR)
    place_target = torch.arange(4, device=ink.device)[None, :, None].expand_as(core)
    weight = core / core.sum() + 0.5 * ~core / (~core).sum()

    def loss_of(logits, target):
        return (F.cross_entropy(logits.flatten(0, 2), target.flatten(), reduction="none") * weight.flatten()).sum()

    loss = loss_of(digit_logits, digit_target) + loss_of(colour_logits, colour_target)
    loss = loss + 0.2 * loss_of(place_logits, place_target)
    with torch.no_grad():
        votes = (digit_logits.softmax(-1)[..., :NONE_DIGIT] * core[..., None]).sum(2).argmax(-1)
        figures = {
            "digit": (votes == digit)[present].float().mean(),
            "colour": (colour_logits.argmax(-1) == colour_target)[core].float().mean(),
            "core found": (digit_logits.argmax(-1) < NONE_DIGIT)[core].float().mean(),
        }
    return loss, figures


def answer_loss(language_model, lm_head, embedded, segment, position, labels):
    """The loss of the answers in a Batch's sequences, `embedded` with their pictures (B, L, D), and its figures.

    The questions of a picture share its visual tokens; the mask keeps them from seeing each other.
    """
    length = segment.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segment.device).tril()
    visible = (segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None])
    # Added to the scores, as every implementation of attention understands it; of a boolean one, eager makes +1 and +0.
    mask = torch.zeros(visible.shape, device=segment.device).masked_fill(~(causal & visible), -1e30)[:, None]
    states = language_model(
        inputs_embeds=embedded, attention_mask=mask, position_ids=position, use_cache=False
    ).last_hidden_state
    target = labels[:, 1:]
    asked = target != IGNORE
    logits = lm_head(states[:, :-1][asked])
    losses = F.cross_entropy(logits, target[asked], reduction="none")
    with torch.no_grad():  # every token right, given the right ones before it: what greedy decoding would answer
        questions = int(segment.max())
        rows = torch.arange(len(segment), device=segment.device)[:, None]
        key = (rows * questions + segment[:, 1:] - 1)[asked]
        wrong = torch.zeros(len(segment) * questions, device=segment.device)
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
