"""A server under load: many clients, prompts and answers of mixed lengths, some of which leave before the end.

    python benchmarks/serve_load.py --ckpt DIR [--clients 64] [--minutes 10] [--slots 16]

Starts `llama-acc serve` on a free port of loopback, asks every question alone first, then all clients at random. Fails
if an answer is another than alone (greedy), for any error but 429, or if the server's memory grows by more than 2% from
the middle to the end. Prints counts and memory as one line of JSON.
"""

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2

QUESTIONS = 24
WORDS = (
    "the",
    "answer",
    "is",
    "in",
    "question",
    "once",
    "upon",
    "a",
    "time",
    "little",
    "model",
    "wanted",
    "to",
    "learn",
)


def questions(seed: int) -> list[dict[str, Any]]:
    """Bodies of requests: prompts of 1 to 150 words, some of which begin alike, for 1 to 64 tokens."""
    chance = random.Random(seed)
    begin = " ".join(chance.choices(WORDS, k=60))
    bodies = []
    for _ in range(QUESTIONS):
        own = " ".join(chance.choices(WORDS, k=chance.choice((1, 5, 20, 90))))
        prompt = f"{begin} {own}" if chance.random() < 0.4 else own
        bodies.append({"prompt": prompt, "max_tokens": chance.choice((1, 8, 24, 64)), "temperature": 0})
    return bodies


async def ask(client: httpx2.AsyncClient, body: dict[str, Any], leaves: bool) -> str | int | None:
    """The answer's text, the status of a refusal, or None where this client left before the end."""
    async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        if response.status_code != 200:
            return response.status_code
        text = ""
        async for line in response.aiter_lines():
            if not line or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise RuntimeError(chunk["error"]["message"])
            text += chunk["choices"][0]["text"]
            if leaves and text:
                return None
    return text


def memory(process: int) -> int:
    """Resident bytes."""
    [kib] = re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{process}/status").read_text())
    return int(kib) * 1024


async def load(url: str, process: int, clients: int, seconds: float, requests: int) -> dict[str, Any]:
    """Asks for so long, or so many times where that is not 0."""
    counts: Counter[str] = Counter()
    halfway, started = 0, 0.0
    limits = httpx2.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx2.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        [model] = (await client.get("/v1/models")).json()["data"]
        bodies = [{"model": model["id"], **body} for body in questions(0)]
        alone = [await ask(client, body, False) for body in bodies]

        def share() -> float:
            return counts["requests"] / requests if requests else (time.monotonic() - started) / seconds

        async def one(number: int) -> None:
            nonlocal halfway
            chance = random.Random(number)
            while share() < 1:
                place = chance.randrange(len(bodies))
                answer = await ask(client, bodies[place], chance.random() < 0.15)
                if answer == 429:
                    counts["429"] += 1
                    await asyncio.sleep(chance.random())
                    continue
                counts["requests"] += 1
                if answer is None:
                    counts["left"] += 1
                elif answer == alone[place]:
                    counts["same as alone"] += 1
                else:
                    counts["other than alone" if isinstance(answer, str) else f"status {answer}"] += 1
                if not halfway and share() > 0.5:
                    halfway = memory(process)

        started = time.monotonic()
        await asyncio.gather(*map(one, range(clients)))
    taken, at_end = time.monotonic() - started, memory(process)
    figures = {"seconds": round(taken, 1)}
    sizes = {"memory halfway": halfway, "memory at the end": at_end, "grown": round(at_end / halfway - 1, 4)}
    return {**counts, **figures, **sizes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--requests", type=int, default=0, help="so many in place of minutes")
    parser.add_argument("--slots", type=int, default=16)
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "llama_acc", "serve", "--ckpt", arguments.ckpt, "--port", "0"]
    command += ["--slots", str(arguments.slots), "--queue", str(arguments.clients // 2), "--context", "1024"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        url = next(found[1] for line in server.stderr if (found := re.search(r" at (http://\S+)/v1 ", line)))
        drained = subprocess.Popen(["cat"], stdin=server.stderr, stdout=subprocess.DEVNULL)
        try:
            found = asyncio.run(load(url, server.pid, arguments.clients, arguments.minutes * 60, arguments.requests))
        finally:
            server.terminate()
            server.wait()
            drained.wait()
    print(json.dumps(found))
    good = {"requests", "left", "429", "same as alone", "seconds"}
    if not found.keys() <= good | {"memory halfway", "memory at the end", "grown"} or found["grown"] > 0.02:
        sys.exit("the server has failed under load")


if __name__ == "__main__":
    main()
