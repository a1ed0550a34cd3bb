"""Whatever is wrong with the input is told before the first step: what, where, and what to type next; exit code 2."""

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.cli.commands import QUICKSTART, TINY, invoke, refused, run, words

DRY = (*QUICKSTART, "--dry-run")


# Flags and commands


def test_an_error_goes_to_standard_error_without_a_traceback() -> None:
    done = run("finetune", "--recipe", "lma")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "error: unknown recipe 'lma': did you mean 'lima'?",
        "hint: `llama-acc recipes` lists them all",
    ]


@pytest.mark.parametrize("arguments", [["--debug", "finetune"], ["finetune", "--debug"]])
def test_debug_shows_the_traceback_too_wherever_it_stands(arguments: list[str]) -> None:
    done = run(*arguments, "--recipe", "lma")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback (most recent call last)" in done.stderr
    assert "error: unknown recipe 'lma'" in done.stderr


def test_the_environment_can_ask_for_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_ACC_DEBUG", "1")
    result = invoke("finetune", "--recipe", "lma")
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr


def test_a_fault_of_the_program_is_one_line_and_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Path:
        raise ZeroDivisionError("of all things")

    monkeypatch.setattr("llama_acc.core.recipe.find_recipe", broken)
    result = invoke("recipes", "show", "lima")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "error: ZeroDivisionError: of all things" in result.stderr
    assert "--debug" in result.stderr
    assert "Traceback" not in result.stderr


def test_ctrl_c_during_an_import_is_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """C++ extensions turn it into an ImportError."""

    def interrupted(name: str) -> Path:
        raise ImportError("initialization failed") from KeyboardInterrupt()

    monkeypatch.setattr("llama_acc.core.recipe.find_recipe", interrupted)
    result = invoke("recipes", "show", "lima")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "stopped by Ctrl-C\n")


def test_a_user_without_a_home_folder_is_told_what_to_set(talker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("LLAMA_ACC_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    result = invoke("chat", "--ckpt", "no-such-model")
    assert result.exit_code == 1
    assert "this user has no home folder" in result.stderr
    assert "set LLAMA_ACC_HOME" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["finetun"], "No such command 'finetun'. Did you mean 'finetune'?"),
        (["recipes", "lst"], "No such command 'lst'. Did you mean 'list'?"),
        (["finetune", "--pretraind", "x"], "--pretrained"),
        (["chat"], "Missing option '--ckpt'"),
        (["chat", "--ckpt", "x", "--temperature", "hot"], "Invalid value for '--temperature'"),
        (["chat", "--ckpt", "x", "--max-new-tokens", "1.5"], "Invalid value for '--max-new-tokens'"),
        (["chat", "--ckpt", "x", "--device", "gpu"], "'gpu' is not one of: cuda, cuda:1 (another GPU), mps, cpu."),
        (["finetune", "--device", "meta"], "'meta' is not one of: cuda, cuda:1 (another GPU), mps, cpu."),
        (["finetune", "--data", ""], "Invalid value for '--data': it is empty. Is a shell variable not set?"),
        (["finetune", "--output", ""], "it is empty. Is a shell variable not set?"),
        (["finetune", "--pretrained", "x", "--pretrained", ""], "Invalid value for '--pretrained': it is empty."),
        (["chat", "--ckpt", ""], "Invalid value for '--ckpt': it is empty."),
        (["recipes", "copy", "lima"], "Missing argument 'file'"),
    ],
)
def test_a_wrong_flag_is_named_with_the_nearest_one(arguments: list[str], said: str) -> None:
    result = invoke(*arguments)
    refused(result, "-h' for help.")
    assert said.lower() in words(result.stderr).lower()


# Recipes


def test_a_missing_recipe_is_asked_for() -> None:
    refused(invoke("finetune"), "which recipe? --recipe is missing", "begin with --recipe quickstart")


def test_a_missing_recipe_file_is_named() -> None:
    refused(
        invoke("finetune", "--recipe", "my/lima.yaml"), "recipe file my/lima.yaml does not exist", "llama-acc recipes"
    )


def test_all_wrong_keys_and_values_are_listed(tmp_path: Path) -> None:
    output = tmp_path / "run"
    wrong = ["train.epohs=3", "lr=1", "train.precision=fp16", "optimizer.betas=[0.9]", "train.batch_size=0"]
    refused(
        invoke("finetune", "--recipe", "lima", "--output", output, *wrong),
        "recipe lima is not valid:",
        "unknown key 'train.epohs': did you mean 'train.epochs'",
        "unknown key 'lr': did you mean 'optimizer.lr'?",
        "train.precision: should be 'bf16' or 'fp32', not 'fp16'",
        "optimizer.betas",
        "train.batch_size: should be at least 1, not 0",
        output=output,
    )
    assert not output.exists()


def test_all_overrides_that_are_none_are_listed() -> None:
    refused(
        invoke("finetune", "--recipe", "lima", "train.epochs", "train.seed={", "data.sources.7.path=x"),
        "'train.epochs': an override is written key=value, such as train.epochs=1",
        "'train.seed={': the value is not YAML",
        "'data.sources.7.path=x': there is no key 'data.sources.7.path'",
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a: [", "cannot read recipe"),
        (b"%PDF-1.4\n\xff\xfe", "cannot read recipe"),
        (b"[1, 2]", "must be a mapping with keys such as model, data and train"),
        (b"nme: x\n", "unknown key 'nme': did you mean 'name'?"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "my.yaml"
    path.write_bytes(content)
    refused(invoke("finetune", "--recipe", path, "--dry-run"), str(path), said)


# Data


def test_missing_data_is_named_with_the_nearest_file(tmp_path: Path, single_turn: Path) -> None:
    shutil.copy(single_turn, tmp_path / "towns.json")
    wanted = tmp_path / "town.json"
    refused(
        invoke(*QUICKSTART, "--data", wanted, "--output", tmp_path / "run"),
        f"there is no data '{wanted}'",
        "did you mean 'towns.json'?",
        output=tmp_path / "run",
    )


def test_data_named_in_a_recipe_says_how_to_give_it(tokenizer_path: Path) -> None:
    refused(
        invoke(
            "finetune", "--recipe", "lima", TINY, "--tokenizer", tokenizer_path, "model.max_seq_len=4096", "--dry-run"
        ),
        "there is no data 'lima'; looked for:",
        "--data FILE",
    )


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.json", b"", "empty.json is empty"),
        ("blank.jsonl", b"\n \n", "blank.jsonl is empty"),
        ("none.json", b"[]", "none.json holds no items"),
        ("one.json", b'{"instruction": "a", "output": "b"}', "should hold an array of items, but holds an object"),
        ("broken.json", b'[{"instruction": "a", }]', "broken.json is not JSON: line 1, column 2"),
        (
            "lines.jsonl",
            b'{"instruction": "a", "output": "b"}\nx\n',
            "lines.jsonl: item 2 (line 2), column 1: not JSON",
        ),
        ("nul.json", b'[{"instruction": "a\x00b", "output": "c"}]', "nul.json is not JSON: line 1, column 20"),
        ("latin.json", b'[{"instruction": "Gr\xf6\xdfe", "output": "c"}]', "latin.json is not UTF-8: byte 20 (line 1)"),
        ("utf16.json", "[]".encode("utf-16"), "utf16.json is not UTF-8"),
        ("deep.json", b"[" * 100_000, "deep.json is not JSON that can be read"),
        ("column.csv", b"instruction,answer\na,b\n", "line 1: no column 'output'"),
        ("cells.csv", b"instruction,output\na,b,c\n", "item 1 (line 2): 3 cells, but the header has 2"),
        ("paper.pdf", b"%PDF-1.4 \xe2\xe3\xcf\xd3", ".pdf is not a kind of data file"),
        ("notes", b"hello", "no suffix is not a kind of data file"),
        ("other.yaml", b"a: 1\n", "it should have one key, META"),
        ("meta.yaml", b"META: [{pth: a, type: text}]", "META entry 1: unknown key 'pth'"),
        (
            "image.json",
            b'[{"image": "a.png", "instruction": "a", "output": "b"}]',
            "the items have images, and the model sees nothing",
        ),
    ],
)
def test_data_that_cannot_be_used_is_refused_with_its_place(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    refused(invoke(*QUICKSTART, "--data", path, "--output", tmp_path / "run"), str(path), said, output=tmp_path / "run")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no file that nobody can read")
def test_data_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "locked.json"
    path.symlink_to("/proc/self/mem")
    refused(invoke(*DRY, "--data", path), f"cannot read {path}: Input/output error")


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    refused(invoke(*DRY, "--data", tmp_path), f"no data files in {tmp_path}", ".json, .jsonl, .csv")


def test_every_wrong_item_of_every_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(
        json.dumps([{"instruction": "a", "output": "b"}, {"instruction": "a"}, {"instruction": 3, "output": None}, "x"])
    )
    (tmp_path / "b.jsonl").write_text('{"instruction": "a", "output": "\\ud800"}\n')
    refused(
        invoke(*QUICKSTART, "--data", tmp_path, "--output", tmp_path / "run"),
        "5 problems in the data:",
        "a.json: item 2: no 'output' (its keys: 'instruction')",
        "a.json: item 3: 'instruction' should be text, but is a number",
        "a.json: item 3: 'output' is null",
        "a.json: item 4: should be an object, but is text",
        "b.jsonl: item 1 (line 1): 'output' has a lone surrogate (U+D800) at character 1",
        output=tmp_path / "run",
    )


def test_every_wrong_turn_of_a_dialogue_is_named(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "robot", "value": "b"}, {"from": "gpt"}, 3]
    path = tmp_path / "chats.json"
    path.write_text(json.dumps([{"conversations": turns}, {"conversations": []}]))
    refused(
        invoke(*DRY, "data.sources.0.format=dialogue", "data.sources.0.template=dialogue", "--data", path),
        "item 1: turn 2: unknown role 'robot' in 'from': it is one of human,",
        "item 1: turn 3: no 'value' (its keys: 'from')",
        "item 1: turn 4: should be an object with 'from' and 'value', but is a number",
        "item 2: 'conversations' should be a list of turns",
    )


def test_nothing_to_train_on_is_refused(single_turn: Path) -> None:
    refused(
        invoke(*DRY, "--data", single_turn, "data.max_tokens=3"), "nothing to train on: of 10 items", "raise data.max_"
    )


def test_examples_longer_than_the_context_are_refused() -> None:
    refused(invoke(*DRY, "data.max_tokens=1000"), "data.max_tokens (1000) is more than the model's max_seq_len (256)")


# Checkpoints and tokenizers


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
        (_mix_sizes, ["mixes shards of model-parallel sizes 1, 2"]),
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


# The output folder


def test_a_folder_in_use_by_another_run_is_refused(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        refused(
            invoke(*QUICKSTART, "--output", tmp_path),
            f"{tmp_path} is in use by another run",
            "choose another --output",
            output=tmp_path,
        )
    finally:
        os.close(descriptor)


def test_a_folder_that_holds_something_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for dry_run in ([], ["--dry-run"]):
        refused(
            invoke(*QUICKSTART, "--output", tmp_path, *dry_run),
            f"{tmp_path} is not empty: it holds thesis.tex",
            "choose another --output, or continue the run in it with --resume",
        )
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_as_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file" / "run"):
        refused(invoke(*QUICKSTART, "--output", output), f"cannot use {output} as output folder", "another --output")


@pytest.mark.parametrize("name", ["../elsewhere", "/tmp/elsewhere", "..", '""'])
def test_a_recipes_name_never_leads_out_of_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(invoke(*QUICKSTART, f"name={name}"), "is no name for a folder", "give --output DIR")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    refused(invoke(*QUICKSTART, "--output", tmp_path), f"cannot write into {tmp_path}")
    refused(invoke(*QUICKSTART, "--output", tmp_path / "run"), f"cannot use {tmp_path / 'run'} as output folder")


def test_too_little_disk_is_told_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Disk(NamedTuple):
        total: int
        used: int
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(1 << 30, 0, 1 << 20))
    for dry_run in ([], ["--dry-run"]):
        refused(
            invoke(*QUICKSTART, "--output", tmp_path, *dry_run),
            "too little disk for the checkpoints:",
            f"1.0 MiB are free at {tmp_path}",
            "lower checkpoint.keep",
            output=tmp_path,
        )


# --resume


def test_resume_without_a_checkpoint_starts_at_step_0_and_says_so(tmp_path: Path) -> None:
    result = invoke(*QUICKSTART, "--output", tmp_path / "run", "--resume", "train.epochs=1")
    assert result.exit_code == 0
    assert "no whole checkpoint" in result.stderr
    assert "starting at step 0" in result.stderr
    assert (tmp_path / "run" / "latest").read_text() == "epoch0\n"


def test_resume_lists_every_key_that_was_changed(trained: Path) -> None:
    before = (trained / "metrics.jsonl").read_bytes()
    changed = ["optimizer.lr=0.1", "train.global_batch_size=4", "data.sources.0.ratio=0.5", "train.seed=1"]
    result = invoke(*QUICKSTART, "--output", trained, "--resume", "train.epochs=9", *changed)
    refused(
        result,
        f"the recipe is not the one {trained / 'epoch0'} was trained with:",
        "optimizer.lr: 0.002 before, 0.1 now",
        "train.global_batch_size: 8 before, 4 now",
        "data.sources.0.ratio: 1.0 before, 0.5 now",
        "train.seed: 0 before, 1 now",
        "leave out --recipe",
    )
    assert "epochs" not in result.stderr.partition("hint:")[0]
    assert (trained / "metrics.jsonl").read_bytes() == before


def test_a_run_can_be_made_longer(trained: Path) -> None:
    result = invoke(
        "finetune", "--output", trained, "--resume", "--device", "cpu", "train.epochs=2", "checkpoint.keep=5"
    )
    assert result.exit_code == 0, result.stderr
    assert "4 of 8 steps done" in result.stderr
    assert (trained / "latest").read_text() == "epoch1\n"


def test_resume_finds_data_that_changed(tmp_path: Path, single_turn: Path) -> None:
    data = tmp_path / "towns.json"
    shutil.copy(single_turn, data)
    one = (*QUICKSTART, "--data", data, "--output", tmp_path / "run")
    assert invoke(*one, "train.epochs=1").exit_code == 0
    data.write_text(json.dumps(json.loads(data.read_text())[1:]))
    refused(invoke(*one, "--resume", "train.epochs=2"), "the data is not what", "resume with the same files")


def test_dry_run_and_resume_exclude_each_other() -> None:
    refused(invoke(*DRY, "--resume"), "--dry-run and --resume cannot be combined")


# chat


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--temperature", "-1"], ["the temperature must be 0 or above, not -1.0", "0 is greedy"]),
        (["--temperature", "nan"], ["the temperature must be 0 or above, not nan"]),
        (["--top-p", "0"], ["top-p must be above 0 and at most 1, not 0.0"]),
        (["--top-p", "1.1"], ["top-p must be above 0 and at most 1, not 1.1"]),
        (["--max-new-tokens", "0"], ["at least 1 new token must be allowed, not 0"]),
        (["--seed", str(2**70)], ["the seed must fit in 64 bits"]),
        (["--template", "dialog"], ["unknown template 'dialog'", "did you mean 'dialogue'?"]),
        (["--system", "be kind"], ["template alpaca has no place for a system text"]),
        (["--prompt", "long " * 1000], ["the model's context is 256", "shorten it"]),
        (["--prompt", "\udcff"], ["the text is not valid Unicode at character 1"]),
        (["--tokenizer", "no.model"], ["there is no tokenizer no.model"]),
    ],
)
def test_chat_refuses_what_it_cannot_do(trained_once: Path, flags: list[str], said: list[str]) -> None:
    refused(invoke("chat", "--ckpt", trained_once, "--prompt", "hi", *flags), *said)


def test_chat_refuses_a_folder_without_a_model(tmp_path: Path, trained_once: Path) -> None:
    refused(invoke("chat", "--ckpt", tmp_path / "no"), f"there is no checkpoint folder {tmp_path / 'no'}")
    refused(invoke("chat", "--ckpt", tmp_path), f"{tmp_path} holds no LLaMA checkpoint", "it is empty")
    file = trained_once / "epoch0" / "config.json"
    refused(invoke("chat", "--ckpt", file), f"{file} is a file: give the folder that holds it")
    refused(invoke("chat", "--ckpt", trained_once.parent), "holds no LLaMA checkpoint")


def test_chat_says_which_file_of_a_run_is_wrong(trained: Path) -> None:
    (trained / "latest").write_text("epoch7\n")
    refused(invoke("chat", "--ckpt", trained), f"{trained / 'latest'} names 'epoch7', which is not a checkpoint")
