"""Which device computes, how much memory it has and has used."""

import contextlib
import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from llama_acc.core.distributed.environment import local_rank, world_size
from llama_acc.core.errors import UserError

GIB = 2**30
_simulated: str | None = None


def device_type(tensor: torch.Tensor) -> str:
    """The kind of device a tensor is on, such as "cpu"; within `simulating`, the one that is simulated."""
    return _simulated or tensor.device.type


@contextlib.contextmanager
def simulating(kind: str) -> Iterator[None]:
    """Lets `device_type` say `kind` for a while: the program takes the ways it takes there."""
    global _simulated
    before, _simulated = _simulated, kind
    try:
        yield
    finally:
        _simulated = before


def to_device(numbers: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host's on a device. CUDA takes it from pinned memory, while the host goes on."""
    return (numbers.pin_memory() if device.type == "cuda" else numbers).to(device, non_blocking=True)


class Arriving:
    """Numbers on their way to the host. Reading them waits for what made them, not for what was begun after it."""

    def __init__(self, numbers: torch.Tensor) -> None:
        # Of other devices there is no event to wait for: they would hand over what is not there yet.
        self._numbers = numbers.to("cpu", non_blocking=numbers.is_cuda)
        self._there = torch.cuda.Event() if numbers.is_cuda else None
        if self._there is not None:
            self._there.record()

    def read(self) -> list[Any]:
        if self._there is not None:
            self._there.synchronize()
        found: list[Any] = self._numbers.tolist()
        return found


def pick_device(name: str | None = None) -> torch.device:
    """The device asked for; else CUDA, then MPS, then CPU. Of several processes, each takes the GPU of its number."""
    several = world_size() > 1
    prepare_cuda()
    if name is None:
        if not torch.cuda.is_available():
            return torch.device("mps" if torch.backends.mps.is_available() and not several else "cpu")
        name = "cuda"
    if name == "cuda" and several:
        name = f"cuda:{local_rank()}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.index is not None:
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"device '{name}' cannot be used here: {str(error).splitlines()[0]}", "try --device cpu"
        ) from None
    return device


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: torch's peak reserved on CUDA, else the process's largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / GIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / GIB


def free_memory(device: torch.device) -> int:
    """Bytes that could still be allocated."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []:
        if line.startswith("MemAvailable"):
            return min(int(line.split()[1]) * 1024, _free_in_cgroup())
    return 4 * GIB


def multiplies_bf16() -> bool:
    """Whether the CPU has instructions for it; of others than x86 and before torch says, it is taken to have them."""
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return found.get("architecture") != "x86_64" or found.get("avx512_bf16", False) or found.get("amx_bf16", False)


def _free_in_cgroup() -> int:
    """Bytes below the limit of this process's control group, version 2 or 1; a container has one. Files that the system
    keeps in memory do not count."""
    free = 1 << 62
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            root, names = Path("/sys/fs/cgroup"), ("memory.max", "memory.current", "file")
            if controllers:
                root, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache")
            # Within a container its own group is the root.
            folder = next((place for place in (root / path[1:], root) if (place / names[0]).exists()), None)
            if folder is not None and (limit := (folder / names[0]).read_text().strip()).isdecimal():
                stat = dict(row.split() for row in (folder / "memory.stat").read_text().splitlines())
                free = int(limit) - int((folder / names[1]).read_text()) + int(stat[names[2]])
    return free


def prepare_cuda() -> None:
    """Sets what has to be set before CUDA starts. Where there is none, it does nothing.

    cuDNN's attention, which torch prefers on Hopper, plans for every length anew (0.1 to 1 s each); FlashAttention does
    not. Deterministic runs need a workspace of cuBLAS of a fixed size, and no memory filled before it is written. Of
    float32, convolutions are as exact as matrix products, not in TF32. Every micro-batch has another length: what is
    freed would lie in pieces that the next one does not fit, if segments of memory could not grow.
    """
    if not {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & os.environ.keys():
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cudnn.allow_tf32 = False
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def prepare_cpu(keeps_memory: bool = True) -> None:
    """Sets what a process that trains on the CPU should do with memory. Call it before the first computation.

    A training step frees and allocates the same large tensors again and again; given back to the system, each would be
    mapped and zeroed anew. So glibc is told to keep them, up to 32 MiB each (elsewhere nothing happens): all of them in
    its heap took 1.4 times the memory of a 7B's blocks, and was not faster. Where memory is short, as in a streamed
    run, it is not to keep any of more than 4 MiB: what lies free between others nobody can use. oneDNN, which
    multiplies matrices, keeps compiled code for the last 1024 shapes, up to a megabyte each; in a stream nearly every
    micro-batch is a new shape, and 128 are as fast.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    m_trim_threshold, m_mmap_threshold = -1, -3
    libc.mallopt(m_mmap_threshold, (32 if keeps_memory else 4) << 20)  # 32 MiB are the most it takes
    if keeps_memory:
        libc.mallopt(m_trim_threshold, 256 << 20)


def rest_threads() -> None:
    """Ends the threads that compute for the calling one, which leaves that to another; if it goes on, they are back.

    libgomp counts those of all threads: where they are more than the cores, each sleeps between two operations instead
    of waiting busily, and a token of a small model takes a quarter longer.
    """
    if sys.platform == "linux" and (rest := getattr(ctypes.CDLL(None), "omp_pause_resource_all", None)):
        rest(1)  # omp_pause_soft
