"""Several processes train what one process trains, whatever they are: the promise that a recipe is one run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llama_acc.core.atomic import check_manifest
from llama_acc.core.checkpoint.layout import inspect
from llama_acc.core.checkpoint.load import read_weights
from llama_acc.core.distributed.groups import check_world
from llama_acc.core.errors import UserError
from tests.core.ranks import run_ranks
from tests.core.train.runs import metrics, run

# 32 items in steps of 7: the fifth step of an epoch has 4, which two ranks can share only unevenly among micro-batches
# of 3. 20 steps.
UNEVEN = ("train.global_batch_size=7", "train.batch_size=3", "train.epochs=4", "checkpoint.every_epochs=1")
MODES = {
    "ddp": ["parallel.data_parallel=ddp"],
    "sdp": ["parallel.data_parallel=sdp"],
    "fsdp": ["parallel.data_parallel=fsdp"],
    "fsdp-unsharded": ["parallel.data_parallel=fsdp", "parallel.accumulate_unsharded=true"],
    "fsdp-recomputing": ["parallel.data_parallel=fsdp", "train.activation_checkpointing=true"],
}
SPLIT = "parallel.model_parallel_size=2"
# Four heads of each kind, so that four ranks can share one copy.
FOUR_HEADS = "model.params.n_kv_heads=4"
PART = ("train.epochs=2", "optimizer.lr=2e-2", "checkpoint.trainable_only=true", "tuning.lora_rank=4")
TUNED = {
    "lora": (*PART, "tuning.method=lora_bias_norm"),
    "nf4": (*PART, "tuning.method=lora_bias_norm", "tuning.quantize=nf4"),
    "adapter": (
        *PART,
        "optimizer.lr=5e-3",
        "tuning.method=adapter",
        "tuning.prefix_layers=1",
        "tuning.prefix_new_gate=true",
    ),
}
# Each method in two modes, and each mode with two methods.
TUNED_MODES = {"lora": ("ddp", "sdp"), "nf4": ("sdp", "fsdp"), "adapter": ("ddp", "fsdp")}
WORK = "tests.core.train.parallel_work"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    run(folder / "fp32", *UNEVEN)
    run(folder / "stopped", *UNEVEN, "train.max_steps=7")
    run(folder / "bf16", *UNEVEN, "train.precision=bf16")
    run(folder / "four-heads", *UNEVEN, FOUR_HEADS)
    for name, words in TUNED.items():
        run(folder / name, *UNEVEN, *words)
    return folder


@pytest.fixture(scope="module")
def of_four(alone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of four processes, by name."""
    folder = tmp_path_factory.mktemp("four")
    todo: list[dict[str, Any]] = [
        {"output": str(folder / f"2x2-{name}"), "overrides": [*UNEVEN, *overrides, SPLIT]}
        for name, overrides in MODES.items()
    ]
    whole = [*UNEVEN, FOUR_HEADS, "parallel.model_parallel_size=4"]
    todo.append({"output": str(folder / "four-heads"), "overrides": whole})
    for name, words in TUNED.items():
        for mode in TUNED_MODES[name]:
            # The scales of NF4 are rounded together for what a rank has: split otherwise they are others.
            split = () if name == "nf4" else (SPLIT,)
            overrides = [*UNEVEN, *words, *MODES[mode], *split]
            todo.append({"output": str(folder / f"{name}-{mode}"), "overrides": overrides})
    todo.append({"output": str(folder / "nf4-split"), "overrides": [*UNEVEN, *TUNED["nf4"], SPLIT]})
    validation = "data.validation.fraction=0.4"
    todo.append({"output": str(folder / "validated"), "overrides": [*UNEVEN, *MODES["fsdp"], SPLIT, validation]})
    todo.append({"output": str(folder / "bf16"), "overrides": [*UNEVEN, *MODES["sdp"], SPLIT, "train.precision=bf16"]})
    for name in ("sdp", "fsdp"):
        first = [*UNEVEN, *MODES[name], SPLIT, "train.max_steps=7"]
        again = [*UNEVEN, *MODES[name], SPLIT]
        todo += [
            {"output": str(folder / f"resumed-{name}"), "overrides": first},
            {"output": str(folder / f"resumed-{name}"), "overrides": again, "resume": True},
        ]
    # Saved by one process, gone on with by 2x2; saved by 2x2, gone on with by 4x1.
    shutil.copytree(alone / "stopped", folder / "1-to-2x2")
    todo.append({"output": str(folder / "1-to-2x2"), "overrides": [*UNEVEN, *MODES["fsdp"], SPLIT], "resume": True})
    todo.append({"output": str(folder / "2x2-to-4"), "overrides": [*UNEVEN, *MODES["sdp"], SPLIT, "train.max_steps=7"]})
    todo.append({"output": str(folder / "2x2-to-1"), "overrides": [*UNEVEN, *MODES["sdp"], SPLIT, "train.max_steps=7"]})
    todo.append({"output": str(folder / "2x2-to-4"), "overrides": [*UNEVEN, *MODES["fsdp"]], "resume": True})
    run_ranks(4, f"{WORK}:runs", todo=todo)
    return folder


COUNTED = ("ddp", "sdp", "fsdp", "fsdp-unsharded")


@pytest.fixture(scope="module")
def of_two() -> list[dict[str, Any]]:
    """What two processes count and tell."""
    return run_ranks(2, f"{WORK}:of_two", modes=[[*MODES[name], "train.batch_size=2"] for name in COUNTED])


def curve(output: Path) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in metrics(output) if "loss" in line]


def assert_same_curve(output: Path, expected: Path, steps: int = 20) -> None:
    """Loss and gradient norm within 1e-5 at the first step and 1e-4 over all."""
    ours, theirs = curve(output), curve(expected)
    assert len(ours) == len(theirs) == steps
    for step, (actual, wanted) in enumerate(zip(ours, theirs, strict=True)):
        assert actual == pytest.approx(wanted, rel=1e-5 if step == 0 else 1e-4), step


def weights(checkpoint: Path) -> dict[str, Tensor]:
    """A checkpoint's weights, its model-parallel parts joined."""
    return {name: part.to(part.dtype) for name, part in read_weights([inspect(checkpoint)]).tensors.items()}


@pytest.mark.parametrize("mode", MODES)
def test_2x2_processes_train_the_curve_of_one(mode: str, alone: Path, of_four: Path) -> None:
    assert_same_curve(of_four / f"2x2-{mode}", alone / "fp32")
    expected = weights(alone / "fp32" / "epoch3")
    for name, tensor in weights(of_four / f"2x2-{mode}" / "epoch3").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("name", "mode"), [(name, mode) for name, modes in TUNED_MODES.items() for mode in modes])
def test_four_processes_tune_a_part_as_one_does(name: str, mode: str, alone: Path, of_four: Path) -> None:
    assert_same_tuning(of_four / f"{name}-{mode}", alone / name)


@pytest.mark.soak
def test_in_the_other_modes_too_four_processes_tune_a_part_as_one_does(tmp_path: Path) -> None:
    others = {(name, mode) for name in TUNED for mode in ("ddp", "sdp", "fsdp") if mode not in TUNED_MODES[name]}
    for name, words in TUNED.items():
        run(tmp_path / name, *UNEVEN, *words)
    splits = {"nf4": ()}
    todo = [
        {
            "output": str(tmp_path / f"{name}-{mode}"),
            "overrides": [*UNEVEN, *TUNED[name], *MODES[mode], *splits.get(name, (SPLIT,))],
        }
        for name, mode in sorted(others)
    ]
    run_ranks(4, f"{WORK}:runs", todo=todo)
    for name, mode in others:
        assert_same_tuning(tmp_path / f"{name}-{mode}", tmp_path / name)


def assert_same_tuning(output: Path, alone: Path) -> None:
    """The same curve, and the same weights of what trained."""
    assert_same_curve(output, alone, steps=10)
    expected, found = weights(alone / "epoch1"), weights(output / "epoch1")
    assert found.keys() == expected.keys()
    for parameter, tensor in found.items():
        torch.testing.assert_close(tensor, expected[parameter], rtol=1e-3, atol=1e-4)


def test_a_split_model_in_nf4_trains_nearly_the_curve_of_one(alone: Path, of_four: Path) -> None:
    ours, theirs = curve(of_four / "nf4-split"), curve(alone / "nf4")
    assert [loss for loss, _ in ours] == pytest.approx([loss for loss, _ in theirs], rel=2e-3)
    assert ours != theirs


def test_four_ranks_with_one_copy_of_the_model_train_the_curve_of_one(alone: Path, of_four: Path) -> None:
    assert_same_curve(of_four / "four-heads", alone / "four-heads")
    assert len(inspect(of_four / "four-heads" / "epoch3").shards) == 4


def test_every_rank_evaluates_its_part_and_the_loss_is_that_of_all(of_four: Path, tmp_path: Path) -> None:
    run(tmp_path, *UNEVEN, "data.validation.fraction=0.4")
    ours, theirs = (
        [line["validation_loss"] for line in metrics(folder) if "validation_loss" in line]
        for folder in (of_four / "validated", tmp_path)
    )
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert len(ours) >= 3


def test_bf16_trains_the_same_up_to_its_rounding(alone: Path, of_four: Path) -> None:
    for actual, wanted in zip(curve(of_four / "bf16"), curve(alone / "bf16"), strict=True):
        assert actual == pytest.approx(wanted, rel=2e-2)
    checkpoint = of_four / "bf16" / "epoch3"
    masters = load_file(checkpoint / "state" / "training-01-of-02.safetensors")
    saved = torch.load(checkpoint / "consolidated.01-of-02.model.pth", weights_only=True)["model"]
    for name, tensor in saved.items():
        assert torch.equal(tensor, masters[f"master.{name.removeprefix('llma.')}"].bfloat16()), name


def test_a_checkpoint_of_several_ranks_has_a_file_for_each_model_parallel_rank(of_four: Path) -> None:
    folder = of_four / "2x2-fsdp" / "epoch3"
    check_manifest(folder, contents=True)
    assert {path.name for path in folder.glob("consolidated.*")} == {
        "consolidated.00-of-02.model.pth",
        "consolidated.01-of-02.model.pth",
    }
    assert {path.name for path in (folder / "state").iterdir()} == {
        "training-00-of-02.safetensors",
        "training-01-of-02.safetensors",
        *(f"rng-{rank:05d}-of-00004.safetensors" for rank in range(4)),
        "progress.json",
    }
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in torch.load(folder / "consolidated.01-of-02.model.pth", weights_only=True)["model"].items()
    }
    assert shapes["llma.layers.0.attention.wk.weight"] == (8, 32)
    assert shapes["llma.layers.0.attention.wo.weight"] == (32, 16)
    assert shapes["llma.norm.weight"] == (32,)
    assert all(name.startswith("llma.") for name in shapes)


@pytest.mark.parametrize("mode", ["sdp", "fsdp"])
def test_resume_on_the_same_layout_is_bitwise_the_uninterrupted_run(mode: str, of_four: Path) -> None:
    resumed, whole = of_four / f"resumed-{mode}", of_four / f"2x2-{mode}"
    assert metrics(resumed) == metrics(whole)
    for rank in range(2):
        for name in (f"consolidated.{rank:02d}-of-02.model.pth", f"state/training-{rank:02d}-of-02.safetensors"):
            assert (resumed / "epoch3" / name).read_bytes()[-4096:] == (whole / "epoch3" / name).read_bytes()[-4096:]
    ours, theirs = weights(resumed / "epoch3"), weights(whole / "epoch3")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("name", ["1-to-2x2", "2x2-to-4"])
def test_resume_on_another_layout_goes_on_with_the_same_run(name: str, alone: Path, of_four: Path) -> None:
    assert_same_curve(of_four / name, alone / "fp32")


def test_one_process_goes_on_with_what_four_began(alone: Path, of_four: Path) -> None:
    run(of_four / "2x2-to-1", *UNEVEN, resume=True)
    assert_same_curve(of_four / "2x2-to-1", alone / "fp32")


def test_the_imbalance_is_logged_and_reported(of_four: Path, alone: Path) -> None:
    lines = metrics(of_four / "2x2-sdp")
    assert all(0 <= line["imbalance"] < 0.5 for line in lines)
    assert "imbalance" in (of_four / "2x2-sdp" / "report.md").read_text()
    assert not any("imbalance" in line for line in metrics(alone / "fp32"))


def test_gradients_are_sent_when_each_mode_says_and_metrics_once(of_two: list[dict[str, Any]]) -> None:
    """8 examples in micro-batches of 2: four for one rank, two for each of two ranks. Three groups of parameters."""
    counts = dict(zip(COUNTED, of_two[0]["collectives"], strict=True))
    for steps in counts.values():
        assert steps[0] == steps[1]
    assert counts["ddp"][0] == {"allreduce_": 3 + 1}
    assert counts["sdp"][0] == {"_allgather_base_": 3, "_reduce_scatter_base_": 3, "allreduce_": 1}
    assert counts["fsdp"][0]["_reduce_scatter_base_"] == 2 * 3
    assert counts["fsdp-unsharded"][0]["_reduce_scatter_base_"] == 3
    assert counts["fsdp"][0]["_allgather_base_"] > counts["sdp"][0]["_allgather_base_"]
    assert counts["fsdp"][0]["allreduce_"] == counts["fsdp-unsharded"][0]["allreduce_"] == 1


def test_frozen_parameters_are_sharded_like_trained_ones(of_two: list[dict[str, Any]]) -> None:
    rows = of_two[0]["frozen_rows"]
    assert rows == {"ddp": [32, 32], "sdp": [16, 16], "fsdp": [16, 16]}


def test_ranks_agree_and_an_error_of_one_is_an_error_of_all(of_two: list[dict[str, Any]]) -> None:
    first, second = (rank["agreement"] for rank in of_two)
    failed = "rank 1 has no file; copy it"
    assert first == ["first [1, 1] True", "once told by 0", failed, failed, "refused by main"]
    assert second == ["first [1, 1] True", "once told by 0", failed, failed, "refused by main"]


def test_processes_that_cannot_be_shared_out_are_refused_with_both_numbers() -> None:
    with pytest.raises(UserError, match=r"model_parallel_size is 2, which does not divide .* \(3\)") as caught:
        check_world(2, 3)
    assert "--nproc 2" in str(caught.value)


def test_progress_tells_the_layout(of_four: Path) -> None:
    progress = json.loads((of_four / "2x2-fsdp" / "epoch3" / "state" / "progress.json").read_text())
    assert (progress["model_parallel_size"], progress["data_parallel_size"], progress["step"]) == (2, 2, 20)
