"""A small benchmark in the form of APIBench: a database, an evaluation file and responses."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

TOWNS = "torch.hub.load(repo_or_dir='maps/towns', model='town_net', pretrained=True)"
BIRDS = "torch.hub.load(repo_or_dir='birds/songs', model='bird_net', pretrained=True)"
ROADS = "torch.hub.load(repo_or_dir='maps/towns', model='road_net', pretrained=True)"
TORCH_HUB = [(TOWNS, "Towns"), (BIRDS, "Birds"), (ROADS, "Roads")]


def write_lines(path: Path, objects: Iterable[Mapping[str, object]]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in objects), encoding="utf-8")
    return path


def write_database(path: Path, calls: Iterable[tuple[str, str]]) -> Path:
    """Calls and their domains."""
    return write_lines(path, ({"api_call": call, "domain": domain} for call, domain in calls))


def write_evaluation(path: Path, questions: Iterable[tuple[str, str]]) -> Path:
    """Questions and the domains they ask for."""
    return write_lines(
        path,
        (
            {"code": f"###Instruction: {question}\n###Output: an answer", "api_data": {"domain": domain}}
            for question, domain in questions
        ),
    )


def write_responses(path: Path, responses: Iterable[tuple[int, str]]) -> Path:
    """Numbers of questions and what was answered."""
    return write_lines(path, ({"question_id": number, "text": text} for number, text in responses))
