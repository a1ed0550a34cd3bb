"""Checkpoints and tokenizers that cannot be used are refused before the first step."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.commands import DRY, invoke, refused


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    refused(
        invoke("finetune", "--recipe", "alpaca", "--output", tmp_path / "run"),
        "there is no checkpoint folder llama2-7b",
        "give the folder that holds consolidated.00.pth",
        output=tmp_path / "run",
    )
    assert not (tmp_path / "run").exists()


def on_base(base: Path) -> Any:
    return invoke("finetune", "--recipe", "quickstart", "--pretrained", base, "--output", base.parent.parent / "run")


def _remove_weights(base: Path) -> None:
    (base / "consolidated.00-of-01.model.pth").unlink()


def _leave_one_of_two_shards(base: Path) -> None:
    (base / "consolidated.00-of-01.model.pth").rename(base / "consolidated.01-of-02.model.pth")


def _mix_formats(base: Path) -> None:
    shutil.copy(base / "consolidated.00-of-01.model.pth", base / "consolidated.00.pth")


def _mix_sizes(base: Path) -> None:
    for name in ("consolidated.00-of-02.model.pth", "consolidated.01-of-02.model.pth"):
        shutil.copy(base / "consolidated.00-of-01.model.pth", base / name)


def _cut_short(base: Path) -> None:
    os.truncate(base / "consolidated.00-of-01.model.pth", 1000)


def _put_code_in(base: Path) -> None:
    torch.save({"model": Path("x")}, base / "consolidated.00-of-01.model.pth")


def _hugging_face(base: Path) -> None:
    _remove_weights(base)
    (base / "model.safetensors").touch()


def _break_shape(base: Path) -> None:
    (base / "config.json").write_text('{"dim": 32, "n_layer": 2, "n_heads": 3.5}')


def _take_tokenizer(base: Path) -> None:
    (base / "tokenizer.model").unlink()


def _break_tokenizer(base: Path) -> None:
    (base / "tokenizer.model").write_bytes(b"no such thing")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_remove_weights, ["holds no LLaMA checkpoint", "it holds config.json"]),
        (_leave_one_of_two_shards, ["shards are missing in", "consolidated.00-of-02.model.pth"]),
        (_mix_formats, ["mixes checkpoint formats", "consolidated.00.pth", "consolidated.00-of-01.model.pth"]),
        (_mix_sizes, ["model files of two savings", "consolidated.01-of-02.model.pth"]),
        (_cut_short, ["cannot read", "consolidated.00-of-01.model.pth", "copy it again"]),
        (_put_code_in, ["consolidated.00-of-01.model.pth is refused: it holds Python code besides tensors"]),
        (_hugging_face, ["describes a model that cannot be computed here", "model_type"]),
        (
            _break_shape,
            ["unknown key 'n_layer'", "did you mean 'n_layers'?", "missing key 'n_layers'", "n_heads: a whole"],
        ),
        (_take_tokenizer, ["there is no tokenizer in", "--tokenizer FILE"]),
        (_break_tokenizer, ["tokenizer.model", "is not a SentencePiece model"]),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_refused(
    base: Path, damage: Callable[[Path], None], said: list[str]
) -> None:
    damage(base)
    refused(on_base(base), str(base), *said, output=base.parent.parent / "run")


def test_all_tensors_that_do_not_fit_are_listed(base: Path) -> None:
    path = base / "consolidated.00-of-01.model.pth"
    weights = torch.load(path, weights_only=True)["model"]
    del weights["llma.layers.0.attention.wq.weight"], weights["llma.output.weight"]
    weights["llma.layers.1.ffn_norm.weight"] = torch.ones(31)
    weights["llma.layers.9.ffn_norm.weight"] = torch.ones(32)
    weights["llma.norm.weight"] = torch.ones(32, dtype=torch.int8)
    torch.save({"model": weights}, path)
    refused(
        on_base(base),
        f"the weights in {base} do not fit the model:",
        "missing: layers.0.attention.wq.weight [32, 32]",
        "missing: output.weight [640, 32]",
        "shape: layers.1.ffn_norm.weight is [31], the model needs [32]",
        "unknown: layers.9.ffn_norm.weight [32]",
        "type: norm.weight holds torch.int8",
        output=base.parent.parent / "run",
    )
    # Before the data is looked at, which may take hours.
    command = ("finetune", "--recipe", "quickstart", "--pretrained", base, "--output", base.parent.parent / "run")
    (base / "broken.json").write_text("[{", encoding="utf-8")
    refused(invoke(*command, "--data", base / "broken.json"), f"the weights in {base} do not fit the model:")


def test_a_tokenizer_of_another_model_is_refused(base: Path, tokenizer_path: Path) -> None:
    refused(
        invoke("finetune", "--recipe", "quickstart", "--pretrained", base, "--tokenizer", tokenizer_path, "--dry-run"),
        f"tokenizer and model do not fit: {tokenizer_path} has 300 pieces, the model's vocabulary is 640",
        "--tokenizer FILE",
    )


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    refused(invoke(*DRY, "--tokenizer", tmp_path / "no.model"), f"there is no tokenizer {tmp_path / 'no.model'}")


def test_a_damaged_checkpoint_of_a_run_is_refused(trained: Path) -> None:
    os.truncate(trained / "epoch0" / "consolidated.00-of-01.model.pth", 1000)
    refused(
        invoke("chat", "--ckpt", trained, "--prompt", "hi"),
        f"{trained / 'epoch0'} is damaged:",
        "consolidated.00-of-01.model.pth has 1000 bytes",
    )


def test_verify_finds_a_byte_that_changed(trained: Path) -> None:
    path = trained / "epoch0" / "consolidated.00-of-01.model.pth"
    content = bytearray(path.read_bytes())
    content[-200] ^= 1
    path.write_bytes(content)
    refused(invoke("chat", "--ckpt", trained, "--prompt", "hi", "--verify"), f"{path.name} was changed")


def test_verify_without_a_manifest_is_refused(trained: Path) -> None:
    checkpoint = trained / "epoch0"
    (checkpoint / "manifest.json").unlink()
    refused(
        invoke("chat", "--ckpt", checkpoint, "--prompt", "hi", "--verify"), "epoch0 has no manifest.json", "--verify"
    )
    assert invoke("chat", "--ckpt", checkpoint, "--prompt", "hi").exit_code == 0
