import pickle
from typing import Any

import pytest

from llama_acc.core.data.findings import KINDS, beginning
from llama_acc.core.data.items import Dialogue, SingleTurn, first_exchange, item_of, kind_of
from llama_acc.core.data.templates import Turn


def test_an_item_has_no_findings_and_what_has_findings_is_no_item() -> None:
    assert item_of({"instruction": "a", "output": "b"}, "single_turn") == (SingleTurn("a", None, "b"), [])
    item, found = item_of({"instruction": 1, "output": "b"}, "single_turn", "item 4 (line 9)")
    assert item is None
    assert [str(f) for f in found] == ["item 4 (line 9): 'instruction' should be text, but is a number: 1"]
    talk = {"conversations": [{"from": "User", "value": "a"}, {"from": "gpt", "value": ""}]}
    assert item_of(talk, "dialogue") == (Dialogue([Turn("human", "a"), Turn("assistant", "")]), [])


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
    for given, images in [
        ("x.png", ("x.png",)),
        (["x.png", "y z.jpg"], ("x.png", "y z.jpg")),
        ("", ()),
        (None, ()),
        ([], ()),
    ]:
        assert item_of({**item, "image": given}, "single_turn") == (SingleTurn("a", None, "b", images), [])
    talk = {"conversations": [{"from": "human", "value": "a"}], "image": "x.png"}
    assert item_of(talk, "dialogue") == (Dialogue([Turn("human", "a")], ("x.png",)), [])


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
    taken = [item_of({"image": "x.png", "caption": some}, "single_turn")[0] for some in captions]
    assert taken == [
        item_of({"image": "y.png", "caption": some}, "single_turn")[0]._replace(images=("x.png",)) for some in captions
    ]
    firsts = sum(item.output.startswith("one") for item in taken if isinstance(item, SingleTurn))
    assert 15 < firsts < 45


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
