"""Files and folders appear whole or not at all, and a manifest says whether they still are."""

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llama_acc.core.atomic import (
    check_manifest,
    digests_of_written,
    locked,
    remove_folder,
    remove_unfinished,
    whole_folder,
    write_text_whole,
    write_whole,
)
from llama_acc.core.errors import UserError


def written(folder: Path, text: str = "text", error: type[BaseException] | None = None) -> Path:
    with whole_folder(folder) as aside:
        (aside / "state").mkdir()
        (aside / "a.txt").write_text(text)
        (aside / "state" / "b.bin").write_bytes(b"12345")
        if error is not None:
            raise error("late")
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_folder_appears_whole_with_a_manifest_of_every_file(tmp_path: Path) -> None:
    (tmp_path / ".writing-epoch0").mkdir()
    (tmp_path / ".writing-epoch0" / "stale").write_text("of a killed writer")
    with whole_folder(tmp_path / "epoch0") as aside:
        (aside / "a.txt").write_text("text")
        assert not (tmp_path / "epoch0").exists()
    assert names(tmp_path) == {"epoch0"}
    assert names(tmp_path / "epoch0") == {"a.txt", "manifest.json"}
    manifest = json.loads((tmp_path / "epoch0" / "manifest.json").read_text())
    digest = hashlib.sha256(b"text").hexdigest()
    assert manifest == {"format_version": 1, "files": {"a.txt": {"bytes": 4, "sha256": digest}}}


@pytest.mark.parametrize("there", [False, True], ids=["new", "replaced"])
@pytest.mark.parametrize("failing", [ValueError, KeyboardInterrupt, SystemExit, "fsync", "rename"])
def test_a_failure_at_any_moment_leaves_what_was(
    failing: Any, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "epoch0"
    if there:
        written(folder, "old")

    def fail(*arguments: object) -> None:
        raise OSError("late")

    rename = Path.rename

    def fail_for_the_new(path: Path, target: Path) -> Any:
        return rename(path, target) if target != folder or path.name.endswith("-old") else fail()

    if failing == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    if failing == "rename":
        monkeypatch.setattr(Path, "rename", fail_for_the_new)
    with pytest.raises(OSError if isinstance(failing, str) else failing, match="late"):
        written(folder, "new", None if isinstance(failing, str) else failing)
    assert names(tmp_path) == ({"epoch0"} if there else set())
    if there:
        assert (folder / "a.txt").read_text() == "old"
        check_manifest(folder, verify=True)


def test_a_folder_of_the_same_name_is_replaced_whole(tmp_path: Path) -> None:
    (written(tmp_path / "epoch0", "old") / "extra").write_text("")
    assert names(written(tmp_path / "epoch0", "new")) == {"a.txt", "state", "manifest.json"}
    assert names(tmp_path) == {"epoch0"}


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    written(tmp_path / "epoch0")
    shutil.copytree(tmp_path / "epoch0", tmp_path / ".writing-epoch1")
    (tmp_path / ".hidden").write_text("mine")
    remove_unfinished(tmp_path)
    assert names(tmp_path) == {"epoch0", ".hidden"}


def test_a_folder_loses_its_name_before_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(tmp_path / "epoch0")

    def killed(path: Path, ignore_errors: bool) -> None:
        assert not folder.exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_folder(folder)


def test_a_text_is_the_old_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "latest"
    write_text_whole(path, "old")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_text_whole(path, "new")
    assert (path.read_text(), names(tmp_path)) == ("old", {"latest"})
    synced: list[Path] = []
    monkeypatch.setattr("llama_acc.core.atomic.sync", synced.append)
    write_text_whole(path, "new")
    assert [file.name.partition("-latest")[0] for file in synced] == [".writing", tmp_path.name]
    assert (path.read_text(), names(tmp_path)) == ("new", {"latest"})


def test_a_link_in_the_way_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".writing-latest").symlink_to(tmp_path / "mine")
    (tmp_path / "latest").symlink_to(tmp_path / "mine")
    write_text_whole(tmp_path / "latest", "new")
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "latest").is_symlink()


def test_who_finds_a_lock_held_is_asked_once_and_waits(tmp_path: Path) -> None:
    events: list[str] = []
    release = threading.Event()

    def hold() -> None:
        with locked(tmp_path / "lock", lambda: None):
            events.append("held")
            release.wait(10)
            events.append("released")

    thread = threading.Thread(target=hold)
    thread.start()
    while not events:
        time.sleep(0.01)
    with locked(tmp_path / "lock", release.set):
        events.append("mine")
    thread.join()
    assert events == ["held", "released", "mine"]


def test_whatever_was_done_to_a_folder_its_manifest_says_all_of_it(tmp_path: Path) -> None:
    folder = written(tmp_path / "epoch0")
    (folder / "notes.txt").write_text("what lies beside does not matter")
    check_manifest(folder, verify=True)
    (folder / "state" / "b.bin").write_bytes(b"12346")
    check_manifest(folder)
    check_manifest(folder, contents="a")
    with pytest.raises(UserError, match=r"state/b\.bin was changed: its SHA-256 is not the one written"):
        check_manifest(folder, contents="state/")
    (folder / "a.txt").unlink()
    (folder / "state" / "b.bin").write_bytes(b"1234")
    with pytest.raises(UserError) as refused:
        check_manifest(folder)
    lines = [f"{folder} is damaged:", "  a.txt is missing", "  state/b.bin has 4 bytes, 5 were written"]
    assert refused.value.message.splitlines() == lines


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot read"),
        ("[]", "cannot read"),
        ("{}", "cannot read"),
        ('{"format_version": 1, "files": 3}', "cannot read"),
        ('{"format_version": "x", "files": {}}', "cannot read"),
        ('{"format_version": 1, "files": {"a": {}}}', "cannot read"),
        ('{"format_version": 2, "files": {}}', r"manifest\.json has format_version 2, this program knows up to 1"),
    ],
)
def test_a_manifest_of_another_form_is_refused(text: str, said: str, tmp_path: Path) -> None:
    check_manifest(tmp_path, contents="")  # without one, a folder is taken as it is
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=said):
        check_manifest(tmp_path)


def test_what_a_killed_writer_left_a_day_ago_goes_when_the_file_is_written_again(tmp_path: Path) -> None:
    old, recent, other = (tmp_path / f".writing-{name}" for name in ("a.json-0", "a.json-1", "b.json-0"))
    for path in (old, recent, other):
        path.touch()
    for path in (old, other):
        os.utime(path, (0, 0))
    write_whole(tmp_path / "a.json", b"new")
    assert sorted(path.name for path in tmp_path.iterdir()) == [recent.name, other.name, "a.json"]


def test_checksums_of_files_that_grow_are_those_of_the_whole_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama_acc.core.atomic._HASHED_AT_ONCE", 1000)
    whole = {"one": bytes(range(256)) * 40, "two": b"12345" * 1000, "none": b""}

    def written() -> Iterator[tuple[Path, int]]:
        for start in range(0, 12000, 3001):
            for name, content in whole.items():
                with (tmp_path / name).open("ab") as file:
                    file.write(content[start : start + 3001])
                yield tmp_path / name, min(start + 2000, (tmp_path / name).stat().st_size)
        yield from ((tmp_path / name, len(content)) for name, content in whole.items())

    expected = {name: hashlib.sha256(content).hexdigest() for name, content in whole.items()}
    assert digests_of_written(written()) == expected
