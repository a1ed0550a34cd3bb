"""llama.cpp itself reads what `--to gguf` writes: the same tokens, logits and answers.

llama-cpp-python is built from its source package into an environment of its own, and llama.cpp's programs from the
source that lies in there; each takes a compiler and a quarter of an hour. LLAMA_CPP_PYTHON names the Python of one that
is there already, LLAMA_CPP_PROGRAMS the folder of the programs.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import pytest
import torch

from llama_acc import generate, load_model
from llama_acc.core.checkpoint.convert import Request, convert
from llama_acc.core.data.templates import TEMPLATES, Turn
from llama_acc.core.tokenizer import Tokenizer, load_tokenizer
from tests.core.checkpoint.folders import state, write_meta
from tests.core.model.test_families import FAMILIES, write_family
from tests.core.ranks import free_port
from tests.core.tiny import SMALL, document_logits, loaded_model
from tests.core.tokenizers import END, byte_fallback, chatml, llama3_style

VERSION = "0.3.36"
_OFF = ("LLAVA_BUILD", "GGML_OPENMP", "LLAMA_CURL", *(f"LLAMA_BUILD_{part}" for part in ("TESTS", "TOOLS", "SERVER")))
_RUN = """
import json, sys
import numpy as np
from llama_cpp import Llama
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
job = json.load(open(sys.argv[1]))
llama = Llama(job["file"], n_ctx=2048, logits_all=True, verbose=False, type_k=0, type_v=0, n_threads=2)
done = {"ids": [llama.tokenize(text.encode(), True, False) for text in job["texts"]]}
if job["tokens"]:
    llama.eval(job["tokens"])
    np.save(sys.argv[2] + ".npy", llama.scores[: len(job["tokens"])])
    llama.reset()
    generated = llama.generate(job["tokens"], temp=0.0, repeat_penalty=1.0)
    done["greedy"] = [next(generated) for _ in range(16)]
if job["question"]:
    bos, eos = (llama._model.token_get_text(token) for token in (llama.token_bos(), llama.token_eos()))
    render = Jinja2ChatFormatter(llama.metadata["tokenizer.chat_template"], eos, bos)
    text = render(messages=[{"role": "user", "content": job["question"]}]).prompt
    done["chat"] = llama.tokenize(text.encode(), False, True)
    done["answer"] = llama.create_chat_completion(
        [{"role": "user", "content": job["question"]}], temperature=0, max_tokens=24, repeat_penalty=1.0
    )["choices"][0]["message"]["content"]
json.dump(done, open(sys.argv[2], "w"))
"""
_PROGRAMS = ("llama-cli", "llama-server")
pytestmark = pytest.mark.soak


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The Python that has llama-cpp-python."""
    if given := os.environ.get("LLAMA_CPP_PYTHON"):
        return given
    folder = tmp_path_factory.mktemp("llama_cpp")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    settings = os.environ | {"CMAKE_ARGS": " ".join(f"-D{name}=OFF" for name in _OFF)}
    package = f"llama-cpp-python=={VERSION}"
    pip = (folder / "bin" / "pip", "install", "--quiet", "--no-binary", "llama-cpp-python", package)
    built = subprocess.run(pip, env=settings, capture_output=True, text=True)
    if built.returncode:
        pytest.skip(f"{package} cannot be built: {built.stderr.strip().splitlines()[-1]}")
    return str(folder / "bin" / "python")


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that has llama-cli and llama-server."""
    if given := os.environ.get("LLAMA_CPP_PROGRAMS"):
        return Path(given)
    folder = tmp_path_factory.mktemp("programs")
    off = [f"-D{name}=OFF" for name in ("GGML_OPENMP", "LLAMA_OPENSSL", "LLAMA_USE_PREBUILT_UI")]
    source = folder / f"llama_cpp_python-{VERSION}" / "vendor" / "llama.cpp"
    pip = (sys.executable, "-m", "pip", "download", "--quiet")
    for command in (
        (*pip, "--no-deps", "--no-binary", "llama-cpp-python", "-d", folder, f"llama-cpp-python=={VERSION}"),
        ("tar", "-xf", f"{source.parents[1]}.tar.gz", "-C", folder),
        ("cmake", "-S", source, "-B", folder / "build", "-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=OFF", *off),
        ("cmake", "--build", folder / "build", "-j2", "--target", *_PROGRAMS),
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"llama.cpp cannot be built: {done.stderr.strip().splitlines()[-1]}")
    return folder / "build" / "bin"


def ask(python: str, folder: Path, texts: Any = (), tokens: Any = (), question: str = "") -> dict[str, Any]:
    """What llama.cpp makes of a folder's GGUF: see `_RUN`."""
    (file,) = folder.glob("*.gguf")
    job, done = folder.parent / "job.json", folder.parent / "done.json"
    values = {"file": str(file), "texts": list(texts), "tokens": list(tokens), "question": question}
    job.write_text(json.dumps(values))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run([python, "-c", _RUN, job, done], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.read_text())
    if tokens:
        found["logits"] = torch.from_numpy(np.load(f"{done}.npy"))
    return found


def to_gguf(source: Path, target: Path, **options: Any) -> Path:
    convert(Request(source, target, "gguf", **options))
    return target


# The others are refused: see tests/core/checkpoint/test_gguf.py.
COMPUTED = [family for family in FAMILIES if "in full" not in family and "of its own" not in family]
TOLERANCES = {"f32": 1e-4, "f16": 1e-2, "bf16": 0.1, "q8_0": 0.2}
CASES = [
    *((family, kind) for family in COMPUTED for kind in ("f32", "f16")),
    ("llama3.1", "bf16"),
    ("llama3.1", "q8_0"),
]


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_logits_and_greedy_answers(family: str, kind: Any, python: str, tokenizer_path: Path, tmp_path: Path) -> None:
    write_family(tmp_path / "hf", FAMILIES[family] | {"vocab_size": 300})
    shutil.copy(tokenizer_path, tmp_path / "hf")
    context = 5 if "window" in family else 16 if "dynamic" in family else 40
    tokens = torch.randint(3, 300, (context,), generator=torch.Generator().manual_seed(1))
    ours = loaded_model(tmp_path / "hf")
    (logits,) = document_logits(ours, [tokens])
    theirs = ask(python, to_gguf(tmp_path / "hf", tmp_path / "gguf", gguf_type=kind), tokens=tokens.tolist())
    error = ((theirs["logits"] - logits).abs().max() / logits.abs().max()).item()
    assert error < TOLERANCES[kind]
    if kind == "f32" and context == 40:
        for _ in range(16):
            tokens = torch.cat([tokens, document_logits(ours, [tokens])[0][-1:].argmax(-1)])
        assert theirs["greedy"] == tokens[context:].tolist()


_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How a byte-level tokenizer cuts a text, and whether a piece that is a token needs no merges.
CUTS = {
    "qwen2": ([{"type": "Split", "pattern": {"Regex": _QWEN2}, "behavior": "Isolated", "invert": False}], False),
    "tekken": ([{"type": "Split", "pattern": {"Regex": _TEKKEN}, "behavior": "Isolated", "invert": False}], True),
    "smollm": ([{"type": "Digits", "individual_digits": True}, _BYTES | {"use_regex": True}], False),
    "gpt-2": ([_BYTES | {"use_regex": True}], False),
}
TEXTS = [
    "the answer is in the question",
    " once upon a time",
    "  two  spaces\tand\ttabs \n\n\n and lines\r\n ",
    "What is 10 + 32? 1234567 3.14 ½ ²",
    "é à ü ﬁ 😀 👍🏽 日本語 한국어 العربية",
    "I'VE you'll We're 'tis don't",
    "def f(x):\n    if x:\n        return '\\t'  # ###\n",
    "x" * 40 + "-" * 33 + "=" * 17,
    "### Human: hi ### Assistant: (see http://a.b/c?d=e&f=g)",
    "once\u00a0upon\u3000a time\u2028",
]


def make_tokenizer(name: str, folder: Path, model: Path, shared: Path) -> Tokenizer:
    """A tokenizer of every kind that GGUF has."""
    folder.mkdir()
    if name in CUTS:
        values = json.loads(llama3_style(folder).read_text())
        steps, values["model"]["ignore_merges"] = CUTS[name]
        steps = steps if steps[-1]["type"] == "ByteLevel" else [*steps, _BYTES | {"use_regex": False}]
        values["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
        (folder / "tokenizer.json").write_text(json.dumps(values))
    elif name == "llama3":
        llama3_style(folder)
    elif name == "LLaMA's":
        shutil.copy(shared / "assets" / "tokenizer" / "tokenizer.model", folder)
    elif name == "LLaMA's, in JSON":
        source = load_tokenizer(shared / "assets" / "tokenizer")
        (folder / "tokenizer.json").write_text(json.dumps(source.to_json()))
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    elif name == "byte fallback":
        byte_fallback(folder)
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"}')
    else:
        chatml(folder, model, "added_tokens.json", **({"legacy": False} if "not" in name else {}))
    return load_tokenizer(folder)


NAMES = ("LLaMA's", "LLaMA's, in JSON", "byte fallback", "llama3", *CUTS, "added", "added, not legacy")


@pytest.mark.parametrize("name", NAMES)
def test_ids(name: str, python: str, tokenizer_path: Path, tmp_path: Path, shared: Path) -> None:
    tokenizer = make_tokenizer(name, tmp_path / "source", tokenizer_path, shared)
    config = replace(SMALL, vocab_size=tokenizer.vocab_size)
    write_meta(tmp_path / "meta", state(config), config=config)
    for path in (tmp_path / "meta").iterdir():
        path.rename(tmp_path / "source" / path.name)
    bos = [tokenizer.bos_id] * (name not in ("llama3", *CUTS))
    # Without "legacy", a text has a space in front; llama.cpp puts it nowhere, or else behind special tokens, too.
    front = " " if "not" in name else ""
    for template in ("dialogue", "alpaca", *(["chatml"] if tokenizer.token_id(END) is not None else [])):
        (tmp_path / "source" / "template.json").write_text(TEMPLATES[template].to_json())
        to_gguf(tmp_path / "source", tmp_path / template)
        question = "  Tabs\tand  spaces?\n 😀 "
        theirs = ask(python, tmp_path / template, [front + text for text in TEXTS], question=question)
        assert theirs["chat"] == TEMPLATES[template].prompt_ids(tokenizer, [Turn("human", question)])
    assert theirs["ids"] == [bos + tokenizer.encode(text) for text in TEXTS]


def post(port: int, path: str, **values: Any) -> Any:
    """What llama-server answers, once it has read the model."""
    body, deadline = json.dumps(values).encode(), time.monotonic() + 60
    while True:
        try:
            with urlopen(f"http://127.0.0.1:{port}{path}", body) as answer:
                return json.load(answer)
        except URLError:  # among them its 503: it is still reading
            assert time.monotonic() < deadline
            time.sleep(0.2)


def test_llama_cli_and_llama_server_answer_as_we_do(programs: Path, shared: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(shared / "assets" / "stories260k", source)
    template, question = TEMPLATES["dialogue"], "Once upon a time"
    (source / "template.json").write_text(template.to_json())
    stories = load_model(source, device="cpu")
    ours = generate(stories, question, temperature=0, max_new_tokens=16)
    file = to_gguf(source, tmp_path / "gguf", gguf_type="f32") / "model-f32.gguf"
    cli = (programs / "llama-cli", "-m", file, "-r", "###", "-st", "-p", question, "--temp", "0", "-n", "16")
    ran = subprocess.run(cli, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
    assert ours in ran.stdout

    port = free_port()
    server = subprocess.Popen((programs / "llama-server", "-m", file, "--port", str(port)), stderr=subprocess.DEVNULL)
    try:
        messages = [{"role": "user", "content": question}]
        prompt = post(port, "/apply-template", messages=messages)["prompt"]
        asked = {"messages": messages, "temperature": 0, "max_tokens": 16, "stop": ["\n###"]}
        answer = post(port, "/v1/chat/completions", **asked)
        tokens = post(port, "/tokenize", content=prompt, add_special=True, parse_special=True)["tokens"]
    finally:
        server.terminate()
        server.wait(60)
    assert answer["choices"][0]["message"]["content"].strip() == ours
    ids = template.prompt_ids(stories.tokenizer, [Turn("human", question)])
    assert (tokens, answer["usage"]["prompt_tokens"]) == (ids, len(ids))
