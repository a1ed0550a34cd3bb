"""`llama-acc evaluate`: figures on standard output, everything else beside them."""

import json
from pathlib import Path

import pytest

from tests.cli.commands import Result, complete, invoke, refused
from tests.core.evaluate.apibench import (
    TORCH_HUB,
    TOWNS,
    write_database,
    write_evaluation,
    write_lines,
    write_responses,
)

# Of the model `talker`: after ":" it says "a town" and ends, after "?" it says "the the the ..." for ever.
QUESTIONS = [("which town:", "Towns"), ("which bird?", "Birds"), ("which road:", "Roads")]


@pytest.fixture
def benchmark(tmp_path: Path) -> list[object]:
    """The flags that name a benchmark."""
    api = write_database(tmp_path / "api.jsonl", TORCH_HUB)
    questions = write_evaluation(tmp_path / "eval.json", QUESTIONS)
    return ["--hub", "torchhub", "--api", api, "--questions", questions]


def gorilla(benchmark: list[object], *flags: object) -> Result:
    return invoke("evaluate", "gorilla", *benchmark, *flags)


def texts(path: Path) -> dict[int, str]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {line["question_id"]: line["text"] for line in lines}


def test_stored_responses_are_scored_as_a_table_or_as_json(benchmark: list[object], tmp_path: Path) -> None:
    right, wrong = f"<<<api_call>>>: {TOWNS}", "<<<api_call>>>: torch.hub.load('maps/rivers')"
    responses = write_responses(tmp_path / "responses.jsonl", [(1, right), (2, right), (3, wrong)])
    result = gorilla(benchmark, "--responses", responses)
    assert (result.exit_code, result.stderr) == (0, "")
    assert [line.split() for line in result.stdout.splitlines()] == [
        ["hub", "overall", "hallucination", "responses"],
        ["torchhub", "33.33", "33.33", "3"],
    ]
    assert json.loads(gorilla(benchmark, "--responses", responses, "--json").stdout) == {
        "hub": "torchhub",
        "overall": pytest.approx(100 / 3),
        "hallucination": pytest.approx(100 / 3),
        "responses": 3,
        "correct": 1,
        "wrong": 1,
        "hallucinated": 1,
        "without_call": 0,
    }


def test_a_checkpoint_answers_what_has_a_question_and_is_scored(
    benchmark: list[object], talker: Path, trained_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "eval.json").open("a") as file:
        file.write(json.dumps({"code": "###Instruction: no answer", "api_data": {"domain": "Towns"}}) + "\n")
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "responses_torchhub.jsonl"  # unless --output says otherwise
    flags = ["--max-new-tokens", "8", "--json"]
    result = gorilla(benchmark, "--ckpt", talker, *flags)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["without_call"] == 3
    assert texts(output) == {1: "a town", 2: " ".join(["the"] * 8), 3: "a town"}
    for said in (
        "the checkpoint keeps no prompt format: template none",
        "1 line without a question, of 4",
        "the answers are in responses_torchhub.jsonl",
    ):
        assert said in result.stderr
    again = gorilla(benchmark, "--ckpt", talker, *flags)
    assert (again.exit_code, again.stdout) == (0, result.stdout)
    assert gorilla(benchmark, "--responses", output, "--json").stdout == result.stdout
    other = gorilla(benchmark, "--ckpt", trained_once, *flags)
    refused(other, "responses_torchhub.jsonl line 1: another checkpoint answered")


def test_prompts_are_asked_in_place_of_the_evaluation_files(
    benchmark: list[object], talker: Path, tmp_path: Path
) -> None:
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"question_id": 2, "text": " now answer:\\n"}])
    output = tmp_path / "answers.jsonl"
    result = gorilla(benchmark, "--ckpt", talker, "--template", "none", "--prompts", prompts, "--output", output)
    assert result.exit_code == 0, result.stderr
    assert texts(output) == {2: "a town"}
    assert result.stdout.split()[-1] == "1"


def test_perplexity_is_printed_with_what_it_was_measured_on(trained_once: Path, single_turn: Path) -> None:
    def facts(*flags: object) -> dict[str, float]:
        result = complete("evaluate", "perplexity", "--ckpt", trained_once, "--data", single_turn, *flags, "--json")
        found: dict[str, float] = json.loads(result.stdout)
        return found

    result = invoke("evaluate", "perplexity", "--ckpt", trained_once, "--data", single_turn)
    assert (result.exit_code, result.stderr) == (0, "")
    shown = dict(line.split() for line in result.stdout.splitlines())
    assert (shown.pop("items"), shown.pop("template")) == ("10", "alpaca")
    assert shown.keys() == {"perplexity", "loss", "tokens", "label_tokens", "truncated", "dropped"}
    cut, twice = facts("--max-tokens", 30), facts("--data", single_turn, "--batch-size", 3)
    assert (shown["truncated"], shown["dropped"], cut["items"]) == ("0", "0", 10)
    assert cut["truncated"] + cut["dropped"] > 0
    assert cut["tokens"] < int(shown["tokens"])
    assert cut["label_tokens"] < int(shown["label_tokens"])
    assert twice["items"] == 20
    assert twice["loss"] == pytest.approx(float(shown["loss"]), abs=1e-4)
