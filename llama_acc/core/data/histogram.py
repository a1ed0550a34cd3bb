"""The lengths of items, in bars: for a terminal, and as a picture."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from llama_acc.core.errors import UserError
from llama_acc.core.units import count_text

_BARS = 16
_TAIL = 0.995
"""So much of the items is shown in bars of one width; the last bar holds the rest."""


class Bar(NamedTuple):
    """So many items are `begin` to `end` - 1 long."""

    begin: int
    end: int | None
    """None: the last bar, which has no end."""
    items: int

    def __str__(self) -> str:
        if self.end is None:
            return f"{self.begin:,} or more"
        return f"{self.begin:,} to {self.end - 1:,}" if self.end - self.begin > 1 else f"{self.begin:,}"


def bars(lengths: Counter[int], most: int = _BARS) -> list[Bar]:
    """Bars of one round width; the last one may have no end."""
    if not lengths:
        return []
    total, seen, last = lengths.total(), 0, 0
    for last in sorted(lengths):
        seen += lengths[last]
        if seen >= _TAIL * total:
            break
    width = _round_width(last + 1, most)
    count = last // width + 1
    heights = [0] * (count + 1)
    for length, items in lengths.items():
        heights[min(length // width, count)] += items
    found = [Bar(i * width, (i + 1) * width, height) for i, height in enumerate(heights[:count])]
    return [*found, Bar(count * width, None, heights[count])] if heights[count] else found


def plot_lengths(lengths: Mapping[str, Counter[int]], unit: str, max_tokens: int | None, path: Path) -> None:
    """Draw a histogram as a PNG.

    Args:
        lengths: of each file, by its name.
        unit: "tokens" or "characters".
        max_tokens: where items are cut; drawn as a line.
        path: the picture's file.

    Raises:
        UserError: it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    together: Counter[int] = sum(lengths.values(), Counter())
    width = _round_width(max(together) + 1, 60)
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.hist(
        [list(counts) for counts in lengths.values()],
        range(0, max(together) + width + 1, width),
        weights=[list(counts.values()) for counts in lengths.values()],
        stacked=True,
        label=list(lengths),
    )
    if max_tokens is not None:
        over = sum(count for length, count in together.items() if length > max_tokens)
        axes.axvline(max_tokens, color="black", ls="--", lw=1, label=f"max_tokens {max_tokens:,}: {over:,} are longer")
    axes.set(xlabel=unit, ylabel="items", title=f"Lengths of {count_text(together.total(), 'item')}")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    if len(lengths) > 1 or max_tokens is not None:
        axes.legend()
    try:
        FigureCanvasAgg(figure).print_png(str(path))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def _round_width(longest: int, most: int) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, ... with which `most` bars reach as far."""
    width, factors = 1, (2, 2.5, 2)
    for step in range(60):
        if width * most >= longest:
            break
        width = int(width * factors[step % 3])
    return width
