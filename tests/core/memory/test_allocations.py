"""Counting what torch's CPU allocator gives out."""

import pytest
import torch

from llama_acc.core.memory import workspaces
from llama_acc.core.memory.workspaces import peak_cpu_bytes


def take() -> None:
    first = torch.empty(1 << 20, dtype=torch.uint8)
    del first
    torch.empty(3 << 20, dtype=torch.uint8)


def test_the_peak_is_what_is_held_at_a_time() -> None:
    assert peak_cpu_bytes(take) == 3 << 20


def test_a_torch_that_hides_the_allocators_switch_is_counted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspaces, "_flag", lambda: None)
    assert peak_cpu_bytes(take) == 3 << 20
    assert peak_cpu_bytes(lambda: None) == 0
