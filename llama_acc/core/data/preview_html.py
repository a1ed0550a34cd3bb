"""A page that shows items as a model will see them: one file, no scripts, nothing fetched from anywhere."""

from collections.abc import Iterable
from html import escape

from llama_acc.core.data.preview import Piece, Shown
from llama_acc.core.units import count_text
from llama_acc.core.visible import visible

_STYLE = """\
:root { color-scheme: light dark; --ink: #1c1e21; --quiet: #656d76; --page: #f6f7f9; --card: #ffffff; --line: #d8dee4;
  --trained: #d9f2df; --trained-edge: #1a7f37; --special: #6639ba; --special-page: #efe7fd; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --quiet: #9198a1; --page: #0f1216; --card: #181c22;
  --line: #333a43; --trained: #12361f; --trained-edge: #3fb950; --special: #c8a6ff; --special-page: #2b2140; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1.5rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.35rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
header p { color: var(--quiet); margin: 0 0 1rem; }
article { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; margin: 0 0 1rem; }
h2 { display: flex; flex-wrap: wrap; gap: .25rem 1rem; justify-content: space-between; align-items: baseline;
  font-size: .95rem; margin: 0; padding: .6rem 1rem; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
h2 small { color: var(--quiet); font-weight: 400; }
pre { margin: 0; padding: 1rem; white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext;
  font: .875rem/1.6 ui-monospace, Menlo, Consolas, monospace; color: var(--quiet); }
mark { background: var(--trained); color: var(--ink); box-shadow: inset 0 -2px var(--trained-edge);
  box-decoration-break: clone; -webkit-box-decoration-break: clone; }
b { color: var(--special); background: var(--special-page); border-radius: .25rem; padding: 0 .2rem; font-weight: 600; }
i { color: var(--quiet); }
"""


def preview_page(title: str, items: Iterable[Shown], note: str) -> str:
    """The whole page.

    Args:
        title: its heading.
        items: what it shows.
        note: a line below the heading.
    """
    legend = "<mark>what is trained</mark> and the rest, which the model only reads; <b>special tokens</b>"
    articles = "\n".join(map(_article, items))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Whatever a text may smuggle in: this page runs no script and loads nothing.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{_text(title)}</title>\n<style>\n{_STYLE}</style>\n</head>\n<body>\n"
        f"<header>\n<h1>{_text(title)}</h1>\n<p>{_text(note)}<br>{legend}</p>\n</header>\n{articles}\n</body>\n</html>\n"
    )


def _article(shown: Shown) -> str:
    counts = ""
    if shown.tokens is not None:
        counts = f"{count_text(shown.tokens, 'token')}, {shown.label_tokens:,} trained"
    cut = f"<i> [cut: {count_text(shown.cut, 'token')} more]</i>" if shown.cut else ""
    body = "".join(map(_piece, shown.pieces))
    # A browser leaves out the first line break in a pre.
    return f"<article>\n<h2>{_text(shown.origin)} <small>{counts}</small></h2>\n<pre>\n{body}{cut}</pre>\n</article>"


def _piece(piece: Piece) -> str:
    text = _text(piece.text)
    text = f"<b>{text}</b>" if piece.special else text
    return f"<mark>{text}</mark>" if piece.trained else text


def _text(text: str) -> str:
    return escape(visible(text))
