"""`llama-acc convert-checkpoint`: a checkpoint in another layout, or split over another number of ranks."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Argument, Option

from llama_acc.cli import console, options
from llama_acc.core.text import count_text, size_text

if TYPE_CHECKING:
    from llama_acc.core.checkpoint.convert import Converted


def convert_checkpoint(
    source: Annotated[str, Argument(metavar="SRC", help="Checkpoint or run folder.", show_default=False)],
    target: Annotated[str, Argument(metavar="DST", help="The folder to make.", show_default=False)],
    to: Annotated[
        Literal["meta", "consolidated", "hf", "peft", "gguf"],
        Option(help="The layout of DST.", show_default=False),
    ],
    model_parallel_size: Annotated[
        int | None, Option(metavar="N", help="Number of shards: 1, 2, 4 or 8. Without it: as many as SRC has.")
    ] = None,
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32"] | None, Option(help="Type of the weights in DST. Without it: that of SRC.")
    ] = None,
    gguf_type: Annotated[
        Literal["f16", "bf16", "q8_0", "f32"] | None,
        Option(help="Type of the matrices in GGUF. Without it: bf16 if SRC is, else f16."),
    ] = None,
    base: Annotated[
        str | None,
        Option(
            metavar="DIR",
            help="What SRC goes on top of (a diff, or only some tensors); with --diff: what is subtracted.",
        ),
    ] = None,
    diff: Annotated[bool, Option("--diff", help="Write SRC minus the --base instead.")] = False,
    merge: Annotated[
        bool, Option("--merge", help="Merge LoRA pairs into their matrices, and compare the logits.")
    ] = False,
    merge_into: Annotated[
        Literal["trained", "original"],
        Option(help="If SRC was trained on a quantized base: that base, or the original one."),
    ] = "trained",
    context: options.Context = None,
    quantize: Annotated[
        Literal["nf4"] | None, Option(help="Write the matrices in four bits: a base to train on.")
    ] = None,
    quantize_skip: Annotated[
        list[str] | None,
        Option(
            metavar="NAME",
            help="With --quantize: matrices to leave as they are: output, wv, layers.31, ...; may repeat.",
        ),
    ] = None,
) -> None:
    """Convert a checkpoint between Meta's layout, LLaMA2-Accessory's (consolidated) and Hugging Face's; merge what
    was tuned, write it for PEFT, or for llama.cpp and Ollama (gguf), or quantize a base.

    What SRC is, is found out. Every byte is read back and compared before it appears as DST.

    Examples:

      llama-acc convert-checkpoint runs/alpaca alpaca-hf --to hf

      llama-acc convert-checkpoint Llama-2-7b-hf Llama-2-7b --to meta

      llama-acc convert-checkpoint Llama-2-13b Llama-2-13b-one --to meta --model-parallel-size 1

      llama-acc convert-checkpoint runs/alpaca alpaca-diff --to consolidated --base Llama-2-7b --diff --dtype fp32

      llama-acc convert-checkpoint alpaca-diff alpaca --to meta --base Llama-2-7b

      llama-acc convert-checkpoint runs/alpaca-lora alpaca-hf --to hf --merge --base Llama-2-7b

      llama-acc convert-checkpoint runs/alpaca-lora adapter --to peft --base Llama-2-7b-hf

      llama-acc convert-checkpoint runs/alpaca alpaca-gguf --to gguf --gguf-type q8_0

      llama-acc convert-checkpoint Llama-2-70b Llama-2-70b-nf4 --to consolidated --quantize nf4
    """
    console.working("loading PyTorch")
    from llama_acc.core.checkpoint.convert import Request, convert

    request = Request(
        source=source,
        target=Path(target).expanduser(),
        to=to,
        model_parallel_size=model_parallel_size,
        dtype=dtype,
        gguf_type=gguf_type,
        base=base,
        diff=diff,
        merge=merge,
        merge_into=merge_into,
        context=context,
        quantize=quantize,
        quantize_skip=quantize_skip or (),
    )
    with console.Progress() as progress:
        converted = convert(request, progress)
    for note in converted.notes:
        console.note(note)
    console.out.print(_summary(converted), markup=False)


def _summary(made: "Converted") -> str:
    text = f"{made.folder}: {count_text(made.tensors, 'tensor')}, {size_text(made.bytes)} in "
    text += f"{count_text(made.files, 'file')}, read back and equal"
    if made.merge_error is not None:
        exact, saved = made.merge_error
        return f"{text}; logits are off those before merging by {exact:.1e} of the largest, as saved by {saved:.1e}"
    if made.largest_error is None:
        return text
    if made.largest_error == 0:
        return f"{text}; base + diff is the source, to the bit"
    return f"{text}; base + diff differs from the source by at most {made.largest_error:.3g}"
