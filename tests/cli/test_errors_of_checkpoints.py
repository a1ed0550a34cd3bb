"""Checkpoints and tokenizers that cannot be used are refused before the first step."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.commands import DRY, invoke, refused

WEIGHTS = "consolidated.00-of-01.model.pth"


def on_base(base: Path, *more: object) -> Any:
    output = base.parent.parent / "run"
    return invoke("finetune", "--recipe", "quickstart", "--pretrained", base, "--output", output, *more)


def _mix_sizes(base: Path) -> None:
    for name in ("consolidated.00-of-02.model.pth", "consolidated.01-of-02.model.pth"):
        shutil.copy(base / WEIGHTS, base / name)


def _hugging_face(base: Path) -> None:
    (base / WEIGHTS).rename(base / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda base: (base / WEIGHTS).unlink(), ["holds no LLaMA checkpoint", "it holds config.json"]),
        (
            lambda base: (base / WEIGHTS).rename(base / "consolidated.01-of-02.model.pth"),
            ["shards are missing in", "consolidated.00-of-02.model.pth"],
        ),
        (
            lambda base: shutil.copy(base / WEIGHTS, base / "consolidated.00.pth"),
            ["mixes checkpoint formats", "consolidated.00.pth", WEIGHTS],
        ),
        (_mix_sizes, ["model files of two savings", "consolidated.01-of-02.model.pth"]),
        (lambda base: os.truncate(base / WEIGHTS, 1000), ["cannot read", WEIGHTS, "copy it again"]),
        (
            lambda base: torch.save({"model": Path("x")}, base / WEIGHTS),
            [f"{WEIGHTS} is refused: it holds Python code besides tensors"],
        ),
        (_hugging_face, ["describes a model that cannot be computed here", "model_type"]),
        (
            lambda base: (base / "config.json").write_text('{"dim": 32, "n_layer": 2, "n_heads": 3.5}'),
            [
                "unknown key 'n_layer'",
                "did you mean 'n_layers'?",
                "missing key 'n_layers'",
                "n_heads: should be a valid integer",
            ],
        ),
        (lambda base: (base / "tokenizer.model").unlink(), ["there is no tokenizer in", "--tokenizer FILE"]),
        (
            lambda base: (base / "tokenizer.model").write_bytes(b"no such thing"),
            ["tokenizer.model", "is not a SentencePiece model"],
        ),
    ],
    ids=["none", "shards", "formats", "sizes", "cut", "code", "hf", "shape", "no tokenizer", "broken tokenizer"],
)
def test_a_checkpoint_that_cannot_be_used_is_refused(
    base: Path, damage: Callable[[Path], object], said: list[str]
) -> None:
    damage(base)
    refused(on_base(base), str(base), *said, output=base.parent.parent / "run")


def test_all_tensors_that_do_not_fit_are_listed_before_the_data_is_read(base: Path) -> None:
    weights = torch.load(base / WEIGHTS, weights_only=True)["model"]
    del weights["llma.layers.0.attention.wq.weight"], weights["llma.output.weight"]
    weights["llma.layers.1.ffn_norm.weight"] = torch.ones(31)
    weights["llma.layers.9.ffn_norm.weight"] = torch.ones(32)
    weights["llma.norm.weight"] = torch.ones(32, dtype=torch.int8)
    torch.save({"model": weights}, base / WEIGHTS)
    (base / "broken.json").write_text("[{", encoding="utf-8")
    refused(
        on_base(base, "--data", base / "broken.json"),
        f"the weights in {base} do not fit the model:",
        "missing: layers.0.attention.wq.weight [32, 32]",
        "missing: output.weight [640, 32]",
        "shape: layers.1.ffn_norm.weight is [31], the model needs [32]",
        "unknown: layers.9.ffn_norm.weight [32]",
        "type: norm.weight holds torch.int8",
        output=base.parent.parent / "run",
    )


def test_a_missing_base_and_a_tokenizer_that_does_not_fit_are_named(base: Path, tokenizer_path: Path) -> None:
    output = base.parent.parent / "run"
    missing = invoke("finetune", "--recipe", "alpaca", "--output", output)
    refused(missing, "there is no checkpoint folder llama2-7b", "give the folder that holds consolidated.00.pth")
    assert not output.exists()
    refused(invoke(*DRY, "--tokenizer", base / "no.model"), f"cannot read {base / 'no.model'}: No such file")
    refused(
        on_base(base, "--tokenizer", tokenizer_path),
        f"tokenizer and model do not fit: {tokenizer_path} has 300 pieces, the model's vocabulary is 640",
        "--tokenizer FILE",
    )


def test_what_a_manifest_does_not_say_is_refused(trained: Path) -> None:
    checkpoint = trained / "epoch0"
    chat = ("chat", "--ckpt", checkpoint, "--prompt", "hi")
    content = bytearray((checkpoint / WEIGHTS).read_bytes())
    content[-200] ^= 1
    (checkpoint / WEIGHTS).write_bytes(content)
    refused(invoke(*chat, "--verify"), f"{WEIGHTS} was changed")
    os.truncate(checkpoint / WEIGHTS, 1000)
    refused(invoke("chat", "--ckpt", trained), f"{checkpoint} is damaged:", f"{WEIGHTS} has 1000 bytes")


def test_verify_without_a_manifest_is_refused(base: Path) -> None:
    chat = ("chat", "--ckpt", base, "--prompt", "hi")
    refused(invoke(*chat, "--verify"), "epoch0 has no manifest.json", "--verify")
    assert invoke(*chat).exit_code == 0
