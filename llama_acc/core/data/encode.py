"""Items to tokens and labels.

Single-turn: encode(prompt + output) between BOS and EOS; the first len(encode(prompt with BOS)) tokens carry no label.
Dialogue: one text, encoded once; a token is labelled if its characters overlap a trained span. (LLaMA2-Accessory
searches for the reply's tokens instead, which finds the human turn where the reply echoes it.)
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llama_acc.core.data.items import Dialogue, Item, SingleTurn
from llama_acc.core.data.templates import Span, Template
from llama_acc.core.tokenizer import Spans, Tokenizer

ENCODER_VERSION = 2
"""Part of the cache's key: raise it whenever the same item may give other tokens or labels."""

Images = tuple[str, ...]
"""Where a document's images are, each as a text."""

_Document = tuple[NDArray[np.int32], NDArray[np.bool_]]


class Chunk(NamedTuple):
    """What some items became: D documents, end to end. An item is kept whole, cut, or dropped for want of a label."""

    tokens: NDArray[np.int32]
    """[N]"""
    labelled: NDArray[np.bool_]
    """[N]: the token is a target. The first of a document never is, as nothing predicts it."""
    lengths: NDArray[np.int32]
    """[D]"""
    label_counts: NDArray[np.int32]
    """[D]"""
    item: NDArray[np.int32]
    """[D]: which item of the file it was, from 0."""
    cut: NDArray[np.bool_]
    """[D]: it was longer than max_tokens."""
    digests: NDArray[np.uint64]
    """[D]: 64 bits of a hash of everything above but `item` and `cut`, and of the images."""
    images: list[Images]
    """[D]"""
    items: int
    """How many items it was made of."""
    unused_inputs: int
    """Items with an input that the template does not show."""


def encode_chunk(
    items: Sequence[tuple[int, Item]],
    template: Template,
    tokenizer: Tokenizer,
    max_tokens: int,
    image_positions: int = 0,
) -> Chunk:
    """Encode some items, all of one kind that the template takes.

    Images stand right behind BOS, all of an item's in their order; what is kept as tokens there does not matter.

    Args:
        items: (which item of its file it is, from 0; the item itself).
        template: the prompt format.
        tokenizer: encodes them as one batch.
        max_tokens: only so many first tokens of a document are kept.
        image_positions: how many places an image takes.
    """
    builder = _Builder(max_tokens)
    values = [item for _, item in items]
    for (index, item), (tokens, labelled) in zip(items, documents(values, template, tokenizer), strict=True):
        if places := image_positions * len(item.images):
            begin = int(template.bos)
            tokens = np.concatenate((tokens[:begin], np.zeros(places, np.int32), tokens[begin:]))
            labelled = np.concatenate((labelled[:begin], np.zeros(places, np.bool_), labelled[begin:]))
        builder.add(index, tokens, labelled, item.images)
    return builder.build(len(items), _unused_inputs(values, template))


def _unused_inputs(items: Sequence[Item], template: Template) -> int:
    if template.kind == "dialogue" or template.prompt_with_input is not None:
        return 0
    return sum(bool(item.input and item.input.strip()) for item in items if isinstance(item, SingleTurn))


def documents(items: Sequence[Item], template: Template, tokenizer: Tokenizer) -> Iterator[_Document]:
    """(tokens, which of them are trained) of every item, uncut. Of the first token see `Chunk.labelled`."""
    if template.kind == "single_turn":
        return _single_turn_documents(items, template, tokenizer)
    return _dialogue_documents(items, template, tokenizer)


def _single_turn_documents(items: Sequence[Item], template: Template, tokenizer: Tokenizer) -> Iterator[_Document]:
    singles = [item for item in items if not isinstance(item, Dialogue)]
    prompts = [template.single_turn_prompt(item.instruction, item.input, item.system) for item in singles]
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
    texts = [template.dialogue_text(turns, item.system) for turns, item in zip(dialogues, items, strict=True)]
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
        self._images: list[Images] = []

    def add(self, item: int, tokens: NDArray[np.int32], labelled: NDArray[np.bool_], images: Images) -> None:
        labelled = labelled[: self._max_tokens]
        labelled[:1] = False
        if not labelled.any():
            return
        self._tokens.append(tokens[: self._max_tokens])
        self._labelled.append(labelled)
        self._item.append(item)
        self._cut.append(len(tokens) > self._max_tokens)
        self._images.append(images)

    def build(self, items: int, unused_inputs: int) -> Chunk:
        documents = zip(self._tokens, self._labelled, self._images, strict=True)
        return Chunk(
            tokens=np.concatenate([np.zeros(0, np.int32), *self._tokens]),
            labelled=np.concatenate([np.zeros(0, np.bool_), *self._labelled]),
            lengths=np.array([len(tokens) for tokens in self._tokens], dtype=np.int32),
            label_counts=np.array([labelled.sum() for labelled in self._labelled], dtype=np.int32),
            item=np.array(self._item, dtype=np.int32),
            cut=np.array(self._cut, dtype=np.bool_),
            digests=np.frombuffer(b"".join(_digest(*document) for document in documents), dtype="<u8"),
            images=self._images,
            items=items,
            unused_inputs=unused_inputs,
        )


def _digest(tokens: NDArray[np.int32], labelled: NDArray[np.bool_], images: Images) -> bytes:
    """8 bytes that tell documents apart: of those that differ, one pair in 2^64 has the same."""
    digest = hashlib.blake2b(tokens.tobytes(), digest_size=8)
    digest.update(np.packbits(labelled).tobytes())
    if images:
        digest.update("\0".join(("", *images)).encode("utf-8", "surrogatepass"))
    return digest.digest()
