"""Hugging Face, spoken to by the real huggingface_hub: what there is, who may have it, where its bytes come from."""

import contextlib
import hashlib
import json
import os
import socket
import threading
from pathlib import Path
from types import SimpleNamespace

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import constants, get_session
from huggingface_hub.utils import http_backoff

from llama_acc.core.catalogue import DownloadRequest, File, resolve
from llama_acc.core.errors import RunError, UserError
from llama_acc.core.hub import Downloaded, Downloader
from llama_acc.core.hugging_face import http_client
from tests.hub import TOKEN, Fault, Servers

# 700 KB: eleven pieces of a server's answer.
CONTENT = b"".join(hashlib.sha256(b"%d" % i).digest() for i in range(22_000))
GATED = "hf:meta-llama/Llama-2-7b"


class Watch:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.first: dict[str, int] = {}

    def progress(self, label: str, done: int, total: int | None) -> None:
        self.first.setdefault(label, done)


def download(name: str, to: Path | None, watch: Watch | None = None, token: str | None = None) -> Downloaded:
    """Downloads."""
    watch = watch or Watch()
    (request,) = resolve([name], to)
    return Downloader(watch.progress, watch.notes.append, token).download(request)


def visible(folder: Path) -> list[str]:
    """What a user sees of a folder."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


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
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: threading.Event().wait(5))
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


# A download comes to its end whatever the network does, is checked, and is never there in part


REPO = "hf:models/owner/name"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test waits long between tries, nor does huggingface_hub."""
    monkeypatch.setattr("llama_acc.core.hub.RETRY_WAITS", (0.01,) * 3)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)


@pytest.fixture
def web(servers: Servers) -> str:
    """The file kept by a plain server, which knows it by an ETag."""
    servers.plain["/files/big.bin"] = CONTENT
    servers.plain_headers["/files/big.bin"] = {"ETag": '"one"'}
    return f"{servers.url}/files/big.bin"


@pytest.fixture(params=["hub", "storage", "web"])
def address(request: pytest.FixtureRequest, servers: Servers) -> str:
    """The same file kept by the hub itself, by its storage host, and by a plain server."""
    if request.param == "web":
        return str(request.getfixturevalue("web"))
    servers.model("owner/name", {"big.bin": CONTENT}, large=10**9 if request.param == "hub" else 1000)
    return f"{REPO}/big.bin"


def test_a_file_arrives_whole_under_its_name_only_and_once(address: str, servers: Servers, tmp_path: Path) -> None:
    done = download(address, tmp_path)
    assert visible(tmp_path) == ["big.bin"]
    assert done.files == done.fetched == (tmp_path / "big.bin",)
    assert (tmp_path / "big.bin").read_bytes() == CONTENT
    assert not (tmp_path / ".incoming").exists()
    asked = len(servers.requests)
    again = download(address, tmp_path)
    assert (again.files, again.fetched, len(servers.requests)) == (done.files, (), asked)


def test_cut_connections_are_taken_up_where_they_were_cut(address: str, servers: Servers, tmp_path: Path) -> None:
    # huggingface_hub asks its own hub again after some statuses, and other servers after 408 and 429.
    statuses = [] if "hf:" in address else [Fault(status=429), Fault(status=503)]
    servers.fail("big.bin", Fault(cut=300_000), *statuses, Fault(cut=100_000), Fault(cut=0))
    download(address, tmp_path)
    assert (tmp_path / "big.bin").read_bytes() == CONTENT
    lost = servers.sent["big.bin"] - len(CONTENT)
    assert lost < 2 * constants.DOWNLOAD_CHUNK_SIZE  # of each cut, what did not fill a chunk


def test_a_silent_server_is_left_and_asked_again(
    address: str, servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "0.3")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    servers.fail("big.bin", Fault(stall=200_000))
    download(address, tmp_path)
    assert (tmp_path / "big.bin").read_bytes() == CONTENT


def test_when_it_does_not_work_what_arrived_is_kept_and_used(web: str, servers: Servers, tmp_path: Path) -> None:
    servers.fail("big.bin", Fault(cut=300_000), *[Fault(cut=0)] * 99)
    with pytest.raises(RunError, match=r"big\.bin: peer closed connection"):
        download(web, tmp_path)
    assert visible(tmp_path) == []
    servers.faults.clear()
    watch = Watch()
    download(web, tmp_path, watch)
    assert (tmp_path / "big.bin").read_bytes() == CONTENT
    assert servers.sent["big.bin"] < len(CONTENT) + constants.DOWNLOAD_CHUNK_SIZE
    assert watch.first["big.bin"] > constants.DOWNLOAD_CHUNK_SIZE


# What is not what it should be


@pytest.mark.parametrize(("large", "kind"), [(1000, "sha256"), (10**9, "git")])
def test_wrong_bytes_are_fetched_anew_and_then_thrown_away(
    large: int, kind: str, servers: Servers, tmp_path: Path
) -> None:
    servers.model("owner/name", {"big.bin": CONTENT}, large=large)
    wrong = b"x" + CONTENT[1:]
    servers.fail("big.bin", Fault(content=wrong), Fault(content=wrong))
    with pytest.raises(RunError, match=rf"it has {kind}:\w+, and \S+ has {kind}:") as failed:
        download(f"{REPO}/big.bin", tmp_path)
    assert "nothing of yours was touched" in (failed.value.hint or "")
    assert visible(tmp_path) == []
    servers.fail("big.bin", Fault(content=wrong))
    download(f"{REPO}/big.bin", tmp_path)
    assert (tmp_path / "big.bin").read_bytes() == CONTENT


def test_what_the_catalogue_knows_of_a_file_has_to_be_so(servers: Servers, tmp_path: Path) -> None:
    servers.plain["/files/a.json"] = b"[1]"
    url = f"{servers.url}/files/a.json"
    right, wrong = hashlib.sha256(b"[1]").hexdigest(), hashlib.sha256(b"[2]").hexdigest()
    for known, fits in (
        (File(get=url, bytes=4), False),
        (File(get=url, sha256=wrong), False),
        (File(get=url, sha256=right), True),
    ):
        with contextlib.nullcontext() if fits else pytest.raises(RunError, match=r"a\.json: it has"):
            Downloader(lambda *_: None, print).download(DownloadRequest("known", None, (known,), tmp_path))
        assert (tmp_path / "a.json").exists() == fits


def test_a_plain_file_that_changed_meanwhile_is_not_sewn_together(servers: Servers, tmp_path: Path) -> None:
    servers.plain["/files/a.bin"], new = CONTENT, CONTENT[::-1]
    servers.plain_headers["/files/a.bin"] = {"ETag": '"old"'}
    servers.fail("a.bin", Fault(cut=300_000), *[Fault(cut=0)] * 99)
    with pytest.raises(RunError):
        download(f"{servers.url}/files/a.bin", tmp_path)
    servers.faults.clear()
    servers.plain["/files/a.bin"] = new
    servers.plain_headers["/files/a.bin"] = {"ETag": '"new"'}
    download(f"{servers.url}/files/a.bin", tmp_path)
    assert (tmp_path / "a.bin").read_bytes() == new


@pytest.mark.parametrize(
    "name", ["../escaped.json", "/tmp/escaped.json", "deep/../../escaped.json", ".llama-acc-download"]
)
def test_a_name_that_leads_out_of_the_folder_is_refused(name: str, servers: Servers, tmp_path: Path) -> None:
    servers.dataset("owner/name", {name: b"[]", "fine.json": b"[]"})
    with pytest.raises(UserError, match="which is not a name for a download"):
        download("hf:datasets/owner/name", tmp_path / "to")
    assert not (tmp_path / "escaped.json").exists()


def test_a_plain_address_cannot_choose_the_folder(servers: Servers, tmp_path: Path) -> None:
    servers.plain["/files/../../escaped.json"] = b"[]"
    done = download(f"{servers.url}/files/%2e%2e%2f%2e%2e%2fescaped.json", tmp_path / "to")
    assert done.files == (tmp_path / "to/escaped.json",)


def test_a_web_page_is_not_taken_for_the_file_it_shows(servers: Servers, tmp_path: Path) -> None:
    servers.plain["/files/a.json"] = b"<html>"
    servers.plain_headers["/files/a.json"] = {"Content-Type": "text/html; charset=utf-8"}
    with pytest.raises(UserError, match="is a web page"):
        download(f"{servers.url}/files/a.json", tmp_path)


# Files of the user's


@pytest.mark.parametrize("was_downloaded", [False, True])
def test_a_file_of_the_users_is_never_overwritten(address: str, was_downloaded: bool, tmp_path: Path) -> None:
    if was_downloaded:
        download(address, tmp_path)
    (tmp_path / "big.bin").write_text("mine")
    with pytest.raises(UserError, match="are not what would be fetched") as refused:
        download(address, tmp_path)
    assert "nothing was changed" in (refused.value.hint or "")
    assert (tmp_path / "big.bin").read_text() == "mine"


def test_a_plain_file_of_another_address_is_not_taken_for_this_one(servers: Servers, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        servers.plain[f"/{folder}/a.json"] = json.dumps(folder).encode()
    download(f"{servers.url}/one/a.json", tmp_path)
    with pytest.raises(UserError, match=r"whether it is \S+/two/a\.json cannot be known"):
        download(f"{servers.url}/two/a.json", tmp_path)


def test_a_file_that_is_the_right_one_already_is_taken_as_it_is(servers: Servers, tmp_path: Path) -> None:
    servers.model("owner/name", {"big.bin": CONTENT})
    (tmp_path / "big.bin").write_bytes(CONTENT)
    done = download(f"{REPO}/big.bin", tmp_path)
    assert (done.files, done.fetched) == ((tmp_path / "big.bin",), ())
    assert servers.asked_for_bytes("big.bin") == []


def test_too_little_disk_is_found_before_the_first_byte(
    servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers.model("owner/name", {"big.bin": CONTENT})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=2**19))
    with pytest.raises(UserError, match=r"too little disk for .*: 687.5 KiB are to come, 512.0 KiB are free"):
        download(f"{REPO}/big.bin", tmp_path)
    assert servers.asked_for_bytes("big.bin") == []


# Several files


def test_files_come_side_by_side(servers: Servers, tmp_path: Path) -> None:
    """Four files whose servers send nothing until all four have been asked for."""
    files = {f"part{i}.jsonl": b"%d" % i * 2000 for i in range(4)}
    servers.dataset("owner/shards", files, large=10**9)
    meeting = threading.Barrier(4, timeout=20)
    servers.before_bytes = meeting.wait
    done = download("hf:datasets/owner/shards/*.jsonl", tmp_path)
    assert {path.name: path.read_bytes() for path in done.files} == files


def test_a_file_that_fails_does_not_keep_the_others_from_coming(servers: Servers, tmp_path: Path) -> None:
    servers.dataset("owner/shards", {f"part{i}.jsonl": b"%d" % i * 2000 for i in range(3)})
    servers.fail("part1.jsonl", *[Fault(cut=0)] * 6)
    with pytest.raises(RunError, match=r"part1\.jsonl"):
        download("hf:datasets/owner/shards", tmp_path)
    assert visible(tmp_path) == ["part0.jsonl", "part2.jsonl"]
    done = download("hf:datasets/owner/shards", tmp_path)
    assert [path.name for path in done.fetched] == ["part1.jsonl"]


def test_after_a_refusal_no_more_files_are_asked_for(servers: Servers, tmp_path: Path) -> None:
    servers.dataset("owner/shards", {f"part{i}.jsonl": b"{}" for i in range(60)}, gated=True)
    with pytest.raises(UserError, match="is gated"):
        download("hf:datasets/owner/shards", tmp_path)
    assert len([request for request in servers.requests if "/resolve/" in request.path]) < 30


def test_a_host_that_refuses_leaves_the_connections_to_others(web: str) -> None:
    """huggingface_hub would close the client of all threads."""
    with socket.socket() as taken, http_client().stream("GET", web) as on_its_way:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        with pytest.raises(httpx2.ConnectError):
            http_backoff("GET", f"http://127.0.0.1:{taken.getsockname()[1]}", max_retries=1)
        assert on_its_way.read() == CONTENT
    assert get_session() is http_client()


# Redirects and the token


def test_the_token_goes_to_the_hub_and_nowhere_else(servers: Servers, tmp_path: Path) -> None:
    files = {"big.bin": CONTENT, "config.json": b"{}"}
    servers.model("owner/name", files, private=True)
    download(REPO, tmp_path, token=TOKEN)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name in files} == files
    for request in servers.requests:
        sent = request.headers.get("authorization")
        assert sent == (f"Bearer {TOKEN}" if request.host == "hub" else None)
    assert any(request.host == "storage" for request in servers.requests)


def test_the_token_does_not_follow_the_hubs_own_answers_elsewhere(servers: Servers, tmp_path: Path) -> None:
    servers.redirects["/api/models/owner/name"] = f"{servers.storage_url}/api/models/owner/name"
    with pytest.raises((UserError, RunError)):
        download("hf:models/owner/name", tmp_path, token=TOKEN)
    elsewhere = [request for request in servers.requests if request.host == "storage"]
    assert elsewhere
    assert all(TOKEN not in str(request.headers) for request in elsewhere)


def test_a_password_in_an_address_stays_with_its_host(servers: Servers, tmp_path: Path) -> None:
    servers.redirects["/files/a.json"] = f"{servers.storage_url}/files/a.json"
    servers.stored["/files/a.json"] = b"[]"
    watch = Watch()
    with_password = servers.url.replace("//", "//user:secret@") + "/files/a.json?key=hush"
    done = download(with_password, tmp_path, watch)
    assert done.files[0].read_bytes() == b"[]"
    for request in servers.requests:
        assert ("authorization" in request.headers) == (request.host == "hub")
    kept = "".join(path.read_text() for path in tmp_path.iterdir())
    assert "secret" not in kept
    assert "hush" not in kept


@pytest.mark.parametrize(
    ("first", "then", "refused"),
    [
        ("http://93.184.216.34/a.json", "http://127.0.0.1/a.json", True),
        ("http://93.184.216.34/a.json", "http://[::1]/a.json", True),
        ("http://93.184.216.34/a.json", "http://192.168.1.1/a.json", True),
        ("http://93.184.216.34/a.json", "http://169.254.1.1/a.json", True),
        ("http://93.184.216.34/a.json", "//localhost/a.json", True),
        ("http://93.184.216.34/a.json", "/b.json", False),
        ("http://93.184.216.34/a.json", "http://1.1.1.1/a.json", False),
        ("http://127.0.0.1/a.json", "http://192.168.1.1/a.json", False),
    ],
)
def test_a_public_host_cannot_send_us_on_to_this_machine_or_its_network(
    first: str, then: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append(str(request.url))
        return httpx2.Response(302, headers={"location": then}) if len(asked) == 1 else httpx2.Response(200)

    made = httpx2.Client(transport=httpx2.MockTransport(answer), follow_redirects=True)
    monkeypatch.setattr("huggingface_hub.get_session", lambda: made)
    monkeypatch.setattr("huggingface_hub.set_client_factory", lambda factory: None)
    with pytest.raises(UserError, match="an address of this machine") if refused else contextlib.nullcontext():
        assert http_client().get(first).status_code == 200
    assert len(asked) == 2 - refused
