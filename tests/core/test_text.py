import numpy as np
import pytest

from llama_acc.core.text import count_text, escape_control_chars, size_text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (count_text(0, "item"), "0 items"),
        (count_text(1, "item"), "1 item"),
        (count_text(np.int64(1_234_567), "item"), "1,234,567 items"),
        (count_text(1.0, "epoch"), "1 epoch"),
        (count_text(0.5, "epoch"), "0.5 epochs"),
        (size_text(1), "1 byte"),
        (size_text(1023), "1,023 bytes"),
        (size_text(1024), "1.0 KiB"),
        (size_text(1.5 * 2**20), "1.5 MiB"),
        (size_text(2000 * 2**30), "2,000.0 GiB"),
    ],
)
def test_quantities_are_written_as_people_say_them(text: str, expected: str) -> None:
    assert text == expected


def test_what_would_act_on_a_terminal_is_shown_instead() -> None:
    assert escape_control_chars("a\x1b[31mb\x07\x7f\x9b\u202ec\u2028") == "a␛[31mb␇␡<U+009B><U+202E>c<U+2028>"
    plain = "plain\n\ttext é 日本 😀👩‍👩‍👧 \u00a0"
    assert escape_control_chars(plain) == plain
