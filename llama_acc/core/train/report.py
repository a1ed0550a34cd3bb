"""report.md: what a run did, at what speed and memory."""

import platform
from datetime import datetime, timezone
from pathlib import Path

import torch

from llama_acc.core.atomic import write_text_whole
from llama_acc.core.train.metrics import Metrics, draw_loss, read_metrics
from llama_acc.core.train.plan import Plan
from llama_acc.core.units import count_text


def write_report(run: Path, plan: Plan, device: torch.device, seconds: float, state: str) -> None:
    """Writes loss.png and report.md from metrics.jsonl.

    Args:
        run: the run's folder.
        plan: what was to be done.
        device: where it was computed.
        seconds: time this process took, data and saving included.
        state: how it ended, a sentence.
    """
    metrics = read_metrics(run / "metrics.jsonl").lines
    steps = [line for line in metrics if "loss" in line]
    if not steps:
        return
    draw_loss(metrics, run / "loss.png", plan.recipe.name)
    validation = [line for line in metrics if "validation_loss" in line]
    tokens = sum(line["tokens"] for line in steps)
    training_seconds = sum(line["tokens"] / line["tokens_per_second"] for line in steps)
    when = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    rows = [
        *plan.lines(),
        ("steps done", f"{steps[-1]['step']:,} of {plan.total_steps:,}"),
        ("loss", f"{steps[0]['loss']:.4f} at step {steps[0]['step']}, {steps[-1]['loss']:.4f} at the end"),
        *(
            [
                (
                    "validation loss",
                    f"{validation[0]['validation_loss']:.4f} at step {validation[0]['step']}, "
                    f"{validation[-1]['validation_loss']:.4f} at the end",
                )
            ]
            if validation
            else []
        ),
        *_imbalance(steps),
        ("speed", f"{tokens / training_seconds:,.0f} tokens/s over {training_seconds:,.0f} s of training steps"),
        ("time", f"{seconds:,.0f} s for this process, data and saving included"),
        ("peak memory", f"{max(line['peak_memory_gib'] for line in steps):.2f} GiB"),
        ("device", f"{device_name(device)}, torch {torch.__version__}, Python {platform.python_version()}"),
        ("written", when),
    ]
    table = "\n".join(f"| {name} | {text.replace('|', '&#124;')} |" for name, text in rows)
    text = f"# {plan.recipe.name}\n\n{state}\n\n| | |\n|---|---|\n{table}\n\n![loss](loss.png)\n"
    write_text_whole(run / "report.md", text)


def _imbalance(steps: list[Metrics]) -> list[tuple[str, str]]:
    several = [line["imbalance"] for line in steps if "imbalance" in line]
    if not several:
        return []
    mean = sum(several) / len(several)
    return [("imbalance", f"the fullest rank had {mean:.1%} more tokens than the mean one, {max(several):.1%} at most")]


def device_name(device: torch.device) -> str:
    """What people call a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"CPU, {count_text(torch.get_num_threads(), 'thread')}"
    return device.type
