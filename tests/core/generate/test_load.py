"""Loading a checkpoint for generation: what is computed is what was saved, and what is missing is named."""

import shutil
from pathlib import Path
from typing import Literal

import pytest
import torch

from llama_acc.core.distributed.groups import Parallel
from llama_acc.core.generate.load import load_model
from tests.core.tiny import difference, document_logits, loaded_model, random_model, save_model


@pytest.fixture(scope="module")
def folder(tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights, in the layout a run leaves."""
    folder = tmp_path_factory.mktemp("random")
    save_model(random_model(seed=5), folder, torch.float32)
    shutil.copy(tokenizer_path, folder)
    return folder


def test_a_loaded_model_is_the_one_that_was_saved_whatever_its_layout_in_memory(folder: Path) -> None:
    loaded, saved = load_model(folder, device="cpu"), random_model(seed=5)
    document = [torch.arange(3, 40)]
    assert difference(document_logits(loaded.model, document)[0], document_logits(saved, document)[0]) < 1e-5
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    kept = loaded_model(folder).state_dict()
    assert loaded.model.state_dict().keys() == kept.keys()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in loaded.model.state_dict().items())


@pytest.mark.parametrize(
    ("saved", "dtype", "expected"),
    [
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float32, None, torch.float32),
        (torch.float16, None, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
def test_a_model_computes_in_its_checkpoints_type_unless_told(
    saved: torch.dtype, dtype: torch.dtype | None, expected: torch.dtype, folder: Path, tmp_path: Path
) -> None:
    save_model(random_model(), tmp_path, saved)
    shutil.copy(folder / "tokenizer.model", tmp_path)
    model = load_model(tmp_path, device="cpu", dtype=dtype).model
    assert {model.dtype, *(parameter.dtype for parameter in model.parameters())} == {expected}


@pytest.mark.parametrize(("quantize", "size"), [(None, 2), ("nf4", 1), ("nf4", 2)])
def test_parts_in_nf4_that_are_other_blocks_are_named(quantize: Literal["nf4"] | None, size: int, folder: Path) -> None:
    notes = load_model(folder, device="cpu", quantize=quantize, parallel=Parallel(0, size)).notes
    told = [note for note in notes if "not the whole matrix's blocks of 64 values" in note]
    assert len(told) == (quantize == "nf4" and size == 2)
