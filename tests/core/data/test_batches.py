import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llama_acc.core.data.batches import assign_to_ranks, build, epoch_length, epoch_order, micro_batches


def test_an_epochs_order_is_a_permutation_by_seed_and_epoch_that_never_changes() -> None:
    """A resumed run must see what the interrupted one would have, whatever was updated in between."""
    orders = {tuple(epoch_order(((100, 1.0),), seed, epoch).tolist()) for seed in (1, 2) for epoch in (1, 2, 3)}
    assert len(orders) == 6
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert epoch_order(((8, 1.0),), seed=0, epoch=0).tolist() == [2, 4, 3, 6, 5, 0, 1, 7]
    assert epoch_order(((3, 1.0), (1, 1.0)), seed=1, epoch=2, shuffle=False).tolist() == [0, 1, 2, 3]


def test_an_item_is_used_as_often_as_its_source_weighs_and_a_fraction_is_drawn_for_each_epoch() -> None:
    uses = ((100, 2.3), (50, 0.5), (7, 1.0), (3, 0.01), (0, 1.0))
    counts = [np.bincount(epoch_order(uses, seed=0, epoch=epoch), minlength=160) for epoch in range(40)]
    assert {int(count.sum()) for count in counts} == {epoch_length(uses)} == {230 + 25 + 7 + 1}
    assert all(set(count[:100]) == {2, 3} and set(count[100:150]) == {0, 1} for count in counts)
    assert all((count[150:157] == 1).all() for count in counts)
    mean = np.mean(counts, axis=0)
    assert abs(mean[:100] - 2.3).max() < 0.35
    assert abs(mean[100:150] - 0.5).max() < 0.4
    assert epoch_order(uses, 0, 1, shuffle=False).tolist()[:101] == [*range(100), 0]


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40),
    batch_size=st.integers(1, 8),
    max_tokens=st.none() | st.integers(1, 120),
    ranks=st.integers(1, 4),
)
def test_micro_batches_hold_each_document_once_and_keep_to_the_bounds(
    lengths: list[int], batch_size: int, max_tokens: int | None, ranks: int
) -> None:
    items = list(range(0, len(lengths), 2)) + list(range(1, len(lengths), 2))
    batches = micro_batches(items, lengths, batch_size, max_tokens, ranks)
    assert sorted(item for batch in batches for item in batch) == sorted(items)
    for batch in batches:
        assert len(batch) <= batch_size
        assert max_tokens is None or len(batch) <= 1 or sum(lengths[i] for i in batch) <= max_tokens
    assert batches == micro_batches(np.array(items), np.array(lengths), batch_size, max_tokens, ranks)
    if max_tokens is None and ranks == 1:
        assert len(batches) == -(-len(items) // batch_size)
    assigned = assign_to_ranks(batches, lengths, ranks)
    assert sorted(index for own in assigned for index in own) == list(range(len(batches)))
    assert {len(own) for own in assigned} == {len(batches) // ranks}


def test_micro_batches_are_few_and_balanced() -> None:
    loads = [sum(batch) for batch in micro_batches([9, 8, 7, 3, 2, 1], range(10), batch_size=3)]
    assert loads == [14, 16]
    assert assign_to_ranks([[9], [1], [5], [4]], range(10), 2) == [[0, 1], [2, 3]]
    assert micro_batches([0, 1, 2], [3, 100, 3], batch_size=4, max_tokens=10) == [[1], [0, 2]]
    assert micro_batches([], [3, 4], batch_size=2) == []
    # Least loaded first would give 4+2+2, 4+2+2 and then find no room for both of the last two under 9.
    assert len(micro_batches(range(5), [5, 4, 4, 3, 2], batch_size=5, max_tokens=9)) == 2
    assert len(micro_batches(range(7), [4, 4, 2, 2, 2, 2, 2], batch_size=7, max_tokens=6)) == 3


class _Documents:
    def __init__(self, *documents: tuple[list[int], list[int]]) -> None:
        self._documents = documents

    def document(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        tokens, labeled = self._documents[i]
        return np.array(tokens, np.int32), np.array(labeled, bool)

    def documents_in(self, i: int) -> list[tuple[np.ndarray, np.ndarray]]:
        return [self.document(i)]


def test_targets_are_the_labeled_next_tokens_of_the_same_document() -> None:
    documents = _Documents(([1, 5, 6, 2], [0, 0, 1, 1]), ([1, 9], [0, 1]), ([1, 7, 8], [0, 1, 0]))
    batch = build(documents, [2, 0, 1])
    assert batch.tokens.tolist() == [1, 7, 8, 1, 5, 6, 2, 1, 9]
    assert batch.targets.tolist() == [7, -100, -100, -100, 6, 2, -100, 9, -100]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1]
    assert batch.lengths == [3, 4, 2]
    assert {batch.tokens.dtype, batch.targets.dtype, batch.positions.dtype} == {np.dtype("int64")}
    nothing = build(documents, [])
    assert (nothing.targets.tolist(), nothing.lengths, nothing.positions.tolist()) == ([-100], [1], [0])
