"""Checkpoints whose matrices are in NF4: the layout `consolidated`, in which such a matrix has four tensors.

    NAME.weight   its packed values, [rows, columns / 2] bytes
    NAME.absmax   NAME.nested   NAME.offset   its scales; see `core.model.nf4`

quantization.json says so, and has the fingerprint of the weights they were made of.
"""

import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import ConfigDict
from torch import Tensor

from llama_acc.core.checkpoint.lazy import LazyTensor, Read
from llama_acc.core.errors import UserError
from llama_acc.core.input_files import read_object
from llama_acc.core.model import nf4
from llama_acc.core.model.nf4 import BLOCK, Scales
from llama_acc.core.model.schema import CHECKED, checked
from llama_acc.core.model.transformer import is_matrix, is_within

QUANTIZATION_FILE = "quantization.json"
FORMAT_VERSION = 2
_MOST_THREADS = 8
EARLY_HINT = (
    "of an early version of llama-acc? Quantize the original anew (llama-acc convert-checkpoint DIR NEW "
    "--to consolidated --quantize nf4), and train on that"
)


class JsonFile:
    """A dataclass that is a small file beside a checkpoint's weights; keys that are not known are refused."""

    __pydantic_config__: ClassVar[ConfigDict] = CHECKED

    def to_json(self) -> bytes:
        """The file."""
        return (json.dumps(vars(self), indent=1, default=vars) + "\n").encode()


@dataclass(frozen=True)
class Quantization(JsonFile):
    """quantization.json."""

    skip: tuple[str, ...]  # matrices that are not quantized; see `transformer.quantizable`
    fingerprint: str  # of the weights before
    format_version: int = FORMAT_VERSION  # of the file
    type: str = "nf4"
    double: bool = True  # the scales are quantized, too


def read_quantization(folder: Path) -> Quantization | None:
    """What a checkpoint folder says of itself; None = it is not quantized."""
    path = folder / QUANTIZATION_FILE
    if not path.is_file():
        return None
    found = checked(Quantization, read_object(path), str(path), EARLY_HINT)
    if found.format_version > FORMAT_VERSION or found.type != "nf4":
        raise UserError(f"{path} was written by a newer version", "update llama-acc")
    return found


class NF4Matrix:
    """A quantized matrix [rows, columns]: `values`, [rows, columns / 2] bytes, and `scales`."""

    def __init__(self, values: Tensor, scales: Scales) -> None:
        self.values, self.scales = values, scales

    @cached_property
    def absmax(self) -> Tensor:
        """Of its blocks, in float32."""
        return nf4.read_absmax(self.scales)

    def lazy(self) -> LazyTensor:
        """The values it stands for, read as any other parameter is; in bf16, which is what it is computed with."""

        def read(rows: slice, columns: slice) -> Tensor:
            return nf4.dequantize_rows(self.values, self.absmax, rows.start, rows.stop, torch.float32)[:, columns]

        rows, half = self.values.shape
        return LazyTensor((rows, 2 * half), torch.bfloat16, read, source=self)


def take_quantized(
    tensors: dict[str, LazyTensor], quantization: Quantization
) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """Takes the quantized matrices, each of which is four tensors, out of a checkpoint's.

    Returns:
        The matrices, and what is wrong with some: they are in NF4, or are not, against what quantization.json says.

    Raises:
        UserError: scales without values, or the other way round.
    """
    found, problems = {}, {}
    for matrix in [name.removesuffix(".absmax") for name in tensors if name.endswith(".absmax")]:
        names = [f"{matrix}.{leaf}" for leaf in ("weight", *Scales._fields)]
        if missing := [name for name in names if name not in tensors]:
            raise UserError(f"the quantized matrix {matrix} is not whole: {', '.join(missing)} is missing")
        values, *scales = (tensors.pop(name).source for name in names)
        found[f"{matrix}.weight"] = NF4Matrix(values, Scales(*scales)).lazy()
    for name in {*found, *filter(is_matrix, tensors)}:
        is_skipped = any(is_within(part, name.removesuffix(".weight")) for part in quantization.skip)
        if is_skipped == (name in found):
            is_it = "is" if is_skipped else "is not"
            problems[name] = f"type: {name} {is_it} in NF4, and {QUANTIZATION_FILE} says otherwise"
    return found, problems


def to_nf4(tensor: LazyTensor, device: torch.device) -> tuple[Tensor, Scales]:
    """A matrix in NF4 on a device: as it is in its file, or quantized here.

    A part of a quantized matrix has the same values, but for its scales: these are rounded together.

    Raises:
        UserError: a part of a quantized matrix whose edges lie within blocks.
    """
    if not isinstance(tensor.source, NF4Matrix):
        read = lambda start, rows: tensor.rows(start, start + len(rows)).copy_into(rows)  # noqa: E731
        return nf4.quantize(read, tensor.shape, device)
    matrix, (rows, columns), (row, column) = tensor.source, tensor.shape, tensor.offset
    whole, values, scales = 2 * matrix.values.shape[1], matrix.values, matrix.scales
    if tensor.shape != (len(values), whole):
        if whole % BLOCK or columns % BLOCK or column % BLOCK:
            raise UserError(
                f"a quantized matrix of {whole} columns cannot be split into parts of {columns}: "
                f"it has blocks of {BLOCK}",
                "choose a smaller model-parallel size, or give the checkpoint before quantizing",
            )
        blocks = slice(column // BLOCK, (column + columns) // BLOCK)
        absmax = matrix.absmax.view(len(values), -1)[row : row + rows, blocks]
        values = values[row : row + rows, column // 2 : (column + columns) // 2].contiguous()
        scales = nf4.round_absmax(absmax.flatten().clone())
    return values.to(device), Scales(*(scale.to(device) for scale in scales))


def each_on_all_cores(quantize: Callable[[str], object], names: Iterable[str], device: torch.device) -> None:
    """Calls `quantize` for each matrix; on a CPU, for as many at a time as torch has threads, at most 8."""
    if device.type != "cpu":
        for name in names:
            quantize(name)
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # torch's own would wait busily while numpy computes
    try:
        # Not many more: each holds some rows in float32, or, where these are no whole blocks, its matrix.
        with ThreadPoolExecutor(min(threads, _MOST_THREADS)) as workers:
            list(workers.map(quantize, names))
    finally:
        torch.set_num_threads(threads)


@lru_cache(maxsize=1)
def _quantized(tensor: LazyTensor) -> NF4Matrix:
    return NF4Matrix(*to_nf4(tensor, torch.device("cpu")))


def nf4_rounded(tensor: LazyTensor) -> LazyTensor:
    """A matrix after quantizing and dequantizing, in float32; one at a time is held."""
    return LazyTensor.computed((), lambda rows, columns: _quantized(tensor).lazy().read(rows, columns), tensor.shape)


def nf4_tensors(tensor: LazyTensor) -> dict[str, LazyTensor]:
    """What a quantized checkpoint has of a matrix, by the ends of their names."""
    (rows, columns), meta = tensor.shape, torch.device("meta")
    room = {"weight": torch.empty(nf4.packed_shape(rows, columns), dtype=torch.uint8, device=meta)}
    room |= nf4.empty_scales(rows, columns, meta)._asdict()

    def reader(leaf: str) -> Read:
        def read(rows: slice, columns: slice) -> Tensor:
            matrix = _quantized(tensor)
            values: Tensor = matrix.values if leaf == "weight" else getattr(matrix.scales, leaf)
            return values[rows]

        return read

    return {leaf: LazyTensor.computed((), reader(leaf), tuple(t.shape), t.dtype) for leaf, t in room.items()}
