"""`llama-acc evaluate`: figures on standard output, everything else beside them."""

import json
import signal
from pathlib import Path

import pytest

from tests.cli.commands import Result, invoke, refused, run, start, wait_until
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


@pytest.fixture
def responses(tmp_path: Path) -> Path:
    right, wrong = f"<<<api_call>>>: {TOWNS}", "<<<api_call>>>: torch.hub.load('maps/rivers')"
    return write_responses(tmp_path / "responses.jsonl", [(1, right), (2, right), (3, wrong)])


def gorilla(benchmark: list[object], *flags: object) -> Result:
    return invoke("evaluate", "gorilla", *benchmark, *flags)


def texts(path: Path) -> dict[int, str]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {line["question_id"]: line["text"] for line in lines}


def test_stored_responses_are_scored_in_a_table(benchmark: list[object], responses: Path) -> None:
    result = gorilla(benchmark, "--responses", responses)
    assert (result.exit_code, result.stderr) == (0, "")
    assert [line.split() for line in result.stdout.splitlines()] == [
        ["hub", "overall", "hallucination", "responses"],
        ["torchhub", "33.33", "33.33", "3"],
    ]


def test_as_json_the_counts_come_too(benchmark: list[object], responses: Path) -> None:
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


def test_a_checkpoint_answers_and_is_scored(benchmark: list[object], talker: Path, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    flags = ["--ckpt", talker, "--template", "none", "--output", output, "--max-new-tokens", "8", "--json"]
    result = gorilla(benchmark, *flags)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["without_call"] == 3
    assert texts(output) == {1: "a town", 2: " ".join(["the"] * 8), 3: "a town"}
    assert f"the answers are in {output}" in result.stderr
    again = gorilla(benchmark, *flags)
    assert (again.exit_code, again.stdout) == (0, result.stdout)
    assert gorilla(benchmark, "--responses", output, "--json").stdout == result.stdout


def test_answers_are_kept_in_the_current_folder_unless_told(
    benchmark: list[object], talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = gorilla(benchmark, "--ckpt", talker, "--max-new-tokens", "3")
    assert result.exit_code == 0, result.stderr
    assert texts(tmp_path / "responses_torchhub.jsonl").keys() == {1, 2, 3}
    assert "the checkpoint keeps no prompt format: template none" in result.stderr


def test_prompts_are_asked_in_place_of_the_evaluation_files(
    benchmark: list[object], talker: Path, tmp_path: Path
) -> None:
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"question_id": 2, "text": " now answer:\\n"}])
    output = tmp_path / "answers.jsonl"
    result = gorilla(benchmark, "--ckpt", talker, "--template", "none", "--prompts", prompts, "--output", output)
    assert result.exit_code == 0, result.stderr
    assert texts(output) == {2: "a town"}
    assert result.stdout.split()[-1] == "1"


def test_lines_without_a_question_are_left_out_and_said(benchmark: list[object], talker: Path, tmp_path: Path) -> None:
    with (tmp_path / "eval.json").open("a") as file:
        file.write(json.dumps({"code": "###Instruction: no answer", "api_data": {"domain": "Towns"}}) + "\n")
    output = tmp_path / "answers.jsonl"
    result = gorilla(benchmark, "--ckpt", talker, "--output", output, "--max-new-tokens", "3")
    assert "1 line without a question, of 4" in result.stderr
    assert texts(output).keys() == {1, 2, 3}


def test_ctrl_c_keeps_the_answers_and_the_same_command_goes_on(
    benchmark: list[object], talker: Path, tmp_path: Path
) -> None:
    output = tmp_path / "answers.jsonl"
    # "?" is never answered to its end: the others are, and then it is waited for.
    flags = ["--ckpt", talker, "--template", "none", "--output", output, "--max-new-tokens", "1500"]
    command = ["evaluate", "gorilla", *benchmark, *flags]
    with start(*command) as process:
        wait_until(lambda: output.exists() and output.read_bytes().count(b"\n") == 2, process)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate()
    assert (process.returncode, stdout) == (130, "")
    assert stderr.splitlines()[-1] == "stopped by Ctrl-C"
    kept = output.read_text()
    assert texts(output) == {1: "a town", 3: "a town"}
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert output.read_text().startswith(kept)
    assert len(texts(output)[2].split()) == 1500


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ([], ["there is nothing to score", "--ckpt DIR", "--responses FILE"]),
        (["--ckpt", "x", "--responses", "y"], ["give both --ckpt and --responses"]),
        (["--responses", "x", "--output", "y", "--batch-size", "16"], ["--output, --batch-size only matter"]),
        (["--ckpt", ""], ["it is empty"]),
        (["--ckpt", "nowhere"], ["there is no checkpoint folder nowhere"]),
        (["--ckpt", "nowhere", "--output", "no/such/folder.jsonl"], ["there is no folder no/such"]),
        (["--ckpt", "x", "--batch-size", "0"], ["--batch-size"]),
        (["--responses", "nowhere.jsonl"], ["there is no data file nowhere.jsonl"]),
        (["--responses", "x", "--hub", "huggingfase"], ["huggingfase"]),
    ],
)
def test_flags_that_do_not_go_together_are_refused(
    benchmark: list[object],
    flags: list[str],
    parts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(gorilla(benchmark, *flags), *parts)


def test_wrong_lines_are_told_with_file_and_line(benchmark: list[object], tmp_path: Path) -> None:
    wrong = write_responses(tmp_path / "wrong.jsonl", [(1, "x"), (4, "x")])
    refused(gorilla(benchmark, "--responses", wrong), f"{wrong} line 2: the evaluation file has no line 4")
    (tmp_path / "eval.json").write_text("[1]\n")
    refused(gorilla(benchmark, "--responses", wrong), f"{tmp_path / 'eval.json'} line 1: it should hold an object")


def test_answers_of_another_checkpoint_are_not_gone_on_with(
    benchmark: list[object], talker: Path, trained_once: Path, tmp_path: Path
) -> None:
    output = tmp_path / "answers.jsonl"
    flags = ["--output", output, "--max-new-tokens", "3"]
    assert gorilla(benchmark, "--ckpt", talker, *flags).exit_code == 0
    refused(gorilla(benchmark, "--ckpt", trained_once, *flags), f"{output} line 1: another checkpoint answered")


# Perplexity


def test_perplexity_is_printed_with_what_it_was_measured_on(trained_once: Path, single_turn: Path) -> None:
    result = invoke("evaluate", "perplexity", "--ckpt", trained_once, "--data", single_turn)
    assert (result.exit_code, result.stderr) == (0, "")
    shown = dict(line.split() for line in result.stdout.splitlines())
    assert shown.keys() == {
        *("perplexity", "loss", "items", "tokens", "label_tokens", "truncated", "dropped", "template")
    }
    assert (shown["items"], shown["template"]) == ("10", "alpaca")
    cut = invoke("evaluate", "perplexity", "--ckpt", trained_once, "--data", single_turn, "--max-tokens", 30, "--json")
    facts = json.loads(cut.stdout)
    assert facts["truncated"] + facts["dropped"] > 0
    assert facts["label_tokens"] < int(shown["label_tokens"])


def test_perplexity_takes_several_checkpoints_and_files(trained_once: Path, talker: Path, single_turn: Path) -> None:
    def measure(*flags: object) -> dict[str, float]:
        result = invoke("evaluate", "perplexity", "--ckpt", trained_once, "--data", single_turn, *flags, "--json")
        assert result.exit_code == 0, result.stderr
        facts: dict[str, float] = json.loads(result.stdout)
        return facts

    once, twice = measure(), measure("--data", single_turn, "--batch-size", 3)
    assert twice["items"] == 2 * once["items"]
    assert twice["loss"] == pytest.approx(once["loss"], abs=1e-5)


def test_what_perplexity_cannot_be_measured_on_is_refused(
    trained_once: Path, dialogues: Path, single_turn: Path
) -> None:
    def measure(*flags: object) -> Result:
        return invoke("evaluate", "perplexity", "--ckpt", trained_once, *flags)

    refused(measure("--data", dialogues), "these are dialogues", str(dialogues))
    refused(measure("--data", "nowhere.json"), "there is no data 'nowhere.json'")
    refused(measure("--data", single_turn, "--max-tokens", 5000), "more than the model's context (256)")
    refused(measure("--data", single_turn, "--max-tokens", 3), "within 3 tokens")
    refused(measure(), "Missing option '--data'")
