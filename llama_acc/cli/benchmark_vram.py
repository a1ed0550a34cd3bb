"""`llama-acc benchmark-vram`."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from llama_acc.cli import console, options
from llama_acc.core.errors import RunError, UserError, did_you_mean
from llama_acc.core.text import count_text

if TYPE_CHECKING:
    from llama_acc.core.memory.fit import Fit
    from llama_acc.core.memory.predict import MemoryRequest, Usage
    from llama_acc.core.memory.simulate import Setup

_SWEPT = ("max_tokens", "batch_size", "gpus")
_GIB = 2**30


def benchmark_vram(
    overrides: Annotated[
        list[str] | None,
        Argument(metavar="KEY=VALUE", help="Change any key of the recipe: train.precision=fp32", show_default=False),
    ] = None,
    model: Annotated[str | None, Option(metavar="NAME|DIR", help="A size, or a checkpoint's folder.")] = None,
    recipe: Annotated[
        str | None,
        Option(
            "--recipe",
            "-r",
            metavar="NAME|FILE",
            help="Take everything from a recipe. Without it: bf16, activation checkpointing, one micro-batch a step.",
        ),
    ] = None,
    tuning: Annotated[
        str | None, Option(metavar="METHOD", help="full, bias_norm, lora, lora_bias_norm, adapter.")
    ] = None,
    quantize: Annotated[str | None, Option(metavar="nf4|none", help="The base's matrices.")] = None,
    batch_size: Annotated[int | None, Option(metavar="N", min=1, help="Examples of a micro-batch.")] = None,
    max_tokens: Annotated[int | None, Option(metavar="N", min=2, help="Tokens of each.")] = None,
    gpus: Annotated[int | None, Option(metavar="N", min=1, max=2**16, help="Processes, one on each GPU.")] = None,
    model_parallel_size: Annotated[
        int | None, Option(metavar="N", min=1, help="How many share one copy of the model.")
    ] = None,
    fit: Annotated[str | None, Option(metavar="24GB", help="Which methods fit, and with how long examples.")] = None,
    sweep: Annotated[
        str | None, Option(metavar="KEY=N,N,...", help=f"One prediction for each value of {', '.join(_SWEPT)}.")
    ] = None,
    plot: options.Plot = None,
    measure: Annotated[
        bool, Option("--measure", help="Run some steps with random weights on --device, and compare.")
    ] = False,
    tolerance: Annotated[
        float, Option(metavar="F", min=0.0, help="With --measure: a larger error ends with 1.")
    ] = 0.05,
    data: Annotated[
        Path | None, Option("--data-json", metavar="FILE", help="A run's data.json: predict its GPU-hours.")
    ] = None,
    kind: Annotated[
        str | None,
        Option(metavar="NAME", help="Whether it fits on this kind of GPU, such as a100-80gb, and its GPU-hours."),
    ] = None,
    efficiency: Annotated[
        float, Option(metavar="F", min=0.01, max=1.0, help="Share of its rate that is reached.")
    ] = 0.4,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Predict the memory of a run, part by part, without a GPU; measure it; find what fits.

    Examples:

      llama-acc benchmark-vram --model llama2-70b --tuning bias_norm --quantize nf4 --batch-size 1 --max-tokens 512

      llama-acc benchmark-vram --recipe sharegpt-70b --gpus 64

      llama-acc benchmark-vram --model llama2-7b --fit 24GB

      llama-acc benchmark-vram --model llama2-7b --tuning lora --sweep max_tokens=512,1024,2048 --plot memory.png

      llama-acc benchmark-vram --recipe quickstart --device cpu --measure
    """
    modes = {"--fit": fit, "--sweep": sweep, "--measure": measure, "--data-json": data}
    chosen = [flag for flag, value in modes.items() if value]
    if len(chosen) > 1:
        raise UserError(f"{' and '.join(chosen)} cannot be combined", "one at a time")
    if plot is not None and chosen not in ([], ["--sweep"]):
        raise UserError(f"--plot does not go with {chosen[0]}", "it goes with a prediction, or with --sweep")
    memory = _bytes(fit) if fit is not None else 0
    swept = _swept(sweep) if sweep is not None else None
    console.working("loading PyTorch")
    from llama_acc.core.memory.predict import MemoryRequest

    size, where = model_parallel_size, "cpu" if device == "cpu" else "cuda"
    request = MemoryRequest(
        recipe, model, tuning, quantize, batch_size, max_tokens, gpus, size, tuple(overrides or ()), where
    )
    if fit is not None:
        return _fit(request, memory, kind, efficiency, as_json)
    if measure:
        return _measure(request, device, tolerance, as_json)
    if data is not None or (kind is not None and swept is None):
        return _hours(request, data, kind or "a100-80gb", efficiency, as_json)
    return _predict(request, swept, plot, as_json)


def _bytes(text: str) -> int:
    """24GB, 24GiB, 24 or 512MB, in the units GPUs are sold in: a GB is 2^30."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([GM])?i?B?", text.strip(), re.IGNORECASE)
    if found is None or not float(found[1]):
        raise UserError(f"--fit {text} is no size", "write it like --fit 24GB")
    return int(float(found[1]) * (2**20 if (found[2] or "G").upper() == "M" else _GIB))


def _swept(text: str) -> tuple[str, list[int]]:
    key, _, values = text.partition("=")
    numbers = values.replace(" ", "").split(",")
    if key not in _SWEPT or not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise UserError(
            f"--sweep {text} is not KEY=N,N,... with a key of {', '.join(_SWEPT)}",
            "such as --sweep max_tokens=512,1024,2048",
        )
    return key, [int(number) for number in numbers]


def _predict(request: "MemoryRequest", swept: tuple[str, list[int]] | None, plot: Path | None, as_json: bool) -> None:
    """Training and generation; or training for each value of a key."""
    from llama_acc.core.memory.predict import predict, predict_generation, setup_of

    if swept is None:
        key, setup = "", setup_of(request)
        console.working("predicting the memory")
        usages = {"training": predict(setup), "inference": predict_generation(setup, max(setup.lengths))}
        found: dict[str, Any] = {"flops": usages["training"].flops}
        found |= {name: usage.to_json() for name, usage in usages.items()}
    else:
        key, values = swept
        changes: list[dict[str, Any]] = [{key: value} for value in values]
        setups = [setup_of(replace(request, **change)) for change in changes]
        setup, usages = setups[0], {}
        for value, one in zip(values, setups, strict=True):
            console.working(f"predicting {key} {value}")
            usages[f"{value:,}"] = predict(one)
        parts = zip(values, usages.values(), strict=True)
        found = {"sweep": [{key: value, "training": usage.to_json()} for value, usage in parts]}
    if plot is not None:
        _draw(usages, plot, _title(setup, key), key.replace("_", " "))
    if as_json:
        return _print_json({**_setup_json(setup), **found})
    _say(setup, key)
    _parts_table(usages, key)
    if swept is None:
        console.out.print()
        training, generation = (f"{_gib(usage.total)} GiB, {usage.moment}" for usage in usages.values())
        lines = [
            ("training peak", training),
            ("inference peak", f"{generation}, of {max(setup.lengths)} tokens"),
            ("work", f"{found['flops']:.3g} floating-point operations for a micro-batch on a rank"),
        ]
        console.pairs(lines + _streaming(setup), console.out)
    return None


def _streaming(setup: "Setup") -> list[tuple[str, str]]:
    """What a streamed base takes beside the device's memory, in words."""
    from llama_acc.core.memory.predict import streaming

    if not setup.settings.stream_base:
        return []
    taken = streaming(setup)
    pinned = f", {_gib(taken.host)} GiB of the host's memory pinned" if setup.device_type == "cuda" else ""
    moved = f"{_gib(taken.moved)} GiB are read for a micro-batch"
    return [("streamed", f"{_gib(taken.stays)} GiB stay in files{pinned}; {moved}")]


def _fit(request: "MemoryRequest", memory: int, kind: str | None, efficiency: float, as_json: bool) -> None:
    """Shows each method when it is known; as JSON all of them, those that fit first."""
    from llama_acc.core.memory.fit import LARGEST_BATCH, WAYS, fitting
    from llama_acc.core.memory.predict import gpu_table

    kind = kind or "rtx3090-24gb"
    rate = _kind(kind)["bf16"] * 1e12 * efficiency
    console.working(f"trying {len(WAYS)} methods, the first of them now" if request.tuning is None else "trying it")
    fits: list[Fit] = []
    widths = [max(len(method) for method, _ in WAYS), 13, 14, 14, 13, 6]
    for fit in fitting(request, memory, rate):
        if not fits and not as_json:
            header = ["method", "base", f"1 x {fit.length}", f"batch of {fit.length}", "longest alone", "time"]
            console.row(header, widths, bold=True)
        fits.append(fit)
        if not as_json:
            base = ("NF4" if fit.quantize == "nf4" else "as it is") + (", streamed" if fit.slowdown else "")
            batch = f"{fit.batch_size}" + (" or more" if fit.batch_size == LARGEST_BATCH else "")
            most = [batch, f"{fit.longest:,}"] if fit.batch_size else ["does not fit", ""]
            most.append(f"x {fit.slowdown:.2f}" if fit.slowdown and fit.batch_size else "")
            console.row([fit.method, base, f"{_gib(fit.least)} GiB", *most], widths)
        console.working(f"trying the next methods, {len(fits)} done")
    if as_json:
        fits.sort(key=lambda fit: not fit.batch_size)
        return _print_json({"memory": memory, "methods": [vars(fit) for fit in fits]})
    if any(fit.slowdown and fit.batch_size for fit in fits):
        speed = f"{gpu_table()['streaming']['bandwidth']:g} GB/s"
        console.note(
            "streamed (train.stream_base=true): two blocks are on the GPU, the others in their files; time: that of a "
            f"batch beside one with the base in memory, assumed at {speed} and {efficiency:.0%} of a {kind}"
        )
    if not any(fit.batch_size for fit in fits):
        needed = _gib(min(fit.least for fit in fits))
        console.note(f"nothing fits in {_gib(memory)} GiB; the least that is needed is {needed} GiB")
    return None


def _measure(request: "MemoryRequest", device: str | None, tolerance: float, as_json: bool) -> None:
    from llama_acc.core.device import free_memory, pick_device
    from llama_acc.core.memory.measure import measure
    from llama_acc.core.memory.predict import predict, setup_of
    from llama_acc.core.train.log import device_name

    target = pick_device(device)
    if target.type == "mps":
        raise UserError("memory cannot be measured on mps", "try --device cpu")
    setup = setup_of(replace(request, device_type=target.type))
    if setup.world_size > 1:
        raise UserError(f"--measure runs one process, and the run has {setup.world_size}", "leave out --gpus")
    usage, free = predict(setup), free_memory(target)
    if usage.allocated > free:
        raise UserError(
            f"it takes {_gib(usage.allocated)} GiB, and {_gib(free)} GiB are free on {target}",
            "measure a smaller model, fewer or shorter examples",
        )
    measured = measure(setup, target)
    error = usage.allocated / measured.allocated - 1
    if as_json:
        found = {"allocated": measured.allocated, "reserved": measured.reserved, "device": device_name(target)}
        _print_json({**_setup_json(setup), "training": usage.to_json(), "measured": found, "error": error})
    else:
        _say(setup)
        rows = [["training peak", "predicted MiB", "measured MiB", "error"]]
        kinds = {"allocated": (usage.allocated, measured.allocated), "reserved": (usage.reserved, measured.reserved)}
        for name, (predicted, taken) in kinds.items():
            if taken is not None:
                sizes = [f"{size / 2**20:,.1f}" for size in (predicted, taken)]
                rows.append([name, *sizes, f"{predicted / taken - 1:+.1%}"])
        console.table(rows)
        console.note(f"on {device_name(target)}")
    if abs(error) > tolerance:
        raise RunError(
            f"the prediction is off by {100 * error:+.3g}%, more than {100 * tolerance:g}%", "see --tolerance"
        )


def _kind(name: str) -> Any:
    """What gpus.yaml says of a kind of GPU."""
    from llama_acc.core.memory.predict import gpu_table

    kinds = gpu_table()["kinds"]
    if name not in kinds:
        hint = did_you_mean(name, kinds) or f"known kinds: {', '.join(kinds)}"
        raise UserError(f"unknown kind of GPU '{name}'", hint)
    return kinds[name]


def _hours(request: "MemoryRequest", data: Path | None, kind: str, efficiency: float, as_json: bool) -> None:
    """Whether a run fits on a kind of GPU, and how long it takes there."""
    from llama_acc.core.memory.fit import filled
    from llama_acc.core.memory.measure import Texts, read_texts, work_of
    from llama_acc.core.memory.predict import gpu_table, predict, recipe_and_config, streaming

    table, gpu = gpu_table(), _kind(kind)
    console.working("predicting what fills it")
    rate = gpu["bf16"] * 1e12 * efficiency
    train, setup = recipe_and_config(request)[0].train, filled(request, gpu["memory"] * _GIB, rate)
    if data is not None:
        texts = read_texts(data)
    else:
        items, length = 1000, max(setup.lengths)
        origin = (
            f"assumed: {items:,} items of {length:,} tokens, all trained; --data-json FILE takes those of your data"
        )
        texts = Texts(items, items * length, items * length, float(items * length**2), origin)
    console.working("predicting the memory")
    usage = predict(setup)
    fits = usage.total <= gpu["memory"] * _GIB
    if not as_json:
        verdict = "it fits" if fits else "it does not fit; try --tuning, --quantize nf4, or --gpus N with fsdp"
        line = f"{_gib(usage.total)} GiB of {gpu['memory']:.2f} on each {kind}: {verdict}"
        is_auto = train.has_auto or setup.settings.stream_base is not (train.stream_base is True)
        auto = [("auto", _title(setup, ""))] if is_auto else []
        console.pairs([*auto, ("memory", line), *_streaming(setup)], console.out, len("GPU-hours"))
        if setup.settings.stream_base:
            share = streaming(setup).waiting(usage.flops, rate, kind)
            console.pairs([("copying", share)], console.out, len("GPU-hours"))
    console.working("counting the work")
    hours = work_of(setup, texts) * train.epochs / rate / 3600
    if as_json:
        found = {
            "published": table["published"],
            "memory": usage.total,
            "fits": fits,
            "gpu_hours": hours,
            "kind": kind,
            "efficiency": efficiency,
            "epochs": train.epochs,
            "items": texts.items,
            "lengths_from": texts.origin,
        }
        return _print_json({**_setup_json(setup), **found})
    share = f"{efficiency:.0%} of {gpu['bf16']:g} TFLOP/s ({kind}; bf16, dense){'' if fits else ', where it fits'}"
    said = f"{count_text(texts.items, 'item')}, {texts.tokens:,.0f} tokens, {count_text(float(train.epochs), 'epoch')}"
    lines = [
        ("data", said),
        ("lengths", texts.origin),
        ("GPU-hours", f"{hours:.3g} at {share}"),
        ("time", f"{console.duration(3600 * hours / setup.world_size)} on {setup.world_size} of them"),
    ]
    console.pairs(lines, console.out)
    console.out.print()
    rows = [["published by", "run", "kind", "GPU-hours"]]
    for row in table["published"]:
        rows.append([row["who"], row["what"].removesuffix(", at most"), row["kind"], f"{row['hours']:g}"])
    console.table(rows)
    return None


def _parts_table(usages: "dict[str, Usage]", corner: str = "") -> None:
    """A column for each usage, a row for each part that one of them has; in MiB where all are small."""
    totals = [usage.total for usage in usages.values()]
    unit, name = (2**20, "MiB") if max(totals) < 4 * _GIB else (_GIB, "GiB")
    rows = [[f"{corner}, {name}" if corner else name, *usages]]
    for part in next(iter(usages.values())).parts:
        sizes = [usage.parts[part] for usage in usages.values()]
        if any(sizes):
            rows.append([part, *(f"{size / unit:.2f}" for size in sizes)])
    rows.append(["all", *(f"{total / unit:.2f}" for total in totals)])
    console.table(rows)


def _say(setup: "Setup", swept: str = "") -> None:
    console.note(_title(setup, swept))
    if setup.world_size > 1:
        console.note("of rank 0; no other rank has more")
    if setup.device_type == "cuda":
        console.note(
            "allocator slack is PyTorch's rules replayed, CUDA context assumed; neither is measured: see docs/memory.md"
        )


def _title(setup: "Setup", swept: str) -> str:
    settings, method = setup.settings, setup.config.tuning.method + (", base in NF4" if setup.is_quantized else "")
    facts = [_model_name(setup), method, _precision(setup)]
    if swept in ("", "gpus"):
        facts.append(f"{len(setup.lengths)} x {max(setup.lengths)} tokens")
    if settings.stream_base:
        facts.append("streamed")
    if not settings.activation_checkpointing:
        facts.append("no activation checkpointing")
    if setup.world_size > 1 and swept != "gpus":
        size = settings.model_parallel_size
        facts.append(f"{setup.world_size} GPUs ({settings.data_parallel}, model parallel {size})")
    return ", ".join(facts)


def _model_name(setup: "Setup") -> str:
    from llama_acc.core.model.config import size_name

    return size_name(setup.config) or f"{setup.config.n_layers} layers of {setup.config.dim}"


def _precision(setup: "Setup") -> str:
    from llama_acc.core.checkpoint.save import DTYPES

    return next(name for name, dtype in DTYPES.items() if dtype == setup.settings.dtype)


def _setup_json(setup: "Setup") -> dict[str, Any]:
    from llama_acc.core.model.transformer import parameter_count

    return {
        "model": {"name": _model_name(setup), "parameters": parameter_count(setup.config)},
        "tuning": setup.config.tuning.method,
        "quantize": "nf4" if setup.is_quantized else "none",
        "precision": _precision(setup),
        "activation_checkpointing": setup.settings.activation_checkpointing,
        "lengths": list(setup.lengths),
        "stream_base": setup.settings.stream_base,
        "micro_batches": setup.micro_batches,
        "gpus": setup.world_size,
        "model_parallel_size": setup.settings.model_parallel_size,
        "data_parallel": setup.settings.data_parallel,
        "device": setup.device_type,
    }


def _print_json(values: Any) -> None:
    console.working(None)
    typer.echo(json.dumps(values, indent=1))


def _draw(usages: "dict[str, Usage]", path: Path, title: str, along: str) -> None:
    """A bar for each usage, in GiB by part, as a PNG; `along` says what their names are."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    totals = [usage.total / _GIB for usage in usages.values()]
    bottoms = [0.0] * len(usages)
    for place, part in enumerate(next(iter(usages.values())).parts):
        heights = [usage.parts[part] / _GIB for usage in usages.values()]
        if max(heights) >= 0.001 * max(totals):
            axes.bar(range(len(usages)), heights, 0.62, bottoms, label=part, color=colormaps["tab20"](place))
            bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    for place, total in enumerate(totals):
        axes.annotate(f"{total:.1f}", (place, total), ha="center", va="bottom", fontsize=9)
    axes.set_xticks(range(len(usages)), list(usages))
    axes.set(title=title, xlabel=along, ylabel="GiB on one rank")
    axes.margins(y=0.08)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", fontsize=8, frameon=False)
    FigureCanvasAgg(figure).print_png(str(path))
    console.note(f"drawn into {path}")


def _gib(size: float) -> str:
    return f"{size / _GIB:.2f}"
