"""Items to tokens and labels; of a large file in worker processes.

An item is one text, encoded once between BOS and EOS. A token is a label if it shares a character with what is trained.
In LLaMA2-Accessory's single-turn formats the first len(encode(prompt with BOS)) tokens carry no label, as there. (Of a
dialogue it searches for the reply's tokens, which finds the human turn where the reply echoes it.)

What an item says itself is encoded without special tokens; those of the format are the format's alone.
"""

import gc
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from llama_acc.core.data.chat_template import ChatTemplate, Talk
from llama_acc.core.data.checks import DatasetStats, merged_finding
from llama_acc.core.data.findings import Finding
from llama_acc.core.data.items import Checked, Dialogue, Item, SingleTurn
from llama_acc.core.data.plain_text import Text, text_tokens
from llama_acc.core.data.templates import Rendered, Span, Template, Turn, as_dialogue
from llama_acc.core.tokenizer import Spans, Tokenizer, load_tokenizer
from llama_acc.core.workers import WorkerPool

ENCODER_VERSION = 6
"""Part of the cache's key: raise it whenever the same item may give other tokens or labels."""
KEPT_PLACES = 20
"""Of what is found in a file, for each kind."""
_MOST_WORKERS = 32

Batch = Sequence[tuple[int, Checked]]
"""Rows of a file and their numbers from 0: items, and what is none."""

DOCUMENT = np.dtype(
    [
        ("begin", np.int64),  # its first byte
        ("size", np.int32),  # bytes
        ("length", np.int32),  # tokens
        ("label_count", np.int32),
        ("item", np.int32),  # which item of the file it was, from 0
        ("images", np.uint16),  # how many
        ("cut", np.bool_),  # it was longer than max_tokens
        ("weighted", np.bool_),  # not all labels count in full
        ("label_weight", np.float32),  # what they count together
        ("digest", np.uint64),  # equal for equal documents, as far as 64 bits can tell; `item` and `cut` do not matter
    ],
    align=True,
)
"""What is known of a document. Its bytes are its tokens (of 2 bytes if the vocabulary allows, else 4), the labels of
eight tokens to a byte, the first one in its highest bit, if it is weighted a float32 for each label, and where its
images are, in UTF-8, a NUL between them."""
Labels = NDArray[np.bool_] | NDArray[np.float32]
"""[N]: which tokens are targets; or how much each counts in the loss, from 0 to 1, where that is not all or nothing."""


class Document(NamedTuple):
    """An item in tokens, uncut."""

    tokens: NDArray[np.int32]  # [N]; what is at the images' places does not matter
    labeled: Labels  # [N]. The first is no target, as nothing predicts it.
    merged: bool = False
    """The prompt's end and the answer's beginning are one token, so it is not the prompt's tokens and then others."""


class Encoding(NamedTuple):
    """What is made of items."""

    template: Template
    max_tokens: int  # only so many first tokens of a document are kept
    image_positions: int = 0  # how many places an image takes, right behind BOS


class Chunk(NamedTuple):
    """What some rows became: D documents, end to end. An item is kept whole, cut, or dropped for want of a label."""

    table: NDArray[np.void]  # [D] of `DOCUMENT`
    content: bytes  # of all documents
    stats: DatasetStats  # what was found in the rows
    skipped: list[Finding]  # what is wrong with rows that cannot be trained on
    unused_inputs: int  # items with an input that the template does not show


def stored_tokens(row: np.void, content: Any, vocab_size: int) -> tuple[NDArray[np.int32], Labels]:
    """A stored document's tokens, and which of them are targets. The first never is, as nothing predicts it. [N], [N]

    `row` is of its table, and `content` the bytes of all documents.
    """
    length, begin, dtype = int(row["length"]), int(row["begin"]), _token_type(vocab_size)
    tokens = np.frombuffer(content, dtype, length, begin).astype(np.int32)
    bits = np.frombuffer(content, np.uint8, -(-length // 8), begin + length * dtype.itemsize)
    labeled: Labels = np.unpackbits(bits, count=length).astype(np.bool_)
    if row["weighted"]:
        place = begin + length * dtype.itemsize + len(bits)
        weights = np.frombuffer(content[place : place + 4 * int(row["label_count"])], np.float32)
        labeled = labeled.astype(np.float32)
        labeled[labeled > 0] = weights
    return tokens, labeled


def stored_images(row: np.void, content: Any, vocab_size: int) -> tuple[str, ...]:
    """Where a stored document's images are; see `stored_tokens`."""
    length, begin = int(row["length"]), int(row["begin"])
    names = begin + length * _token_type(vocab_size).itemsize + -(-length // 8)
    names += 4 * int(row["label_count"]) * int(row["weighted"])
    return tuple(bytes(content[names : begin + int(row["size"])]).decode().split("\0")) if row["images"] else ()


def _token_type(vocab_size: int) -> "np.dtype[Any]":
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)


def encode_batches(batches: Iterable[Batch], encoding: Encoding, tokenizer: Tokenizer, workers: int) -> Iterator[Chunk]:
    """Encode batches of rows, in their order.

    With fewer than two workers, all is done here. Threads would share one interpreter lock, which a third of the work
    holds. Every worker is kept busy, with two batches for each in memory, which are read as they are needed.

    Raises:
        RunError: a worker was killed.
    """
    count = min(workers, _MOST_WORKERS)
    if count < 2:
        yield from (encode_batch(batch, encoding, tokenizer) for batch in batches)
        return
    encode = partial(_encode_in_worker, encoding=encoding, tokenizer=tokenizer.path)
    with WorkerPool(count, "encodes data", "the machine may be short of memory") as pool:
        for chunks in pool.map_ahead(encode, ([batch] for batch in batches), 2 * count - 1):
            yield from chunks


def _encode_in_worker(batch: Batch, encoding: Encoding, tokenizer: Path) -> Chunk:
    return encode_batch(batch, encoding, tokenizer_of_worker(tokenizer))


@cache
def tokenizer_of_worker(path: Path) -> Tokenizer:
    """In a worker process: the tokenizer, with one thread."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # this process is one of many
    gc.freeze()  # what was imported stays: to look through it again and again takes a tenth of the time
    return load_tokenizer(path, threads=1)


def encode_batch(batch: Batch, encoding: Encoding, tokenizer: Tokenizer) -> Chunk:
    """Encode the items of a batch, and look at all of its rows."""
    template, max_tokens, image_positions = encoding
    stops, marks, stats = template.text_stops(tokenizer), template.marks(tokenizer), DatasetStats(KEPT_PLACES)
    dtype, skipped = _token_type(tokenizer.vocab_size), list[Finding]()
    table, pieces, begin = [], [], 0
    encoded = encode_rows([row for _, row in batch], template, tokenizer, image_positions)
    if any(isinstance(row.item, Text) for _, row in batch):
        encoded = _packed(list(encoded), max_tokens)
    for (index, _), (row, found) in zip(batch, encoded, strict=True):
        stats.add(row, stops, marks)
        skipped += [problem for problem in row.problems if problem.fatal]
        for tokens, labeled, merged in found:
            item = cast(Item, row.item)
            if merged:
                stats.findings.add(merged_finding(item, row.where, template))
            cut = len(tokens) > max_tokens
            tokens, labeled = tokens[:max_tokens], labeled[:max_tokens]
            if not labeled.any():
                continue
            counted = labeled[labeled > 0]
            weighted = bool((counted != 1).any())
            bits = np.packbits(labeled > 0).tobytes() + (counted.tobytes() if weighted else b"")
            names = "\0".join(item.images).encode()
            digest = hashlib.blake2b(tokens.tobytes() + bits + b"\0" * bool(names) + names, digest_size=8).digest()
            pieces.append(tokens.astype(dtype).tobytes() + bits + names)
            counts = (len(tokens), len(counted), index, len(item.images), cut, weighted, counted.sum(dtype=np.float64))
            table.append((begin, len(pieces[-1]), *counts, int.from_bytes(digest, "little")))
            begin += len(pieces[-1])
    hidden = template.kind == "single_turn" and template.prompt_with_input is None
    inputs = [row.item.input for _, row in batch if hidden and isinstance(row.item, SingleTurn)]
    unused = sum(bool(context and context.strip()) for context in inputs)
    return Chunk(np.array(table, DOCUMENT), b"".join(pieces), stats, skipped, unused)


def encode_rows(
    rows: Sequence[Checked], template: Template, tokenizer: Tokenizer | None, image_positions: int = 0
) -> Iterator[tuple[Checked, list[Document]]]:
    """Rows with the documents of their items (see `documents`; without a tokenizer: none); instead of an item that the
    format cannot write, a row says so."""
    items = [row.item for row in rows if row.item is not None]
    encoded: Iterator[list[Document] | str] = (refusal(item, template) or [] for item in items)
    if tokenizer is not None:
        encoded = documents(items, template, tokenizer, image_positions)
    for row in rows:
        found = [] if row.item is None else next(encoded)
        if isinstance(found, str):
            yield row._replace(item=None, problems=[*row.problems, Finding("template", row.where, "", found)]), []
            continue
        if tokenizer and isinstance(row.item, Text) and (special := tokenizer.find_special(row.item.text)):
            message = f"{special!r} is text here, and no special token: a dialogue is to be given as messages"
            row = row._replace(problems=[*row.problems, Finding("special_text", row.where, "text", message)])
        yield row, found


def _packed(
    encoded: Sequence[tuple[Checked, list[Document]]], max_tokens: int
) -> Iterator[tuple[Checked, list[Document]]]:
    """For each row the pieces that are full with its document: of documents end to end, so many tokens each."""
    tokens, labeled = np.zeros(0, np.int32), np.zeros(0, np.bool_)
    last = max((number for number, (_, documents) in enumerate(encoded) if documents), default=-1)
    for number, (row, documents) in enumerate(encoded):
        tokens = np.concatenate([tokens, *(document.tokens for document in documents)])
        labeled = np.concatenate([labeled, *(document.labeled for document in documents)])
        pieces = []
        # A piece of one token would have none to learn.
        while len(tokens) > max_tokens + 1 or (number == last and len(tokens)):
            size = max_tokens - (len(tokens) == max_tokens + 1)
            pieces.append(Document(tokens[:size], np.append(False, labeled[1:size])))
            tokens, labeled = tokens[size:], labeled[size:]
        yield row, pieces


def documents(
    items: Sequence[Item], template: Template, tokenizer: Tokenizer, image_positions: int = 0
) -> Iterator[list[Document] | str]:
    """Every item in tokens, uncut; each of its images takes so many positions right behind BOS.

    It is one document, but of some chat templates one for each reply (`ChatTemplate.dialogue_texts`). A text says why
    the format cannot write it.
    """
    plain = [item for item in items if isinstance(item, Text)]
    if plain:  # a file's items are of one kind
        for part, ids in zip(plain, text_tokens(plain, tokenizer), strict=True):
            framed = [tokenizer.bos_id] * (template.bos and part.begins) + ids + [tokenizer.eos_id] * part.ends
            yield [Document(np.array(framed, np.int32), np.arange(len(framed)) >= part.begins)]
        return
    rendered: list[list[Rendered] | str]
    if isinstance(template, ChatTemplate):
        tools = [item.tools if isinstance(item, Dialogue) else () for item in items]
        rendered = template.dialogue_texts(
            [Talk(_turns(item), item.system, own) for item, own in zip(items, tools, strict=True)]
        )
    else:
        stops = template.text_stops(tokenizer)
        rendered = [refusal(item, template) or [render_item(item, template, stops)] for item in items]
    label = _labels_by_prefix if template.prefix_labels else _labels_by_overlap
    labeled_texts = label([text for texts in rendered if not isinstance(texts, str) for text in texts], tokenizer)

    def document(item: Item, text: Rendered) -> Document:
        ids, trained, merged = next(labeled_texts)
        head = [tokenizer.bos_id] * template.bos + [0] * (image_positions * len(item.images))
        framed = head + ids + [tokenizer.eos_id] * template.eos
        labeled: NDArray[Any] = np.zeros(len(framed), trained.dtype)
        labeled[len(head) : len(head) + len(ids)] = trained
        labeled[len(head) + len(ids) :] = text.eos_trained * (text.weights[-1] if text.weights else 1)
        labeled[:1] = False
        return Document(np.array(framed, np.int32), labeled, merged)

    for item, texts in zip(items, rendered, strict=True):
        yield texts if isinstance(texts, str) else [document(item, text) for text in texts]


def refusal(item: Item, template: Template) -> str | None:
    """Why a format cannot write an item, as far as that is known without trying it."""
    if isinstance(item, Dialogue) and item.uses_tools and not isinstance(template, ChatTemplate):
        return f"template {template.name!r} has no form for tools and their calls; chat templates may have one"
    return None


def render_item(item: Item, template: Template, stops: Sequence[str] | None = None) -> Rendered:
    """An item in a prompt format, with all of its turns; of `stops` see `Template.dialogue_text`."""
    if isinstance(item, Text):
        return Rendered(item.text, [(0, len(item.text))], [(0, len(item.text))], True)
    if template.kind == "single_turn" and isinstance(item, SingleTurn):
        return template.single_turn_text(item.instruction, item.input, item.output, item.system)
    return template.dialogue_text(_turns(item), item.system, stops)


def _turns(item: Item) -> list[Turn]:
    assert not isinstance(item, Text)
    return item.turns if isinstance(item, Dialogue) else as_dialogue(*item[:3])


_Labeled = tuple[list[int], Labels, bool]
"""An item's tokens without BOS and EOS, which of them are trained, and whether prompt and answer merge."""


def _labels_by_prefix(items: Sequence[Rendered], tokenizer: Tokenizer) -> Iterator[_Labeled]:
    encoded = tokenizer.encode_batch([item.text for item in items], [item.own for item in items])
    counts, texts, own = [], [], []
    for ids, item in zip(encoded, items, strict=True):
        begin = item.trained[0][0]
        counts.append(tokenizer.prefix_length(ids, item.text, begin))
        if counts[-1] is None:
            texts.append(item.text[:begin])
            own.append([span for span in item.own if span[0] < begin])
    prompts = iter(tokenizer.encode_batch(texts, own))
    for ids, count in zip(encoded, counts, strict=True):
        prompt = next(prompts) if count is None else ids[:count]
        yield ids, np.arange(len(ids)) >= len(prompt), ids[: len(prompt)] != prompt


def _labels_by_overlap(items: Sequence[Rendered], tokenizer: Tokenizer) -> Iterator[_Labeled]:
    encoded = tokenizer.encode_batch_with_spans([item.text for item in items], [item.own for item in items])
    for spans, item in zip(encoded, items, strict=True):
        begins = np.array([begin for begin, _ in item.trained], np.int64)
        first = np.searchsorted(spans.ends, begins, side="right")
        merged = bool((np.append(spans.begins, np.iinfo(np.int64).max)[first] < begins).any())
        trained = _overlapping(spans, item.trained, item.weights)
        if item.trained and item.trained[0][0] == 0:
            # The space that SentencePiece puts in front of a text stands for no character.
            trained[: first[0]] = item.weights[0] if item.weights else 1
        yield spans.ids, trained, merged


def _overlapping(tokens: Spans, trained: Sequence[Span], weights: Sequence[float]) -> Labels:
    """Which tokens share a character with one of `trained`, spans in ascending order that do not overlap; or, if there
    are weights of these, that of the span. [T]"""
    if not trained:
        return np.zeros(len(tokens.ids), dtype=np.bool_)
    begins, ends = np.array(trained, dtype=np.int64).T
    # The only span that can matter to a token is the first that ends behind the token's beginning.
    first = np.searchsorted(ends, tokens.begins, side="right")
    starts = np.append(begins, np.iinfo(np.int64).max)[first]
    overlap: NDArray[np.bool_] = (starts < tokens.ends) & (tokens.begins < tokens.ends)
    return overlap * np.array([*weights, 0.0], np.float32)[first] if weights else overlap
