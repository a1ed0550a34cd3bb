"""A model whose frozen matrices stay in the files of their checkpoint: a ring of two blocks, applied from outside.

Blocks of even and of odd number each have one buffer on the device, and the matrices of all of them are views of it.
Before a block computes, forward or recomputed for the backward pass, its bytes are in the buffer, and those of the
block that follows, in whichever direction the blocks go, are on their way into the other one. They are read by a
thread, with pread and not through a mapping, so that a file that is cut short is an error and not a signal; what the
system keeps of the files in memory is its own to give up. On a GPU they are read into pinned memory, and copied from
there on a stream of their own: the host waits for the file, never for the device. **It has not run on a GPU yet.**

The norms of the blocks, the embedding and the output matrix are in memory as ever.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llama_acc.core.checkpoint.lazy import LazyTensor
from llama_acc.core.checkpoint.load import Weights
from llama_acc.core.checkpoint.quantized import NF4Matrix
from llama_acc.core.device import device_type
from llama_acc.core.errors import RunError, UserError
from llama_acc.core.model.layers import Linear
from llama_acc.core.model.transformer import Transformer

_ALIGNMENT = 64


class Region(NamedTuple):
    """Where the bytes of a tensor begin."""

    path: str
    offset: int


class _Place(NamedTuple):
    """A tensor of a block in the block's buffer."""

    name: str  # that of the parameter or the buffer in the model
    offset: int
    like: Tensor  # of its shape and type


def _frozen(block: nn.Module) -> Iterator[tuple[str, Linear]]:
    for name, module in block.named_modules():
        if isinstance(module, Linear) and not module.weight.requires_grad:
            yield name, module


def _layout(number: int, block: nn.Module) -> list[_Place]:
    """What of a block is streamed, one after the other; by the model's names."""
    places, offset = list[_Place](), 0
    for name, layer in _frozen(block):
        for leaf, tensor in {"weight": layer.weight, **(layer.scales._asdict() if layer.scales else {})}.items():
            places.append(_Place(f"layers.{number}.{name}.{leaf}", offset, tensor))
            offset += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    return places


def _size(places: Sequence[_Place]) -> int:
    return max((place.offset + place.like.nbytes for place in places), default=0)


def block_sizes(model: Transformer) -> list[int]:
    """Bytes of each block's frozen matrices; the ring has room for the largest twice."""
    return [_size(_layout(number, block)) for number, block in enumerate(model.layers)]


class BlockStream:
    """The frozen matrices of a model's blocks, of which two are in memory at a time."""

    def __init__(self, model: Transformer, device: torch.device, regions: Mapping[str, Region] | None) -> None:
        """Gives the matrices of the model, which is on the meta device, their place in the buffers; they are buffers of
        their layers then, and no parameters; its other parameters are left on the meta device.

        `regions` says where they lie, as `find_regions` gives it; None: nothing is read, as in a simulation.
        """
        blocks = list(model.layers)
        self._layouts = [_layout(number, block) for number, block in enumerate(blocks)]
        size = max(map(_size, self._layouts))
        # The buffers of the device.
        self.slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in blocks[:2]]
        for number, places in enumerate(self._layouts):
            for name, offset, like in places:
                owner, _, leaf = name.rpartition(".")
                layer, view = model.get_submodule(owner), self.slots[number % 2][offset : offset + like.nbytes]
                delattr(layer, leaf)  # whoever goes through the parameters finds what is in memory
                layer.register_buffer(leaf, view.view(like.dtype).view(like.shape), persistent=False)
        self.bytes_read = 0  # from files so far
        self._last, self._holds = 0, list[int | None]([None] * len(self.slots))
        if regions is None:
            return
        self._regions, self._files = regions, dict[str, tuple[int, os.stat_result]]()
        self._thread = ThreadPoolExecutor(1, "read-blocks")
        self._reads = list[Future[None] | None]([None] * len(self.slots))
        self._is_gpu = device_type(self.slots[0]) == "cuda"
        # What is read into: on a GPU pinned memory, else the buffers themselves.
        self._host = self.slots
        if self._is_gpu:
            self._host = [torch.empty(size, dtype=torch.uint8).pin_memory() for _ in self.slots]
            self._stream = torch.cuda.Stream(device)
            self._copied = [torch.cuda.Event() for _ in self.slots]
            self._used = [torch.cuda.Event() for _ in self.slots]
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda module, inputs, number=number: self._enter(number))

    def _enter(self, number: int) -> None:
        """Has a block in its buffer, and lets the one that is likely to follow be read."""
        slot, last, before = number % 2, len(self._layouts) - 1, self._last
        if self._is_gpu:
            self._used[before % 2].record()  # all that was asked of the device so far has the block before
        if self._holds[slot] != number:
            self._read(number)
        if self._settle(slot) and self._is_gpu:
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(self._used[slot])
                self.slots[slot].copy_(self._host[slot], non_blocking=True)
                self._copied[slot].record()
            torch.cuda.current_stream().wait_event(self._copied[slot])
        self._last = number
        # Forward, or backward. At an end the blocks turn back, but without gradients they begin anew.
        following = number + (1 if number == 0 or (number > before and number < last) else -1)
        if number == last and not torch.is_grad_enabled():
            following = 0
        if 0 <= following <= last and following % 2 != slot and self._holds[following % 2] != following:
            self._read(following)

    def _read(self, number: int) -> None:
        """Lets a block be read into its buffer, which no computation that is still to be asked for needs."""
        slot = number % 2
        self._settle(slot)
        self._holds[slot] = None  # Ctrl-C may come between any two lines
        self._reads[slot] = self._thread.submit(self._read_block, number)
        self._holds[slot] = number

    def _settle(self, slot: int) -> bool:
        """Waits for what is being read into a buffer, if it is."""
        read, self._reads[slot] = self._reads[slot], None
        if read is None:
            return False
        try:
            read.result()
        except BaseException:
            self._holds[slot] = None
            raise
        return True

    def _read_block(self, number: int) -> None:
        """Reads the bytes of a block; in a thread."""
        if self._is_gpu:
            self._copied[number % 2].synchronize()  # what was there before is on the device
        buffer = self._host[number % 2].numpy().data
        for place in self._layouts[number]:
            self._pread(*self._regions[place.name], buffer[place.offset : place.offset + place.like.nbytes])

    def _pread(self, path: str, offset: int, target: memoryview) -> None:
        try:
            if path not in self._files:
                descriptor = os.open(path, os.O_RDONLY)
                self._files[path] = descriptor, os.fstat(descriptor)
            descriptor, opened = self._files[path]
            now = os.stat(path)
            if (now.st_dev, now.st_ino) != (opened.st_dev, opened.st_ino):
                raise OSError("another file has taken its place")
            while len(target):
                count = os.preadv(descriptor, [target], offset)
                if not count:
                    raise OSError("it ends too early")
                self.bytes_read, offset, target = self.bytes_read + count, offset + count, target[count:]
        except OSError as error:
            raise RunError(
                f"cannot read {path}, from which the model is streamed: {error.strerror or error}",
                "put the file back; what was saved is whole (a run goes on with --resume)",
            ) from error

    def close(self) -> None:
        """Ends the thread and closes the files."""
        self._thread.shutdown()
        while self._files:
            os.close(self._files.popitem()[1][0])


def stream_blocks(model: Transformer, weights: Weights, device: torch.device) -> BlockStream:
    """Streams a model's frozen matrices, which are taken out of the weights; the model is on the meta device."""
    regions = find_regions(model, weights)
    for name in regions:
        weights.tensors.pop(name, None)
    return BlockStream(model, device, regions)


def find_regions(model: Transformer, weights: Weights) -> dict[str, Region]:
    """Where in its files each tensor lies that `BlockStream` reads; the model is on the meta device.

    Raises:
        UserError: one is not in a file as the model wants it, and what to type instead.
    """
    mappings, found = _mappings(), dict[str, Region]()
    for number, block in enumerate(model.layers):
        for name, layer in _frozen(block):
            matrix = f"layers.{number}.{name}"
            share = weights.tensors.get(f"{matrix}.weight")
            if share is None:
                hint = "give its files (--pretrained DIR), or leave streaming out"
                raise UserError(f"a base is streamed from its files, and {matrix} is in none: it is random", hint)
            stored = _stored(share, layer)
            if isinstance(stored, str):
                kind = "fp32" if layer.weight.dtype == torch.float32 else "bf16"
                flags = "--quantize nf4" if layer.is_quantized else f"--model-parallel-size 1 --dtype {kind}"
                raise UserError(
                    f"the model cannot be streamed from its files: {matrix} {stored}",
                    "write a base that can be, once, and use that: "
                    f"llama-acc convert-checkpoint DIR NEW --to consolidated {flags}",
                )
            for leaf, tensor in stored.items():
                begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes - 1
                here = [one for one in mappings if begin in one[0] and end in one[0]]
                if not here:
                    raise UserError("a model can be streamed on Linux, from files that are mapped", "leave it out")
                addresses, offset, path = here[0]
                found[f"{matrix}.{leaf}"] = Region(path, offset + begin - addresses.start)
    return found


def _stored(share: LazyTensor, layer: Linear) -> dict[str, Tensor] | str:
    """The tensors in files that are those of a layer, or why there are none."""
    source = share.source
    if layer.is_quantized:
        if not isinstance(source, NF4Matrix):
            return "is quantized while it is loaded"
        whole = tuple(source.values.shape) == tuple(layer.weight.shape)
        return {"weight": source.values, **source.scales._asdict()} if whole else "is split"
    if isinstance(source, NF4Matrix):
        return "is in NF4"
    if share.dtype != layer.weight.dtype:
        return f"is {share.dtype}, and {layer.weight.dtype} is needed".replace("torch.", "")
    if not isinstance(source, Tensor) or tuple(source.shape) != tuple(layer.weight.shape) or not source.is_contiguous():
        return "is put together or reordered while it is loaded"
    return {"weight": source}


def _mappings() -> list[tuple[range, int, str]]:
    """The files mapped into this process: the addresses, where in the file the first one is, and its path."""
    table = Path("/proc/self/maps")
    lines = table.read_text(encoding="utf-8", errors="surrogateescape").splitlines() if table.exists() else []
    found = []
    for line in lines:
        addresses, _, offset, _, _, *path = line.split(None, 5)
        if path and path[0].startswith("/"):
            first, last = (int(address, 16) for address in addresses.split("-"))
            found.append((range(first, last), int(offset, 16), path[0]))
    return found
