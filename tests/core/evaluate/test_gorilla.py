"""APIBench's rules, each on a made case, and its published figures on the responses stored with it."""

from pathlib import Path

import pytest

from llama_acc.core.errors import DataError, UserError
from llama_acc.core.evaluate.gorilla import (
    Api,
    Hub,
    Response,
    Score,
    find_call,
    match_domain,
    read_database,
    read_domains,
    read_responses,
    score,
)
from llama_acc.core.evaluate.json_lines import read_objects
from tests.core.evaluate.apibench import (
    BIRDS,
    ROADS,
    TORCH_HUB,
    TOWNS,
    write_database,
    write_evaluation,
    write_lines,
    write_responses,
)


def database(tmp_path: Path, hub: Hub, *calls: str) -> list[Api]:
    """Each call is of a domain of its own, its number from 0."""
    path = write_database(tmp_path / "api.jsonl", [(call, str(number)) for number, call in enumerate(calls)])
    return read_database(path, hub)


# 1. Where the call is looked for


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


def test_without_its_mark_the_call_is_the_whole_text_but_for_torch_hub() -> None:
    assert find_call("use f(1)", "tensorflowhub") == find_call("use f(1)", "huggingface") == "use f(1)"
    assert find_call("use f(1)", "torchhub") is None


# 3. What an entry of the database asks for


def test_torch_hub_asks_for_repository_and_model_only(tmp_path: Path) -> None:
    assert database(tmp_path, "torchhub", TOWNS) == [Api(b"torch.hub.load", [b"maps/towns", b"town_net"], "0")]


def test_tensorflow_hub_asks_for_the_value_of_model_and_for_the_text_of_other_arguments(tmp_path: Path) -> None:
    calls = ("hub.load('https://towns/1')", "hub.KerasLayer(model='a/b', trainable=True)", "hub.load(model = 'c')")
    assert [api.arguments for api in database(tmp_path, "tensorflowhub", *calls)] == [
        [b"https://towns/1"],
        [b"a/b", b"trainable=True"],
        [b"c"],
    ]


def test_hugging_face_asks_for_the_values_of_all_arguments(tmp_path: Path) -> None:
    (api,) = database(tmp_path, "huggingface", "pipeline('towns', model='maps/town-net', top_k=3)")
    assert api == Api(b"pipeline", [b"towns", b"maps/town-net", b"3"], "0")


def test_entries_without_a_call_or_without_arguments_are_skipped(tmp_path: Path) -> None:
    calls = ("./run.sh", "load()", "load", "pass", "load('x')")
    assert database(tmp_path, "huggingface", *calls) == [Api(b"load", [b"x"], "4")]
    assert database(tmp_path, "torchhub", "torch.hub.load('maps/towns')") == []


# 2. and 3. Which subtree of an answer is compared


def test_the_candidate_is_a_subtree_that_begins_with_the_name(tmp_path: Path) -> None:
    apis = database(tmp_path, "huggingface", "Net.load('town')")
    assert match_domain("import x\nnet = Net.load('town', fast=True)", apis) == "0"
    assert match_domain("show('town')\nnet = Net.load('road')", apis) is None, "elsewhere in the answer does not count"


def test_of_several_candidates_the_one_of_the_later_statement_comes_first(tmp_path: Path) -> None:
    apis = database(tmp_path, "huggingface", "Net.load('town')", "Net.load('road')")
    assert match_domain("Net.load('town')\nNet.load('road')", apis) == "1"


def test_without_the_name_the_last_subtree_is_the_candidate(tmp_path: Path) -> None:
    apis = database(tmp_path, "huggingface", "Net.load('town')")
    # Later siblings come first: the last subtree is within the first statement.
    assert match_domain("fetch('town')\nfetch('road')", apis) == "0"
    assert match_domain("fetch('road')\nfetch('town')", apis) is None


def test_every_argument_must_be_in_the_candidate_and_the_first_match_wins(tmp_path: Path) -> None:
    apis = database(tmp_path, "torchhub", TOWNS, ROADS, TOWNS, BIRDS)
    assert match_domain("torch.hub.load('maps/towns', 'road_net')", apis) == "1"
    assert match_domain("torch.hub.load('maps/towns', 'town_net', force=True)", apis) == "0"
    assert match_domain("torch.hub.load('birds/songs', 'town_net')", apis) is None
    assert match_domain("torch.hub.load('maps/towns_of_old', 'town_network')", apis) == "0", "as a part, too"


@pytest.mark.parametrize("answer", ["", ")(", "api_call", "'" * 7, "\x00", "\ud800", "(" * 5000, "día.load('ö')"])
def test_any_answer_is_parsed(answer: str, tmp_path: Path) -> None:
    assert match_domain(answer, database(tmp_path, "huggingface", "Net.load('town')")) is None


# 4. and 5. Figures


def test_each_response_is_counted_once(tmp_path: Path) -> None:
    answers = {
        1: f"<<<api_call>>>: {TOWNS}",
        2: f"<<<api_call>>>: {TOWNS}",
        3: "<<<api_call>>>: torch.hub.load('maps/rivers', 'river_net')",
        4: "I do not know.",
        5: f"<<<api_call>>>: {ROADS}\n<<<api_provider>>>: PyTorch",
    }
    apis = read_database(write_database(tmp_path / "api.jsonl", TORCH_HUB), "torchhub")
    domains = {1: "Towns", 2: "Birds", 3: "Towns", 4: "Towns", 5: "Roads", 6: "Birds"}
    found = score("torchhub", apis, domains, [Response(*answer) for answer in answers.items()])
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


# Files that are wrong


def test_every_wrong_line_is_named(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "api.jsonl",
        [{"api_call": TOWNS, "domain": "Towns"}, {"domain": "x"}, {"api_call": 3, "domain": "x"}, {"api_call": "f(1)"}],
    )
    with pytest.raises(DataError) as error:
        read_database(path, "torchhub")
    assert error.value.problems == [f"{path} line {n}: api_call and domain should be texts" for n in (2, 3, 4)]
    path = write_database(tmp_path / "api.jsonl", [("", "x"), ("# a note", "x")])
    with pytest.raises(DataError, match="'# a note' is not a call") as error:
        read_database(path, "torchhub")
    assert len(error.value.problems) == 2

    path = write_lines(tmp_path / "eval.json", [{"api_data": {"domain": "x"}}, {}, {"api_data": "x"}, {"api_data": {}}])
    with pytest.raises(DataError) as error:
        read_domains(path, read_objects(path))
    assert error.value.problems == [f"{path} line {n}: there is no text at api_data.domain" for n in (2, 3, 4)]

    path = write_lines(
        tmp_path / "responses.jsonl",
        [
            {"question_id": 1, "text": "x"},
            {"question_id": "1", "text": "x"},
            {"question_id": True, "text": "x"},
            {"question_id": 1},
            {"question_id": 7, "text": "x"},
        ],
    )
    with pytest.raises(DataError) as error:
        read_responses(path, {1: "x"})
    assert [problem.split(": ")[0] for problem in error.value.problems] == [f"{path} line {n}" for n in (2, 3, 4, 5)]
    assert "the evaluation file has no line 7" in error.value.problems[-1]


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


def test_stored_responses_are_read_by_question(tmp_path: Path) -> None:
    path = write_responses(tmp_path / "responses.jsonl", [(2, "b"), (1, "a"), (2, "c")])
    assert read_responses(path, {1: "x", 2: "x"}) == [Response(2, "b"), Response(1, "a"), Response(2, "c")]
