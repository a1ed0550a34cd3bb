import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from llama_acc.core.data import cache
from llama_acc.core.data.cache import About, Encoded, EntryStore, cache_key, load_published, publish_to_local_ranks
from llama_acc.core.data.encode import Chunk, encode_chunk, stored_tokens
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


def writing(chunk: Chunk) -> cache.Encode:
    """Encodes what is in a chunk."""

    def encode(append: Callable[[Chunk], None]) -> About:
        append(chunk)
        return About(3, "single_turn", np.array([1, 7]), {"a": "note"})

    return encode


def put(chunk: Chunk, key: str) -> Encoded:
    """Stores an entry of what is in a chunk, if there is none yet."""
    with EntryStore() as store:
        return store.get(key, writing(chunk), 300)


def found(key: str) -> Encoded | None:
    with EntryStore() as store:
        return store.find(key)


def entries(home: Path) -> list[Path]:
    return sorted((home / "cache/tokens").glob("[!.]*"))


def test_of_many_that_want_an_entry_one_at_a_time_writes_it_though_each_fails(llama_acc_home: Path) -> None:
    guard, writing, at_once = threading.Lock(), 0, []

    def encode(append: Callable[[Chunk], None]) -> About:
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
                store.get("k", encode, 300)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(want, range(4)))
    assert at_once == [1] * 20


def test_what_is_stored_comes_back(chunk: Chunk, llama_acc_home: Path) -> None:
    assert found("k") is None
    put(chunk, "k")
    loaded = found("k")
    assert loaded is not None
    assert loaded.table.tolist() == chunk.table.tolist()
    for i, row in enumerate(chunk.table):
        for stored, given in zip(loaded.document(i), stored_tokens(row, chunk.content, loaded.token_type), strict=True):
            assert np.array_equal(stored, given)
    assert (loaded.items, loaded.kind, loaded.skipped_rows.tolist()) == (3, "single_turn", [1, 7])
    assert loaded.notes == {"a": "note"}
    assert [path.name for path in entries(llama_acc_home)] == ["k.tokens"]


def test_chunks_stand_one_behind_the_other(chunk: Chunk, tokenizer: Tokenizer) -> None:
    later = encode_chunk([(9, SingleTurn("go", None, "later"))], get_template("none"), tokenizer, 50)

    def encode(append: Callable[[Chunk], None]) -> About:
        for part in (chunk, later, chunk):
            append(part)
        return About(7, "single_turn", np.zeros(0), {})

    with EntryStore() as store:
        encoded = store.get("k", encode, 300)
    assert len(encoded) == 5
    texts = [tokenizer.decode(encoded.document(i)[0]) for i in (0, 2, 3)]
    assert texts == ["gothe answer", "golater", "gothe answer"]


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


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "flipped"])
def test_a_corrupt_entry_counts_as_absent(
    damage: str, chunk: Chunk, llama_acc_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(chunk, "k")
    [path] = entries(llama_acc_home)
    data = path.read_bytes()
    half = len(data) // 2
    flipped = data[:half] + bytes([data[half] ^ 0xFF]) + data[half + 1 :]
    path.write_bytes({"empty": b"", "cut": data[:half], "text": b"no archive", "flipped": flipped}[damage])
    with caplog.at_level(logging.WARNING, "llama_acc"):
        assert found("k") is None
    assert "ignoring the token cache's entry" in caplog.text
    put(chunk, "k")
    assert found("k") is not None


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
    assert encoded.table.tolist() == chunk.table.tolist()
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


def test_images_stay_with_their_documents(tokenizer: Tokenizer) -> None:
    images: list[tuple[str, ...]] = [("/a/1.png", "/a/ü.jpg"), (), ("/b.tar#512+80",)]
    items = [SingleTurn("", None, "a town", references) for references in images]
    encoded = put(encode_chunk(list(enumerate(items)), get_template("caption"), tokenizer, 50, 3), "k")
    assert [encoded.images(i) for i in range(3)] == images
    assert encoded.table["images"].tolist() == [2, 0, 1]
    assert encoded.table["length"][0] - encoded.table["length"][1] == 2 * 3


def test_of_several_that_want_an_entry_one_writes_it_and_the_others_wait(chunk: Chunk) -> None:
    waiting, written = threading.Event(), []

    def encode(append: Callable[[Chunk], None]) -> About:
        assert waiting.wait(60)
        written.append(1)
        return writing(chunk)(append)

    def get(_: int) -> Encoded:
        with EntryStore() as store:
            return store.get("k", encode, 300, waiting.set)

    with ThreadPoolExecutor(3) as threads:
        entries = list(threads.map(get, range(3)))
    assert len(written) == 1
    assert len({entry.path for entry in entries}) == 1


def test_an_entry_that_is_deleted_stays_whole_where_it_is_mapped(chunk: Chunk, llama_acc_home: Path) -> None:
    encoded = put(chunk, "k")
    entries(llama_acc_home)[0].unlink()
    encoded.release()
    assert encoded.table.tolist() == chunk.table.tolist()


@pytest.mark.parametrize("gib", ["0", "1"])
def test_folders_of_killed_runs_go_and_those_of_others_stay(
    gib: str, chunk: Chunk, tmp_path: Path, llama_acc_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_ACC_CACHE_GIB", gib)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    parent = tmp_path / "temporary" if gib == "0" else llama_acc_home / "cache/tokens"
    left, foreign = parent / ".llama-acc-run-left", parent / ".run-of-another-program"
    for folder in (left, foreign):
        folder.mkdir(parents=True)
        (folder / "a.tokens").write_bytes(b"a")
    with EntryStore() as one:
        at_work = one.own_folder()
        assert (at_work.parent, left.exists()) == (parent, False)
        with EntryStore() as other:
            assert other.own_folder() != at_work
            assert at_work.is_dir()
        one.get("k", writing(chunk), 300)
        assert [path.name for path in at_work.iterdir()] == (["k.tokens"] if gib == "0" else [])
    assert sorted(path.name for path in parent.iterdir() if path.is_dir()) == [foreign.name]


def test_a_file_that_failed_is_no_entry_of_the_same_run(chunk: Chunk, monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(append: Callable[[Chunk], None]) -> About:
        append(chunk)
        raise UserError("wrong data")

    for gib in ("0", "1"):
        monkeypatch.setenv("LLAMA_ACC_CACHE_GIB", gib)
        with EntryStore() as store:
            with pytest.raises(UserError, match="wrong data"):
                store.get("k", encode, 300)
            assert store.find("k") is None


def test_what_is_published_is_mapped_by_the_others_and_outlives_its_folder(chunk: Chunk, tmp_path: Path) -> None:
    entry, numbers = put(chunk, "k"), np.arange(1 << 16)
    publish_to_local_ranks({"entry": entry, "numbers": numbers, "none": np.zeros(0)}, tmp_path)
    loaded = load_published(tmp_path)
    for path in tmp_path.iterdir():
        path.unlink()
    assert np.array_equal(loaded["numbers"], numbers)
    assert not loaded["numbers"].flags.writeable
    assert (len(loaded["none"]), loaded["entry"].path) == (0, entry.path)
    assert loaded["entry"].table.tolist() == chunk.table.tolist()
