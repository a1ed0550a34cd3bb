"""A contact sheet: images with their captions on one page, which runs no script and loads nothing."""

import base64
from collections.abc import Iterable, Iterator
from html import escape
from typing import NamedTuple

from llama_acc.core.visible import visible

THUMBNAIL = 320
"""Pixels of a picture's longer side."""

_STYLE = """\
:root { color-scheme: light dark; --ink: #1c1e21; --quiet: #656d76; --page: #f6f7f9; --card: #ffffff; --line: #d8dee4;
  --mat: #eceff2; --wrong: #b42318; --right: #1a7f37; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --quiet: #9198a1; --page: #0f1216; --card: #181c22;
  --line: #333a43; --mat: #20262d; --wrong: #ff7b72; --right: #3fb950; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 90rem; padding: 1.5rem; background: var(--page); color: var(--ink);
  font: 1rem/1.45 system-ui, sans-serif; }
h1 { font-size: 1.35rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
header p { color: var(--quiet); margin: 0 0 1.25rem; overflow-wrap: anywhere; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; overflow: hidden;
  display: flex; flex-direction: column; }
.picture { height: 13rem; background: var(--mat); display: flex; align-items: center; justify-content: center; }
.picture img { max-width: 100%; max-height: 100%; min-height: 8rem; object-fit: contain; image-rendering: auto; }
figcaption { padding: .75rem .9rem; display: flex; flex-direction: column; gap: .35rem; flex: 1; }
figcaption p { margin: 0; overflow-wrap: anywhere; white-space: pre-wrap; unicode-bidi: plaintext; }
figcaption small { color: var(--quiet); overflow-wrap: anywhere; margin-top: auto; }
.wrong { color: var(--wrong); }
.right { color: var(--right); }
.none { color: var(--quiet); font-size: .9rem; }
@media print { figure { break-inside: avoid; } }
"""


class Card(NamedTuple):
    """One image on the page.

    Attributes:
        name: what it is called.
        text: its caption.
        problem: why it has none.
        expected: the caption it should have, if that is known.
        thumbnail: a JPEG; empty: there is none to show.
    """

    name: str
    text: str
    problem: str | None
    expected: str | None
    thumbnail: bytes


def caption_page(title: str, note: str, cards: Iterable[Card]) -> Iterator[str]:
    """The page, in parts to be written one after the other.

    Args:
        title: its heading.
        note: a line below the heading.
        cards: what it shows.
    """
    yield (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Whatever a caption or a name may smuggle in: this page runs no script and loads nothing.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{_text(title)}</title>\n<style>\n{_STYLE}</style>\n</head>\n<body>\n"
        f"<header>\n<h1>{_text(title)}</h1>\n<p>{_text(note)}</p>\n</header>\n<main>\n"
    )
    for card in cards:
        yield _figure(card)
    yield "</main>\n</body>\n</html>\n"


def _figure(card: Card) -> str:
    picture = '<span class="none">no picture</span>'
    if card.thumbnail:
        data = base64.b64encode(card.thumbnail).decode("ascii")
        picture = f'<img src="data:image/jpeg;base64,{data}" alt="{_text(card.name)}">'
    if card.problem is not None:
        said = f'<p class="wrong">{_text(card.problem)}</p>'
    else:
        said = f"<p>{_text(card.text)}</p>"
        if card.expected is not None:
            is_right = card.text == card.expected
            said += '<p class="right">as expected</p>' if is_right else ""
            said += "" if is_right else f'<p class="wrong">expected: {_text(card.expected)}</p>'
    return (
        f'<figure>\n<div class="picture">{picture}</div>\n'
        f"<figcaption>{said}<small>{_text(card.name)}</small></figcaption>\n</figure>\n"
    )


def _text(text: str) -> str:
    return escape(visible(text))
