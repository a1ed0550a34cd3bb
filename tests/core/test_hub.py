"""Hugging Face, spoken to by the real huggingface_hub: what there is, who may have it, where its bytes come from."""

import os
import random
import socket
import time
from pathlib import Path

import httpx2
import huggingface_hub
import pytest

from llama_acc.core.errors import RunError, UserError
from llama_acc.core.hub import fetch_data
from tests.core.downloading import Watch, download, visible
from tests.hub import TOKEN, Fault, Servers

CONTENT = random.Random(0).randbytes(400_000)
GATED = "hf:meta-llama/Llama-2-7b"


# What there is


def test_a_name_is_a_model_first_and_a_data_set_else(servers: Servers, tmp_path: Path) -> None:
    servers.dataset("owner/both", {"data.json": b"[]"})
    assert not download("hf:owner/both", tmp_path / "data").is_model
    servers.model("owner/both", {"config.json": b"{}"})
    assert download("hf:owner/both", tmp_path / "model").is_model
    assert visible(tmp_path / "model") == ["config.json"]
    assert not download("hf:datasets/owner/both", tmp_path / "again").is_model


def test_a_whole_model_comes_without_its_weights_in_other_formats(servers: Servers, tmp_path: Path) -> None:
    wanted = {"config.json": b"{}", "model.safetensors": b"weights", "tokenizer.model": b"pieces"}
    copies = {
        "pytorch_model.bin": b"w",
        "tf_model.h5": b"w",
        "onnx/model.onnx": b"w",
        "consolidated.safetensors": b"w",
        "original/consolidated.00.pth": b"w",
    }
    servers.model("owner/name", wanted | copies)
    watch = Watch()
    download("hf:owner/name", tmp_path, watch)
    assert visible(tmp_path) == sorted(wanted)
    assert "left out" in watch.notes[0]
    assert "pytorch_model.bin" in watch.notes[0]
    download("hf:owner/name/pytorch_model.bin", tmp_path / "asked")
    assert visible(tmp_path / "asked") == ["pytorch_model.bin"]


def test_parts_of_a_repository_land_where_they_are_looked_for(
    servers: Servers, llama_acc_home: Path, tmp_path: Path
) -> None:
    servers.dataset("owner/name", {"a/b/1.json": b"[1]", "a/b/2.json": b"[2]", "a/c.json": b"[3]"})
    places = {
        "hf:owner/name/a/b": ["a/b/1.json", "a/b/2.json"],
        "hf:owner/name/a/c.json": ["a/c.json"],
        "hf:owner/name/a/*.json": ["a/b/1.json", "a/b/2.json", "a/c.json"],
    }
    for address, expected in places.items():
        done = download(address, None)
        assert [str(path.relative_to(llama_acc_home / "data/owner/name")) for path in done.files] == expected
    # Below --to, without the folder that all of it is in.
    to = {"hf:owner/name/a/b": ["b"], "hf:owner/name/a/c.json": ["c.json"], "hf:owner/name/a/*": ["b", "c.json"]}
    for number, (address, expected) in enumerate(to.items()):
        download(address, tmp_path / str(number))
        assert visible(tmp_path / str(number)) == expected


@pytest.mark.parametrize(
    ("address", "said", "hint"),
    [
        ("hf:owner/name/confg.json", "holds nothing named confg.json (404)", "did you mean 'config.json'?"),
        ("hf:owner/name/weights.pth", "holds nothing named weights.pth (404)", "did you mean 'deep/weights.pth'?"),
        ("hf:owner/name/*.csv", "holds nothing named *.csv (404)", "it holds:\n  config.json\n  deep/weights.pth"),
        ("hf:owner/nam", "has no owner/nam (404)", "did you mean 'owner/name'?"),
        ("hf:64bits/lima_vicuna", "has no 64bits/lima_vicuna (404)", "did you mean '64bits/lima_vicuna_format'?"),
        ("hf:owner/name@v9", "owner/name has no revision v9 (404)", "leave @REVISION out"),
    ],
)
def test_what_is_not_there_is_answered_with_near_names(
    address: str, said: str, hint: str, servers: Servers, tmp_path: Path
) -> None:
    servers.model("owner/name", {"config.json": b"{}", "deep/weights.pth": b"w"})
    with pytest.raises(UserError) as refused:
        download(address, tmp_path)
    assert said in refused.value.message
    assert hint in (refused.value.hint or "")


# Who may have it


@pytest.mark.parametrize(
    ("repo", "token", "said"),
    [
        ("meta-llama/Llama-2-7b", None, "is gated: its owner wants to be asked first, and no token was sent"),
        ("meta-llama/Llama-2-7b", "hf_ofsomeoneelse", "the token's account has no access to it"),
        ("owner/name", "outdated", "does not know the token"),
    ],
)
def test_a_refusal_says_why_and_what_to_do_and_never_the_token(
    repo: str, token: str | None, said: str, servers: Servers, tmp_path: Path
) -> None:
    servers.model("meta-llama/Llama-2-7b", {"params.json": b"{}"}, gated=True)
    servers.model("owner/name", {"config.json": b"{}"})
    with pytest.raises(UserError, match=said) as refused:
        download(f"hf:{repo}", tmp_path, token=token)
    assert not token or token not in str(refused.value)
    if token is None:
        for words in (f"{servers.url}/{repo}", "settings/tokens", "--token", "HF_TOKEN", "hf auth login"):
            assert words in (refused.value.hint or "")
    assert visible(tmp_path) == []


@pytest.mark.parametrize("way", ["option", "environment", "login"])
def test_a_gated_model_comes_with_the_token_given_any_way(
    way: str, servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers.model("meta-llama/Llama-2-7b", {"params.json": b"{}", "consolidated.00.pth": CONTENT}, gated=True)
    if way == "environment":
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    if way == "login":
        Path(huggingface_hub.constants.HF_TOKEN_PATH).write_text(TOKEN)
    download(GATED, tmp_path, token=TOKEN if way == "option" else None)
    assert visible(tmp_path) == ["consolidated.00.pth", "params.json"]


def test_a_private_repository_is_as_if_it_were_not_there(servers: Servers, tmp_path: Path) -> None:
    servers.model("owner/secrets", {"config.json": b"{}"}, private=True)
    with pytest.raises(UserError, match="has no owner/secrets") as refused:
        download("hf:owner/secrets", tmp_path)
    assert "a private one is seen with a token of its owner only" in (refused.value.hint or "")
    servers.model("owner/secret", {"config.json": b"{}"})
    with pytest.raises(UserError) as refused:
        download("hf:owner/secrets", tmp_path)
    assert refused.value.hint is not None
    assert refused.value.hint.startswith("did you mean 'owner/secret'? A private one is seen with a token")
    download("hf:owner/secrets", tmp_path, token=TOKEN)


def test_the_token_of_the_login_is_not_sent_where_that_was_switched_off(
    servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    servers.model("owner/name", {"config.json": b"{}"})
    download("hf:owner/name", tmp_path)
    assert all("authorization" not in request.headers for request in servers.requests)


# Where the bytes come from


def test_a_file_in_the_cache_of_huggingface_hub_is_not_fetched(servers: Servers, tmp_path: Path) -> None:
    servers.model("owner/name", {"big.bin": CONTENT})
    huggingface_hub.hf_hub_download("owner/name", "big.bin", endpoint=servers.url)
    fetched = len(servers.asked_for_bytes("big.bin"))
    download("hf:owner/name", tmp_path)
    assert (tmp_path / "big.bin").read_bytes() == CONTENT
    assert len(servers.asked_for_bytes("big.bin")) == fetched


def test_a_damaged_file_in_that_cache_is_reported_and_fetched(servers: Servers, tmp_path: Path) -> None:
    servers.model("owner/name", {"big.bin": CONTENT}, large=1000)
    cached = Path(huggingface_hub.hf_hub_download("owner/name", "big.bin", endpoint=servers.url))
    damaged = CONTENT[:-1] + b"?"
    cached.resolve().write_bytes(damaged)
    watch = Watch()
    download("hf:owner/name", tmp_path, watch)
    assert (tmp_path / "big.bin").read_bytes() == CONTENT
    assert "fetching it anew" in "".join(watch.notes)
    assert cached.read_bytes() == damaged


@pytest.fixture
def chunked(servers: Servers, tmp_path: Path) -> Servers:
    """A repository whose large file is kept as chunks too, by hf_xet's own storage in a folder."""
    from hf_xet import XetSession

    (tmp_path / "big.bin").write_bytes(CONTENT)
    (tmp_path / "chunks").mkdir()
    servers.xet_storage = f"local://{tmp_path / 'chunks'}"
    with XetSession().new_upload_commit(endpoint=servers.xet_storage) as commit:
        uploaded = commit.start_upload_file(str(tmp_path / "big.bin"))
    servers.model("owner/name", {"big.bin": CONTENT}, xet={"big.bin": uploaded.result().xet_info.hash}, private=True)
    return servers


def test_chunk_storage_is_used(chunked: Servers, tmp_path: Path) -> None:
    watch = Watch()
    download("hf:owner/name", tmp_path / "to", watch, token=TOKEN)
    assert (tmp_path / "to/big.bin").read_bytes() == CONTENT
    assert chunked.asked_for_bytes("big.bin") == [], watch.notes
    assert "big.bin" in watch.first
    written = [path for path in Path(os.environ["HF_HOME"]).rglob("*") if path.is_file()]  # hf_xet keeps a log
    assert not any(TOKEN.encode() in path.read_bytes() for path in written)


def test_where_chunk_storage_cannot_be_reached_what_to_set_is_said(chunked: Servers, tmp_path: Path) -> None:
    chunked.xet_storage = "local:///nowhere/at/all"
    with pytest.raises(RunError) as failed:
        download("hf:owner/name", tmp_path / "to", token=TOKEN)
    assert "set HF_HUB_DISABLE_XET=1" in (failed.value.hint or "")


def test_remote_data_is_fetched_once_and_found_off_line(servers: Servers, llama_acc_home: Path) -> None:
    servers.dataset("owner/shards", {f"train-{i}.jsonl": b"%d\n" % i for i in range(3)})
    address = "hf:datasets/owner/shards/train-*.jsonl"
    paths = fetch_data(address)
    assert [path.read_bytes() for path in paths] == [b"0\n", b"1\n", b"2\n"]
    assert paths[0] == llama_acc_home / "data/owner/shards/train-0.jsonl"
    asked = len(servers.requests)
    assert fetch_data(address) == paths
    assert len(servers.requests) == asked


# Off-line


def test_a_host_that_refuses_is_told_at_once(tmp_path: Path, servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("HF_ENDPOINT", url)
        for address in ("hf:owner/name", f"{url}/a.json"):
            with pytest.raises(RunError, match=r"127\.0\.0\.1 cannot be reached") as failed:
                download(address, tmp_path)
            assert "is this machine on-line?" in (failed.value.hint or "")
            assert "Errno" not in failed.value.message


def test_a_name_server_that_never_answers_is_given_up_in_time(
    servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looking up a name has no time limit of its own."""
    monkeypatch.setattr("llama_acc.core.hub.REACH_SECONDS", 1.1)
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: time.sleep(5))
    with pytest.raises(RunError, match=r"example\.org cannot be reached: no answer within 1\.1 s"):
        download("https://example.org/a.json", tmp_path)


def test_a_firewall_that_looks_into_connections_is_not_called_off_line(
    servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise httpx2.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed certificate")

    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", refuse)
    with pytest.raises(RunError, match=r"127\.0\.0\.1 does not prove to be 127\.0\.0\.1") as failed:
        download("hf:owner/name", tmp_path)
    assert "SSL_CERT_FILE" in (failed.value.hint or "")


def test_huggingface_hubs_off_line_switch_is_respected(
    servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        download("hf:owner/name", tmp_path)


def test_a_busy_hub_is_a_failure_that_may_pass(servers: Servers, tmp_path: Path) -> None:
    servers.model("owner/name", {"config.json": b"{}"})
    servers.fail("config.json", *[Fault(status=503)] * 4)
    with pytest.raises(RunError, match="answers 503"):
        download("hf:owner/name", tmp_path)
