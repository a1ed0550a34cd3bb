"""Files at plain addresses."""

import contextlib
from collections.abc import Iterator
from pathlib import PurePosixPath

import httpx2

from llama_acc.core.download.address import WebAddress
from llama_acc.core.download.http import REACH_SECONDS, Stream, open_url, unreachable, within
from llama_acc.core.download.remote import Digest, Remote
from llama_acc.core.errors import UserError

_PAGES = (".html", ".htm", "")


def web_remote(
    client: httpx2.Client, address: WebAddress, name: str, size: int | None, digests: tuple[Digest, ...]
) -> Remote:
    """A file at a plain address; its host is asked once, which says at once if we are off-line.

    Args:
        client: see `http.make_client`.
        address: where it is.
        name: see `Remote`.
        size: bytes it has to have, if known.
        digests: see `Remote`.

    Raises:
        UserError: what is there is a web page.
        RunError: the host cannot be reached.
    """

    @contextlib.contextmanager
    def open_at(offset: int, validator: str | None) -> Iterator[Stream]:
        with open_url(client, address.url, offset, validator) as stream:
            yield stream

    about = within(REACH_SECONDS, address.host, lambda: _ask(client, address))
    return Remote(name, str(address), size, digests, open_at, address.identity, about)


def _ask(client: httpx2.Client, address: WebAddress) -> int | None:
    """The size the host gives; None if it does not say, or does not like the question."""
    try:
        response = client.head(address.url)
    except httpx2.HTTPError as error:
        raise unreachable(error, address.url) from error
    if not response.is_success:
        return None
    is_page = response.headers.get("content-type", "").startswith("text/html")
    if is_page and PurePosixPath(address.file_name).suffix.lower() not in _PAGES:
        raise UserError(
            f"{address} is a web page, not the file it shows",
            "give the address of the file itself: that of its button 'raw' or 'download'",
        )
    length = response.headers.get("content-length", "")
    return int(length) if length.isdecimal() and int(length) else None
