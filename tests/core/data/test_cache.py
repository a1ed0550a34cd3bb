import logging
import os
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
import pytest

from llama_acc.core.data import cache
from llama_acc.core.data.cache import About, Encoded, EntryStore, cache_key
from llama_acc.core.data.encode import Chunk, Encoding, encode_batch, stored_tokens
from llama_acc.core.data.items import Checked, SingleTurn
from llama_acc.core.data.templates import get_template
from llama_acc.core.errors import UserError
from llama_acc.core.tokenizer import Tokenizer, load_tokenizer

ITEMS = [SingleTurn("go", None, "the answer"), SingleTurn("go " * 90, None, "x"), SingleTurn("go", None, "y" * 90)]


def encoded_chunk(items: list[SingleTurn], name: str, tokenizer: Tokenizer, positions: int = 0) -> Chunk:
    batch = [(i, Checked("item", item, [])) for i, item in enumerate(items)]
    return encode_batch(batch, Encoding(get_template(name), 50, positions), tokenizer)


@pytest.fixture
def chunk(tokenizer: Tokenizer) -> Chunk:
    return encoded_chunk(ITEMS, "none", tokenizer)


def writing(*chunks: Chunk) -> cache.Encode:
    """Encodes what is in chunks."""

    def encode(append: Callable[[Chunk], None]) -> About:
        for chunk in chunks:
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


def test_what_is_stored_comes_back_chunk_by_chunk(chunk: Chunk, tokenizer: Tokenizer, llama_acc_home: Path) -> None:
    assert found("k") is None
    later = encoded_chunk([SingleTurn("go", None, "later")], "none", tokenizer)
    with EntryStore() as store:
        store.get("k", writing(chunk, later, chunk), 300)
    loaded = found("k")
    assert loaded is not None
    for name in ("length", "label_count", "item", "cut", "digest"):
        assert loaded.table[name].tolist() == [*chunk.table[name], *later.table[name], *chunk.table[name]]
    for i, row in enumerate(chunk.table):
        for part in (loaded.document(i), loaded.document(i + 3)):
            for stored, given in zip(part, stored_tokens(row, chunk.content, 300), strict=True):
                assert np.array_equal(stored, given)
    assert tokenizer.decode(loaded.document(2)[0]) == "golater"
    about = loaded.about
    assert (about.items, about.kind, about.skipped_rows.tolist(), about.notes) == (
        3,
        "single_turn",
        [1, 7],
        {"a": "note"},
    )
    assert [path.name for path in entries(llama_acc_home)] == ["k.tokens"]


def test_images_stay_with_their_documents(tokenizer: Tokenizer) -> None:
    images: list[tuple[str, ...]] = [("/a/1.png", "/a/ü.jpg"), (), ("/b.tar#512+80",)]
    items = [SingleTurn("", None, "a town", references) for references in images]
    encoded = put(encoded_chunk(items, "caption", tokenizer, 3), "k")
    assert [encoded.images(i) for i in range(3)] == images
    assert encoded.table["images"].tolist() == [2, 0, 1]
    assert encoded.table["length"][0] - encoded.table["length"][1] == 2 * 3


def test_the_key_is_everything_that_decides_the_content(tokenizer: Tokenizer) -> None:
    alpaca, none = get_template("alpaca"), get_template("none")
    other = load_tokenizer(tokenizer.path)
    other.fingerprint = lambda: "other"  # type: ignore[method-assign]
    keys = [
        cache_key("x", tokenizer, [alpaca], ".json", 10),
        cache_key("y", tokenizer, [alpaca], ".json", 10),
        cache_key("x", other, [alpaca], ".json", 10),
        cache_key("x", tokenizer, [none], ".json", 10),
        cache_key("x", tokenizer, [alpaca, none], ".json", 10),
        cache_key("x", tokenizer, [alpaca.model_copy(update={"eos": False})], ".json", 10),
        cache_key("x", tokenizer, [alpaca], ".json", 11),
        cache_key("x", tokenizer, [alpaca], ".json", None),
    ]
    assert len(set(keys)) == len(keys)
    assert keys[0] == cache_key("x", load_tokenizer(tokenizer.path), [alpaca], ".json", 10)


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
        paths = {entry.path for entry in threads.map(get, range(3))}
    assert (len(written), len(paths)) == (1, 1)


def limit(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    monkeypatch.setenv("LLAMA_ACC_CACHE_GIB", str(size / 2**30))


def test_the_entries_unused_for_longest_go_first_and_none_in_use(
    chunk: Chunk, llama_acc_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped = {}
    for age, key in enumerate(["mapped", "found", "older", "newer"]):
        mapped[key] = put(chunk, key)
        os.utime(llama_acc_home / f"cache/tokens/{key}.tokens", (1000 + age, 1000 + age))
    in_use = mapped.pop("mapped")
    mapped.clear()
    assert found("found") is not None
    limit(monkeypatch, 4.5 * entries(llama_acc_home)[0].stat().st_size)
    put(chunk, "last")
    assert [path.stem for path in entries(llama_acc_home)] == ["found", "last", "mapped", "newer"]
    del in_use
    put(chunk, "very last")
    assert [path.stem for path in entries(llama_acc_home)] == ["found", "last", "newer", "very last"]


def test_an_entry_that_is_deleted_stays_whole_where_it_is_mapped(chunk: Chunk, llama_acc_home: Path) -> None:
    encoded = put(chunk, "k")
    entries(llama_acc_home)[0].unlink()
    encoded.release()
    assert encoded.table.tolist() == chunk.table.tolist()


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.parametrize("size", [0, 1])
def test_what_the_cache_does_not_take_is_mapped_all_the_same(
    size: int, chunk: Chunk, llama_acc_home: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = put(chunk, "kept")
    limit(monkeypatch, size)
    with EntryStore() as store:
        encoded = store.get("a", writing(chunk), 300)
        assert store.get("a", writing(), 300).path == encoded.path  # not encoded twice
    assert encoded.table.tolist() == chunk.table.tolist() == kept.table.tolist()
    assert [path.stem for path in entries(llama_acc_home)] == ["kept"]
    assert list(temporary.iterdir()) == []
    if not size:
        assert found("kept") is None


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


def fill_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk that a folder is on is full from now on."""

    def full(file: IO[bytes]) -> None:
        if file.writable() and Path(file.name).is_relative_to(folder):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "_share", full)


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
    fill_up(Path("/"), monkeypatch)
    with pytest.raises(UserError, match=r"No space left on device\n.*TMPDIR"):
        put(chunk, "a")
    assert list(temporary.iterdir()) == []


def test_what_killed_runs_left_goes_and_what_others_write_stays(
    chunk: Chunk, llama_acc_home: Path, temporary: Path
) -> None:
    put(chunk, "a")
    left = llama_acc_home / "cache/tokens/.left.part"
    left.write_bytes(b"left")

    def while_another_writes(append: Callable[[Chunk], None]) -> About:
        put(chunk, "c")
        return writing(chunk)(append)

    with EntryStore() as store:
        store.get("b", while_another_writes, 300)
        own = store.own_folder
        assert own.parent == temporary
    assert [path for path in (left, own) if path.exists()] == []
    assert [path.stem for path in entries(llama_acc_home)] == ["a", "b", "c"]


@pytest.mark.parametrize("size", [0, 2**30])
def test_a_file_that_failed_is_no_entry_of_the_same_run(
    size: int, chunk: Chunk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(append: Callable[[Chunk], None]) -> About:
        append(chunk)
        raise UserError("wrong data")

    limit(monkeypatch, size)
    with EntryStore() as store:
        with pytest.raises(UserError, match="wrong data"):
            store.get("k", encode, 300)
        assert store.find("k") is None
