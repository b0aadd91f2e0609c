"""Generated scenes of real handwritten digits, and questions about them.

A scene is a 96x96 RGB picture with one to four coloured handwritten digits, at most one per quadrant, on a noisy
gradient. The handwriting is scikit-learn's `load_digits` (1,797 pictures of 8x8 pixels), split once into 1,400 digits
to train on and 397 that are held out. `sample_scenes` draws what is in the pictures (numpy), `render` paints a whole
batch of them (torch, on any device), `ask` words a question about one of them. Everything follows from (split, seed).

    python scenes.py --split heldout --images 100 -o DIR

writes DIR/0000.png ... and DIR/questions.jsonl, one question of each of the six kinds per picture.
"""

import argparse
import json
import math
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

SIZE = 96  # pixels a side
QUADRANT = SIZE // 2  # pixels a side
PATCH = 8  # pixels a side of the vision tower's patches
GRID = SIZE // PATCH  # patches a side
PLACES = ("top left", "top right", "bottom left", "bottom right")
PALETTE = {  # RGB in 0..1, before each digit's own jitter
    "red": (0.88, 0.15, 0.15),
    "orange": (0.96, 0.53, 0.10),
    "yellow": (0.93, 0.88, 0.20),
    "green": (0.20, 0.76, 0.25),
    "cyan": (0.20, 0.82, 0.88),
    "blue": (0.20, 0.35, 0.93),
    "purple": (0.64, 0.25, 0.84),
    "white": (0.93, 0.93, 0.93),
}
COLOURS = tuple(PALETTE)
KINDS = ("digit", "colour", "place", "count", "presence", "description")
SPLITS = ("train", "heldout")


@cache
def glyphs(split):
    """The handwritten digits of one split: pictures (N, 8, 8) float32 in 0..1 and labels (N,) int64."""
    digits = load_digits()
    parts = train_test_split(digits.images, digits.target, train_size=1400, random_state=0, stratify=digits.target)
    train_images, heldout_images, train_labels, heldout_labels = parts
    images, labels = {"train": (train_images, train_labels), "heldout": (heldout_images, heldout_labels)}[split]
    return (images / 16).astype(np.float32), labels.astype(np.int64)


@dataclass
class Scenes:
    """What is in a batch of B pictures; axis 1 of length 4 is the quadrant, in the order of PLACES."""

    present: np.ndarray  # (B, 4) bool
    digit: np.ndarray  # (B, 4) int64, 0..9
    colour: np.ndarray  # (B, 4) int64, index into COLOURS
    glyph: np.ndarray  # (B, 4, 8, 8) float32, ink in 0..1
    affine: np.ndarray  # (B, 4, 2, 3) float32: quadrant coordinates in -1..1 to glyph coordinates in -1..1
    bend: np.ndarray  # (B, 4, 2, 3, 3) float32: offsets in glyph coordinates at 3x3 control points
    stroke: np.ndarray  # (B, 4, 2) float32: ink level of the stroke's edge (low is thick), steepness (low is blurred)
    tint: np.ndarray  # (B, 4, 3) float32, RGB in 0..1
    gradient: np.ndarray  # (B, 3, 2, 2) float32: background RGB at the four corners
    blotches: np.ndarray  # (B, 3, 8, 8) float32: coarse background noise
    grain: np.ndarray  # (B,) float32: standard deviation of the noise per pixel

    def __len__(self):
        return len(self.present)

    def objects(self, index):
        """The digits of picture `index` in reading order: a list of (digit, colour, place) strings."""
        return [
            (str(self.digit[index, q]), COLOURS[self.colour[index, q]], PLACES[q])
            for q in range(4)
            if self.present[index, q]
        ]


def sample_scenes(split, count, rng, augment=False):
    """Draws `count` scenes with the numpy generator `rng`; `augment` widens every range, for training."""
    images, labels = glyphs(split)
    spread = 1.8 if augment else 1.0

    def around(centre, radius, shape=(count, 4)):
        return centre + spread * radius * rng.uniform(-1, 1, shape)

    order = rng.random((count, 4)).argsort(axis=1).argsort(axis=1)
    present = order < rng.integers(1, 5, (count, 1))
    choice = rng.integers(0, len(labels), (count, 4))
    # Half of the scenes use two colours only, so that colours repeat and counting them means something.
    two = rng.integers(0, len(COLOURS), (count, 2))
    from_two = np.take_along_axis(two, rng.integers(0, 2, (count, 4)), axis=1)
    free = rng.integers(0, len(COLOURS), (count, 4))
    colour = np.where(rng.random((count, 1)) < 0.5, from_two, free)

    size = around(20.0, 3.0)  # pixels: 17 to 23, when not augmented
    stretch = np.exp(around(0.0, 0.08))
    angle, shear = around(0.0, math.radians(9)), around(0.0, 0.1)
    cos, sin = np.cos(angle), np.sin(angle)
    # Room for the digit's box, so that a digit stays inside its quadrant.
    room = QUADRANT / 2 - size * 0.55 - 1
    centre = rng.uniform(-1, 1, (count, 4, 2)) * room[..., None] / (QUADRANT / 2)
    zoom = QUADRANT / size
    linear = np.stack(
        [
            np.stack([cos + shear * sin, sin - shear * cos], -1) * (zoom * stretch)[..., None],
            np.stack([-sin, cos], -1) * (zoom / stretch)[..., None],
        ],
        axis=-2,
    )
    affine = np.concatenate([linear, -linear @ centre[..., None]], axis=-1)

    tint = np.array(list(PALETTE.values()))[colour] * rng.uniform(0.88, 1.04, (count, 4, 1))
    tint = np.clip(tint + rng.uniform(-0.06, 0.06, (count, 4, 3)), 0, 1)
    gradient = rng.uniform(0.04, 0.42, (count, 3, 2, 2))
    return Scenes(
        present=present,
        digit=labels[choice],
        colour=colour,
        glyph=images[choice],
        affine=affine.astype(np.float32),
        bend=around(0.0, 0.07, (count, 4, 2, 3, 3)).astype(np.float32),
        stroke=np.stack([around(0.44, 0.06), np.exp(around(1.0, 0.2))], axis=-1).astype(np.float32),
        tint=tint.astype(np.float32),
        gradient=gradient.astype(np.float32),
        blotches=rng.normal(0, 0.04, (count, 3, 8, 8)).astype(np.float32),
        grain=rng.uniform(0.02, 0.06, count).astype(np.float32),
    )


def render(scenes, device="cpu", generator=None, patch=PATCH):
    """Paints scenes; the grain comes from the torch `generator` (of `device`).

    Returns pictures (B, 3, 96, 96) float32 in 0..1, rounded to 8 bits, and the digits' ink per patch of `patch` pixels
    a side, (B, 12, 12) float32 in 0..1 for 8 (0: no ink in the patch, 1: all ink).
    """
    count = len(scenes)
    spec = {name: torch.from_numpy(value).to(device) for name, value in vars(scenes).items()}
    slots = count * 4
    grid = F.affine_grid(spec["affine"].view(slots, 2, 3), (slots, 1, QUADRANT, QUADRANT), align_corners=False)
    bend = spec["bend"].view(slots, 2, 3, 3).permute(0, 2, 3, 1)
    # The bend's control points span the glyph, so they are looked up at each pixel's glyph coordinates.
    bend = F.grid_sample(bend.permute(0, 3, 1, 2), grid, padding_mode="border", align_corners=True)
    grid = grid + bend.permute(0, 2, 3, 1)
    ink = F.grid_sample(spec["glyph"].view(slots, 1, 8, 8), grid, mode="bicubic", align_corners=False)
    edge, steepness = spec["stroke"].view(slots, 2, 1, 1, 1).unbind(1)
    ink = ((ink - edge) * steepness + 0.5).clamp(0, 1) * (ink > 0.02) * spec["present"].view(slots, 1, 1, 1)

    def picture(slot_values):
        """(B * 4, C, 48, 48) quadrants to (B, C, 96, 96)."""
        channels = slot_values.shape[1]
        tiles = slot_values.reshape(count, 2, 2, channels, QUADRANT, QUADRANT)
        return tiles.permute(0, 3, 1, 4, 2, 5).reshape(count, channels, SIZE, SIZE)

    alpha = picture(ink)
    tint = picture(spec["tint"].view(slots, 3, 1, 1).expand(-1, -1, QUADRANT, QUADRANT))
    background = F.interpolate(spec["gradient"], size=(SIZE, SIZE), mode="bilinear", align_corners=True)
    background = background + F.interpolate(spec["blotches"], size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    grain = torch.randn(count, 3, SIZE, SIZE, device=device, generator=generator) * spec["grain"].view(-1, 1, 1, 1)
    pictures = (torch.lerp(background, tint, alpha) + grain).clamp(0, 1)
    return (pictures * 255).round() / 255, F.avg_pool2d(alpha, patch).squeeze(1)


def to_pil(picture):
    """One rendered picture (3, 96, 96) float32 in 0..1 as a PIL image."""
    return Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def scene_set(split, count, seed, patch=PATCH):
    """The `count` scenes of (split, seed), painted on the CPU: Scenes, pictures (N, 3, 96, 96), ink (N, 12, 12)."""
    scenes = sample_scenes(split, count, np.random.default_rng((SPLITS.index(split), seed)))
    pictures, ink = render(scenes, generator=torch.Generator().manual_seed(seed), patch=patch)
    return scenes, pictures, ink


def article(word):
    return "an" if word[0] in "o8" else "a"


def describe(objects):
    """The full description of a scene's objects, in reading order."""
    phrases = [f"{article(colour)} {colour} {digit} at the {place}" for digit, colour, place in objects]
    return ", ".join(phrases) + "."


def _unique(objects, *fields):
    """The objects whose values at `fields` (0: digit, 1: colour) no other object of the scene shares."""
    keys = [tuple(item[field] for field in fields) for item in objects]
    return [item for item, key in zip(objects, keys, strict=True) if keys.count(key) == 1]


def _ask_digit(objects, rng):
    by_colour = _unique(objects, 1)
    if by_colour and rng.random() < 0.5:
        digit, colour, _ = rng.choice(by_colour)
        forms = ("Which digit is {}?", "What is the {} digit?", "Which number is {}?", "Read the {} digit.")
        return rng.choice(forms).format(colour), digit
    digit, _, place = rng.choice(objects)
    forms = ("Which digit is at the {}?", "What number is at the {}?", "Read the digit at the {}.")
    return rng.choice(forms).format(place), digit


def _ask_colour(objects, rng):
    by_digit = _unique(objects, 0)
    if by_digit and rng.random() < 0.5:
        digit, colour, _ = rng.choice(by_digit)
        return rng.choice(("What colour is the {}?", "Which colour does the {} have?")).format(digit), colour
    _, colour, place = rng.choice(objects)
    forms = ("What colour is the digit at the {}?", "Which colour is at the {}?", "What is the colour at the {}?")
    return rng.choice(forms).format(place), colour


def _ask_place(objects, rng):
    fields = rng.choice([fields for fields in ((0,), (1,), (0, 1)) if _unique(objects, *fields)] or [None])
    if fields is None:  # every object has a twin
        return "Where are the digits?", " and ".join(place for _, _, place in objects)
    digit, colour, place = rng.choice(_unique(objects, *fields))
    what = {(0,): digit, (1,): f"{colour} digit", (0, 1): f"{colour} {digit}"}[fields]
    return rng.choice(("Where is the {}?", "In which corner is the {}?", "Find the {}.")).format(what), place


def _ask_count(objects, rng):
    form = rng.random()
    if form < 0.5:
        forms = ("How many digits are there?", "How many digits do you see?", "Count the digits.")
        return rng.choice(forms), str(len(objects))
    if form < 0.85:
        colour = rng.choice(objects)[1] if rng.random() < 0.75 else rng.choice(COLOURS)
        question = rng.choice(("How many digits are {}?", "How many {} digits are there?", "Count the {} digits."))
        return question.format(colour), str(sum(item[1] == colour for item in objects))
    digit = rng.choice(objects)[0] if rng.random() < 0.75 else str(rng.randrange(10))
    return f"How many times do you see a {digit}?", str(sum(item[0] == digit for item in objects))


def _ask_presence(objects, rng):
    fields = rng.choice(((0, 1), (0, 1), (0,), (1,), (2,), (1, 2), (0, 2)))
    wanted = [list(item) for item in objects]
    target = rng.choice(wanted)
    if rng.random() < 0.5:  # change one thing asked for; the truth is looked up below, whatever comes out
        field = rng.choice(fields)
        target[field] = rng.choice(([str(digit) for digit in range(10)], COLOURS, PLACES)[field])
    digit, colour, place = target
    what = {(0, 1): f"{colour} {digit}", (0,): digit, (1,): f"{colour} digit", (2,): "digit"}.get(fields)
    what = what or {(1, 2): f"{colour} digit", (0, 2): digit}[fields]
    what = f"{article(what)} {what}" + (f" at the {place}" if 2 in fields else "")
    truth = any(all(item[field] == target[field] for field in fields) for item in objects)
    return rng.choice(("Is there {}?", "Do you see {}?", "Can you see {}?")).format(what), "yes" if truth else "no"


def _ask_description(objects, rng):
    forms = ("Describe the picture.", "What is in the picture?", "Describe this image.", "List all the digits.")
    return rng.choice(forms), describe(objects)


_ASK = {
    "digit": _ask_digit,
    "colour": _ask_colour,
    "place": _ask_place,
    "count": _ask_count,
    "presence": _ask_presence,
    "description": _ask_description,
}


def ask(objects, kind, rng):
    """A question of `kind` about `objects` and its answer; `rng` is a `random.Random`."""
    return _ASK[kind](objects, rng)


def write_set(folder, split, count, seed):
    """Writes `count` PNGs of (split, seed) and `questions.jsonl` with one question of each kind per picture."""
    folder.mkdir(parents=True, exist_ok=True)
    scenes, pictures, _ = scene_set(split, count, seed)
    rng = random.Random(seed)
    with open(folder / "questions.jsonl", "w", encoding="utf-8") as file:
        for index in range(count):
            name = f"{index:04d}.png"
            to_pil(pictures[index]).save(folder / name, optimize=True)
            for kind in KINDS:
                question, answer = ask(scenes.objects(index), kind, rng)
                file.write(json.dumps({"image": name, "kind": kind, "question": question, "answer": answer}) + "\n")


def main():
    parser = argparse.ArgumentParser(description="Write pictures of scenes and questions about them.")
    parser.add_argument("--split", choices=SPLITS, default="heldout")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    args = parser.parse_args()
    write_set(args.output, args.split, args.images, args.seed)


if __name__ == "__main__":
    main()
