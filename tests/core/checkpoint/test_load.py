import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_acc.core.checkpoint.layout import inspect
from llama_acc.core.checkpoint.load import check_tensors, fill, open_shard, read_weights
from llama_acc.core.errors import UserError
from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.transformer import Transformer, build_on_meta, shapes_of
from tests.core.tiny import CPU, SMALL, random_model

NAME = "consolidated.00-of-01.model.pth"


def state(config: ModelConfig = SMALL) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in random_model(config).state_dict().items()}


def refused(path: Path, content: Any) -> str:
    torch.save(content, path)
    with pytest.raises(UserError) as error:
        open_shard(path)
    return str(error.value)


@pytest.mark.parametrize("wrapped", [False, True], ids=["flat", "under model"])
@pytest.mark.parametrize("prefix", ["", "llma."])
def test_every_way_of_writing_the_names_is_read(prefix: str, wrapped: bool, tmp_path: Path) -> None:
    named = {prefix + name: tensor for name, tensor in state().items()} | {f"{prefix}rope.freqs": torch.ones(4)}
    torch.save({"model": named} if wrapped else named, tmp_path / NAME)
    shard = open_shard(tmp_path / NAME)
    assert shard.keys() == state().keys()
    assert all(tensor.mapped and torch.equal(tensor.source, state()[name]) for name, tensor in shard.items())
    check_tensors(read_weights([inspect(tmp_path)]), shapes_of(SMALL), tmp_path)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
def test_a_file_cut_short_is_refused(share: float, tmp_path: Path) -> None:
    path = tmp_path / NAME
    with pytest.raises(UserError, match=f"cannot read {path}"):
        open_shard(path)  # not there
    torch.save(state(), path)
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(UserError, match=f"(?s)cannot read {path}.*copy it again"):
        open_shard(path)


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.proof}",)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("inside", [True, False], ids=["among tensors", "alone"])
def test_a_file_with_code_is_refused_and_the_code_never_runs(inside: bool, zipped: bool, tmp_path: Path) -> None:
    path, proof = tmp_path / NAME, tmp_path / "proof"
    content = {**state(), "extra": Hostile(proof)} if inside else Hostile(proof)
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    said = (
        r"is refused: it holds Python code besides tensors \(.*system\)"
        if zipped
        else "cannot read .*: it was saved before torch 1.6"
    )
    with pytest.raises(UserError, match=said) as error:
        open_shard(path)
    assert "weights_only" not in str(error.value), "torch's advice to run the code is not passed on"
    assert not proof.exists()
    torch.load(path, weights_only=False)
    assert proof.exists(), "the file was not hostile at all"


@pytest.mark.parametrize(
    "content", [[torch.zeros(2)], {"norm.weight": 3}, {"model": {"norm.weight": [1.0]}}, 7], ids=str
)
def test_anything_but_names_and_tensors_is_refused(content: Any, tmp_path: Path) -> None:
    assert "a mapping from names to tensors is expected" in refused(tmp_path / NAME, content)


@pytest.mark.parametrize("content", [b"", b"{}"], ids=["empty", "text"])
def test_what_is_no_file_of_tensors_is_not_taken_for_an_old_one(content: bytes, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read .*: it is no file of tensors"):
        open_shard(tmp_path / NAME)


def filled(path: Path, dtype: torch.dtype, copy: bool) -> tuple[Transformer, dict[str, int]]:
    """A model filled from a file, and where the mapped tensors began."""
    weights = read_weights([inspect(path.parent)])
    mapped = {name: part.source.data_ptr() for name, part in weights.tensors.items()}
    model = build_on_meta(SMALL, dtype)
    fill(model, weights, CPU, dtype, copy=copy)
    assert weights.tensors == {}
    return model, mapped


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_are_put_into_place_in_the_type_asked_for(saved: torch.dtype, tmp_path: Path) -> None:
    torch.save({name: tensor.to(saved) for name, tensor in state().items()}, tmp_path / NAME)
    for dtype in (torch.float32, torch.bfloat16):
        model, _ = filled(tmp_path / NAME, dtype, copy=False)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, state()[name].to(saved).to(dtype)), name


def test_what_trains_never_lies_in_the_file_nor_changes_it(tmp_path: Path) -> None:
    path = tmp_path / NAME
    torch.save(state(), path)
    before = path.read_bytes()
    model, mapped = filled(path, torch.float32, copy=True)
    assert all(parameter.data_ptr() != mapped[name] for name, parameter in model.named_parameters())
    storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert len(storages) == len(mapped), "parameters share storage"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(9.0)
    assert path.read_bytes() == before
    assert torch.equal(open_shard(path)["norm.weight"].source, state()["norm.weight"])
