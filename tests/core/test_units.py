import numpy as np
import pytest

from llama_acc.core.units import count_text, size_text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 items"),
        (1, "1 item"),
        (2, "2 items"),
        (1_234_567, "1,234,567 items"),
        (np.int64(1_234_567), "1,234,567 items"),
        (1.0, "1 item"),
        (0.5, "0.5 items"),
    ],
)
def test_one_thing_is_told_from_several(count: float, text: str) -> None:
    assert count_text(count, "item") == text


def test_sizes_are_told_in_the_largest_unit_they_fill() -> None:
    sizes = [1, 1023, 1024, 1.5 * 2**20, 2000 * 2**30]
    assert [size_text(size) for size in sizes] == ["1 byte", "1,023 bytes", "1.0 KiB", "1.5 MiB", "2,000.0 GiB"]
