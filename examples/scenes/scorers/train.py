"""Trains the weights of this folder, for methods that have some, on the example model and its calibration images.

    python examples/scenes/scorers/train.py                # all of them; minutes on one CPU thread
    python examples/scenes/scorers/train.py covipal        # one of them

`covipal` and `task-conv` learn what the language model itself looks at: the attention that the last token of the prompt
and the answer pay to each visual token, summed over heads and layers. With the 36 tokens of most such attention the
model answers all 192 calibration questions as with all 144; those of layer 3 alone serve for 82 %. `wtc` makes 36
tokens of 144 and learns to make the frozen language model say what it says with all of them.

The held-out images are not touched. The pictures are 32, the questions 192: these weights are an example, no benchmark.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import vlmcut
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from vlmcut.passes.calibration import read_questions
from vlmcut.passes.tokens.learned import weights
from vlmcut.passes.tokens.learned.task_conv import first_attention
from vlmcut.passes.tokens.trained import ROWS
from vlmcut.prompt import Prompter, open_image
from vlmcut.surgery.first_layer import first_layer
from vlmcut.surgery.load import describe, locate
from vlmcut.surgery.selection import Text, TowerState
from vlmcut.surgery.vision import embed_question, look, prepare

HERE = Path(__file__).resolve().parent
SCENES = HERE.parent
BATCH = 32
ARGUMENTS: dict[str, dict[str, Any]] = {
    "covipal": {"hidden": 128, "inner": 32},
    # Narrower than the paper's 32 to 512, which would be 700 kB.
    "task-conv": {"channels": [16, 32, 64, 64, 128], "kernel": 7, "hidden": 128},
    "wtc": {"hidden": 128},
}
STEPS = {"covipal": 600, "task-conv": 600, "wtc": 100}


@dataclass
class Sample:
    """One question with its answer. L text tokens, of which the last A + 1 are the answer and the end."""

    visual: Tensor  # projected tokens, [N, hidden]
    before: Tensor  # embeddings of the prompt before the image
    after: Tensor  # and after it, answer included
    answer: int  # A + 1
    question: Tensor  # embeddings, [M, hidden]
    early: Tensor  # what `task-conv` reads, [N]
    target: Tensor | None = None  # what the model looks at, [N], sums to 1
    says: Tensor | None = None  # log-probabilities of the answer's tokens with all visual tokens, [A + 1, V]


@torch.no_grad()
def read_samples(loaded: Any, folder: Path) -> list[Sample]:
    """Every question of a folder, with what the whole model looks at and says."""
    model, tokenizer = loaded.model, loaded.processor.tokenizer
    prompter = Prompter(loaded.processor, describe(model).layout)
    embed = model.get_input_embeddings()
    seen: dict[str, TowerState] = {}
    found = []
    for line in read_questions(folder):
        prompt = prompter([open_image(folder / line["image"])], line["question"])
        picture = prompt.pictures[0]
        if line["image"] not in seen:
            pixels = torch.from_numpy(picture.pixel_values)
            seen[line["image"]] = look(model, pixels, prepare(model, picture.geometry))[1]
        state = seen[line["image"]]
        ids, place = (torch.from_numpy(x)[0] for x in (prompt.input_ids, prompt.visual_index >= 0))
        start, end = int(place.nonzero()[0]), int(place.nonzero()[-1]) + 1
        said = tokenizer(f" {line['answer']}{tokenizer.eos_token}", add_special_tokens=False)["input_ids"]
        text = embed_question(model, torch.from_numpy(picture.question)[None], torch.tensor([len(picture.question)]))
        asked = TowerState(state.tokens, state.project, text=text, first=partial(first_layer, model))
        after = embed(torch.cat([ids[end:], torch.tensor(said)]))
        visual = state.project(state.tokens)[0]
        sample = Sample(visual, embed(ids[:start]), after, len(said), text.embeddings[0], first_attention(asked)[0])
        out = locate(model).language(
            inputs_embeds=sequence(sample, visual)[None], use_cache=False, output_attentions=True
        )
        looked = sum(a[0, :, answers(sample, len(visual)), start:end].sum(dim=(0, 1)) for a in out.attentions)
        assert isinstance(looked, Tensor)
        sample.target = looked / looked.sum()
        sample.says = model.lm_head(out.last_hidden_state[0, answers(sample, len(visual))]).log_softmax(dim=-1)
        found.append(sample)
    return found


def sequence(sample: Sample, visual: Tensor) -> Tensor:
    """The embeddings of a prompt with its answer and these visual tokens."""
    return torch.cat([sample.before, visual, sample.after])


def answers(sample: Sample, tokens: int) -> slice:
    """The columns that say the answer: from the prompt's last token to the one before the end."""
    end = len(sample.before) + tokens + len(sample.after) - 1
    return slice(end - sample.answer, end)


def batches(samples: list[Sample], steps: int, rng: torch.Generator) -> Iterator[list[Sample]]:
    """Seeded batches, every sample once in each round."""
    order: list[int] = []
    for _ in range(steps):
        if len(order) < BATCH:
            order = torch.randperm(len(samples), generator=rng).tolist()
        yield [samples[order.pop()] for _ in range(BATCH)]


def looks(module: Any, batch: list[Sample], method: str) -> Tensor:
    """KL of what the model looks at from what a scorer says, mean over a batch."""
    target = torch.stack([s.target for s in batch])
    if method == "task-conv":
        score = module(torch.stack([s.early for s in batch]))
    else:
        lengths = torch.tensor([len(s.question) for s in batch])
        embeddings = pad_sequence([s.question for s in batch], batch_first=True)
        mask = (torch.arange(embeddings.shape[1]) < lengths[:, None]).float()
        score = module(torch.stack([s.visual for s in batch]), Text(embeddings, mask))
    return functional.kl_div(score.log_softmax(dim=-1), target, reduction="batchmean")


def says(model: Any, module: Any, batch: list[Sample]) -> Tensor:
    """KL of what the model says with all tokens from what it says with a compressor's, mean over answer tokens."""
    side = round(len(batch[0].visual) ** 0.5)
    made = module(torch.stack([s.visual for s in batch]), side, side)
    x = pad_sequence([sequence(s, v) for s, v in zip(batch, made, strict=True)], batch_first=True)  # causal: harmless
    states = locate(model).language(inputs_embeds=x, use_cache=False).last_hidden_state
    have = torch.cat([states[i, answers(s, made.shape[1])] for i, s in enumerate(batch)])
    want = torch.cat([s.says for s in batch if s.says is not None])
    return functional.kl_div(model.lm_head(have).log_softmax(-1), want, reduction="batchmean", log_target=True)


def train(method: str, loss_of: Callable[[Any, list[Sample]], Tensor], samples: list[Sample], seed: int) -> Any:
    """A trained module."""
    torch.manual_seed(seed)
    module: Any = ROWS[method].module
    module = module(**ARGUMENTS[method])
    steps, started = STEPS[method], time.perf_counter()
    optimizer = torch.optim.AdamW(module.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step, batch in enumerate(batches(samples, steps, torch.Generator().manual_seed(seed)), start=1):
        loss = loss_of(module, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps:
            spent = time.perf_counter() - started
            print(f"{method} {step}/{steps}: loss {loss.item():.4f} ({spent:.0f} s)", flush=True)
    return module


def main() -> None:
    """Parse and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help=f"of {', '.join(ARGUMENTS)}; all for none")
    parser.add_argument("-o", "--output", type=Path, default=HERE, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if unknown := set(options.methods) - set(ARGUMENTS):
        parser.error(f"no weights for {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    loaded = vlmcut.load(SCENES)
    loaded.model.requires_grad_(False).set_attn_implementation("eager")  # the only one that shows its attention
    samples = read_samples(loaded, SCENES / "calibration")
    for method in options.methods or ARGUMENTS:
        loss = partial(says, loaded.model) if method == "wtc" else partial(looks, method=method)
        module = train(method, loss, samples, options.seed)
        path = options.output / f"{method}.safetensors"
        weights.save(module, ARGUMENTS[method], path)
        print(f"{path.name}: {path.stat().st_size:,} bytes", flush=True)


if __name__ == "__main__":
    main()
