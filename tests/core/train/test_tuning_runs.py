"""Runs that train a part of a model: what changes, what is saved, and what it may be put on top of."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from llama_acc.core.checkpoint.adapter import base_fingerprint
from llama_acc.core.checkpoint.convert import Request, convert
from llama_acc.core.checkpoint.layout import inspect
from llama_acc.core.errors import UserError
from llama_acc.core.generate.chat import generate
from llama_acc.core.generate.load import load_model
from llama_acc.core.model.tuning import METHODS
from tests.core.tiny import SMALL
from tests.core.train.runs import assert_same_run, losses, plan_of, run, saved_state, saved_weights

# `frozen` trains nothing of a LLaMA: it is for multimodal models (test_vision_runs.py).
TUNED = [name for name in METHODS if name not in ("full", "frozen")]
# What can be learned with so few numbers in so few steps.
PART = ("optimizer.lr=5e-3", "train.epochs=2")
ONE_STEP = ("train.max_steps=1", "train.warmup_epochs=0")
ALONE = "checkpoint.trainable_only=true"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint to start from."""
    return run(tmp_path_factory.mktemp("base")).checkpoint


def on(base: Path, method: str, *more: str) -> list[str]:
    return [f"model.pretrained={base}", f"tuning.method={method}", *PART, *more]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", TUNED)
def test_only_what_the_method_trains_changes(method: str, precision: str, base: Path, tmp_path: Path) -> None:
    finished = run(tmp_path, *on(base, method, f"train.precision={precision}"))
    assert finished.bases == ()
    before, after = saved_weights(base), saved_weights(finished.checkpoint)
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]
    trained = {f"llma.{name}" for name in plan_of(*on(base, method)).trained_shapes()}
    kind = torch.float32 if precision == "fp32" else torch.bfloat16
    assert {tensor.dtype for tensor in after.values()} == {kind}
    changed = {name for name in after if name not in before or not torch.equal(after[name], before[name].to(kind))}
    assert changed <= trained
    # The bias of wk changes nothing: softmax does not see what is added to all keys alike. Its gradient is rounding.
    assert {name for name in trained if "wk.bias" not in name} <= changed | {n for n in trained if "lora_a" in n}
    moments = {name for name in saved_state(finished.checkpoint) if name.startswith("exp_avg.")}
    assert moments == {f"exp_avg.{name.removeprefix('llma.')}" for name in trained}


@pytest.mark.parametrize(
    "more",
    [
        [ALONE, "tuning.lora_dropout=0.2"],
        ["train.precision=bf16"],
        ["tuning.quantize=nf4", ALONE],
    ],
    ids=str,
)
def test_a_resumed_run_is_the_uninterrupted_one_and_its_part_goes_on_the_base(
    more: list[str], base: Path, tmp_path: Path
) -> None:
    words, is_quantized = on(base, "lora_bias_norm", *more), "tuning.quantize=nf4" in more
    part = run(tmp_path / "whole", *words)
    run(tmp_path / "stopped", *words, "train.max_steps=5")
    run(tmp_path / "stopped", *words, resume=True)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    if ALONE not in more:
        return
    assert part.bases == (str(base),)
    described = json.loads((part.checkpoint / "base.json").read_text())
    assert described["quantized"] == ({"type": "nf4", "skip": []} if is_quantized else None)
    model = load_model(base, part.checkpoint, device="cpu")
    assert model.model.is_quantized == is_quantized
    assert generate(model, "What is LLaMA?", temperature=0, max_new_tokens=5)


def test_what_was_trained_alone_is_put_on_its_base_and_on_no_other(base: Path, tmp_path: Path) -> None:
    words = on(base, "lora_bias_norm", "train.precision=fp32")
    run(tmp_path / "whole", *words)
    part = run(tmp_path / "part", *words, ALONE).checkpoint
    saved = saved_weights(part)
    assert {name.removeprefix("llma.") for name in saved} == set(plan_of(*words).trained_shapes())
    assert len(saved) < len(saved_weights(tmp_path / "whole" / "epoch1"))
    models = load_model(base, part, device="cpu"), load_model(tmp_path / "whole", device="cpu")
    for question in ("What is LLaMA?", "Name three colours."):
        together, whole = (generate(model, question, temperature=0, max_new_tokens=20) for model in models)
        assert together == whole
    with pytest.raises(UserError, match="holds only what was trained on top of"):
        load_model(part, device="cpu")
    other = Path(shutil.copytree(base, tmp_path / "other"))
    weights = torch.load(other / "consolidated.00-of-01.model.pth", weights_only=True)
    weights["model"]["llma.layers.0.attention.wq.weight"].mul_(1.5)
    torch.save(weights, other / "consolidated.00-of-01.model.pth")
    (other / "manifest.json").unlink()
    with pytest.raises(UserError, match=f"was trained on .*epoch1, and {other} holds other weights"):
        load_model(other, part, device="cpu")


def test_the_base_is_known_in_every_layout(base: Path, tmp_path: Path) -> None:
    convert(Request(base, tmp_path / "hf", "hf"))
    convert(Request(base, tmp_path / "meta", "meta", model_parallel_size=2))
    convert(Request(base, tmp_path / "bf16", "consolidated", dtype="bf16"))
    folders = (base, *(tmp_path / name for name in ("hf", "meta", "bf16")))
    assert len({base_fingerprint([inspect(folder)], SMALL) for folder in folders}) == 1


def test_what_was_tuned_can_be_tuned_further_by_the_same_method_only(base: Path, tmp_path: Path) -> None:
    first = run(tmp_path / "first", *on(base, "lora"))
    again = run(tmp_path / "again", *on(first.checkpoint, "lora"))
    assert losses(tmp_path / "again")[0] == pytest.approx(losses(tmp_path / "first")[-1], rel=0.3)
    assert json.loads((again.checkpoint / "meta.json").read_text()) == {"llama_type": "llama_peft"}
    with pytest.raises(UserError, match=r"set tuning\.method=lora$"):
        plan_of(*on(first.checkpoint, "bias_norm"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tuning.method=bias_norm", "tuning.lora_rank=4"], "tuning: method bias_norm has no lora_rank"),
        (["tuning.lora_rank=4"], "tuning: method full has no lora_rank"),
        (["tuning.method=lora", "tuning.lora_rank=99"], "tuning.lora_rank (99) is larger than the keys' width (16)"),
        (["tuning.method=lora", "tuning.lora_rank=0"], "tuning.lora_rank"),
        (["tuning.method=lora", "tuning.prefix_len=5"], "tuning: method lora has no prefix_len"),
        (["tuning.method=lora", "tuning.lora_targets=[wx]"], "tuning.lora_targets.0: should be 'wq', 'wk'"),
        (["tuning.method=lora", "tuning.lora_targets=[]"], "tuning.lora_targets"),
        (["tuning.method=lora", "tuning.lora_alpha=0"], "tuning.lora_alpha"),
        (["tuning.method=lora", "tuning.lora_dropout=1"], "tuning.lora_dropout"),
        (["tuning.method=adapter", "tuning.lora_dropout=0.1"], "method adapter has no lora_dropout"),
        (["tuning.prefix_layers=2", "tuning.lora_rank=2"], "method full has no lora_rank and no prefix_layers"),
        (["tuning.quantize=nf4"], "tuning: quantize nf4 is for what does not train, and method full trains all"),
        (["tuning.quantize=nf4", "tuning.method=lora"], "tuning.quantize=nf4 saves only what trains: set checkpoint."),
        (["tuning.method=adapter", "tuning.prefix_layers=9"], "tuning.prefix_layers (9) is more than the model's"),
    ],
)
def test_what_a_method_does_not_have_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(UserError) as error:
        plan_of(*words)
    assert said in str(error.value)
