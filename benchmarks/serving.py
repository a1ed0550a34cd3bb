"""Tokens a second of several clients together, from `llama-acc serve` and `transformers serve`, in turns; and what the
memory's bandwidth would allow.

    python benchmarks/serving.py --ckpt smollm2 --huggingface smollm2-hf [--dtype float32] [--clients 1 4 16]

Both folders hold the same weights (`llama-acc convert-checkpoint smollm2 smollm2-hf --to hf`). Each client asks for one
story by a prompt of its own, greedy, of at most 128 new tokens, and all ask at once; what counts is
the tokens that the servers say they made, from the first question to the last answer. Each turn starts each server
anew, and asks it once before. `--only llama-acc` leaves transformers out (extra `serving` of transformers).
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

NEW_TOKENS = 128
_WORDS = ["river", "clock", "garden", "letter", "winter", "lantern", "village", "music", "stone", "bridge", "orchard"]
_START = 300.0  # seconds a server may take to start


def prompt(number: int, length: int) -> str:
    """A request for a story of so many words, which differs from the others' from the first word on."""
    words = [_WORDS[(number * 7 + place * (number + 3)) % len(_WORDS)] for place in range(70)]
    return f"{words[0]} number {number}: write a very long story with these words: {', '.join(words[:length])}."


def bandwidth() -> float:
    """Bytes a second that a sum of 1 GiB reads, the best of five times."""
    import torch

    numbers, best = torch.ones(2**28), 0.0
    for _ in range(5):
        start = time.perf_counter()
        numbers.sum()
        best = max(best, numbers.nbytes / (time.perf_counter() - start))
    return best


def command(name: str, args: argparse.Namespace, port: int) -> list[str]:
    """How a server is started."""
    if name == "llama-acc":
        serve = [sys.executable, "-m", "llama_acc", "serve", "--ckpt", str(args.ckpt), "--device", "cpu"]
        return [*serve, "--port", str(port), "--slots", str(max(args.clients)), "--context", "1024"]
    serve = [str(Path(sys.executable).with_name("transformers")), "serve", str(args.huggingface), "--device", "cpu"]
    # Without a number of blocks its cache takes most of the machine's memory.
    room = ["--cb-block-size", "32", "--cb-num-blocks", "128", "--cb-max-batch-tokens", "512"]
    return [*serve, "--port", str(port), "--continuous-batching", "--dtype", args.dtype, *room]


def post(port: int, model: str, text: str, most: int) -> int:
    """Asks for one answer. Returns its number of tokens."""
    body = {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": most}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.load(answer)["usage"]["completion_tokens"]


@contextmanager
def server(name: str, args: argparse.Namespace) -> Iterator[tuple[int, str]]:
    """Runs one; its port, and the name of its model."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(args.threads)}
    with subprocess.Popen(command(name, args, port), env=environment, stdout=args.log, stderr=args.log) as process:
        try:
            model, deadline = "", time.monotonic() + _START
            while not model:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"{name} did not start: see {args.log.name}")
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5) as answer:
                        model = json.load(answer)["data"][0]["id"] if name == "llama-acc" else str(args.huggingface)
                except OSError:
                    time.sleep(0.5)
            yield port, model
        finally:
            process.terminate()


def turn(name: str, args: argparse.Namespace) -> dict[int, float]:
    """Tokens a second by the number of clients."""
    found = {}
    with server(name, args) as (port, model):
        post(port, model, "Hello", 4)
        for clients in args.clients:
            with ThreadPoolExecutor(clients) as pool:
                start = time.perf_counter()
                # Other prompts for each number of clients: what was computed before would be reused.
                texts = [prompt(100 * clients + n, args.words) for n in range(clients)]
                asked = [pool.submit(post, port, model, text, NEW_TOKENS) for text in texts]
                tokens = sum(one.result() for one in asked)
            found[clients] = tokens / (time.perf_counter() - start)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", type=Path, required=True, help="of this type, for llama-acc")
    parser.add_argument("--huggingface", type=Path, help="the same weights, for transformers")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--words", type=int, default=42, help="in each prompt: 131 tokens with 42, 51 with 2")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", choices=["llama-acc", "transformers"])
    parser.add_argument("--log", type=argparse.FileType("a"), default="serving.log", help="what the servers say")
    args = parser.parse_args()
    names = [args.only] if args.only else ["llama-acc", "transformers"]
    speeds: dict[str, list[dict[int, float]]] = {name: [] for name in names}
    for number in range(args.turns):
        for name in names if number % 2 == 0 else reversed(names):
            speeds[name].append(turn(name, args))
            said = ", ".join(f"{clients}: {speed:.1f}" for clients, speed in speeds[name][-1].items())
            print(f"turn {number + 1}, {name}, tokens/s by clients: {said}", flush=True)
    for name, found in speeds.items():
        ratios = {n: statistics.median(one[n] / one[args.clients[0]] for one in found) for n in args.clients}
        print(f"{name}, over {args.clients[0]} client:", {n: round(ratio, 2) for n, ratio in ratios.items()})
    if len(names) == 2:
        pairs = list(zip(*speeds.values(), strict=True))
        over = {n: statistics.median(ours[n] / theirs[n] for ours, theirs in pairs) for n in args.clients}
        print("llama-acc over transformers:", {n: round(ratio, 2) for n, ratio in over.items()})
    print(f"bandwidth: {bandwidth() / 1e9:.1f} GB/s")


if __name__ == "__main__":
    main()
