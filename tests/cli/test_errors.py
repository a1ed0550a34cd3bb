"""Whatever is wrong with the input is told before the first step: what, where, and what to type next; exit code 2.

Of data, checkpoints and runs' folders: test_errors_of_data.py, test_errors_of_checkpoints.py,
test_errors_of_folders.py.
"""

import errno
from pathlib import Path

import pytest

from tests.cli.commands import DRY, invoke, refused, run, words

LONG = "n" * 256  # bytes in a file's name; file systems take 255

# Flags and commands


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
        (
            ZeroDivisionError("of all things"),
            1,
            "error: ZeroDivisionError: of all things\nhint: this is a fault",
        ),
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
    missing = "recipe file my/lima.yaml does not exist"
    refused(invoke("finetune", "--recipe", "my/lima.yaml"), missing, "llama-acc recipes")


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
        (["--prompt", "long " * 1000], ["the model's context is 256", "--context N"]),
        (["--prompt", "long " * 1000, "--context", "300"], ["the model's context is 300"]),
        (["--prompt", "\udcff"], ["the text is not valid Unicode at character 1"]),
        (["--tokenizer", "no.model"], ["cannot read no.model: No such file"]),
    ],
)
def test_chat_refuses_what_it_cannot_do(trained_once: Path, flags: list[str], said: list[str]) -> None:
    refused(invoke("chat", "--ckpt", trained_once, "--prompt", "hi", *flags), *said)


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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["finetune", "--recipe", LONG], "give a shorter one"),
        ([*DRY, "--data", LONG], "give a shorter one"),
        ([*DRY, "--output", LONG], "give a shorter one"),
        ([*DRY, "--output", "file/run"], "Not a directory"),
        ([*DRY, "model.params=" + LONG], "File name too long"),
        (["chat", "--ckpt", LONG, "--prompt", "x"], "give a shorter one"),
        (["convert-checkpoint", LONG, "new", "--to", "hf"], "give a shorter one"),
        (["convert-data", "check", LONG], "give a shorter one"),
        (["convert-data", "check", "file/a.json"], "there is no data 'file/a.json'"),
        (["benchmark-vram", "--model", LONG], "give a shorter one"),
        (
            ["convert-data", "alpaca", "file", "--preview", "9" * 20],
            "'--preview': 99999999999999999999 is beyond",
        ),
        (["benchmark-vram", "--gpus", "9" * 20], "Invalid value for '--gpus'"),
        ([*DRY, "train.epochs=1e300"], "train.epochs: should be less than or equal to 1000000, not 1e+300"),
        ([*DRY, "train.max_steps=" + "9" * 30], "train.max_steps: should be less than or equal to 1000000000"),
        ([*DRY, "train.seed=" + "9" * 5000], "cannot read the value: "),
        ([*DRY, "train.seed=" + "[" * 3000], "cannot read the value: "),
        (
            ["finetune", "--recipe", "deep.yaml"],
            "cannot read deep.yaml: lists or mappings are nested more than 100 deep",
        ),
        (["chat", "--ckpt", "deep", "--prompt", "x"], "nested more than 100 deep"),
        (["download", "http://[::1/a"], "is not an address: Invalid IPv6 URL"),
        (["download", "http://a:99999999/a"], "is not an address: Port out of range"),
        (["download", f"http://{LONG}/a"], "is not an address: "),
        (["download", "http://a b/c"], "names no host"),
        (["download", f"hf:a/{LONG[:100]}"], "cannot be a repository's name"),
    ],
)
def test_what_nothing_can_be_called_and_no_run_can_be_is_the_users_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    nested = "[" * 3000 + "]" * 3000
    (tmp_path / "file").write_text("x")
    (tmp_path / "deep.yaml").write_text(f"name: {nested}")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "params.json").write_text(nested)
    (tmp_path / "deep" / "consolidated.00.pth").write_text("")
    refused(invoke(*words), said)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["finetune", "--recipe", "quickstart", "data.sources.0.template=alpacca"], "did you mean 'alpaca'?"),
        (["finetune", "--recipe", "quickstart", "--data", "nowhere.json"], "there is no data 'nowhere.json'"),
        (["chat", "--ckpt", "somewhere", "--template", "alpacca"], "did you mean 'alpaca'?"),
    ],
)
def test_a_wrong_name_is_reported_before_anything_is_loaded(words: list[str], said: str) -> None:
    refused(invoke(*words), said)
