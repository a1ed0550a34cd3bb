"""Which questions a benchmark asks, and in which words."""

from pathlib import Path

import pytest

from llama_acc.core.errors import DataError, UserError
from llama_acc.core.evaluate.json_lines import read_objects
from llama_acc.core.evaluate.questions import questions_of, read_prompts
from tests.core.evaluate.apibench import write_lines


@pytest.mark.parametrize(
    ("code", "question"),
    [
        ("###Instruction: Find a town.\n###Output: {'domain': 'x'}", "Find a town."),
        ("### Instruction: Find a town.\n###Output:\n<<<domain>>>: x", "Find a town."),
        ("###Instruction. Find a town.\n### Output: x", "Find a town."),
        ('###Instruction: Which town?\n\n###Input: {"a": 1}\n###Output: x', 'Which town?\n\n###Input: {"a": 1}'),
        ("###Instruction: One.\n###Output: x\n###Instruction: Two.\n###Output: y", "One."),
    ],
)
def test_a_question_is_what_stands_before_the_output(code: str, question: str) -> None:
    assert questions_of(Path("eval.json"), {3: {"code": code}, 5: {"code": "###Instruction: no answer"}, 6: {}}) == {
        3: question
    }


def test_a_file_without_questions_is_refused() -> None:
    with pytest.raises(UserError, match=r"eval\.json holds no questions"):
        questions_of(Path("eval.json"), {1: {"api_data": {}}, 2: {"code": 5}})


def test_prompts_are_asked_without_the_escapes_of_gorillas_files(tmp_path: Path) -> None:
    texts = [" Which town?\\n", ' Find \\"Rome\\".\\n###Input: {\\"a\\": 1}\\n', 'Say "Rome"', "a path: C:\\maps"]
    path = write_lines(
        tmp_path / "prompts.jsonl", ({"question_id": i, "text": text} for i, text in enumerate(texts, start=1))
    )
    assert read_prompts(path, dict.fromkeys(range(1, 5))) == {
        1: "Which town?",
        2: 'Find "Rome".\n###Input: {"a": 1}',
        3: 'Say "Rome"',
        4: "a path: C:\\maps",
    }


def test_every_wrong_prompt_is_named(tmp_path: Path) -> None:
    wrong = [
        {"question_id": 1, "text": "a"},
        {"question_id": 1, "text": "b"},
        {"question_id": 9, "text": "c"},
        {"text": "d"},
        {"question_id": 2, "text": None},
    ]
    path = write_lines(tmp_path / "prompts.jsonl", wrong)
    with pytest.raises(DataError) as error:
        read_prompts(path, {1: None, 2: None})
    assert [problem.split(": ", 1) for problem in error.value.problems] == [
        [f"{path} line 2", "question_id 1 was there before"],
        [f"{path} line 3", "the evaluation file has no line 9, its question_id"],
        [f"{path} line 4", "question_id should be a whole number and text a text"],
        [f"{path} line 5", "question_id should be a whole number and text a text"],
    ]


def test_gorillas_own_prompts_are_the_questions_of_its_evaluation_file(shared: Path) -> None:
    folder = shared / "assets" / "gorilla"
    evaluation = read_objects(folder / "torchhub_eval.json")
    prompts = read_prompts(folder / "questions_torchhub_0_shot.jsonl", evaluation)
    questions = questions_of(folder / "torchhub_eval.json", evaluation)
    # One has a blank line less.
    assert prompts == {number: question.replace("\n\n", "\n") for number, question in questions.items()}
    assert len(prompts) == 186


def test_few_lines_of_a_real_evaluation_file_hold_no_question(shared: Path) -> None:
    path = shared / "assets" / "gorilla" / "huggingface_eval.json"
    evaluation = read_objects(path)
    questions = questions_of(path, evaluation)
    assert (len(evaluation), len(questions)) == (911, 907)
    assert all(question and "###Output" not in question for question in questions.values())
