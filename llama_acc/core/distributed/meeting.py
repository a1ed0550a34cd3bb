"""Where the machines of a job meet: each of them is given the same address, and the one whose it is serves it."""

import contextlib
import fcntl
import socket
import struct
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters
from torch.distributed.elastic.rendezvous import registry as rendezvous
from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousConnectionError

from llama_acc.core.distributed.environment import JOIN_TIMEOUT, connect, in_background, wait_until
from llama_acc.core.errors import RunError, UserError

_SIOCGIFADDR = 0x8915  # netdevice(7)


def meet(nodes: int, endpoint: str | None, tell: Callable[[str], None]) -> RendezvousHandler:
    """Serves the meeting, or connects to it; `tell` is given a line where the machine that serves it is long in coming.

    torch takes a machine for the host if the endpoint is its name; an address of one of its networks must do as well.
    """
    own = own_address(endpoint)
    place, run_id = endpoint or "localhost:0", "llama-acc" if endpoint else uuid.uuid4().hex
    serves = endpoint is None or own == _resolved(endpoint)[1][0]

    def open_meeting(is_host: bool) -> RendezvousHandler:
        if not is_host:
            connect(*_parts(place))
        return rendezvous.get_rendezvous_handler(
            RendezvousParameters("c10d", place, run_id, nodes, nodes, own, timeout=JOIN_TIMEOUT, is_host=is_host)
        )

    for is_host in dict.fromkeys((serves, False)):
        opening = in_background(partial(open_meeting, is_host))
        wait_until(opening.done, lambda: f"the machine of {place} to answer", tell)
        try:
            return opening.result(timeout=0)
        except (RendezvousConnectionError, TimeoutError) as error:
            # The port may be taken by the same command: two on one machine.
            failure = error
    raise did_not_meet(nodes, endpoint, failure)


def _resolved(endpoint: str) -> tuple[socket.AddressFamily, Any]:
    try:
        family, _, _, _, address = socket.getaddrinfo(*_parts(endpoint), type=socket.SOCK_DGRAM)[0]
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--rdzv-endpoint {endpoint}: {reason}", "give HOST:PORT") from None
    return family, address


def _parts(endpoint: str) -> tuple[str, int]:
    host, _, port = endpoint.rpartition(":")
    return host.strip("[]"), int(port)


@contextlib.contextmanager
def saying_who_is_missing(nodes: int, endpoint: str | None, tell: Callable[[str], None]) -> Iterator[None]:
    """Has a thread tell whom this machine waits for, while the block does."""
    met = threading.Event()

    def watch() -> None:
        wait_until(met.is_set, lambda: f"all of {nodes} machines to meet at {endpoint}", tell)

    if nodes > 1:
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        met.set()


def own_address(endpoint: str | None) -> str:
    """The address other machines reach this one at: the one it uses to reach the endpoint."""
    if endpoint is None:
        return "127.0.0.1"
    family, address = _resolved(endpoint)
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(address)  # of a datagram socket: nothing is sent
        except OSError as error:
            raise UserError(f"--rdzv-endpoint {endpoint}: {error.strerror}", "is the network up?") from None
        return str(probe.getsockname()[0])


def network_of(address: str) -> str | None:
    """The name of the network interface that has an IPv4 address, such as eth0."""
    for _, name in socket.if_nameindex() if sys.platform == "linux" else []:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
            answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def did_not_meet(nodes: int, endpoint: str | None, error: Exception) -> RunError:
    if isinstance(error, RendezvousClosedError):
        return RunError("the job ended on another machine", "its error is in the output of that machine")
    return RunError(
        f"{nodes} machines did not meet at {endpoint}: {error}",
        "start the same command on every machine; the port must be free and reachable from all of them",
    )
