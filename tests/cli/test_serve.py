"""`llama-acc serve`: the command, its page's examples as they are typed, and how it ends."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest
import torch

from tests.cli.commands import PATIENCE, environment, gone, invoke, refused, start, workers_of
from tests.cli.conftest import ANSWER
from tests.core.tiny import SMALL, random_model, save_model

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
ASK = {"model": "alpaca", "messages": [{"role": "user", "content": "hello"}], "temperature": 0}
ENDLESS = {"model": "alpaca", "prompt": "?", "temperature": 0, "max_tokens": 4000, "stream": True}


@contextmanager
def serving(*arguments: object, code: int = 130) -> "Iterator[tuple[str, subprocess.Popen[str]]]":
    """A server's address, and its process, which ends with this code: that of Ctrl-C, or of what
    the test sends."""
    process = start("serve", "--port", 0, "--device", "cpu", *arguments)
    assert process.stderr is not None
    said = []
    try:
        for line in process.stderr:
            said.append(line)
            if found := re.search(r" at (http://\S+)/v1 ", line):
                yield found[1], process
                break
        else:
            raise AssertionError("".join(said))
        if code == 130:
            process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=PATIENCE)
        assert process.returncode == code, rest
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture
def alpaca(talker: Path, tmp_path: Path) -> Path:
    """The model under the name that the page has."""
    folder = tmp_path / "alpaca"
    folder.symlink_to(talker)
    return folder


def test_the_examples_of_the_page_run(alpaca: Path) -> None:
    bash, python = (
        re.findall(rf"^```{name}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL) for name in ("bash", "python")
    )
    with serving("--ckpt", alpaca, "--template", "dialogue", "--context", 600) as (url, _):

        def run(*command: str) -> str:
            words = [word.replace("http://127.0.0.1:8000", url) for word in command]
            return subprocess.run(words, capture_output=True, text=True, check=True, timeout=PATIENCE).stdout

        chat, text = (json.loads(run("bash", "-c", example)) for example in bash)
        assert chat["choices"][0]["message"]["content"] == ANSWER
        assert len(text["choices"][0]["logprobs"]["tokens"]) == text["usage"]["completion_tokens"] > 0
        stream, parsed = python
        assert run(sys.executable, "-c", stream) == ANSWER
        # This model would not end a text by itself.
        assert "is_warm=" in run(
            sys.executable, "-c", parsed.replace("name: str", 'name: __import__("typing").Literal["red"]')
        )


def test_a_model_in_four_bits_answers_with_a_key_and_finishes_answers_before_it_ends(alpaca: Path) -> None:
    flags = ("--template", "dialogue", "--api-key", "secret", "--quantize", "nf4")
    with serving("--ckpt", alpaca, *flags, code=143) as (url, process):
        assert httpx2.post(f"{url}/v1/chat/completions", json=ASK).status_code == 401
        key = {"Authorization": "Bearer secret"}
        answer = httpx2.post(f"{url}/v1/chat/completions", json=ASK, headers=key).json()
        assert answer["choices"][0]["message"]["content"] == "a town"
        with httpx2.stream("POST", f"{url}/v1/completions", json=ENDLESS | {"max_tokens": 300}, headers=key) as stream:
            lines = stream.iter_lines()
            next(lines)
            process.terminate()
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"


def test_answers_are_cut_after_the_grace(alpaca: Path) -> None:
    with (
        serving("--ckpt", alpaca, "--grace", 0, code=143) as (url, process),
        httpx2.stream("POST", f"{url}/v1/completions", json=ENDLESS) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        process.terminate()
        assert "the server is closing" in [line for line in lines if line][-1]


def test_ranks_serve_together(alpaca: Path) -> None:
    with serving("--ckpt", alpaca, "--template", "dialogue", "--nproc", 2) as (url, process):
        workers = workers_of(process)
        assert len(workers) == 2
        answer = httpx2.post(f"{url}/v1/chat/completions", json=ASK, timeout=PATIENCE).json()
        assert answer["choices"][0]["message"]["content"] == "a town"
    assert gone(list(workers.values()))


def test_a_port_that_is_taken_is_refused_before_a_model_is_loaded(alpaca: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refused(invoke("serve", "--ckpt", alpaca, "--port", taken.getsockname()[1]), "Address already in use")


@pytest.mark.parametrize("length", [("--requests", "500"), pytest.param(("--minutes", "1"), marks=pytest.mark.soak)])
def test_64_clients_hear_what_each_would_alone_and_memory_stays_flat(
    length: tuple[str, str], tokenizer_path: Path, tmp_path: Path
) -> None:
    """The benchmark's ten minutes in few requests, or in one minute."""
    save_model(random_model(replace(SMALL, max_seq_len=1024)), tmp_path, torch.float32)
    shutil.copy(tokenizer_path, tmp_path)
    command = [sys.executable, ROOT / "benchmarks" / "serve_load.py", "--ckpt", tmp_path, *length]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["same as alone"] + found["left"] == found["requests"] >= 500
    assert found["left"] > 0
