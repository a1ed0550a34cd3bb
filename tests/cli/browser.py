"""Pages in a real browser, which is kept from every host but the page's own."""

import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 15_000  # milliseconds; only a test that has failed waits so long


@contextmanager
def browsing() -> Iterator[Any]:
    """A browser's context: the tabs of one person. Skips where there is no browser."""
    api = pytest.importorskip("playwright.sync_api", reason="the extra dev brings it")
    program = next(filter(None, map(shutil.which, _NAMES)), None)
    if program is None:
        pytest.skip("there is no browser: apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        context = browser.new_context(accept_downloads=True)
        context.set_default_timeout(PATIENCE)
        api.expect.set_options(timeout=PATIENCE)
        asked_elsewhere: list[str] = []

        def own_host_only(route: Any) -> None:
            if route.request.url.startswith("http://127.0.0.1:"):
                route.continue_()
            else:
                asked_elsewhere.append(route.request.url)
                route.abort()

        context.route("**/*", own_host_only)
        yield context
        browser.close()
        assert not asked_elsewhere


@contextmanager
def served(page: Any) -> Iterator[str]:
    """The address of a page."""
    import uvicorn

    from llama_acc.core.web.site import make_app

    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(make_app(page), log_level="error"))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    finally:
        server.should_exit = server.force_exit = True
        thread.join()
