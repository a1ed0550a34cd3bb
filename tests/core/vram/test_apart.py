"""A rank that has joined others asks a process of its own: torch has one process group at a time."""

import pytest
import torch.distributed as dist

from llama_acc.core.errors import UserError
from llama_acc.core.vram.apart import apart
from llama_acc.core.vram.predict import predict
from llama_acc.core.vram.request import Request, setup_of
from tests.core.vram.setups import setup


def test_the_answer_is_the_same_and_so_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    run = setup("parallel.data_parallel=fsdp", world_size=2)
    here = apart(predict, run)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    assert apart(predict, run).training == here.training
    with pytest.raises(UserError, match="there is no model 'llama2-7'"):
        apart(setup_of, Request(model="llama2-7"))
