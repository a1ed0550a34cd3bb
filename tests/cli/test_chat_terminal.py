"""`llama-acc chat` as a person sees it, in a terminal."""

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from llama_acc.cli import chat_terminal, console
from tests.cli.conftest import ANSWER
from tests.cli.terminal import Terminal


def test_an_answer_streams_ctrl_c_stops_it_and_at_the_prompt_it_leaves(talker: Path) -> None:
    flags = ["--template", "none", "--temperature", "0", "--max-new-tokens", "4000"]
    with Terminal("chat", "--ckpt", talker, *flags) as terminal:
        terminal.expect("template: none (asked for). /help lists what else you can type.")
        terminal.expect("an answer ends at </s>")
        terminal.expect("> ")
        terminal.type("who?\n")
        terminal.expect("the the the the")
        terminal.type("\x03")
        terminal.expect("answer cut short; Ctrl-C again at the prompt to leave")
        terminal.expect("> ")
        terminal.type("say:\n")
        terminal.expect(ANSWER)
        terminal.expect("> ")
        terminal.interrupt("stopped by Ctrl-C")
        assert terminal.end() == 130
        assert "Traceback" not in terminal.seen
        assert "\x1b" not in terminal.seen.replace("\x1b[?2004", ""), "but what readline itself says"


def test_ctrl_d_leaves_the_template_of_a_run_is_said_and_no_color_is_no_color(trained_once: Path) -> None:
    with Terminal("chat", "--ckpt", trained_once, "--max-new-tokens", 5, term="xterm", NO_COLOR="1") as terminal:
        terminal.expect("template: alpaca (alpaca, from template.json).")
        terminal.expect("each one stands alone")
        for typed in ("/system be kind\r", "who\r", "\x04"):
            terminal.expect("\x1b[?2004h")
            terminal.type(typed)
        assert terminal.end() == 0
    assert "system: be kind" in terminal.seen
    assert not re.search(r"\x1b\[[\d;]*(3|4|9|10)\dm", terminal.seen)


_PASTED = "who?\nsay:"


def test_a_pasted_text_is_one_question_and_the_terminal_is_handed_back(talker: Path, tmp_path: Path) -> None:
    """Whether the terminal marks a paste (bracketed paste mode of xterm) or not; Alt-Enter breaks a line."""
    kept = tmp_path / "kept.json"
    with Terminal("chat", "--ckpt", talker, "--template", "none", "--temperature", "0", term="xterm") as terminal:
        for typed in (f"\x1b[200~{_PASTED}\x1b[201~\r", f"{_PASTED}\n", _PASTED.replace("\n", "\x1b\r") + "\r"):
            terminal.expect("\x1b[?2004h")
            terminal.type(typed)
            terminal.expect(ANSWER)
        terminal.expect("\x1b[?2004h")
        terminal.type(f"/save {kept}\r")
        terminal.expect("wrote 6 turns")
        terminal.expect("\x1b[?2004h")
        terminal.terminate()
        assert terminal.end() == 143
        assert terminal.echoes(), "the terminal does not show what is typed any more"
    turns = json.loads(kept.read_text(encoding="utf-8"))[0]["conversations"]
    assert [turn["value"] for turn in turns if turn["from"] == "human"] == [_PASTED] * 3


_MARKDOWN = """\
Use **bold** and `code`, the tag <b>, the end of a line
and another line of this paragraph that is longer than forty columns.

## A heading

- an item
- another

```python
if x:
    return 1
```

An entity &#27;[31mred and [a link](https://example.org/x).
"""
_RENDERED = """\
Use bold and code, the tag <b>, the end
of a line
and another line of this paragraph that
is longer than forty columns.

A heading

 • an item
 • another

 if x:
     return 1

An entity �[31mred and a link
(https://example.org/x).
"""


def _rendered(monkeypatch: pytest.MonkeyPatch, size: int, terminal: bool) -> str:
    shown = io.StringIO()
    screen = Console(
        file=shown, width=40, height=10, force_terminal=terminal, color_system="standard" if terminal else None
    )
    monkeypatch.setattr(console, "out", screen)
    monkeypatch.setattr(chat_terminal, "_FRAME", 0.0)
    chat_terminal.stream_markdown(_MARKDOWN[i : i + size] for i in range(0, len(_MARKDOWN), size))
    return shown.getvalue()


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_an_answer_is_rendered_as_markdown_with_lines_that_break_between_words(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = _rendered(monkeypatch, size, terminal=False).splitlines()
    expected = _RENDERED.splitlines()
    # rich centers a heading.
    assert [line.strip() if "heading" in line else line.rstrip() for line in lines] == expected
    drawn = _rendered(monkeypatch, size, terminal=True)
    assert "\x1b[31mred" not in drawn
    assert "\x1b]" not in drawn
