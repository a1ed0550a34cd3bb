"""APIBench's rules, each on a made case, and its published figures on the responses stored with it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llama_acc.core.errors import DataError, UserError
from llama_acc.core.evaluate.gorilla import (
    Api,
    Hub,
    Score,
    answer_questions,
    find_call,
    match_domain,
    read_database,
    read_domains,
    read_objects,
    read_questions,
    read_responses,
    score,
)
from llama_acc.core.generate.chat import generate
from llama_acc.core.generate.load import LoadedModel, load_model
from tests.core.evaluate.apibench import BIRDS, ROADS, TORCH_HUB, TOWNS, write_database, write_evaluation, write_lines
from tests.core.tiny import random_model, save_model

NET, ROAD = "Net.load('town')", "Net.load('road')"


def database(tmp_path: Path, hub: Hub, *calls: str) -> list[Api]:
    """Each call is of a domain of its own, its number from 0."""
    path = write_database(tmp_path / "api.jsonl", [(call, str(number)) for number, call in enumerate(calls)])
    return read_database(path, hub)


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ("{'domain': 'x', 'api_call': 'f(1)', 'api_provider': 'y(2)'}", "'f(1)"),
        ("<<<api_call>>>: f(1)\n<<<api_provider>>>: y", "f(1)"),
        ("<<<api_call>>>: f(1) and no more", "f(1)"),
        ("api_call without a mark (1)", "ithout a mark (1)"),
        ("api_call: no bracket!", "no bracket"),
        ("api_call: f(1), and the second api_call: g(2)", "f(1)"),
        ("api_call", ""),
    ],
)
def test_the_call_stands_between_its_mark_and_the_provider(text: str, call: str) -> None:
    hubs: tuple[Hub, ...] = ("tensorflowhub", "torchhub", "huggingface")
    assert [find_call(text, hub) for hub in hubs] == [call] * 3
    # Without the mark the call is the whole text, but for TorchHub.
    assert [find_call("use f(1)", hub) for hub in hubs] == ["use f(1)", None, "use f(1)"]


@pytest.mark.parametrize(
    ("hub", "calls", "found"),
    [
        ("torchhub", [TOWNS], [Api(b"torch.hub.load", [b"maps/towns", b"town_net"], "0")]),
        ("torchhub", ["torch.hub.load('maps/towns')"], []),
        (
            "tensorflowhub",
            ["hub.load('https://towns/1')", "hub.load(model='a/b', trainable=True)", "hub.load(model = 'c')"],
            [
                Api(b"hub.load", [b"https://towns/1"], "0"),
                Api(b"hub.load", [b"a/b", b"trainable=True"], "1"),
                Api(b"hub.load", [b"c"], "2"),
            ],
        ),
        (
            "huggingface",
            ["./run.sh", "load()", "load", "pass", "load('x')", "pipeline('towns', model='maps/town-net', top_k=3)"],
            [Api(b"load", [b"x"], "4"), Api(b"pipeline", [b"towns", b"maps/town-net", b"3"], "5")],
        ),
    ],
    ids=["repository and model", "arguments by name", "value of model, text of others", "values of all"],
)
def test_what_an_entry_of_the_database_asks_for(hub: Hub, calls: list[str], found: list[Api], tmp_path: Path) -> None:
    assert database(tmp_path, hub, *calls) == found


@pytest.mark.parametrize(
    ("answer", "calls", "domain"),
    [
        # The candidate is a subtree that begins with the name; elsewhere in the answer does not count.
        ("import x\nnet = Net.load('town', fast=True)", [NET], "0"),
        ("show('town')\nnet = Net.load('road')", [NET], None),
        # Of several, the one of the later statement comes first.
        ("Net.load('town')\nNet.load('road')", [NET, ROAD], "1"),
        # Without the name it is the last subtree; later siblings come first, so that is within the first statement.
        ("fetch('town')\nfetch('road')", [NET], "0"),
        ("fetch('road')\nfetch('town')", [NET], None),
        # Every argument must be in it, as a part too; the first match wins.
        ("torch.hub.load('maps/towns', 'road_net')", [TOWNS, ROADS, TOWNS, BIRDS], "1"),
        ("torch.hub.load('maps/towns', 'town_net', force=True)", [TOWNS, ROADS, TOWNS, BIRDS], "0"),
        ("torch.hub.load('birds/songs', 'town_net')", [TOWNS, ROADS, TOWNS, BIRDS], None),
        ("torch.hub.load('maps/towns_of_old', 'town_network')", [TOWNS, ROADS, TOWNS, BIRDS], "0"),
        # Any text is parsed.
        *((answer, [NET], None) for answer in ("", ")(", "'" * 7, "\x00", "\ud800", "(" * 5000, "día.load('ö')")),
    ],
)
def test_which_subtree_of_an_answer_is_compared(
    answer: str, calls: list[str], domain: str | None, tmp_path: Path
) -> None:
    hub: Hub = "torchhub" if calls[0] == TOWNS else "huggingface"
    assert match_domain(answer, database(tmp_path, hub, *calls)) == domain


def test_each_response_is_counted_once(tmp_path: Path) -> None:
    answers = [
        (1, f"<<<api_call>>>: {TOWNS}"),
        (2, f"<<<api_call>>>: {TOWNS}"),
        (3, "<<<api_call>>>: torch.hub.load('maps/rivers', 'river_net')"),
        (4, "I do not know."),
        (5, f"<<<api_call>>>: {ROADS}\n<<<api_provider>>>: PyTorch"),
    ]
    apis = read_database(write_database(tmp_path / "api.jsonl", TORCH_HUB), "torchhub")
    domains = {1: "Towns", 2: "Birds", 3: "Towns", 4: "Towns", 5: "Roads", 6: "Birds"}
    found = score("torchhub", apis, domains, answers)
    assert found == Score(responses=5, correct=2, wrong=1, hallucinated=1, without_call=1)
    assert (found.overall, found.hallucination) == (40.0, 20.0), "of the responses, not of the questions"


@pytest.mark.parametrize(
    ("hub", "overall", "hallucination"), [("torchhub", 75.81, 16.13), ("huggingface", 69.36, 10.95)]
)
def test_the_published_figures_are_those_of_the_stored_responses(
    hub: Hub, overall: float, hallucination: float, shared: Path
) -> None:
    folder = shared / "assets" / "gorilla"
    evaluation = folder / f"{hub}_eval.json"
    domains = read_domains(evaluation, read_objects(evaluation))
    responses = read_responses(folder / f"response_{hub}_Gorilla_FT_0_shot.jsonl", domains)
    found = score(hub, read_database(folder / f"{hub}_api.jsonl", hub), domains, responses)
    assert found.overall == pytest.approx(overall, abs=0.005)
    assert found.hallucination == pytest.approx(hallucination, abs=0.005)


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
    path = Path("eval.json")
    others = {5: {"code": "###Instruction: no answer"}, 6: {}}
    assert read_questions(path, {3: {"code": code}, **others}) == {3: question}
    with pytest.raises(UserError, match=r"eval\.json holds no questions"):
        read_questions(path, others)


def test_prompts_are_asked_without_the_escapes_of_gorillas_files(tmp_path: Path) -> None:
    texts = [" Which town?\\n", ' Find \\"Rome\\".\\n###Input: {\\"a\\": 1}\\n', 'Say "Rome"', "a path: C:\\maps"]
    path = write_lines(tmp_path / "prompts.jsonl", ({"question_id": i, "text": t} for i, t in enumerate(texts, 1)))
    asked = read_questions(path, {number: {} for number in range(1, 5)}, path)
    assert list(asked.values()) == ["Which town?", 'Find "Rome".\n###Input: {"a": 1}', 'Say "Rome"', "a path: C:\\maps"]
    path.write_text('{"question_id": 1, "text": "a"}\n' * 2)
    with pytest.raises(DataError, match="question_id 1 comes more than once"):
        read_questions(path, {1: {}}, path)


def test_gorillas_own_files_give_the_questions_they_were_asked(shared: Path) -> None:
    folder = shared / "assets" / "gorilla"
    evaluation = read_objects(folder / "torchhub_eval.json")
    questions = read_questions(folder / "torchhub_eval.json", evaluation)
    prompts = read_questions(folder / "torchhub_eval.json", evaluation, folder / "questions_torchhub_0_shot.jsonl")
    # One has a blank line less.
    assert prompts == {number: question.replace("\n\n", "\n") for number, question in questions.items()}
    assert len(prompts) == 186
    few = read_objects(folder / "huggingface_eval.json")
    assert (len(few), len(read_questions(folder / "huggingface_eval.json", few))) == (911, 907)


@pytest.mark.parametrize(
    ("read", "lines", "wrong", "said"),
    [
        (
            lambda path: read_database(path, "torchhub"),
            [{"api_call": TOWNS, "domain": "Towns"}, {"domain": "x"}, {"api_call": 3, "domain": "x"}],
            [2, 3],
            "should be texts",
        ),
        (
            lambda path: read_database(path, "torchhub"),
            [{"api_call": "", "domain": "x"}, {"api_call": "# a note", "domain": "x"}],
            [1, 2],
            "'# a note' is not a call",
        ),
        (
            lambda path: read_domains(path, read_objects(path)),
            [{"api_data": {"domain": "x"}}, {}, {"api_data": "x"}, {"api_data": {}}],
            [2, 3, 4],
            "there is no text at api_data.domain",
        ),
        (
            lambda path: read_responses(path, {1}),
            [{"question_id": number, "text": "x"} for number in (1, "1", True, None, 7)],
            [2, 3, 4, 5],
            "the evaluation file has no line 7",
        ),
    ],
)
def test_every_wrong_line_is_named(
    read: Callable[[Path], object], lines: list[dict[str, object]], wrong: list[int], said: str, tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "lines.jsonl", lines)
    with pytest.raises(DataError) as error:
        read(path)
    assert [problem.split(": ")[0] for problem in error.value.problems] == [f"{path} line {n}" for n in wrong]
    assert said in error.value.problems[-1]


def test_lines_are_counted_as_they_stand_in_the_file(tmp_path: Path) -> None:
    path = write_evaluation(tmp_path / "eval.json", [("a", "A\u2028A"), ("b", "B")])
    path.write_text("\ufeff\n" + path.read_text(encoding="utf-8").replace("\\u2028", "\u2028"), encoding="utf-8")
    assert read_domains(path, read_objects(path)) == {2: "A\u2028A", 3: "B"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b'{"a": 1}\n{"a": \n', "line 2: not JSON"),
        (b'[{"a": 1}]', "line 1: it should hold an object"),
        (b'{"a": "\xff"}', r"is not UTF-8: byte 7 \(line 1\)"),
    ],
)
def test_what_is_no_file_of_json_lines_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_objects(path)
    with pytest.raises(UserError, match=r"did you mean 'lines\.jsonl'"):
        read_objects(tmp_path / "line.jsonl")


# A checkpoint's answers: kept as they come, gone on with, and never mixed with those of something else


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
    ("stopped_at", "torn"), [(0, b""), (1, b'{"question_id": 9, "te'), (2, None), (3, b""), (5, b'{"question_id": 9')]
)
def test_answers_go_on_where_they_were_stopped(
    stopped_at: int, torn: bytes | None, answer: Callable[..., None], tmp_path: Path
) -> None:
    """`torn` is behind the last whole line; None: that lacks its line end."""
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    answer(whole)
    with pytest.raises(Stop):
        answer(parts, progress=stop_at(stopped_at))
    kept = parts.read_bytes() if parts.exists() else b""
    assert kept.count(b"\n") == stopped_at
    parts.write_bytes(kept[:-1] if torn is None else kept + torn)
    told = []
    answer(parts, progress=lambda done, _: told.append(done))
    assert told == list(range(stopped_at, 6)), "none is answered twice"
    assert parts.read_bytes().startswith(kept)
    assert texts(parts) == texts(whole)


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
