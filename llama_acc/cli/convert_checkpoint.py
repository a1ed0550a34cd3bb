"""`llama-acc convert-checkpoint`: a checkpoint in another layout, or split over another number of ranks."""

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llama_acc.cli import console, options
from llama_acc.core.units import count_text, size_text

if TYPE_CHECKING:
    from llama_acc.core.checkpoint.convert import Converted

HELP = """Convert a checkpoint between Meta's layout, LLaMA2-Accessory's (consolidated) and Hugging Face's; merge what
was tuned, write it for PEFT, or quantise a base.

What SRC is, is found out. The result is read back and compared to the bit before it appears as DST.

Examples:

  llama-acc convert-checkpoint runs/alpaca alpaca-hf --to hf

  llama-acc convert-checkpoint Llama-2-7b-hf Llama-2-7b --to meta

  llama-acc convert-checkpoint Llama-2-13b Llama-2-13b-one --to meta --model-parallel-size 1

  llama-acc convert-checkpoint runs/alpaca alpaca-diff --to consolidated --base Llama-2-7b --diff --dtype fp32

  llama-acc convert-checkpoint alpaca-diff alpaca --to meta --base Llama-2-7b

  llama-acc convert-checkpoint runs/alpaca-lora alpaca-hf --to hf --merge --base Llama-2-7b

  llama-acc convert-checkpoint runs/alpaca-lora adapter --to peft --base Llama-2-7b-hf

  llama-acc convert-checkpoint Llama-2-70b Llama-2-70b-nf4 --to consolidated --quantize nf4
"""


class To(str, Enum):
    """Layouts that can be made."""

    meta = "meta"
    consolidated = "consolidated"
    hf = "hf"
    peft = "peft"


class Dtype(str, Enum):
    """Types of saved weights."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


class MergeInto(str, Enum):
    """Which base a LoRA pair is merged into, where it was trained on a quantised one."""

    trained = "trained"
    original = "original"


class Quantize(str, Enum):
    """Ways to quantise."""

    nf4 = "nf4"


def convert_checkpoint(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="Checkpoint or run folder.", callback=options.given, show_default=False)
    ],
    target: Annotated[
        str, typer.Argument(metavar="DST", help="The folder to make.", callback=options.given, show_default=False)
    ],
    to: Annotated[
        To,
        typer.Option(
            "--to",
            help="The layout of DST. (For GGUF: hf, and then llama.cpp's convert_hf_to_gguf.py.)",
            show_default=False,
        ),
    ],
    model_parallel_size: Annotated[
        int | None,
        typer.Option(
            "--model-parallel-size",
            metavar="N",
            help="Number of shards: 1, 2, 4 or 8. Without it: as many as SRC has.",
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option("--dtype", help="Type of the weights in DST. Without it: that of SRC.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="DIR",
            help="What SRC goes on top of (a diff, or only some tensors); with --diff: what is subtracted.",
            callback=options.given,
        ),
    ] = None,
    diff: Annotated[bool, typer.Option("--diff", help="Write SRC minus the --base instead.")] = False,
    merge: Annotated[
        bool, typer.Option("--merge", help="Merge LoRA pairs into their matrices, and compare the logits.")
    ] = False,
    merge_into: Annotated[
        MergeInto,
        typer.Option("--merge-into", help="If SRC was trained on a quantised base: that base, or the original one."),
    ] = MergeInto.trained,
    context: options.Context = None,
    quantize: Annotated[
        Quantize | None, typer.Option("--quantize", help="Write the matrices in four bits: a base to train on.")
    ] = None,
    quantize_skip: Annotated[
        list[str] | None,
        typer.Option(
            "--quantize-skip",
            metavar="NAME",
            help="With --quantize: matrices to leave as they are: output, wv, layers.31, ...; may repeat.",
        ),
    ] = None,
) -> None:
    """Convert a checkpoint."""
    from llama_acc.core.checkpoint.convert import Request, convert

    request = Request(
        source=source,
        target=Path(target).expanduser(),
        to=to.value,
        model_parallel_size=model_parallel_size,
        dtype=None if dtype is None else dtype.value,
        base=base,
        diff=diff,
        merge=merge,
        merge_into=merge_into.value,
        context=context,
        quantize=None if quantize is None else quantize.value,
        quantize_skip=quantize_skip or (),
    )
    with console.ByteProgress() as progress:
        converted = convert(request, progress.tell)
    for note in converted.notes:
        console.note(note)
    console.out.print(_summary(converted), markup=False)


def _summary(converted: "Converted") -> str:
    files = count_text(converted.files, "file")
    text = f"{converted.folder}: {count_text(converted.tensors, 'tensor')}, {size_text(converted.bytes)} in {files}"
    text += ", read back and equal"
    if converted.merge_error is not None:
        _, exact, saved = converted.merge_error
        return f"{text}; logits are off those before merging by {exact:.1e} of the largest, as saved by {saved:.1e}"
    if converted.largest_error is None:
        return text
    if converted.largest_error == 0:
        return f"{text}; base + diff is the source, to the bit"
    return f"{text}; base + diff differs from the source by at most {converted.largest_error:.3g}"
