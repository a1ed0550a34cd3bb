"""Text as a model sees it, on the terminal: what is trained or written, and what is special, stands out."""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from llama_acc.cli import console
from llama_acc.core.text import count_text

if TYPE_CHECKING:
    from llama_acc.core.data.preview import Piece, Shown
    from llama_acc.core.generate.chat import ShownToken


def show_items(items: "Iterable[Shown]") -> None:
    """Prints items on standard output. Where color cannot be seen, marks say what is trained."""
    color = console.out.is_terminal and not console.out.no_color
    legend = "trained tokens in green, special ones in magenta" if color else "trained tokens between ⟦ and ⟧"
    items = list(items)
    # Of BOS and EOS also where none is shown: a text in which they stand may be cut before its end.
    names = {"<s>", "</s>", *(piece.text for shown in items for piece in shown.pieces if piece.special)}
    for number, shown in enumerate(items, start=1):
        if number > 1:
            console.out.print()
        console.out.print(Text.assemble((f"example {number}: {shown.origin} ", "bold"), f"({legend})"))
        console.out.print(Text.assemble(*map(_colored, shown.pieces)) if color else _marked(shown.pieces, names))
        if shown.cut:
            console.out.print(Text(f"[cut: {count_text(shown.cut, 'token')} more]", style="yellow"))


def _colored(piece: "Piece") -> tuple[str, str]:
    if piece.special:
        return piece.text, "bold magenta" + " underline" * piece.trained
    return piece.text, "green" if piece.trained else "dim"


def _marked(pieces: "Iterable[Piece]", names: set[str]) -> Text:
    text, inside = "", False
    for piece in pieces:
        if piece.trained != inside:
            text += "⟦" if piece.trained else "⟧"
        inside, shown = piece.trained, piece.text
        # The name of a special token that only stands in the text is marked to differ from the token.
        for name in () if piece.special else names:
            shown = shown.replace(name, f"\\{name}")
        text += shown
    return Text(text + "⟧" * inside)


def show_tokens(tokens: "Sequence[ShownToken]") -> None:
    """Prints tokens on standard error, each with its id and, where it is known, its probability."""
    pictures = str.maketrans({" ": "\u00b7", "\t": "\u21e5", "\n": "\u21b5"})
    for heading, is_reply in (("the model was fed, with ids:", False), ("it wrote, with ids and probabilities:", True)):
        console.note(heading)
        text = Text()
        for token in tokens:
            if token.is_reply == is_reply:
                style = "bold magenta" if token.special else "green" if is_reply else ""
                likely = "" if token.logprobs is None else f"{math.exp(token.logprobs.own):.0%}"
                behind = "\n" if "\n" in token.text else "  "
                text.append(token.text.translate(pictures) or token.piece, style)
                text.append(f"({token.token}){likely}{behind}", "dim")
        text.rstrip()
        console.err.print(text, soft_wrap=False)
