"""Reading back what a conversion wrote, to be sure: bit by bit, and of a merge what the model computes."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from llama_acc.core.checkpoint.computed import read_block, rounded, same_values
from llama_acc.core.checkpoint.conversion.plan import Plan
from llama_acc.core.checkpoint.layout import inspect, read_config
from llama_acc.core.checkpoint.lazy import Part, blocks_of
from llama_acc.core.checkpoint.load import open_checkpoint, open_safetensors
from llama_acc.core.checkpoint.merge import MERGE_TOLERANCE, MergeError, merge_error
from llama_acc.core.errors import RunError, listed
from llama_acc.core.model.config import ModelConfig


def read_back(plan: Plan, folder: Path, progress: Callable[[int], None]) -> float | None:
    """Compares what is in the folder with what was meant, bit by bit; of a diff, the largest error of base + diff.

    Raises:
        RunError: they differ.
    """
    if plan.request.to == "peft":
        _read_back_adapter(plan, folder, progress)
        return None
    layout = inspect(folder)
    written = open_checkpoint(layout)
    config = read_config([layout]) if not layout.is_diff else plan.config
    if config is None or not _same_model(config, plan.config) or written.tensors.keys() != plan.meant.keys():
        raise RunError(f"what was written to {plan.request.target} does not describe the model it was made from")
    errors, problems = [], []
    for name, dtype in plan.dtypes.items():
        back = written.tensors[name]
        if not same_values(back, plan.written(name), dtype):
            problems.append(f"{name} is not what was written")
        elif dtype == torch.float16 and _overflows(back):
            problems.append(f"{name} has values above 65504, too large for fp16: choose --dtype bf16")
        if plan.found.subtracted is not None:
            errors.append(_error(plan.found.subtracted.tensors[name].plus(back), plan.found.weights.tensors[name]))
        progress(back.nbytes)
    if problems:
        raise RunError(f"read back from the disk:\n{listed(problems)}")
    return max(errors) if errors else None


def _read_back_adapter(plan: Plan, folder: Path, progress: Callable[[int], None]) -> None:
    ((name, entries),) = plan.files.items()
    written = open_safetensors(folder / name).tensors
    if written.keys() != {entry.name for entry in entries}:
        raise RunError(f"what was written to {plan.request.target} is not what was meant")
    for entry in entries:
        if not same_values(Part.of(written[entry.name]), entry.source, entry.dtype):
            raise RunError(f"read back from the disk: {entry.name} is not what was written")
        progress(entry.nbytes)


def compare_merged(plan: Plan) -> MergeError:
    """Compares what was merged with what it was merged from.

    Raises:
        RunError: a block computes something else.
    """
    saved = {name: rounded(source, plan.dtypes[name]) for name, source in plan.meant.items()}
    error = merge_error((plan.found.config, plan.sources), (plan.config, plan.meant), (plan.config, saved))
    if not error.block <= MERGE_TOLERANCE:
        raise RunError(
            f"the merged model computes something else: a block is off by {error.block:.3g} of the largest value"
        )
    return error


def _error(restored: Part, wanted: Part) -> float:
    return max(
        (read_block(restored, *rows, torch.float32) - read_block(wanted, *rows, torch.float32)).abs_().max().item()
        for rows in blocks_of(wanted.shape)
    )


def _overflows(part: Part) -> bool:
    return any(read_block(part, *rows, part.dtype).isinf().any().item() for rows in blocks_of(part.shape))


def _same_model(one: ModelConfig, other: ModelConfig) -> bool:
    """Whether two shapes compute the same; a width can be said in several ways, and a factor is rounded."""
    scalings = [1.0 if config.rope_scaling is None else config.rope_scaling for config in (one, other)]
    plain = [
        replace(config, n_kv_heads=config.kv_heads, multiple_of=config.hidden_dim, ffn_dim_multiplier=None)
        for config in (one, other)
    ]
    return (
        one.parameter_shapes() == other.parameter_shapes()
        and replace(plain[0], rope_scaling=None) == replace(plain[1], rope_scaling=None)
        and math.isclose(*scalings, rel_tol=1e-12)
    )
