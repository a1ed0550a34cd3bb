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
        size = run["model_parallel_size"]
        with joined(CPU, size) as parallel:
            one = setup(*run["overrides"], f"parallel.model_parallel_size={size}", world_size=world_size, dim=run["dim"], micro_batches=run["micro_batches"])
            measured.append(measure(one, CPU, parallel).allocated)
        next_port()
    return measured
