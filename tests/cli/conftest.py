"""Made inputs of the command line's tests: data of both kinds, a trained run, a model that answers as it is told."""

import json
import shutil
from pathlib import Path

import pytest

from llama_acc.cli import console
from tests.cli.chains import write_chain
from tests.cli.commands import QUICKSTART, invoke
from tests.hub import Servers

ANSWER = "a town"
LIMA = "64bits/lima_vicuna_format"
DIALOGUE = {"conversations": [{"from": "human", "value": "what is it?"}, {"from": "gpt", "value": ANSWER}]}


@pytest.fixture(autouse=True)
def no_debugging(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--debug` in one test is not seen by the next."""
    monkeypatch.setenv("LLAMA_ACC_DEBUG", "0")


@pytest.fixture(autouse=True)
def no_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine a stage that takes no time elsewhere would say that it works."""
    monkeypatch.setattr(console, "_SIGN_AFTER", 3600.0)


@pytest.fixture(scope="session")
def single_turn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    items = [
        {
            "instruction": f"name the town number {i}",
            "input": "of the country" * (i % 2),
            "output": f"the answer is {i}",
        }
        for i in range(10)
    ]
    path = tmp_path_factory.mktemp("data") / "towns.json"
    path.write_text(json.dumps(items), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def dialogues(tmp_path_factory: pytest.TempPathFactory) -> Path:
    turns = [("human", "what is the question?"), ("gpt", "the answer"), ("human", "and the answer?"), ("gpt", "a town")]
    item = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    path.write_text((json.dumps(item) + "\n") * 10, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four steps, with two checkpoints. Not to be changed: take `trained`."""
    output = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMA_ACC_HOME", str(tmp_path_factory.mktemp("home")))
        result = invoke(*QUICKSTART, "--output", output, "train.epochs=1", "checkpoint.every_steps=2")
    assert result.exit_code == 0, result.stderr
    return output


@pytest.fixture
def trained(trained_once: Path, tmp_path: Path) -> Path:
    """A finished run's folder, one's own."""
    return Path(shutil.copytree(trained_once, tmp_path / "trained"))


@pytest.fixture
def base(trained: Path) -> Path:
    """A checkpoint folder without a manifest, as one has it from somewhere else."""
    folder = trained / "epoch0"
    (folder / "manifest.json").unlink()
    return folder


@pytest.fixture(scope="session")
def talker(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Path:
    """A model in Meta's layout: after ":" it says ANSWER and ends, after "?" it says "the the the ..." for ever."""
    folder, endless = tmp_path_factory.mktemp("talker"), {"endless": " the", "endless_after": "?"}
    return write_chain(folder, tokenizer_path, answer=f" {ANSWER}", after=":", **endless, max_seq_len=4096)


@pytest.fixture(scope="session")
def seer(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Path:
    """A model that was trained to caption: of every image it says ANSWER, and likewise after ":"."""
    folder, endless = tmp_path_factory.mktemp("seer"), {"endless": " the", "endless_after": "?"}
    return write_chain(folder, tokenizer_path, answer=f" {ANSWER}", after=":", **endless, captions=True)


@pytest.fixture
def lima(servers: Servers) -> Servers:
    """The hub has LIMA, of ten dialogues."""
    content = json.dumps([DIALOGUE] * 10).encode()
    servers.dataset(LIMA, {"lima_vicuna_format.json": content, "README.md": b"# LIMA"})
    return servers
