"""What becomes of the rows of every format, what is counted, and what is refused by name."""

import copy
import io
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from llama_acc.core.data.convert.formats import FORMATS, Options, recognize
from llama_acc.core.data.convert.run import Conversion, convert, write_items
from llama_acc.core.data.items import Dialogue, item_of, kind_of
from llama_acc.core.data.templates import TEMPLATES, Turn
from llama_acc.core.errors import DataError, UserError
from llama_acc.core.tokenizer import load_tokenizer
from tests.core.data.convert.conversions import convert_file, convert_rows, talk, turns_of
from tests.core.data.reading import read_items

ONE = {"instruction": "a", "input": "", "output": "b"}
AB = [("human", "a"), ("gpt", "b")]
ONE_AB = talk(*AB)
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def messages(*turns: tuple[str, Any], **others: Any) -> dict[str, Any]:
    return {**others, "messages": [{"role": role, "content": content} for role, content in turns]}


def moss(*turns: tuple[str, str], commands: str = "None") -> dict[str, Any]:
    chat = {
        f"turn_{number}": {
            "Human": f"<|Human|>: {question}<eoh>\n",
            "Commands": f"<|Commands|>: {commands}<eoc>\n",
            "MOSS": f"<|MOSS|>: {reply}<eom>\n",
        }
        for number, (question, reply) in enumerate(turns, start=1)
    }
    return {"conversation_id": 7, "meta_instruction": "You are MOSS.", "chat": chat}


def code(text: Any) -> dict[str, Any]:
    return {"code": text}


PICTURE = talk(
    ("human", "What is\nit?\n<image>"), ("gpt", "A cat.\n\nBlack."), ("human", "Sure?"), ("gpt", "Yes."),
    id="7", image="a.jpg",
)  # fmt: skip
MANY = [t for i in range(11) for t in (("human", f"a\n{i}"), ("gpt", f" <eom> {i}"))]
DOLLY = {"instruction": "a", "context": "c", "response": "b", "category": "x"}
QUESTIONS = {"mapping": {"instruction": "q", "output": "a", "input": "ctx"}}
CONVERTED = [
    # (format, options, a row, its items)
    ("gorilla", {}, code("###Instruction: a\n###Output: b\n"), [{**ONE, "instruction": " a\n", "output": " b\n"}]),
    ("gorilla", {}, code("###Instruction. a###Output:b"), [{**ONE, "instruction": " a"}]),
    ("gorilla", {}, code("###Instruction:a###Input: x\n###Output:b Output: c"), [{**ONE, "output": "b "}]),
    ("gorilla", {}, code("Instruction:a Instruction:b Output:"), [{**ONE, "instruction": "a ", "output": ""}]),
    ("gorilla", {"all_forms": True}, code('{"Instruction": "a, it", "Output":{"b": {}}}'),
     [{**ONE, "instruction": "a, it", "output": '{"b": {}}'}]),
    ("gorilla", {"all_forms": True}, code("{'Instruction': a, 'Output': {'b': 'breaks o"),
     [{**ONE, "output": " {'b': 'breaks o"}]),
    ("llava", {}, PICTURE, [
        {"id": "7", "image": "a.jpg", "instruction": "What is\nit?", "input": "", "output": "A cat.\n\nBlack."},
        {"id": "7", "image": "a.jpg", "instruction": "Sure?", "input": "", "output": "Yes."},
    ]),
    ("llava", {"dialogues": True}, talk(("human", "a\n<image>"), ("gpt", "b"), image="a.jpg"),
     [{"image": "a.jpg", **ONE_AB}]),
    ("sharegpt", {}, {"id": 1, "items": ONE_AB["conversations"]}, [{"id": 1, **ONE_AB}]),
    ("sharegpt", {}, talk(("User ", "a"), ("ChatGPT", "<p>b</p>")), [ONE_AB]),
    ("sharegpt", {"keep_html": True}, talk(("human", "a"), ("gpt", "<p>b</p>")), [talk(AB[0], ("gpt", "<p>b</p>"))]),
    ("sharegpt", {}, talk(*AB, image="a.jpg", id=1), [{"id": 1, "image": "a.jpg", **ONE_AB}]),
    ("openai", {}, messages(("user", "a"), ("assistant", "b")), [ONE_AB]),
    ("openai", {}, messages(("user", [{"type": "text", "text": text} for text in "ac"]), ("assistant", "b")),
     [talk(("human", "a\n\nc"), AB[1])]),
    ("openai", {}, {"conversations": TURNS}, [ONE_AB]),
    ("moss", {}, moss(*[(MANY[i][1], MANY[i + 1][1]) for i in range(0, 22, 2)]), [{"id": 7, **talk(*MANY)}]),
    ("wizardlm", {}, talk(*AB, idx="x"), [ONE_AB]),
    ("wizardlm", {}, {"instruction": "a", "input": "c", "output": "b"}, [{**ONE, "input": "c"}]),
    ("lima", {}, {"conversations": ["a", "b"], "source": "x"}, [ONE_AB]),
    ("lima", {}, talk(*AB, id="lima_0"), [{"id": "lima_0", **ONE_AB}]),
    ("alpaca", {}, {"instruction": "a", "input": None, "output": "b", "text": "x"}, [ONE]),
    ("jsonl", QUESTIONS, {"q": "a", "ctx": "c", "a": "b", "input": "not this"}, [{**ONE, "input": "c"}]),
    ("jsonl", QUESTIONS, {"q": "a", "ctx": None, "a": "b"}, [ONE]),
    ("jsonl", {"mapping": {"conversations": "x", "system": "s"}}, {"x": TURNS, "s": "S"}, [{"system": "S", **ONE_AB}]),
    ("auto", {}, DOLLY, [{**ONE, "input": "c"}]),
    ("auto", {}, {"question": "a", "context": "c", "answer": "b", "id": 7}, [{"id": 7, **ONE, "input": "c"}]),
    ("auto", {}, {"system_prompt": "S", "question": "a", "response": "b"}, [{"system": "S", **ONE}]),
    ("auto", {}, {**ONE, "system": "", "history": [["x", "y"]], "images": ["a.jpg"]},
     [{"images": ["a.jpg"], **ONE, "history": [["x", "y"]]}]),
    ("auto", {}, {"prompt": [*TURNS, TURNS[0]], "completion": TURNS[1:]},
     [talk(*AB, *AB) | {"conversations": [ONE_AB["conversations"][0], {"from": "gpt", "value": "b", "train": False},
                                          *ONE_AB["conversations"]]}]),
    # A column of text may hold a list as its JSON.
    ("auto", {}, talk(*AB) | {"conversations": json.dumps(ONE_AB["conversations"])}, [ONE_AB]),
    ("auto", {}, {"messages": json.dumps(TURNS)}, [ONE_AB]),
    ("auto", {}, {"conversations": '["a", "b"]'}, [ONE_AB]),
    ("auto", {}, {**ONE, "history": '[["x", "y"]]'}, [{**ONE, "history": [["x", "y"]]}]),
]  # fmt: skip


@pytest.mark.parametrize(("format", "options", "row", "items"), CONVERTED)
def test_a_row_becomes_items(format: str, options: dict[str, Any], row: Any, items: list[Any], tmp_path: Path) -> None:
    records, conversion = convert_rows(format, [row], tmp_path, **options)
    assert records == items
    assert [list(record) for record in records] == [list(item) for item in items]
    assert not conversion.skipped


SYSTEMS = [
    ("openai", messages(("system", "S"), ("developer", "T"), ("user", "a"), ("assistant", "b")), "S\n\nT"),
    ("openai", messages(("user", "a"), ("assistant", "b"), system="S"), "S"),
    ("sharegpt", talk(("system", "T"), *AB, system="S", tools="[]"), "S\n\nT"),
    ("sharegpt", talk(("system", "S"), *AB, system_prompt="S"), "S"),
    ("lima", {"conversations": ["a", "b"], "system": "S"}, "S"),
    ("wizardlm", talk(*AB, system="S", idx=1), "S"),
    ("wizardlm", {**ONE, "system_prompt": "S"}, "S"),
    ("llava", talk(*AB, system="S", image="a.jpg"), "S"),
    ("alpaca", {**ONE, "system": "S"}, "S"),
    ("jsonl", {**ONE, "system": "S"}, "S"),
]


@pytest.mark.parametrize(("format", "row", "system"), SYSTEMS)
def test_a_system_text_stays_one_in_every_format(tmp_path: Path, format: str, row: Any, system: str) -> None:
    [record] = convert_rows(format, [row], tmp_path)[0]
    item, found = item_of(record, kind_of(record) or "")
    assert (record["system"], found, item and item.system) == (system, [], system)


@pytest.mark.parametrize("format", ["openai", "sharegpt", "wizardlm", "lima", "llava"])
def test_a_reply_that_is_context_only_stays_so_in_every_format(tmp_path: Path, format: str) -> None:
    row = messages(("user", "a"), ("assistant", "b"), ("user", "a"), ("assistant", "b")) if format == "openai" else None
    row = row or talk(*AB, *AB)
    turns = row.get("messages", row.get("conversations"))
    turns[1]["weight"], turns[3]["weight"] = 0, 1
    records, conversion = convert_rows(format, [row], tmp_path)
    if format == "llava":
        assert ([record["output"] for record in records], conversion.items) == (["b"], 1)
        records, conversion = convert_rows(format, [row], tmp_path, dialogues=True)
    item, _ = item_of(records[0], "dialogue")
    assert isinstance(item, Dialogue)
    assert [bool(turn.weight) for turn in item.turns] == [True, False, True, True]
    assert not conversion.unused
    turns[1]["weight"] = 2
    with pytest.raises(DataError, match=r"turn 2: 'weight' should be from 0 to 1, but is 2"):
        convert_rows(format, [row], tmp_path)


@pytest.mark.parametrize(
    ("turns", "expected", "note"),
    [
        ([("gpt", "x"), ("human", "a"), ("bing", "b")], ["a", "b"], "replies without a question"),
        ([("human", "a"), ("gpt", "b"), ("human", "c")], ["a", "b"], "questions without a reply"),
        ([("human", "a"), ("human", "b"), ("gpt", "c")], ["a\n\nb", "c"], "turns of one role in a row"),
        ([("human", "a"), ("gpt", " \n"), ("human", "c"), ("gpt", "d")], ["c", "d"], "nothing on one side"),
        ([*AB, ("system", "s"), *AB], ["a", "b", "s\n\na", "b"], "system texts were put in front"),
        ([*AB, ("system", "s")], ["a", "b"], "system texts without a question"),
        ([("system", " "), *AB], ["a", "b"], "empty system texts"),
    ],
)
def test_dialogues_are_questions_and_replies_in_turn(
    tmp_path: Path, turns: list[tuple[str, str]], expected: list[str], note: str
) -> None:
    (record,), conversion = convert_rows("sharegpt", [talk(*turns)], tmp_path)
    assert turns_of(record) == [(("human", "gpt")[i % 2], text) for i, text in enumerate(expected)]
    assert any(note in counted for counted in conversion.notes)


CALL = {"name": "f", "arguments": '{"x": 1}'}
CALLED = {
    "from": "gpt",
    "value": "",
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.mark.parametrize(
    ("format", "row", "notes"),
    [
        ("openai", messages(("user", "a"), ("assistant", None), ("tool", "1"), ("tool", ""), ("assistant", "b"),
                            ("user", "c"), ("assistant", "d"), ("tool", "left"), tools=[TOOL]), 1),
        ("sharegpt", talk(("human", "a"), ("function_call", json.dumps(CALL)), ("observation", "1"),
                          ("observation", ""), ("gpt", "b"), ("human", "c"), ("gpt", "d"),
                          tools=json.dumps([TOOL["function"]])), 0),
    ],
)  # fmt: skip
def test_calls_of_tools_are_turns_in_one_form(tmp_path: Path, format: str, row: Any, notes: int) -> None:
    if format == "openai":
        row["messages"][1]["tool_calls"] = [{"type": "function", "function": CALL}]
        row["messages"][5]["name"] = "Ann"
        row["messages"][6] |= {"weight": 0.5, "reasoning": "hm"}
    [record], conversion = convert_rows(format, [row], tmp_path)
    last = {"weight": 0.5, "reasoning_content": "hm"} if format == "openai" else {}
    turns = [("human", "a"), ("gpt", ""), ("tool", "1"), ("tool", ""), ("gpt", "b"), ("human", "c"), ("gpt", "d")]
    expected = [{"from": role, "value": text} for role, text in turns]
    expected[1], expected[6] = CALLED, expected[6] | last
    assert record == {"tools": [TOOL], "conversations": expected}
    assert conversion.unused == ({"messages[].name": 1} if format == "openai" else {})
    assert (len(conversion.notes), item_of(record, "dialogue")[1]) == (notes, [])


UNTRAINED = talk(*AB, ("gpt", "c"))
UNTRAINED["conversations"][1]["train"] = False


@pytest.mark.parametrize(
    ("format", "row", "reason"),
    [
        ("gorilla", code("###Instruction: a"), "no 'Output:' in 'code'"),
        ("gorilla", code("{'Instruction': a, 'Output': b}"), "--all-forms takes it"),
        ("openai", messages(("user", "a"), ("tool", "b")), "no question with a reply"),
        ("openai", {"messages": [{**TURNS[0], "tool_calls": [{}]}]}, "calls of tools are a turn of the assistant"),
        ("lima", talk(*AB, tools=[{}]), "tools go with dialogues"),
        ("openai", messages(("user", [{"type": "image_url", "image_url": {}}])), "has images, sound or files"),
        ("moss", moss(("a", "b"), commands='Search("a")'), "has calls of tools"),
        ("wizardlm", {"idx": 1, "Skill": "Math", "Instruction": "a"}, "an instruction without an output"),
        ("lima", {"conversations": ["a"]}, "a question without a reply, to test with"),
        ("sharegpt", talk(), "no question with a reply"),
        ("sharegpt", talk(("human", "a"), ("gpt", " ")), "no question with a reply"),
        ("sharegpt", UNTRAINED, "replies in a row, of which only some are to be trained on"),
        ("sharegpt", talk(*AB, image={"bytes": "...", "path": None}), "has images that are not given by a path"),
        ("alpaca", {"instruction": " ", "output": "", "id": 3}, "blank: no question and no answer"),
        ("jsonl", {"instruction": None, "input": None, "output": None}, "blank: no question and no answer"),
    ],
)
def test_rows_without_an_item_are_counted_by_reason(tmp_path: Path, format: str, row: Any, reason: str) -> None:
    records, conversion = convert_rows(format, [row, row], tmp_path)
    [(said, count)] = conversion.skipped.items()
    assert (records, reason in said, count) == ([], True, 2)


@pytest.mark.parametrize(
    ("format", "row", "problem"),
    [
        ("gorilla", {}, "no 'code' (its keys: none)"),
        ("gorilla", code(1), "'code' should be text, but is a number"),
        ("gorilla", code("Output: b"), "no 'Instruction:' before 'Output:' in 'code'"),
        ("gorilla", [], "should be an object, but is a list"),
        ("llava", {"conversations": {}}, "'conversations' should be a list, but is an object"),
        ("llava", talk(("human", "a"), ("alien", "b")), "turn 2: unknown role 'alien'"),
        ("sharegpt", {"conversations": ["a"]}, "turn 1: should be an object, but is text"),
        ("sharegpt", {"conversations": [{"from": "gpt"}]}, "turn 1: no 'value' (its keys: 'from')"),
        ("openai", messages(("user", None)), "turn 1: 'content' is null"),
        ("openai", messages(("user", [{"type": "dance"}])), "turn 1: unknown type of content 'dance'"),
        ("openai", {"messages": "[not JSON"}, "'messages' should be a list, but is text"),
        ("openai", {"messages": [{"content": "a"}]}, "turn 1: no 'role'"),
        ("moss", {"chat": []}, "'chat' should be an object, but is a list"),
        ("moss", {"chat": {"x": {}}}, "'chat' should have the keys turn_1, turn_2, ..., but has 'x'"),
        ("moss", {"chat": {"turn_1": {"Human": "a"}}}, "turn 1: no 'MOSS'"),
        ("lima", {"conversations": ["a", 1]}, "turn 2: should be text, but is a number"),
        ("wizardlm", talk(*AB), "is a dialogue among single-turn items"),
    ],
)
def test_wrong_rows_are_named(tmp_path: Path, format: str, row: Any, problem: str) -> None:
    rows = [ONE, row] if format == "wizardlm" else [row]
    with pytest.raises(DataError) as caught:
        convert_rows(format, rows, tmp_path)
    assert f"item {len(rows)} (line {len(rows)}): {problem}" in caught.value.problems[0]


def test_keys_that_are_not_used_are_counted_with_those_of_turns(tmp_path: Path) -> None:
    rows = [talk(*AB, id=i, source="s", score=None) for i in range(3)]
    rows[0]["conversations"][1]["markdown"] = True
    _, conversion = convert_rows("sharegpt", [*rows, talk(("human", "a"), other="x")], tmp_path)
    assert conversion.unused == {"source": 3, "conversations[].markdown": 1}
    mapping = {"instruction": "q", "output": "output"}
    assert convert_rows("jsonl", [{**ONE, "q": "x"}], tmp_path, mapping=mapping)[1].unused == {"instruction": 1}
    assert convert_rows("auto", [DOLLY], tmp_path)[1].unused == {"category": 1}


# Telling the formats apart

RECOGNIZED = {
    "gorilla": [code("###Instruction: a###Output: b"), {**code("{'Instruction': a, 'Output': b}"), "api_call": "x"}],
    "llava": [talk(*AB, image="a.jpg")],
    "sharegpt": [talk(*AB, id="x", idx=None), {"items": talk(*AB)["conversations"]}],
    "wizardlm": [talk(*AB, idx="x"), {"idx": 1, "Skill": "Math", "Instruction": "a"}],
    "lima": [{"conversations": ["a", "b"]}, talk(*AB, id="lima_7")],
    "alpaca": [ONE, {"instruction": "a", "output": "b"}],
    "openai": [messages(("user", "a"), ("assistant", "b")), {"conversations": TURNS}],
    "moss": [moss(("a", "b"))],
    "jsonl": [
        {"question": "a", "answer": "b"},
        {"prompt": "a", "completion": "b"},
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
    ],
}


@pytest.mark.parametrize(("format", "row"), [(format, row) for format, rows in RECOGNIZED.items() for row in rows])
def test_each_format_is_recognized_and_converts(tmp_path: Path, format: str, row: Any) -> None:
    # A table is known by its name, and its columns as JSON of any fields is.
    assert set(RECOGNIZED) == set(FORMATS) - {"csv"}
    recognized = recognize(row)
    assert recognized is not None
    name, why, mapping = recognized
    assert name == format
    assert any(repr(key) in why for key in row), why
    named = convert_rows(format, [row], tmp_path, mapping=mapping, all_forms=True)[0]
    assert convert_rows("auto", [row], tmp_path, all_forms=True)[0] == named


def test_auto_looks_at_each_file_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([ONE]), encoding="utf-8")
    (tmp_path / "b.csv").write_text("question,answer\na,b\n", encoding="utf-8")
    told: list[str] = []
    conversion = Conversion("auto", [tmp_path / "a.json", tmp_path / "b.csv"], note=told.append)
    assert [converted.record for converted in conversion] == [ONE, ONE]
    assert [said.partition(": ")[2].partition(",")[0] for said in told] == ["alpaca", "csv"]
    with pytest.raises(UserError, match="its first ones are no objects"):
        convert_rows("auto", [1, 2], tmp_path)


@pytest.mark.parametrize(
    ("row", "words", "becomes"),
    [
        ({"x": "a", "y": "b"}, "--map instruction=COLUMN --map output=COLUMN", None),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "--map instruction=prompt --map output=chosen", ONE),
        ({**ONE, "output": "", "chosen": "b"}, "--map instruction=instruction --map output=chosen", ONE),
        ({"prompt": "a", "chosen": TURNS, "rejected": TURNS}, "--map conversations=chosen", ONE_AB),
        ({"messages": TURNS, "chosen": TURNS, "rejected": TURNS}, "--map conversations=chosen", ONE_AB),
        ({"conversation_id": "x", "conversation": TURNS}, "--map conversations=conversation", ONE_AB),
        ({"source": "x", "conversation": [{"input": "a", "output": "b"}]}, "--map conversations=conversation", ONE_AB),
        ({"id": "0", "data": ["a", "b"]}, "--map conversations=data", {"id": "0", **ONE_AB}),
        ({"text": "b", "url": "x"}, "--map output=text, for text without questions", {**ONE, "instruction": ""}),
        ({"body": "b", "n": 3}, "--map output=body, for text without questions", {**ONE, "instruction": ""}),
        ({"chosen": "Human: a", "rejected": "Human: b"}, None, None),
        ({**talk(("human", "a")), "chosen": AB[1], "rejected": AB[1]}, None, None),
        ({"completion": "b", "prompt": "a", "label": False}, None, None),
        ({**talk(*AB), "videos": ["x.mp4"]}, None, None),
    ],
)
def test_what_is_no_known_format_is_told_a_mapping_that_works_or_none(
    tmp_path: Path, row: Any, words: str | None, becomes: Any
) -> None:
    path = tmp_path / "row.jsonl"
    path.write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        write_items(Conversion("auto", [path]), io.BytesIO())
    if words is None:
        assert caught.value.hint is None
        assert "trained on" in caught.value.message
        return
    assert words in str(caught.value.hint)
    mapping = dict(word.split("=") for word in re.findall(r"--map ([^, ]+)", str(caught.value.hint)))
    if becomes is not None:
        records, conversion = convert_rows("jsonl", [row], tmp_path, mapping=mapping)
        assert records == [becomes]
        assert not any("[]." in key for key in conversion.unused)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ("question,answer", "--map instruction=question --map output=answer"),
        ("body", "--map output=body, for text without questions; train it with template: none"),
        ("prompt,chosen,rejected", "--map instruction=prompt --map output=chosen"),
    ],
)
def test_a_table_of_other_columns_is_told_a_mapping_that_works(tmp_path: Path, columns: str, words: str) -> None:
    table = tmp_path / "a.csv"
    table.write_text(f"{columns}\n{','.join('abc'[: columns.count(',') + 1])}\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_items(table)
    assert words in str(caught.value.hint)
    mapping = dict(word.split("=") for word in re.findall(r"--map ([^, ]+)", words))
    [record] = convert_file("csv", table, mapping=mapping)[0]
    assert record["output"] == ("a" if columns == "body" else "b")
    with pytest.raises(DataError, match=r"no column 'Question'"):
        convert_file("csv", table, mapping={"instruction": "Question", "output": "answer"})


# Splitting, languages


@pytest.mark.parametrize("max_tokens", [60, 90, 150, 10_000])
def test_parts_fit_and_are_as_long_as_they_can_be(tmp_path: Path, tokenizer_path: Path, max_tokens: int) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    turns = [(("human", "gpt")[i % 2], f"the {'answer ' * (i * 7 % 11)}{i}") for i in range(20)]

    def split(most: int) -> tuple[list[dict[str, Any]], Conversion]:
        return convert_rows("sharegpt", [talk(*turns, id="x")], tmp_path, tokenizer=tokenizer, max_tokens=most)

    def tokens(part: list[tuple[str, str]]) -> int:
        roles = {"human": "human", "gpt": "assistant"}
        text, *_ = TEMPLATES["dialogue"].dialogue_text([Turn(roles[role], text) for role, text in part])
        return len(tokenizer.encode(text, bos=True, eos=True))

    records, conversion = split(max_tokens)
    parts = [turns_of(record) for record in records]
    assert [turn for part in parts for turn in part] == turns
    assert all(part[0][0] == "human" for part in parts)
    assert all(tokens(part) <= max_tokens or len(part) == 2 for part in parts)
    # With the next exchange, none would fit.
    assert all(tokens(part + after[:2]) > max_tokens for part, after in pairwise(parts))
    too_long = sum(tokens(part) > max_tokens for part in parts)
    assert sum(count for note, count in conversion.notes.items() if "would be cut" in note) == too_long
    names = ["x"] if len(parts) == 1 else [f"x_{number}" for number in range(len(parts))]
    assert [record["id"] for record in records] == names
    exactly = tokens(turns)
    assert (len(split(exactly)[0]), len(split(exactly - 1)[0])) == (1, 2)


def test_other_languages_are_left_out_if_asked(tmp_path: Path) -> None:
    questions = [
        "Erkläre mir bitte, warum der Himmel am Tag blau aussieht und am Abend rot wird.",
        "Please explain to me why the sky looks blue during the day and red in the evening.",
        "1 + 1",
    ]
    rows = [talk(("human", question), ("gpt", "x")) for question in questions]
    records, conversion = convert_rows("sharegpt", rows, tmp_path, languages=("en",))
    assert [turns_of(record)[0][1] for record in records] == questions[1:]
    assert conversion.skipped == {"in another language (de)": 1}


# Real data, and LLaMA2-Accessory's tools from their description


def gorilla_reference(path: Path) -> list[dict[str, str]]:
    """The text before "Output:" holds the question, behind "Instruction:" and up to "###"; the answer follows it, up to
    another "Output:"."""
    items = []
    for line in filter(None, path.read_text(encoding="utf-8").split("\n")):
        code = json.loads(line)["code"].replace("###Instruction.", "###Instruction:")
        question, output, answer = code.partition("Output:")
        if output:
            question = question[question.index("Instruction:") + len("Instruction:") :]
            question = re.split("Instruction:|###", question)[0]
            items.append({"instruction": question, "input": "", "output": answer.partition("Output:")[0]})
    return items


@pytest.mark.parametrize(
    ("name", "rows", "items"),
    [("huggingface_eval.json", 911, 907), ("torchhub_eval.json", 186, 186), ("torchhub_train.json", 837, 0)],
)
def test_apibench_by_the_references_rule(shared: Path, name: str, rows: int, items: int) -> None:
    path = shared / "assets/gorilla" / name
    records, conversion = convert_file("gorilla", path)
    assert (conversion.rows, len(records), sum(conversion.skipped.values())) == (rows, items, rows - items)
    assert records == gorilla_reference(path)
    if not items:
        records, conversion = convert_file("gorilla", path, all_forms=True)
        assert (len(records), conversion.skipped) == (rows, {})
        assert all(record["instruction"].strip() and record["output"].lstrip()[0] in "{'" for record in records)
        # As many braces are closed as were opened, but in rows that break off.
        assert sum(r["output"].count("{") != r["output"].count("}") for r in records) <= 20


def llava_reference(items: list[dict[str, Any]]) -> str:
    """A copy of the item for every two turns, without marks and lines."""
    made = []
    for item in items:
        turns = item["conversations"]
        while len(turns) >= 2:
            two, turns = turns[:2], turns[2:]
            one = copy.deepcopy(item)
            one.pop("conversations")
            flat = [{k: "".join(v.split("<image>")).replace("\n", "") for k, v in turn.items()} for turn in two]
            made.append({**one, "conversations": flat})
    return json.dumps(made)


def test_llavas_reference_is_the_references_file_to_the_byte(shared: Path, tmp_path: Path) -> None:
    odd = talk(("human", "é\U0001f600 <image>\n"), ("gpt", "b"), ("human", "left over"), id=1, image="b.jpg")
    (tmp_path / "odd.json").write_text(json.dumps([{**PICTURE, "extra": 1}, odd, {"conversations": []}]))
    real = [shared / "assets/data" / name for name in ("llava_instruct_100.json", "caption_blip_2k.json")]
    for path in (tmp_path / "odd.json", *real):
        convert(Conversion("llava", [path], Options(reference=True)), tmp_path / "out.json")
        expected = llava_reference(json.loads(path.read_text(encoding="utf-8")))
        assert (tmp_path / "out.json").read_text(encoding="ascii") == expected
    row = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "n": 1}]}
    with pytest.raises(DataError, match="turn 2: 'n' should be text, but is a number"):
        convert_rows("llava", [row], tmp_path, reference=True)


@pytest.mark.parametrize(
    ("name", "rows", "items"),
    [
        ("alpaca_5000.json", 5000, 5000),
        ("caption_blip_2k.json", 2183, 2183),
        ("lima_vicuna_format.json", 1029, 1029),
        ("llava_instruct_100.json", 100, 458),
        ("sharegpt_dummy500.json", 500, 500),
        ("sharegpt_example.json", 3, 3),
        ("sharegpt_maths1k.jsonl", 1000, 1000),
        ("WizardLM_testset.jsonl", 218, 0),
    ],
)
def test_every_real_file_converts_and_keeps_its_turns(shared: Path, name: str, rows: int, items: int) -> None:
    path = shared / "assets/data" / name
    records, conversion = convert_file("auto", path)
    assert (len(records), conversion.rows, conversion.notes) == (items, rows, {})
    assert sum(conversion.skipped.values()) == (0 if items else rows)
    if name.startswith("sharegpt"):
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if name.endswith("json") else [json.loads(line) for line in text.splitlines() if line]
        assert [turns_of(record) for record in records] == [turns_of(value) for value in values]
