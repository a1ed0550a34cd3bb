"""What a model writes while it writes: it must not act on a terminal, and a pipe gets it as it is."""

import shutil
from pathlib import Path

import pytest

from llama_acc.core.data.templates import get_template
from llama_acc.core.model.vision_config import TinyVision
from tests.cli.chains import write_chain
from tests.cli.commands import invoke
from tests.cli.terminal import Terminal
from tests.core.data.pictures import write_pictures

# A terminal's title and clipboard are set so; U+009B is two bytes, and two tokens.
_WRITTEN = "a\x1b]0;\x07\x9b\x7f\r\tb\n"
_GREEDY = ("--template", "none", "--temperature", "0")
_SHOWN = "a␛]0;␇<U+009B>␡␍\tb\n"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Path:
    """A model that sees, and says `_WRITTEN` of every image and after ":"."""
    folder = tmp_path_factory.mktemp("hostile")
    shutil.copy(tokenizer_path, folder / "tokenizer.model")
    sees = TinyVision(image_size=16, patch_size=8, width=8, hidden_dim=8, n_layers=1, n_heads=2)
    write_chain(folder, answer=_WRITTEN, after=":", sees=sees)
    (folder / "template.json").write_text(get_template("caption").to_json())
    return folder


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


def test_what_is_told_on_the_side_does_not_act_either() -> None:
    with Terminal("convert-data", "auto", "no\x1b[31m\x9bsuch") as terminal:
        assert terminal.end() == 2
    assert "no␛[31m<U+009B>such" in terminal.seen
    assert "\x9b" not in terminal.seen
