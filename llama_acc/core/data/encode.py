"""Items to tokens and labels.

Single-turn: encode(prompt + output) between BOS and EOS; the first len(encode(prompt with BOS)) tokens carry no label.
Dialogue: one text, encoded once; a token is labelled if its characters overlap a trained span. (LLaMA2-Accessory
searches for the reply's tokens instead, which finds the human turn where the reply echoes it.)
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llama_acc.core.data.items import Dialogue, Item, SingleTurn
from llama_acc.core.data.templates import Span, Template
from llama_acc.core.errors import UserError
from llama_acc.core.tokenizer import Spans, Tokenizer

ENCODER_VERSION = 1
"""Part of the cache's key: raise it whenever the same item may give other tokens or labels."""

_CHUNK = 1000

_logger = logging.getLogger("llama_acc")

Progress = Callable[[int, int], None]
"""Called with (items done, items in all)."""

_Document = tuple[NDArray[np.int32], NDArray[np.bool_]]


@dataclass(frozen=True)
class Encoded:
    """The documents of one file, end to end. Every item is kept whole, cut (`cut`), or dropped for want of a label."""

    tokens: NDArray[np.int32]
    """[N]"""
    labelled: NDArray[np.bool_]
    """[N]: the token is a target. The first of a document never is, as nothing predicts it."""
    offsets: NDArray[np.int64]
    """[D + 1]: document i is tokens[offsets[i] : offsets[i + 1]]."""
    item: NDArray[np.int32]
    """[D]: which item of the file it was, from 0."""
    cut: NDArray[np.bool_]
    """[D]: it was longer than max_tokens."""
    items: int
    """How many items the file has."""
    kind: str
    """"single_turn" or "dialogue"."""

    @property
    def truncated(self) -> int:
        """Documents that were cut."""
        return int(self.cut.sum())

    @property
    def dropped(self) -> int:
        """Items that were left without any label, and so without a document."""
        return self.items - len(self.item)


def encode_items(
    items: Sequence[Item], template: Template, tokenizer: Tokenizer, max_tokens: int, progress: Progress | None = None
) -> Encoded:
    """Encode items of one kind.

    Args:
        items: single-turn items, or dialogues. A dialogue format takes single-turn items too, as one exchange.
        template: the prompt format.
        tokenizer: encodes on all cores.
        max_tokens: only so many first tokens of a document are kept.
        progress: told after every thousand items.

    Raises:
        UserError: a single-turn format was asked to write dialogues.
    """
    kind = "dialogue" if items and isinstance(items[0], Dialogue) else "single_turn"
    if kind == "dialogue" and template.kind == "single_turn":
        raise UserError(
            f"template {template.name!r} is for single-turn items, but these are dialogues", "use template: dialogue"
        )
    _warn_of_unused_inputs(items, template)
    builder = _Builder(max_tokens)
    for start in range(0, len(items), _CHUNK):
        for document in documents(items[start : start + _CHUNK], template, tokenizer):
            builder.add(*document)
        if progress is not None:
            progress(min(start + _CHUNK, len(items)), len(items))
    return builder.build(kind)


def _warn_of_unused_inputs(items: Sequence[Item], template: Template) -> None:
    if template.kind == "dialogue" or template.prompt_with_input is not None:
        return
    unused = sum(bool(item.input and item.input.strip()) for item in items if isinstance(item, SingleTurn))
    if unused:
        _logger.warning("%d items have an input, which template %r does not show", unused, template.name)


def documents(items: Sequence[Item], template: Template, tokenizer: Tokenizer) -> Iterator[_Document]:
    """(tokens, which of them are trained) of every item, uncut. Of the first token see `Encoded.labelled`."""
    if template.kind == "single_turn":
        return _single_turn_documents(items, template, tokenizer)
    return _dialogue_documents(items, template, tokenizer)


def _single_turn_documents(items: Sequence[Item], template: Template, tokenizer: Tokenizer) -> Iterator[_Document]:
    singles = [item for item in items if not isinstance(item, Dialogue)]
    prompts = [template.single_turn_prompt(item.instruction, item.input) for item in singles]
    outputs = [template.clean(item.output) for item in singles]
    # Both kinds of text in one batch, to keep all cores busy.
    encoded = tokenizer.encode_batch(prompts + [p + o for p, o in zip(prompts, outputs, strict=True)])
    for prompt_ids, ids in zip(encoded[: len(prompts)], encoded[len(prompts) :], strict=True):
        tokens = _framed(ids, template, tokenizer)
        labelled = np.ones(len(tokens), dtype=np.bool_)
        labelled[: template.bos + len(prompt_ids)] = False
        if template.eos and not template.eos_trained:
            labelled[-1] = False
        yield tokens, labelled


def _dialogue_documents(items: Sequence[Item], template: Template, tokenizer: Tokenizer) -> Iterator[_Document]:
    dialogues = [item.turns if isinstance(item, Dialogue) else template.as_dialogue(*item[:3]) for item in items]
    texts = [template.dialogue_text(turns) for turns in dialogues]
    encoded = tokenizer.encode_batch_with_spans([text for text, _ in texts])
    for spans, (_, trained) in zip(encoded, texts, strict=True):
        overlap = overlapping(spans, trained)
        bos, eos = [False] * template.bos, [template.eos_trained] * template.eos
        yield _framed(spans.ids, template, tokenizer), np.concatenate([bos, overlap, eos]).astype(np.bool_)


def _framed(ids: list[int], template: Template, tokenizer: Tokenizer) -> NDArray[np.int32]:
    framed = [tokenizer.bos_id] * template.bos + ids + [tokenizer.eos_id] * template.eos
    return np.array(framed, dtype=np.int32)


def overlapping(tokens: Spans, trained: Sequence[Span]) -> NDArray[np.bool_]:
    """Which tokens share a character with one of `trained`, spans in ascending order that do not overlap. [T]"""
    if not trained:
        return np.zeros(len(tokens.ids), dtype=np.bool_)
    begins, ends = np.array(trained, dtype=np.int64).T
    # The only span that can matter to a token is the first that ends behind the token's beginning.
    first = np.searchsorted(ends, tokens.begins, side="right")
    starts = np.append(begins, np.iinfo(np.int64).max)[first]
    overlap: NDArray[np.bool_] = (starts < tokens.ends) & (tokens.begins < tokens.ends)
    return overlap


class _Builder:
    """Collects documents; cuts the long ones and drops those without a label."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._tokens: list[NDArray[np.int32]] = []
        self._labelled: list[NDArray[np.bool_]] = []
        self._item: list[int] = []
        self._cut: list[bool] = []
        self._items = 0

    def add(self, tokens: NDArray[np.int32], labelled: NDArray[np.bool_]) -> None:
        labelled = labelled[: self._max_tokens]
        labelled[:1] = False
        if labelled.any():
            self._tokens.append(tokens[: self._max_tokens])
            self._labelled.append(labelled)
            self._item.append(self._items)
            self._cut.append(len(tokens) > self._max_tokens)
        self._items += 1

    def build(self, kind: str) -> Encoded:
        lengths = [len(tokens) for tokens in self._tokens]
        return Encoded(
            tokens=np.concatenate([np.zeros(0, np.int32), *self._tokens]),
            labelled=np.concatenate([np.zeros(0, np.bool_), *self._labelled]),
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            item=np.array(self._item, dtype=np.int32),
            cut=np.array(self._cut, dtype=np.bool_),
            items=self._items,
            kind=kind,
        )
