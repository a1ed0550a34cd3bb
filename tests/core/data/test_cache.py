import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest

from llama_acc.core.data import cache
from llama_acc.core.data.cache import cache_key, load_cached, store
from llama_acc.core.data.encode import Encoded, encode_items
from llama_acc.core.data.items import SingleTurn
from llama_acc.core.data.templates import get_template
from llama_acc.core.errors import UserError
from llama_acc.core.tokenizer import Tokenizer, load_tokenizer

FIELDS = ("tokens", "labelled", "offsets", "item", "cut")


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_path)


@pytest.fixture
def encoded(tokenizer: Tokenizer) -> Encoded:
    items = [SingleTurn("go", None, "the answer"), SingleTurn("go " * 90, None, "x"), SingleTurn("go", None, "y" * 90)]
    return encode_items(items, get_template("none"), tokenizer, 50)


def entries(home: Path) -> list[Path]:
    return sorted((home / "cache/tokens").iterdir())


def test_what_is_stored_comes_back(encoded: Encoded, llama_acc_home: Path) -> None:
    assert load_cached("k") is None
    store("k", encoded)
    loaded = load_cached("k")
    assert loaded is not None
    for field in FIELDS:
        ours, theirs = getattr(encoded, field), getattr(loaded, field)
        assert np.array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype
    assert (loaded.items, loaded.kind, loaded.truncated, loaded.dropped) == (3, "single_turn", 1, 1)
    assert [path.name for path in entries(llama_acc_home)] == ["k.npz"]


def test_the_key_is_everything_that_decides_the_content(tokenizer: Tokenizer, tmp_path: Path) -> None:
    alpaca, none = get_template("alpaca"), get_template("none")
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.path.read_bytes() + b"\n\x00")
    other = load_tokenizer(tokenizer.path)
    other.fingerprint = lambda: "other"  # type: ignore[method-assign]
    keys = [
        cache_key(b"x", ".json", "auto", tokenizer, [alpaca], 10),
        cache_key(b"y", ".json", "auto", tokenizer, [alpaca], 10),
        cache_key(b"x", ".jsonl", "auto", tokenizer, [alpaca], 10),
        cache_key(b"x", ".json", "single_turn", tokenizer, [alpaca], 10),
        cache_key(b"x", ".json", "auto", other, [alpaca], 10),
        cache_key(b"x", ".json", "auto", tokenizer, [none], 10),
        cache_key(b"x", ".json", "auto", tokenizer, [alpaca, none], 10),
        cache_key(b"x", ".json", "auto", tokenizer, [alpaca.model_copy(update={"eos": False})], 10),
        cache_key(b"x", ".json", "auto", tokenizer, [alpaca], 11),
    ]
    assert len(set(keys)) == len(keys)
    assert keys[0] == cache_key(b"x", ".json", "auto", load_tokenizer(tokenizer.path), [alpaca], 10)


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "flipped", "parts"])
def test_a_corrupt_entry_counts_as_absent(
    damage: str, encoded: Encoded, llama_acc_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store("k", encoded)
    [path] = entries(llama_acc_home)
    data = path.read_bytes()
    if damage == "parts":
        with np.load(path) as entry:
            np.savez(path, **{**entry, "item": entry["item"][:1]})
    else:
        half = len(data) // 2
        flipped = data[:half] + bytes([data[half] ^ 0xFF]) + data[half + 1 :]
        path.write_bytes({"empty": b"", "cut": data[:half], "text": b"no archive", "flipped": flipped}[damage])
    with caplog.at_level(logging.WARNING, "llama_acc"):
        assert load_cached("k") is None
    assert "ignoring the token cache's entry" in caplog.text
    store("k", encoded)
    assert load_cached("k") is not None


def test_an_entry_is_never_unpickled(encoded: Encoded, llama_acc_home: Path) -> None:
    store("k", encoded)
    [path] = entries(llama_acc_home)
    with np.load(path) as entry:
        parts = {**entry, "tokens": np.array([{"an": "object"}], dtype=object)}
    np.savez(path, **parts)
    assert load_cached("k") is None


def test_a_newer_entry_is_refused_by_name(encoded: Encoded, llama_acc_home: Path) -> None:
    store("k", encoded)
    [path] = entries(llama_acc_home)
    about = {"format_version": 2, "something": "new"}
    np.savez(path, about=np.frombuffer(json.dumps(about).encode(), dtype=np.uint8))
    with pytest.raises(UserError, match=r"k\.npz has format_version 2"):
        load_cached("k")


def test_the_entries_unused_for_longest_go_first(
    encoded: Encoded, llama_acc_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for age, key in enumerate(["used", "older", "newer"]):
        store(key, encoded)
        os.utime(llama_acc_home / f"cache/tokens/{key}.npz", (1000 + age, 1000 + age))
    assert load_cached("used") is not None
    size = entries(llama_acc_home)[0].stat().st_size
    monkeypatch.setenv("LLAMA_ACC_CACHE_GIB", str(3.5 * size / 2**30))
    store("last", encoded)
    assert [path.stem for path in entries(llama_acc_home)] == ["last", "newer", "used"]


def test_what_a_killed_run_left_is_cleared_away(encoded: Encoded, llama_acc_home: Path) -> None:
    store("a", encoded)
    folder = llama_acc_home / "cache/tokens"
    for name, age in ((".old.tmp", 0), (".current.tmp", None)):
        (folder / name).write_bytes(b"x")
        if age is not None:
            os.utime(folder / name, (age, age))
    store("b", encoded)
    assert [path.name for path in entries(llama_acc_home)] == [".current.tmp", "a.npz", "b.npz"]


def test_no_cache_if_its_size_is_zero(encoded: Encoded, llama_acc_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store("a", encoded)
    monkeypatch.setenv("LLAMA_ACC_CACHE_GIB", "0")
    store("b", encoded)
    assert load_cached("a") is None
    assert [path.stem for path in entries(llama_acc_home)] == ["a"]


@pytest.mark.parametrize("setting", ["much", "-1", "nan", "inf"])
def test_a_wrong_size_is_an_error(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_ACC_CACHE_GIB", setting)
    with pytest.raises(UserError, match="LLAMA_ACC_CACHE_GIB"):
        load_cached("a")


def test_a_home_that_cannot_be_written_does_not_stop_a_run(
    encoded: Encoded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("LLAMA_ACC_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING, "llama_acc"):
        store("a", encoded)
        assert load_cached("a") is None
    assert "not keeping encoded data" in caplog.text


def test_a_full_disk_leaves_nothing_behind(
    encoded: Encoded, llama_acc_home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.os, "fsync", full)
    with caplog.at_level(logging.WARNING, "llama_acc"):
        store("a", encoded)
    assert "No space left on device" in caplog.text
    assert entries(llama_acc_home) == []
