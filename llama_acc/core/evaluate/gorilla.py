"""APIBench, Gorilla's benchmark of API calls: which answers call the right API, and which one that is not there.

A call is right if its arguments are those of an API in the database that has the domain of the question. The rules are
those of the evaluation published with Gorilla (ShishirPatil/gorilla, gorilla/eval), odd as some are, so that figures
can be compared. Code is parsed by tree-sitter, which makes a tree of anything: answers are often not valid Python.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import tree_sitter_python
from tree_sitter import Language, Node, Parser

from llama_acc.core.errors import DataError
from llama_acc.core.evaluate.json_lines import Objects, read_objects

Hub = Literal["tensorflowhub", "torchhub", "huggingface"]
"""Whose APIs they are."""


class Api(NamedTuple):
    """An entry of the database: the name that its call begins with, and the arguments that must be found."""

    name: bytes
    arguments: list[bytes]
    domain: str


class Response(NamedTuple):
    """An answer to the question on line `question_id` of the evaluation file, counted from 1."""

    question_id: int
    text: str


@dataclass(frozen=True)
class Score:
    """What became of the responses. Each is counted once.

    Attributes:
        responses: how many there are.
        correct: call an API of the question's domain.
        wrong: call an API of another domain.
        hallucinated: call what is not in the database.
        without_call: name no call (TorchHub only).
    """

    responses: int
    correct: int
    wrong: int
    hallucinated: int
    without_call: int

    @property
    def overall(self) -> float:
        """Correct ones, in percent."""
        return 100 * self.correct / self.responses

    @property
    def hallucination(self) -> float:
        """Hallucinated ones, in percent."""
        return 100 * self.hallucinated / self.responses


def read_database(path: Path, hub: Hub) -> list[Api]:
    """The entries of an API database (JSON lines with `api_call` and `domain`) that have arguments, in its order.

    Raises:
        UserError: it cannot be read.
        DataError: entries that lack something or hold no call.
    """
    entries: list[Api] = []
    problems: list[str] = []
    for number, entry in read_objects(path).items():
        call, domain = entry.get("api_call"), entry.get("domain")
        if not isinstance(call, str) or not isinstance(domain, str):
            problems.append(f"{path} line {number}: api_call and domain should be texts")
            continue
        statements = _parse(call).children
        if not statements or not statements[0].children:
            problems.append(f"{path} line {number}: {call!r} is not a call")
            continue
        parts = statements[0].children[0].children
        arguments = [argument.strip(b"'") for argument in _arguments(parts[1].children, hub)] if parts[1:] else []
        if arguments:
            entries.append(Api(_text(parts[0]), arguments, domain))
    if problems:
        raise DataError(problems)
    return entries


def read_domains(path: Path, evaluation: Objects) -> dict[int, str]:
    """The domain that each line of an evaluation file asks for, by its number: `api_data.domain`.

    Raises:
        DataError: lines that have none.
    """
    domains: dict[int, str] = {}
    problems: list[str] = []
    for number, entry in evaluation.items():
        data = entry.get("api_data")
        domain = data.get("domain") if isinstance(data, dict) else None
        if isinstance(domain, str):
            domains[number] = domain
        else:
            problems.append(f"{path} line {number}: there is no text at api_data.domain")
    if problems:
        raise DataError(problems, "--questions takes the evaluation file, such as torchhub_eval.json")
    return domains


def read_responses(path: Path, lines: Mapping[int, object]) -> list[Response]:
    """Stored responses: JSON lines with `question_id` and `text`.

    Args:
        path: the file.
        lines: those of the evaluation file, by number.

    Raises:
        UserError: it cannot be read.
        DataError: responses that lack something, or to a question that is not there.
    """
    responses: list[Response] = []
    problems: list[str] = []
    for number, entry in read_objects(path).items():
        question, text = entry.get("question_id"), entry.get("text")
        if type(question) is not int or not isinstance(text, str):
            problems.append(f"{path} line {number}: question_id should be a whole number and text a text")
        elif question not in lines:
            problems.append(f"{path} line {number}: the evaluation file has no line {question}, its question_id")
        else:
            responses.append(Response(question, text))
    if problems:
        raise DataError(problems)
    return responses


def score(hub: Hub, database: Sequence[Api], domains: Mapping[int, str], responses: Sequence[Response]) -> Score:
    """Scores responses, of which there is at least one.

    Args:
        hub: whose rules apply.
        database: from `read_database`.
        domains: the domain asked for, by question_id.
        responses: to those questions.
    """
    correct = wrong = hallucinated = without_call = 0
    for response in responses:
        call = find_call(response.text, hub)
        if call is None:
            without_call += 1
            continue
        domain = match_domain(call, database)
        if domain is None:
            hallucinated += 1
        elif domain == domains[response.question_id]:
            correct += 1
        else:
            wrong += 1
    return Score(len(responses), correct, wrong, hallucinated, without_call)


def find_call(text: str, hub: Hub) -> str | None:
    """The part of a response in which a call is looked for; None if it names none (TorchHub only)."""
    parts = text.split("api_call")
    if len(parts) == 1:
        return None if hub == "torchhub" else text
    after = parts[1].split("api_provider")[0]
    begin = after.find(":") + 2 if ":" in after else 2
    end = after.rfind(")") + 1 if ")" in after else -1
    return after[begin:end]


def match_domain(call: str, database: Sequence[Api]) -> str | None:
    """The domain of the first API that a call is of; None if it is of none.

    The candidate is the first subtree that begins with the API's name, else the last of all, so that an answer which
    says it in other words can still be right.
    """
    candidates, last = _subtrees(_parse(call))
    for api in database:
        text = candidates.get(api.name, last)
        if all(argument in text for argument in api.arguments):
            return api.domain
    return None


def _subtrees(root: Node) -> tuple[dict[bytes, bytes], bytes]:
    """The text of the first subtree that begins with each text, and that of the last subtree, later siblings first."""
    first: dict[bytes, bytes] = {}
    stack, last = [root], root
    while stack:
        last = stack.pop()
        children = last.children
        if children:
            first.setdefault(_text(children[0]), _text(last))
        stack += [child for child in children if child.child_count]
    return first, _text(last)


def _arguments(children: Sequence[Node], hub: Hub) -> list[bytes]:
    """What a database entry's arguments, with the marks between them, ask a call to contain."""
    found = []
    for child in children:
        text = _text(child)
        if hub == "torchhub":
            if b"repo_or_dir" in text or b"model" in text:
                found.append(_argument_value(child))
        elif b"=" in text if hub == "huggingface" else b"model=" in text or b"model =" in text:
            found.append(_argument_value(child))
        elif text not in (b"(", b")", b","):
            found.append(text)
    return found


def _argument_value(argument: Node) -> bytes:
    """What follows the `=` of a keyword argument: its third part. What has no three parts is taken whole."""
    return _text(argument.children[2] if argument.child_count > 2 else argument)


@functools.cache
def _parser() -> Parser:
    return Parser(Language(tree_sitter_python.language()))


def _parse(code: str) -> Node:
    # What cannot be encoded, half of a surrogate pair, is no part of any API's name.
    return _parser().parse(code.encode("utf-8", "replace")).root_node


def _text(node: Node) -> bytes:
    assert node.text is not None
    return node.text
