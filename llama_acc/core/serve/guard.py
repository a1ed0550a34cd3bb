"""Who may ask: what stands in front of every request, whatever it asks for."""

import ipaddress
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_BYTES = 32 << 20
"""Of a request's body."""
_TOO_LARGE = f"a request has at most {MOST_BYTES} bytes"


class Access(NamedTuple):
    """Who may ask."""

    key: str | None = None  # what requests have to bring, "Authorization: Bearer KEY"; None: nothing
    # Names by which the server may be called, in small letters. Addresses may be in any case: no name that somebody
    # else has made lead here (DNS rebinding)
    hosts: Sequence[str] = ("localhost",)
    origins: Sequence[str] = ()  # of pages that may ask (CORS), such as https://chat.example.org
    # That a body may have. A page elsewhere can send some others without asking first
    media_types: Sequence[str] = ("application/json",)


def error_response(status: int, message: str, code: str | None = None, param: str | None = None) -> JSONResponse:
    """An error in OpenAI's form."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "10"}}
    error = {"message": message, "type": kind, "param": param, "code": code}
    return JSONResponse({"error": error}, status, headers.get(status))


class Guard:
    """Refuses what may not be asked, and tells `done` the path and status of all others."""

    def __init__(self, app: ASGIApp, access: Access, done: Callable[[str, int], None]) -> None:
        self._app, self._access, self._done = app, access, done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See https://asgi.readthedocs.io."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refused = self._refused(scope["method"], scope["path"], Headers(scope=scope))
        if refused is not None:
            await refused(scope, receive, send)
            return
        received, status = 0, 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MOST_BYTES:
                raise HTTPException(413, _TOO_LARGE)
            return message

        async def noted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, counted, noted)
        finally:
            route: Any = scope.get("route")
            self._done(getattr(route, "path", "other"), status)

    def _refused(self, method: str, path: str, headers: Headers) -> JSONResponse | None:
        access = self._access
        if not _may_be_called(headers.get("host", ""), access.hosts):
            return error_response(403, "the Host header names another machine than this", "host_not_allowed")
        origin = headers.get("origin")
        if origin is not None and origin not in access.origins and origin.partition("://")[2] != headers.get("host"):
            return error_response(403, f"pages from {origin} may not ask", "origin_not_allowed")
        if access.key is not None and path != "/health":
            given = headers.get("authorization", "").encode()
            if not secrets.compare_digest(given, f"Bearer {access.key}".encode()):
                return error_response(401, "Authorization: Bearer with the server's key is needed", "invalid_api_key")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > MOST_BYTES:
            return error_response(413, _TOO_LARGE)
        if method == "POST" and headers.get("content-type", "").partition(";")[0].strip() not in access.media_types:
            return error_response(415, f"the body must be {' or '.join(access.media_types)}")
        return None


def _may_be_called(host: str, names: Sequence[str]) -> bool:
    """Whether a Host header, NAME or NAME:PORT, names this server."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    with suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    return name in names
