"""Loading a 2.2 GB bf16 checkpoint (1.1 billion parameters) from the page cache: ours, and torch's plain way, in turns.

`nf4` is ours with the same model saved in four bits, `quantized` with the matrices quantized as they are read.

    python benchmarks/loading.py --tokenizer tokenizer.model [--folder DIR] [--rounds 3]

Each load is a process of its own; importing torch is not counted. `plain` builds the model, reads the file and copies
it in (`torch.load` without mapping, then `load_state_dict`). Ours maps the file, so `with_first_token` adds an answer
of one token, which reads every weight. Prints one JSON line for each load, then the medians.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PARAMS = {"dim": 2048, "n_layers": 22, "n_heads": 32, "n_kv_heads": 4, "vocab_size": 32000, "multiple_of": 256,
          "ffn_dim_multiplier": 1.0314, "norm_eps": 1e-5}  # fmt: skip


NAMES = ("ours", "plain", "nf4", "quantized")


def make_checkpoint(folder: Path, tokenizer: Path) -> None:
    """Random weights in Meta's layout."""
    import torch

    from llama_acc.core.model.config import config_from_params
    from llama_acc.core.model.transformer import shapes_of

    folder.mkdir(parents=True, exist_ok=True)
    shapes = shapes_of(config_from_params(PARAMS))
    weights = {name: torch.randn(shape).mul_(0.02).bfloat16() for name, shape in shapes.items()}
    torch.save(weights, folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(PARAMS))
    shutil.copy(tokenizer, folder / "tokenizer.model")


def quantise(folder: Path) -> None:
    """The same model, saved in four bits, beside it, by a process of its own: its memory is not that of the loads."""
    how = ["--to", "consolidated", "--quantize", "nf4"]
    subprocess.run(
        [sys.executable, "-m", "llama_acc", "convert-checkpoint", str(folder), str(nf4_folder(folder)), *how],
        check=True,
    )


def nf4_folder(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-nf4")


def weights_file(folder: Path) -> Path:
    (file,) = folder.glob("*.pth")
    return file


def load(name: str, folder: Path) -> dict:
    """Loads once, then makes one token."""
    import torch

    from llama_acc import generate, load_model
    from llama_acc.core.checkpoint.layout import inspect, read_config
    from llama_acc.core.distributed.groups import Parallel
    from llama_acc.core.model.transformer import Transformer

    if name in ("nf4", "quantized"):
        from llama_acc.core.model import nf4

        nf4.prepare(torch.device("cpu"))  # imports bitsandbytes
    folder = nf4_folder(folder) if name == "nf4" else folder
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    if name != "plain":
        loaded = load_model(folder, device="cpu", quantize="nf4" if name == "quantized" else None)
        seconds = time.perf_counter() - start
        generate(loaded, "Hello", max_new_tokens=1)
    else:
        config = read_config([inspect(folder)])
        assert config is not None
        torch.set_default_dtype(torch.bfloat16)
        model = Transformer(config, torch.bfloat16, Parallel()).requires_grad_(False)
        model.load_state_dict(torch.load(folder / "consolidated.00.pth", weights_only=True))
        seconds = time.perf_counter() - start
        hidden = model(torch.tensor([1]), torch.tensor([0]), [1])
        model.logits(hidden).argmax().item()
    with_first_token = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = weights_file(folder).stat().st_size
    return {
        "name": name,
        "bytes": size,
        "seconds": seconds,
        "with_first_token": with_first_token,
        "peak_over_start_bytes": (peak - before) * 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of loading a checkpoint.")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "llama-acc-benchmarks" / "1.1B")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", choices=NAMES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(load(args.one, args.folder)))
        return
    if not (args.folder / "params.json").exists():
        make_checkpoint(args.folder, args.tokenizer)
    if not nf4_folder(args.folder).exists():
        quantise(args.folder)
    for folder in (args.folder, nf4_folder(args.folder)):
        with weights_file(folder).open("rb") as file:  # into the page cache
            while file.read(1 << 24):
                pass
    results: dict[str, list[float]] = {name: [] for name in NAMES}
    for _ in range(args.rounds):
        for name, seconds in results.items():
            command = [sys.executable, __file__, "--tokenizer", str(args.tokenizer), "--folder", str(args.folder)]
            done = subprocess.run([*command, "--one", name], stdout=subprocess.PIPE, text=True, check=True)
            print(done.stdout, end="", flush=True)
            seconds.append(json.loads(done.stdout)["seconds"])
    print(json.dumps({name: {"median_seconds": statistics.median(values)} for name, values in results.items()}))


if __name__ == "__main__":
    main()
