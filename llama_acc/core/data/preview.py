"""An item as the model will see it: its text in pieces, each of them trained or not, a special token or not."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llama_acc.core.data.chat_template import template_for
from llama_acc.core.data.encode import Labels, documents, refusal, render_item
from llama_acc.core.data.items import Item, stream_items
from llama_acc.core.data.sources import FileSpec
from llama_acc.core.data.templates import Template
from llama_acc.core.errors import UserError
from llama_acc.core.tokenizer import StreamDecoder, Tokenizer


class Piece(NamedTuple):
    """A part of a text."""

    text: str
    trained: bool
    special: bool = False  # BOS, EOS or the like: one token, written by its name


class Shown(NamedTuple):
    """An item to be shown. Without a tokenizer the numbers of tokens are not known."""

    origin: str
    pieces: list[Piece]
    tokens: int | None = None
    label_tokens: int | None = None
    cut: int = 0  # how many tokens more it had before it was cut


def shown_items(
    items: Sequence[tuple[str, Item]],
    template: Template,
    tokenizer: Tokenizer | None,
    max_tokens: int | None,
    image_positions: int = 0,
) -> Iterator[Shown]:
    """Items, given with their origins, as a model will see them; without a tokenizer their text, uncut, with BOS and
    EOS called `<s>` and `</s>`."""
    bos = int(template.bos)
    if tokenizer is None:
        for origin, item in items:
            text = [Piece(why, False)] if (why := refusal(item, template)) else _text_pieces(item, template)
            yield Shown(origin, _with_images(text, item.images, bos))
        return
    encoded = documents([item for _, item in items], template, tokenizer, image_positions)
    for (origin, item), found in zip(items, encoded, strict=True):
        if isinstance(found, str):
            yield Shown(origin, [Piece(found, False)])
            continue
        for number, (tokens, labeled, _) in enumerate(found, start=1):
            where = origin if len(found) == 1 else f"{origin}, reply {number}"
            kept = tokens[:max_tokens], labeled[:max_tokens]
            shown = shown_document(where, *kept, tokenizer, item.images, bos, image_positions)
            yield shown._replace(cut=len(tokens) - len(kept[0]))


def shown_document(
    origin: str,
    tokens: NDArray[np.int32],
    labeled: Labels,
    tokenizer: Tokenizer,
    images: Sequence[str] = (),
    image_start: int = 0,
    image_positions: int = 0,
) -> Shown:
    """A document as a model sees it, its images by their names."""
    end = image_start + image_positions * len(images)
    kept, trained = (np.delete(values, slice(image_start, end)).tolist() for values in (tokens, labeled > 0))
    shown = _with_images(pieces(kept, trained, tokenizer), images, image_start)
    return Shown(origin, shown, len(tokens), int(np.count_nonzero(labeled)))


def first_items(
    specs: Iterable[FileSpec],
    count: int,
    tokenizer: Tokenizer | None,
    max_tokens: int | None,
    image_positions: int = 0,
) -> list[Shown]:
    """The first items of files that can be trained on; see `shown_items`."""
    shown: list[Shown] = []
    for spec in specs:
        try:
            stream = stream_items(spec.path, spec.format, spec.adapt)
            template = template_for(spec.template, stream.kind, tokenizer)
            good = ((f"{spec.path.name} {row.where}", row.item) for row in stream if row.item is not None)
            items = list(islice(good, count - len(shown)))
        except UserError:
            continue  # the check itself reports it
        shown += shown_items(items, template, tokenizer, max_tokens, image_positions)
    return shown


def _with_images(shown: list[Piece], images: Sequence[str], begin: int) -> list[Piece]:
    """An item's pieces with its images where they stand: behind BOS, which is the first piece if there is one."""
    return [*shown[:begin], *(Piece(f"<image {name}>", False, special=True) for name in images), *shown[begin:]]


def pieces(tokens: Sequence[int], labeled: Sequence[bool], tokenizer: Tokenizer) -> list[Piece]:
    """A document's text, from token to token; a character of several tokens counts as its last one."""
    special = {tokenizer.bos_id, *tokenizer.end_ids}
    decoder, found, trained = StreamDecoder(tokenizer), [], False
    for token, trained in zip(tokens, labeled, strict=True):
        if token in special:
            found += [Piece(decoder.flush(), trained), Piece(tokenizer.piece(token), trained, special=True)]
        else:
            found.append(Piece(decoder.push(token), trained))
    return _joined([*found, Piece(decoder.flush(), trained)])


def _text_pieces(item: Item, template: Template) -> list[Piece]:
    text, _, trained, eos_trained, _ = render_item(item, template)
    parts, position = [Piece("<s>", False, special=True)] * template.bos, 0
    for first, last in trained:
        parts += [Piece(text[position:first], False), Piece(text[first:last], True)]
        position = last
    return _joined([*parts, Piece(text[position:], False), *[Piece("</s>", eos_trained, special=True)] * template.eos])


def _joined(parts: Iterable[Piece]) -> list[Piece]:
    """Neighbors of one kind together, empty ones left out."""
    joined: list[Piece] = []
    for piece in parts:
        if joined and not piece.special and joined[-1][1:] == piece[1:]:
            joined[-1] = piece._replace(text=joined[-1].text + piece.text)
        elif piece.text:
            joined.append(piece)
    return joined
