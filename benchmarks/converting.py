"""How fast data is converted on one core, and in how much memory.

    python benchmarks/converting.py [--megabytes 2000] [--folder DIR] [--cases alpaca-array ...]

Makes a file of made-up items of each kind (sizes drawn about those of the real data: Alpaca's items are of 400 bytes in
the middle, a conversation of 4 kB; every tenth text holds other letters than ASCII), converts it with the real command
held to one core, and deletes it. Speed is bytes of the input, before compression, over the command's whole time, start
included. Memory is the command's largest resident set. Prints a line for each case.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from backports import zstd

WORDS = [
    "the",
    "a",
    "model",
    "answer",
    "of",
    "question",
    "that",
    "it",
    "is",
    "in",
    "for",
    "with",
    "as",
    "on",
    "language",
    "and",
    "to",
    "are",
    "this",
    "which",
    "from",
    "by",
    "data",
    "can",
    "would",
    "write",
    "code",
    "function",
    "list",
    "return",
    "value",
    "number",
    "example",
    "first",
    "second",
    "because",
    "however",
    "people",
    "world",
    "year",
]
OTHER = ["für", "être", "naïve", "数据", "模型", "вопрос", "ответ", "😀", "–", "“so”"]
COLOURS = ["keyword", "string", "number", "built_in", "comment", "title function_", "params"]
# What stands above a block of code: its language, and a button with a picture.
CODE_HEAD = (
    '<div class="bg-black mb-4 rounded-md"><div class="flex items-center relative text-gray-200 px-4 py-2 text-xs">'
    '<span>python</span><button class="flex ml-auto gap-2"><svg stroke="currentColor" fill="none" stroke-width="2" '
    'viewBox="0 0 24 24" height="1em" width="1em"><path d="M16 4h2a2 2 0 0 1 2 2v14a2 2 0 0 1-2 2H6a2 2 0 0 1-2-2V6a2 '
    '2 0 0 1 2-2h2"></path></svg>Copy code</button></div><div class="p-4 overflow-y-auto"><code class="!whitespace-pre '
    'hljs language-python">'
)
# A process of its own, as a child's memory is counted from before it begins to run the command.
MEASURE = """
import json, os, resource, subprocess, sys, time
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
start = time.perf_counter()
code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
seconds, usage = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([code, seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6]))
"""


class Case(NamedTuple):
    """A kind of file."""

    format: str
    suffix: str
    row: Callable[[random.Random], dict[str, Any]]
    ascii: bool = False


def text(generator: random.Random, words: float) -> str:
    """So many words, more or less, in lines."""
    count = max(int(generator.lognormvariate(0, 0.6) * words), 1)
    chosen = generator.choices(WORDS + OTHER if generator.random() < 0.1 else WORDS, k=count)
    return "\n".join(" ".join(chosen[at : at + 14]) for at in range(0, count, 14))


def alpaca(generator: random.Random) -> dict[str, Any]:
    """An instruction and its output."""
    return {"instruction": text(generator, 12), "input": "", "output": text(generator, 45)}


def sharegpt(generator: random.Random, page: Callable[[random.Random, str], str] | None = None) -> dict[str, Any]:
    """A conversation; `page`: how the web page had its replies."""
    turns = []
    for _ in range(generator.randint(1, 5)):
        reply = text(generator, 180)
        if page is not None:
            reply = f'<div class="markdown prose w-full break-words dark">{page(generator, reply)}</div>'
        turns += [{"from": "human", "value": text(generator, 40)}, {"from": "gpt", "value": reply}]
    return {"id": f"{generator.getrandbits(40):x}", "conversations": turns}


def paragraphs(generator: random.Random, reply: str) -> str:
    """A reply's lines, each a paragraph."""
    return "<p>" + reply.replace("\n", "</p><p>") + "</p>"


def mixed(generator: random.Random, reply: str) -> str:
    """A reply's lines as a list, with bold words and code among them."""
    lines = [line.replace(" code ", " <code>code</code> ", 1) for line in reply.split("\n")]
    items = "".join(f"<li><p><strong>{line[:9]}</strong>{line[9:]}</p></li>" for line in lines[1:])
    return f"<p>{lines[0]}</p><ol>{items}</ol>"


def coloured(generator: random.Random, reply: str) -> str:
    """A reply's lines as a block of code, of which every third word has a colour."""
    words = [
        f'<span class="hljs-{generator.choice(COLOURS)}">{word}</span>' if number % 3 == 0 else word
        for number, word in enumerate(reply.split(" "))
    ]
    return f"<p>Code:</p><pre>{CODE_HEAD}{' '.join(words)}</code></div></div></pre>"


def sharegpt_html(generator: random.Random) -> dict[str, Any]:
    """A conversation whose replies are HTML."""
    return sharegpt(generator, paragraphs)


def sharegpt_html_mixed(generator: random.Random) -> dict[str, Any]:
    """The same with lists, bold words and code in lines."""
    return sharegpt(generator, mixed)


def sharegpt_html_code(generator: random.Random) -> dict[str, Any]:
    """The same with code and its colours."""
    return sharegpt(generator, coloured)


def gorilla(generator: random.Random) -> dict[str, Any]:
    """A row of APIBench."""
    code = f"###Instruction: {text(generator, 40)}\n###Output: <<<domain>>>: {text(generator, 150)}"
    return {"code": code, "api_call": "f()", "provider": "x", "api_data": {"description": text(generator, 60)}}


def llava(generator: random.Random) -> dict[str, Any]:
    """A dialogue about an image."""
    row = sharegpt(generator)
    row["conversations"][0]["value"] = "<image>\n" + row["conversations"][0]["value"]
    return {"id": row["id"], "image": f"{row['id']}.jpg", "conversations": row["conversations"]}


CASES = {
    "alpaca-array": Case("alpaca", ".json", alpaca),
    "alpaca-array-escaped": Case("alpaca", ".json", alpaca, ascii=True),
    "alpaca-lines": Case("alpaca", ".jsonl", alpaca),
    "alpaca-zst": Case("alpaca", ".jsonl.zst", alpaca),
    "alpaca-gz": Case("alpaca", ".jsonl.gz", alpaca),
    "auto-array": Case("auto", ".json", sharegpt),
    "sharegpt-array": Case("sharegpt", ".json", sharegpt),
    "sharegpt-html": Case("sharegpt", ".json", sharegpt_html),
    "sharegpt-html-mixed": Case("sharegpt", ".json", sharegpt_html_mixed),
    "sharegpt-html-code": Case("sharegpt", ".json", sharegpt_html_code),
    "gorilla-lines": Case("gorilla", ".json", gorilla),
    "llava-array": Case("llava", ".json", llava),
}


def make(path: Path, case: Case, size: int) -> int:
    """Writes a file of about so many bytes (before compression); returns how many."""
    generator = random.Random(0)
    rows = [json.dumps(case.row(generator), ensure_ascii=case.ascii) for _ in range(20_000)]
    is_array = case.suffix == ".json" and case.format != "gorilla"
    written = 0
    with opened(path) as file:
        for line in endless(rows):
            mark = ("[\n" if not written else ",\n") if is_array else ""
            piece = (mark + line + ("" if is_array else "\n")).encode()
            file.write(piece)
            written += len(piece)
            if written > size:
                break
        if is_array:
            file.write(b"\n]\n")
    return written


def opened(path: Path) -> IO[bytes]:
    """A file to write, compressed if its name says so."""
    if path.suffix == ".gz":
        return gzip.open(path, "wb", 1)  # type: ignore[return-value]
    return zstd.open(path, "wb") if path.suffix == ".zst" else path.open("wb")  # type: ignore[return-value]


def endless(rows: list[str]) -> Iterator[str]:
    """The rows again and again."""
    while True:
        yield from rows


def converted(case: Case, source: Path, output: Path) -> tuple[float, float, float]:
    """Seconds, CPU seconds and the peak in MB of converting a file on one core."""
    command = [sys.executable, "-m", "llama_acc", "convert-data", case.format, str(source), "--output", str(output)]
    measured = subprocess.run([sys.executable, "-c", MEASURE, *command], stdout=subprocess.PIPE, check=True)
    code, seconds, cpu, peak = json.loads(measured.stdout)
    if code:
        raise SystemExit(f"{' '.join(command)} ended with {code}")
    return seconds, cpu, peak


def main() -> None:
    """Runs the cases asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=2000, help="of each file, before compression")
    parser.add_argument("--folder", type=Path, help="where the files are made; twice their size has to be free")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    arguments = parser.parse_args()
    for name in arguments.cases:
        case = CASES[name]
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            source = Path(folder) / f"in{case.suffix}"
            size = make(source, case, arguments.megabytes * 1_000_000)
            seconds, cpu, peak = converted(case, source, Path(folder) / "out.jsonl")
            print(
                f"{name:22} {size / 1e6:6.0f} MB  {source.stat().st_size / 1e6:6.0f} on disk  {seconds:6.1f} s  "
                f"{cpu:6.1f} s of CPU  {size / 1e6 / seconds:6.1f} MB/s  {size / 1e6 / cpu:6.1f} MB/s of CPU  "
                f"{peak:5.0f} MB peak",
                flush=True,
            )


if __name__ == "__main__":
    main()
