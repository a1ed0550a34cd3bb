"""A download comes to its end whatever the network does, is checked, and is never there in part."""

import contextlib
import hashlib
import json
import socket
import threading
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest
from huggingface_hub import constants, get_session
from huggingface_hub.utils import http_backoff

from llama_acc.core.catalogue import DownloadRequest, File
from llama_acc.core.errors import RunError, UserError
from llama_acc.core.hub import Downloader
from llama_acc.core.hugging_face import http_client
from tests.core.downloading import Watch, download, visible
from tests.hub import TOKEN, Fault, Servers

# 700 KB: eleven pieces of a server's answer.
CONTENT = b"".join(hashlib.sha256(b"%d" % i).digest() for i in range(22_000))
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
