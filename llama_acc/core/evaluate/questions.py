"""What APIBench asks: the questions of an evaluation file, or of a file of prompts."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from llama_acc.core.errors import DataError, UserError
from llama_acc.core.evaluate.json_lines import Objects, read_objects

# Some lines have a full stop for the colon. An "###Input:" belongs to the question.
_QUESTION = re.compile(r"###\s*Instruction[:.]\s*(.*?)\s*###\s*Output:", re.DOTALL)


def questions_of(path: Path, evaluation: Objects) -> dict[int, str]:
    """The questions of an evaluation file by line: what its `code` has between "###Instruction:" and "###Output:".

    Lines without these are left out, as in Gorilla's own files of questions.

    Raises:
        UserError: there is none.
    """
    found = {number: _QUESTION.search(str(entry.get("code", ""))) for number, entry in evaluation.items()}
    questions = {number: match[1] for number, match in found.items() if match}
    if not questions:
        raise UserError(f"{path} holds no questions: no `code` has ###Instruction: and ###Output:", "give --prompts")
    return questions


def read_prompts(path: Path, lines: Mapping[int, object]) -> dict[int, str]:
    """A file of prompts, such as Gorilla's `questions_torchhub_0_shot.jsonl`: JSON lines, `question_id` and `text`.

    Args:
        path: the file.
        lines: those of the evaluation file, by number.

    Raises:
        UserError: it cannot be read.
        DataError: prompts that lack something, come twice, or belong to no line of the evaluation file.
    """
    prompts: dict[int, str] = {}
    problems: list[str] = []
    for number, entry in read_objects(path).items():
        question, text = entry.get("question_id"), entry.get("text")
        if type(question) is not int or not isinstance(text, str):
            problems.append(f"{path} line {number}: question_id should be a whole number and text a text")
        elif question not in lines:
            problems.append(f"{path} line {number}: the evaluation file has no line {question}, its question_id")
        elif question in prompts:
            problems.append(f"{path} line {number}: question_id {question} was there before")
        else:
            prompts[question] = _unescaped(text).strip()
    if problems:
        raise DataError(problems)
    return prompts


def _unescaped(text: str) -> str:
    r"""Gorilla's files were escaped twice: their texts end with a backslash and an n."""
    try:
        return str(json.loads(f'"{text}"', strict=False))
    except ValueError:
        return text
