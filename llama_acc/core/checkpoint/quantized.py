"""Checkpoints whose matrices are in NF4: the layout `consolidated`, in which such a matrix has four tensors.

    NAME.weight   its packed values, [rows, columns / 2] bytes
    NAME.absmax   NAME.nested   NAME.offset   its scales; see `core.model.nf4`

quantization.json says so, and has the fingerprint of the weights they were made of.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_acc.core.checkpoint.computed import Computed
from llama_acc.core.checkpoint.lazy import Part
from llama_acc.core.errors import UserError
from llama_acc.core.input_files import read_object
from llama_acc.core.model import nf4
from llama_acc.core.model.nf4 import BLOCK, Scales

QUANTIZATION_FILE = "quantization.json"
FORMAT_VERSION = 2


@dataclass(frozen=True)
class Quantization:
    """What quantization.json says.

    Attributes:
        skip: matrices that are not quantised; see `ModelConfig.quantisable`.
        fingerprint: of the weights before.
    """

    skip: tuple[str, ...]
    fingerprint: str

    def to_json(self) -> bytes:
        """The file."""
        values = {
            "format_version": FORMAT_VERSION,
            "type": "nf4",
            "double": True,
            "skip": list(self.skip),
            "fingerprint": self.fingerprint,
        }
        return (json.dumps(values, indent=1) + "\n").encode()


def read_quantization(folder: Path) -> Quantization | None:
    """What a checkpoint folder says of itself; None = it is not quantised.

    Raises:
        UserError: an unreadable file, or one of another version.
    """
    path = folder / QUANTIZATION_FILE
    if not path.is_file():
        return None
    try:
        values = read_object(path)
        check_rounding(values, path)
        version, kind = int(values["format_version"]), values["type"]
        if version > FORMAT_VERSION or kind != "nf4":
            raise UserError(f"{path} was written by a newer version", "update llama-acc")
        return Quantization(tuple(map(str, values["skip"])), str(values["fingerprint"]))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"cannot read {path}: {error!r}") from None


def check_rounding(values: Mapping[str, Any], path: Path) -> None:
    """Refuses what quantization.json or base.json says of a base in a way that is not supported.

    Raises:
        UserError: written by an early version, or of a base that was not rounded to the nearest.
    """
    if "output" in values or values.get("values") is not None:
        raise UserError(
            f"{path} was written by an early version of llama-acc, whose quantized bases are not supported",
            "quantize the original anew (llama-acc convert-checkpoint DIR NEW --to consolidated --quantize nf4), "
            "and train on that",
        )


@dataclass(frozen=True)
class Packed:
    """A quantised matrix.

    Attributes:
        values: [rows, columns / 2] bytes.
        scales: its scales.
    """

    values: Tensor
    scales: Scales

    @property
    def shape(self) -> tuple[int, int]:
        """[rows, columns]."""
        rows, half = self.values.shape
        return rows, 2 * half

    @cached_property
    def magnitudes(self) -> Tensor:
        """Of its blocks, in float32."""
        return nf4.magnitudes(self.scales)

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Its rows start to stop, dequantised."""
        return nf4.dequantise_rows(self.values, self.magnitudes, start, stop, dtype)


@dataclass(frozen=True, kw_only=True)
class QuantisedPart(Computed):
    """A part of a matrix that is in NF4 in its file. Read like any other, it is dequantised, some rows at a time.

    Attributes:
        matrix: the whole.
    """

    matrix: Packed

    @staticmethod
    def whole(matrix: Packed) -> "QuantisedPart":
        """All of a matrix."""

        def compute(start: int, stop: int) -> Tensor:
            return matrix.rows(start, stop, torch.float32)

        return QuantisedPart(matrix.shape, torch.bfloat16, (), compute=compute, matrix=matrix)

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the matrix."""
        return self.shape == self.matrix.shape

    def plus(self, diff: Part) -> Part:
        """Refused.

        Raises:
            UserError: always.
        """
        raise UserError("a diff cannot be added to a quantised checkpoint", "give the base it was made of")


def quantised_parts(tensors: Mapping[str, Tensor]) -> tuple[dict[str, QuantisedPart], set[str]]:
    """The quantised matrices among a checkpoint's tensors, and the names that go to make them.

    Raises:
        UserError: scales without values, or the other way round.
    """
    parts: dict[str, QuantisedPart] = {}
    used: set[str] = set()
    for name in [name for name in tensors if name.endswith(".absmax")]:
        matrix = name.removesuffix(".absmax")
        names = [f"{matrix}.{leaf}" for leaf in ("weight", *Scales._fields)]
        missing = [other for other in names if other not in tensors]
        if missing:
            raise UserError(f"the quantised matrix {matrix} is not whole: {', '.join(missing)} is missing")
        values, *scales = (tensors[other] for other in names)
        parts[f"{matrix}.weight"] = QuantisedPart.whole(Packed(values, Scales(*scales)))
        used |= set(names)
    return parts, used


def quantised(part: Part, device: torch.device) -> tuple[Tensor, Scales]:
    """A matrix in NF4 on a device: as it is in its file, or made here.

    Raises:
        UserError: a part of a quantised matrix whose edges lie within blocks.
    """
    if isinstance(part, QuantisedPart):
        matrix = part.matrix if part.is_whole else _cut(part)
        return matrix.values.to(device), Scales(*(scale.to(device) for scale in matrix.scales))

    def read(start: int, stop: int) -> Any:
        return part.rows(start, stop).to(torch.float32, device)

    return nf4.quantise(read, part.shape, device)


def _cut(part: QuantisedPart) -> Packed:
    """A part of a quantised matrix with the same values, but for its scales: these are rounded together."""
    (rows, columns), row, column = part.shape, part.row, part.column
    if part.matrix.shape[1] % BLOCK or columns % BLOCK or column % BLOCK:
        raise UserError(
            f"a quantised matrix of {part.matrix.shape[1]} columns cannot be split into parts of {columns}: "
            f"it has blocks of {BLOCK}",
            "choose a smaller model-parallel size, or give the checkpoint before quantising",
        )
    values = part.matrix.values[row : row + rows, column // 2 : (column + columns) // 2].contiguous()
    magnitudes = part.matrix.magnitudes.view(len(part.matrix.values), -1)[row : row + rows]
    magnitudes = magnitudes[:, column // BLOCK : (column + columns) // BLOCK]
    return Packed(values, nf4.round_magnitudes(magnitudes.flatten().clone()))
