"""Whatever is wrong with the input is told before the first step: what, where, and what to type next; exit code 2.

What is typed wrong: test_refusals.py. Each reader's own tests have all that can be wrong with a file.
"""

import errno
import fcntl
import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.commands import DRY, QUICKSTART, complete, invoke, refused, run

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
            *(
                [[*DRY, "--no-timing", "--data", path, "--output", tmp_path / acts], [*DRY, f"data.{acts}=1"]]
                if "b." in name
                else []
            ),
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


def test_a_checkpoint_without_a_tokenizer_is_refused(base: Path) -> None:
    (base / "tokenizer.model").unlink()
    refused(on_base(base), "there is no tokenizer in", "--tokenizer FILE", output=base.parent.parent / "run")


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


# A run's folder is refused where it is another's, and resumed only as the run that it holds


def test_a_folder_in_use_by_another_run_is_refused(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        result = invoke(*QUICKSTART, "--output", tmp_path)
        refused(result, f"{tmp_path} is in use by another run", "choose another --output", output=tmp_path)
    finally:
        os.close(descriptor)


def test_what_is_no_empty_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    thesis = tmp_path / "thesis.tex"
    thesis.write_text("years of work")
    holds = f"{tmp_path} is not empty: it holds thesis.tex"
    for dry_run in ([], ["--dry-run"]):
        again = "choose another --output, or continue the run in it with --resume"
        refused(invoke(*QUICKSTART, "--output", tmp_path, *dry_run), holds, again)
    for output in (thesis, thesis / "run"):
        refused(invoke(*QUICKSTART, "--output", output), f"cannot use {output} as output folder", "another --output")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    refused(invoke(*QUICKSTART, "--output", tmp_path), f"cannot write into {tmp_path}")
    refused(invoke(*QUICKSTART, "--output", tmp_path / "run"), f"cannot use {tmp_path / 'run'} as output folder")


# --resume


def test_resume_where_nothing_was_trained_says_so(tmp_path: Path) -> None:
    refused(invoke("finetune", "--output", tmp_path, "--resume"), f"no run to resume in {tmp_path}", "recipe.yaml")


def test_resume_without_a_checkpoint_starts_at_step_0_and_says_so(tmp_path: Path) -> None:
    result = complete(*QUICKSTART, "--output", tmp_path / "run", "--resume", "train.epochs=1")
    assert "no whole checkpoint" in result.stderr
    assert "starting at step 0" in result.stderr
    assert (tmp_path / "run" / "latest").read_text() == "epoch0\n"


def test_resume_lists_every_key_that_was_changed_and_a_run_can_be_made_longer(trained: Path) -> None:
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
    longer = ("train.epochs=2", "checkpoint.keep=5")
    result = complete("finetune", "--output", trained, "--resume", "--device", "cpu", *longer)
    assert "4 of 8 steps done" in result.stderr
    assert (trained / "latest").read_text() == "epoch1\n"


@pytest.mark.parametrize(
    ("at", "hint"),
    [
        ("llama_acc.core.train.loop.Loop.run", "hint: resume with: {again}"),
        ("llama_acc.core.train.trainer.Trainer.probe_peak_memory", "hint: nothing was written: type the same command"),
    ],
)
def test_a_run_that_finds_no_room_names_the_command_that_goes_on(
    at: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    output = tmp_path / "a run"
    with monkeypatch.context() as patch:
        patch.setattr(at, full)
        result = invoke(*QUICKSTART, "--output", output, "--force", "train.max_steps=1", "train.warmup_epochs=0")
    assert result.exit_code == 1
    assert "error: the disk is full: free some space; the last checkpoint before this is whole" in result.stderr
    again = ("finetune", "--output", output, "--resume", "--device", "cpu", "--force")
    assert hint.format(again="llama-acc " + shlex.join(map(str, again))) in result.stderr
    if output.exists():
        assert invoke(*again).exit_code == 0
