import fcntl
import json
import logging
import os
import struct
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_acc.core.data import cache
from llama_acc.core.data.cache import EntryStore, cache_key
from llama_acc.core.data.encode import Chunk, encode_chunk
from llama_acc.core.data.entry import FORMAT_VERSION, Encoded, EntryWriter
from llama_acc.core.data.items import SingleTurn
from llama_acc.core.data.templates import get_template
from llama_acc.core.errors import UserError
from llama_acc.core.tokenizer import Tokenizer, load_tokenizer

ITEMS = [SingleTurn("go", None, "the answer"), SingleTurn("go " * 90, None, "x"), SingleTurn("go", None, "y" * 90)]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_path)


@pytest.fixture
def chunk(tokenizer: Tokenizer) -> Chunk:
    return encode_chunk(list(enumerate(ITEMS)), get_template("none"), tokenizer, 50)


def put(chunk: Chunk, key: str) -> Encoded:
    """Stores an entry of what is in a chunk, if there is none yet."""

    def write(writer: EntryWriter) -> None:
        writer.append(chunk)
        writer.finish("single_turn", {"a": "note"})

    with EntryStore() as store:
        return store.get(key, write, vocab_size=300)


def test_of_many_that_want_an_entry_one_at_a_time_writes_it_though_each_fails(llama_acc_home: Path) -> None:
    guard, writing, at_once = threading.Lock(), 0, []

    def write(writer: EntryWriter) -> None:
        nonlocal writing
        with guard:
            writing += 1
            at_once.append(writing)
        time.sleep(0.02)  # so that the others come meanwhile
        with guard:
            writing -= 1
        raise UserError("wrong data")

    def want(_: int) -> None:
        for _ in range(5):
            with EntryStore() as store, pytest.raises(UserError, match="wrong data"):
                store.get("k", write, vocab_size=300)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(want, range(4)))
    assert at_once == [1] * 20


def found(key: str) -> Encoded | None:
    with EntryStore() as store:
        return store.find(key)


def entries(home: Path) -> list[Path]:
    return sorted((home / "cache/tokens").iterdir())


def test_what_is_stored_comes_back(chunk: Chunk, llama_acc_home: Path) -> None:
    assert found("k") is None
    put(chunk, "k")
    loaded = found("k")
    assert loaded is not None
    for field in ("tokens", "labelled", "lengths", "label_counts", "item", "cut", "digests"):
        assert np.array_equal(getattr(chunk, field), getattr(loaded, field))
    assert loaded.offsets.tolist() == [0, *np.cumsum(chunk.lengths)]
    assert (loaded.items, loaded.kind, loaded.truncated, loaded.dropped) == (3, "single_turn", 1, 1)
    assert loaded.notes == {"a": "note"}
    assert [path.name for path in entries(llama_acc_home)] == ["k.tokens"]


def test_the_key_is_everything_that_decides_the_content(tokenizer: Tokenizer, tmp_path: Path) -> None:
    alpaca, none = get_template("alpaca"), get_template("none")
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.path.read_bytes() + b"\n\x00")
    other = load_tokenizer(tokenizer.path)
    other.fingerprint = lambda: "other"  # type: ignore[method-assign]
    keys = [
        cache_key("x", ".json", "auto", tokenizer, [alpaca], 10),
        cache_key("y", ".json", "auto", tokenizer, [alpaca], 10),
        cache_key("x", ".jsonl", "auto", tokenizer, [alpaca], 10),
        cache_key("x", ".json", "single_turn", tokenizer, [alpaca], 10),
        cache_key("x", ".json", "auto", other, [alpaca], 10),
        cache_key("x", ".json", "auto", tokenizer, [none], 10),
        cache_key("x", ".json", "auto", tokenizer, [alpaca, none], 10),
        cache_key("x", ".json", "auto", tokenizer, [alpaca.model_copy(update={"eos": False})], 10),
        cache_key("x", ".json", "auto", tokenizer, [alpaca], 11),
    ]
    assert len(set(keys)) == len(keys)
    assert keys[0] == cache_key("x", ".json", "auto", load_tokenizer(tokenizer.path), [alpaca], 10)


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes an entry's footer; the checksum is right again."""
    data = path.read_bytes()
    magic, length, _ = struct.unpack("<8sQI", data[-20:])
    about = json.loads(data[-20 - length : -20])
    change(about)
    footer = json.dumps(about).encode()
    body = data[: -20 - length] + footer
    path.write_bytes(body + struct.pack("<8sQI", magic, len(footer), zlib.crc32(body)))


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "flipped", "parts"])
def test_a_corrupt_entry_counts_as_absent(
    damage: str, chunk: Chunk, llama_acc_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(chunk, "k")
    [path] = entries(llama_acc_home)
    data = path.read_bytes()
    if damage == "parts":
        rewrite(path, lambda about: about["arrays"]["item"].__setitem__(2, 1))
    else:
        half = len(data) // 2
        flipped = data[:half] + bytes([data[half] ^ 0xFF]) + data[half + 1 :]
        path.write_bytes({"empty": b"", "cut": data[:half], "text": b"no archive", "flipped": flipped}[damage])
    with caplog.at_level(logging.WARNING, "llama_acc"):
        assert found("k") is None
    assert "ignoring the token cache's entry" in caplog.text
    put(chunk, "k")
    assert found("k") is not None


def test_an_entry_is_never_unpickled(chunk: Chunk, llama_acc_home: Path) -> None:
    put(chunk, "k")
    [path] = entries(llama_acc_home)
    rewrite(path, lambda about: about["arrays"]["tokens"].__setitem__(0, "|O"))
    assert found("k") is None


def test_a_newer_entry_is_refused_by_name(chunk: Chunk, llama_acc_home: Path) -> None:
    put(chunk, "k")
    [path] = entries(llama_acc_home)
    rewrite(path, lambda about: about.update(format_version=FORMAT_VERSION + 1, arrays={}))
    with pytest.raises(UserError, match=rf"k\.tokens has format_version {FORMAT_VERSION + 1}"):
        found("k")


def test_the_entries_unused_for_longest_go_first(
    chunk: Chunk, llama_acc_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for age, key in enumerate(["used", "older", "newer"]):
        put(chunk, key)
        os.utime(llama_acc_home / f"cache/tokens/{key}.tokens", (1000 + age, 1000 + age))
    assert found("used") is not None
    size = entries(llama_acc_home)[0].stat().st_size
    monkeypatch.setenv("LLAMA_ACC_CACHE_GIB", str(3.5 * size / 2**30))
    put(chunk, "last")
    assert [path.stem for path in entries(llama_acc_home)] == ["last", "newer", "used"]


def test_what_a_killed_run_left_is_cleared_away(chunk: Chunk, llama_acc_home: Path) -> None:
    put(chunk, "a")
    folder = llama_acc_home / "cache/tokens"
    for name, age in ((".old.tmp", 10**9), (".current.tmp", 0), (".left.tmp", 100), (".written.tmp", 100)):
        (folder / name).write_bytes(b"x")
        os.utime(folder / name, (time.time() - age, time.time() - age))
    with (folder / ".written.tmp").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        put(chunk, "b")
    there = [path.name for path in entries(llama_acc_home)]
    assert there == [".current.tmp", ".written.tmp", "a.tokens", "b.tokens"]


def test_no_cache_if_its_size_is_zero(chunk: Chunk, llama_acc_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(chunk, "a")
    monkeypatch.setenv("LLAMA_ACC_CACHE_GIB", "0")
    put(chunk, "b")
    assert found("a") is None
    assert [path.stem for path in entries(llama_acc_home)] == ["a"]


@pytest.mark.parametrize("setting", ["much", "-1", "nan", "inf"])
def test_a_wrong_size_is_an_error(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_ACC_CACHE_GIB", setting)
    with pytest.raises(UserError, match="LLAMA_ACC_CACHE_GIB"):
        found("a")


def test_a_home_that_cannot_be_written_does_not_stop_a_run(
    chunk: Chunk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("LLAMA_ACC_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING, "llama_acc"):
        put(chunk, "a")
        assert found("a") is None
    assert "not keeping encoded data" in caplog.text


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def fill_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk that a folder is on is full from now on."""

    def full(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").resolve().is_relative_to(folder):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.os, "fsync", full)


def test_a_full_disk_leaves_nothing_behind_and_does_not_stop_a_run(
    chunk: Chunk,
    llama_acc_home: Path,
    temporary: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fill_up(llama_acc_home, monkeypatch)
    with caplog.at_level(logging.WARNING, "llama_acc"):
        assert len(put(chunk, "a")) == 2
    assert "No space left on device" in caplog.text
    assert entries(llama_acc_home) == list(temporary.iterdir()) == []


def test_without_room_anywhere_the_error_says_what_to_set(
    chunk: Chunk, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_up(Path("/"), monkeypatch)
    with pytest.raises(UserError, match=r"No space left on device\n.*TMPDIR"):
        put(chunk, "a")
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("gib", ["0", "1e-9"])
def test_what_the_cache_does_not_take_is_mapped_all_the_same(
    gib: str, chunk: Chunk, llama_acc_home: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = put(chunk, "kept")
    monkeypatch.setenv("LLAMA_ACC_CACHE_GIB", gib)
    encoded = put(chunk, "a")
    assert np.array_equal(encoded.tokens, chunk.tokens)
    assert [path.stem for path in entries(llama_acc_home)] == ["kept"]
    assert list(temporary.iterdir()) == []
    assert len(kept) == 2


def test_an_entry_in_use_is_not_pulled_away(
    chunk: Chunk, llama_acc_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = put(chunk, "used")
    put(chunk, "idle")
    size = entries(llama_acc_home)[0].stat().st_size
    os.utime(llama_acc_home / "cache/tokens/used.tokens", (1000, 1000))
    monkeypatch.setenv("LLAMA_ACC_CACHE_GIB", str(2.5 * size / 2**30))
    put(chunk, "new")
    assert [path.stem for path in entries(llama_acc_home)] == ["new", "used"]
    del used
    put(chunk, "newest")
    assert [path.stem for path in entries(llama_acc_home)] == ["new", "newest"]


def test_images_stay_with_their_documents(chunk: Chunk) -> None:
    images = [("/a/1.png", "/a/ü.jpg"), ("/b.tar#512+80",)]
    encoded = put(chunk._replace(images=images), "k")
    assert [encoded.images(i) for i in range(2)] == images
    assert encoded.image_counts.tolist() == [2, 1]
    some = put(chunk._replace(images=[(), ("x",)]), "some")
    assert [some.images(i) for i in range(2)] == [(), ("x",)]
    none = put(chunk, "none")
    assert (none.images(1), none.image_counts.tolist()) == ((), [0, 0])


def test_of_several_that_want_an_entry_one_writes_it_and_the_others_wait(chunk: Chunk) -> None:
    waiting, written = threading.Event(), []

    def write(writer: EntryWriter) -> None:
        assert waiting.wait(60)
        written.append(1)
        writer.append(chunk)
        writer.finish("single_turn", {})

    def get(_: int) -> Encoded:
        with EntryStore() as store:
            return store.get("k", write, 300, waiting.set)

    with ThreadPoolExecutor(3) as threads:
        entries = list(threads.map(get, range(3)))
    assert len(written) == 1
    assert len({entry.path for entry in entries}) == 1


def test_an_entry_that_is_deleted_stays_whole_where_it_is_mapped(chunk: Chunk, llama_acc_home: Path) -> None:
    encoded = put(chunk, "k")
    entries(llama_acc_home)[0].unlink()
    encoded.release()
    assert np.array_equal(encoded.tokens, chunk.tokens)


def test_folders_of_killed_runs_go_and_those_of_others_stay(
    chunk: Chunk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_ACC_CACHE_GIB", "0")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left, foreign = tmp_path / ".llama-acc-run-left", tmp_path / ".run-of-another-program"
    for folder in (left, foreign):
        folder.mkdir()
        (folder / "a.tokens").write_bytes(b"a")
    with EntryStore() as one:
        at_work = one.own_folder()
        assert not left.exists()
        with EntryStore() as other:
            assert other.own_folder() != at_work
            assert at_work.is_dir()
        put_into(one, chunk)
        assert [path.name for path in at_work.iterdir()] == ["k.tokens"]
    assert [path.name for path in tmp_path.iterdir()] == [foreign.name]


def put_into(store: EntryStore, chunk: Chunk) -> None:
    def write(writer: EntryWriter) -> None:
        writer.append(chunk)
        writer.finish("single_turn", {})

    store.get("k", write, vocab_size=300)
