"""Reading weights: shards are memory-mapped, checked as a whole, and put into the model tensor by tensor."""

import ctypes
import mmap
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llama_acc.core.checkpoint.layout import Layout
from llama_acc.core.errors import UserError, listed
from llama_acc.core.model.sharding import split_dimension
from llama_acc.core.model.transformer import Transformer, own_part
from llama_acc.core.parallel import Parallel, local_part

_PREFIX = "llma."
_BUFFERS = {"rope.freqs"}  # in Meta's files; it follows from the shape


@dataclass
class Weights:
    """Tensors by Meta's names, and which of them lie in a memory-mapped file."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    mapped: set[str] = field(default_factory=set)


def open_shard(path: object) -> Weights:
    """The tensors of a .pth file by Meta's names, memory-mapped: nothing is read until it is used.

    Accepts a flat mapping (Meta) or `{"model": mapping}` with or without the prefix `llma.` (consolidated).

    Raises:
        UserError: unreadable, cut short, or holding anything but tensors.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content, is_mapped = _load(str(path))
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError, KeyError) as error:
        if code := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise UserError(
                f"{path} is refused: it holds Python code besides tensors ({code[1]})", "none of it was run"
            ) from None
        # torch's own words on an unreadable pickle advise to run whatever is in it.
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        reason = "it is no file of tensors" if isinstance(error, pickle.UnpicklingError) else first
        raise UserError(f"cannot read {path}: {reason}", "the file may be cut short: copy it again") from None
    tensors = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(tensors, Mapping) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"{path} is not a checkpoint: a mapping from names to tensors is expected")
    named = {str(name).removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    named = {name: tensor for name, tensor in named.items() if name not in _BUFFERS}
    return Weights(named, set(named) if is_mapped else set())


def _load(path: str) -> tuple[object, bool]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True), True
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):
            raise
        # Files older than torch 1.6 are no zip archives and cannot be mapped.
        return torch.load(path, map_location="cpu", weights_only=True), False


def read_weights(layouts: Sequence[Layout]) -> Weights:
    """All tensors of the checkpoints, memory-mapped; a later checkpoint overrides an earlier one.

    Raises:
        UserError: an unreadable file.
    """
    weights = Weights()
    for layout in layouts:
        shards = [open_shard(path) for path in layout.shards]
        joined = {
            name: join_parts(name, [shard.tensors[name] for shard in shards], Parallel()) for name in shards[0].tensors
        }
        weights.tensors |= joined
        weights.mapped = (weights.mapped - set(joined)) | (shards[0].mapped if len(shards) == 1 else set())
    return weights


def check_tensors(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], where: object) -> None:
    """Compares names and shapes with what the model needs.

    Raises:
        UserError: unknown, missing, misshapen or non-float tensors, all of them listed.
    """
    problems = [f"missing: {name} {list(shape)}" for name, shape in shapes.items() if name not in tensors]
    for name, tensor in tensors.items():
        if name not in shapes:
            problems.append(f"unknown: {name} {list(tensor.shape)}")
        elif tuple(tensor.shape) != shapes[name]:
            problems.append(f"shape: {name} is {list(tensor.shape)}, the model needs {list(shapes[name])}")
        elif not tensor.is_floating_point():
            problems.append(f"type: {name} holds {tensor.dtype}, not numbers with a fraction")
    if problems:
        raise UserError(
            f"the weights in {where} do not fit the model:\n{listed(problems, most=60)}",
            "is params.json (or config.json) the one that came with these weights?",
        )


def fill(model: Transformer, weights: Weights, device: torch.device, dtype: torch.dtype, copy: bool) -> None:
    """Puts weights into a model made on the meta device, one tensor at a time.

    Args:
        model: its parameters are replaced.
        weights: checked; tensors are removed as they are used, so their memory is free again.
        device: where the parameters go.
        dtype: their type.
        copy: give every parameter storage of its own. Otherwise a tensor that is already of this type and on this
            device stays mapped to its file: loading costs nothing, but the parameters must not be trained.
    """
    for name, parameter in list(model.named_parameters()):
        source = weights.tensors.pop(name)
        value = source.to(device=device, dtype=dtype, copy=copy)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(value, requires_grad=parameter.requires_grad))
        if name in weights.mapped and value.data_ptr() != source.data_ptr():
            _release_pages(source)


def _release_pages(tensor: Tensor) -> None:
    """Lets go of a mapped tensor's pages: read once, they would count as this process's memory until it ends.

    The mapping is private and was not written to, so the pages can be read again from the file if they are needed.
    """
    if not hasattr(mmap, "MADV_DONTNEED") or not tensor.is_contiguous():
        return
    page = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page
    end = (tensor.data_ptr() + tensor.nbytes) // page * page
    if end > start:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def load_parameters(model: Transformer, weights: Weights) -> None:
    """Puts weights into the storage a model has; `weights` are used up."""
    for name, parameter in model.named_parameters():
        local = local_part(parameter)
        source = weights.tensors.pop(name)
        local.tensor.copy_(own_part(name, source, model.parallel)[local.rows])
        if name in weights.mapped:
            _release_pages(source)


def join_parts(name: str, parts: list[Tensor], parallel: Parallel) -> Tensor:
    """This model-parallel rank's part of a tensor that was saved in parts by another number of them."""
    dimension = split_dimension(name)
    saved, wanted, rank = len(parts), parallel.model_size, parallel.model_rank
    if dimension is None or saved == wanted:
        return parts[min(rank, saved - 1)]
    if saved > wanted:
        return torch.cat(parts[rank * saved // wanted : (rank + 1) * saved // wanted], dimension)
    return parts[rank * saved // wanted].chunk(wanted // saved, dimension)[rank % (wanted // saved)]
