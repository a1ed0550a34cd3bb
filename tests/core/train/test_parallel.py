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
from tests.core.train.runs import assert_same_curve, curve, metrics, plan_of, run

# 32 items in steps of 7: the fifth step of an epoch has 4, which two ranks can share only unevenly among micro-batches
# of 3. 20 steps.
UNEVEN = ("train.global_batch_size=7", "train.batch_size=3", "train.epochs=4")
MODES = {
    "ddp": ["parallel.data_parallel=ddp"],
    "sdp": ["parallel.data_parallel=sdp"],
    "fsdp": ["parallel.data_parallel=fsdp", "train.activation_checkpointing=true"],
    "fsdp-unsharded": ["parallel.data_parallel=fsdp", "parallel.accumulate_unsharded=true"],
}
SPLIT = "parallel.model_parallel_size=2"
PART = (*UNEVEN, "train.epochs=2", "optimizer.lr=2e-2", "checkpoint.trainable_only=true", "tuning.lora_rank=4")
LORA, NF4 = "tuning.method=lora_bias_norm", "tuning.quantize=nf4"
ADAPTER = ("tuning.method=adapter", "tuning.prefix_layers=1", "tuning.prefix_new_gate=true", "optimizer.lr=5e-3")
# The output matrix is the embedding, which is split by features, and heads have norms.
TIED = ("family=qwen3", "tie_word_embeddings=true", "qk_norm=true", "head_dim=16", "rope_theta=1e6")
# What one process runs, by name; kinds of vision are runs, too.
ALONE = {
    "fp32": UNEVEN,
    "stopped": (*UNEVEN, "train.max_steps=5"),
    # Four heads of each kind, so that four ranks can share one copy.
    "four-heads": (*UNEVEN, "model.params.n_kv_heads=4", "train.max_steps=5"),
    "tied": (*UNEVEN, "train.max_steps=6", *(f"model.params.{key}" for key in TIED)),
    "bf16": (*UNEVEN, "train.precision=bf16", "data.validation.fraction=0.4", "train.epochs=2"),
    "lora": (*PART, LORA, "tuning.lora_dropout=0.2", "tuning.lora_alpha=8"),
    "nf4": (*PART, LORA, NF4),
    "adapter": (*PART, *ADAPTER),
    "weighted": (*UNEVEN, "train.max_steps=5"),
}
# What four processes run besides, and which of these it must be: 2 data parallel x 2 model parallel, unless it says
# otherwise. The scales of NF4 are rounded together for what a rank has: split otherwise they are others.
IN_FOUR = {
    "fsdp": ("fp32", [*MODES["fsdp"], SPLIT]),
    "four-heads": ("four-heads", ["parallel.model_parallel_size=4"]),
    "tied": ("tied", [*MODES["fsdp"], SPLIT]),
    "bf16": ("bf16", [*MODES["sdp"], SPLIT]),
    "lora": ("lora", [*MODES["sdp"], SPLIT]),
    "nf4": ("nf4", MODES["fsdp"]),
    "qformer": ("qformer", [*MODES["fsdp"], SPLIT, "vision.cache_features=true"]),
    "clip": ("clip", [*MODES["sdp"], SPLIT]),
    "tiny": ("tiny", [*MODES["ddp"], SPLIT]),
    "weighted": ("weighted", [*MODES["sdp"], SPLIT]),
}
MORE_IN_FOUR = {
    **{mode: ("fp32", [*MODES[mode], SPLIT]) for mode in ("ddp", "sdp", "fsdp-unsharded")},
    "adapter": ("adapter", [*MODES["ddp"], SPLIT]),
    "tied-fsdp-unsharded": ("tied", MODES["fsdp-unsharded"]),
    "nf4-split": ("nf4", [SPLIT]),
    "not-cached": ("qformer", [*MODES["ddp"], SPLIT]),
}
WORK = "tests.core.train.parallel_work"


class Alone:
    """Runs of one process, done when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def overrides(self, name: str) -> list[str]:
        if name == "weighted":
            return [*ALONE[name], f"data.sources=[{{path: {self.weighted_data()}, template: dialogue}}]"]
        if name in ALONE:
            return [*ALONE[name]]
        return [*overrides_of(name, self.folder), "data.images.transform=pad_to_square"]

    def weighted_data(self) -> Path:
        """Dialogues of two replies that count unequally."""
        path = self.folder / "weighted.json"
        weights = [(1, 0.5), (0.25, 1), (1, 1), (0, 0.1)]
        talks = [
            [turn for weight in pair for turn in (
                {"from": "human", "value": f"question {i}"}, {"from": "gpt", "value": "a " * (i % 7), "weight": weight}
            )]
            for i, pair in enumerate(weights * 8, start=1)
        ]  # fmt: skip
        path.write_text(json.dumps([{"conversations": turns} for turns in talks]))
        return path

    def __call__(self, name: str) -> Path:
        if not (self.folder / name).exists():
            run(self.folder / name, *self.overrides(name))
        return self.folder / name


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Alone:
    return Alone(tmp_path_factory.mktemp("alone"))


def run_four(folder: Path, alone: Alone, *todo: tuple[str, str, list[str], bool]) -> Path:
    """Runs by name, as which of one process, with what besides, and whether they are resumed; returns their folder."""
    runs = [(str(folder / name), alone.overrides(one) + words, resume) for name, one, words, resume in todo]
    run_ranks(4, f"{WORK}:runs", todo=[dict(zip(("output", "overrides", "resume"), one, strict=True)) for one in runs])
    return folder


@pytest.fixture(scope="module")
def of_four(alone: Alone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of four processes, by name."""
    folder = tmp_path_factory.mktemp("four")
    shutil.copytree(alone("stopped"), folder / "1-to-2x2-to-4-to-1")
    fsdp = IN_FOUR["fsdp"][1]
    return run_four(
        folder,
        alone,
        *((name, one, words, False) for name, (one, words) in IN_FOUR.items()),
        ("resumed", "fp32", [*fsdp, "train.max_steps=7"], False),
        ("resumed", "fp32", fsdp, True),
        ("1-to-2x2-to-4-to-1", "fp32", [*MODES["fsdp-unsharded"], SPLIT, "train.max_steps=10"], True),
        ("1-to-2x2-to-4-to-1", "fp32", [*MODES["sdp"], "train.max_steps=15"], True),
    )


@pytest.fixture(scope="module")
def more_of_four(alone: Alone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    todo = [(name, one, words, False) for name, (one, words) in MORE_IN_FOUR.items()]
    fsdp = IN_FOUR["tied"][1]
    todo += [("resumed", "tied", [*fsdp, "train.max_steps=3"], False), ("resumed", "tied", fsdp, True)]
    return run_four(tmp_path_factory.mktemp("more"), alone, *todo)


def weights(output: Path) -> dict[str, Tensor]:
    """The newest weights of a run, its model-parallel parts joined."""
    checkpoint = output / (output / "latest").read_text().strip()
    return {name: part.to(part.dtype) for name, part in read_weights([inspect(checkpoint)]).tensors.items()}


def assert_same_run(output: Path, expected: Path) -> None:
    assert_same_curve(output, expected)
    wanted, found = weights(expected), weights(output)
    assert found.keys() == wanted.keys()
    for parameter, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[parameter], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", sorted(IN_FOUR.keys() - {"bf16"}))
def test_four_processes_train_what_one_does(name: str, alone: Alone, of_four: Path) -> None:
    assert len(curve(of_four / "fsdp")) == 20
    assert_same_run(of_four / name, alone(IN_FOUR[name][0]))


@pytest.mark.soak
@pytest.mark.parametrize("name", sorted(MORE_IN_FOUR))
def test_four_processes_train_what_one_does_however_they_share(name: str, alone: Alone, more_of_four: Path) -> None:
    output, expected = more_of_four / name, alone(MORE_IN_FOUR[name][0])
    if name == "nf4-split":
        ours, theirs = ([loss for loss, _ in curve(folder)] for folder in (output, expected))
        assert ours == pytest.approx(theirs, rel=2e-3)
        assert ours != theirs
    else:
        assert_same_run(output, expected)


def test_bf16_trains_and_validates_the_same_up_to_its_rounding(alone: Alone, of_four: Path) -> None:
    for actual, wanted in zip(metrics(of_four / "bf16"), metrics(alone("bf16")), strict=True):
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
    assert len(inspect(of_four / "four-heads" / "epoch0").shards) == 4


def test_every_shard_has_all_of_what_vision_adds(of_four: Path) -> None:
    names = [f"consolidated.0{rank}-of-02.model.pth" for rank in range(2)]
    first, second = (torch.load(of_four / "qformer" / "epoch1" / name, weights_only=True)["model"] for name in names)
    for name in (*tower_shapes(QFORMER), *shapes_of(SEEING["qformer"], "vision")):
        assert torch.equal(first[f"llma.{name}"], second[f"llma.{name}"])


def assert_bitwise_same(resumed: Path, whole: Path) -> None:
    assert metrics(resumed) == metrics(whole)
    last = (whole / "latest").read_text().strip()
    for rank in range(2):
        for name in (f"state/training-{rank:02d}-of-02.safetensors", f"consolidated.{rank:02d}-of-02.model.pth"):
            assert (resumed / last / name).read_bytes() == (whole / last / name).read_bytes()


def test_resume_on_the_same_layout_is_bitwise_the_uninterrupted_run(of_four: Path) -> None:
    assert_bitwise_same(of_four / "resumed", of_four / "fsdp")


@pytest.mark.soak
def test_so_it_is_of_a_model_whose_output_is_its_embedding(of_four: Path, more_of_four: Path) -> None:
    assert_bitwise_same(more_of_four / "resumed", of_four / "tied")


def test_a_run_goes_on_in_other_layouts_and_stays_the_same_run(alone: Alone, of_four: Path) -> None:
    run(of_four / "1-to-2x2-to-4-to-1", *UNEVEN, resume=True)
    assert_same_curve(of_four / "1-to-2x2-to-4-to-1", alone("fp32"))


def test_the_imbalance_is_logged_and_reported(of_four: Path, alone: Alone) -> None:
    assert all(0 <= line["imbalance"] < 0.5 for line in metrics(of_four / "fsdp"))
    assert "imbalance" in (of_four / "fsdp" / "report.md").read_text()
    assert not any("imbalance" in line for line in metrics(alone("fp32")))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two files, one of them in part, and some held out."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("a", "b"):
        items = [{"instruction": f"{name} {i}", "output": "ok " * (i % 7 + 1)} for i in range(200)]
        (folder / f"{name}.json").write_text(json.dumps(items))
    sources = f"data.sources=[{{path: {folder / 'a.json'}}}, {{path: {folder / 'b.json'}, ratio: 0.5, weight: 1.5}}]"
    return [sources, "data.validation.fraction=0.25"]


@pytest.fixture(scope="module")
def of_two(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes count and give."""
    temporary, home = tmp_path_factory.mktemp("temporary"), tmp_path_factory.mktemp("home")
    modes = [[*mode, "train.batch_size=2", "train.activation_checkpointing=false"] for mode in MODES.values()]
    found = run_ranks(2, f"{WORK}:of_two", modes=modes, data=data, temporary=str(temporary), home=str(home))
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
