"""`llama-acc download`: what is typed, what is said, what is left, and what comes next."""

import json
import os
import re
import shlex
import signal
import socket
from pathlib import Path

import pytest

from llama_acc.core.catalogue import catalogue, converted_file, raw_files
from llama_acc.core.data.sources import resolve_data_path
from llama_acc.core.errors import UserError
from llama_acc.core.recipe import Recipe
from llama_acc.core.train.base import find_model
from tests.cli.commands import complete, invoke, refused, run, start, wait_until
from tests.cli.conftest import DIALOGUE
from tests.cli.terminal import Terminal
from tests.hub import TOKEN, Fault, Servers

# Three MB, which a server that waits 0.05 s before each 64 KiB sends in 2.4 s.
BIG = bytes(range(256)) * 12_288
SLOW = Fault(delay=0.05)


# The catalogue


def test_list_is_a_table_with_every_entry() -> None:
    result = invoke("download", "--list")
    assert (result.exit_code, result.stderr) == (0, "")
    header, *lines = result.stdout.splitlines()
    assert header.split() == ["name", "size", "here", "license", "what"]
    assert [line.split()[0] for line in lines] == list(catalogue())
    (gated,) = [line for line in lines if line.startswith("llama2-7b ")]
    assert "13.5 GB" in gated
    assert " gated " in gated
    assert "LLAMA 2 Community License" in gated


def test_list_as_json_has_all_that_is_known(lima: Servers, llama_acc_home: Path) -> None:
    invoke("download", "lima")
    listed = {entry["name"]: entry for entry in json.loads(invoke("download", "--list", "--json").stdout)}
    assert list(listed) == list(catalogue())
    assert listed["lima"]["here"] is True
    assert listed["lima"]["folder"] == str(llama_acc_home / "data" / "lima")
    assert listed["gorilla-torchhub"]["files"][0]["sha256"].startswith("02256a7d")
    assert listed["llama2-7b"]["gated"] is True
    assert listed["llama2-7b"]["here"] is False


# What is said and left


def test_the_next_command_is_the_result_and_all_else_goes_aside(lima: Servers, llama_acc_home: Path) -> None:
    result = invoke("download", "lima")
    path = llama_acc_home / "data/lima/lima_vicuna_format.json"
    assert result.exit_code == 0
    assert result.stdout == "llama-acc finetune --recipe lima --pretrained llama2-7b --data lima\n"
    assert result.stderr.splitlines() == [
        f"lima is in {path}",
        "the recipe starts from llama2-7b, which is not here yet: llama-acc download llama2-7b",
        "now type:",
    ]
    again = invoke("download", "lima")
    assert again.stdout == result.stdout
    assert again.stderr.splitlines()[0] == f"lima was there already: {path}"


def test_data_of_which_nothing_is_known_is_to_be_checked(servers: Servers, llama_acc_home: Path) -> None:
    servers.plain["/my data.jsonl"] = json.dumps(DIALOGUE).encode()
    servers.plain["/notes.html"] = b"notes"
    result = invoke("download", f"{servers.url}/my%20data.jsonl", f"{servers.url}/notes.html")
    assert result.stdout == f"llama-acc convert-data check '{llama_acc_home}/data/my data.jsonl'\n"
    assert invoke(*shlex.split(result.stdout)[1:]).exit_code == 0
    servers.dataset("owner/shards", {f"data/{i}.jsonl": json.dumps(DIALOGUE).encode() for i in range(3)})
    result = invoke("download", "hf:owner/shards")
    assert shlex.split(result.stdout)[-1] == str(llama_acc_home / "data/owner/shards/data")


def test_a_token_that_goes_nowhere_is_told(lima: Servers, tmp_path: Path) -> None:
    lima.plain["/a.jsonl"] = json.dumps(DIALOGUE).encode()
    plain, to = f"{lima.url}/a.jsonl", ("--to", tmp_path, "--token", TOKEN)
    assert "--token is not used" in invoke("download", plain, *to).stderr
    assert "--token" not in invoke("download", plain, "lima", *to).stderr


def test_json_says_what_is_where_and_what_was_fetched(lima: Servers, tmp_path: Path) -> None:
    to = tmp_path / "my data"
    (found,) = json.loads(invoke("download", "lima", "--to", to, "--json").stdout)
    file = str(to / "lima_vicuna_format.json")
    assert found == {
        "name": "lima",
        "folder": str(to),
        "files": [file],
        "fetched": [file],
        "converted": None,
        "next": f"llama-acc finetune --recipe lima --pretrained llama2-7b --data '{to}'",
    }
    (again,) = json.loads(invoke("download", "lima", "--to", to, "--json").stdout)
    assert again == found | {"fetched": []}


def test_of_several_names_those_that_can_be_had_come_and_the_rest_is_told(lima: Servers, llama_acc_home: Path) -> None:
    lima.model(
        "meta-llama/Llama-2-7b",
        dict.fromkeys(("consolidated.00.pth", "params.json", "tokenizer.model"), b"w"),
        gated=True,
    )
    lima.plain["/a.jsonl"] = b"{}"
    result = invoke("download", "llama2-7b", "lima", f"{lima.url}/a.jsonl", f"{lima.url}/b.jsonl")
    assert result.exit_code == 2
    assert "llama2-7b: meta-llama/Llama-2-7b is gated" in result.stderr
    assert "there is nothing at" in result.stderr
    assert (llama_acc_home / "data/lima/lima_vicuna_format.json").exists()
    assert (llama_acc_home / "data/a.jsonl").read_bytes() == b"{}"


def test_things_of_one_last_name_have_a_folder_each_too(lima: Servers, tmp_path: Path) -> None:
    for owner in ("one", "two"):
        lima.dataset(f"{owner}/chats", {"a.jsonl": owner.encode(), "b.jsonl": b"b"})
        lima.plain[f"/{owner}/plain.jsonl"] = owner.encode()
    addresses = [f"hf:datasets/{owner}/chats/a.jsonl" for owner in ("one", "two")]
    addresses += [f"{lima.url}/{owner}/plain.jsonl" for owner in ("one", "two")]
    complete("download", *addresses, "hf:datasets/one/chats/b.jsonl", "lima", "--to", tmp_path)
    host = lima.url.partition("//")[2].replace(":", "--")
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/[!.]*")) == [
        f"{host}--one--plain.jsonl/plain.jsonl",
        f"{host}--two--plain.jsonl/plain.jsonl",
        "datasets--one--chats--a.jsonl/a.jsonl",
        "datasets--one--chats--b.jsonl/b.jsonl",
        "datasets--two--chats--a.jsonl/a.jsonl",
        "lima/lima_vicuna_format.json",
    ]
    assert (tmp_path / "datasets--two--chats--a.jsonl/a.jsonl").read_bytes() == b"two"


def test_the_token_is_neither_shown_nor_written(servers: Servers, llama_acc_home: Path, tmp_path: Path) -> None:
    servers.model("owner/secret", {"config.json": b"{}", "model.safetensors": BIG}, private=True)
    servers.fail("model.safetensors", Fault(cut=100_000))
    done = run("--debug", "download", "hf:owner/secret", "--token", TOKEN)
    assert done.returncode == 0, done.stderr
    failed = run("--debug", "download", "hf:owner/secret/nothing.json", "--token", TOKEN)
    assert failed.returncode == 2
    assert TOKEN not in done.stdout + done.stderr + failed.stdout + failed.stderr
    written = [path for folder in (llama_acc_home, Path(os.environ["HF_HOME"])) for path in folder.rglob("*")]
    assert written
    assert not any(TOKEN.encode() in path.read_bytes() for path in written if path.is_file())


# Stopped in the middle


def _arrived(folder: Path) -> int:
    return max((path.stat().st_size for path in folder.rglob(".incoming/**/*") if path.is_file()), default=0)


@pytest.mark.parametrize(
    ("address", "sent", "code"),
    [("hf:owner/name/big.bin", signal.SIGKILL, -9), ("{}/files/big.bin", signal.SIGINT, 130)],
    ids=["hub", "plain"],
)
def test_a_download_that_was_stopped_comes_whole_the_next_time(
    sent: signal.Signals, code: int, address: str, servers: Servers, tmp_path: Path
) -> None:
    servers.model("owner/name", {"big.bin": BIG})
    servers.plain["/files/big.bin"], servers.plain_headers["/files/big.bin"] = BIG, {"ETag": '"one"'}
    servers.fail("big.bin", SLOW)
    command = ("download", address.format(servers.url), "--to", tmp_path / "to")
    with start(*command) as process:
        wait_until(lambda: _arrived(tmp_path / "to") > 500_000, process)
        process.send_signal(sent)
        assert process.wait(30) == code
    assert not (tmp_path / "to/big.bin").exists()
    had = _arrived(tmp_path / "to")
    complete(*command)
    assert (tmp_path / "to/big.bin").read_bytes() == BIG
    assert sorted(path.name for path in (tmp_path / "to").iterdir() if "lock" not in path.name) == [
        ".llama-acc-download", "big.bin",
    ]  # fmt: skip
    if "http" in command[1]:
        assert servers.asked_for_bytes("big.bin")[-1].headers["range"] == f"bytes={had}-"


def test_a_second_download_of_the_same_waits_and_finds_it_there(servers: Servers, tmp_path: Path) -> None:
    servers.model("owner/name", {"big.bin": BIG})
    servers.fail("big.bin", Fault(stall=100_000))
    command = ("download", "hf:owner/name/big.bin", "--to", tmp_path / "to")
    with start(*command) as first:
        wait_until(lambda: _arrived(tmp_path / "to") > 0, first)
        with start(*command) as second:
            assert second.stderr is not None
            assert "waiting for another download" in second.stderr.readline()
            servers.release()
            assert (first.wait(30), second.wait(30)) == (0, 0)
    assert (tmp_path / "to/big.bin").read_bytes() == BIG
    assert servers.sent["big.bin"] < 2 * len(BIG)


# Progress


def test_a_terminal_gets_a_bar_with_bytes_rate_and_time_left(servers: Servers, tmp_path: Path) -> None:
    servers.model("owner/name", {"big.bin": BIG})
    servers.fail("big.bin", Fault(delay=0.02))
    with Terminal("download", "hf:owner/name/big.bin", "--to", tmp_path / "to", term="xterm") as terminal:
        assert terminal.end() == 0
    shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", terminal.seen)
    assert re.search(r"big\.bin +[\d.]+/3\.1 MiB|big\.bin +[\d.]+/[\d.]+ [KM]iB", shown), shown
    assert re.search(r"[\d.]+ [kM]B/s", shown), shown
    assert "left" in shown


def test_no_secret_of_an_address_is_shown_or_written(servers: Servers, tmp_path: Path, llama_acc_home: Path) -> None:
    servers.plain["/a.jsonl"] = json.dumps(DIALOGUE).encode()
    address = servers.url.replace("//", "//user:hunter2@") + "/a.jsonl?key=hush"
    wrong = address.replace("a.jsonl", "b.jsonl")
    for arguments in ((address,), (address, "--json"), (address, wrong), (wrong,), ("--debug", wrong)):
        done = invoke(*["--debug"] * ("--debug" in arguments), "download", *[a for a in arguments if a != "--debug"])
        assert "hunter2" not in done.output + done.stderr
        assert "hush" not in done.output + done.stderr
    tried = invoke("finetune", "--recipe", "quickstart", "--data", address, "--dry-run", "--output", tmp_path / "run")
    assert tried.exit_code == 2
    assert "hunter2" not in tried.output + tried.stderr
    kept = [path for folder in (llama_acc_home, tmp_path) for path in folder.rglob("*") if path.is_file()]
    assert kept
    assert not any(secret in path.read_bytes() for path in kept for secret in (b"hunter2", b"hush"))


# What was downloaded is found by its name, and converted where that is needed


def test_finetune_and_chat_find_what_was_downloaded(lima: Servers, talker: Path, llama_acc_home: Path) -> None:
    files = {path.name: path.read_bytes() for path in talker.iterdir()}
    lima.model("meta-llama/Llama-2-7b", files, gated=True)
    result = complete("download", "lima", "llama2-7b", "--token", TOKEN)
    first, second = map(shlex.split, result.stdout.splitlines())
    assert second == ["llama-acc", "finetune", "--recipe", "alpaca", "--pretrained", "llama2-7b"]
    small = ("--dry-run", "--no-timing", "--device", "cpu", "model.max_seq_len=512", "data.max_tokens=512")
    dry = complete(*first[1:], *small)
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
    result = complete("download", "wizardlm")
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
    result = complete("download", "wizardlm")
    assert "wizardlm could not be converted" in result.stderr
    assert result.stdout == "llama-acc convert-data wizardlm wizardlm\n"
    assert len(raw_files("wizardlm")) == 1


def test_a_checkpoint_of_llama2_accessory_comes_with_what_it_needs(servers: Servers, llama_acc_home: Path) -> None:
    folder = "finetune/mm/caption_llamaQformerv2_13b"
    files = {f"{folder}/consolidated.0{i}-of-02.model.pth": b"weights" for i in range(2)}
    files |= {"config/13B_params.json": b'{"dim": 5120}', "config/tokenizer.model": b"pieces", "README.md": b""}
    servers.model("Alpha-VLLM/LLaMA2-Accessory", files)
    result = complete("download", "accessory-caption_llamaQformerv2_13b")
    place = llama_acc_home / "models/accessory-caption_llamaQformerv2_13b"
    assert sorted(path.name for path in place.iterdir() if not path.name.startswith(".")) == [
        "consolidated.00-of-02.model.pth", "consolidated.01-of-02.model.pth", "meta.json", "params.json",
        "tokenizer.model",
    ]  # fmt: skip
    assert json.loads((place / "meta.json").read_text()) == {"llama_type": "llama_qformerv2"}
    assert result.stdout == "llama-acc caption --ckpt accessory-caption_llamaQformerv2_13b IMAGE\n"
