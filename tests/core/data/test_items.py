import json
import pickle
from collections import Counter
from typing import Any

import pytest

from llama_acc.core.data.findings import KINDS, beginning
from llama_acc.core.data.items import Dialogue, SingleTurn, first_exchange, item_of, kind_of
from llama_acc.core.data.keys import unused_text
from llama_acc.core.data.templates import Turn


def test_a_finding_says_kind_place_field_and_how_the_value_begins() -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "bard", "value": "x" * 100}, {"from": "gpt", "value": ["y"]}]
    _, (role, value) = item_of({"conversations": turns}, "dialogue", "item 2")
    assert role[:3] == ("unknown_role", "item 2", "turn 2, from")
    assert role.value == '"' + "x" * 60 + '" ...'
    assert value == ("wrong_type", "item 2", "turn 3, value", "turn 3: 'value' should be text, but is a list", '["y"]')
    assert all(KINDS[finding.kind].fatal for finding in (role, value))
    assert pickle.loads(pickle.dumps(role)) == role


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("a\nb", '"a\\nb"'),
        ("é\u2028", '"é\u2028"'),
        ("ab\ud800", '"ab\\ud800"'),
        ({"a": [1, None]}, '{"a": [1, null]}'),
        (list(range(10**6)), "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 1 ..."),
    ],
)
def test_how_values_begin(value: Any, shown: str) -> None:
    assert beginning(value) == shown


def test_images_are_a_path_or_several() -> None:
    item = {"instruction": "a", "output": "b"}
    for given, images in [("x.png", ("x.png",)), (["x.png", "y z.jpg"], ("x.png", "y z.jpg")), ("", ()), (None, ())]:
        assert item_of({**item, "image": given}, "single_turn") == (SingleTurn("a", None, "b", images), [])
    assert item_of(said("a", image="x.png"), "dialogue") == (Dialogue([Turn("human", "a")], ("x.png",)), [])


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ({"path": "x"}, "'image' should be a path or a list of paths, but holds an object"),
        (["x.png", ""], "'image' should be a path or a list of paths, but holds text"),
        ([3], "but holds a number"),
        ("https://a.org/b.png", "'image' is an address: images are read from disk"),
        ("a\ud800.png", "'image' has a lone surrogate"),
    ],
)
def test_what_is_no_path_of_an_image_says_so(image: Any, said: str) -> None:
    item, found = item_of({"instruction": "a", "output": "b", "image": image}, "single_turn")
    assert item is None
    assert said in str(found[0])


def test_a_caption_is_an_output_without_an_instruction() -> None:
    expected = SingleTurn("", None, "a cat", ("cat.jpg",))
    assert item_of({"image": "cat.jpg", "caption": "a cat"}, "single_turn") == (expected, [])
    assert item_of({"url": "cat.jpg", "caption": "a cat"}, "single_turn") == (expected, [])
    assert kind_of({"url": "cat.jpg", "caption": "a cat"}) == "single_turn"
    for wrong, said in [(3, "'caption' should be text"), ([], "empty list"), (["a", 1], "'caption' should be text")]:
        item, found = item_of({"image": "cat.jpg", "caption": wrong}, "single_turn")
        assert item is None
        assert said in str(found[0])


def test_of_several_captions_one_is_taken_that_follows_from_them() -> None:
    captions = [[f"one {i}", f"two {i}"] for i in range(60)]
    taken = [[item_of({"image": name, "caption": some}, "single_turn")[0] for some in captions] for name in "xy"]
    outputs = [[item.output for item in items if isinstance(item, SingleTurn)] for items in taken]
    assert outputs[0] == outputs[1]
    assert 15 < sum(output.startswith("one") for output in outputs[0]) < 45


def test_the_first_exchange_of_a_dialogue_as_it_stands() -> None:
    turns = [
        {"from": "human", "value": "what?\n<image>"},
        {"from": "gpt", "value": " that "},
        {"from": "human", "value": "x"},
    ]
    value = first_exchange({"id": 7, "image": "x.png", "conversations": turns})
    assert item_of(value, "single_turn") == (SingleTurn("what?\n<image>", None, " that ", ("x.png",)), [])
    for other in (3, {"conversations": []}, {"conversations": turns[:1]}, {"instruction": "a", "output": "b"}):
        assert first_exchange(other) == other


def said(*turns: str, **keys: Any) -> dict[str, Any]:
    """A dialogue of questions and replies."""
    return {"conversations": [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)], **keys}


def test_keys_that_change_an_item_are_used() -> None:
    """As LLaMA-Factory (system, history, images), Dolly (context) and OpenOrca (system_prompt) mean them."""
    one = {"instruction": "and then?", "output": "b"}
    history = {"history": [["first?", "a"]]}
    earlier = [Turn("human", "first?"), Turn("assistant", "a")]
    asked = [*earlier, Turn("human", "and then?\n\nx"), Turn("assistant", "b")]
    for value, item in [
        ({**one, "system": "S"}, SingleTurn("and then?", None, "b", system="S")),
        ({**one, "system_prompt": "S", "system": " "}, SingleTurn("and then?", None, "b", system="S")),
        ({**one, "system": ""}, SingleTurn("and then?", None, "b")),
        ({**one, "context": "x"}, SingleTurn("and then?", "x", "b")),
        ({**one, "context": "x", "input": ""}, SingleTurn("and then?", "x", "b")),
        ({**one, "images": ["x.png"]}, SingleTurn("and then?", None, "b", ("x.png",))),
        ({**one, **history, "input": "x", "system": "S"}, Dialogue(asked, system="S")),
        (said("q", "a", system="S", tools="[]"), Dialogue([Turn("human", "q"), Turn("assistant", "a")], system="S")),
    ]:
        assert item_of(value, kind_of(value) or "") == (item, []), value
    for value, field in (({**one, **history}, "history"), (said("q", "a"), "conversations")):
        assert item_of({**value, field: json.dumps(value[field])}, "dialogue") == item_of(value, "dialogue")
        assert kind_of({**value, field: json.dumps(value[field])}) == "dialogue"
    talk = said("q", "a", system="S")
    talk["conversations"].insert(0, {"from": "system", "value": "T"})
    assert item_of(talk, "dialogue") == (Dialogue([Turn("human", "q"), Turn("assistant", "a")], system="S\n\nT"), [])
    assert first_exchange(talk) == {"instruction": "q", "output": "a", "system": "T"}
    for text, system in (("S", "S"), ("", "")):
        talk = said("q", "a", system=text.strip())
        talk["conversations"].insert(0, {"from": "system", "value": text})
        assert item_of(talk, "dialogue") == (Dialogue([Turn("human", "q"), Turn("assistant", "a")], (), system), [])


def test_openais_messages_are_dialogues() -> None:
    turns = [Turn("human", "q"), Turn("assistant", "a")]
    asked, answered = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    parts = {"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "r"}]}
    seen = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]}
    for value, item in [
        ({"messages": [asked, answered]}, Dialogue(turns)),
        ({"messages": json.dumps([asked, answered])}, Dialogue(turns)),
        ({"conversations": [asked, answered]}, Dialogue(turns)),
        ({"messages": [{"role": "developer", "content": "S"}, asked, answered]}, Dialogue(turns, system="S")),
        ({"messages": [asked, {**answered, "weight": 0}]}, Dialogue([turns[0], turns[1]._replace(weight=0.0)])),
        ({"messages": [parts, answered]}, Dialogue([Turn("human", "q\n\nr"), turns[1]])),
        ({"messages": [seen, answered], "images": ["x.png"]}, Dialogue(turns, ("x.png",))),
    ]:
        assert kind_of(value) == "dialogue"
        assert item_of(value, "dialogue") == (item, []), value
    assert first_exchange({"messages": [asked, answered]}) == {"instruction": "q", "output": "a"}
    for message, said_of_it in [
        (seen, "'content' has a part that is no text"),
        ({"role": "bard", "content": "q"}, "unknown role 'bard' in 'role'"),
        ({"role": "user"}, "no 'content' (its keys: 'role')"),
    ]:
        _, [finding] = item_of({"messages": [message, answered]}, "dialogue")
        assert finding.message.startswith(f"turn 1: {said_of_it}")
    both = {"instruction": "q", "output": "a", "messages": []}
    assert kind_of(both) == "single_turn"
    assert kind_of({"messages": None, "text": "a"}) == "text"


@pytest.mark.parametrize("key", ["train", "training", "trainable", "loss", "weight"])
@pytest.mark.parametrize("no", [False, 0, 0.0])
def test_a_reply_that_says_so_is_context_only(key: str, no: Any) -> None:
    """`weight` is OpenAI's word, `train` axolotl's, `loss` ms-swift's."""
    talk = said("q", "wrong", "sure?", "right")
    talk["conversations"][0][key] = no
    talk["conversations"][1][key] = no
    talk["conversations"][3][key] = True
    turns = [Turn("human", "q"), Turn("assistant", "wrong", weight=0)]
    assert item_of(talk, "dialogue") == (Dialogue([*turns, Turn("human", "sure?"), Turn("assistant", "right")]), [])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"weight": 1.5}, "turn 2: 'weight' should be from 0 to 1, but is 1.5"),
        ({"weight": -0.5}, "turn 2: 'weight' should be from 0 to 1, but is -0.5"),
        ({"weight": float("nan")}, "turn 2: 'weight' should be from 0 to 1, but is NaN"),
        ({"loss": 0.5}, "turn 2: 'loss' should be true or false, 1 or 0, but is 0.5"),
        ({"train": "no"}, "turn 2: 'train' should be true or false, 1 or 0, but is \"no\""),
        ({"train": True, "weight": 0}, "turn 2: 'train' and 'weight' contradict each other"),
        ({"train_detail": [{"begin_offset": 0}]}, "turn 2: parts of a reply cannot be trained on alone"),
        ({"from": "human", "tool_calls": [{}]}, "turn 2: calls of tools are a turn of the assistant ('tool_calls')"),
        ({"from": "human", "train": True}, "turn 2: 'train' asks to train on a turn that is no reply"),
        ({"from": "system"}, "turn 2 is a system text behind the first turn"),
    ],
)
def test_what_a_turn_asks_for_and_cannot_have_is_refused_by_name(change: dict[str, Any], reason: str) -> None:
    talk = said("q", "a")
    talk["conversations"][1].update(change)
    item, found = item_of(talk, "dialogue")
    assert item is None
    assert reason in str(found[0])
    assert [finding.kind for finding in found] == ["unsupported"]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "a preferred and a rejected reply"),
        (said("a", chosen={"from": "gpt", "value": "b"}), "('chosen')"),
        ({"instruction": "a", "output": "b", "tools": [{"name": "f"}]}, "tools go with dialogues"),
        (said("a", "b", videos=["x.mp4"]), "sound and video"),
        ({"instruction": "a", "output": "b", "kto_tag": False}, "'kto_tag' is false"),
        ({"instruction": "a", "output": "b", "input": "c", "context": "d"}, "'input' and 'context' are names"),
        (said("a", "b", history=[["x", "y"]]), "earlier turns have to be in the conversation"),
    ],
)
def test_keys_that_change_an_item_and_cannot_be_used_are_refused_by_name(value: Any, reason: str) -> None:
    item, found = item_of(value, kind_of(value) or "single_turn")
    assert item is None
    assert reason in str(found[0])
    assert [finding.kind for finding in found] == ["preference" if "chosen" in value else "unsupported"]


def test_all_other_keys_are_counted_with_those_of_turns() -> None:
    unused: Counter[str] = Counter()
    talk = said("a", "b", "c", "d", id="x", score=None)
    for turn in talk["conversations"]:
        turn["markdown"] = True
    values = [talk, {"instruction": "a", "output": "b", "source": "s", "text": " "}, said("a", "b", id=0), "no item"]
    for value in values:
        item_of(value, kind_of(value) or "dialogue", "", unused)
    assert unused == {"id": 2, "conversations[].markdown": 1, "source": 1}
    assert unused_text({"": 1}) == "'' (1 item)"  # pandas' index
    assert unused_text(unused) == "id (2 items), conversations[].markdown (1 item), source (1 item)"
    for number in range(1000):
        item_of({"instruction": "a", "output": "b", f"key {number}": 1}, "single_turn", "", unused)
    assert len(unused) < 200
    assert unused.total() == 1004


BLANK = [
    {"instruction": "", "output": ""},
    {"instruction": " \n", "input": "\t", "output": "", "id": 7, "system": "S"},
    {"instruction": None, "input": None, "output": None},
    {"image": "", "caption": " "},
    said("", " "),
    said(),
]
SAYING = [
    {"instruction": "Name it.", "output": ""},
    {"instruction": "", "output": "a"},
    {"instruction": "", "input": "a", "output": ""},
    {"image": "x.png", "instruction": "", "output": ""},
    said("a", ""),
]


@pytest.mark.parametrize("value", [*BLANK, *SAYING])
def test_a_blank_row_is_no_item_and_no_error(value: Any) -> None:
    item, found = item_of(value, kind_of(value) or "", "item 3")
    assert [(finding.kind, finding.fatal) for finding in found] == [("blank", False)] * (value in BLANK)
    assert (item is None) == (value in BLANK)
