"""Fuzzing of one reader of data files: `python -m tests.soak.fuzz_readers READER SECONDS FOLDER`.

With atheris (libFuzzer, which sees what code an input reaches) where it is installed, else with hypothesis. Whatever
bytes come, a reader gives rows and then perhaps a UserError that names the file; anything else is a crash, and ends
this process with an error, the input left in FOLDER.

The seconds are those of the whole process. An input that takes longer ends it too, with the place where it was.
"""

import contextlib
import faulthandler
import gzip
import io
import json
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

READERS = (
    "json",
    "jsonl",
    "csv",
    "tsv",
    "guessed",
    "gzip",
    "zstd",
    "zip",
    "tar",
    "parquet",
    "yaml",
    "items",
    "formats",
)
_LONGEST = 1 << 16
_HANGS = 30  # seconds after the end

_GOOD = [
    {"instruction": "Add.", "input": "1 2", "output": "3"},
    {"conversations": [{"from": "human", "value": "Hi é😀"}, {"from": "gpt", "value": "Hello"}]},
]
_TABLE = 'instruction,input,output\nAdd.,"1,\n2",3\n'
_META = "META:\n  - {path: a.json, type: text, prompt_type: shortqa, ratio: 0.5}\n"
_WORDS = (
    *('"instruction"', '"output"', '"input"', '"conversations"', '"from"', '"value"', '"human"', '"gpt"', '"image"'),
    *(
        "\\ud800",
        "\\u0000",
        "\ufeff",
        "\u2028",
        "[[[[",
        "{}",
        "null",
        "NaN",
        "1e999",
        "-0",
        "\r\n",
        '""',
        "META:",
        "path",
    ),
)


def main() -> None:
    """Fuzzes until the time is over."""
    reader, seconds, folder = sys.argv[1], float(sys.argv[2]), Path(sys.argv[3])
    end = time.monotonic() + seconds
    faulthandler.dump_traceback_later(seconds + _HANGS, exit=True)
    corpus = folder / f"corpus-{reader}"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(_seeds(reader)):
        (corpus / f"seed{number}").write_bytes(seed)
    try:
        import atheris
    except ImportError:
        _with_hypothesis(reader, end, folder)
        return
    with atheris.instrument_imports(include=["llama_acc.core.data", "json", "csv", "yaml", "tarfile", "zipfile"]):
        target = _target(reader, folder)
    dictionary = folder / "words"
    dictionary.write_text("".join(f'"{_escaped(word)}"\n' for word in _WORDS))
    # What it took to come here counts; 0 would mean no end.
    left = max(round(end - time.monotonic()), 1)
    flags = [f"-max_total_time={left}", f"-max_len={_LONGEST}", f"-timeout={_HANGS}", "-rss_limit_mb=2048", "-seed=1"]
    flags += [f"-dict={dictionary}", f"-artifact_prefix={folder}/{reader}-", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], target)
    atheris.Fuzz()


def _escaped(word: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word.encode())


def _seeds(reader: str) -> Iterator[bytes]:
    array, lines = json.dumps(_GOOD), "\n".join(map(json.dumps, _GOOD))
    if reader == "zstd":
        yield from (_zstd().compress(text.encode()) for text in (array, lines))
    if reader == "parquet":
        yield from _parquets()
    yield from {
        "zip": [_zipped(array.encode())],
        "tar": list(_tars()),
        "json": [array.encode(), json.dumps(_GOOD, indent=1).encode(), lines.encode()],
        "jsonl": [lines.encode(), b'\xef\xbb\xbf{"instruction": 1}\n\n{'],
        "csv": [_TABLE.encode()],
        "tsv": [_TABLE.replace(",", "\t").encode()],
        "guessed": [array.encode(), lines.encode(), _TABLE.encode()],
        "gzip": [gzip.compress(array.encode()), gzip.compress(lines.encode())],
        "yaml": [_META.encode()],
        **{key: [bytes(range(64)), bytes([7, 2, 2, 6, 2, 7, 2, 7, 2, 7] * 3)] for key in ("items", "formats")},
    }.get(reader, [])


def _zipped(data: bytes) -> bytes:
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.json", data)
        return file.getvalue()


def _tars() -> Iterator[bytes]:
    members = [("1.jpg", b"x" * 9), ("1.txt", b"a cat"), ("2.png", b"y"), ("2.json", json.dumps(_GOOD[0]).encode())]
    for format in (tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with io.BytesIO() as file:
            with tarfile.open(fileobj=file, mode="w", format=format) as archive:
                for name, data in members:
                    member = tarfile.TarInfo(f"é/{name}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
            yield file.getvalue()


def _parquets() -> Iterator[bytes]:
    with contextlib.suppress(ImportError):
        import pyarrow
        from pyarrow import parquet

        for rows in ([_GOOD[0]] * 3, [_GOOD[1]] * 3):
            with io.BytesIO() as file:
                parquet.write_table(pyarrow.Table.from_pylist(rows), file)
                yield file.getvalue()


def _zstd():  # type: ignore[no-untyped-def]
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd


class _Choices:
    """Makes a JSON value of bytes, each of which decides something: of nearly right items more than of others."""

    _KEYS = (
        *("instruction", "input", "output", "conversations", "from", "value", "image", "Output", ""),
        *("messages", "items", "role", "content", "type", "text", "code", "chat", "turn_1", "Human", "MOSS", "id"),
    )
    _LEAVES = (
        None,
        True,
        0,
        1e999,
        -(10**30),
        "",
        "human",
        "gpt",
        "a",
        "\ud800",
        "é😀",
        "cafÃ©",
        " \n",
        "What is it? " * 4,
        *(
            "system",
            "tool",
            "###Instruction: a\n###Output: b",
            "{'Instruction': a, 'Output': {b}}",
            "<image>\na",
            "text",
        ),
        *("<p>a<br>b</p>", '<div class="x"><pre><button>Copy code</button><code>c</code></pre></div>', "2 / 2\nb"),
    )

    def __init__(self, data: bytes) -> None:
        self._data = iter(data)

    def _one_of(self, count: int) -> int:
        return next(self._data, 0) % count

    def value(self, depth: int = 0) -> object:
        """The next value."""
        kind = self._one_of(8) if depth < 4 else 0
        if kind < 3:
            return self._LEAVES[self._one_of(len(self._LEAVES))]
        if kind == 3:
            return [self.value(depth + 1) for _ in range(self._one_of(4))]
        if kind == 4:
            return {self._KEYS[self._one_of(len(self._KEYS))]: self.value(depth + 1) for _ in range(self._one_of(4))}
        if kind == 5:
            return {
                "instruction": self.value(depth + 2),
                "output": self.value(depth + 2),
                "input": self.value(depth + 2),
            }
        turns = [{"from": self.value(3), "value": self.value(3)} for _ in range(self._one_of(4))]
        return {"conversations": [*turns, self.value(depth + 1)] if kind == 6 else turns}


def _target(reader: str, folder: Path) -> Callable[[bytes], None]:
    """What is called with bytes; it raises on a crash."""
    from llama_acc.core.data.checks import DatasetStats
    from llama_acc.core.data.convert.formats import FORMATS, Options
    from llama_acc.core.data.convert.run import Conversion
    from llama_acc.core.data.items import Checked, item_of, stream_items
    from llama_acc.core.data.read import stream_rows_from
    from llama_acc.core.data.sources import Source, expand
    from llama_acc.core.errors import UserError

    suffix = {
        "json": ".json",
        "jsonl": ".jsonl",
        "csv": ".csv",
        "tsv": ".tsv",
        "items": ".jsonl",
        "gzip": ".json",
        "zstd": ".jsonl",
    }
    required = ("instruction", "output")

    def rows(data: bytes) -> None:
        stats = DatasetStats(5)
        try:
            for row in stream_rows_from(io.BytesIO(data), "a file", suffix.get(reader), required=required):
                assert row.where.startswith("item "), row
                for kind in ("single_turn", "dialogue") if row.problem is None else ():
                    item, found = item_of(row.value, kind, row.where)
                    assert (item is None) == bool(found)
                    assert all(str(finding).startswith(row.where) for finding in found)
                    "".join(map(str, found)).encode("utf-8")
                    stats.add(Checked(row.where, item, found))
        except UserError as error:
            if "a file" not in error.message:
                raise
        json.dumps(stats.all_findings().to_json())

    def packed(data: bytes) -> None:
        # As it is, and as the content of a whole file: past its header, nothing random is valid.
        rows(data)
        rows(gzip.compress(data, 1) if reader == "gzip" else _zstd().compress(data, 1))

    def items(data: bytes) -> None:
        choices = _Choices(data)
        rows("\n".join(json.dumps(choices.value()) for _ in range(3)).encode())

    def formats(data: bytes) -> None:
        choices = _Choices(data)
        path = folder / "rows"
        path.write_text("\n".join(json.dumps(choices.value()) for _ in range(3)))
        for format in (*FORMATS, "auto"):
            options = Options(all_forms=len(data) % 2 > 0, dialogues=len(data) % 3 > 0, keep_html=len(data) % 5 == 0)
            conversion = Conversion(format, [path], options, skip_problems=True)
            try:
                for converted in conversion:
                    json.loads(converted.line)
            except UserError as error:
                if str(path) not in error.message:
                    raise
            assert all(problem.startswith(f"{path}: item ") for problem in conversion.problems)

    def zipped(data: bytes) -> None:
        rows_of(".json.zip", data)
        rows_of(".json.zip", _zipped(data))

    def rows_of(ending: str, data: bytes) -> None:
        path = folder / f"data{ending}"
        path.write_bytes(data)
        with contextlib.suppress(UserError):
            for row in stream_items(path):
                assert (row.item is None) == bool(row.problems)

    def yaml(data: bytes) -> None:
        path = folder / "data.yaml"
        path.write_bytes(data)
        with contextlib.suppress(UserError):
            expand([Source(str(path))], folder)

    by_path = {"tar": partial(rows_of, ".tar"), "parquet": partial(rows_of, ".parquet"), "zip": zipped}
    return {**by_path, "yaml": yaml, "items": items, "formats": formats, "gzip": packed, "zstd": packed}.get(
        reader, rows
    )


def _with_hypothesis(reader: str, end: float, folder: Path) -> None:
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded
    from hypothesis import strategies as st

    target, seeds = _target(reader, folder), list(_seeds(reader))
    pieces = st.one_of(
        st.sampled_from([word.encode() for word in _WORDS]), st.sampled_from(seeds), st.binary(max_size=9)
    )
    cut = st.tuples(st.sampled_from(seeds), st.integers(0, 200), st.integers(0, 200))
    inputs = st.one_of(
        st.lists(pieces, max_size=12).map(b"".join), cut.map(lambda part: part[0][: part[1]] + part[0][part[2] :])
    )
    done, seed = 0, 0

    def attempt(data: bytes) -> None:
        nonlocal done
        if done and time.monotonic() > end:
            return  # hypothesis goes on, with nothing to do
        done += 1
        try:
            target(data)
        except Exception:
            (folder / f"{reader}-crash-{zlib.crc32(data):08x}").write_bytes(data)
            raise

    # A crash is told as it is found: making it smaller may take minutes.
    unhurried = settings(
        max_examples=200,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    try:
        while not done or time.monotonic() < end:
            seed += 1
            seeded(seed)(unhurried(given(inputs)(attempt)))()
    finally:
        print(f"stat::number_of_executed_units: {done}", file=sys.stderr)


if __name__ == "__main__":
    main()
