"""The prediction of a rank is what real ranks take, joined by gloo."""

from typing import Any

import pytest

from llama_acc.core.memory.predict import predict
from tests.core.memory.setups import setup
from tests.core.ranks import run_ranks

RUNS: dict[str, dict[str, Any]] = {
    "ddp": {"overrides": ["parallel.data_parallel=ddp"], "micro_batches": 2},
    "sdp": {"overrides": ["parallel.data_parallel=sdp"], "micro_batches": 2},
    "fsdp": {"overrides": ["parallel.data_parallel=fsdp"], "micro_batches": 2},
    "fsdp, gradients gathered": {
        "overrides": ["parallel.data_parallel=fsdp", "parallel.accumulate_unsharded=true"],
        "micro_batches": 2,
    },
    "model parallel 2": {"overrides": ["parallel.model_parallel_size=2"], "micro_batches": 1},
}


@pytest.mark.soak
@pytest.mark.parametrize("count", [2, 4])
def test_prediction_is_what_ranks_take(count: int) -> None:
    measured = run_ranks(count, "tests.core.memory.rank_work:peaks", runs=list(RUNS.values()), world_size=count)
    for number, (name, run) in enumerate(RUNS.items()):
        one = setup(*run["overrides"], world_size=count, micro_batches=run["micro_batches"])
        peaks = [of_rank[number] for of_rank in measured]
        assert peaks == [pytest.approx(predict(one).training.total, rel=0.05)] * count, name
