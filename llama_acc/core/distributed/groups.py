"""Where this process stands among the others: its data-parallel and model-parallel group, and how they agree.

Ranks are numbered so that a model-parallel group's are next to each other (fairscale's rule): rank = data_rank *
model_size + model_rank. A run of one process needs no process group, and makes none.
"""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from llama_acc.core.distributed import environment
from llama_acc.core.errors import LlamaAccError, RunError, UserError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_Result = TypeVar("_Result")
Group = dist.ProcessGroup
# A rank may wait this long for another, such as for rank 0 to encode a large data set.
_TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True)
class Parallel:
    """This process's place. `Parallel()` is that of a process on its own."""

    model_rank: int = 0  # place among those who share one copy of the model
    model_size: int = 1
    data_rank: int = 0  # place among those who hold the same part of the model and see other data
    data_size: int = 1
    model_group: Group | None = None
    data_group: Group | None = None
    control: Group | None = None  # all ranks on gloo, for what the hosts tell each other
    background: Group | None = None  # the same, for a thread that saves while training goes on

    @property
    def rank(self) -> int:
        """Place among all processes."""
        return self.data_rank * self.model_size + self.model_rank

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.data_size * self.model_size

    @property
    def is_main(self) -> bool:
        """Whether this process speaks for all: rank 0."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank, in order. Values are pickled: only between processes of one run."""
        if self.control is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def barrier(self) -> None:
        """Waits for all ranks."""
        self.gather(None)

    def raise_together(self, work: Callable[[], _Result]) -> _Result:
        """Does the same work on every rank. If it fails on one, it fails on all, so that none waits for one that left.

        Raises:
            LlamaAccError, OSError: this rank's, or that of the lowest rank that had one.
        """
        error: LlamaAccError | OSError | None = None
        try:
            result = work()
        except (LlamaAccError, OSError) as raised:
            error = raised
        errors = {rank: other for rank, other in enumerate(self.gather(error)) if other is not None}
        if errors:
            first = min(errors)
            failure = error or errors[first]
            vars(failure)["failing_rank"] = first  # who tells it, where no launcher of this toolkit does
            raise failure
        return result

    @property
    def is_local_rank_zero(self) -> bool:
        """Whether this process does for all of its machine what need be done only once there."""
        return self.control is None or environment.local_rank() == 0

    def broadcast_in_node(self, value: _Result | None) -> _Result:
        """The value of the process that leads this one's machine. It is pickled: only between processes of one run."""
        machine = os.uname().nodename
        gathered = self.gather((machine, value if self.is_local_rank_zero else None))
        return next(value for name, value in gathered if name == machine and value is not None)

    def run_rank_zero_first(self, work: Callable[[], None]) -> None:
        """Does the same work once on every rank, on rank 0 before the others: they find what it has made."""
        self.raise_together(lambda: work() if self.is_main else None)
        self.raise_together(lambda: None if self.is_main else work())

    def run_on_rank_zero(self, work: Callable[[], _Result]) -> _Result:
        """Does some work on rank 0; its result, or error, is that of every rank."""
        return self.gather(self.raise_together(lambda: work() if self.is_main else None))[0]


def local_world_size() -> int:
    """Number of processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if dist.is_initialized() else 1


def check_world(model_parallel_size: int, processes: int) -> None:
    """Refuses a number of processes that model-parallel groups cannot share out."""
    if processes % model_parallel_size:
        raise UserError(
            f"parallel.model_parallel_size is {model_parallel_size}, which does not divide the number of processes "
            f"({processes})",
            f"start {model_parallel_size} processes or a multiple of it, such as with --nproc {model_parallel_size}",
        )


@contextlib.contextmanager
def init_distributed(
    device: torch.device,
    model_parallel_size: int,
    tell: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
    timeout: timedelta = _TIMEOUT,
) -> Iterator[Parallel]:
    """Joins the processes started with this one for a while: env://, that is RANK, WORLD_SIZE, MASTER_ADDR and _PORT.

    `model_parallel_size` of them share one copy of the model. `tell` is given a line for the user where the others are
    long in coming; once all have come, a rank may wait for another up to `timeout`.

    Raises:
        UserError: their number is not a multiple of `model_parallel_size`.
        RunError: they did not come.
    """
    check_world(model_parallel_size, environment.world_size())
    if environment.world_size() == 1:
        yield Parallel()
        return
    store = _gather_processes(tell)
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=store,
        rank=environment.rank(),
        world_size=environment.world_size(),
        timeout=timeout,
        device_id=device if on_gpu else None,
    )
    from fairscale.nn.model_parallel import initialize

    try:
        yield _groups(model_parallel_size, timeout)
    finally:
        initialize.destroy_model_parallel()
        dist.destroy_process_group()


_joins = 0  # of this process so far


def _gather_processes(tell: Callable[[str], None]) -> Store:
    """Connects to the store of the job, and waits until all its processes have.

    torch's own rendezvous waits in C++, without a word and deaf to signals.
    """
    global _joins
    (host, port), rank, size = environment.check_place(), environment.rank(), environment.world_size()
    hint = None if environment.is_launched() else environment.run_alone()
    place, own = f"{host}:{port}", f"(this is rank {rank}{f'; {hint}' if hint else ''})"
    whom = f"{'the launcher' if rank == 0 else 'rank 0'} of {size} processes to answer at {place}"
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
    try:
        if serves:
            # It reaches its own store in any case; where others look for it elsewhere, they are those who do not come.
            of_job = TCPStore("localhost", port, is_master=True, wait_for_workers=False, multi_tenant=True)
        elif environment.wait_until(lambda: environment.answers(host, port), lambda: f"{whom} {own}", tell):
            of_job = TCPStore(host, port, wait_for_workers=False, timeout=timedelta(seconds=60))
        else:
            raise TimeoutError(f"no answer in {environment.JOIN_TIMEOUT / 60:.0f} minutes")
    except (dist.DistError, TimeoutError) as error:
        raise RunError(f"rank {rank} waited for {whom}: {str(error).splitlines()[0]}", hint) from error
    _joins += 1
    # The launcher's store outlives a join, and a start.
    store = PrefixStore(f"llama-acc/{environment.start_number()}/{_joins}", of_job)
    names = [str(number) for number in range(size)]
    store.set(names[rank], "")

    def missing() -> str:
        absent = [name for name in names if not store.check([name])]
        which = f"rank{'s' if len(absent) > 1 else ''} {', '.join(absent[:8])}{' ...' if len(absent) > 8 else ''}"
        return f"{which} of {size} processes to come to {place} {own}"

    # The first who is there speaks for all.
    def say(line: str) -> None:
        if not any(store.check([name]) for name in names[:rank]):
            tell(line)

    if not environment.wait_until(lambda: store.check(names), missing, say):
        raise RunError(f"waited {environment.JOIN_TIMEOUT / 60:.0f} minutes in vain for {missing()}", hint)
    return store


def _groups(model_parallel_size: int, timeout: timedelta | None) -> Parallel:
    """Splits the processes into fairscale's model-parallel and data-parallel groups."""
    from fairscale.nn.model_parallel import initialize

    with contextlib.redirect_stdout(io.StringIO()):  # it prints its sizes, and standard output carries results
        initialize.initialize_model_parallel(model_parallel_size)
    hosts = [None, None] if timeout is None else [dist.new_group(backend="gloo", timeout=timeout) for _ in range(2)]
    return Parallel(
        initialize.get_model_parallel_rank(),
        initialize.get_model_parallel_world_size(),
        initialize.get_data_parallel_rank(),
        initialize.get_data_parallel_world_size(),
        initialize.get_model_parallel_group(),
        initialize.get_data_parallel_group(),
        *hosts,
    )


@contextlib.contextmanager
def simulated(rank: int, processes: int, model_parallel_size: int) -> Iterator[Parallel]:
    """Makes this process one of many that are not there, for a while; what they would tell each other is not true."""
    from fairscale.nn.model_parallel import initialize
    from torch.testing._internal.distributed.fake_pg import FakeStore

    check_world(model_parallel_size, processes)
    dist.init_process_group("fake", rank=rank, world_size=processes, store=FakeStore())
    try:
        yield _groups(model_parallel_size, None)
    finally:
        initialize.destroy_model_parallel()
        dist.destroy_process_group()


def summed(x: Tensor, group: Group | None) -> Tensor:
    """The sum over the model-parallel group, in place; its gradient is passed on as it is."""
    return x if group is None else _mappings().reduce_from_model_parallel_region(x)


def copied(x: Tensor, group: Group | None) -> Tensor:
    """The same on every rank of the model-parallel group; of the gradient, which is a part of a sum, the sum."""
    return x if group is None else _mappings().copy_to_model_parallel_region(x)


def gathered(x: Tensor, group: Group | None) -> Tensor:
    """The parts of the model-parallel group side by side in the last dimension; of the gradient each gets its part."""
    return x if group is None else _mappings().gather_from_model_parallel_region(x)


def _mappings() -> Any:
    from fairscale.nn.model_parallel import mappings

    return mappings


class LocalPart(NamedTuple):
    """What is stored here of a parameter: some of the rows this model-parallel rank has of it."""

    tensor: Tensor
    rows: slice


def as_dtensor(tensor: Tensor) -> "DTensor | None":
    """A tensor that is sharded or replicated over ranks; None: it is neither. The type takes half a second to import:
    where there is such a tensor, that was done."""
    module = sys.modules.get("torch.distributed.tensor")
    return tensor if module is not None and isinstance(tensor, module.DTensor) else None


def local_part(parameter: Tensor) -> LocalPart:
    """The stored part of a parameter; writing to it changes the parameter."""
    dtensor = as_dtensor(parameter)
    if dtensor is None:
        return LocalPart(parameter.detach(), slice(0, parameter.shape[0]))
    local = dtensor.to_local().detach()
    if dtensor.placements[0].is_replicate():
        return LocalPart(local, slice(0, parameter.shape[0]))
    # fully_shard splits rows as torch.chunk does: the last ranks may have fewer, or none.
    mesh = dtensor.device_mesh
    share = -(-parameter.shape[0] // mesh.size())
    start = min(mesh.get_local_rank() * share, parameter.shape[0])
    return LocalPart(local, slice(start, start + local.shape[0]))


def is_sharded(parameter: Tensor) -> bool:
    """Whether the data-parallel ranks have different rows of a parameter."""
    dtensor = as_dtensor(parameter)
    return dtensor is not None and dtensor.placements[0].is_shard()
