"""The methods that fit, in order, and the largest batch, however what is reserved goes up."""

from dataclasses import replace

import pytest

from llama_acc.core.memory.fit import WAYS, _largest, fitting
from llama_acc.core.memory.predict import PARTS, Usage, predict
from llama_acc.core.memory.request import Request, setup_of


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

    for count_that_fits in (1, 2, 3, 17, 64, 99, 255):
        memory = taken(count_that_fits).total
        largest = max(count for count in range(1, limit + 1) if taken(count).total <= memory)
        tried.clear()
        assert _largest(taken(1), taken, memory, limit) == largest
        assert len(tried) <= 24


def test_methods_come_best_first_and_what_lasts_is_a_bound_of_those_that_it_alone_excludes() -> None:
    shape = "model.params={dim: 64, n_layers: 2, n_heads: 4, multiple_of: 16, vocab_size: 300, max_seq_len: 512}"
    request = Request(recipe="alpaca", batch_size=1, max_tokens=64, overrides=(shape, "model.max_seq_len=512"))
    fits = list(fitting(request, memory=1 << 20))
    assert [(fit.method, fit.quantize) for fit in fits] == WAYS
    assert all(fit.is_bound and fit.batch_size == fit.longest == 0 for fit in fits)
    needed = predict(setup_of(replace(request, tuning="full", quantize="none"))).training.total
    assert 0.9 * needed < fits[0].least < needed
