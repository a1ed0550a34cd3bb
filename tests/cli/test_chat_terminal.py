"""`llama-acc chat` as a person sees it, in a terminal."""

import io
import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from llama_acc.cli import chat_terminal, console
from llama_acc.core.errors import UserError
from tests.cli.chains import write_chain
from tests.cli.commands import PATIENCE, complete, gone, invoke, refused, start, workers_of
from tests.cli.conftest import ANSWER
from tests.cli.terminal import Terminal
from tests.core.checkpoint.folders import GROUPED, state, write_consolidated
from tests.core.data.pictures import write_pictures


def test_an_answer_streams_ctrl_c_stops_it_and_at_the_prompt_it_leaves(talker: Path) -> None:
    flags = ["--template", "none", "--temperature", "0", "--max-new-tokens", "4000"]
    with Terminal("chat", "--ckpt", talker, *flags) as terminal:
        terminal.expect("template: none (asked for). /help lists what else you can type.")
        terminal.expect("an answer ends at </s>")
        terminal.expect("> ")
        terminal.type("who?\n")
        terminal.expect("the the the the")
        terminal.type("\x03")
        terminal.expect("cut short; Ctrl-C again at the prompt to leave")
        terminal.expect("> ")
        terminal.type("say:\n")
        terminal.expect(ANSWER)
        terminal.expect("> ")
        terminal.interrupt("stopped by Ctrl-C")
        assert terminal.end() == 130
        assert "Traceback" not in terminal.seen
        assert "\x1b" not in terminal.seen.replace("\x1b[?2004", ""), "but what readline itself says"


def test_ctrl_c_stops_an_answer_that_is_drawn_and_what_was_typed_meanwhile_is_not_drawn_into_it(
    talker: Path, tmp_path: Path
) -> None:
    endless = {"endless": " the", "endless_after": ":", "max_seq_len": 4096}
    write_chain(tmp_path, talker / "tokenizer.model", answer=" a town", after="?", **endless)
    flags = ["--template", "dialogue", "--temperature", "0", "--max-new-tokens", "4000"]
    with Terminal("chat", "--ckpt", tmp_path, *flags, term="xterm") as terminal:
        for _ in range(2):
            terminal.expect("context")
            terminal.type("hello\r")
            terminal.expect("the the")
            assert not terminal.echoes()
            terminal.type("\x03")
            terminal.expect("cut short; Ctrl-C again at the prompt to leave")
            terminal.expect("\x1b[?2004h")
        terminal.interrupt("stopped by Ctrl-C")
        assert terminal.end() == 130


_PASTED = "who?\nsay:"


def test_a_pasted_text_is_one_question_and_the_terminal_is_handed_back(talker: Path, tmp_path: Path) -> None:
    """Whether the terminal marks a paste (bracketed paste mode of xterm) or not; Alt-Enter breaks a line."""
    kept = tmp_path / "kept.json"
    with Terminal("chat", "--ckpt", talker, "--template", "none", "--temperature", "0", term="xterm") as terminal:
        for typed in (f"\x1b[200~{_PASTED}\x1b[201~\r", f"{_PASTED}\n", _PASTED.replace("\n", "\x1b\r") + "\r"):
            terminal.ask(typed)
            terminal.expect(ANSWER)
        terminal.ask(f"/save {kept}\r")
        terminal.expect("wrote 6 turns")
        terminal.expect("\x1b[?2004h")
        terminal.terminate()
        assert terminal.end() == 143
        assert terminal.echoes(), "the terminal does not show what is typed any more"
    turns = json.loads(kept.read_text(encoding="utf-8"))[0]["conversations"]
    assert [turn["value"] for turn in turns if turn["from"] == "human"] == [_PASTED] * 3


def test_the_last_question_comes_back_to_be_edited_above_a_line_that_says_how_full_the_context_is(
    talker: Path, tmp_path: Path
) -> None:
    """Ctrl-C clears what is typed, on forty columns without color."""
    kept, flags = tmp_path / "kept.json", ["--template", "dialogue", "--temperature", "0"]
    with Terminal("chat", "--ckpt", talker, *flags, term="xterm", columns=40, NO_COLOR="1") as terminal:
        terminal.expect("context 0 of 4,096")
        terminal.type("hello\r")
        terminal.expect(ANSWER)
        terminal.expect("\x1b[?2004h")
        assert re.search(r"\d tokens/s, context \d{2,3}$", terminal.expect(" of 4,096"))
        terminal.type("/edit\r")
        terminal.expect("\x1b[?2004h")
        terminal.expect("hello")
        terminal.type(" there\r")
        terminal.expect(ANSWER)
        terminal.ask("not this")
        terminal.expect("this")
        terminal.type(f"\x03/save {kept}\r")
        terminal.expect("wrote 2 turns")
        terminal.ask("\x04")
        assert terminal.end() == 0
    assert [turn["value"] for turn in json.loads(kept.read_text())[0]["conversations"]] == ["hello there", ANSWER]


def test_questions_are_kept_for_the_next_time_only_where_it_is_said_and_for_the_user_alone(
    trained_once: Path, talker: Path, tmp_path: Path
) -> None:
    """The template of a run is said, Ctrl-D leaves, and no color is no color."""
    history = tmp_path / "history"
    kept = ("--history", history)
    with Terminal("chat", "--ckpt", trained_once, "--max-new-tokens", 5, *kept, term="xterm", NO_COLOR="1") as terminal:
        terminal.expect("template: alpaca (alpaca, from template.json).")
        terminal.expect("each one stands alone")
        for typed in ("/system be kind\r", "say:\r", "\x04"):
            terminal.ask(typed)
        assert terminal.end() == 0
    assert "system: be kind" in terminal.seen
    assert not re.search(r"\x1b\[[\d;]*(3|4|9|10)\dm", terminal.seen)
    flags = ("--template", "none", "--temperature", "0")
    with Terminal("chat", "--ckpt", talker, *flags, *kept, term="xterm") as terminal:
        terminal.expect("context 0 of")
        terminal.type("\x1b[A\r")  # the arrow up
        terminal.expect(ANSWER)
        terminal.expect("tokens/s")
        terminal.type("\x04")
        assert terminal.end() == 0
    assert history.stat().st_mode & 0o777 == 0o600
    assert history.read_text().count("+say:") == 1
    refused(invoke("chat", "--ckpt", talker, "--history", history, "--prompt", "x"), "--history keeps what is typed")
    with pytest.raises(UserError, match=f"cannot write {tmp_path}: Is a directory"):
        chat_terminal.question_reader(str, tmp_path)


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


class _Writes(io.StringIO):
    """What was written at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[str] = []

    def write(self, text: str) -> int:
        self.all.append(text)
        return super().write(text)


def _rendered(monkeypatch: pytest.MonkeyPatch, size: int, terminal: bool) -> list[str]:
    shown = _Writes()
    colors = "standard" if terminal else None
    screen = Console(file=shown, width=40, height=20, force_terminal=terminal, color_system=colors, soft_wrap=True)
    monkeypatch.setattr(console, "out", screen)
    monkeypatch.setattr(chat_terminal, "_FRAME", 0.0)
    monkeypatch.setattr(chat_terminal, "_SHARE_OF_TIME", 1e9)
    pieces = (_MARKDOWN[i : i + size] for i in range(0, len(_MARKDOWN), size))
    chat_terminal.stream_markdown(pieces, lambda: "9 tokens/s")
    return shown.all


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_an_answer_is_rendered_as_markdown_with_lines_that_break_between_words(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "".join(_rendered(monkeypatch, size, terminal=False)).splitlines()
    expected = _RENDERED.splitlines()
    # rich centers a heading.
    assert [line.strip() if "heading" in line else line.rstrip() for line in lines] == expected
    writes = _rendered(monkeypatch, size, terminal=True)
    drawn = "".join(writes)
    assert "\x1b[31mred" not in drawn
    assert "\x1b]" not in drawn
    *frames, last, nothing = writes
    assert len(frames) >= min(len(_MARKDOWN) // size, 2)
    assert all("9 tokens/s" in frame for frame in frames[2:] if "\x1b[2K" in frame), "what is erased is drawn at once"
    assert "An entity" in last
    if size == 1:
        assert sum("\nis longer than" in frame for frame in frames) > 10, "lines are broken from the first on"
    assert not re.sub(r"\x1b\[[\d?]*[A-Za-z]|\s", "", nothing)


# Several processes share a model, and only rank 0 is seen


GREEDY = ("--device", "cpu", "--temperature", "0", "--max-new-tokens", "16")


@pytest.fixture
def of_eight(tmp_path: Path, tokenizer_path: Path) -> Path:
    """A random model, saved at model-parallel size 8."""
    folder = write_consolidated(tmp_path / "of-eight", state(), 8, replace(GROUPED, max_seq_len=512))
    shutil.copy(tokenizer_path, folder)
    return folder


@pytest.mark.parametrize(
    ("processes", "number", "code"),
    [(2, signal.SIGINT, 130), pytest.param(4, signal.SIGKILL, 1, marks=pytest.mark.soak)],
)
def test_ranks_say_the_same_from_the_files_of_eight_until_ctrl_c_or_a_dead_rank_ends_all(
    processes: int, number: signal.Signals, code: int, of_eight: Path
) -> None:
    """It comes while the next question is awaited."""
    talk = "hello\nand then?\n/reset\nhello\n"
    words = ("chat", "--ckpt", of_eight, "--template", "dialogue", *GREEDY)
    alone = complete(*words, input=talk)
    assert len(alone.stdout) >= 3 * 8
    job = start(*words, "--nproc", processes)
    assert job.stdin is not None
    assert job.stdout is not None
    job.stdin.write(talk)
    job.stdin.flush()
    assert job.stdout.read(len(alone.stdout)) == alone.stdout
    workers = workers_of(job)
    assert sorted(workers) == list(range(processes))
    if number == signal.SIGINT:
        job.send_signal(number)
    else:
        os.kill(workers[1], number)
    _, err = job.communicate(timeout=PATIENCE)
    assert job.returncode == code, err
    assert gone(list(workers.values()))
    assert ("rank 1 was killed by SIGKILL" in err) == (number == signal.SIGKILL)


def test_on_a_terminal_ctrl_c_stops_the_answer_of_all_ranks_and_they_answer_the_next_question(of_eight: Path) -> None:
    """And in an empty line it leaves."""
    flags = ("--template", "dialogue", "--device", "cpu", "--temperature", "0", "--max-new-tokens", "400")
    with Terminal("chat", "--ckpt", of_eight, *flags, "--nproc", 2, term="xterm") as terminal:
        for question in ("hello\r", "/retry\r"):
            terminal.ask(question)
            terminal.expect("\x1b[?2004l")
            terminal.expect("tokens/s")
            assert not terminal.echoes()
            terminal.type("\x03")
        terminal.expect("\x1b[?2004h")
        terminal.expect("tokens/s")
        terminal.type("\x03")
        assert terminal.end() == 0
        assert terminal.echoes()
    assert "context 512 of" not in terminal.seen, "as far as it would have gone"


# What a model writes must not act on a terminal, and a pipe gets it as it is


# A terminal's title and clipboard are set so; U+009B is two bytes, and two tokens.
_WRITTEN = "a\x1b]0;\x07\x9b\x7f\r\tb\n"
_GREEDY = ("--template", "none", "--temperature", "0")
_SHOWN = "a␛]0;␇<U+009B>␡␍\tb\n"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Path:
    """A model that sees, and says `_WRITTEN` of every image and after ":"."""
    return write_chain(tmp_path_factory.mktemp("hostile"), tokenizer_path, answer=_WRITTEN, after=":", captions=True)


def test_a_terminal_is_shown_control_characters_and_a_pipe_gets_them(hostile: Path, tmp_path: Path) -> None:
    chat, caption = ["chat", "--ckpt", hostile, *_GREEDY, "--prompt", "say:"], ["caption", "--ckpt", hostile]
    caption += write_pictures(tmp_path, 1)
    for question in (chat, caption):
        assert invoke(*question).stdout == f"{_WRITTEN}\n"
    with Terminal(*caption) as terminal:
        assert terminal.end() == 0
    # A slow machine says that it is loading.
    assert terminal.seen.removeprefix("loading the model\r\n") == f"{_SHOWN}\n".replace("\n", "\r\n")


def test_a_conversation_shows_them_too_and_keeps_them_as_they_are(hostile: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    with Terminal("chat", "--ckpt", hostile, *_GREEDY) as terminal:
        terminal.expect("> ")
        terminal.type("say:\n")
        terminal.expect(_SHOWN.replace("\n", "\r\n"))
        terminal.expect("> ")
        terminal.type(f"/save {kept}\n")
        terminal.expect("wrote 2 turns")
        terminal.expect("> ")
        terminal.type("\x04")
        assert terminal.end() == 0
        assert "\x1b" not in terminal.seen.replace("\x1b[?2004", "")  # what readline itself says
    assert r"a\u001b]0;\u0007" in kept.read_text(encoding="utf-8")
