"""What llama-acc and its baselines do side by side: the options, items, micro-batches and results of a CPU benchmark.

The training task: the first 256 Alpaca items, labels on the outputs only, at most 512 tokens, micro-batches of 4 and
an optimizer step after each, float32, AdamW(lr 2e-5, betas 0.9 0.95, no weight decay), clipping at 2, one pass.
Generating: batch 1, greedy, a prompt of 32 tokens and 128 new ones.

Shapes in comments: B batch, T time.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from shapes import SHAPES
from torch import Tensor

PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
NO_LABEL = -100
LEARNING_RATE, BETAS, CLIP_NORM = 2e-5, (0.9, 0.95), 2.0
PROMPT_TOKENS, NEW_TOKENS = 32, 128
LORA_RANK = 16  # of pairs on all seven matrices of a block


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say which task is run: the same for every baseline and for llama-acc."""
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--data", type=Path, required=True, help="an Alpaca file: a JSON array")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a SentencePiece model of 32,000 pieces")
    parser.add_argument("--items", type=int, default=256, help="how many items of the data (default: 256)")
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="for generate only")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--checkpoints",
        type=Path,
        default=Path(tempfile.gettempdir()) / "llama-acc-benchmarks",
        help="where the random checkpoints are kept",
    )


@dataclass(frozen=True)
class Item:
    """One encoded example; `labels` has `NO_LABEL` on the prompt, and label i belongs to token i."""

    tokens: list[int]
    labels: list[int]


def encode_items(data: Path, tokenizer: Path, count: int, max_tokens: int) -> list[Item]:
    """The first `count` items of an Alpaca file: BOS prompt output EOS, cut at `max_tokens`."""
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=str(tokenizer))
    items = []
    for row in json.loads(data.read_text(encoding="utf-8"))[:count]:
        prompt = (PROMPT_WITH_INPUT if row["input"].strip() else PROMPT).format_map(row)
        unlabelled = len(pieces.encode(prompt, add_bos=True))
        tokens = pieces.encode(prompt + row["output"], add_bos=True, add_eos=True)
        labels = [NO_LABEL] * unlabelled + tokens[unlabelled:]
        items.append(Item(tokens[:max_tokens], labels[:max_tokens]))
    return items


def micro_batches(items: list[Item], size: int, seed: int = 0) -> list[list[Item]]:
    """Neighbours in length together, so that little is padded; the batches themselves in random order."""
    by_length = sorted(items, key=lambda item: len(item.tokens))
    batches = [by_length[start : start + size] for start in range(0, len(by_length), size)]
    random.Random(seed).shuffle(batches)
    return batches


def pad(rows: list[list[int]], filler: int) -> Tensor:
    """Rows filled up on the right to the longest: [B, T]."""
    longest = max(map(len, rows))
    return torch.tensor([row + [filler] * (longest - len(row)) for row in rows])


def token_counts(batches: list[list[Item]]) -> dict[str, int]:
    """How much work the batches are: tokens that are text, those with a label, and those computed with padding."""
    items = [item for batch in batches for item in batch]
    return {
        "useful_tokens": sum(len(item.tokens) for item in items),
        "label_tokens": sum(label != NO_LABEL for item in items for label in item.labels),
        "padded_tokens": sum(len(batch) * max(len(item.tokens) for item in batch) for batch in batches),
    }


def checkpoint_folder(args: argparse.Namespace) -> Path:
    """The prepared checkpoint; made first where missing, in another process so that it leaves our peak memory alone."""
    folder = args.checkpoints / args.shape
    if not (folder / "prepared").exists():
        script = Path(__file__).with_name("baselines.py")
        command = [sys.executable, script, "prepare", "--shape", args.shape, "--checkpoints", args.checkpoints]
        command += ["--data", args.data, "--tokenizer", args.tokenizer]
        subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)
    return folder


def load_items(args: argparse.Namespace) -> list[Item]:
    """The benchmark's items, encoded."""
    return encode_items(args.data, args.tokenizer, args.items, args.max_tokens)


def generation_prompt(items: list[Item]) -> Tensor:
    """The first 32 tokens of the first item: [1, 32]."""
    return torch.tensor([items[0].tokens[:PROMPT_TOKENS]])


def peak_rss_gib() -> float:
    """The most memory this process ever had resident (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def training_result(args: argparse.Namespace, batches: list[list[Item]], seconds: float, losses: list[float]) -> dict:
    """The JSON line of a training pass. Speed counts useful tokens: padding is work, not a result."""
    counts = token_counts(batches)
    return {
        "name": args.name,
        "shape": args.shape,
        **counts,
        "steps": len(losses),
        "seconds": seconds,
        "tokens_per_second": counts["useful_tokens"] / seconds,
        "peak_rss_gib": peak_rss_gib(),
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "loss_mean": statistics.fmean(losses),
    }


def generation_result(args: argparse.Namespace, seconds: float) -> dict:
    """The JSON line of a generation; the seconds include the prompt's."""
    return {
        "name": args.name,
        "shape": args.shape,
        "dtype": args.dtype,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "seconds": seconds,
        "tokens_per_second": NEW_TOKENS / seconds,
        "peak_rss_gib": peak_rss_gib(),
    }
