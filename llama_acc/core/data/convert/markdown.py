"""Text as a web page had it, as Markdown."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from turbohtml import Document, Element, Markdown

# The tag that a text begins with, if it is HTML as a whole: not a quoted <stdio.h>.
_BEGINS = re.compile(
    r"<(div|p|pre|ul|ol|h[1-6]|table|blockquote|section|article|span|b|strong|i|em|code|a|html|body)\b[^<>]*>", re.I
)
_ENDS = re.compile(r"</[a-z][a-z0-9]*>$", re.I)
# The language of a code block: as a chat page writes it above that, and as a class of it.
_LABEL = re.compile(r">\s*([\w+#.-]+)\s*<")
_LANGUAGE = re.compile(r"[^<>]*\blanguage-([\w+#.-]+)")
_LANGUAGE_CLASS = re.compile(r"\b(?:lang-|data-lang(?:uage)?=\W?|highlight-source-|brush:\s*)([\w+#.-]+)")
_LANGUAGE_NAMES = ("data-lang", "data-language")
_INLINE = ("span", "strong", "b", "em", "i", "a", "u", "small", "font", "mark", "s", "del", "ins")
_PLAIN = re.compile(r"<div[^<>]*whitespace-pre-wrap[^<>]*>(.*)</div>", re.DOTALL)
# What makes the text of a page more than lines as they were typed.
_MARKUP = re.compile(r"<(p|pre|code|ul|ol|table|h[1-6]|blockquote|strong|b|em|i|a|img|sup|sub|math|svg)\b|katex", re.I)
_BREAK = re.compile(r"<br\b[^<>]*>", re.I)
_TAG = re.compile(r"<[^<>]*>")
# The same in what others made Markdown of.
_COPY_CODE = re.compile(r"```[ \t]*\n?[ \t]*([\w+#.-]*?)Copy code[ \t]*\n?")
# Which of several replies is shown, and how long it is.
_HAS_MATH = re.compile(r"<math|katex|MathJax|mjx-|math/tex", re.IGNORECASE)
# The element of a whole formula, that of one on lines of its own, where the TeX is, and what only draws it.
_FORMULA = ".katex, .mwe-math-element, mjx-container, .math-inline, .MathJax, math"
_DISPLAY = (
    '.math-display, .katex-display, .MathJax_Display, .mwe-math-element-block, [display="block"], [display="true"]'
)
_TEX_SCRIPT = 'script[type^="math/tex"]'
_TEX = f'annotation[encoding="application/x-tex"], {_TEX_SCRIPT}, math[alttext], [data-latex]'
_DRAWN = ".MathJax_Preview, .MathJax_Display, .MathJax, .MathJax_SVG, .MathJax_CHTML"
_DISPLAY_STYLE = re.compile(r"\A\{\\(?:display|text)style (.*)\}\Z", re.DOTALL)
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
    if (plain := _PLAIN.fullmatch(text)) is not None and not _MARKUP.search(plain[1]):
        return html.unescape(_TAG.sub("", _BREAK.sub("\n", plain[1]))).strip()
    if "<button" in text:
        before, *blocks = text.split("<pre")
        text = "<pre".join([before, *map(_without_head, blocks)])
    parse, style = _reader()
    document = parse(text, positions=False)
    if _HAS_MATH.search(text):
        _formulas_as_tex(document)
    if "<svg" in text:
        for picture in document.select("svg"):
            picture.decompose()
    if "<sup" in text or "<sub" in text:
        _raised_as_tags(document)
    if _LANGUAGE_CLASS.search(text):
        _languages_as_classes(document)
    if text.count("<br") > 1:
        _blank_lines_as_blocks(document)
    return document.to_markdown(style)


def _formulas_as_tex(document: Document) -> None:
    """Put the TeX of each formula in its place, once: pages have it beside a picture, and beside MathML.

    Known are KaTeX and Wikipedia (an annotation of MathML), MathJax 2 (a script) and 4 (`data-latex`), LaTeXML
    (`alttext`). Of a formula without its TeX the text stays, once.
    """
    from turbohtml import Element, Text

    if document.select_one(_TEX_SCRIPT) is not None:
        for drawn in document.select(_DRAWN):
            drawn.decompose()
    for source in document.select(_TEX):
        if source.closest("html") is None:
            continue  # its formula was replaced
        tex = source.attrs.get("alttext") or source.attrs.get("data-latex") or source.text
        tex = _DISPLAY_STYLE.sub(r"\1", str(tex).strip()).strip()
        outer = _outermost(source, f"{_FORMULA}, {_DISPLAY}")
        if source.closest(_DISPLAY) is None and "mode=display" not in str(source.attrs.get("type")):
            outer.replace_with(Text(f"${tex}$"))
        else:
            block = Element("p")
            block.append(Text(f"$${tex}$$"))
            outer.replace_with(block)
    for read_aloud in document.select(".katex-mathml, mjx-assistive-mml, .MJX_Assistive_MathML"):
        _outermost(read_aloud, _FORMULA).replace_with(Text(read_aloud.text))


def _outermost(node: Element, selector: str) -> Element:
    """The outermost element around a node that matches, or the node."""
    while node.parent is not None and (around := node.parent.closest(selector)) is not None:
        node = around
    return node


def _blank_lines_as_blocks(document: Document) -> None:
    """Put an empty block in the place of several line breaks in a row, which are a blank line."""
    from turbohtml import Element, Text

    runs: list[list[Element]] = []
    goes_on = False
    for node in document.descendants:
        if isinstance(node, Element) and node.tag == "br":
            if node.closest("pre, code, td, th") is None:
                runs += [] if goes_on else [[]]
                runs[-1].append(node)
                goes_on = True
        elif (isinstance(node, Text) and node.data.strip()) or (isinstance(node, Element) and node.tag not in _INLINE):
            goes_on = False
    for *before, last in runs:
        for line_break in before:
            line_break.decompose()
        if before:
            last.replace_with(Element("div"))


def _raised_as_tags(document: Document) -> None:
    """Keep the tags of raised and lowered text: Markdown has no signs for them, and x² would become x2."""
    from turbohtml import Text

    for raised in document.select("sup, sub"):
        raised.insert_before(Text(f"<{raised.tag}>"))
        raised.insert_after(Text(f"</{raised.tag}>"))


def _languages_as_classes(document: Document) -> None:
    """Give code blocks the class that says their language, where another one or an attribute does."""
    for block in document.select("pre"):
        around = [] if block.parent is None else [block.parent]
        said = " ".join(map(_classes, [block, *block.select("code")[:1], *around]))
        if "language-" not in said and (found := _LANGUAGE_CLASS.search(said)) is not None:
            block.add_class(f"language-{found[1]}")


def _classes(element: Any) -> str:
    """An element's classes, and the language that an attribute names as one."""
    attrs = getattr(element, "attrs", {})
    return " ".join(
        [*(attrs.get("class") or ()), *(f"lang-{attrs[name]}" for name in _LANGUAGE_NAMES if attrs.get(name))]
    )


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
