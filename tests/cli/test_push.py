"""`llama-acc push` and `finetune --push`: what goes to the hub, what is refused before, what an interruption costs."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
import yaml

from tests.cli.commands import QUICKSTART, complete, invoke, refused, start, wait_until
from tests.hub import READ_TOKEN, TOKEN, Servers


@pytest.fixture(autouse=True)
def hub(servers: Servers, llama_acc_home: Path, monkeypatch: pytest.MonkeyPatch) -> Servers:
    """The hub, a token that may write to it, and no chunk storage, which it has not."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    return servers


def header_of(card: bytes | str) -> dict[str, object]:
    text = card.decode() if isinstance(card, bytes) else card
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert match is not None
    return dict(yaml.safe_load(match[1]))


def test_a_run_is_pushed_as_a_whole_model_that_the_hub_gives_back(hub: Servers, trained: Path, tmp_path: Path) -> None:
    result = invoke("push", trained, "hf:me/towns")
    assert (result.exit_code, result.stdout) == (0, "llama-acc download hf:me/towns\n"), result.stderr
    repo = hub.repos["model", "me/towns"]
    assert repo.private
    assert {"config.json", "model.safetensors", "generation_config.json", "README.md", "loss.png"} <= repo.files.keys()
    assert not {"recipe.yaml", "manifest.json"} & repo.files.keys()
    card = repo.files["README.md"].decode()
    assert header_of(card)["tags"] == ["llama-acc", "full"]
    assert "| instructions.json | 32 | 1,129 | 556 | alpaca |" in card
    assert "### Instruction:\n{instruction}" in card
    assert "lr: 0.002" in card
    assert card.count("e-0") >= 3  # the curve's learning rates
    assert TOKEN not in card + result.stderr
    assert not any(str(place).encode() in content for content in repo.files.values() for place in (trained, tmp_path))
    complete("download", "hf:me/towns", "--to", tmp_path / "back")
    complete("chat", "--ckpt", tmp_path / "back", "--device", "cpu", "--prompt", "x", "--max-new-tokens", "1")
    assert not list(trained.glob(".*"))


def test_what_is_there_is_not_sent_again_and_nothing_new_is_no_commit(hub: Servers, trained: Path) -> None:
    invoke("push", trained, "me/towns", "--public")
    assert not hub.repos["model", "me/towns"].private
    sent = len(hub.requests)
    assert invoke("push", trained, "me/towns").exit_code == 0
    later = hub.requests[sent:]
    assert not [one for one in later if one.method == "PUT" or "/commit/" in one.path]


def test_an_interrupted_push_is_finished_by_the_same_command(hub: Servers, trained: Path, tmp_path: Path) -> None:
    invoke("convert-checkpoint", trained, tmp_path / "hf", "--to", "hf")
    for name in ("b", "c"):
        (tmp_path / f"hf/{name}.bin").write_bytes(name.encode() * 5000)
    command = ("push", tmp_path / "hf", "hf:me/towns")
    hub.before_upload = lambda: hub.wait_released() if len(hub.uploaded) >= 2 else None
    process = start(*command)
    wait_until(lambda: len(hub.uploaded) >= 2 and hub.requests[-1].method == "PUT", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert ".gitattributes" in hub.repos["model", "me/towns"].files
    assert "config.json" not in hub.repos["model", "me/towns"].files
    hub.before_upload = lambda: None
    there, sent = set(hub.uploaded), len(hub.requests)
    assert invoke(*command).exit_code == 0
    hub.release()
    again = [one.path.rpartition("/")[2] for one in hub.requests[sent:] if one.method == "PUT"]
    assert again
    assert not there & set(again)
    files = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    pushed = hub.repos["model", "me/towns"].files
    assert all(pushed[name] == files[name] for name in ("model.safetensors", "b.bin", "c.bin"))


def test_an_adapter_names_its_base_on_the_hub(
    hub: Servers, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT loads it with that base; the license is the base's."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    invoke("convert-checkpoint", trained, tmp_path / "base", "--to", "hf")
    files = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir() if path.name != "manifest.json"}
    files["README.md"] = b"---\nlicense: other\nlicense_name: towns-1\n---\nA base.\n"
    hub.model("owner/base", files)
    assert invoke("download", "hf:owner/base").exit_code == 0
    lora = ("tuning.method=lora", "tuning.lora_rank=2", "checkpoint.trainable_only=true", "train.epochs=1")
    run = (*QUICKSTART[:-2], "--pretrained", "owner/base", "--output", tmp_path / "run", *lora, "train.warmup_epochs=0")
    complete(*run, "--push", "hf:team/lora")
    repo = hub.repos["model", "team/lora"]
    assert json.loads(repo.files["adapter_config.json"])["base_model_name_or_path"] == "owner/base"
    header = header_of(repo.files["README.md"])
    assert header == header | {"base_model": "owner/base", "license_name": "towns-1", "library_name": "peft"}
    adapter = tmp_path / "adapter"
    assert invoke("download", "hf:team/lora", "--to", adapter).exit_code == 0
    complete("push", tmp_path / "run", "hf:team/merged", "--merge", "--base", "owner/base")
    whole = tmp_path / "whole"
    invoke("download", "hf:team/merged", "--to", whole)
    # huggingface_hub reads once where the hub is.
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    models = AutoPeftModelForCausalLM.from_pretrained(adapter), AutoModelForCausalLM.from_pretrained(whole)
    with torch.no_grad():
        tuned, merged = (model(torch.tensor([[5, 6, 7]])).logits for model in models)
    torch.testing.assert_close(tuned, merged, rtol=1e-4, atol=1e-4)


def test_dry_run_shows_files_and_card_and_asks_nobody(hub: Servers, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "ppl.json").write_text('{"perplexity": 3.25, "data": {"items": 10}}')
    (tmp_path / "tasks.json").write_text('{"results": {"towns": {"acc": 0.5}}, "config": {"seed": 7}}')
    results = ("--evaluation", tmp_path / "ppl.json", "--evaluation", tmp_path / "tasks.json")
    result = complete("push", trained, "hf:me/towns", "--dry-run", *results)
    assert "model.safetensors" in result.stdout
    assert "| ppl, perplexity | 3.25 |" in result.stdout
    assert "| tasks, towns, acc | 0.5 |" in result.stdout
    assert "seed | 7" not in result.stdout
    assert "Trained from random weights." in result.stdout
    complete("convert-checkpoint", trained, tmp_path / "hf", "--to", "hf")
    for name in ("recipe.yaml", "manifest.json"):
        (tmp_path / "hf" / name).unlink()
    assert "random weights" not in complete("push", tmp_path / "hf", "hf:me/towns", "--dry-run").stdout
    assert header_of(result.stdout[result.stdout.index("---\n") :])["library_name"] == "transformers"
    assert not hub.requests


@pytest.mark.parametrize(
    ("name", "token", "said"),
    [
        ("hf:me/towns", "", "pushing needs a token"),
        ("hf:me/towns", "hf_unknown", "does not know the token"),
        ("hf:me/towns", READ_TOKEN, "the token may not write to me/towns"),
        ("hf:they/towns", TOKEN, "the token is me's, who is no member of they"),
        ("hf:team/locked", TOKEN, "the token may not write to team/locked"),
        ("hf:datasets/me/towns", TOKEN, "not the name of a model's repository"),
        ("hf:me/towns/file", TOKEN, "not the name of a model's repository"),
    ],
)
def test_what_will_not_do_is_refused_before_training(
    hub: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, token: str, said: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    if not token:
        monkeypatch.delenv("HF_TOKEN")
    hub.model("team/locked", {}, locked=True)
    refused(invoke(*QUICKSTART, "--output", tmp_path / "run", "--push", name), said, output=tmp_path / "run")
    assert not [one for one in hub.requests if one.method != "GET"]


def test_what_cannot_be_pushed_is_refused_before_anything_is_asked(hub: Servers, trained: Path, tmp_path: Path) -> None:
    refused(invoke("push", tmp_path / "absent", "hf:me/towns"), "there is no checkpoint folder")
    os.remove(trained / "latest")
    refused(invoke("push", trained, "hf:me/towns"), "a run without a whole checkpoint yet")
    weights = trained / "epoch0/consolidated.00-of-01.model.pth"
    weights.write_bytes(weights.read_bytes()[:-9])
    refused(invoke("push", trained / "epoch0", "hf:me/towns"), "is damaged")
    assert not hub.requests


def test_weights_of_something_else_are_not_left_beside(hub: Servers, trained: Path) -> None:
    hub.model("me/towns", {"adapter_model.safetensors": b"x" * 2000})
    refused(invoke("push", trained, "hf:me/towns"), "me/towns holds other weights", "adapter_model.safetensors")
    assert not hub.uploaded


def test_a_push_that_fails_after_a_run_leaves_the_run(hub: Servers, tmp_path: Path) -> None:
    hub.model("me/towns", {"pytorch_model.bin": b"y" * 2000})
    result = invoke(*QUICKSTART, "--output", tmp_path / "run", "train.epochs=1", "--push", "hf:me/towns")
    assert result.exit_code == 2
    assert f"llama-acc push {tmp_path / 'run'} hf:me/towns" in result.stderr
    assert (tmp_path / "run/latest").read_text() == "epoch0\n"
