"""Items as a model will see them, on the terminal: what is trained and what is special stands out."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rich.text import Text

from llama_acc.cli import console
from llama_acc.core.units import count_text
from llama_acc.core.visible import visible

if TYPE_CHECKING:
    from llama_acc.core.data.preview import Piece, Shown

_SPECIAL = "bold magenta"


def show_items(items: "Iterable[Shown]") -> None:
    """Prints items on standard output. Where colour cannot be seen, marks say what is trained."""
    colour = console.out.is_terminal and not console.out.no_color
    legend = "trained tokens in green, special ones in magenta" if colour else "trained tokens between ⟦ and ⟧"
    items = list(items)
    # Of BOS and EOS also where none is shown: a text in which they stand may be cut before its end.
    names = {"<s>", "</s>", *(piece.text for shown in items for piece in shown.pieces if piece.special)}
    for number, shown in enumerate(items, start=1):
        if number > 1:
            console.out.print()
        heading = Text(f"example {number}: {shown.origin} ", style="bold")
        console.out.print(heading + Text(f"({legend})", style="not bold"))
        console.out.print(_coloured(shown.pieces) if colour else _marked(shown.pieces, names))
        if shown.cut:
            console.out.print(Text(f"[cut: {count_text(shown.cut, 'token')} more]", style="yellow" if colour else ""))


def to_json(shown: "Shown") -> dict[str, Any]:
    """As plain values."""
    return {**shown._asdict(), "pieces": [piece._asdict() for piece in shown.pieces]}


def _coloured(pieces: "list[Piece]") -> Text:
    text = Text()
    for piece in pieces:
        style = _SPECIAL if piece.special else ("green" if piece.trained else "dim")
        text.append(visible(piece.text), style=f"{style} underline" if piece.special and piece.trained else style)
    return text


def _marked(pieces: "list[Piece]", names: set[str]) -> Text:
    text, inside = "", False
    for piece in pieces:
        if piece.trained != inside:
            text += "⟦" if piece.trained else "⟧"
        inside = piece.trained
        shown = visible(piece.text)
        if not piece.special:
            # The name of a special token that only stands in the text is told from the token.
            for name in names:
                shown = shown.replace(name, f"\\{name}")
        text += shown
    return Text(text + "⟧" * inside)
