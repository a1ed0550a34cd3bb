"""Servers that speak to the real clients: a Hugging Face hub with a storage host of its own, and plain files.

On 127.0.0.1, with threads. What goes wrong is said per file, for its next answers: see `Fault`.
"""

import base64
import contextlib
import hashlib
import json
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_correcthorsebatterystaple"
READ_TOKEN = "hf_mayread"
"""Of the same account, `me`, which is a member of `team`."""
_PIECE = 1 << 16


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one answer that gives a file's bytes.

    Attributes:
        status: answered in place of 200, without bytes.
        cut: the connection is cut after so many bytes.
        stall: nothing more comes after so many bytes.
        delay: seconds before each piece of 64 KiB.
        content: is sent in place of the right bytes.
    """

    status: int | None = None
    cut: int | None = None
    stall: int | None = None
    delay: float = 0.0
    content: bytes | None = None


@dataclass
class Repo:
    """A repository. `large` files are kept by the storage host; `xet` gives the hash of those it also has as chunks;
    `locked` ones may be read only."""

    files: dict[str, bytes]
    gated: bool = False
    private: bool = False
    large: int = 1000
    xet: dict[str, str] = field(default_factory=dict)
    locked: bool = False


@dataclass(frozen=True)
class Request:
    """What a server was asked."""

    host: str
    method: str
    path: str
    headers: dict[str, str]


class Servers:
    """A hub, its storage host, and plain files beside it."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.plain: dict[str, bytes] = {}
        self.stored: dict[str, bytes] = {}
        self.uploaded: dict[str, bytes] = {}
        self.before_upload: Callable[[], object] = lambda: None
        self.before_bytes: Callable[[], object] = lambda: None
        self.plain_headers: dict[str, dict[str, str]] = {}
        self.redirects: dict[str, str] = {}
        self.faults: dict[str, deque[Fault]] = defaultdict(deque)
        self.requests: list[Request] = []
        self.sent: dict[str, int] = defaultdict(int)
        self.xet_storage = ""
        self._released = threading.Event()
        self._hub = _serve(self, "hub")
        self._storage = _serve(self, "storage")
        self.url = f"http://127.0.0.1:{self._hub.server_address[1]}"
        self.storage_url = f"http://127.0.0.1:{self._storage.server_address[1]}"

    def close(self) -> None:
        """Stops both."""
        self._released.set()
        for server in (self._hub, self._storage):
            server.shutdown()
            server.server_close()

    def model(self, name: str, files: dict[str, bytes], **options: Any) -> Repo:
        """Adds a model."""
        return self.repos.setdefault(("model", name), Repo(files, **options))

    def dataset(self, name: str, files: dict[str, bytes], **options: Any) -> Repo:
        """Adds a data set."""
        return self.repos.setdefault(("dataset", name), Repo(files, **options))

    def fail(self, name: str, *faults: Fault) -> None:
        """Lets the next answers with the bytes of a file (its last name) go wrong, one after the other."""
        self.faults[name].extend(faults)

    def asked_for_bytes(self, name: str) -> list[Request]:
        """Every GET of a file's bytes, of the host that has them."""
        gets = [request for request in self.requests if request.method == "GET"]
        return [request for request in gets if unquote(urlsplit(request.path).path).rpartition("/")[2] == name]

    def wait_released(self) -> None:
        """Hangs as a silent server does, until the test lets go or is over."""
        self._released.wait(30)

    def release(self) -> None:
        """Lets go of the connections that hang."""
        self._released.set()


@contextlib.contextmanager
def running() -> Iterator[Servers]:
    """Servers for the time of a test."""
    servers = Servers()
    try:
        yield servers
    finally:
        servers.close()


def _serve(servers: Servers, host: str) -> ThreadingHTTPServer:
    class Handler(_Handler):
        def __init__(self, *arguments: Any) -> None:
            self.servers, self.host = servers, host
            super().__init__(*arguments)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *details: None  # type: ignore[method-assign]  # clients that leave are no error here
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    servers: Servers
    host: str

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        headers = {key.lower(): value for key, value in self.headers.items()}
        self.servers.requests.append(Request(self.host, self.command, self.path, headers))
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        if self.command in ("POST", "PUT"):
            self._write(path)
        elif self.host == "storage":
            self._storage(path, parse_qs(parts.query))
        elif path in self.servers.redirects:
            self._empty(302, {"Location": self.servers.redirects[path]})
        elif path in self.servers.plain:
            self._bytes(path, self.servers.plain[path], self.servers.plain_headers.get(path, {}))
        elif path.startswith("/api/"):
            self._api(path, parse_qs(parts.query))
        elif "/resolve/" in path:
            self._resolve(path)
        else:
            self._empty(404)

    # The hub's questions and answers

    def _api(self, path: str, query: dict[str, list[str]]) -> None:
        kinds = {"models": "model", "datasets": "dataset"}
        words = path.split("/")[2:]
        if words == ["whoami-v2"]:
            self._who()
            return
        if words[0] not in kinds:
            self._empty(404)
            return
        kind = kinds[words[0]]
        if len(words) == 1:
            author = query.get("author", [""])[0]
            public = [key for key, repo in self.servers.repos.items() if not repo.private]
            known = [name for k, name in public if k == kind and name.split("/")[0] == author]
            self._json([{"id": name, "modelId": name} for name in known])
            return
        name = "/".join(words[1:3])
        repo = self._repo(kind, name)
        if repo is None:
            return
        if words[3:4] == ["tree"]:
            self._tree(repo, "/".join(words[5:]), query)
        elif words[3:] == ["auth-check", "write"]:
            self._empty(403 if repo.locked else 200)
        elif words[3:4] == ["xet-read-token"]:
            self._xet_token()
        elif words[3:] in ([], ["revision", "main"], ["revision", COMMIT]):
            gated = "manual" if repo.gated else False
            self._json({"id": name, "sha": COMMIT, "gated": gated, "private": repo.private, "tags": [], "siblings": []})
        else:
            self._empty(404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})

    def _repo(self, kind: str, name: str) -> Repo | None:
        repo = self.servers.repos.get((kind, name))
        token = self.headers.get("authorization", "").removeprefix("Bearer ")
        if token and not token.startswith("hf_"):
            self._empty(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
            return None
        if repo is None or (repo.private and token != TOKEN):
            status = 404 if token else 401
            self._empty(status, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
            return None
        return repo

    def _tree(self, repo: Repo, folder: str, query: dict[str, list[str]]) -> None:
        prefix = f"{folder}/" if folder else ""
        inside = [path for path in repo.files if path.startswith(prefix)]
        if not inside and folder:
            self._empty(404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "not found"})
            return
        deep = query.get("recursive", ["false"])[0].lower() == "true"
        entries = [_entry(repo, path) for path in inside if deep or "/" not in path.removeprefix(prefix)]
        folders = {
            prefix + path.removeprefix(prefix).split("/")[0] for path in inside if "/" in path.removeprefix(prefix)
        }
        entries += [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)]
        # Two at a time, so that every listing has pages.
        begin = int(query.get("cursor", ["0"])[0])
        more = begin + 2 < len(entries)
        recursive = query.get("recursive", ["false"])[0]
        path = urlsplit(self.path).path
        link = f'<{self.servers.url}{path}?recursive={recursive}&cursor={begin + 2}>; rel="next"'
        self._json(entries[begin : begin + 2], {"Link": link} if more else {})

    def _xet_token(self) -> None:
        expires = int(time.time()) + 3600
        storage = self.servers.xet_storage
        headers = {
            "X-Xet-Cas-Url": storage,
            "X-Xet-Access-Token": "short-lived",
            "X-Xet-Token-Expiration": str(expires),
        }
        self._json({"casUrl": storage, "exp": expires, "accessToken": "short-lived"}, headers)

    def _resolve(self, path: str) -> None:
        where, _, rest = path.lstrip("/").partition("/resolve/")
        kind, name = ("dataset", where.removeprefix("datasets/")) if where.startswith("datasets/") else ("model", where)
        revision, _, file = rest.partition("/")
        repo = self._repo(kind, name)
        if repo is None:
            return
        token = self.headers.get("authorization", "").removeprefix("Bearer ")
        if repo.gated and token != TOKEN:
            said = "you are not in the authorized list" if token else "you must be authenticated"
            self._empty(403 if token else 401, {"X-Error-Code": "GatedRepo", "X-Error-Message": said})
            return
        if file not in repo.files or revision not in ("main", COMMIT):
            self._empty(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        content = repo.files[file]
        entry = _entry(repo, file)
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{entry["oid"]}"'}
        if len(content) < repo.large:
            self._bytes(file, content, headers)
            return
        if file in repo.xet:
            route = f"{self.servers.url}/api/{kind}s/{name}/xet-read-token/{COMMIT}"
            headers |= {"X-Xet-Hash": repo.xet[file], "X-Xet-Refresh-Route": route}
        headers |= {"X-Linked-Etag": f'"{entry["lfs"]["oid"]}"', "X-Linked-Size": str(len(content))}
        query = f"kind={kind}&repo={quote(name)}&file={quote(file)}&signature=secret"
        self._empty(302, {**headers, "Location": f"{self.servers.storage_url}/stored/{quote(file)}?{query}"})

    def _storage(self, path: str, query: dict[str, list[str]]) -> None:
        if "authorization" in self.headers:  # as signed addresses of S3 do
            self._empty(400)
            return
        if path in self.servers.stored:
            self._bytes(path, self.servers.stored[path], {})
            return
        repo = self.servers.repos[query["kind"][0], query["repo"][0]]
        file = query["file"][0]
        self._bytes(file, repo.files[file], {"ETag": f'"{hashlib.sha256(repo.files[file]).hexdigest()}"'})

    # What is pushed

    def _write(self, path: str) -> None:
        body = self._body()
        if self.host == "storage":
            self.servers.before_upload()
            self.servers.uploaded[path.rpartition("/")[2]] = body
            self._empty(200)
            return
        if self.headers.get("authorization") != f"Bearer {TOKEN}":
            self._empty(403)
            return
        words = path.strip("/").split("/")
        if words == ["api", "validate-yaml"]:
            is_card = json.loads(body)["content"].startswith("---\n")
            self._json({"errors": [], "warnings": []} if is_card else {"errors": [{"message": "no header"}]})
        elif words == ["api", "repos", "create"]:
            self._create(json.loads(body))
        elif words[2:] == ["info", "lfs", "objects", "batch"]:
            self._json({"transfer": "basic", "objects": [self._upload_of(one) for one in json.loads(body)["objects"]]})
        else:
            name = "/".join(words[2:4])
            repo = self.servers.repos["model", name]
            if words[4] == "preupload":
                self._json({"files": [_mode(repo, file) for file in json.loads(body)["files"]]})
            else:
                self._commit(repo, name, [json.loads(line) for line in body.splitlines()])

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("transfer-encoding", ""):
            return self.rfile.read(int(self.headers.get("content-length", "0")))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size + 2)[:-2]
        self.rfile.readline()
        return body

    def _who(self) -> None:
        token = self.headers.get("authorization", "").removeprefix("Bearer ")
        if token not in (TOKEN, READ_TOKEN):
            self._empty(401)
            return
        role = "write" if token == TOKEN else "read"
        orgs = [{"name": "team", "roleInOrg": "write"}]
        self._json({"name": "me", "orgs": orgs, "auth": {"accessToken": {"role": role}}})

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.servers.url}/{name}"}
        if ("model", name) in self.servers.repos:
            self._json({**url, "error": "You already created this model repo"}, status=409)
            return
        self.servers.model(name, {".gitattributes": b""}, private=asked.get("visibility") == "private")
        self._json(url)

    def _upload_of(self, asked: dict[str, Any]) -> dict[str, Any]:
        href = f"{self.servers.storage_url}/upload/{asked['oid']}"
        is_there = asked["oid"] in self.servers.uploaded
        return {**asked, **({} if is_there else {"actions": {"upload": {"href": href}}})}

    def _commit(self, repo: Repo, name: str, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repo.files[value["path"]] = self.servers.uploaded[value["oid"]]
        self._json({"commitUrl": f"{self.servers.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT, "success": True})

    # Bytes

    def _bytes(self, path: str, content: bytes, headers: dict[str, str]) -> None:
        name = path.rpartition("/")[2]
        waiting = self.servers.faults[name]
        fault = waiting.popleft() if waiting and self.command == "GET" else Fault()
        if fault.status is not None:
            self._empty(fault.status)
            return
        content = content if fault.content is None else fault.content
        begin = self._first_byte(headers)
        if begin is not None and begin >= len(content):
            self._empty(416, {"Content-Range": f"bytes */{len(content)}"})
            return
        self.send_response(200 if begin is None else 206)
        for key, value in {"Accept-Ranges": "bytes", **headers}.items():
            self.send_header(key, value)
        if begin is not None:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        body = content[begin or 0 :]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.servers.before_bytes()
            self._send(name, body, fault)

    def _first_byte(self, headers: dict[str, str]) -> int | None:
        asked = self.headers.get("range", "")
        if not asked.startswith("bytes="):
            return None
        if "if-range" in self.headers and self.headers["if-range"] not in headers.values():
            return None
        return int(asked.removeprefix("bytes=").partition("-")[0])

    def _send(self, name: str, body: bytes, fault: Fault) -> None:
        end = min(n for n in (len(body), fault.cut, fault.stall) if n is not None)
        for begin in range(0, end, _PIECE):
            time.sleep(fault.delay)
            piece = body[begin : min(begin + _PIECE, end)]
            self.wfile.write(piece)
            self.servers.sent[name] += len(piece)
        self.wfile.flush()
        if fault.stall is not None and fault.stall <= end:
            self.servers.wait_released()
        if end < len(body):
            self.close_connection = True
            self.connection.close()

    def _json(self, value: Any, headers: dict[str, str] | None = None, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for key, text in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _empty(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, text in (headers or {}).items():
            self.send_header(key, text)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _mode(repo: Repo, asked: dict[str, Any]) -> dict[str, Any]:
    """How a file is to be uploaded; git's identity of the one there, or, if that is large, its SHA-256."""
    entry = _entry(repo, asked["path"]) if asked["path"] in repo.files else {}
    mode = "lfs" if asked["size"] >= repo.large else "regular"
    return {"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": entry.get("lfs", entry).get("oid")}


def _entry(repo: Repo, path: str) -> dict[str, Any]:
    """A file of a listing, as the hub describes it."""
    content = repo.files[path]
    sha256 = hashlib.sha256(content).hexdigest()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": blob}
    if len(content) >= repo.large:
        entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 134}
    if path in repo.xet:
        entry["xetHash"] = repo.xet[path]
    return entry
