"""Plain text, for continued pretraining: documents end to end, cut into pieces of equal length.

A document is BOS, its text and EOS, and all of it is trained. A piece may hold several documents, which do not attend
to each other, and what is left of one goes on in the next piece. So an example has `max_tokens` tokens, and none is
lost.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import compress
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from llama_acc.core.tokenizer import Tokenizer

PLAIN_SUFFIXES = (".txt", ".md")
"""Of files that are one document each."""
TEXT_KEYS = ("text", "content")
"""What the text is called in rows."""
_SECTION = 1 << 20
"""Characters that are encoded at once."""
_CONTEXT = 1 << 8
"""Characters around them that are encoded too, so that the cut does not show: tokens begin anew at most words."""


class Text(NamedTuple):
    """A document, or a section of a long one."""

    text: str
    begins: bool = True
    ends: bool = True
    before: str = ""  # what stands before a section; none of it is the section's
    after: str = ""
    images: tuple[str, ...] = ()
    system: str | None = None


def sections(blocks: Iterable[str]) -> Iterator[Text]:
    """The document whose text comes in blocks; of a long one, sections."""
    before, held = "", ""
    for block in blocks:
        held += block
        while len(held) > _SECTION + _CONTEXT:
            yield Text(held[:_SECTION], not before, False, before, held[_SECTION : _SECTION + _CONTEXT])
            before, held = held[_SECTION - _CONTEXT : _SECTION], held[_SECTION:]
    yield Text(held, not before, True, before)


def continues(item: object) -> bool:
    """Whether an item belongs to the document before it."""
    return isinstance(item, Text) and not item.begins


def text_tokens(texts: Sequence[Text], tokenizer: "Tokenizer") -> Iterator[list[int]]:
    """Every text's tokens, without BOS and EOS. The text of a special token is not that token."""
    whole = [item.text for item in texts if item.begins and item.ends]
    encoded = iter(tokenizer.encode_batch(whole, [[(0, len(text))] for text in whole]))
    for text, begins, ends, before, after, *_ in texts:
        if begins and ends:
            yield next(encoded)
            continue
        joined = before + text + after
        [spans] = tokenizer.encode_batch_with_spans([joined], [[(0, len(joined))]])
        own = (spans.begins >= len(before)) & (spans.begins < len(before) + len(text))
        yield list(compress(spans.ids, own))
