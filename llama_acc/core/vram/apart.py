"""Predictions in a process of their own, for one that has joined others: torch has one process group at a time.

`python -m llama_acc.core.vram.apart` reads a pickled question from its parent on standard input, and answers likewise.
"""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from llama_acc.core.distributed.environment import VARIABLES
from llama_acc.core.errors import LlamaAccError, RunError

_Result = TypeVar("_Result")


def apart(function: Callable[..., _Result], *arguments: Any) -> _Result:
    """Calls a function of this package; in a process of its own where this one is one of several.

    Raises:
        LlamaAccError: what the function raised.
        RunError: the process failed otherwise.
    """
    if not dist.is_initialized():
        return function(*arguments)
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run(
        [sys.executable, "-m", "llama_acc.core.vram.apart"],
        input=pickle.dumps((function, arguments)),
        capture_output=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        raise RunError(f"the memory could not be predicted: {done.stderr.decode(errors='replace')[-2000:]}")
    answer = pickle.loads(done.stdout)
    if isinstance(answer, LlamaAccError):
        raise answer
    return answer


def _answer() -> None:
    function, arguments = pickle.loads(sys.stdin.buffer.read())
    answer: Any
    try:
        answer = function(*arguments)
    except LlamaAccError as error:
        answer = error
    sys.stdout.buffer.write(pickle.dumps(answer))


if __name__ == "__main__":
    _answer()
