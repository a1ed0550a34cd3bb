"""Decoding and prefill on a CPU beside llama.cpp, in turns; each measurement is a process of its own.

pip install --no-binary llama-cpp-python llama-cpp-python     # with CMAKE_ARGS=-DGGML_NATIVE=ON, in any environment
llama-acc convert-checkpoint DIR GGUF --to gguf --gguf-type bf16
python benchmarks/beside_llama_cpp.py --ckpt DIR --gguf GGUF/model-bf16.gguf --python ENVIRONMENT/bin/python
python benchmarks/beside_llama_cpp.py ... --q4-0 --quantize nf4    # llama.cpp in Q4_0, ours in NF4
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PREFILL, PROMPT, NEW = 1024, 32, 128
TOKENS = [100 + 7 * place % 1000 for place in range(PREFILL)]


def timed(evaluate: Callable[[list[int]], object], reset: Callable[[], object]) -> dict[str, float]:
    """Tokens a second: of a prompt of 1,024 and, after one of 32, one at a time."""
    evaluate(TOKENS[:PROMPT])
    evaluate(TOKENS[:1])
    reset()
    started = time.perf_counter()
    evaluate(TOKENS)
    prefill = PREFILL / (time.perf_counter() - started)
    reset()
    evaluate(TOKENS[:PROMPT])
    started = time.perf_counter()
    for token in TOKENS[:NEW]:
        evaluate([token])
    return {"prefill": prefill, "decode": NEW / (time.perf_counter() - started)}


def theirs(args: argparse.Namespace) -> dict[str, float]:
    """In the environment that has llama-cpp-python."""
    import llama_cpp

    path = args.gguf
    if args.q4_0:
        path = Path(tempfile.gettempdir()) / f"{args.gguf.stem}-q4_0.gguf"
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
        if not path.exists():
            llama_cpp.llama_model_quantize(str(args.gguf).encode(), str(path).encode(), parameters)
    model = llama_cpp.Llama(
        str(path), n_ctx=2048, n_batch=512, n_threads=args.threads, n_threads_batch=args.threads, verbose=False
    )
    return timed(model.eval, model.reset)


def ours(args: argparse.Namespace) -> dict[str, float]:
    import torch

    from llama_acc import load_model
    from llama_acc.core.device import prepare_cpu
    from llama_acc.core.generate.decode_cpu import DecodeOnCPU
    from llama_acc.core.model.attention import KVCache
    from llama_acc.core.model.transformer import fuse_quantized

    prepare_cpu()
    torch.set_num_threads(args.threads)
    model = load_model(
        args.ckpt, device="cpu", dtype=getattr(torch, args.dtype), quantize=args.quantize, context=2048
    ).model
    cache = KVCache(model.config.n_layers, 2048)
    fuse_quantized(model, 1 << 62)
    step = DecodeOnCPU(model)

    @torch.inference_mode()
    def evaluate(tokens: list[int]) -> int:
        if len(tokens) == 1 and cache.length:  # as `Engine` does
            return int(step(tokens, [cache])[1])
        positions = torch.arange(cache.length, cache.length + len(tokens))
        hidden = model(torch.tensor(tokens), positions, [len(tokens)], caches=[cache])
        return int(model.logits(hidden[-1:]).argmax())

    return timed(evaluate, lambda: cache.truncate(0))


def measure(python: str, side: str) -> dict[str, float]:
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    command = [python, __file__, *sys.argv[1:], "--side", side]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(side, found, file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--python", default=sys.executable, help="that of the environment with llama-cpp-python")
    parser.add_argument("--q4-0", action="store_true", help="quantize the GGUF file first")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--quantize", default="none", choices=("nf4", "none"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps((ours if args.side == "ours" else theirs)(args)))
        return
    turns = [(measure(args.python, "theirs"), measure(sys.executable, "ours")) for _ in range(args.turns)]
    for kind in ("decode", "prefill"):
        medians = [statistics.median(turn[side][kind] for turn in turns) for side in (0, 1)]
        ratio = statistics.median(our[kind] / their[kind] for their, our in turns)
        print(f"{kind}: llama.cpp {medians[0]:.1f} tokens/s, llama-acc {medians[1]:.1f}, ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
