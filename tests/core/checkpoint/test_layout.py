import json
from pathlib import Path

import pytest

from llama_acc.core.checkpoint.layout import inspect, latest_checkpoint, locate, read_config
from llama_acc.core.errors import UserError

PARAMS = {"dim": 64, "n_layers": 2, "n_heads": 4}


def folder_with(folder: Path, *files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in files:
        (folder / name).write_text(json.dumps(PARAMS) if name.endswith(".json") else "")
    return folder


@pytest.mark.parametrize("name", ["consolidated.{:02d}.pth", "consolidated.{:02d}-of-08.model.pth"])
def test_shards_come_in_model_parallel_order(name: str, tmp_path: Path) -> None:
    layout = inspect(folder_with(tmp_path, *(name.format(part) for part in (3, 0, 7, 1, 6, 2, 5, 4))))
    assert [path.name for path in layout.shards] == [name.format(part) for part in range(8)]
    assert layout.params_path is None


def test_files_of_a_training_state_are_no_shards(tmp_path: Path) -> None:
    folder_with(
        tmp_path,
        *("consolidated.00-of-01.model.pth", "consolidated.00-of-01.optimizer.pth", "consolidated.00-of-01.other.pth"),
        *("rank-specific-00000-of-00008.pth", "consolidated.00.pth.part", "checklist.chk"),
    )
    assert [path.name for path in inspect(tmp_path).shards] == ["consolidated.00-of-01.model.pth"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["consolidated.00.pth", "consolidated.02.pth"], r"shards are missing in .*: consolidated\.01\.pth"),
        (
            ["consolidated.01-of-04.model.pth", "consolidated.02-of-04.model.pth"],
            r"missing in .*: consolidated\.00-of-04\.model\.pth, consolidated\.03-of-04\.model\.pth",
        ),
        (
            ["consolidated.00.pth", "consolidated.00-of-01.model.pth"],
            r"mixes checkpoint formats:\n  consolidated: consolidated\.00-of-01\.model\.pth\n  meta_ori: .*\.00\.pth",
        ),
        (
            ["consolidated.00-of-01.model.pth", "consolidated.00-of-02.model.pth"],
            r"two savings: consolidated\.00-of-01\.model\.pth, consolidated\.00-of-02\.model\.pth",
        ),
        (
            ["consolidated.00-of-02.model-diff.pth"],
            r"shards are missing in .*: consolidated\.01-of-02\.model-diff\.pth",
        ),
        (["model.safetensors"], r"holds model\.safetensors but no config\.json"),
        (
            ["model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors", "config.json"],
            r"shards are missing in .*: model-00002-of-00003\.safetensors\n",
        ),
        (
            ["model.safetensors", "model-00001-of-00001.safetensors", "config.json"],
            r"holds model files of two savings: model-00001-of-00001\.safetensors, model\.safetensors",
        ),
        (["model.safetensors", "consolidated.00.pth", "config.json"], "mixes checkpoint formats"),
        (["pytorch_model.bin"], r"holds pytorch_model\.bin but no config\.json"),
        (["pytorch_model-00001-of-00002.bin", "config.json"], r"missing in .*: pytorch_model-00002-of-00002\.bin"),
        (["model.safetensors.index.json", "config.json"], r'must hold \{"weight_map": \{TENSOR: FILE'),
        (["adapter_config.json"], r"an adapter of PEFT without its weights: adapter_model\.safetensors or"),
        (["notes.txt", "thesis.tex"], r"holds no LLaMA checkpoint\nit holds notes\.txt, thesis\.tex"),
        ([str(i) for i in range(10)], r"it holds 0, 1, 2, 3, 4, 5, 6, 7 \.\.\."),
        ([], r"holds no LLaMA checkpoint\nit is empty"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_what_is_no_whole_checkpoint_is_refused(files: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        inspect(folder_with(tmp_path, *files))


def test_what_is_meant_is_looked_for_and_what_is_nowhere_is_refused(llama_acc_home: Path, tmp_path: Path) -> None:
    folder_with(tmp_path / "7B", "consolidated.00.pth")
    folder_with(tmp_path / "notes", "a.txt")
    with pytest.raises(UserError, match=r"did you mean .*7B\?$"):
        inspect(tmp_path)
    with pytest.raises(UserError, match="is a file: give the folder that holds it"):
        locate(str(tmp_path / "7B" / "consolidated.00.pth"))
    with pytest.raises(UserError, match=r"there is no checkpoint folder llama2-8b, and no downloaded") as refused:
        locate("llama2-8b")
    assert str(llama_acc_home / "models") in refused.value.message


def test_a_runs_folder_is_its_latest_checkpoint(tmp_path: Path) -> None:
    for name in ("epoch0", "epoch1", "epoch10"):
        folder_with(tmp_path / name, "consolidated.00-of-01.model.pth")
    assert latest_checkpoint(tmp_path) is None
    (tmp_path / "latest").write_text("epoch1\n")
    assert latest_checkpoint(tmp_path) == locate(str(tmp_path)) == tmp_path / "epoch1"
    assert locate(str(tmp_path / "epoch0")) == tmp_path / "epoch0"


@pytest.mark.parametrize("name", ["epoch9", "", "../elsewhere", "/tmp", ".."])
def test_a_pointer_to_anything_but_a_checkpoint_of_the_run_is_refused(name: str, tmp_path: Path) -> None:
    run = folder_with(tmp_path / "run", "file")
    folder_with(tmp_path / "elsewhere")
    (run / "latest").write_text(name)
    with pytest.raises(UserError, match="which is not a checkpoint in"):
        locate(str(run))


def test_a_name_is_looked_up_among_the_downloads(
    llama_acc_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    downloaded = folder_with(llama_acc_home / "models" / "llama2-7b", "consolidated.00.pth")
    assert locate("llama2-7b") == downloaded
    here = folder_with(tmp_path / "llama2-7b", "consolidated.00.pth")
    assert locate("llama2-7b").absolute() == here


def test_the_shape_is_the_union_of_what_the_checkpoints_say(tmp_path: Path) -> None:
    first = folder_with(tmp_path / "first", "consolidated.00.pth", "params.json")
    second = folder_with(tmp_path / "second", "consolidated.00-of-01.model.pth")
    silent = [inspect(second)]
    assert read_config(silent) is None
    (second / "config.json").write_text('{"n_layers": 5, "rope_theta": 1e6}')
    config = read_config([inspect(first), inspect(second)])
    assert config is not None
    assert (config.dim, config.n_layers, config.rope_theta) == (64, 5, 1e6)


def test_another_kind_of_model_is_refused_by_name(tmp_path: Path) -> None:
    folder_with(tmp_path, "consolidated.00-of-01.model.pth", "config.json")
    (tmp_path / "meta.json").write_text('{"llama_type": "llama_ens"}')
    with pytest.raises(UserError, match="it is a checkpoint of kind 'llama_ens'"):
        read_config([inspect(tmp_path)])
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot read .*meta\.json"):
        read_config([inspect(tmp_path)])
