"""What the processes of test_measured_ranks.py do."""

from collections.abc import Sequence
from typing import Any

from llama_acc.core.parallel import joined
from llama_acc.core.vram.measure import measure
from tests.core.ranks import next_port
from tests.core.tiny import CPU
from tests.core.vram.setups import setup


def peaks(runs: Sequence[dict[str, Any]], world_size: int) -> list[int]:
    """Of each run, the most bytes that torch's allocator had given out on this rank."""
    measured = []
    for run in runs:
        one = setup(*run["overrides"], world_size=world_size, micro_batches=run["micro_batches"])
        with joined(CPU, one.recipe.parallel.model_parallel_size) as parallel:
            measured.append(measure(one, CPU, parallel).allocated)
        next_port()
    return measured
