"""LoRA on a 7B-shaped base in NF4 of random weights: in memory, and streamed from its files below a limit of memory.

    python benchmarks/streaming.py --blocks 4 --tokens 2048 --limit 1.0 --resident-limit 4
    python benchmarks/streaming.py --blocks 32 --tokens 64 --steps 1 --limit 2.5 --ways streamed

Each way runs in a process of its own, in a control group of so many GB of 10^9 bytes (files kept in memory count
there, if the process was the first to read them); needs the right to make one. In turns, so that a busy machine slows
both. The base is made once, in --folder, and is then in the system's memory as far as there is room: `--cold` lets the
system forget it before each turn.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from llama_acc.core.checkpoint.layout import inspect
from llama_acc.core.checkpoint.load import load_parameters, read_weights
from llama_acc.core.checkpoint.quantized import Quantization
from llama_acc.core.checkpoint.save import TensorFile, TensorSpec, lay_out
from llama_acc.core.checkpoint.streaming import stream_blocks
from llama_acc.core.device import prepare_cpu
from llama_acc.core.distributed.groups import Parallel
from llama_acc.core.memory.simulate import empty_batch
from llama_acc.core.model import nf4
from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.transformer import Transformer, initialize, quantizable, shapes_of
from llama_acc.core.model.tuning.lora import LoRA
from llama_acc.core.train.plan import StepSettings
from llama_acc.core.train.step import train_step
from llama_acc.core.train.trainer import assemble

CPU = torch.device("cpu")
ADAMW = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0, "clip_grad_norm": 1.0}
FILE = "consolidated.00-of-01.model.pth"


def shape(blocks: int) -> ModelConfig:
    return ModelConfig(dim=4096, n_layers=blocks, n_heads=32, vocab_size=32000, multiple_of=256)


def make_base(folder: Path, config: ModelConfig) -> None:
    """Writes the base, of random weights: packed values and magnitudes are any bytes, scaled to what a model has."""
    folder.mkdir(parents=True)
    generator, names = torch.Generator().manual_seed(0), set(quantizable(config))
    values: dict[str, Any] = {}
    for name, (rows, *columns) in shapes_of(config).items():
        if name not in names:
            values[f"llma.{name}"] = (rows, *columns), torch.bfloat16
            continue
        matrix, room = name.removesuffix(".weight"), nf4.empty_scales(rows, columns[0], torch.device("meta"))
        values[f"llma.{name}"] = nf4.packed_shape(rows, columns[0]), torch.uint8
        values |= {f"llma.{matrix}.{leaf}": (tuple(one.shape), one.dtype) for leaf, one in room._asdict().items()}
    specs = {name: TensorSpec(*value) for name, value in values.items()}
    lay_out(folder / FILE, specs)
    with closing(TensorFile(folder / FILE, specs)) as file:
        for name, spec in specs.items():
            if spec.dtype == torch.uint8:
                tensor = torch.randint(256, spec.shape, dtype=torch.uint8, generator=generator)
            elif spec.dtype == torch.bfloat16 and len(spec.shape) == 2:
                tensor = 0.02 * torch.randn(spec.shape, generator=generator)
            else:
                tensor = torch.full(spec.shape, 1.0 if name.endswith("norm.weight") else 0.02)
            file.write(name, tensor.to(spec.dtype))
        file.seal()
    (folder / "config.json").write_text(json.dumps(config.to_params()))
    (folder / "meta.json").write_text(json.dumps({"llama_type": "llama"}))
    (folder / "quantization.json").write_bytes(Quantization((), "random").to_json())


def train(folder: Path, config: ModelConfig, streams: bool, tokens: int, steps: int) -> dict[str, float]:
    """Some optimizer steps of a micro-batch each, after one that is not timed if there are several."""
    prepare_cpu(not streams)
    settings = StepSettings(torch.bfloat16, (), False, True, 1, "ddp", False, ADAMW, stream_base=streams)
    streamed: list[Any] = []

    def materialize(model: Transformer) -> None:
        weights = read_weights([inspect(folder)])
        added = {name for name, _ in model.named_parameters()} - set(weights.tensors)
        if streams:
            streamed.append(stream_blocks(model, weights, CPU))
        model.to_empty(device=CPU)
        initialize(model, 0, added)
        load_parameters(model, weights)

    tuned = ModelConfig(**{**vars(config), "tuning": LoRA(16).with_num_layers(config.n_layers)})
    model, data_parallel, optimizer = assemble(tuned, settings, Parallel(), "cpu", materialize)
    batch, losses = empty_batch((512,) * (tokens // 512) or (tokens,)), list[float]()
    times, before, most = list[float](), reads(), [0]
    threading.Thread(target=follow_anonymous, args=(most,), daemon=True).start()
    for _ in range(steps + (steps > 1)):
        started = time.perf_counter()
        result = train_step(model, optimizer, data_parallel, [batch], tokens, 1e-4, CPU)
        losses.append(result.loss.item())
        times.append(time.perf_counter() - started)
    timed = times[len(times) - steps :]
    for stream in streamed:
        stream.close()
    return {
        "tokens_per_second": tokens * steps / sum(timed),
        "seconds_a_step": sum(timed) / steps,
        "read_gb_a_step": sum(stream.bytes_read for stream in streamed) / len(times) / 1e9,
        "from_disk_gb": (reads() - before) / 1e9,
        "anonymous_peak_gb": most[0] / 1e9,
        "resident_peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "loss": losses[-1],
    }


def follow_anonymous(most: list[int]) -> None:
    """Keeps the most memory that is of no file, looking every 20 ms."""
    while True:
        status = Path("/proc/self/status").read_text()
        most[0] = max(most[0], int(status.partition("RssAnon:")[2].split()[0]) * 1024)
        time.sleep(0.02)


def reads() -> int:
    """Bytes that this process had fetched from a disk."""
    return int(Path("/proc/self/io").read_text().partition("read_bytes:")[2].split()[0])


def make_group(limit: float) -> Path:
    """A control group below this process's own, of version 1 or 2."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        root = Path("/sys/fs/cgroup") / ("memory" if controllers == "memory" else "") / path[1:]
        name = "memory.limit_in_bytes" if controllers == "memory" else "memory.max"
        if controllers in ("", "memory") and root.is_dir():
            group = root / f"streaming-{os.getpid()}-{time.monotonic_ns()}"
            group.mkdir()
            if (group / name).exists():
                (group / name).write_text(str(int(limit * 1e9)))
                return group
            group.rmdir()
    raise SystemExit("no control group can be made here")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/streaming-base"))
    for name, default in (("blocks", 4), ("tokens", 2048), ("steps", 1), ("turns", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--limit", type=float, default=2.5)
    parser.add_argument("--resident-limit", type=float, default=8.0)
    parser.add_argument("--ways", nargs="+", default=["streamed", "resident"])
    parser.add_argument("--make", action="store_true", help="make the base, and nothing else")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    config, folder = shape(args.blocks), args.folder / f"{args.blocks}-blocks"
    if args.child:
        print(json.dumps(train(folder, config, args.child == "streamed", args.tokens, args.steps)))
        return
    if not folder.exists():
        make_base(folder, config)
    print(f"base: {(folder / FILE).stat().st_size / 1e9:.2f} GB, {args.blocks} blocks, {args.tokens} tokens")
    for _ in range(0 if args.make else args.turns):
        for way in args.ways:
            with (folder / FILE).open("rb") as file:
                if args.cold:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            group = make_group(args.limit if way == "streamed" else args.resident_limit)
            enter = ["sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "sh"]
            command = [*enter, sys.executable, *sys.argv, "--child", way]
            try:
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
                peak = next(group.glob("memory.max_usage_in_bytes"), group / "memory.peak")
                most = f", group's peak {int(peak.read_text()) / 1e9:.2f} GB" if peak.exists() else ""
            finally:
                group.rmdir()
            print(f"{way}: {done.stdout.strip() or f'ended with {done.returncode}'}{most}", flush=True)


if __name__ == "__main__":
    main()
