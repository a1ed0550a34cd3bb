import multiprocessing
import os
import signal
import time

import pytest

from llama_acc.core.errors import RunError
from llama_acc.core.workers import WorkerPool


@pytest.mark.parametrize("which", [0, 1])
def test_whichever_worker_is_killed_the_pool_ends_with_an_error_that_says_so(which: int) -> None:
    """An idle one holds the lock that the others wait for."""
    before = set(multiprocessing.active_children())
    with WorkerPool(2, "naps", "let it sleep") as pool:
        assert list(pool.map_ahead(time.sleep, [[0.2, 0.2]] * 2, 1)) == [[None, None]] * 2
        workers = sorted(set(multiprocessing.active_children()) - before, key=lambda worker: worker.pid or 0)
        for unheard in (signal.SIGINT, signal.SIGTERM):
            os.kill(workers[which].pid or 0, unheard)
        assert list(pool.map_ahead(abs, [[-1]], 0)) == [[1]]
        os.kill(workers[which].pid or 0, signal.SIGKILL)
        with pytest.raises(RunError, match="a process that naps was killed"):
            list(pool.map_ahead(time.sleep, [[0.2, 0.2]] * 9, 1))
    assert set(multiprocessing.active_children()) <= before
