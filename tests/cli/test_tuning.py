"""Training a part of a model and using it, as it is typed: on a base, on one in four bits, merged."""

from pathlib import Path

import pytest

from llama_acc.core.recipe import RECIPES_FOLDER
from tests.cli.commands import QUICKSTART, complete, invoke, metrics, refused, words
from tests.cli.conftest import ANSWER
from tests.core.data.pictures import write_pictures

PART = ("tuning.method=lora_bias_norm", "tuning.lora_rank=4", "checkpoint.trainable_only=true", "train.epochs=1")
ITEMS = RECIPES_FOLDER / "quickstart" / "instructions.json"
ASK = ("--prompt", "What is LLaMA?", "--temperature", "0", "--max-new-tokens", "8", "--device", "cpu")


def train(base: Path, output: Path) -> list[object]:
    command = [word for word in QUICKSTART if not str(word).startswith("model.params")]
    return [*command, "--pretrained", base, "--output", output]


def tune(base: Path, output: Path, *more: object) -> None:
    result = complete(*train(base, output), *PART, *more)
    assert f"--ckpt {base} --ckpt {output}" in words(result.stdout)


def answer(*checkpoints: Path, quantize: str | None = None) -> str:
    flags = [word for checkpoint in checkpoints for word in ("--ckpt", checkpoint)]
    result = complete("chat", *flags, *ASK, *(("--quantize", quantize) if quantize else ()))
    return result.stdout


@pytest.fixture(scope="module")
def base(trained_once: Path) -> Path:
    """The folder of a checkpoint."""
    return trained_once / (trained_once / "latest").read_text().strip()


@pytest.fixture(scope="module")
def part(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that trained a part on the base in NF4."""
    folder = tmp_path_factory.mktemp("part") / "run"
    tune(base, folder, "tuning.quantize=nf4")
    return folder


def test_the_report_says_what_is_quantized(part: Path) -> None:
    assert "in NF4" in (part / "report.md").read_text()


def test_chat_takes_the_base_and_the_part(base: Path, part: Path) -> None:
    # As it was trained, in NF4, unless the user says otherwise.
    assert answer(base, part, quantize="nf4") == answer(base, part)
    assert answer(base, part, quantize="none").strip()
    refused(invoke("chat", "--ckpt", part, *ASK), "holds only what was trained on top of", str(base))


def test_a_part_on_no_base_on_another_one_or_for_another_method_is_one_clear_line(
    base: Path, part: Path, talker: Path, tmp_path: Path
) -> None:
    checkpoint = part / (part / "latest").read_text().strip()
    finetune = [word for word in QUICKSTART if not str(word).startswith("model.params")]
    ways = {"--ckpt": ("chat", *ASK), "--pretrained": (*finetune, "--output", tmp_path / "run", *PART)}
    alone = f"{checkpoint} holds only what was trained on top of {base} (method lora_bias_norm)"
    for flag, command in ways.items():
        result = invoke(*command, flag, part)
        refused(result, alone, f"give its base first: --ckpt {base} --ckpt {checkpoint} (finetune: --pretrained)")
        assert "missing:" not in result.stderr
        said = f"{checkpoint} was trained on {base}, and {talker} holds other weights"
        refused(invoke(*command, flag, talker, flag, part), said, "give the base it was trained on")
    other = ("--pretrained", base, "--pretrained", part, "tuning.method=adapter", "tuning.lora_rank=null")
    refused(
        invoke(*finetune, "--output", tmp_path / "run", "checkpoint.trainable_only=true", *other),
        "the checkpoint was tuned as (tuning.method=lora_bias_norm tuning.lora_rank=4)",
        "set tuning.method=lora_bias_norm tuning.lora_rank=4",
    )
    assert not (tmp_path / "run").exists()


def test_a_base_quantized_beforehand_is_the_same(base: Path, part: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    complete("convert-checkpoint", base, small, "--to", "consolidated", "--quantize", "nf4")
    assert answer(small, part) == answer(base, part)
    tune(small, tmp_path / "run", "tuning.quantize=nf4")
    for name in ("loss", "grad_norm"):
        assert column(tmp_path / "run", name) == column(part, name)
    command = [word for word in QUICKSTART if not str(word).startswith("model.params")]
    refused(
        invoke(*command, "--pretrained", small, "--output", tmp_path / "full"),
        "is quantized: it can be a base, and not train itself",
    )


def test_matrices_that_are_not_quantized_are_the_same_ones_everywhere(base: Path, part: Path, tmp_path: Path) -> None:
    small, run, other = tmp_path / "small", tmp_path / "run", tmp_path / "other"
    flags = ("--to", "consolidated", "--quantize", "nf4", "--quantize-skip", "wv", "--quantize-skip", "layers.0")
    assert invoke("convert-checkpoint", base, small, *flags).exit_code == 0
    skip = "tuning.quantize_skip=[wv,layers.0]"
    refused(
        invoke(*train(small, run), "tuning.quantize=nf4", *PART),
        f"in {small} all matrices but wv, layers.0 are quantized, and the recipe says otherwise",
        f"set {skip}",
    )
    tune(small, run, "tuning.quantize=nf4", skip)
    tune(base, other, "tuning.quantize=nf4", skip)
    for name in ("loss", "grad_norm"):
        assert column(run, name) == column(other, name) != column(part, name)
    # What was trained says so, and chat does the same.
    assert answer(small, run) == answer(base, other)
    refused(
        invoke(*train(base, tmp_path / "none"), "tuning.quantize=nf4", "tuning.quantize_skip=[wx]", *PART),
        "there is no matrix 'wx' to be left out of NF4",
    )
    nothing = ("convert-checkpoint", base, tmp_path / "none", "--to", "consolidated", "--quantize-skip", "wv")
    refused(invoke(*nothing), "--quantize-skip", "--quantize nf4")


def column(run: Path, name: str) -> list[float]:
    return [line[name] for line in metrics(run) if name in line]


def test_the_part_is_merged_into_what_it_was_trained_on(base: Path, part: Path, tmp_path: Path) -> None:
    merge = ("--to", "hf", "--merge", "--dtype", "fp32")
    result = complete("convert-checkpoint", part, tmp_path / "merged", *merge, "--base", base)
    assert "logits are off those before merging by" in words(result.stdout)
    assert answer(tmp_path / "merged") == answer(base, part)
    complete("convert-checkpoint", part, tmp_path / "original", *merge, "--base", base, "--merge-into", "original")
    assert answer(tmp_path / "original") == answer(base, part, quantize="none")
    refused(
        invoke("convert-checkpoint", part, tmp_path / "none", *merge),
        "holds only what was trained on top of",
        f"give its base: --base {base}",
    )


def test_a_base_stays_in_its_files_while_it_is_tuned_and_asked(trained_once: Path, seer: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    assert invoke("convert-checkpoint", trained_once, base, "--to", "consolidated", "--quantize", "nf4").exit_code == 0
    keys = (*PART, "tuning.quantize=nf4", "train.activation_checkpointing=true", "train.stream_base=true")
    dry = complete(*train(base, tmp_path / "dry"), *keys, "--dry-run")
    assert "two blocks" in dry.stdout
    assert "floating-point operations" in dry.stdout  # no step of what may be very large is timed
    done = complete(*train(base, tmp_path / "run"), *keys)
    assert words(done.stdout) == f"llama-acc chat --ckpt {base} --ckpt {tmp_path / 'run'} --stream"
    ask = ("chat", "--ckpt", base, "--ckpt", tmp_path / "run", *ASK)
    assert invoke(*ask, "--stream").stdout == invoke(*ask).stdout
    write_pictures(tmp_path, 1)
    see = ("caption", "--ckpt", seer, tmp_path / "0000.png", "--device", "cpu")
    assert (invoke(*see, "--stream").stdout, invoke(*see).stdout) == (f"{ANSWER}\n",) * 2
    for command in (
        (*see, "--quantize", "nf4"),
        ("chat", "--ckpt", trained_once, "--quantize", "nf4", *ASK),
        ("serve", "--ckpt", trained_once, "--quantize", "nf4", "--device", "cpu", "--port", "0"),
        ("evaluate", "perplexity", "--data", ITEMS, "--ckpt", trained_once, "--quantize", "nf4", "--device", "cpu"),
    ):
        refused(invoke(*command, "--stream"), "cannot be streamed from its files", "--to consolidated --quantize nf4")
