import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from llama_acc.core.data.convert.markdown import cleaned
from llama_acc.core.data.templates import TEMPLATES, Turn
from llama_acc.core.tokenizer import load_tokenizer
from tests.core.data.convert.conversions import convert_file, convert_rows, talk, turns_of

REPLY = (
    '<div class="markdown prose w-full break-words dark"><p>Use <strong>this</strong>, with <code>a &lt; b</code>:</p>'
    '<pre><div class="bg-black rounded-md"><div class="flex items-center"><span>python</span><button class="flex">Copy '
    'code</button></div><div class="p-4 overflow-y-auto"><code class="!whitespace-pre hljs language-python"><span '
    'class="hljs-keyword">def</span> <span>f</span>(x_1):\n    <span>return</span> x_1 * 2 &gt; 3\n</code></div></div>'
    '</pre><ol><li>One</li><li>Two</li></ol><p>snake_case &amp; <a href="https://a.b/c">more</a></p></div>'
)
CLEAN = (
    "Use **this**, with `a < b`:\n\n```python\ndef f(x_1):\n    return x_1 * 2 > 3\n```\n\n1. One\n2. Two\n\n"
    "snake_case & [more](https://a.b/c)"
)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (REPLY, CLEAN),
        ("<p>a</p>\n<p>b<br>c</p>", "a\n\nb  \nc"),
        ("2 / 2\n\n<p>a</p>", "a"),
        ("```pythonCopy code\nx = 1\n```", "```python\nx = 1\n```"),
        ("```\ncssCopy code\na {}\n```", "```css\na {}\n```"),
        ("an answer\nCopy3 chars / 1 words\n", "an answer\n\n"),
        ('<div class="whitespace-pre-wrap"><div>a<br>b &lt;p&gt;<br><br>c</div></div>', "a\nb <p>\n\nc"),
        (f'<div class="flex gap-4 whitespace-pre-wrap">{REPLY}</div>', CLEAN),
        ('<div class="min-h whitespace-pre-wrap">a\n  b &lt;c&gt;\n\nd</div>', "a\n  b <c>\n\nd"),
    ],
)
def test_a_web_page_becomes_markdown(text: str, clean: str) -> None:
    assert cleaned(text) == clean


@pytest.mark.parametrize(
    "text",
    [
        "#include <stdio.h>\nint main() { return a < b; }",
        "What does <b>bold</b> mean in HTML?",
        "```html\n<div>x</div>\n```",
        "<T> void f(T x) // a </T>",
        "a List<String> x",
        "x <= 3 and <y>",
        "it is 3 / 4 of them",
        "",
    ],
)
def test_text_that_is_not_html_stays_as_it_is(text: str) -> None:
    assert cleaned(text) == text


def test_html_can_be_kept(tmp_path: Path) -> None:
    row = talk(("human", "a"), ("gpt", "<p>b</p>"))
    assert turns_of(convert_rows("sharegpt", [row], tmp_path)[0][0])[1] == ("gpt", "b")
    assert turns_of(convert_rows("sharegpt", [row], tmp_path, keep_html=True)[0][0])[1] == ("gpt", "<p>b</p>")


@pytest.mark.parametrize(
    ("turns", "expected", "note"),
    [
        ([("User", "a"), ("ChatGPT", "b")], ["a", "b"], None),
        ([("gpt", "x"), ("human", "a"), ("bing", "b")], ["a", "b"], "replies without a question"),
        ([("human", "a"), ("gpt", "b"), ("human", "c")], ["a", "b"], "questions without a reply"),
        ([("human", "a"), ("human", "b"), ("gpt", "c")], ["a\n\nb", "c"], "turns of one role in a row"),
        ([("human", "a"), ("gpt", " \n"), ("human", "c"), ("gpt", "d")], ["c", "d"], "nothing on one side"),
        (
            [*[("human", "a"), ("gpt", "b")], ("system", "s"), ("human", "c"), ("gpt", "d")],
            ["a", "b", "s\n\nc", "d"],
            "system texts were put in front",
        ),
        ([("human", "a"), ("gpt", "b"), ("system", "s")], ["a", "b"], "system texts without a question"),
    ],
)
def test_dialogues_are_questions_and_replies_in_turn(
    tmp_path: Path, turns: list[tuple[str, str]], expected: list[str], note: str | None
) -> None:
    (record,), conversion = convert_rows("sharegpt", [talk(*turns, id="x")], tmp_path)
    assert [text for _, text in turns_of(record)] == expected
    assert [role for role, _ in turns_of(record)] == ["human", "gpt"] * (len(expected) // 2)
    assert record["id"] == "x"
    assert (note is None) == (not conversion.notes)
    assert note is None or any(note in counted for counted in conversion.notes)


@pytest.mark.parametrize("row", [talk(), talk(("gpt", "a")), talk(("human", "a"), ("gpt", " "))])
def test_dialogues_of_which_nothing_is_left_are_counted(tmp_path: Path, row: Any) -> None:
    records, conversion = convert_rows("sharegpt", [row], tmp_path)
    assert (records, conversion.skipped) == ([], {"no question with a reply": 1})


def test_older_collections_call_turns_items(tmp_path: Path) -> None:
    row = {"id": 1, "items": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    assert turns_of(convert_rows("sharegpt", [row], tmp_path)[0][0]) == [("human", "a"), ("gpt", "b")]


@pytest.mark.parametrize("max_tokens", [60, 90, 150, 10_000])
def test_parts_fit_and_are_as_long_as_they_can_be(tmp_path: Path, tokenizer_path: Path, max_tokens: int) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    turns = [(("human", "gpt")[i % 2], f"the {'answer ' * (i * 7 % 11)}{i}") for i in range(20)]
    records, conversion = convert_rows(
        "sharegpt", [talk(*turns, id="x")], tmp_path, tokenizer=tokenizer, max_tokens=max_tokens
    )
    parts = [turns_of(record) for record in records]

    def tokens(part: list[tuple[str, str]]) -> int:
        roles = {"human": "human", "gpt": "assistant"}
        text, *_ = TEMPLATES["dialogue"].dialogue_text([Turn(roles[role], text) for role, text in part])
        return len(tokenizer.encode(text, bos=True, eos=True))

    assert [turn for part in parts for turn in part] == turns
    assert all(part[0][0] == "human" for part in parts)
    assert all(tokens(part) <= max_tokens or len(part) == 2 for part in parts)
    # With the next exchange, none would fit.
    assert all(tokens(part + after[:2]) > max_tokens for part, after in pairwise(parts))
    too_long = sum(tokens(part) > max_tokens for part in parts)
    assert sum(count for note, count in conversion.notes.items() if "would be cut" in note) == too_long
    names = ["x"] if len(parts) == 1 else [f"x_{number}" for number in range(len(parts))]
    assert [record["id"] for record in records] == names


def test_a_part_of_as_many_tokens_as_may_be_is_not_split(tmp_path: Path, tokenizer_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    turns = [(("human", "gpt")[i % 2], f"the answer {i}") for i in range(4)]
    text, *_ = TEMPLATES["dialogue"].dialogue_text(
        [Turn(("human", "assistant")[i % 2], t) for i, (_, t) in enumerate(turns)]
    )
    exactly = len(tokenizer.encode(text, bos=True, eos=True))
    for most, parts in ((exactly, 1), (exactly - 1, 2)):
        options = {"tokenizer": tokenizer, "max_tokens": most}
        assert len(convert_rows("sharegpt", [talk(*turns)], tmp_path, **options)[0]) == parts


def test_other_languages_are_left_out_if_asked(tmp_path: Path) -> None:
    german = talk(
        ("human", "Erkläre mir bitte, warum der Himmel am Tag blau aussieht und am Abend rot wird."), ("gpt", "x")
    )
    english = talk(
        ("human", "Please explain to me why the sky looks blue during the day and red in the evening."), ("gpt", "x")
    )
    short = talk(("human", "1 + 1"), ("gpt", "2"))
    rows = [german, english, short]
    assert len(convert_rows("sharegpt", rows, tmp_path)[0]) == 3
    records, conversion = convert_rows("sharegpt", rows, tmp_path, languages=("en",))
    assert [turns_of(record)[0][1] for record in records] == [english["conversations"][0]["value"], "1 + 1"]
    assert conversion.skipped == {"in another language (de)": 1}


@pytest.mark.parametrize(
    ("name", "items"), [("sharegpt_dummy500.json", 500), ("sharegpt_example.json", 3), ("sharegpt_maths1k.jsonl", 1000)]
)
def test_real_dialogues_stay_as_they_are(shared: Path, name: str, items: int) -> None:
    path = shared / "assets/data" / name
    text = path.read_text(encoding="utf-8")
    rows = json.loads(text) if name.endswith("json") else [json.loads(line) for line in text.split("\n") if line]
    records, conversion = convert_file("sharegpt", path)
    assert len(records) == items
    assert (conversion.skipped, conversion.notes) == ({}, {})
    assert [turns_of(record) for record in records] == [turns_of(row) for row in rows]
