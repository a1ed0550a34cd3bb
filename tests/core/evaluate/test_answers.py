"""A checkpoint's answers: kept as they come, gone on with, and never mixed with those of something else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llama_acc.core.errors import DataError, UserError
from llama_acc.core.evaluate.gorilla import answer_questions
from llama_acc.core.generate.chat import generate
from llama_acc.core.generate.load import LoadedModel, load_model
from tests.core.tiny import random_model, save_model

QUESTIONS = {1: "once upon", 2: "who", 4: "what is the name of the town?" * 4, 7: "a", 9: "the answer"}
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def folders(tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two checkpoints of random weights."""
    folders = [tmp_path_factory.mktemp(f"random{seed}") for seed in (5, 6)]
    for seed, folder in enumerate(folders, start=5):
        save_model(random_model(seed=seed), folder, torch.float32)
        shutil.copy(tokenizer_path, folder)
    return folders


@pytest.fixture(scope="module")
def loaded(folders: list[Path]) -> LoadedModel:
    return load_model(folders[0], device="cpu")


class Stop(Exception):
    """Stands for a Ctrl-C."""


def stop_at(answers: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        assert total == len(QUESTIONS)
        if done == answers:
            raise Stop

    return progress


def quiet(done: int, total: int) -> None:
    pass


@pytest.fixture
def answer(folders: list[Path], loaded: LoadedModel) -> Callable[..., None]:
    """Answers the questions by the first checkpoint."""

    def run(
        output: Path,
        questions: dict[int, str] = QUESTIONS,
        progress: Callable[[int, int], None] = quiet,
        max_new_tokens: int = NEW_TOKENS,
        ckpt: int = 0,
    ) -> None:
        model = load_model(folders[1], device="cpu") if ckpt else loaded
        settings = {"max_new_tokens": max_new_tokens, "batch_size": 2}
        answer_questions(model, [str(folders[ckpt])], questions, output, progress=progress, **settings)

    return run


def texts(output: Path) -> dict[int, str]:
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    found = {line["question_id"]: line["text"] for line in lines}
    assert len(found) == len(lines)
    return found


def test_every_question_is_answered_as_it_would_be_alone(
    answer: Callable[..., None], loaded: LoadedModel, folders: list[Path], tmp_path: Path
) -> None:
    told = []
    answer(tmp_path / "r.jsonl", progress=lambda *counts: told.append(counts))
    expected = {n: generate(loaded, q, temperature=0, max_new_tokens=NEW_TOKENS) for n, q in QUESTIONS.items()}
    assert texts(tmp_path / "r.jsonl") == expected
    assert told == [(done, 5) for done in range(6)]
    assert json.loads((tmp_path / "r.jsonl").read_text().splitlines()[0])["model_id"] == folders[0].name


@pytest.mark.parametrize(
    ("stopped_at", "torn"), [(0, b""), (1, b'{"question_id": 9, "te'), (3, b""), (5, b'{"question_id": 9')]
)
def test_answers_go_on_where_they_were_stopped(
    stopped_at: int, torn: bytes, answer: Callable[..., None], tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    answer(whole)
    with pytest.raises(Stop):
        answer(parts, progress=stop_at(stopped_at))
    kept = parts.read_bytes() if parts.exists() else b""
    assert kept.count(b"\n") == stopped_at
    parts.write_bytes(kept + torn)
    told = []
    answer(parts, progress=lambda done, _: told.append(done))
    assert told == list(range(stopped_at, 6)), "none is answered twice"
    assert parts.read_bytes().startswith(kept)
    assert texts(parts) == texts(whole)


def test_a_file_that_lacks_its_last_line_end_is_gone_on_with(answer: Callable[..., None], tmp_path: Path) -> None:
    output = tmp_path / "r.jsonl"
    with pytest.raises(Stop):
        answer(output, progress=stop_at(2))
    output.write_bytes(output.read_bytes().rstrip(b"\n"))
    answer(output)
    assert texts(output).keys() == QUESTIONS.keys()


def test_answers_of_something_else_are_refused_and_left_as_they_are(
    answer: Callable[..., None], tmp_path: Path
) -> None:
    output = tmp_path / "r.jsonl"
    answer(output)
    before = output.read_bytes()

    def refused(message: str, run: Callable[[], None]) -> None:
        with pytest.raises(UserError, match=message) as error:
            run()
        assert str(output) in error.value.message
        assert output.read_bytes() == before

    refused("line 1: another checkpoint", lambda: answer(output, ckpt=1))
    refused("max_new_tokens was 12, and is 13", lambda: answer(output, max_new_tokens=13))
    refused("question 4 was another one", lambda: answer(output, {**QUESTIONS, 4: "where?"}))
    refused("question 4 is not among", lambda: answer(output, {n: q for n, q in QUESTIONS.items() if n != 4}))
    output.write_bytes(before + before.splitlines(keepends=True)[0])
    before = output.read_bytes()
    refused("line 6: question .* is answered twice", lambda: answer(output))


@pytest.mark.parametrize("end", ["", "\n"])
@pytest.mark.parametrize(
    "content", ['{"question_id": 1, "text": "x", "metadata": {}}', '{"question_id": 1}', "notes", '{"question_id": []}']
)
def test_a_file_of_another_kind_is_refused_and_left_as_it_is(
    content: str, end: str, answer: Callable[..., None], tmp_path: Path
) -> None:
    output = tmp_path / "r.jsonl"
    output.write_text(content + end)
    with pytest.raises(UserError, match="line 1"):
        answer(output)
    assert output.read_text() == content + end


def test_all_questions_too_long_are_named_before_any_is_answered(answer: Callable[..., None], tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        answer(tmp_path / "r.jsonl", {**QUESTIONS, 3: "word " * 200, 8: "word " * 300})
    assert [problem.split(":")[0] for problem in error.value.problems] == ["question 3", "question 8"]
    assert not (tmp_path / "r.jsonl").exists()
