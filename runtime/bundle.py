"""A bundle as a model: images and a prompt in, a stream of text out. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import BundleError
from ..manifest import Manifest, TokenBudget, check_files, read
from ..processors import open_processor
from ..prompt import Prompt, Prompter, open_image
from .sessions import Graphs, Sight


class Bundle:
    """A folder made by `vlmcut convert`.

    Args:
        path: the folder.
        keep: which budget, by the visual tokens it keeps per image; the first one if not given.
        provider: `cpu` or `cuda`; never changed silently.
        threads: of one operator, 0 lets the runtime choose.

    Raises:
        BundleError: no bundle, a missing or shortened file, no such budget, a provider that is not there.
    """

    def __init__(self, path: str | Path, *, keep: int | None = None, provider: str = "cpu", threads: int = 0) -> None:
        self.path = Path(path)
        self.manifest: Manifest = read(self.path)
        check_files(self.path, self.manifest, hashes=False)
        self.budget_index = find_budget(self.manifest, keep)
        self.graphs = Graphs(self.path, self.manifest, self.budget_index, provider=provider, threads=threads)
        self.prompter = open_prompter(self.path, self.manifest)
        self.stop = stop_ids(self.path)

    @property
    def budget(self) -> TokenBudget:
        return self.manifest.budgets[self.budget_index]

    def prompt(self, images: Sequence[Image.Image | str | Path], text: str, *, fit: bool = False) -> Prompt:
        """The whole prompt, placeholders of all visual tokens included.

        Args:
            fit: resize an image that no bucket takes to the bucket whose shape is nearest, instead of refusing it.

        Raises:
            BundleError: an unreadable image, or one of a size that this bundle was not made for.
        """
        opened = [(i if isinstance(i, Image.Image) else open_image(i)).convert("RGB") for i in images]
        if fit:
            opened = [self._fitted(image) for image in opened]
        prompt = self.prompter(opened, text)
        for picture in prompt.pictures:
            picture.bucket(self.manifest.buckets)
        return prompt

    def _fitted(self, image: Image.Image) -> Image.Image:
        buckets = self.manifest.buckets
        picture, _ = self.prompter.look(image)
        if any(picture.geometry == bucket.geometry for bucket in buckets):
            return image
        shape = np.log(image.height / image.width)
        nearest = min(buckets, key=lambda b: (abs(np.log(b.size[0] / b.size[1]) - shape), -b.tokens))
        return image.resize((nearest.size[1], nearest.size[0]), Image.Resampling.BICUBIC)

    def see(self, prompt: Prompt) -> tuple[Prompt, list[Sight]]:
        """Encode the pictures of a whole prompt, and shrink it to the tokens that are kept."""
        seen = [self.graphs.vision(picture) for picture in prompt.pictures]
        return prompt.shrink([sight.kept for sight in seen]), seen

    def tokens(self, prompt: Prompt, max_new_tokens: int | None = None) -> Iterator[int]:
        """Greedy token ids after a whole prompt, ending before an end-of-sequence token.

        Args:
            max_new_tokens: at most the budget's, which is the default.

        Raises:
            BundleError: a prompt over budget, or more new tokens than the cache has room for.
        """
        for token, _ in self.steps(prompt, max_new_tokens):
            if token not in self.stop:
                yield token

    def steps(self, prompt: Prompt, max_new_tokens: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """Greedy token ids as `tokens`, an end-of-sequence token included, each with the logits it is the largest of.

        Yields:
            A token and float32 [V].
        """
        most = self.budget.new_tokens
        if max_new_tokens is not None and not 1 <= max_new_tokens <= most:
            raise BundleError(
                f"max_new_tokens={max_new_tokens}, the budget holds {most}",
                hint=f"choose 1 to {most}, or convert again with more --new-tokens",
            )
        shrunk, seen = self.see(prompt)
        logits = self.graphs.prefill(shrunk, seen)
        for count in range(max_new_tokens or most):
            token = int(logits.argmax())
            yield token, logits
            if token in self.stop:
                return
            if count + 1 < (max_new_tokens or most):
                logits = self.graphs.decode(token, shrunk, count)

    def stream(
        self,
        images: Sequence[Image.Image | str | Path],
        prompt: str,
        max_new_tokens: int | None = None,
        *,
        fit: bool = False,
    ) -> Iterator[str]:
        """The answer piece by piece, each as soon as it is decoded."""
        tokenizer = self.prompter.processor.tokenizer
        ids: list[int] = []
        shown = text = ""
        for token in self.tokens(self.prompt(images, prompt, fit=fit), max_new_tokens):
            ids.append(token)
            text = tokenizer.decode(ids, skip_special_tokens=True)
            if not text.endswith("�"):  # half of a character so far
                yield text[len(shown) :]
                shown = text
        if text != shown:  # it ended there
            yield text[len(shown) :]

    def generate(
        self,
        images: Sequence[Image.Image | str | Path],
        prompt: str,
        max_new_tokens: int | None = None,
        *,
        fit: bool = False,
    ) -> str:
        """The whole answer.

        Args:
            images: paths or PIL images. prompt: text; `<image>` places an image, the others come first.
            fit: resize an image of another size than the bundle was made for.
        """
        return "".join(self.stream(images, prompt, max_new_tokens, fit=fit)).strip()


def find_budget(manifest: Manifest, keep: int | None) -> int:
    """Index of the budget that keeps `keep` visual tokens per image; the first for None."""
    kept = [b.visual_tokens for b in manifest.budgets]
    if keep is None:
        return 0
    if keep not in kept:
        raise BundleError(
            f"no budget keeps {keep} visual tokens per image", hint=f"this bundle has {', '.join(map(str, kept))}"
        )
    return kept.index(keep)


def open_prompter(folder: Path, manifest: Manifest) -> Prompter:
    """The bundle's processor, PIL backend; loading it runs no remote code."""
    return Prompter(open_processor(folder / "processor"), manifest.layout)


def stop_ids(folder: Path) -> frozenset[int]:
    """End-of-sequence ids of `generation_config.json`; empty if it names none."""
    import json

    path = folder / "generation_config.json"
    value = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
    return frozenset([value] if isinstance(value, int) else value or [])
