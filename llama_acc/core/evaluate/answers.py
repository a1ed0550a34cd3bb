"""A checkpoint answers questions, into a file that a stopped evaluation goes on with.

A line is {"question_id", "text", "model_id", "metadata"}, as in Gorilla's own responses. `metadata` says what the
answer was made from, so that it is never taken for another's.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llama_acc.core.checkpoint.adapter import fingerprint
from llama_acc.core.checkpoint.layout import inspect, locate
from llama_acc.core.checkpoint.load import read_weights
from llama_acc.core.errors import DataError, UserError
from llama_acc.core.evaluate.json_lines import parse_objects
from llama_acc.core.generate.chat import encode_question
from llama_acc.core.generate.engine import Engine, Prompt, Sampler, Sampling
from llama_acc.core.generate.load import LoadedModel
from llama_acc.core.input_files import read_bytes

_BEGINNING = b'{"question_id": '

Progress = Callable[[int, int], None]
"""Called with (questions answered, questions in all)."""


class Answering(NamedTuple):
    """Who answers, and how.

    Attributes:
        checkpoints: as `load_model` took them.
        max_new_tokens: most tokens of an answer.
        batch_size: most answers under way at a time.
    """

    checkpoints: Sequence[str]
    max_new_tokens: int
    batch_size: int


def answer_questions(
    loaded: LoadedModel, answering: Answering, questions: Mapping[int, str], output: Path, progress: Progress
) -> None:
    """Appends the greedy answer to every question that has none in `output` yet, each as soon as it has ended.

    Args:
        loaded: the model of these checkpoints.
        answering: see there.
        questions: by question_id.
        output: the file of responses; it may not exist yet.
        progress: told at first and after each answer.

    Raises:
        DataError: questions that do not fit in the model's context.
        UserError: `output` holds something else than this model's answers to these questions.
    """
    prompts = _encode(loaded, questions)
    stamps = _stamps(loaded, answering, prompts)
    answered = _answered(output, stamps)
    left = [number for number in prompts if number not in answered]
    progress(len(answered), len(prompts))
    name = Path(answering.checkpoints[-1]).name
    with output.open("ab") as file:
        sampler = Sampler(Sampling(temperature=0, max_new_tokens=answering.max_new_tokens))
        replies = Engine(loaded).generate((prompts[number] for number in left), sampler, answering.batch_size)
        for done, reply in enumerate((reply for reply, _ in replies if reply.ended), start=len(answered) + 1):
            number = left[reply.index]
            line = {"question_id": number, "text": reply.text, "model_id": name, "metadata": stamps[number]}
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            progress(done, len(prompts))


def _encode(loaded: LoadedModel, questions: Mapping[int, str]) -> dict[int, Prompt]:
    prompts: dict[int, Prompt] = {}
    problems: list[str] = []
    for number, question in questions.items():
        try:
            prompts[number] = encode_question(loaded, question)
        except UserError as error:
            problems.append(f"question {number}: {error.message}")
    if problems:
        raise DataError(problems)
    return prompts


def _stamps(loaded: LoadedModel, answering: Answering, prompts: Mapping[int, Prompt]) -> dict[int, dict[str, Any]]:
    """What the answer to each question is made from."""
    weights = read_weights([inspect(locate(checkpoint)) for checkpoint in answering.checkpoints])
    checkpoint = fingerprint(weights, list(weights.tensors))
    return {
        number: {
            "checkpoint": checkpoint,
            "quantised": loaded.model.is_quantized,
            "prompt": hashlib.sha256(json.dumps(prompt.tokens).encode()).hexdigest(),
            "max_new_tokens": answering.max_new_tokens,
        }
        for number, prompt in prompts.items()
    }


def _answered(output: Path, stamps: Mapping[int, dict[str, Any]]) -> set[int]:
    """The questions that have an answer in the file, which afterwards ends with a whole line.

    Raises:
        UserError: the file cannot be gone on with.
    """
    data = read_bytes(output) if output.exists() else b""
    kept = _without_torn_line(data)
    answered: set[int] = set()
    for number, entry in parse_objects(kept, output).items() if kept else ():
        question: Any = entry.get("question_id")
        problem = _difference(question, entry.get("metadata"), stamps)
        if problem is None and question in answered:
            problem = f"question {question} is answered twice"
        if problem is not None:
            raise UserError(f"{output} line {number}: {problem}", "give another --output, or score it with --responses")
        answered.add(question)
    if kept != data:
        os.truncate(output, len(kept))
    elif not data.endswith(b"\n") and data:
        with output.open("ab") as file:
            file.write(b"\n")
    return answered


def _without_torn_line(data: bytes) -> bytes:
    """What is left of a file whose last line a writer was killed over."""
    whole = data.rfind(b"\n") + 1
    try:
        json.loads(data[whole:] or b"{}")
    except ValueError:
        return data[:whole] if data[whole:].startswith(_BEGINNING) else data
    return data


def _difference(question: Any, metadata: Any, stamps: Mapping[int, dict[str, Any]]) -> str | None:
    """What an answer in a file was made from that these would not be; None if nothing."""
    if not isinstance(metadata, dict) or "prompt" not in metadata:
        return "it was not written by this command"
    if question not in stamps:
        return f"question {question} is not among these questions"
    now = stamps[question]
    if metadata.get("checkpoint") != now["checkpoint"]:
        return "another checkpoint answered"
    if metadata.get("prompt") != now["prompt"]:
        return f"question {question} was another one, or asked in another prompt format"
    settings = [key for key in ("quantised", "max_new_tokens") if metadata.get(key) != now[key]]
    if settings:
        return "; ".join(f"{key} was {metadata.get(key)}, and is {now[key]}" for key in settings)
    return None
