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
from llama_acc.core.model.transformer import shapes_of
from llama_acc.core.model.vision import tower_shapes
from tests.core.ranks import run_ranks
from tests.core.seeing import QFORMER, SEEING
from tests.core.train.image_runs import overrides_of
from tests.core.train.runs import metrics, plan_of, run

# 32 items in steps of 7: the fifth step of an epoch has 4, which two ranks can share only unevenly among micro-batches
# of 3. 20 steps.
UNEVEN = ("train.global_batch_size=7", "train.batch_size=3", "train.epochs=4", "checkpoint.every_epochs=1")
MODES = {
    "ddp": ["parallel.data_parallel=ddp"],
    "sdp": ["parallel.data_parallel=sdp"],
    "fsdp": ["parallel.data_parallel=fsdp", "train.activation_checkpointing=true"],
    "fsdp-unsharded": ["parallel.data_parallel=fsdp", "parallel.accumulate_unsharded=true"],
}
SPLIT = "parallel.model_parallel_size=2"
# Four heads of each kind, so that four ranks can share one copy.
FOUR_HEADS = "model.params.n_kv_heads=4"
PART = ("train.epochs=2", "optimizer.lr=2e-2", "checkpoint.trainable_only=true", "tuning.lora_rank=4")
ADAPTER = ("tuning.method=adapter", "tuning.prefix_layers=1", "tuning.prefix_new_gate=true", "optimizer.lr=5e-3")
TUNED = {
    "lora": (*PART, "tuning.method=lora_bias_norm"),
    "nf4": (*PART, "tuning.method=lora_bias_norm", "tuning.quantize=nf4"),
    "adapter": (*PART, *ADAPTER),
}
# The scales of NF4 are rounded together for what a rank has: split otherwise they are others.
TUNED_IN = {"lora": ("sdp", SPLIT), "nf4": ("fsdp",), "adapter": ("ddp", SPLIT)}
IMAGES_IN = {"qformer": "fsdp", "clip": "ddp", "tiny": "sdp"}
CACHED = ("data.images.transform=pad_to_square", "vision.cache_features=true")
ROUNDED = ("train.precision=bf16", "data.validation.fraction=0.4", "train.epochs=2")
WORK = "tests.core.train.parallel_work"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of one process, by name."""
    folder = tmp_path_factory.mktemp("alone")
    run(folder / "fp32", *UNEVEN)
    run(folder / "stopped", *UNEVEN, "train.max_steps=5")
    run(folder / "bf16", *UNEVEN, *ROUNDED)
    run(folder / "four-heads", *UNEVEN, FOUR_HEADS)
    for name, words in TUNED.items():
        run(folder / name, *UNEVEN, *words)
    for name in IMAGES_IN:
        run(folder / name, *overrides_of(name, folder))
    run(folder / "cached", *overrides_of("qformer", folder), CACHED[0])
    return folder


@pytest.fixture(scope="module")
def of_four(alone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of four processes, by name: 2 data parallel x 2 model parallel, unless they say otherwise."""
    folder = tmp_path_factory.mktemp("four")
    shutil.copytree(alone / "stopped", folder / "1-to-2x2-to-4-to-1")
    fsdp = [*UNEVEN, *MODES["fsdp"], SPLIT]
    todo: list[tuple[str, list[str], bool]] = [
        *((name, [*UNEVEN, *mode, SPLIT], False) for name, mode in MODES.items()),
        ("resumed", [*fsdp, "train.max_steps=7"], False),
        ("resumed", fsdp, True),
        ("1-to-2x2-to-4-to-1", [*UNEVEN, *MODES["fsdp-unsharded"], SPLIT, "train.max_steps=10"], True),
        ("1-to-2x2-to-4-to-1", [*UNEVEN, *MODES["sdp"], "train.max_steps=15"], True),
        ("four-heads", [*UNEVEN, FOUR_HEADS, "parallel.model_parallel_size=4"], False),
        ("bf16", [*UNEVEN, *MODES["sdp"], SPLIT, *ROUNDED], False),
        *((name, [*UNEVEN, *TUNED[name], *MODES[mode], *split], False) for name, (mode, *split) in TUNED_IN.items()),
        ("nf4-split", [*UNEVEN, *TUNED["nf4"], SPLIT], False),
        *((name, [*overrides_of(name, alone), *MODES[mode], SPLIT], False) for name, mode in IMAGES_IN.items()),
        ("cached", [*overrides_of("qformer", alone), SPLIT, *CACHED], False),
    ]
    run_ranks(
        4,
        f"{WORK}:runs",
        todo=[{"output": str(folder / name), "overrides": words, "resume": resume} for name, words, resume in todo],
    )
    return folder


def curve(output: Path) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in metrics(output) if "loss" in line]


def assert_same_curve(output: Path, expected: Path, steps: int = 20) -> None:
    """Loss and gradient norm within 1e-5 at the first step and 1e-4 over all."""
    ours, theirs = curve(output), curve(expected)
    assert len(ours) == len(theirs) == steps
    for step, (actual, wanted) in enumerate(zip(ours, theirs, strict=True)):
        assert actual == pytest.approx(wanted, rel=1e-5 if step == 0 else 1e-4), step


def weights(output: Path) -> dict[str, Tensor]:
    """The newest weights of a run, its model-parallel parts joined."""
    checkpoint = output / (output / "latest").read_text().strip()
    return {name: part.to(part.dtype) for name, part in read_weights([inspect(checkpoint)]).tensors.items()}


@pytest.mark.parametrize(
    ("name", "reference", "steps"),
    [
        *((mode, "fp32", 20) for mode in MODES),
        ("four-heads", "four-heads", 20),
        *((name, name, 10) for name in TUNED),
        *((name, name, 6) for name in IMAGES_IN),
        ("cached", "cached", 6),
    ],
)
def test_four_processes_train_what_one_does(name: str, reference: str, steps: int, alone: Path, of_four: Path) -> None:
    assert_same_curve(of_four / name, alone / reference, steps)
    expected, found = weights(alone / reference), weights(of_four / name)
    assert found.keys() == expected.keys()
    for parameter, tensor in found.items():
        torch.testing.assert_close(tensor, expected[parameter], rtol=1e-3, atol=1e-4)


def test_a_split_model_in_nf4_trains_nearly_the_curve_of_one(alone: Path, of_four: Path) -> None:
    ours, theirs = curve(of_four / "nf4-split"), curve(alone / "nf4")
    assert [loss for loss, _ in ours] == pytest.approx([loss for loss, _ in theirs], rel=2e-3)
    assert ours != theirs


def test_bf16_trains_and_validates_the_same_up_to_its_rounding(alone: Path, of_four: Path) -> None:
    for actual, wanted in zip(metrics(of_four / "bf16"), metrics(alone / "bf16"), strict=True):
        for key in {"loss", "grad_norm", "validation_loss"} & wanted.keys():
            assert actual[key] == pytest.approx(wanted[key], rel=2e-2)
    checkpoint = of_four / "bf16" / "epoch1"
    masters = load_file(checkpoint / "state" / "training-01-of-02.safetensors")
    saved = torch.load(checkpoint / "consolidated.01-of-02.model.pth", weights_only=True)["model"]
    for name, tensor in saved.items():
        assert torch.equal(tensor, masters[f"master.{name.removeprefix('llma.')}"].bfloat16()), name


def test_a_checkpoint_of_several_ranks_has_a_file_for_each_model_parallel_rank(of_four: Path) -> None:
    folder = of_four / "fsdp" / "epoch3"
    check_manifest(folder, verify=True)
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*-of-*")} == {
        *(f"consolidated.0{rank}-of-02.model.pth" for rank in range(2)),
        *(f"state/training-0{rank}-of-02.safetensors" for rank in range(2)),
        *(f"state/rng-{rank:05d}-of-00004.safetensors" for rank in range(4)),
    }
    saved = torch.load(folder / "consolidated.01-of-02.model.pth", weights_only=True)["model"]
    assert saved["llma.layers.0.attention.wk.weight"].shape == (8, 32)
    assert saved["llma.layers.0.attention.wo.weight"].shape == (32, 16)
    assert saved["llma.norm.weight"].shape == (32,)
    progress = json.loads((folder / "state" / "progress.json").read_text())
    assert (progress["model_parallel_size"], progress["data_parallel_size"], progress["step"]) == (2, 2, 20)
    assert len(inspect(of_four / "four-heads" / "epoch3").shards) == 4


def test_every_shard_has_all_of_what_vision_adds(of_four: Path) -> None:
    names = [f"consolidated.0{rank}-of-02.model.pth" for rank in range(2)]
    first, second = (torch.load(of_four / "qformer" / "epoch1" / name, weights_only=True)["model"] for name in names)
    for name in (*tower_shapes(QFORMER), *shapes_of(SEEING["qformer"], "vision")):
        assert torch.equal(first[f"llma.{name}"], second[f"llma.{name}"])


def test_resume_on_the_same_layout_is_bitwise_the_uninterrupted_run(of_four: Path) -> None:
    resumed, whole = of_four / "resumed", of_four / "fsdp"
    assert metrics(resumed) == metrics(whole)
    for rank in range(2):
        name = f"state/training-{rank:02d}-of-02.safetensors"
        ours, theirs = load_file(resumed / "epoch3" / name), load_file(whole / "epoch3" / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    ours, theirs = weights(resumed), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_goes_on_in_other_layouts_and_stays_the_same_run(alone: Path, of_four: Path) -> None:
    run(of_four / "1-to-2x2-to-4-to-1", *UNEVEN, resume=True)
    assert_same_curve(of_four / "1-to-2x2-to-4-to-1", alone / "fp32")


def test_the_imbalance_is_logged_and_reported(of_four: Path, alone: Path) -> None:
    assert all(0 <= line["imbalance"] < 0.5 for line in metrics(of_four / "sdp"))
    assert "imbalance" in (of_four / "sdp" / "report.md").read_text()
    assert not any("imbalance" in line for line in metrics(alone / "fp32"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two files, one of them in part, and some held out."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("a", "b"):
        items = [{"instruction": f"{name} {i}", "output": "ok " * (i % 7 + 1)} for i in range(200)]
        (folder / f"{name}.json").write_text(json.dumps(items))
    sources = f"data.sources=[{{path: {folder / 'a.json'}}}, {{path: {folder / 'b.json'}, ratio: 0.5}}]"
    return [sources, "data.validation.fraction=0.25"]


@pytest.fixture(scope="module")
def of_two(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes count and give."""
    temporary, home = tmp_path_factory.mktemp("temporary"), tmp_path_factory.mktemp("home")
    modes = [[*mode, "train.batch_size=2", "train.activation_checkpointing=false"] for mode in MODES.values()]
    variables = {"TMPDIR": str(temporary), "LLAMA_ACC_HOME": str(home)}
    found = run_ranks(2, f"{WORK}:of_two", modes=modes, data=data, variables=variables)
    assert list(temporary.iterdir()) == []
    return found


def test_gradients_are_sent_when_each_mode_says_and_metrics_once(of_two: list[dict[str, Any]]) -> None:
    """8 examples in micro-batches of 2: four for one rank, two for each of two ranks. Three groups of parameters."""
    counts = dict(zip(MODES, of_two[0]["collectives"], strict=True))
    assert all(first == second for first, second in counts.values())
    assert counts["ddp"][0] == {"allreduce_": 3 + 1}
    assert counts["sdp"][0] == {"_allgather_base_": 3, "_reduce_scatter_base_": 3, "allreduce_": 1}
    assert counts["fsdp"][0]["_reduce_scatter_base_"] == 2 * 3
    assert counts["fsdp-unsharded"][0]["_reduce_scatter_base_"] == 3
    assert counts["fsdp"][0]["_allgather_base_"] > counts["sdp"][0]["_allgather_base_"]
    assert counts["fsdp"][0]["allreduce_"] == counts["fsdp-unsharded"][0]["allreduce_"] == 1


def test_frozen_parameters_are_sharded_like_trained_ones(of_two: list[dict[str, Any]]) -> None:
    assert of_two[0]["frozen_rows"] == {"ddp": [32, 32], "sdp": [16, 16], "fsdp": [16, 16]}


def test_ranks_agree_and_an_error_of_one_is_an_error_of_all(of_two: list[dict[str, Any]]) -> None:
    failed = "rank 1 has no file\ncopy it"
    for rank, found in enumerate(of_two):
        assert found["agreement"] == [[rank], "by 0", failed, failed, "refused by main"]


def test_all_ranks_of_a_machine_map_the_files_that_one_of_them_encoded(
    of_two: list[dict[str, Any]], data: list[str]
) -> None:
    """Without a cache, and with one."""
    alone = plan_of(*data)
    assert alone.validation is not None
    for ours, theirs in zip(of_two[0]["planned"], of_two[1]["planned"], strict=True):
        assert (ours.pop("encoded"), theirs.pop("encoded")) == (["a.json", "b.json"], [])
        assert len(ours["mapped"]) == 2
        assert ours == theirs
        assert ours["fingerprints"] == [alone.train.fingerprint(), alone.validation.fingerprint()]
        assert ours["report"] == alone.report
        assert ours["documents"][17] == alone.train.document(17)[0].tolist()


def test_processes_that_cannot_be_shared_out_are_refused_with_both_numbers() -> None:
    with pytest.raises(UserError, match=r"model_parallel_size is 2, which does not divide .* \(3\)") as caught:
        check_world(2, 3)
    assert "--nproc 2" in str(caught.value)
