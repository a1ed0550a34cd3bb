"""Loading a checkpoint for generation: what is computed is what was saved, and what is missing is named."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from llama_acc.core.errors import UserError
from llama_acc.core.generate.load import LoadedModel, load_model
from tests.core.tiny import SMALL, difference, document_logits, loaded_model, random_model, save_model


@pytest.fixture(scope="module")
def folder(tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights, in the layout a run leaves."""
    folder = tmp_path_factory.mktemp("random")
    save_model(random_model(seed=5), folder, torch.float32)
    shutil.copy(tokenizer_path, folder)
    return folder


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load_model(folder, device="cpu")


def test_a_loaded_model_gives_the_logits_of_the_one_that_was_saved(folder: Path, loaded: LoadedModel) -> None:
    document = torch.arange(3, 40)
    assert (
        difference(document_logits(loaded.model, [document])[0], document_logits(random_model(seed=5), [document])[0])
        < 1e-5
    )
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_parameters_keep_their_names_however_they_are_laid_out(folder: Path, loaded: LoadedModel) -> None:
    saved = loaded_model(folder).state_dict()
    assert loaded.model.state_dict().keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in loaded.model.state_dict().items())


def test_the_template_asked_for_wins(folder: Path) -> None:
    assert load_model(folder, device="cpu").template.name == "none"
    chosen = load_model(folder, device="cpu", template="chatml")
    assert (chosen.template.name, chosen.template_from) == ("chatml", "asked for")
    with pytest.raises(UserError, match="unknown template 'chatlm'"):
        load_model(folder, device="cpu", template="chatlm")


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
    assert model.dtype == expected
    assert {parameter.dtype for parameter in model.parameters()} == {expected}


def test_what_a_checkpoint_lacks_is_named(folder: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(folder, whole)
    (whole / "tokenizer.model").unlink()
    with pytest.raises(UserError, match="there is no tokenizer in"):
        load_model(whole, device="cpu")
    assert load_model(whole, device="cpu", tokenizer=folder / "tokenizer.model").tokenizer.vocab_size == 300
    (whole / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no params\.json or config\.json"):
        load_model(whole, device="cpu", tokenizer=folder / "tokenizer.model")


def test_verifying_finds_a_changed_byte(tmp_path: Path) -> None:
    from tests.core.train.runs import run

    checkpoint = run(tmp_path / "run", "train.max_steps=1", "train.warmup_epochs=0").checkpoint
    load_model(checkpoint, device="cpu", verify=True)
    damaged = checkpoint / "consolidated.00-of-01.model.pth"
    raw = bytearray(damaged.read_bytes())
    raw[len(raw) // 2] ^= 1
    damaged.write_bytes(raw)
    with pytest.raises(UserError, match=r"consolidated\.00-of-01\.model\.pth was changed"):
        load_model(checkpoint, device="cpu", verify=True)


def test_a_later_checkpoint_overrides_an_earlier_one(folder: Path, tmp_path: Path) -> None:
    norm = {"llma.norm.weight": torch.full((SMALL.dim,), 3.0)}
    torch.save({"model": norm}, tmp_path / "consolidated.00-of-01.model.pth")
    shutil.copy(folder / "tokenizer.model", tmp_path)
    model = load_model(folder, tmp_path, device="cpu").model
    assert (model.norm.weight == 3).all()
    with pytest.raises(UserError, match="holds only what was trained, and not on top of which base"):
        (tmp_path / "config.json").write_text(json.dumps(SMALL.to_params()))
        load_model(tmp_path, device="cpu")
