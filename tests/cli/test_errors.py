"""Whatever is wrong with the input is told before the first step: what, where, and what to type next; exit code 2.

What is typed wrong: test_refusals.py. Runs' folders: test_errors_of_folders.py. Each reader's own tests have all that
can be wrong with a file.
"""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.commands import DRY, QUICKSTART, invoke, refused, run

WEIGHTS = "consolidated.00-of-01.model.pth"


def test_an_error_goes_to_standard_error_without_a_traceback() -> None:
    done = run("finetune", "--recipe", "lma")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "error: unknown recipe 'lma': did you mean 'lima'?",
        "hint: `llama-acc recipes` lists them all",
    ]


def test_debug_shows_the_traceback_too_wherever_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    behind = run("finetune", "--debug", "--recipe", "lma")
    assert (behind.returncode, behind.stdout) == (2, "")
    before = invoke("--debug", "finetune", "--recipe", "lma")
    monkeypatch.setenv("LLAMA_ACC_DEBUG", "1")
    by_variable = invoke("finetune", "--recipe", "lma")
    for said in (behind.stderr, before.stderr, by_variable.stderr):
        assert "Traceback (most recent call last)" in said
        assert "error: unknown recipe 'lma'" in said


@pytest.mark.parametrize(
    ("raised", "exit_code", "said"),
    [
        (ZeroDivisionError("of all things"), 1, "error: ZeroDivisionError: of all things\nhint: this is a fault"),
        (RuntimeError("Could not determine home directory."), 1, "hint: set LLAMA_ACC_HOME to a folder"),
        (OSError(errno.EIO, "Input/output error", "x.yaml"), 1, "error: x.yaml: Input/output error\nhint: add --debug"),
        (OSError(errno.ELOOP, "Too many levels", "x.yaml"), 2, "hint: links there lead in a circle"),
    ],
)
def test_what_nobody_foresaw_is_one_message(
    raised: Exception, exit_code: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str) -> Path:
        raise raised

    monkeypatch.setattr("llama_acc.core.recipe.find_recipe", broken)
    result = invoke("recipes", "show", "lima")
    assert (result.exit_code, result.stdout) == (exit_code, "")
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_ctrl_c_during_an_import_is_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """C++ extensions turn it into an ImportError."""

    def interrupted(name: str) -> Path:
        raise ImportError("initialization failed") from KeyboardInterrupt()

    monkeypatch.setattr("llama_acc.core.recipe.find_recipe", interrupted)
    result = invoke("recipes", "show", "lima")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "stopped by Ctrl-C\n")


# Recipes


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
        "train.batch_size: should be greater than or equal to 1, not 0",
        output=output,
    )
    assert not output.exists()


def test_all_overrides_that_are_none_are_listed() -> None:
    refused(
        invoke("finetune", "--recipe", "lima", "train.epochs", "train.seed={", "data.sources.7.path=x"),
        "'train.epochs': an override is written key=value, such as train.epochs=1",
        "'train.seed={': cannot read the value: it is not YAML",
        "'data.sources.7.path=x': there is no key 'data.sources.7.path'",
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a: [", "cannot read"),
        (b"%PDF-1.4\n\xff\xfe", "cannot read"),
        (b"[1, 2]", "must be a mapping with keys such as model, data and train"),
        (b"nme: x\n", "unknown key 'nme': did you mean 'name'?"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "my.yaml"
    path.write_bytes(content)
    refused(invoke("finetune", "--recipe", path, "--dry-run"), str(path), said)


# Data


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.json", b"", "empty.json is empty"),
        ("one.json", b'{"instruction": "a",\n"output": "b"}', "but line 1 is not a whole value"),
        ("lines.jsonl", b'{"instruction": "a", "output": "b"}\nx\n', "item 2 (line 2), column 1: not JSON"),
        ("latin.json", b'[{"instruction": "Gr\xf6\xdfe", "output": "c"}]', "latin.json is not UTF-8: byte 20 (line 1)"),
        ("column.csv", b"instruction,answer\na,b\n", "line 1: no column 'output'"),
        ("paper.pdf", b"%PDF-1.4 \xe2\xe3\xcf\xd3", ".pdf is not a kind of data file"),
        ("other.yaml", b"a: 1\n", "it should have one key, META"),
        ("meta.yaml", b"META: [{pth: a, type: text}]", "META entry 1: unknown key 'pth'"),
        ("a.json", b'[{"image": "a.png", "instruction": "a", "output": "b"}]', "this model has no vision encoder"),
    ],
)
def test_data_that_cannot_be_used_is_refused_with_its_place(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    refused(invoke(*QUICKSTART, "--data", path, "--output", tmp_path / "run"), str(path), said, output=tmp_path / "run")


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


def test_lengths_that_leave_nothing_or_do_not_fit_are_refused(single_turn: Path) -> None:
    cut = invoke(*DRY, "--data", single_turn, "data.max_tokens=3")
    refused(cut, "nothing to train on: of 10 items", "raise data.max_")
    refused(invoke(*DRY, "data.max_tokens=1000"), "data.max_tokens (1000) is more than the model's max_seq_len (256)")


def test_no_name_and_no_text_of_a_file_acts_on_the_terminal(tmp_path: Path) -> None:
    acts = "\x1b[31m\x9b5n\u202e"
    rows = [
        {"instruction": acts, "output": acts, acts: 1},
        {"instruction": "a", "output": ""},
        {"conversations": [{"from": acts, "value": acts}]},
        {"instruction": 1, "output": acts},
    ]
    table = f'instruction\toutput\n"{acts}\t{acts}\tc\nd"\tf\n'
    for name, content in (
        ("a.json", json.dumps(rows)),
        ("b.json", json.dumps(rows[:2])),
        ("c.json", "{"),
        ("d.tsv", table),
    ):
        path = tmp_path / f"{acts}{name}"
        path.write_text(content)
        for words in (
            ["convert-data", "check", path, "--preview", "1", "--all"],
            ["convert-data", "auto", path, "--preview", "2"],
            ["convert-data", "auto", path, "--output", tmp_path / f"{acts}{name}l"],
            *([[*DRY, "--data", path, "--output", tmp_path / acts], [*DRY, f"data.{acts}=1"]] if "b." in name else []),
        ):
            told = invoke(*words).output
            assert told
            assert not set(told) & set("\x1b\x9b\u202e"), (words, told)
    warned = run("convert-data", "check", path).stderr
    assert "holds tabs and line ends" in warned
    assert not set(warned) & set("\x1b\x9b\u202e")


# Checkpoints


def on_base(base: Path, *more: object) -> Any:
    output = base.parent.parent / "run"
    return invoke("finetune", "--recipe", "quickstart", "--pretrained", base, "--output", output, *more)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda base: (base / WEIGHTS).unlink(), ["holds no LLaMA checkpoint", "it holds config.json"]),
        (lambda base: os.truncate(base / WEIGHTS, 1000), ["cannot read", WEIGHTS, "copy it again"]),
        (
            lambda base: torch.save({"model": Path("x")}, base / WEIGHTS),
            [f"{WEIGHTS} is refused: it holds Python code besides tensors"],
        ),
        (
            lambda base: (base / "config.json").write_text('{"dim": 32, "n_layer": 2, "n_heads": 3.5}'),
            ["unknown key 'n_layer'", "did you mean 'n_layers'", "missing key 'n_layers'", "n_heads: should be"],
        ),
        (lambda base: (base / "tokenizer.model").unlink(), ["there is no tokenizer in", "--tokenizer FILE"]),
        (lambda base: (base / "tokenizer.model").write_bytes(b"no"), ["tokenizer.model", "is not a SentencePiece"]),
    ],
    ids=["none", "cut", "code", "shape", "no tokenizer", "broken tokenizer"],
)
def test_a_checkpoint_that_cannot_be_used_is_refused(
    base: Path, damage: Callable[[Path], object], said: list[str]
) -> None:
    damage(base)
    refused(on_base(base), str(base), *said, output=base.parent.parent / "run")


def test_a_tokenizer_that_does_not_fit_is_named(talker: Path, trained_once: Path, tmp_path: Path) -> None:
    tokenizer = trained_once / "epoch0" / "tokenizer.model"
    command = ("finetune", "--recipe", "quickstart", "--output", tmp_path / "run", "--pretrained", talker)
    said = f"tokenizer and model do not fit: {tokenizer} has 640 pieces, the model's vocabulary is 300"
    refused(invoke(*command, "--tokenizer", tokenizer), said, "--tokenizer FILE", output=tmp_path / "run")


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
    refused(invoke("chat", "--ckpt", base, "--prompt", "hi", "--verify"), "epoch0 has no manifest.json", "--verify")


def test_chat_refuses_a_folder_without_a_model(tmp_path: Path, trained: Path) -> None:
    file = trained / "epoch0" / "config.json"
    for folder, *said in (
        (tmp_path / "no", f"there is no checkpoint folder {tmp_path / 'no'}"),
        (trained / "tensorboard", "holds no LLaMA checkpoint"),
        (file, f"{file} is a file: give the folder that holds it"),
        (trained.parent, "holds no LLaMA checkpoint"),
    ):
        refused(invoke("chat", "--ckpt", folder), *said)
    (trained / "latest").write_text("epoch7\n")
    refused(invoke("chat", "--ckpt", trained), f"{trained / 'latest'} names 'epoch7', which is not a checkpoint")
