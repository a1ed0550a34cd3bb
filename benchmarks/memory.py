"""Memory of the published runs and of this project's own aims: predicted anywhere, measured on a GPU.

The shapes are the real ones, the weights are zeros: memory does not depend on them, so there is nothing to download.

    python benchmarks/memory.py                     # the prediction, on any machine
    python benchmarks/memory.py --measure           # on a GPU, of all that fits: peak allocated, beside the prediction
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from published import published_runs

from llama_acc.core.device import free_memory
from llama_acc.core.memory.measure import Measured, measure, measure_generation
from llama_acc.core.memory.predict import MemoryRequest, Usage, predict, predict_generation, setup_of
from llama_acc.core.memory.simulate import Setup

GIB = 2**30
AIMS = [
    MemoryRequest(model=model, tuning=tuning, quantize="nf4", batch_size=1, max_tokens=512)
    for model, tuning in (
        ("llama2-70b", "bias_norm"),
        ("llama2-70b", "lora_bias_norm"),
        ("llama2-13b", "lora_bias_norm"),
        ("llama2-7b", "lora_bias_norm"),
    )
]


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory of training and generation.")
    parser.add_argument("--measure", action="store_true", help="run what fits, on --device")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--layers", type=int, help="so many blocks instead of the model's: to try the script")
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.measure:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        print(f"{name}, torch {torch.__version__}, GiB allocated\n")
    print("| run | training, predicted | measured | error | generation, predicted | measured | error |")
    print("|---|---|---|---|---|---|---|")
    runs = {**published_runs(), **{f"{aim.model} {aim.tuning} {aim.quantize}": aim for aim in AIMS}}
    for name, request in runs.items():
        setup = setup_of(replace(request, device_type=device.type))
        if args.layers:
            setup = replace(setup, config=replace(setup.config, n_layers=args.layers))
        cells = [*trained(setup, device, args.measure), *generated(setup, device, args.measure)]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def trained(setup: Setup, device: torch.device, measured: bool) -> list[str]:
    usage = predict(setup)
    runs = measured and usage.allocated < free_memory(device)
    return compared(usage, measure(setup, device) if runs else None)


def generated(setup: Setup, device: torch.device, measured: bool) -> list[str]:
    length = max(setup.lengths)
    usage = predict_generation(setup, length)
    runs = measured and usage.allocated < free_memory(device)
    return compared(usage, measure_generation(setup, length, device) if runs else None)


def compared(usage: Usage, measured: Measured | None) -> list[str]:
    if measured is None:
        return [f"{usage.allocated / GIB:.2f}", "", ""]
    error = usage.allocated / measured.allocated - 1
    return [f"{usage.allocated / GIB:.2f}", f"{measured.allocated / GIB:.2f}", f"{error:+.1%}"]


if __name__ == "__main__":
    main()
