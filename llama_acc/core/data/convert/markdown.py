"""Text as a web page had it, as Markdown."""

import html
import re

# The tag that a text begins with, if it is HTML as a whole: not a quoted <stdio.h>.
_BEGINS = re.compile(
    r"<(div|p|pre|ul|ol|h[1-6]|table|blockquote|section|article|span|b|strong|i|em|code|a|html|body)\b[^<>]*>", re.I
)
_ENDS = re.compile(r"</[a-z][a-z0-9]*>$", re.I)
# What a chat page writes above a code block: its language and a button.
_CODE_HEAD = re.compile(
    r"<pre[^<>]*>(?:\s*<div[^<>]*>)*\s*(?:<span[^<>]*>([^<>]*)</span>)?\s*<button.*?</button>(?:\s*</div>)*\s*"
    r"(?:<div[^<>]*>\s*)?<code[^<>]*>",
    re.DOTALL,
)
_PLAIN = re.compile(r"<div[^<>]*whitespace-pre-wrap[^<>]*>(.*)</div>", re.DOTALL)
_TAG = re.compile(r"<[^<>]*>")
# The colours of code. Without them it is read in half the time.
_SPAN = re.compile(r"</?span\b[^<>]*>")
# The same in what others made Markdown of.
_COPY_CODE = re.compile(r"```[ \t]*\n?[ \t]*([\w+#.-]*?)Copy code[ \t]*\n?")
# Which of several replies is shown, and how long it is.
_COUNTS = re.compile(r"\A\s*\d+ / \d+[ \t]*\n|^Copy\d+ chars / \d+ words[ \t]*$", re.MULTILINE)


def cleaned(text: str) -> str:
    """A turn without HTML and without the words of buttons. Text that is not HTML as a whole keeps its tags.

    Raises:
        ValueError: it is HTML that cannot be read.
    """
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
    from html_to_markdown import ConversionError, convert

    if "<button" in text:
        text = _CODE_HEAD.sub(lambda head: f'<pre><code class="language-{head[1] or ""}">', text)
    try:
        result = convert(_SPAN.sub("", text))
    except (ConversionError, UnicodeEncodeError) as error:
        raise ValueError(f"HTML that cannot be read: {error}") from error
    if result.warnings:
        raise ValueError(f"HTML that cannot be read: {result.warnings[0].message}")
    return str(result.content).strip()
