"""One checkpoint layout into another, a few megabytes at a time, and read back to be sure.

`convert` reads any layout at any model-parallel size (see load.py), so there is one way through: the whole parameters
are known as parts of mapped files; every file to be made takes its share of each of them, in turn, tensor by tensor.
The new folder appears when all of it was read back and compared, or not at all.
"""

from collections.abc import Callable
from pathlib import Path

from llama_acc.core.atomic import whole_folder
from llama_acc.core.checkpoint.conversion.found import find
from llama_acc.core.checkpoint.conversion.plan import Plan
from llama_acc.core.checkpoint.conversion.proof import compare_merged, read_back
from llama_acc.core.checkpoint.conversion.request import (
    Converted,
    Progress,
    Request,
    Target,
    check_request,
)
from llama_acc.core.checkpoint.conversion.writing import write_description, write_weights
from llama_acc.core.checkpoint.save import free_bytes
from llama_acc.core.errors import UserError
from llama_acc.core.units import size_text

__all__ = ["Converted", "Request", "Target", "convert"]


def convert(request: Request, progress: Progress = lambda what, done, total: None) -> Converted:
    """Converts a checkpoint.

    Args:
        request: what into what.
        progress: told now and then.

    Raises:
        UserError: the request or the checkpoint is at fault; nothing was written.
        RunError: what was written is not what was meant; nothing is left of it.
    """
    check_request(request)
    plan = Plan(request, find(request))
    total = plan.nbytes
    _check_disk(request.target, total)
    done = 0

    def told(what: str) -> Callable[[int], None]:
        def tell(count: int) -> None:
            nonlocal done
            done += count
            progress(what, min(done, 2 * total), 2 * total)

        return tell

    with whole_folder(request.target) as folder:
        write_weights(plan, folder, told("writing"))
        write_description(plan, folder)
        error = read_back(plan, folder, told("reading back"))
        merge_error = None
        if request.merge:
            progress("comparing logits", 2 * total, 2 * total)
            merge_error = compare_merged(plan)
        progress("taking checksums", 2 * total, 2 * total)
    return Converted(request.target, len(plan.meant), len(plan.files), total, error, merge_error, tuple(plan.notes))


def _check_disk(target: Path, needed: int) -> None:
    needed += 64 << 20  # tokenizer, heads of files
    free = free_bytes(target)
    if needed > free:
        raise UserError(
            f"too little disk: {target} takes {size_text(needed)}, {size_text(free)} are free",
            "free some, or give a folder on another disk",
        )
