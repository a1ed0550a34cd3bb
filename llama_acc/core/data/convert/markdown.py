"""Text as a web page had it, as Markdown."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from turbohtml import Document, Markdown

# The tag that a text begins with, if it is HTML as a whole: not a quoted <stdio.h>.
_BEGINS = re.compile(
    r"<(div|p|pre|ul|ol|h[1-6]|table|blockquote|section|article|span|b|strong|i|em|code|a|html|body)\b[^<>]*>", re.I
)
_ENDS = re.compile(r"</[a-z][a-z0-9]*>$", re.I)
# The language of a code block: as a chat page writes it above that, and as a class of it.
_LABEL = re.compile(r">\s*([\w+#.-]+)\s*<")
_LANGUAGE = re.compile(r"[^<>]*\blanguage-([\w+#.-]+)")
_PLAIN = re.compile(r"<div[^<>]*whitespace-pre-wrap[^<>]*>(.*)</div>", re.DOTALL)
_TAG = re.compile(r"<[^<>]*>")
# The same in what others made Markdown of.
_COPY_CODE = re.compile(r"```[ \t]*\n?[ \t]*([\w+#.-]*?)Copy code[ \t]*\n?")
# Which of several replies is shown, and how long it is.
_COUNTS = re.compile(r"\A\s*\d+ / \d+[ \t]*\n|^Copy\d+ chars / \d+ words[ \t]*$", re.MULTILINE)


def cleaned(text: str) -> str:
    """A turn without HTML and without the words of buttons. Text that is not HTML as a whole keeps its tags."""
    if " / " in text:
        text = _COUNTS.sub("", text)
    if "Copy code" in text and "```" in text:
        text = _COPY_CODE.sub(r"```\1\n", text)
    if "</" not in text:
        return text
    stripped = text.strip()
    return _markdown(stripped) if _BEGINS.match(stripped) and _ENDS.search(stripped[-20:]) else text


def _markdown(text: str) -> str:
    if (plain := _PLAIN.fullmatch(text)) is not None:
        return html.unescape(_TAG.sub("", plain[1])).strip()
    if "<button" in text:
        before, *blocks = text.split("<pre")
        text = "<pre".join([before, *map(_without_head, blocks)])
    parse, style = _reader()
    return parse(text, positions=False).to_markdown(style)


def _without_head(block: str) -> str:
    """What follows `<pre`, without what a chat page writes above code: its language and a button."""
    head, code, rest = block.partition("<code")
    above, button, _ = head.partition("<button")
    if not code or not button or "</pre" in head:
        return block
    language = _LABEL.search(above) or _LANGUAGE.match(rest)
    # Its boxes are closed after the code.
    boxes = "<div>" * (head.count("<div") - head.count("</div"))
    return f' class="language-{language[1] if language else ""}">{boxes}<code{rest}'


@cache
def _reader() -> tuple[Callable[..., Document], Markdown]:
    """The library, which takes longer to import than all that most conversions do, and how it is to write."""
    from turbohtml import Markdown, parse

    # A chat page shows what once was Markdown: what was left of it unrendered, as formulas, is meant as it stands.
    as_written = Markdown.Escaping(mode="none", asterisks=False, underscores=False)
    return parse, Markdown(escaping=as_written)
