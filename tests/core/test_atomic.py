import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from llama_acc.core.atomic import (
    check_manifest,
    remove_unfinished,
    sha256_of,
    whole_folder,
    write_manifest,
    write_text_whole,
)
from llama_acc.core.errors import UserError


def written(folder: Path, text: str = "text") -> Path:
    with whole_folder(folder) as aside:
        (aside / "state").mkdir()
        (aside / "a.txt").write_text(text)
        (aside / "state" / "b.bin").write_bytes(b"12345")
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_folder_appears_whole_with_a_manifest_of_every_file(tmp_path: Path) -> None:
    folder = tmp_path / "epoch0"
    with whole_folder(folder) as aside:
        (aside / "a.txt").write_text("text")
        assert not folder.exists()
    assert names(tmp_path) == {"epoch0"}
    assert names(folder) == {"a.txt", "manifest.json"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["format_version"] == 1
    assert manifest["files"] == {"a.txt": {"bytes": 4, "sha256": hashlib.sha256(b"text").hexdigest()}}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:

    def write_half() -> None:
        with whole_folder(tmp_path / "epoch0") as aside:
            (aside / "a.txt").write_text("half")
            raise error

    with pytest.raises(error):
        write_half()
    assert names(tmp_path) == set()


def test_an_exception_leaves_the_folder_that_was_there(tmp_path: Path) -> None:
    folder = written(tmp_path / "epoch0", "old")

    def write_half() -> None:
        with whole_folder(folder) as aside:
            (aside / "a.txt").write_text("new")
            raise ValueError("late")

    with pytest.raises(ValueError, match="late"):
        write_half()
    assert (folder / "a.txt").read_text() == "old"
    check_manifest(folder, contents=True)


@pytest.mark.parametrize("there", [False, True], ids=["new", "replaced"])
@pytest.mark.parametrize("failing", ["fsync", "rename"])
def test_a_failure_while_the_folder_takes_its_name_leaves_what_was(
    failing: str, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "epoch0"
    if there:
        written(folder, "old")

    def fail(*arguments: object) -> None:
        raise OSError("failed")

    rename = Path.rename

    def fail_for_the_new(path: Path, target: Path) -> Path:
        return rename(path, target) if target != folder or path.name.endswith("-old") else fail()  # type: ignore[return-value]

    if failing == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(Path, "rename", fail_for_the_new)
    with pytest.raises(OSError, match="failed"):
        written(folder, "new")
    assert names(tmp_path) == ({"epoch0"} if there else set())
    if there:
        assert (folder / "a.txt").read_text() == "old"


def test_a_folder_of_the_same_name_is_replaced_whole(tmp_path: Path) -> None:
    folder = written(tmp_path / "epoch0", "old")
    (folder / "extra").write_text("")
    written(folder, "new")
    assert (folder / "a.txt").read_text() == "new"
    assert names(tmp_path) == {"epoch0"}
    assert names(folder) == {"a.txt", "state", "manifest.json"}


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    written(tmp_path / "epoch0")
    shutil.copytree(tmp_path / "epoch0", tmp_path / ".writing-epoch1")
    (tmp_path / ".hidden").write_text("mine")
    remove_unfinished(tmp_path)
    assert names(tmp_path) == {"epoch0", ".hidden"}


def test_leftovers_do_not_disturb_the_next_writer(tmp_path: Path) -> None:
    (tmp_path / ".writing-epoch0").mkdir()
    (tmp_path / ".writing-epoch0" / "stale").write_text("")
    assert names(written(tmp_path / "epoch0")) == {"a.txt", "state", "manifest.json"}


def test_a_text_is_the_old_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "latest"
    write_text_whole(path, "old")

    def fail(self: Path, target: Path) -> Path:
        assert path.read_text() == "old"
        raise OSError("killed here")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="killed here"):
        write_text_whole(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == {"latest"}
    monkeypatch.undo()
    write_text_whole(path, "new")
    assert path.read_text() == "new"
    assert names(tmp_path) == {"latest"}


def test_whatever_was_done_to_a_folder_its_manifest_tells_all_of_it(tmp_path: Path) -> None:
    folder = written(tmp_path / "epoch0")
    check_manifest(folder, contents=True)
    (folder / "a.txt").unlink()
    (folder / "state" / "b.bin").write_bytes(b"1234")
    with pytest.raises(UserError) as refused:
        check_manifest(folder)
    assert refused.value.message.splitlines() == [
        f"{folder} is damaged:",
        "  a.txt is missing",
        "  state/b.bin has 4 bytes, 5 were written",
    ]


def test_a_change_of_the_same_length_is_found_where_contents_are_read(tmp_path: Path) -> None:
    folder = written(tmp_path / "epoch0")
    (folder / "state" / "b.bin").write_bytes(b"12346")
    check_manifest(folder)
    check_manifest(folder, contents=True, under="a")
    for under in ("", "state/"):
        with pytest.raises(UserError, match=r"state/b\.bin was changed: its SHA-256 is not the one written"):
            check_manifest(folder, contents=True, under=under)


def test_files_beside_what_was_written_do_not_matter(tmp_path: Path) -> None:
    folder = written(tmp_path / "epoch0")
    (folder / "notes.txt").write_text("mine")
    check_manifest(folder, contents=True)


def test_a_folder_without_a_manifest_is_taken_as_it_is(tmp_path: Path) -> None:
    check_manifest(tmp_path, contents=True)


def test_a_newer_format_is_refused_by_name(tmp_path: Path) -> None:
    folder = written(tmp_path / "epoch0")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format_version": 2}))
    with pytest.raises(UserError, match=r"manifest\.json has format_version 2, this program knows up to 1"):
        check_manifest(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"format_version": 1}', '{"format_version": 1, "files": 3}'], ids=str
)
def test_an_unreadable_manifest_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"cannot read .*manifest\.json"):
        check_manifest(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        '{"format_version": "x", "files": {}}',
        '{"format_version": 1, "files": {"a": 3}}',
        '{"format_version": 1, "files": {"a": {}}}',
    ],
    ids=str,
)
def test_a_manifest_of_another_form_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text)
    (tmp_path / "a").write_text("")
    with pytest.raises(UserError, match=r"cannot read .*manifest\.json"):
        check_manifest(tmp_path)


def test_a_checksum_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 3_000_000)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(b"x" * 3_000_000).hexdigest()
    write_manifest(tmp_path)
    check_manifest(tmp_path, contents=True)
