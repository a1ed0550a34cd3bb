import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_acc.core.checkpoint.layout import inspect, read_config
from llama_acc.core.checkpoint.lazy import LazyTensor, concatenate, reorder_heads
from llama_acc.core.checkpoint.load import check_tensors, fill, open_shard, read_weights
from llama_acc.core.errors import UserError
from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.transformer import Transformer, build_on_meta, shapes_of
from tests.core.checkpoint.folders import (
    GROUPED,
    same_bits,
    shard,
    state,
    values_of,
    write_consolidated,
    write_huggingface,
    write_meta,
)
from tests.core.tiny import CPU, SMALL

NAME = "consolidated.00-of-01.model.pth"


def refused(path: Path, content: Any) -> str:
    torch.save(content, path)
    with pytest.raises(UserError) as error:
        open_shard(path)
    return str(error.value)


@pytest.mark.parametrize("wrapped", [False, True], ids=["flat", "under model"])
@pytest.mark.parametrize("prefix", ["", "llma."])
def test_every_way_of_writing_the_names_is_read(prefix: str, wrapped: bool, tmp_path: Path) -> None:
    named = {prefix + name: tensor for name, tensor in state(SMALL).items()} | {f"{prefix}rope.freqs": torch.ones(4)}
    torch.save({"model": named} if wrapped else named, tmp_path / NAME)
    shard = open_shard(tmp_path / NAME)
    assert shard.keys() == state(SMALL).keys()
    assert all(tensor.mapped and torch.equal(tensor.source, state(SMALL)[name]) for name, tensor in shard.items())
    check_tensors(read_weights([inspect(tmp_path)]), shapes_of(SMALL), tmp_path)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
def test_a_file_cut_short_is_refused(share: float, tmp_path: Path) -> None:
    path = tmp_path / NAME
    with pytest.raises(UserError, match=f"cannot read {path}"):
        open_shard(path)  # not there
    torch.save(state(SMALL), path)
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
    content = {**state(SMALL), "extra": Hostile(proof)} if inside else Hostile(proof)
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


def test_what_trains_never_lies_in_the_file_nor_changes_it(tmp_path: Path) -> None:
    path = tmp_path / NAME
    torch.save(state(SMALL), path)
    before = path.read_bytes()
    model, mapped = filled(path, torch.float32, copy=True)
    assert all(parameter.data_ptr() != mapped[name] for name, parameter in model.named_parameters())
    storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert len(storages) == len(mapped), "parameters share storage"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(9.0)
    assert path.read_bytes() == before
    assert torch.equal(open_shard(path)["norm.weight"].source, state(SMALL)["norm.weight"])


# Every layout, read at every size that fits, gives each rank its own part


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    """Random weights in both layouts, at every size."""
    root = tmp_path_factory.mktemp("layouts")
    writers = {"meta": write_meta, "consolidated": write_consolidated}
    return {
        (name, size): write(root / f"{name}{size}", state(), size)
        for name, write in writers.items()
        for size in (1, 2, 4, 8)
    }


@pytest.mark.parametrize(("saved", "wanted"), [(1, 1), (1, 8), (8, 1), (2, 4), (4, 2), (4, 4), (8, 8)])
@pytest.mark.parametrize("name", ["meta", "consolidated"])
def test_any_size_is_read_at_any_other(
    name: str, saved: int, wanted: int, folders: dict[tuple[str, int], Path]
) -> None:
    layouts = [inspect(folders[name, saved])]
    assert layouts[0].model_parallel_size == saved
    for rank in range(wanted):
        weights = read_weights(layouts, rank, wanted)
        check_tensors(weights, shapes_of(GROUPED), "base")
        assert same_bits(values_of(weights), shard(state(), rank, wanted)), rank


def test_sizes_of_which_neither_divides_the_other_are_refused(folders: dict[tuple[str, int], Path]) -> None:
    with pytest.raises(UserError, match="has model-parallel size 4, which cannot be read at size 3: one of the two"):
        read_weights([inspect(folders["meta", 4])], 0, 3)


def test_heads_are_put_in_metas_order_and_back() -> None:
    ours = torch.randn(48, 5)
    theirs = ours.view(3, 8, 2, 5).transpose(1, 2).reshape(48, 5)  # transformers' permute
    in_shards = concatenate([LazyTensor.of(ours[:11]), LazyTensor.of(ours[11:])], 0)
    to_meta = reorder_heads(LazyTensor.of(theirs), 3, to_meta=True)
    for lazy, expected in (
        (to_meta, ours),
        (reorder_heads(LazyTensor.of(ours), 3, to_meta=False), theirs),
        (reorder_heads(to_meta, 3, to_meta=False), theirs),
        (reorder_heads(in_shards, 3, to_meta=False), theirs),
        (reorder_heads(LazyTensor.of(theirs[:, 0]), 3, to_meta=True), ours[:, 0]),
    ):
        for start, stop in ((0, 48), (1, 6), (7, 33), (15, 17), (3, 3)):
            assert torch.equal(lazy.rows(start, stop).to(torch.float32), expected[start:stop])


def test_shards_that_differ_are_listed_by_file(tmp_path: Path) -> None:
    folder = write_meta(tmp_path / "base", state(), 2)
    second = shard(state(), 1, 2)
    second["layers.0.attention.wq.weight"] = second["layers.0.attention.wq.weight"][:-1].clone()
    second["output.weight"] = second["output.weight"].half()
    second["extra.weight"] = torch.zeros(3)
    del second["layers.1.feed_forward.w2.weight"], second["norm.weight"]
    torch.save(second, folder / "consolidated.01.pth")
    with pytest.raises(UserError) as error:
        check_tensors(read_weights([inspect(folder)], 0, 2), shapes_of(GROUPED), "base")
    first, other = "consolidated.00.pth", "consolidated.01.pth"
    assert sorted(error.value.message.splitlines()[1:]) == [
        f"  shards: extra.weight is missing in {first}, [3] float32 in {other}",
        f"  shards: layers.0.attention.wq.weight is [32, 64] float32 in {first}, [31, 64] float32 in {other}",
        f"  shards: layers.1.feed_forward.w2.weight is [64, 96] float32 in {first}, missing in {other}",
        f"  shards: norm.weight is [64] float32 in {first}, missing in {other}",
        f"  shards: output.weight is [152, 64] float32 in {first}, [152, 64] float16 in {other}",
    ]


@pytest.mark.parametrize("wanted", [1, 4])
def test_folders_are_laid_over_each_other_in_order(wanted: int, tmp_path: Path) -> None:
    base, later = state(), state(seed=1)
    some = {name: later[name] for name in ("layers.1.attention.wo.weight", "output.weight", "norm.weight")}
    diff = {name: tensor.bfloat16() for name, tensor in state(seed=2).items() if "layers.0" in name}
    layouts = [
        inspect(write_meta(tmp_path / "base", {name: tensor.bfloat16() for name, tensor in base.items()}, 2)),
        inspect(write_consolidated(tmp_path / "some", some, 4, config=None)),
        inspect(write_consolidated(tmp_path / "diff", diff, 1, kind="model-diff")),
    ]
    assert [layout.format for layout in layouts] == ["meta_ori", "consolidated", "consolidated_diff"]
    expected = {name: tensor.bfloat16() for name, tensor in base.items()} | some
    for name, tensor in diff.items():
        expected[name] = (expected[name].float() + tensor.float()).bfloat16()
    for rank in range(wanted):
        weights = read_weights(layouts, rank, wanted)
        check_tensors(weights, shapes_of(GROUPED), "all")
        assert same_bits(values_of(weights), shard(expected, rank, wanted))


def test_a_diff_of_another_model_is_listed(tmp_path: Path) -> None:
    base = inspect(write_meta(tmp_path / "base", state()))
    tensors = {"norm.weight": torch.ones(32), "extra.weight": torch.ones(2)}
    diff = inspect(write_consolidated(tmp_path / "diff", tensors, kind="model-diff"))
    with pytest.raises(UserError) as error:
        check_tensors(read_weights([base, diff]), shapes_of(GROUPED), "both")
    assert f"shape: norm.weight is [32] in the diff {diff.folder}, [64] before it" in error.value.message
    assert "unknown: extra.weight [2] is in the diff" in error.value.message


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = write_huggingface(tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = list(tensors)
    for part, some in enumerate((names[:7], names[6:]), 1):
        named = {"rotary_emb.inv_freq": torch.ones(2), **{name: tensors[name].clone() for name in some}}
        save_file(named, folder / f"model-{part:05d}-of-00002.safetensors")
    with pytest.raises(UserError, match=f"twice: {names[6]} is in model-00001-of-00002.safetensors and in") as refused:
        check_tensors(read_weights([inspect(folder)]), shapes_of(GROUPED), folder)
    assert "inv_freq" not in str(refused.value)


def test_any_width_is_the_widths_in_our_terms(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    values = {"model_type": "llama", "num_hidden_layers": 1, "vocab_size": 10}
    widths = (1, 100, 171, 173, 5632, 11008, 14336, 28672, 100003)
    for dim, heads, some in ((64, 8, widths), (4096, 32, widths), (5120, 40, (13824,)), (8192, 64, widths)):
        for width in some:
            own = {"hidden_size": dim, "num_attention_heads": heads, "intermediate_size": width}
            (tmp_path / "config.json").write_text(json.dumps(values | own))
            config = read_config([inspect(tmp_path)])
            assert config is not None
            assert config.hidden_dim == width
            if (dim, width) in ((4096, 11008), (5120, 13824)):  # Meta's own terms
                assert config == ModelConfig(dim, 1, heads, None, 10, multiple_of=256, norm_eps=1e-6)


def test_a_cut_safetensors_file_is_refused(tmp_path: Path) -> None:
    folder = write_huggingface(tmp_path / "hf")
    content = (folder / "model.safetensors").read_bytes()
    for cut in (0, 5, 100, len(content) - 1):
        (folder / "model.safetensors").write_bytes(content[:cut])
        with pytest.raises(UserError, match=r"cannot read .*model\.safetensors"):
            read_weights([inspect(folder)])
