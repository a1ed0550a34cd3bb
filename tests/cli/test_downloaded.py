"""What was downloaded is found by its name, and converted where that is needed."""

import json
import re
import shlex
import socket
from pathlib import Path

import pytest

from llama_acc.core.catalogue import converted_file, raw_files
from llama_acc.core.data.sources import resolve_data_path
from llama_acc.core.errors import UserError
from llama_acc.core.recipe import Recipe
from llama_acc.core.train.base import find_model
from tests.cli.commands import invoke, refused
from tests.cli.conftest import DIALOGUE
from tests.hub import TOKEN, Servers


def test_finetune_and_chat_find_what_was_downloaded(lima: Servers, talker: Path, llama_acc_home: Path) -> None:
    files = {path.name: path.read_bytes() for path in talker.iterdir()}
    lima.model("meta-llama/Llama-2-7b", files, gated=True)
    result = invoke("download", "lima", "llama2-7b", "--token", TOKEN)
    assert result.exit_code == 0, result.stderr
    first, second = map(shlex.split, result.stdout.splitlines())
    assert second == ["llama-acc", "finetune", "--recipe", "alpaca", "--pretrained", "llama2-7b"]
    small = ("--dry-run", "--no-timing", "--device", "cpu", "model.max_seq_len=512", "data.max_tokens=512")
    dry = invoke(*first[1:], *small)
    assert dry.exit_code == 0, dry.stderr
    assert re.search(r"weights +from \S+/models/llama2-7b", dry.stdout)
    layouts, _, _ = find_model(Recipe.load("lima", ["parallel.model_parallel_size=1"]))
    assert layouts[0].folder == llama_acc_home / "models/llama2-7b"
    answer = invoke(
        "chat", "--ckpt", "llama2-7b", "--device", "cpu", "--prompt", "the answer is:", "--temperature", "0"
    )
    assert answer.stdout.strip() == "a town", answer.stderr


def test_being_off_line_is_told_before_the_next_name_is_asked_for(
    servers: Servers, llama_acc_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("llama_acc.cli.console.error", lambda message, hint: said.append(message))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        nowhere = f"http://127.0.0.1:{taken.getsockname()[1]}/a.json"
        servers.plain["/b.json"] = b"[]"
        servers.before_bytes = lambda: said.append("asked")
        assert invoke("download", nowhere, f"{servers.url}/b.json").exit_code == 1
    assert said == [f"{nowhere}: 127.0.0.1 cannot be reached: Connection refused", "asked"]


def test_a_download_that_is_not_finished_is_not_used(servers: Servers, llama_acc_home: Path, tmp_path: Path) -> None:
    for place, arguments in (
        ("models/llama2-7b", ("chat", "--ckpt", "llama2-7b")),
        ("data/lima", ("finetune", "--recipe", "quickstart", "--data", "lima", "--output", tmp_path / "run")),
    ):
        folder = llama_acc_home / place
        folder.mkdir(parents=True)
        (folder / ".incoming").mkdir()
        result = invoke(*arguments)
        refused(result, f"the download of {folder.name} is incomplete")
        assert f"go on with: llama-acc download {folder.name}" in result.stderr


def test_data_that_is_to_be_converted_says_so(llama_acc_home: Path) -> None:
    with pytest.raises(UserError, match="gorilla is not downloaded") as refusal:
        raw_files("gorilla")
    assert refusal.value.hint == "type: llama-acc download gorilla"
    raw = llama_acc_home / "data/gorilla/raw/tensorflow_train.json"
    raw.parent.mkdir(parents=True)
    raw.write_text("{}")
    assert raw_files("gorilla") == [raw]
    with pytest.raises(UserError, match="not converted yet") as refusal:
        resolve_data_path("gorilla")
    assert refusal.value.hint == "type: llama-acc convert-data gorilla gorilla"
    converted_file("gorilla").write_text("{}")
    assert resolve_data_path("gorilla") == llama_acc_home / "data/gorilla"


WIZARDLM = "WizardLMTeam/WizardLM_evol_instruct_V2_196k"
EVOLVED = {"idx": "a1", **DIALOGUE}


def test_data_that_finetune_cannot_read_as_it_is_is_converted_at_once(servers: Servers, llama_acc_home: Path) -> None:
    raw = json.dumps([EVOLVED] * 5).encode()
    servers.dataset(WIZARDLM, {"WizardLM_evol_instruct_V2_143k.json": raw})
    result = invoke("download", "wizardlm")
    assert result.exit_code == 0, result.stderr
    converted = llama_acc_home / "data/wizardlm/wizardlm.jsonl"
    assert f"converted to 5 items: {converted}" in result.stderr
    assert result.stdout == "llama-acc finetune --recipe wizardlm --pretrained llama2-7b --data wizardlm\n"
    assert [json.loads(line) for line in converted.read_text().splitlines()] == [DIALOGUE] * 5
    assert raw_files("wizardlm")[0].read_bytes() == raw
    assert resolve_data_path("wizardlm") == converted.parent
    converted.write_text("edited")
    assert invoke("download", "wizardlm").exit_code == 0
    assert converted.read_text() == "edited"


def test_large_data_is_converted_by_a_command_of_its_own(
    servers: Servers, llama_acc_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama_acc.cli.download.CONVERTED_AT_ONCE", 10)
    servers.dataset(WIZARDLM, {"WizardLM_evol_instruct_V2_143k.json": json.dumps([EVOLVED]).encode()})
    assert invoke("download", "wizardlm").stdout == "llama-acc convert-data wizardlm wizardlm\n"
    command = shlex.split(invoke("download", "wizardlm", "--to", tmp_path / "my data").stdout)
    assert invoke(*command[1:]).exit_code == 0
    assert json.loads((tmp_path / "my data/wizardlm.jsonl").read_text()) == DIALOGUE


def test_data_that_turns_out_to_be_something_else_is_kept_and_told(servers: Servers, llama_acc_home: Path) -> None:
    servers.dataset(WIZARDLM, {"WizardLM_evol_instruct_V2_143k.json": b'[{"what": "is this"}]'})
    result = invoke("download", "wizardlm")
    assert result.exit_code == 0
    assert "wizardlm could not be converted" in result.stderr
    assert result.stdout == "llama-acc convert-data wizardlm wizardlm\n"
    assert len(raw_files("wizardlm")) == 1


def test_a_checkpoint_of_llama2_accessory_comes_with_what_it_needs(servers: Servers, llama_acc_home: Path) -> None:
    folder = "finetune/mm/caption_llamaQformerv2_13b"
    files = {f"{folder}/consolidated.0{i}-of-02.model.pth": b"weights" for i in range(2)}
    files |= {"config/13B_params.json": b'{"dim": 5120}', "config/tokenizer.model": b"pieces", "README.md": b""}
    servers.model("Alpha-VLLM/LLaMA2-Accessory", files)
    result = invoke("download", "accessory-caption_llamaQformerv2_13b")
    assert result.exit_code == 0, result.stderr
    place = llama_acc_home / "models/accessory-caption_llamaQformerv2_13b"
    assert sorted(path.name for path in place.iterdir() if not path.name.startswith(".")) == [
        "consolidated.00-of-02.model.pth", "consolidated.01-of-02.model.pth", "meta.json", "params.json",
        "tokenizer.model",
    ]  # fmt: skip
    assert json.loads((place / "meta.json").read_text()) == {"llama_type": "llama_qformerv2"}
    assert result.stdout == "llama-acc caption --ckpt accessory-caption_llamaQformerv2_13b IMAGE\n"
