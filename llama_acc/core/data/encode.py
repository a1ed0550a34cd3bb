"""Items to tokens and labels.

An item is one text, encoded once between BOS and EOS. A token is a label if it shares a character with what is trained.
In LLaMA2-Accessory's single-turn formats the first len(encode(prompt with BOS)) tokens carry no label, as there. (Of a
dialogue it searches for the reply's tokens, which finds the human turn where the reply echoes it.)

What an item says itself is encoded without special tokens; those of the format are the format's alone.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

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
    labeled: NDArray[np.bool_]
    """[N]: which are labels; the first can be no target, see `stored_tokens`."""
    merged: bool = False
    """The prompt's end and the answer's beginning are one token, so it is not the prompt's tokens and then others."""


DOCUMENT = np.dtype(
    [
        ("begin", np.int64),  # its first byte
        ("size", np.int32),  # bytes
        ("length", np.int32),  # tokens
        ("label_count", np.int32),
        ("item", np.int32),  # which item of the file it was, from 0
        ("images", np.int32),  # how many
        ("cut", np.bool_),  # it was longer than max_tokens
        ("digest", np.uint64),  # equal for equal documents, as far as 64 bits can tell; `item` and `cut` do not matter
    ],
    align=True,
)
"""What is known of a document. Its bytes are its tokens (see `token_type`), the labels of eight tokens to a byte, the
first one in its highest bit, and where its images are, in UTF-8, a NUL between them."""


class Chunk(NamedTuple):
    """What some items became: D documents, end to end. An item is kept whole, cut, or dropped for want of a label."""

    table: NDArray[np.void]
    """[D] of `DOCUMENT`"""
    content: bytes
    """Of all documents."""
    items: int
    """How many items it was made of."""
    unused_inputs: int
    """Items with an input that the template does not show."""
    merged: list[int]
    """Those items whose prompt and answer merge into one token (`Document.merged`)."""


def token_type(vocab_size: int) -> "np.dtype[Any]":
    """How a document's tokens are stored."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)


def stored_tokens(row: np.void, content: Any, dtype: "np.dtype[Any]") -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """A stored document's tokens, and which of them are targets. The first never is, as nothing predicts it. [N], [N]

    Args:
        row: of its table.
        content: the bytes of all documents.
        dtype: of the tokens.
    """
    length, begin = int(row["length"]), int(row["begin"])
    tokens = np.frombuffer(content, dtype, length, begin).astype(np.int32)
    bits = np.frombuffer(content, np.uint8, -(-length // 8), begin + length * dtype.itemsize)
    return tokens, np.unpackbits(bits, count=length).astype(np.bool_)


def stored_images(row: np.void, content: Any, dtype: "np.dtype[Any]") -> Images:
    """Where a stored document's images are; see `stored_tokens`."""
    if not row["images"]:
        return ()
    length, begin = int(row["length"]), int(row["begin"])
    names = bytes(content[begin + length * dtype.itemsize - (-length // 8) : begin + int(row["size"])])
    return tuple(names.decode().split("\0"))


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
    values, dtype = [item for _, item in items], token_type(tokenizer.vocab_size)
    rows: list[tuple[Any, ...]] = []
    pieces: list[bytes] = []
    merged: list[int] = []
    begin = 0
    for (index, item), (tokens, labeled, is_merged) in zip(items, documents(values, template, tokenizer), strict=True):
        merged += [index] * is_merged
        if places := image_positions * len(item.images):
            tokens = np.insert(tokens, int(template.bos), np.zeros(places, np.int32))
            labeled = np.insert(labeled, int(template.bos), np.zeros(places, np.bool_))
        cut = len(tokens) > max_tokens
        tokens, labeled = tokens[:max_tokens], labeled[:max_tokens]
        labeled[:1] = False
        if not labeled.any():
            continue
        bits, names = np.packbits(labeled).tobytes(), "\0".join(item.images).encode()
        digest = hashlib.blake2b(tokens.tobytes() + bits + b"\0" * bool(names) + names, digest_size=8)
        content = tokens.astype(dtype).tobytes() + bits + names
        number = int.from_bytes(digest.digest(), "little")
        counts = (len(content), len(tokens), labeled.sum(), index, len(item.images))
        rows.append((begin, *counts, cut, number))
        pieces.append(content)
        begin += len(content)
    table = np.array(rows, DOCUMENT)
    return Chunk(table, b"".join(pieces), len(items), _unused_inputs(values, template), merged)


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
        labeled = np.zeros(len(framed), np.bool_)
        labeled[template.bos : template.bos + len(ids)] = trained
        labeled[template.bos + len(ids) :] = item.eos_trained
        yield Document(np.array(framed, np.int32), labeled, merged)


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
    encoded = tokenizer.encode_batch([item.text for item in items], [item.own for item in items])
    counts = [
        tokenizer.prefix_length(ids, item.text, begin) for ids, item, begin in zip(encoded, items, begins, strict=True)
    ]
    others = [(item, begin) for item, begin, count in zip(items, begins, counts, strict=True) if count is None]
    prompts = iter(
        tokenizer.encode_batch(
            [item.text[:begin] for item, begin in others],
            [[span for span in item.own if span[0] < begin] for item, begin in others],
        )
    )
    for ids, count in zip(encoded, counts, strict=True):
        prompt = next(prompts) if count is None else ids[:count]
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
