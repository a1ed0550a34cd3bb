"""Text as a web page had it, as Markdown."""

import html
import re
from typing import Any

from turbohtml import Document, Element, Markdown, Text, parse

# The tag that a text begins with, if it is HTML as a whole: not a quoted <stdio.h>.
_BEGINS = re.compile(
    r"<(div|p|pre|ul|ol|h[1-6]|table|blockquote|section|article|span|b|strong|i|em|code|a|html|body)\b[^<>]*>", re.I
)
_ENDS = re.compile(r"</[a-z][a-z0-9]*>$", re.I)
# Lines as they were typed, and what makes more than that of them.
_PLAIN = re.compile(r"<div[^<>]*whitespace-pre-wrap[^<>]*>(.*)</div>", re.DOTALL)
_MARKUP = re.compile(r"<(p|pre|code|ul|ol|table|h[1-6]|blockquote|strong|b|em|i|a|img|sup|sub|math|svg)\b|katex", re.I)
_BREAK = re.compile(r"<br\b[^<>]*>", re.I)
_TAG = re.compile(r"<[^<>]*>")
_INLINE = ("span", "strong", "b", "em", "i", "a", "u", "small", "font", "mark", "s", "del", "ins")
# The words of buttons: in what others made Markdown of; which of several replies is shown, and how long it is.
_COPY_CODE = re.compile(r"```[ \t]*\n?[ \t]*([\w+#.-]*?)Copy code[ \t]*\n?")
_COUNTS = re.compile(r"\A\s*\d+ / \d+[ \t]*\n|^Copy\d+ chars / \d+ words[ \t]*$", re.MULTILINE)
_NUMBER = re.compile(r"\s*\d")
# The language of a code block: as a chat page writes it above that, and as a class or an attribute of it.
_LABEL = re.compile(r">\s*([\w+#.-]+)\s*<")
_LANGUAGE = re.compile(r"[^<>]*\blanguage-([\w+#.-]+)")
_LANGUAGE_CLASS = re.compile(r"\b(?:lang-|data-lang(?:uage)?=\W?|highlight-source-|brush:\s*)([\w+#.-]+)")
# A whole formula, one on lines of its own, where the TeX is, and what only draws it.
_FORMULA = ".katex, .mwe-math-element, mjx-container, .math-inline, .MathJax, math"
_DISPLAY = (
    '.math-display, .katex-display, .MathJax_Display, .mwe-math-element-block, [display="block"], [display="true"]'
)
_TEX_SCRIPT = 'script[type^="math/tex"]'
_TEX = f'annotation[encoding="application/x-tex"], {_TEX_SCRIPT}, math[alttext], [data-latex]'
_DRAWN = ".MathJax_Preview, .MathJax_Display, .MathJax, .MathJax_SVG, .MathJax_CHTML"
_SPOKEN = ".katex-mathml, mjx-assistive-mml, .MJX_Assistive_MathML"
_SPECIAL = f"svg, sup, sub, pre, br, {_TEX}, {_SPOKEN}"  # what Markdown is not made of as it is
_DISPLAY_STYLE = re.compile(r"\A\{\\(?:display|text)style (.*)\}\Z", re.DOTALL)
# A chat page shows what once was Markdown: what was left of it unrendered, as formulas, stays unchanged.
_STYLE = Markdown(escaping=Markdown.Escaping(mode="none", asterisks=False, underscores=False))


def html_to_markdown(text: str) -> str:
    """A turn without HTML and without the words of buttons. Text that is not HTML as a whole keeps its tags."""
    if "Copy" in text or _NUMBER.match(text):
        text = _COPY_CODE.sub(r"```\1\n", _COUNTS.sub("", text))
    stripped = text.strip() if "</" in text else ""
    if not _BEGINS.match(stripped) or not _ENDS.search(stripped[-20:]):
        return text
    if (plain := _PLAIN.fullmatch(stripped)) is not None and not _MARKUP.search(plain[1]):
        return html.unescape(_TAG.sub("", _BREAK.sub("\n", plain[1]))).strip()
    if "<button" in stripped:
        before, *blocks = stripped.split("<pre")
        stripped = "<pre".join([before, *map(_without_head, blocks)])
    document = parse(stripped, positions=False)
    if document.select_one(_SPECIAL) is None:
        return document.to_markdown(_STYLE)  # as most are
    low = stripped.lower()
    if "katex" in low or "mjx-" in low or "<math" in low or "mathjax" in low or "math/tex" in low:
        _formulas_to_tex(document)
    for picture in document.select("svg"):
        picture.decompose()
    # Markdown has no signs for raised and lowered text, and x² would become x2: the tags stay.
    for raised in document.select("sup, sub"):
        raised.insert_before(Text(f"<{raised.tag}>"))
        raised.insert_after(Text(f"</{raised.tag}>"))
    _set_languages(document)
    if stripped.count("<br") > 1:
        _blank_lines_to_blocks(document)
    return document.to_markdown(_STYLE)


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


def _formulas_to_tex(document: Document) -> None:
    """Put the TeX of each formula in its place, once: pages have it beside a picture, and beside MathML.

    Known are KaTeX and Wikipedia (an annotation of MathML), MathJax 2 (a script) and 4 (`data-latex`), LaTeXML
    (`alttext`). Of a formula without its TeX the text stays, once.
    """
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
    for spoken in document.select(_SPOKEN):
        _outermost(spoken, _FORMULA).replace_with(Text(spoken.text))


def _outermost(node: Element, selector: str) -> Element:
    """The outermost element around a node that matches, or the node."""
    while node.parent is not None and (around := node.parent.closest(selector)) is not None:
        node = around
    return node


def _blank_lines_to_blocks(document: Document) -> None:
    """Put an empty block in the place of several line breaks in a row, which are a blank line."""
    runs: list[list[Element]] = []
    in_a_row = False
    for node in document.descendants:
        if isinstance(node, Element) and node.tag == "br":
            if node.closest("pre, code, td, th") is None:
                runs += [] if in_a_row else [[]]
                runs[-1].append(node)
                in_a_row = True
        elif (isinstance(node, Text) and node.data.strip()) or (isinstance(node, Element) and node.tag not in _INLINE):
            in_a_row = False
    for *before, last in runs:
        for line_break in before:
            line_break.decompose()
        if before:
            last.replace_with(Element("div"))


def _set_languages(document: Document) -> None:
    """Give code blocks the class that says their language, where another one or an attribute does."""
    for block in document.select("pre"):
        around = [] if block.parent is None else [block.parent]
        said = " ".join(map(_classes, [block, *block.select("code")[:1], *around]))
        if "language-" not in said and (found := _LANGUAGE_CLASS.search(said)) is not None:
            block.add_class(f"language-{found[1]}")


def _classes(element: Any) -> str:
    """An element's classes, and the language that an attribute names as one."""
    attrs = getattr(element, "attrs", {})
    named = [f"lang-{attrs[name]}" for name in ("data-lang", "data-language") if attrs.get(name)]
    return " ".join([*(attrs.get("class") or ()), *named])
