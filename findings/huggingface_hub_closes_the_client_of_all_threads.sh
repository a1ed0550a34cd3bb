#!/usr/bin/env bash
# huggingface_hub: a connection that one thread is refused ends the requests of all other threads.
#
# One would expect: get_session() gives one httpx client "shared between all calls", and http_backoff tries again after
# an error of the network; what other threads have on its way goes on.
# What happens: on a ConnectError, of which a refused connection is one, http_backoff closes the shared client. A file
# that another thread is receiving ends in a ReadError ("Bad file descriptor"), a request by a client taken from
# get_session() before in a RuntimeError ("the client has been closed"), which nothing tries again. Event hooks that
# were added to the client are not on the next one.
# What follows: with several threads, keep one client: give it a close() that does nothing, and
# set_client_factory(lambda: client).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q huggingface_hub==2.4.0
export HF_HUB_DISABLE_TELEMETRY=1 HF_HOME="$folder/home"
"$folder/venv/bin/python" - <<'PYTHON'
import logging
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
from huggingface_hub import get_session
from huggingface_hub.utils import http_backoff
from huggingface_hub.utils import logging as hub_logging

go_on = threading.Event()


class Handler(BaseHTTPRequestHandler):
    """A file of 2 MB, of which the second half waits."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(2 * 2**20))
        self.end_headers()
        self.wfile.write(bytes(2**20))
        go_on.wait(30)
        self.wfile.write(bytes(2**20))


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
server.handle_error = lambda *_: None
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_address[1]}"
hub_logging.set_verbosity(logging.CRITICAL)
print("huggingface_hub", huggingface_hub.__version__)


def receive():
    """What becomes of a file while another request is refused, and of the next request by the same client."""
    go_on.clear()
    client, said = get_session(), []
    try:
        with client.stream("GET", url) as response:
            with socket.socket() as taken:
                taken.bind(("127.0.0.1", 0))  # and does not listen
                nowhere = f"http://127.0.0.1:{taken.getsockname()[1]}"
                other = threading.Thread(target=refused, args=(nowhere,))
                other.start()
                other.join()
            go_on.set()
            said.append(f"{len(response.read())} bytes")
    except Exception as error:
        said.append(f"{type(error).__name__}: {error}")
    try:
        said.append(f"{len(client.get(url).content)} bytes")
    except Exception as error:
        said.append(f"{type(error).__name__}: {error}")
    return said


def refused(address):
    try:
        http_backoff("GET", address, max_retries=0)
    except Exception as error:
        print(f"the other thread: {type(error).__name__}")


as_it_is = receive()
kept = get_session()
kept.close = lambda: None
huggingface_hub.set_client_factory(lambda: kept)
with_one_client = receive()
print("as it is:       ", as_it_is)
print("with one client:", with_one_client)
as_seen = (
    as_it_is[0].startswith("ReadError")
    and "client has been closed" in as_it_is[1]
    and with_one_client == ["2097152 bytes"] * 2
)
print("as described" if as_seen else "the behavior changed")
sys.exit(0 if as_seen else 1)
PYTHON
