"""The largest batch that fits is found, however what is reserved goes up."""

import pytest

from llama_acc.core.vram.fit import _largest
from llama_acc.core.vram.predict import PARTS, Usage


def usage(allocated: int, slack: int) -> Usage:
    return Usage(dict.fromkeys(PARTS, 0) | {"activations kept": allocated, "allocator slack": slack}, "loss")


@pytest.mark.parametrize("segment", [1, 20, 333])
@pytest.mark.parametrize("each", [1, 7, 60])
@pytest.mark.parametrize("limit", [1, 100, 256])
def test_the_largest_count_below_the_memory_is_found_where_slack_goes_in_steps(
    segment: int, each: int, limit: int
) -> None:
    tried = []

    def taken(count: int) -> Usage:
        tried.append(count)
        allocated = 1000 + each * count
        return usage(allocated, -allocated % segment)

    for fitting in (1, 2, 3, 17, 64, 99, 255):
        memory = taken(fitting).total
        largest = max(count for count in range(1, limit + 1) if taken(count).total <= memory)
        tried.clear()
        assert _largest(taken(1), taken, memory, limit) == largest
        assert len(tried) <= 18
