"""Bases in four bits: the same numbers wherever they are used."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llama_acc.core.checkpoint.adapter import read_base
from llama_acc.core.checkpoint.layout import inspect
from llama_acc.core.checkpoint.load import read_weights
from llama_acc.core.checkpoint.quantized import NF4Matrix, read_quantization, to_nf4
from llama_acc.core.errors import UserError
from llama_acc.core.model import nf4
from tests.core.checkpoint.folders import GROUPED, state, write_consolidated
from tests.core.checkpoint.test_tuned import made
from tests.core.tiny import CPU, difference

CONFIG = replace(GROUPED, dim=128, multiple_of=64)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_consolidated(tmp_path_factory.mktemp("base") / "source", state(CONFIG), 1, CONFIG)


@pytest.fixture(scope="module")
def small(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(source, tmp_path_factory.mktemp("small") / "small", "consolidated", quantize="nf4").folder


@pytest.mark.parametrize("size", [2, 4])
def test_every_rank_has_its_part_of_the_same_values(size: int, small: Path) -> None:
    whole = read_weights([inspect(small)]).tensors
    for rank in range(size):
        for name, part in read_weights([inspect(small)], rank, size).tensors.items():
            if not isinstance(part.source, NF4Matrix) or part.shape[1] % 64:
                continue
            packed, scales = to_nf4(part, CPU)
            share = part.to(torch.float32)
            # The numbers are the same ones, and so but for one part in a hundred are the scales.
            assert difference(nf4.dequantize(packed, scales, torch.float32), share) < 0.01, name
            assert whole[name].shape != part.shape


def test_a_part_whose_edges_lie_within_blocks_is_refused(small: Path) -> None:
    part = read_weights([inspect(small)], 0, 4).tensors["layers.0.attention.wo.weight"]
    with pytest.raises(UserError, match=r"of 128 columns cannot be split into parts of 32: it has blocks of 64"):
        to_nf4(part, CPU)


@pytest.mark.parametrize("told", [{"output": True}, {"skip": [], "values": "cd"}], ids=["format 1", "calibrated"])
def test_what_an_early_version_quantized_is_refused_with_what_to_do(told: dict[str, object], tmp_path: Path) -> None:
    values: dict[str, object] = {"format_version": 1, "type": "nf4", "double": True, "fingerprint": "ab"}
    (tmp_path / "quantization.json").write_text(json.dumps(values | told))
    with pytest.raises(UserError, match="cannot read") as refusal:
        read_quantization(tmp_path)
    assert "--quantize nf4" in str(refusal.value.hint)
    (tmp_path / "base.json").write_text(
        json.dumps({"fingerprint": "ab", "pretrained": ["x"], "quantized": {"type": "nf4"} | told})
    )
    with pytest.raises(UserError, match="cannot read"):
        read_base(tmp_path)
