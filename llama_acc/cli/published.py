"""What `benchmark-vram --published` prints: others' figures beside the predictions, and what makes the difference."""

import json
from typing import TYPE_CHECKING

import typer

from llama_acc.cli import console

if TYPE_CHECKING:
    from llama_acc.core.vram.published import Compared


def show_published(efficiency: float, as_json: bool) -> None:
    """Figures of memory and of GPU-hours; `efficiency` is the share of a GPU's rate that training reaches."""
    from llama_acc.core.vram.published import compare_hours, compare_memory

    memory, hours = compare_memory(console.note), compare_hours(console.note)
    if as_json:
        rows = [
            {**vars(row), "difference": row.difference, "by_part": row.by_part(), "unexplained": row.unexplained}
            for row in memory
        ]
        typer.echo(json.dumps({"memory": rows, "hours": [vars(row) for row in hours]}, indent=1))
        return
    console.note("a GB is 10^9 bytes; taken as 2^30, what is published would be 7% more")
    _published_memory(memory)
    console.out.print()
    table = [["GPU-hours on 8 A100-80GB", "published", f"here at {efficiency:.0%}", "theirs would be at"]]
    for timed in hours:
        ours = timed.at_full_rate / efficiency
        row_hours = [f"{timed.published:g}", f"{ours:.0f}", f"{timed.at_full_rate / timed.published:.0%}"]
        table.append([f"{timed.who}: {timed.what}", *row_hours])
    console.table(table)


def _published_memory(rows: "list[Compared]") -> None:
    """A line for each figure, then what makes the difference of those that do not agree."""
    from llama_acc.core.vram.published import AGREES, GB

    table = [["published by", "run", "memory", "GB", "here", "difference", "theirs counted", "unexplained"]]
    for row in rows:
        ours = [f"{row.total / GB:.1f}", f"{row.difference:+.0%}"]
        theirs = [f"{row.counted / GB:.1f}", f"{row.unexplained:+.0%}"]
        table.append([row.who, row.what, row.counts, f"{row.published:g}", *ours, *theirs])
    console.table(table)
    for row in rows:
        if abs(row.difference) > AGREES:
            console.out.print(f"\n{row.who}, {row.what}, GB:\n{_explained(row)}", markup=False, highlight=False)


def _explained(row: "Compared") -> str:
    """From the prediction over the parts to the published figure; parts below 1% of it that have no reason are one."""
    from llama_acc.core.vram.published import GB

    lines, small = [f"{row.total / GB:7.2f}  predicted here"], 0
    for part, size in sorted(row.by_part().items(), key=lambda item: -abs(item[1])):
        if part in row.why:
            lines.append(f"{size / GB:+7.2f}  {part}: {row.why[part]}")
        elif abs(size) >= 0.01 * row.published * GB:
            lines.append(f"{size / GB:+7.2f}  {part}")
        else:
            small += size
    lines.append(f"{small / GB:+7.2f}  other parts")
    lines.append(f"{row.counted / GB:7.2f}  their own program, counted")
    lines.append(f"{row.published - row.counted / GB:+7.2f}  not explained")
    return "\n".join([*lines, f"{row.published:7.2f}  published"])
