"""What the user names is opened without hanging, and small files are read within bounds."""

import json
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from llama_acc.core import input_files
from llama_acc.core.errors import UserError
from llama_acc.core.input_files import open_input, read_bytes, read_json, read_object, read_yaml

DEEP = "[" * 101 + "]" * 101


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silent pipes are given up at once."""
    monkeypatch.setattr(input_files, "PIPE_NOTE_SECONDS", 0.01)
    monkeypatch.setattr(input_files, "PIPE_LIMIT_SECONDS", 0.02)


@pytest.mark.parametrize("value", [{"a": [1, None, "é"], "big": 10**30}, [], 1.5, "x"])
def test_a_small_file_means_what_json_and_yaml_say(tmp_path: Path, value: object) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(value).encode())
    assert read_json(path) == value
    path.write_text(yaml.safe_dump(value))
    assert read_yaml(path) == value


@pytest.mark.parametrize(
    ("read", "text", "said"),
    [
        (read_json, '{"a": 1,\n "b": }', "it is not JSON: line 2, column 7: Expecting value"),
        (read_json, DEEP, "nested more than 100 deep"),
        (read_json, "[" * 1200 + "]" * 1200, "nested more than 100 deep"),
        (read_json, '{"dim": 1%s}' % ("0" * 41), "a whole number of more than 40 digits"),
        (read_json, '{"dim": %s}' % ("9" * 5000), "4300 digits"),
        (read_object, "[1]", "must hold a JSON object"),
        (read_yaml, "a: [", "it is not YAML: while parsing"),
        (read_yaml, DEEP, "nested more than 100 deep"),
        (read_yaml, "[" * 1200 + "]" * 1200, "nested more than 100 deep"),
        (read_yaml, "a: &a [*a]", "nested more than 100 deep"),
        (read_yaml, "a: 2001-13-40", "month must be in 1..12"),
        (read_yaml, "a: 0x" + "9" * 5000, "a whole number of more than 40 digits"),
    ],
)
def test_what_no_settings_hold_is_refused(tmp_path: Path, read: Callable[[Path], Any], text: str, said: str) -> None:
    path = tmp_path / "settings"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value).startswith(f"cannot read {path}: ")
    assert said in str(caught.value)


def test_what_aliases_stand_for_counts_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_files, "MAX_VALUES", 100)
    path = tmp_path / "a.yaml"
    path.write_text("a: &a [1, 2, 3, 4, 5]\nb: &b [*a, *a, *a, *a]\nc: [*b, *b, *b, *b]\n")  # 5 + 4 x 6 + 4 x 25
    with pytest.raises(UserError, match="more than 100 values"):
        read_yaml(path)


def test_a_file_of_another_kind_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match="longer than 64 MiB"):
        read_json(path)


@pytest.mark.usefixtures("impatient")
def test_only_files_and_pipes_that_deliver_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        for name, said in {
            "socket": "a socket or a device",
            ".": "a folder",
            "/dev/zero": "a socket or a device",
            "none": "No such file",
            "a\0b": "null",
            "n" * 256: "too long",
            "pipe": "nothing was written to this pipe for 0.02 s",
        }.items():
            with pytest.raises(UserError, match=said):
                read_bytes(Path(name))
    assert "waiting for something to be written to the pipe pipe" in caplog.text
    with pytest.raises(OSError, match="has to be a file"):
        open_input(Path("pipe"), pipes=False)

    content = os.urandom(300_000)  # more than a pipe holds at a time
    monkeypatch.setattr(input_files, "PIPE_NOTE_SECONDS", 60)
    writer = threading.Thread(target=Path("pipe").write_bytes, args=[content])
    writer.start()
    assert read_bytes(Path("pipe")) == content
    writer.join()
