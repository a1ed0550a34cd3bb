import pickle
from typing import Any

import pytest

from llama_acc.core.data.findings import KINDS, beginning
from llama_acc.core.data.items import Dialogue, SingleTurn, item_of


def test_an_item_has_no_findings_and_what_has_findings_is_no_item() -> None:
    assert item_of({"instruction": "a", "output": "b"}, "single_turn") == (SingleTurn("a", None, "b"), [])
    item, found = item_of({"instruction": 1, "output": "b"}, "single_turn", "item 4 (line 9)")
    assert item is None
    assert [str(f) for f in found] == ["item 4 (line 9): 'instruction' should be text, but is a number: 1"]
    talk = {"conversations": [{"from": "User", "value": "a"}, {"from": "gpt", "value": ""}]}
    assert item_of(talk, "dialogue") == (Dialogue([("human", "a"), ("assistant", "")]), [])


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
