"""What a conversion is asked to do, what it gives, and what contradicts itself in that."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llama_acc.core.checkpoint.merge import MergeError
from llama_acc.core.errors import UserError

Target = Literal["meta", "consolidated", "hf", "peft"]
Progress = Callable[[str, int, int], None]
"""What is being done, bytes done, bytes in all."""


@dataclass(frozen=True)
class Request:
    """What is to be converted.

    Attributes:
        source: a checkpoint folder.
        target: the folder to make; absent, or empty.
        to: its layout.
        model_parallel_size: number of shards; None = as many as the source has, 1 from Hugging Face.
        dtype: bf16, fp16 or fp32; None = each tensor keeps its type.
        base: a checkpoint that goes below the source (a diff, or one that holds only some tensors).
        diff: write the difference of source and base instead.
        merge: merge LoRA pairs into their matrices.
        merge_into: of a source that was trained on a quantised base: the matrices as they were trained on, or the
            original ones.
        quantize: write the matrices in NF4.
        quantize_skip: with `quantize`, matrices to leave as they are; see `ModelConfig.quantisable`.
        context: longest sequence that the description of what is made says; None = the source's.
        file_bytes: most bytes of tensors in one safetensors file of Hugging Face's layout.
    """

    source: str | Path
    target: Path
    to: Target
    model_parallel_size: int | None = None
    dtype: str | None = None
    base: str | Path | None = None
    diff: bool = False
    merge: bool = False
    merge_into: Literal["trained", "original"] = "trained"
    quantize: Literal["nf4"] | None = None
    quantize_skip: Sequence[str] = ()
    context: int | None = None
    file_bytes: int = 5 * 10**9


@dataclass(frozen=True)
class Converted:
    """What was made.

    Attributes:
        folder: where it is.
        tensors: number of parameters.
        files: number of files with weights.
        bytes: size of the tensors.
        largest_error: of a diff: the largest difference of base + diff and the source; else None.
        merge_error: of a merge; else None.
        notes: what the user should know of the source or of the result.
    """

    folder: Path
    tensors: int
    files: int
    bytes: int
    largest_error: float | None
    merge_error: MergeError | None = None
    notes: tuple[str, ...] = ()


def check_request(request: Request) -> None:
    """Refuses what does not go together, before anything is looked at.

    Raises:
        UserError: saying what does not, and what to do.
    """
    _check_options(request)
    _check_target(request)


def _check_options(request: Request) -> None:
    if request.diff and request.base is None:
        raise UserError("a difference has two sides: --diff needs --base DIR", "give the checkpoint to subtract")
    if request.diff and request.to != "consolidated":
        raise UserError(f"there are no diffs in the layout '{request.to}'", "use --to consolidated")
    if request.to == "hf" and request.model_parallel_size not in (None, 1):
        raise UserError(
            "Hugging Face's files are not split by model parallelism", "leave --model-parallel-size out with --to hf"
        )
    if request.quantize and (request.to != "consolidated" or request.diff or request.merge):
        raise UserError(
            "matrices in NF4 are written with --to consolidated, and neither of a diff nor of a merge",
            "merge first, then quantise what that gave",
        )
    if request.quantize and request.model_parallel_size not in (None, 1):
        raise UserError("a quantised checkpoint is not split", "leave --model-parallel-size out: it is read at any")
    if request.quantize_skip and not request.quantize:
        raise UserError("--quantize-skip is about what is not quantised", "add --quantize nf4, or leave it out")
    if request.merge and request.diff:
        raise UserError("--merge and --diff do not go together", "merge first, then take the difference")
    if request.to == "peft" and (request.merge or request.model_parallel_size not in (None, 1)):
        raise UserError("an adapter is neither merged nor split", "leave --merge and --model-parallel-size out")
    if request.to == "peft" and request.context is not None:
        raise UserError("an adapter has the context of its base", "leave --context out with --to peft")


def _check_target(request: Request) -> None:
    target = request.target
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file", "give a folder that is not there yet")
    if target.resolve() in {Path(path).resolve() for path in (request.source, request.base) if path is not None}:
        raise UserError(f"{target} is what is to be converted", "give another folder")
    if target.is_dir() and any(target.iterdir()):
        raise UserError(f"{target} is not empty", "give a folder that is not there yet")
