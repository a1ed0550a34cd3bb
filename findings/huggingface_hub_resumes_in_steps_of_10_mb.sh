#!/usr/bin/env bash
# huggingface_hub: over HTTP, a file that a connection lost in its first 10 MB is fetched from its first byte.
#
# One would expect: "Trying to resume download...", as its log says, asks for the bytes from the last that arrived on.
# What happens: a response is read in pieces of constants.DOWNLOAD_CHUNK_SIZE, 10 MB, and what has arrived of a piece is
# dropped with the connection. 3 MB of 5 arrived: the next request has no Range header. Of a larger file, up to 10 MB are
# fetched twice at each break, and progress bars move in steps of 10 MB: on a slow line, nothing for minutes.
# What follows: where lines are slow or break, set huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE to something smaller
# before downloading; with 256 KiB the same file is resumed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q huggingface_hub==2.4.0
export HF_HUB_DISABLE_XET=1 HF_HUB_DISABLE_TELEMETRY=1 HF_HOME="$folder/home"
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import hashlib
import logging
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.utils import disable_progress_bars, logging as hub_logging

CONTENT = bytes(range(256)) * 20_000  # 5.1 MB
ARRIVED = 3_000_000
asked = []


class Handler(BaseHTTPRequestHandler):
    """A hub with one file, whose first answer ends after 3 MB."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(0)

    def do_GET(self):
        begin = int(self.headers.get("range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        asked.append(begin)
        self.answer(begin)
        end = ARRIVED if len(asked) == 1 else len(CONTENT)
        self.wfile.write(CONTENT[begin:end])
        self.close_connection = end < len(CONTENT)

    def answer(self, begin):
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(CONTENT) - begin))
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.send_header("ETag", f'"{hashlib.sha256(CONTENT).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
hub_logging.set_verbosity(logging.CRITICAL)
disable_progress_bars()
print("huggingface_hub", huggingface_hub.__version__)


def download(chunk):
    asked.clear()
    constants.DOWNLOAD_CHUNK_SIZE = chunk
    url = f"http://127.0.0.1:{server.server_address[1]}"
    path = huggingface_hub.hf_hub_download("o/n", "a.bin", endpoint=url, local_dir=f"{sys.argv[1]}/{chunk}", token=False)
    assert open(path, "rb").read() == CONTENT
    print(f"pieces of {chunk:>10,} bytes: asked for from byte {asked}")
    return list(asked)


as_it_is = download(constants.DOWNLOAD_CHUNK_SIZE)
smaller = download(2**18)
as_seen = as_it_is == [0, 0] and smaller[0] == 0 and 0 < smaller[1] <= ARRIVED
print("as described" if as_seen else "the behavior changed")
sys.exit(0 if as_seen else 1)
PYTHON
