"""Bytes over HTTP from an offset on, and what its failures mean."""

import contextlib
import email.utils
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import httpx2

from llama_acc import __version__
from llama_acc.core.errors import LlamaAccError, RunError, UserError

REACH_SECONDS = 7.0
"""Within this time a host has to be found and to take the connection; else we are off-line."""
_CONNECT_SECONDS = 6.0
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
_NETWORK_ERRORS = (httpx2.TimeoutException, httpx2.NetworkError, httpx2.ProtocolError, httpx2.DecodingError)
# Python puts the number of a system's error in front of its words.
_ERROR_NUMBER = re.compile(r"^\[Errno -?\d+\] ")
_Answer = TypeVar("_Answer")


class Transient(Exception):
    """A failure that may pass: the network, or a server that is busy.

    Attributes:
        wait: seconds the server asks to wait, if it says so.
    """

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


@dataclass(frozen=True)
class Stream:
    """Bytes that are arriving.

    Attributes:
        offset: where in the file they begin; 0 if the server does not go on where it was asked to.
        total: size of the whole file, if the server says it.
        validator: ETag or date by which the server knows the file again.
        chunks: the bytes.
    """

    offset: int
    total: int | None
    validator: str | None
    chunks: Iterator[bytes]


def make_client() -> httpx2.Client:
    """A client for all files of a download: redirects, proxies from the environment, time limits.

    A redirect to another host goes there without the Authorization header: the library sees to that.
    """
    read = float(os.environ.get("HF_HUB_DOWNLOAD_TIMEOUT") or 30.0)
    return httpx2.Client(
        follow_redirects=True,
        timeout=httpx2.Timeout(read, connect=_CONNECT_SECONDS),
        # Sizes and ranges are those of the file itself only if nothing compresses it on the way.
        headers={"user-agent": f"llama-acc/{__version__}", "accept-encoding": "identity"},
    )


@contextlib.contextmanager
def open_url(
    client: httpx2.Client,
    url: str,
    offset: int,
    validator: str | None = None,
    headers: dict[str, str] | None = None,
    explain: Callable[[httpx2.Response], LlamaAccError] | None = None,
) -> Iterator[Stream]:
    """Asks for a file from `offset` on.

    Args:
        client: see `make_client`.
        url: its address.
        offset: bytes that are here already.
        validator: of these bytes: a file that has changed since is sent whole.
        headers: more headers; Authorization goes to the address's own host only.
        explain: what a refusal (4xx) means.

    Raises:
        Transient: it may work later.
        UserError: the server refuses.
    """
    asked = {**(headers or {})}
    if offset:
        asked["range"] = f"bytes={offset}-"
        if validator:
            asked["if-range"] = validator
    try:
        with client.stream("GET", url, headers=asked) as response:
            yield _stream(response, offset, explain or _refusal)
    except (*_NETWORK_ERRORS, httpx2.TooManyRedirects) as error:
        raise Transient(describe(error, url)) from error
    except httpx2.UnsupportedProtocol as error:
        raise UserError(f"{_host(url)} sends on to an address that cannot be fetched: {error}") from error


def _stream(response: httpx2.Response, offset: int, explain: Callable[[httpx2.Response], LlamaAccError]) -> Stream:
    if response.status_code == 416:  # there is nothing behind the offset
        total = _total_of_range(response)
        return Stream(offset if total == offset else 0, total, None, iter(()))
    if response.status_code in TRANSIENT:
        said = f"{response.url.host} answers {response.status_code} {response.reason_phrase}"
        raise Transient(said, retry_after(response.headers.get("retry-after")))
    if response.status_code >= 400:
        raise explain(response)
    encoded = response.headers.get("content-encoding", "identity") != "identity"
    if response.status_code == 206:
        total, begins = _total_of_range(response), _begin_of_range(response)
        if begins != offset:
            raise Transient(f"{response.url.host} was asked for byte {offset} and sends byte {begins}")
        return Stream(offset, total, _validator(response), response.iter_bytes())
    length = response.headers.get("content-length")
    total = int(length) if length and not encoded else None
    return Stream(0, total, _validator(response), response.iter_bytes())


def _total_of_range(response: httpx2.Response) -> int | None:
    total = response.headers.get("content-range", "").rpartition("/")[2]
    return int(total) if total.isdecimal() else None


def _begin_of_range(response: httpx2.Response) -> int | None:
    begin = response.headers.get("content-range", "").removeprefix("bytes ").partition("-")[0].strip()
    return int(begin) if begin.isdecimal() else None


def _validator(response: httpx2.Response) -> str | None:
    """What If-Range accepts: a strong ETag, else the date of the last change."""
    etag: str = response.headers.get("etag", "")
    if etag and not etag.startswith("W/"):
        return etag
    changed: str | None = response.headers.get("last-modified")
    return changed


def _refusal(response: httpx2.Response) -> LlamaAccError:
    """What a plain server's refusal means."""
    where, code = public_url(str(response.url)), response.status_code
    if code in (404, 410):
        return UserError(f"there is nothing at {where} ({code})", "check the address; does it open in a browser?")
    if code in (401, 403):
        return UserError(
            f"{response.url.host} does not give out {where} ({code})",
            "it may want a login: fetch it with a browser, and give finetune the file",
        )
    return RunError(f"{response.url.host} refuses {where}: {code} {response.reason_phrase}")


def retry_after(value: str | None) -> float | None:
    """Seconds a Retry-After header asks to wait: it holds seconds or a date."""
    if not value:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def describe(error: Exception, url: str) -> str:
    """A failure of the network in one line."""
    host = _host(url)
    if isinstance(error, httpx2.ConnectTimeout | httpx2.ConnectError | httpx2.PoolTimeout):
        return f"{host} cannot be reached: {_said(error)}"
    if isinstance(error, httpx2.TimeoutException):
        return f"{host} sends nothing any more"
    if isinstance(error, httpx2.ProxyError):
        return f"the proxy does not reach {host}: {error}"
    return f"the connection to {host} broke: {error or type(error).__name__}"


def public_url(url: str) -> str:
    """An address without what may be secret in it: user, password, query."""
    parts = httpx2.URL(url)
    return str(parts.copy_with(username="", password="", query=None, fragment=None)).replace("//:@", "//")


def _host(url: str) -> str:
    return httpx2.URL(url).host


def within(seconds: float, host: str, ask: Callable[[], _Answer]) -> _Answer:
    """The first question to a host, given up after `seconds`: looking a name up has no time limit of its own.

    Raises:
        RunError: no answer; we are off-line, or it is.
        Exception: whatever `ask` raises.
    """
    answers: list[_Answer] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            answers.append(ask())
        except Exception as error:  # whatever it is, the thread that waits raises it
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not answers:
        raise _offline(host, f"no answer within {seconds:g} s")
    return answers[0]


def unreachable(error: Exception, url: str) -> RunError:
    """What the first question to a host ended with: we are off-line, or it is, or someone stands in between."""
    host = _host(url)
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return RunError(
            f"{host} does not prove to be {host}: {error}",
            "does a firewall look into connections here? Name its certificate in SSL_CERT_FILE",
        )
    return _offline(host, _said(error))


def _said(error: Exception) -> str:
    return _ERROR_NUMBER.sub("", str(error)) or "no answer"


def _offline(host: str, why: str) -> RunError:
    return RunError(
        f"{host} cannot be reached: {why}",
        "is this machine on-line? A proxy is taken from HTTPS_PROXY, a mirror of Hugging Face from HF_ENDPOINT",
    )
