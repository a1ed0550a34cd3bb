"""Plain text: every token of every document, in pieces of equal length, whatever the file and however long."""

import gzip
import io
import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from backports import zstd
from tokenizers import Tokenizer as Fast

from llama_acc.core.data import dataset as dataset_module
from llama_acc.core.data import plain_text
from llama_acc.core.data.batches import build, draws_of
from llama_acc.core.data.dataset import Dataset, load_dataset, load_published, publish
from llama_acc.core.data.items import stream_items
from llama_acc.core.data.sources import Source, expand
from llama_acc.core.errors import UserError
from llama_acc.core.tokenizer import Tokenizer, load_tokenizer
from tests.core import tokenizers

DOCUMENTS = [
    "once upon a time there was a town",
    "the answer is in the question. " * 9,
    "é",
    " what is 10 + 32?\n\nit is 42 </s> 😀",
    "a\n" * 30,
]
MAX = 24


def load(tokenizer: Tokenizer, *sources: Source | Path, max_tokens: int = MAX) -> Dataset:
    given = [source if isinstance(source, Source) else Source(str(source)) for source in sources]
    return load_dataset(given, tokenizer, max_tokens, 0)


def lines(folder: Path, documents: list[str], key: str = "text", name: str = "corpus.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps({key: text, "url": "x"}) + "\n" for text in documents), encoding="utf-8")
    return path


def stream(dataset: Dataset) -> list[int]:
    return [int(token) for i in range(len(dataset)) for token in dataset.document(i)[0]]


def pieces(documents: list[list[int]], size: int) -> list[list[tuple[int, bool]]]:
    """Documents end to end, cut by hand: (token, whether it is trained)."""
    flat = [(token, number > 0) for document in documents for number, token in enumerate(document)]
    cut = [flat[begin : begin + size] for begin in range(0, len(flat), size)]
    if len(cut[-1]) == 1:  # one token alone has nothing to learn: it takes another with it
        cut[-2], cut[-1] = cut[-2][:-1], cut[-2][-1:] + cut[-1]
    return [[(piece[0][0], False), *piece[1:]] for piece in cut]


@pytest.mark.parametrize("kind", [tokenizers.byte_level, tokenizers.llama3_style, tokenizers.byte_fallback])
def test_pieces_are_the_documents_as_tokenizers_encodes_them_cut_by_hand(
    tmp_path: Path, kind: Callable[[Path], Path]
) -> None:
    path = kind(tmp_path)
    tokenizer, reference = load_tokenizer(path), Fast.from_file(str(path))
    reference.no_truncation()
    reference.no_padding()
    documents = [text.replace("</s> 😀", "") for text in DOCUMENTS]
    encoded = [reference.encode(text, add_special_tokens=False).ids for text in documents]
    framed = [[tokenizer.bos_id, *ids, tokenizer.eos_id] for ids in encoded]
    for size in (2, 3, 7, MAX, sum(map(len, framed)) - 1, 4096):
        dataset = load(tokenizer, lines(tmp_path, documents), max_tokens=size)
        found = [list(zip(*(part.tolist() for part in dataset.document(i)), strict=True)) for i in range(len(dataset))]
        if size > 2:
            assert found == pieces(framed, size)
            assert stream(dataset) == [token for document in framed for token in document]
        report = dataset.report()
        assert (report["items"], report["truncated"], report["dropped"]) == (len(found), 0, 0)
        assert report["files"][0]["documents"] == len(documents)
        assert "special_text" not in report["warnings"]


def test_a_document_sees_itself_alone_and_counts_from_zero(tmp_path: Path, tokenizer: Tokenizer) -> None:
    dataset = load(tokenizer, lines(tmp_path, DOCUMENTS))
    assert dataset.report()["warnings"]["special_text"] == 1
    batch = build(dataset, range(len(dataset)))
    begins = np.cumsum([0, *batch.lengths[:-1]])
    assert sum(batch.lengths) == dataset.tokens
    assert batch.positions[begins].tolist() == [0] * len(begins)
    # A document begins with BOS, or where a piece does.
    starts = np.cumsum([0, *dataset.lengths[:-1]])
    assert set(begins) == set(starts) | set(np.flatnonzero(batch.tokens == tokenizer.bos_id))
    assert sum(batch.example_sizes) == len(batch.lengths)
    assert (batch.targets != -100).sum() == dataset.label_tokens == dataset.tokens - len(begins)
    draws = draws_of(range(len(dataset)), batch.example_sizes, 0, 0)
    assert len(draws) == len(set(draws)) == len(batch.lengths)
    assert draws[0] == draws_of([0], [1], 0, 0)[0]


@pytest.mark.parametrize("kind", ["sentencepiece", "byte_level", "llama3_style", "byte_fallback"])
def test_a_long_document_is_encoded_in_sections_as_if_it_were_not(
    tmp_path: Path, tokenizer_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tokenizer_path if kind == "sentencepiece" else getattr(tokenizers, kind)(tmp_path / kind)
    tokenizer = load_tokenizer(path)
    text = "".join(DOCUMENTS * 40)
    file = tmp_path / "book.txt"
    file.write_text(text, encoding="utf-8")
    whole = tokenizer.encode(text, bos=True, eos=True, own=[(0, len(text))])
    monkeypatch.setattr(plain_text, "_SECTION", 1000)
    monkeypatch.setattr(plain_text, "_CONTEXT", 100)
    parts = [row.item for row in stream_items(file)]
    assert len(parts) > 8
    assert "".join(part.text for part in parts if isinstance(part, plain_text.Text)) == text
    dataset = load(tokenizer, file)
    assert stream(dataset) == whole
    assert dataset.report()["files"][0]["documents"] == 1
    assert stream(load(tokenizer, lines(tmp_path, [text]))) == whole


def test_a_file_of_any_size_is_read_in_constant_memory(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    with file.open("w") as out:
        for _ in range(20):
            out.write("once upon a time " * 60_000)
    tracemalloc.start()
    try:
        characters = sum(len(row.item.text) for row in stream_items(file) if isinstance(row.item, plain_text.Text))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert characters == file.stat().st_size
    assert peak < 12 * 2**20, peak


def test_rows_are_encoded_in_groups_of_about_equally_many_characters(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = lines(tmp_path, DOCUMENTS * 9)
    together = load(tokenizer, path)
    monkeypatch.setattr(dataset_module, "_BATCH_CHARACTERS", 3000)
    monkeypatch.setenv("LLAMA_ACC_CACHE_GIB", "0")
    apart = load(tokenizer, path)
    assert stream(apart) == stream(together)
    assert len(together) < len(apart) < 2 * len(together)
    assert [apart.where(i) for i in (0, len(apart) - 1)] == ["piece 1", f"piece {len(apart)}"]


def parquet_in(folder: Path, documents: list[str]) -> Iterator[Path]:
    """The same rows in Parquet, as it is, packed inside, and packed as a whole."""
    import pyarrow
    from pyarrow.parquet import write_table

    table = pyarrow.table({"content": documents, "url": ["x"] * len(documents)})
    for name, codec in (("a.parquet", "snappy"), ("b.parquet.gz", "gzip")):
        write_table(table, folder / name, compression=codec)
        yield folder / name
    content = io.BytesIO()
    write_table(table, content)
    packed = {"c.parquet.gz": gzip.compress, "d.parquet.gzip": gzip.compress, "e.parquet.zst": zstd.compress}
    for name, compress in packed.items():
        (folder / name).write_bytes(compress(content.getvalue()))
        yield folder / name


def test_every_kind_of_file_gives_the_same_pieces(tmp_path: Path, tokenizer: Tokenizer) -> None:
    expected = stream(load(tokenizer, lines(tmp_path, DOCUMENTS)))
    array = tmp_path / "array.json"
    array.write_text(json.dumps([{"text": text} for text in DOCUMENTS]))
    table = tmp_path / "table.csv"
    quoted = ['"' + text.replace('"', '""') + '"' for text in ("text", *DOCUMENTS)]
    table.write_text("\n".join(quoted) + "\n", encoding="utf-8")
    for path in (array, table):
        assert stream(load(tokenizer, path)) == expected
    named = [lines(tmp_path, DOCUMENTS, "content", "content.jsonl"), *parquet_in(tmp_path, DOCUMENTS)]
    for path in named:
        assert stream(load(tokenizer, Source(str(path), format="text"))) == expected, path
    for number, text in enumerate(DOCUMENTS):
        (tmp_path / f"{number}.md").write_text(text, encoding="utf-8")
    apart = load(tokenizer, Source(str(tmp_path / "?.md")))
    assert stream(apart) == expected  # each document in pieces of its own
    assert len(apart.files) == len(DOCUMENTS)


def test_a_damaged_packed_parquet_file_is_said_to_be(tmp_path: Path) -> None:
    *_, whole = parquet_in(tmp_path, DOCUMENTS)
    whole.write_bytes(whole.read_bytes()[:-20])
    with pytest.raises(UserError, match="is damaged"):
        list(stream_items(whole, "text"))


def test_plain_texts_beside_data_are_not_data(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("about the data")
    (tmp_path / "a.txt").write_text("a document")
    assert [spec.path.name for spec in expand([Source(str(tmp_path))])] == ["a.txt"]
    assert [spec.path.name for spec in expand([Source(str(tmp_path / "*.md"))])] == ["README.md"]
    lines(tmp_path, DOCUMENTS)
    assert [spec.path.name for spec in expand([Source(str(tmp_path))])] == ["corpus.jsonl"]


def test_llama2_accessorys_list_of_shards_is_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    names = [path.name for path in parquet_in(shards, DOCUMENTS)][:2]
    beside, elsewhere = shards / "list.json", tmp_path / "PretrainMeta.json"
    for path in (beside, elsewhere):
        path.write_text(json.dumps(names, indent=2))
    one = stream(load(tokenizer, Source(str(shards / names[0]), format="text")))
    for source in (Source(str(beside)), Source(str(elsewhere), root=str(shards))):
        assert stream(load(tokenizer, source)) == one * 2
    elsewhere.write_text(json.dumps(["a.pkl"]))
    with pytest.raises(UserError, match="packed as a pickle") as caught:
        load(tokenizer, elsewhere)
    assert "parquet" in str(caught.value.hint)
    elsewhere.write_text(json.dumps(["a.parquet", 3]))
    with pytest.raises(UserError, match="but holds both"):
        load(tokenizer, elsewhere)


def test_blank_and_wrong_rows_are_counted_or_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = lines(tmp_path, ["", "a town", " \n", "the answer"])
    dataset = load(tokenizer, Source(str(path), ratio=1.0))
    [report] = dataset.report()["files"]
    assert (report["documents"], report["skipped"], report["skipped_kinds"]) == (2, 2, {"blank": 2})
    assert report["unused_keys"] == {"url": 4}
    path.write_text('{"text": 7}\n{"body": "a"}\n{"text": "a"}\nx\n')
    with pytest.raises(UserError) as caught:
        load(tokenizer, Source(str(path), format="text"))
    for problem in ("'text' should be text, but is a number", "no 'text' (its keys: 'body')", "not JSON"):
        assert problem in caught.value.message
    kept = load_dataset([Source(str(path), format="text")], tokenizer, MAX, 0, on_error="skip")
    assert [tokenizer.decode(kept.document(i)[0]) for i in range(len(kept))] == ["a"]
    assert kept.report()["skipped"] == 3


def test_pieces_are_chosen_split_and_published_as_items_are(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = lines(tmp_path, DOCUMENTS * 20)
    whole = load(tokenizer, path)
    part = load(tokenizer, Source(str(path), ratio=0.25))
    assert len(part) == len(whole) // 4 == part.report()["items"]
    train, held_out = whole.split(0.2, 3)
    assert len(train) + len(held_out) == len(whole)
    assert sorted(map(whole.where, range(len(whole)))) == sorted(
        [data.where(i) for data in (train, held_out) for i in range(len(data))]
    )
    publish(whole, tmp_path / "published")
    again = load_published(tmp_path / "published", tokenizer)
    assert again.fingerprint() == whole.fingerprint()
    assert build(again, [0, 1]).lengths == build(whole, [0, 1]).lengths


def test_it_goes_together_with_dialogues_whose_format_is_kept(tmp_path: Path, tokenizer: Tokenizer) -> None:
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ok"}]
    talk = tmp_path / "talk.json"
    talk.write_text(json.dumps([{"conversations": turns}]))
    text = lines(tmp_path, DOCUMENTS)
    both = load(tokenizer, text, talk, max_tokens=128)
    assert both.template.name == "dialogue"
    assert [file.template.name for file in both.files] == ["none", "dialogue"]
    batch = build(both, range(len(both)))
    assert (batch.example_sizes[-1], batch.lengths[-1]) == (1, both.lengths[-1])
    assert load(tokenizer, Source(str(text), template="dialogue")).template.name == "none"
