"""Kinds of GPU, and what they take besides the program's tensors: `gpus.yaml`, with sources. Imports no torch."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from llama_acc.core.errors import UserError, did_you_mean

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Kind:
    """A kind of GPU.

    Attributes:
        name: such as "a100-80gb".
        memory: bytes.
        bf16: floating-point operations in a second, dense matrix products in bf16.
        bandwidth: bytes in a second.
        source: where these are from.
    """

    name: str
    memory: int
    bf16: float
    bandwidth: float
    source: str


@dataclass(frozen=True)
class Overhead:
    """What a process on a GPU takes besides the program's tensors.

    Attributes:
        cublas: bytes that PyTorch allocates for matrix products.
        context: bytes outside of PyTorch's allocator.
        nccl: bytes outside of it where there are several ranks.
    """

    cublas: int
    context: int
    nccl: int


@cache
def _table() -> Any:
    return yaml.safe_load(Path(__file__).with_name("gpus.yaml").read_text(encoding="utf-8"))


def kinds() -> dict[str, Kind]:
    """Every kind by its name."""
    return {
        name: Kind(name, row["memory"] * GIB, row["bf16"] * 1e12, row["bandwidth"] * 1e9, row["source"])
        for name, row in _table()["kinds"].items()
    }


def kind(name: str) -> Kind:
    """A kind by its name.

    Raises:
        UserError: an unknown one, with the near ones.
    """
    known = kinds()
    if name not in known:
        raise UserError(
            f"unknown kind of GPU '{name}'", did_you_mean(name, known) or f"known kinds: {', '.join(known)}"
        )
    return known[name]


def overhead() -> Overhead:
    """The table's."""
    table = _table()["overhead"]
    mib = {name: round(table[name]["mib"] * MIB) for name in ("cublas_workspace", "context", "nccl")}
    return Overhead(mib["cublas_workspace"], mib["context"], mib["nccl"])


def published_hours() -> list[dict[str, Any]]:
    """GPU-hours that others have published: "who", "what", "hours" and "kind" of GPU."""
    return list(_table()["published"])
