"""What a check of data files found, on standard output."""

from typing import TYPE_CHECKING

from rich.text import Text

from llama_acc.cli import console
from llama_acc.core.units import count_text
from llama_acc.core.visible import visible

if TYPE_CHECKING:
    from llama_acc.core.data.check import FileReport
    from llama_acc.core.data.findings import Kind

_BAR = 40
"""Width of the longest bar."""
_NAMES = {"single_turn": "single-turn item", "dialogue": "dialogue"}


def print_reports(reports: "list[FileReport]", most: int | None) -> None:
    """Prints all that was found, file by file.

    Args:
        reports: of the files.
        most: how many findings of a kind are listed; None: all that were kept.
    """
    from llama_acc.core.data.items import unused_text

    for number, report in enumerate(reports):
        if number:
            console.out.print()
        _heading(report)
        if report.error is not None:
            console.out.print(Text.assemble(("  cannot be read: ", "bold red"), _text(report.error)))
            if report.hint is not None:
                console.out.print(_text(f"      {report.hint}"))
        for fatal in (True, False):
            _findings(report, fatal, most)
        if report.unused_keys:
            console.out.print(Text.assemble(("  not used: ", "bold"), _text(unused_text(report.unused_keys))))
        if report.lengths:
            _histogram(report)
            _outcome(report)


def _heading(report: "FileReport") -> None:
    rows = report.survey.rows
    name = _NAMES[report.kind] if report.kind is not None and report.survey.items else "row"
    facts = [count_text(rows, name)] if report.kind is not None else []
    if report.template is not None:
        facts.append(f"prompt format {report.template}")
    if report.survey.language is not None:
        facts.append(f"language {report.survey.language}")
    elif report.survey.languages:
        facts.append("languages " + ", ".join(f"{name} {n:,}" for name, n in report.survey.languages.items()))
    if report.images:
        facts.append(count_text(report.images, "image"))
    console.out.print(Text.assemble((str(report.path), "bold"), _text("".join(f"  {fact}" for fact in facts))))
    if report.error is None and not report.findings.counts.total():
        console.out.print(Text("  nothing wrong was found", style="green"))


def _findings(report: "FileReport", fatal: bool, most: int | None) -> None:
    from llama_acc.core.data.findings import KINDS

    for kind, about in KINDS.items():
        if about.fatal is not fatal or not report.findings.counts[kind]:
            continue
        _kind(about, report.findings.counts[kind])
        places = report.findings.places[kind][:most]
        for finding in places:
            console.out.print(_text(f"      {finding}"))
        if left := report.findings.counts[kind] - len(places):
            hint = " (--all lists them)" if most is not None else ""
            console.out.print(Text(f"      ... and {left:,} more{hint}", style="dim"))


def _kind(about: "Kind", count: int) -> None:
    word, style = ("error", "bold red") if about.fatal else ("warning", "yellow")
    console.out.print(Text.assemble((f"  {word}: ", style), (f"{about.title}: {count:,}", "bold")))


def _histogram(report: "FileReport") -> None:
    from llama_acc.core.data.check import quantiles
    from llama_acc.core.data.histogram import bars

    most = None if report.truncation is None else report.truncation.max_tokens
    told = ", ".join(f"{name} {value:,}" for name, value in quantiles(report.lengths).items())
    console.out.print(Text.assemble((f"  lengths in {report.unit}: ", "bold"), told))
    found = bars(report.lengths)
    highest = max(bar.items for bar in found)
    names = list(map(str, found))
    width, digits = max(map(len, names)), max(len(f"{bar.items:,}") for bar in found)
    for bar, name in zip(found, names, strict=True):
        is_cut = most is not None and bar.begin >= most
        blocks = "█" * max(round(_BAR * bar.items / highest), bar.items > 0)
        line = f"      {name:>{width}}  {bar.items:>{digits},}  "
        console.out.print(Text.assemble(line, (blocks, "yellow" if is_cut else "green")))


def _outcome(report: "FileReport") -> None:
    """What would be left out, dropped or cut, and why."""
    survey, truncation = report.survey, report.truncation
    rows = [
        ("left out", report.wrong, "an error above: stops a run, or is left out (data.on_error=skip)"),
        ("left out", report.blank, "blank"),
    ]
    if truncation is not None:
        most = truncation.max_tokens
        lost = f"{count_text(truncation.cut_tokens, 'token')}, {truncation.cut_labels:,} of them trained"
        rows += [
            ("dropped", truncation.no_reply, "nothing in them is trained"),
            ("dropped", truncation.no_room, f"the prompt alone fills {most:,} tokens" if most else ""),
            ("cut", truncation.cut, f"longer than {most:,} tokens; they lose {lost}" if most else ""),
        ]
        dropped = truncation.no_reply + truncation.no_room
        what = f"{count_text(truncation.tokens, 'token')}, {truncation.label_tokens:,} of them trained"
        rows.append(("trained on", survey.items - dropped, what))
    shown = [(name, f"{count:,}", why) for name, count, why in rows if count]
    digits = max((len(count) for _, count, _ in shown), default=0)
    if shown:
        console.out.print(Text("  what becomes of the items:", style="bold"))
    for name, count, why in shown:
        console.out.print(_text(f"      {name:<10}  {count:>{digits}}  {why}"))


def _text(text: str) -> Text:
    return Text(visible(text))
