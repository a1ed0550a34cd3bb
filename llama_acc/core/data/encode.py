"""Items to tokens and labels.

An item is one text, encoded once between BOS and EOS. A token is a label if it shares a character with what is trained.
In LLaMA2-Accessory's single-turn formats the first len(encode(prompt with BOS)) tokens carry no label, as there. (Of a
dialogue it searches for the reply's tokens, which finds the human turn where the reply echoes it.)

What an item says itself is encoded without special tokens; those of the format are the format's alone.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llama_acc.core.data.items import Dialogue, Item, SingleTurn
from llama_acc.core.data.templates import ChatTemplate, PromptFormat, Rendered, Span, Template, Turn, as_dialogue
from llama_acc.core.tokenizer import Spans, Tokenizer

ENCODER_VERSION = 3
"""Part of the cache's key: raise it whenever the same item may give other tokens or labels."""

Images = tuple[str, ...]
"""Where a document's images are, each as a text."""


class Document(NamedTuple):
    """An item in tokens, uncut."""

    tokens: NDArray[np.int32]
    """[N]"""
    labelled: NDArray[np.bool_]
    """[N]: which are trained. Of the first see `Chunk.labelled`."""
    merged: bool = False
    """The prompt's end and the answer's beginning are one token, so it is not the prompt's tokens and then others."""


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
    merged: list[int]
    """Those items whose prompt and answer merge into one token (`Document.merged`)."""


def encode_chunk(
    items: Sequence[tuple[int, Item]],
    template: PromptFormat,
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
    merged = []
    for (index, item), document in zip(items, documents(values, template, tokenizer), strict=True):
        tokens, labelled, is_merged = document
        merged += [index] * is_merged
        if places := image_positions * len(item.images):
            begin = int(template.bos)
            tokens = np.concatenate((tokens[:begin], np.zeros(places, np.int32), tokens[begin:]))
            labelled = np.concatenate((labelled[:begin], np.zeros(places, np.bool_), labelled[begin:]))
        builder.add(index, tokens, labelled, item.images)
    return builder.build(len(items), _unused_inputs(values, template), merged)


def _unused_inputs(items: Sequence[Item], template: PromptFormat) -> int:
    if not isinstance(template, Template) or template.kind == "dialogue" or template.prompt_with_input is not None:
        return 0
    return sum(bool(item.input and item.input.strip()) for item in items if isinstance(item, SingleTurn))


def documents(items: Sequence[Item], template: PromptFormat, tokenizer: Tokenizer) -> Iterator[Document]:
    """Every item in tokens, uncut."""
    if isinstance(template, ChatTemplate):
        rendered = template.dialogue_texts([_turns(item) for item in items], [item.system for item in items])
    else:
        stops = template.text_stops(tokenizer)
        rendered = [render_item(item, template, stops) for item in items]
    label = _labels_by_prefix if template.prefix_labels else _labels_by_overlap
    for item, (ids, trained, merged) in zip(rendered, label(rendered, tokenizer), strict=True):
        framed = [tokenizer.bos_id] * template.bos + ids + [tokenizer.eos_id] * template.eos
        bos, eos = np.zeros(int(template.bos), np.bool_), np.full(int(template.eos), item.eos_trained)
        labelled = np.concatenate((bos, trained, eos))
        yield Document(np.array(framed, np.int32), labelled, merged)


def render_item(item: Item, template: PromptFormat, stops: Sequence[str] | None = None) -> Rendered:
    """An item in a prompt format; of `stops` see `Template.dialogue_text`."""
    if isinstance(template, ChatTemplate):
        return template.dialogue_texts([_turns(item)], [item.system])[0]
    if template.kind == "single_turn" and isinstance(item, SingleTurn):
        return template.single_turn_text(item.instruction, item.input, item.output, item.system)
    return template.dialogue_text(_turns(item), item.system, stops)


def _turns(item: Item) -> list[Turn]:
    return item.turns if isinstance(item, Dialogue) else as_dialogue(*item[:3])


_Labelled = tuple[list[int], NDArray[np.bool_], bool]
"""An item's tokens without BOS and EOS, which of them are trained, and whether prompt and answer merge."""


def _labels_by_prefix(items: Sequence[Rendered], tokenizer: Tokenizer) -> Iterator[_Labelled]:
    begins = [item.trained[0][0] for item in items]
    texts = [item.text for item in items] + [item.text[:begin] for item, begin in zip(items, begins, strict=True)]
    own = [item.own for item in items]
    own += [[span for span in item.own if span[0] < begin] for item, begin in zip(items, begins, strict=True)]
    # Both kinds of text in one batch, to keep all cores busy.
    encoded = tokenizer.encode_batch(texts, own)
    for ids, prompt in zip(encoded[: len(items)], encoded[len(items) :], strict=True):
        yield ids, np.arange(len(ids)) >= len(prompt), ids[: len(prompt)] != prompt


def _labels_by_overlap(items: Sequence[Rendered], tokenizer: Tokenizer) -> Iterator[_Labelled]:
    encoded = tokenizer.encode_batch_with_spans([item.text for item in items], [item.own for item in items])
    for spans, item in zip(encoded, items, strict=True):
        begins = np.array([begin for begin, _ in item.trained], np.int64)
        first = np.searchsorted(spans.ends, begins, side="right")
        merged = bool((np.append(spans.begins, np.iinfo(np.int64).max)[first] < begins).any())
        trained = overlapping(spans, item.trained)
        if item.trained and item.trained[0][0] == 0:
            trained[: first[0]] = True  # the space that SentencePiece puts in front of a text stands for no character
        yield spans.ids, trained, merged


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

    def build(self, items: int, unused_inputs: int, merged: list[int]) -> Chunk:
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
            merged=merged,
        )


def _digest(tokens: NDArray[np.int32], labelled: NDArray[np.bool_], images: Images) -> bytes:
    """8 bytes that tell documents apart: of those that differ, one pair in 2^64 has the same."""
    digest = hashlib.blake2b(tokens.tobytes(), digest_size=8)
    digest.update(np.packbits(labelled).tobytes())
    if images:
        digest.update("\0".join(("", *images)).encode("utf-8", "surrogatepass"))
    return digest.digest()
