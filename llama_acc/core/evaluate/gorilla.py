"""APIBench, Gorilla's benchmark of API calls: which answers call the right API, and which one that does not exist.

A call is right if its arguments are those of an API in the database that has the domain of the question. The rules are
those of the evaluation published with Gorilla (ShishirPatil/gorilla, gorilla/eval), odd as some are, so that figures
can be compared. Code is parsed by tree-sitter, which makes a tree of anything: answers are often not valid Python.

All files are JSON lines; a question's id is the number of its line in the evaluation file, from 1.
"""

import functools
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import tree_sitter_python
from tree_sitter import Language, Node, Parser

from llama_acc.core.data.read import nearest_names
from llama_acc.core.errors import DataError, UserError
from llama_acc.core.input_files import read_bytes

if TYPE_CHECKING:
    from llama_acc.core.generate.load import LoadedModel

Hub = Literal["tensorflowhub", "torchhub", "huggingface"]
"""Whose APIs they are."""
Objects = dict[int, dict[str, Any]]
"""The objects of a file by the number of their line, from 1; blank lines have none."""

# Some lines have a full stop for the colon. An "###Input:" belongs to the question.
_QUESTION = re.compile(r"###\s*Instruction[:.]\s*(.*?)\s*###\s*Output:", re.DOTALL)
_BEGINNING = b'{"question_id": '


class Api(NamedTuple):
    """An entry of the database: the name that its call begins with, and the arguments that must be found."""

    name: bytes
    arguments: list[bytes]
    domain: str


@dataclass(frozen=True)
class Score:
    """What became of the responses. Each is counted once."""

    responses: int
    correct: int  # call an API of the question's domain
    wrong: int  # call an API of another domain
    hallucinated: int  # call what is not in the database
    without_call: int  # name no call (TorchHub only)

    @property
    def overall(self) -> float:
        """Correct ones, in percent."""
        return 100 * self.correct / self.responses

    @property
    def hallucination(self) -> float:
        """Hallucinated ones, in percent."""
        return 100 * self.hallucinated / self.responses


def read_objects(path: Path, data: bytes | None = None) -> Objects:
    """The objects of a file, or of `data` from it."""
    if data is None and not path.exists():
        raise UserError(f"there is no data file {path}", nearest_names(path))
    data = read_bytes(path) if data is None else data
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path} is not UTF-8: byte {error.start} (line {number}) cannot be decoded") from error
    objects: Objects = {}
    problems: list[str] = []
    # Not splitlines(): a JSON text may hold U+2028 and the like unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (RecursionError, ValueError) as error:
            problems.append(f"{path} line {number}: not JSON: {error}")
            continue
        if isinstance(value, dict):
            objects[number] = value
        else:
            problems.append(f"{path} line {number}: it should hold an object, but holds {line.strip()[:40]}")
    if problems:
        raise DataError(problems, "each line should be a JSON object of its own")
    if not objects:
        raise UserError(f"{path} is empty")
    return objects


def read_database(path: Path, hub: Hub) -> list[Api]:
    """The entries of an API database (`api_call` and `domain`) that have arguments, in its order."""
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
    """The domain that each question of an evaluation file asks for: `api_data.domain`."""
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


def read_questions(path: Path, evaluation: Objects, prompts: Path | None = None) -> dict[int, str]:
    """The questions of an evaluation file: what its `code` has between "###Instruction:" and "###Output:".

    Lines without these are left out, as in Gorilla's own files of questions. `prompts` is such a file, and is read
    instead (`questions_torchhub_0_shot.jsonl`).

    Raises:
        UserError: there is none, or a file cannot be read.
        DataError: prompts that lack something, come twice, or belong to no line of the evaluation file.
    """
    if prompts is not None:
        asked = read_responses(prompts, evaluation)
        counts = Counter(number for number, _ in asked)
        if twice := [number for number, count in counts.items() if count > 1]:
            raise DataError([f"{prompts}: question_id {number} comes more than once" for number in twice])
        return {number: _unescaped(text).strip() for number, text in asked}
    found = {number: _QUESTION.search(str(entry.get("code", ""))) for number, entry in evaluation.items()}
    questions = {number: match[1] for number, match in found.items() if match}
    if not questions:
        raise UserError(f"{path} holds no questions: no `code` has ###Instruction: and ###Output:", "give --prompts")
    return questions


def _unescaped(text: str) -> str:
    r"""Gorilla's files were escaped twice: their texts end with a backslash and an n."""
    try:
        return str(json.loads(f'"{text}"', strict=False))
    except ValueError:
        return text


def read_responses(path: Path, questions: Collection[int]) -> list[tuple[int, str]]:
    """Stored responses: the `question_id` and `text` of each line."""
    responses: list[tuple[int, str]] = []
    problems: list[str] = []
    for number, entry in read_objects(path).items():
        question, text = entry.get("question_id"), entry.get("text")
        if type(question) is not int or not isinstance(text, str):
            problems.append(f"{path} line {number}: question_id should be a whole number and text a text")
        elif question not in questions:
            problems.append(f"{path} line {number}: the evaluation file has no line {question}, its question_id")
        else:
            responses.append((question, text))
    if problems:
        raise DataError(problems)
    return responses


def score(hub: Hub, database: Sequence[Api], domains: Mapping[int, str], responses: Sequence[tuple[int, str]]) -> Score:
    """Scores responses (question, text) by the rules of a hub; there is at least one."""
    correct = wrong = hallucinated = without_call = 0
    for question, text in responses:
        call = find_call(text, hub)
        domain = None if call is None else match_domain(call, database)
        if call is None:
            without_call += 1
        elif domain is None:
            hallucinated += 1
        elif domain == domains[question]:
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

    The candidate is the first subtree that begins with the API's name, else the last of all, later siblings first, so
    that an answer which says it in other words can still be right.
    """
    first: dict[bytes, bytes] = {}  # by what a subtree begins with
    root = _parse(call)
    stack, last = [root], root
    while stack:
        last = stack.pop()
        children = last.children
        if children:
            first.setdefault(_text(children[0]), _text(last))
        stack += [child for child in children if child.child_count]
    for api in database:
        text = first.get(api.name, _text(last))
        if all(argument in text for argument in api.arguments):
            return api.domain
    return None


def _arguments(children: Sequence[Node], hub: Hub) -> list[bytes]:
    """What a database entry's arguments, with the marks between them, ask a call to contain."""
    found = []
    for child in children:
        text = _text(child)
        # What follows the `=` of a keyword argument is its third part; what has no three parts is taken whole.
        value = _text(child.children[2] if child.child_count > 2 else child)
        if hub == "torchhub":
            if b"repo_or_dir" in text or b"model" in text:
                found.append(value)
        elif b"=" in text if hub == "huggingface" else b"model=" in text or b"model =" in text:
            found.append(value)
        elif text not in (b"(", b")", b","):
            found.append(text)
    return found


@functools.cache
def _parser() -> Parser:
    return Parser(Language(tree_sitter_python.language()))


def _parse(code: str) -> Node:
    # What cannot be encoded, half of a surrogate pair, is no part of any API's name.
    return _parser().parse(code.encode("utf-8", "replace")).root_node


def _text(node: Node) -> bytes:
    assert node.text is not None
    return node.text


def answer_questions(
    loaded: "LoadedModel",
    checkpoints: Sequence[str],
    questions: Mapping[int, str],
    output: Path,
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: Callable[[int, int], None],
) -> None:
    """Appends the greedy answer to every question that has none in `output` yet, each as soon as it has ended.

    A line is {"question_id", "text", "model_id", "metadata"}, as in Gorilla's own responses. `metadata` says what the
    answer was made from, so that it is never taken for another's when a stopped evaluation is resumed. `loaded` is the
    model of these checkpoints, `batch_size` how many answers are under way at a time; `progress` is called with
    (answered, in all) at first and after each answer.

    Raises:
        DataError: questions that do not fit in the model's context.
        UserError: `output` holds something else than this model's answers to these questions.
    """
    from llama_acc.core.generate.chat import encode_question
    from llama_acc.core.generate.engine import Engine
    from llama_acc.core.generate.load import checkpoint_fingerprint
    from llama_acc.core.generate.sampling import Sampler, Sampling

    prompts = {}
    problems: list[str] = []
    for number, question in questions.items():
        try:
            prompts[number] = encode_question(loaded, question)
        except UserError as error:
            problems.append(f"question {number}: {error.message}")
    if problems:
        raise DataError(problems)
    of_all = {
        "checkpoint": checkpoint_fingerprint(checkpoints),
        "quantized": loaded.model.is_quantized,
        "max_new_tokens": max_new_tokens,
    }
    stamps = {
        number: {**of_all, "prompt": hashlib.sha256(json.dumps(prompt.tokens).encode()).hexdigest()}
        for number, prompt in prompts.items()
    }
    answered = _answered(output, stamps)
    left = [number for number in prompts if number not in answered]
    progress(len(answered), len(prompts))
    with output.open("ab") as file:
        sampler = Sampler(Sampling(temperature=0, max_new_tokens=max_new_tokens))
        replies = Engine(loaded).generate((prompts[number] for number in left), sampler, batch_size)
        for done, reply in enumerate((reply for reply, _ in replies if reply.ended), start=len(answered) + 1):
            number = left[reply.index]
            name = Path(checkpoints[-1]).name
            line = {"question_id": number, "text": reply.text, "model_id": name, "metadata": stamps[number]}
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            progress(done, len(prompts))


def _answered(output: Path, stamps: Mapping[int, dict[str, Any]]) -> set[int]:
    """The questions that have an answer in the file, which afterwards ends with a whole line."""
    data = read_bytes(output) if output.exists() else b""
    kept, last = data, data[data.rfind(b"\n") + 1 :]
    try:
        json.loads(last or b"{}")
    except ValueError:
        if last.startswith(_BEGINNING):  # a writer was killed over it
            kept = data[: len(data) - len(last)]
    answered: set[int] = set()
    for number, entry in read_objects(output, kept).items() if kept else ():
        question: Any = entry.get("question_id")
        problem = _difference(question, entry.get("metadata"), stamps)
        if problem is None and question in answered:
            problem = f"question {question} is answered twice"
        if problem is not None:
            raise UserError(f"{output} line {number}: {problem}", "give another --output, or score it with --responses")
        answered.add(question)
    if kept != data:
        os.truncate(output, len(kept))
    elif last:
        with output.open("ab") as file:
            file.write(b"\n")
    return answered


def _difference(question: Any, metadata: Any, stamps: Mapping[int, dict[str, Any]]) -> str | None:
    """What an answer in a file was made from that these would not be; None if nothing."""
    if not isinstance(metadata, dict) or "prompt" not in metadata:
        return "it was not written by this command"
    if question not in stamps:
        return f"question {question} is not among these questions"
    now = stamps[question]
    if metadata.get("checkpoint") != now["checkpoint"]:
        return "another checkpoint answered"
    if metadata["prompt"] != now["prompt"]:
        return f"question {question} was another one, or asked in another prompt format"
    settings = [key for key in now if metadata.get(key) != now[key]]
    return "; ".join(f"{key} was {metadata.get(key)}, and is {now[key]}" for key in settings) or None
