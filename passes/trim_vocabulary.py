"""Keep the rows of the input embedding and the output projection that the tokens in use have; the tokenizer stays.

A row is `hidden` numbers, once or, where embedding and projection are not tied, twice; a small language model has a
third of its weights there. Which rows stay is not ranked: what the special tokens, the chat template, the questions,
the answers and a corpus use stays, and the lowest ids fill up to `size` (in a vocabulary made by merging pairs or by
SentencePiece they are the most frequent ones). What the model computes for kept tokens does not change.

Source: Load What You Need, arXiv:2010.05609 (rows by use), and Vocabulary Trimming, arXiv:2305.15020 (before tuning
or after). We differ: the tokenizer is untouched and so are ids and the width of the logits; a map lies in the graph.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from ..errors import PassError, nearest
from ..surgery.anatomy import Anatomy
from ..surgery.vocabulary import take_vocabulary
from ..vocabulary import Vocabulary, write_runs
from .base import Pass
from .calibration import Calibration

UNSEEN = ("error", "unknown")


@dataclass(frozen=True, kw_only=True)
class TrimVocabulary(Pass):
    """Keep `size` rows of the vocabulary: those of tokens in use, then those of the lowest ids."""

    name: ClassVar[str] = "trim-vocabulary"
    summary: ClassVar[str] = "keep the embedding and output rows of the tokens in use"
    source: ClassVar[str] = "Load What You Need, arXiv:2010.05609; Vocabulary Trimming, arXiv:2305.15020"

    size: int  # rows that stay
    corpus: str | None = None  # a text file whose tokens stay
    tokens: str | None = None  # the ids that stay, as runs "0-511,600"; found when absent
    unseen: str = "error"  # what a prompt's token without a row is: error (refused) or unknown (read as `unknown`)
    unknown: int | None = None  # a kept id; the tokenizer's own unknown token when absent

    def plan(self, a: Anatomy) -> Anatomy:
        all_ = a.language.vocabulary
        if a.layout.vocabulary is not None:
            raise PassError(
                f"{self.name}: the vocabulary has {all_} of {a.layout.vocabulary.size} rows already",
                hint="name the pass once, with the smaller size",
            )
        if a.language.whole is not None:
            raise PassError(f"{self.name}: no row of the vocabulary of `{a.family}` can go: {a.language.whole}")
        if "language" in a.quantized:  # its scales, one per row, would not follow
            raise PassError(f"{self.name}: language is int8 already", hint="put quantize last")
        if not 2 <= self.size <= all_:
            raise PassError(
                f"{self.name}: size={self.size}, but `{a.family}` has {all_} tokens", hint=f"choose 2 to {all_}"
            )
        if self.unseen not in UNSEEN:
            raise PassError(f"{self.name}: no policy unseen={self.unseen!r}", hint=nearest(self.unseen, UNSEEN))
        if self.unknown is not None and self.unseen != "unknown":
            raise PassError(
                f"{self.name}: unknown={self.unknown} with unseen={self.unseen!r}", hint='set unseen = "unknown"'
            )
        if self.unknown is not None and not 0 <= self.unknown < all_:
            raise PassError(
                f"{self.name}: unknown={self.unknown}, but `{a.family}` has {all_} tokens",
                hint=f"choose 0 to {all_ - 1}",
            )
        after = replace(a.language, vocabulary=self.size)
        if self.tokens is None:
            if self.corpus is not None and not Path(self.corpus).is_file():
                raise PassError(f"{self.name}: no corpus `{self.corpus}`", hint="name a text file in UTF-8")
            return replace(a, language=after)
        return replace(a, language=after, layout=replace(a.layout, vocabulary=self._vocabulary(all_)))

    def _vocabulary(self, all_: int) -> Vocabulary:
        """What `tokens` say, checked."""
        assert self.tokens is not None
        found = Vocabulary(size=all_, kept=self.tokens, unknown=self.unknown)
        try:
            ids = found.ids
        except ValueError as error:
            raise PassError(f"{self.name}: tokens: {error}", hint="leave `tokens` out to have them found") from error
        if len(ids) != self.size:
            raise PassError(
                f"{self.name}: tokens lists {len(ids)} ids, size={self.size}",
                hint=f"set size = {len(ids)}, or leave `tokens` out to have them found",
            )
        if ids[0] != 0:
            raise PassError(
                f"{self.name}: tokens begins with {ids[0]}: id 0 fills the columns of a prompt that nobody reads",
                hint="add 0",
            )
        return found

    def notes(self, a: Anatomy) -> list[str]:
        found = ["vocabulary: rows were cut, which only vlmcut.load reads back"]
        if self.unseen == "error":
            found.append("vocabulary: a prompt with a token that has no row will be refused")
        return found

    @property
    def needs_calibration(self) -> bool:
        return self.tokens is None or (self.unseen == "unknown" and self.unknown is None)

    def resolve(self, model: Any, a: Anatomy, calibration: Calibration) -> Self:
        step, all_ = self, a.language.vocabulary
        if step.unseen == "unknown" and step.unknown is None:
            own = calibration.tokenizer.unk_token_id
            if own is None:
                raise PassError(
                    f'{self.name}: unseen = "unknown", but the tokenizer has no unknown token',
                    hint="name one: unknown = ID",
                )
            step = replace(step, unknown=own)
        if step.tokens is not None:
            return step
        texts = [*calibration.texts, *self._lines()]
        used = {0, a.layout.image_token_id, *named(model), *special(calibration.tokenizer), *_ids(calibration, texts)}
        used |= set() if step.unknown is None else {step.unknown}
        kept = used & set(range(all_))  # an image token may have no row, a default of a config no token
        if len(kept) > self.size:
            raise PassError(
                f"{self.name}: size={self.size}, but special tokens, the chat template and the texts use {len(kept)} "
                f"of {all_} tokens",
                hint=f"choose {len(kept)} to {all_}, or a shorter corpus",
            )
        rest = (i for i in range(all_) if i not in kept)
        kept |= {next(rest) for _ in range(self.size - len(kept))}
        return replace(step, tokens=write_runs(sorted(kept)))

    def _lines(self) -> list[str]:
        if self.corpus is None:
            return []
        try:
            return Path(self.corpus).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise PassError(f"{self.name}: `{self.corpus}` is not UTF-8: {error}", hint="save it as UTF-8") from error

    def apply(self, model: Any, a: Anatomy) -> None:
        vocabulary = self._vocabulary(a.language.vocabulary)
        lost = sorted(named(model) & set(range(vocabulary.size)) - set(vocabulary.ids.tolist()))
        if lost:
            raise PassError(
                f"{self.name}: tokens leaves out id {lost[0]}, which begins, ends or pads an answer", hint="add it"
            )
        take_vocabulary(model, vocabulary)


def named(model: Any) -> set[int]:
    """The ids that a model's configs name to begin, end and pad a text."""
    found: set[int] = set()
    for config in (model.generation_config, model.config, model.config.get_text_config()):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(config, name, None)
            found |= {value} if isinstance(value, int) else set(value or ())
    return found


def special(tokenizer: Any) -> set[int]:
    """The ids that a tokenizer does not make of text: special and added ones."""
    return {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}


def _ids(calibration: Calibration, texts: Iterable[str]) -> set[int]:
    """The ids of the prompts, with their template, and of texts as they stand and as they go on after a space."""
    found = {int(i) for prompt in calibration.prompts for i in prompt.input_ids[0]}
    for text in texts:
        for form in (text, f" {text}"):
            found |= set(calibration.tokenizer(form, add_special_tokens=False)["input_ids"])
    return found
