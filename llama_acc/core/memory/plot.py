"""Predictions as pictures: bars of parts, on top of each other."""

from collections.abc import Sequence
from pathlib import Path

from llama_acc.core.memory.gpus import GIB
from llama_acc.core.memory.predict import PARTS, Usage

_COLOURS = {
    "weights": "#4c5b6b",
    "quantization state": "#7b8b9b",
    "vision tower": "#a3adb8",
    "trainable masters": "#2b6cb0",
    "optimizer": "#63a4e0",
    "gradients": "#a9d0f5",
    "activations kept": "#2f855a",
    "activations recomputed": "#9ae6b4",
    "logits and loss": "#d69e2e",
    "KV cache": "#b7791f",
    "communication buffers": "#805ad5",
    "working memory": "#c53030",
    "allocator slack": "#e2b6b6",
    "CUDA context": "#cbd5e0",
}


def draw(usages: Sequence[Usage], names: Sequence[str], path: Path, title: str, along: str) -> None:
    """Draws a bar for each usage, in GiB by part, as a PNG.

    Args:
        usages: what is drawn.
        names: of the bars.
        path: of the picture.
        title: above it.
        along: what the names are.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    bottoms = [0.0] * len(usages)
    largest = max(usage.total for usage in usages)
    for part in PARTS:
        heights = [usage.parts[part] / GIB for usage in usages]
        if max(heights) * GIB < 0.001 * largest:
            continue
        axes.bar(range(len(usages)), heights, 0.62, bottoms, label=part, color=_COLOURS[part])
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    for place, bottom in enumerate(bottoms):
        axes.annotate(f"{bottom:.1f}", (place, bottom), ha="center", va="bottom", fontsize=9)
    axes.set_xticks(range(len(usages)), names)
    axes.set(title=title, xlabel=along, ylabel="GiB on one rank")
    axes.margins(y=0.08)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", fontsize=8, frameon=False)
    FigureCanvasAgg(figure).print_png(str(path))
