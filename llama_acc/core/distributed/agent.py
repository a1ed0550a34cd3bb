"""What torch's elastic agent leaves open: which rank's error is the cause and is shown, when the others are ended, what
is worth a restart, and what Ctrl-C means.
"""

import dataclasses
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, LogsDest, SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler

from llama_acc.core.distributed.environment import ExitRecord
from llama_acc.core.errors import LlamaAccError
from llama_acc.core.interrupt import EXIT_CODES, held_back

POLL = 0.1
"""Seconds between looks at the workers."""
_ASK_OTHERS_EVERY = 2.0
# A rank that ended in order leaves the others time to do the same: to save, to write the report.
_GRACE = {"stopped": 120.0, "error": 20.0, "crash": 5.0, "lost": 5.0}
_TAIL_LINES = 20


class WorkerError(LlamaAccError):
    """The error that ended a job, as the rank that had it told it."""

    def __init__(self, message: str, hint: str | None, exit_code: int) -> None:
        super().__init__(message, hint)
        self.exit_code = exit_code


class Stopped(Exception):
    """The job was ended by a signal, in order. `exit_code` is what the command returns."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


class Logs(DefaultLogsSpecs):
    """Where ranks write: rank 0 to the terminal, the others to files."""

    def __init__(self, folder: Path | None) -> None:
        self._scratch = Path(tempfile.mkdtemp(prefix="llama-acc-"))
        self._folder = folder
        self._errors: dict[int, Path] = {}
        super().__init__(log_dir=str(self._scratch))

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """By local rank, where output and errors go. Called by the agent at every start."""
        told = super().reify(envs)
        outs, errs, own_outs, own_errs = dict(told.stdouts), dict(told.stderrs), dict[int, str](), dict[int, str]()
        for place, env in envs.items():
            rank, restart = int(env["RANK"]), int(env.get("TORCHELASTIC_RESTART_COUNT", "0"))
            if rank == 0 and self._folder is None:
                continue
            folder = self._folder or Path(told.error_files[place]).parent
            folder.mkdir(parents=True, exist_ok=True)
            name = f"rank-{rank}" + (f".restart-{restart}" if restart else "")
            outs[place], errs[place] = str(folder / f"{name}.out"), str(folder / f"{name}.err")
            self._errors[rank] = Path(errs[place])
            if rank == 0:
                own_outs[place], own_errs[place] = outs[place], errs[place]
        return dataclasses.replace(told, stdouts=outs, stderrs=errs, tee_stdouts=own_outs, tee_stderrs=own_errs)

    def tail(self, rank: int) -> str:
        """The last lines a rank wrote to its standard error, if the user has not seen them."""
        path = self._errors.get(rank)
        if rank == 0 or path is None or not path.is_file():
            return ""
        return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:])

    def clear(self) -> None:
        """Removes what is not kept."""
        shutil.rmtree(self._scratch, ignore_errors=True)


class Agent(LocalElasticAgent):
    """The elastic agent, which ends the other ranks of one that failed soon but not at once."""

    def __init__(
        self,
        spec: WorkerSpec,
        logs: Logs,
        several_nodes: bool,
        while_meeting: Callable[[], AbstractContextManager[None]],
    ) -> None:
        super().__init__(spec, logs, log_line_prefix_template="$role_name")
        self._logs, self._several_nodes, self._while_meeting = logs, several_nodes, while_meeting
        self._received: signal.Signals | None = None
        self._killed: set[int] = set()  # process ids
        self._next_question = 0.0

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Handles Ctrl-C and SIGTERM: the workers are told once; the second time they are killed."""
        received = signal.Signals(number)
        alive = self._alive()
        if self._received is not None or not alive:
            for process in alive.values():
                process.kill()
            raise Stopped(EXIT_CODES[received])
        self._received = received
        for process in alive.values():
            process.send_signal(number)

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        """Meets the other machines, before every start of the workers."""
        handler = worker_group.spec.rdzv_handler
        assert isinstance(handler, DynamicRendezvousHandler)
        # The handler would serve the workers the same store again, with the addresses of those that died in it.
        handler._shared_tcp_store_server = handler._bootstrap_store_info = None
        with self._while_meeting():
            super()._rendezvous(worker_group)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        with held_back():
            return super()._start_workers(worker_group)

    def _alive(self) -> Mapping[int, Any]:
        """The running workers by local rank."""
        if self._pcontext is None:
            return {}
        assert isinstance(self._pcontext, SubprocessContext)
        handlers = self._pcontext.subprocess_handlers
        return {place: handler.proc for place, handler in handlers.items() if handler.proc.poll() is None}

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        ended = self._first_failure()
        if ended is not None:
            self._end_others(_GRACE[ended])
        elif self._others_left():
            self._end_others(_GRACE["lost"])
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.FAILED and self._remaining_restarts:
            self._decide_restart(result.failures)
        return result

    def _first_failure(self) -> str | None:
        """How the first worker that is found to have failed did."""
        assert isinstance(self._pcontext, SubprocessContext)
        for place, handler in self._pcontext.subprocess_handlers.items():
            code = handler.proc.poll()
            if code:
                return self._kind(code, exit_record_in(self._pcontext.error_files[place]))
        return None

    def _kind(self, code: int, ending: ExitRecord | None) -> str:
        if self._received is not None and code in (*EXIT_CODES.values(), *(-number for number in EXIT_CODES)):
            return "stopped"
        return "stopped" if code in EXIT_CODES.values() else ending.kind if ending is not None else "crash"

    def _others_left(self) -> bool:
        """Whether the job ended on another machine, whose agent then has closed the meeting."""
        if not self._several_nodes or time.monotonic() < self._next_question:
            return False
        self._next_question = time.monotonic() + _ASK_OTHERS_EVERY
        return bool(self._worker_group.spec.rdzv_handler.is_closed())

    def _end_others(self, grace: float) -> None:
        """Waits for the other workers to end, then kills them."""
        deadline = time.monotonic() + grace
        while self._alive() and time.monotonic() < deadline:
            time.sleep(POLL)
        for process in self._alive().values():
            self._killed.add(process.pid)
            process.kill()
            process.wait()

    def _decide_restart(self, failures: Mapping[int, ProcessFailure]) -> None:
        """Stops the agent from restarting what would fail again, and tells of a restart."""
        kinds = {self._kind(failure.exitcode, exit_record_in(failure.error_file)) for failure in failures.values()}
        if kinds & {"error", "stopped"} or self._received is not None:
            self._remaining_restarts = 0
            return
        text = self._cause(failures)[0]
        done = self._worker_group.spec.max_restarts - self._remaining_restarts + 1
        again = f"restarting from the last whole checkpoint ({done} of {self._worker_group.spec.max_restarts})"
        print(f"{text}; {again}", file=sys.stderr, flush=True)

    def _cause(self, failures: Mapping[int, ProcessFailure]) -> tuple[str, str | None, int]:
        """Message, hint and exit code of the failure that came first."""

        def order(item: tuple[int, ProcessFailure]) -> tuple[bool, bool, float, int]:
            rank, failure = item
            ending = exit_record_in(failure.error_file)
            # A rank that was killed leaves no word, and the others notice at once: it comes before them.
            told = ending.time if ending is not None else float(failure.timestamp)
            return failure.pid in self._killed, ending is not None and ending.kind == "lost", told, rank

        rank, failure = min(failures.items(), key=order)
        ending = exit_record_in(failure.error_file)
        if ending is None:
            tail = "" if failure.exitcode in (-signal.SIGKILL, -signal.SIGTERM) else self._logs.tail(rank)
            last_words = f"; its last words:\n{tail}" if tail else ""
            return f"rank {rank} {how_it_ended(failure.exitcode)}{last_words}", None, 1
        if ending.kind == "lost":
            where = "; its error is in the output of another machine" if self._several_nodes else f": {ending.message}"
            return f"rank {rank} lost another rank{where}", None, 1
        endings = [exit_record_in(other.error_file) for other in failures.values()]
        agreed = len(failures) == self._worker_group.spec.local_world_size and all(
            other is not None and other.message == ending.message for other in endings
        )
        # Where rank 0 speaks for all, as in chat, the others end well.
        spoke = rank == 0 and len(failures) == 1 and ending.kind == "error"
        message = ending.message if agreed or spoke else f"rank {rank} failed: {ending.message}"
        return message, ending.hint, ending.exit_code

    def raise_cause(self, failures: Mapping[int, ProcessFailure]) -> NoReturn:
        """Raises what ended the job."""
        kinds = {self._kind(failure.exitcode, exit_record_in(failure.error_file)) for failure in failures.values()}
        if kinds == {"stopped"}:
            code = next(iter(failures.values())).exitcode
            raise Stopped(EXIT_CODES[self._received] if self._received is not None else code)
        raise WorkerError(*self._cause(failures))


def how_it_ended(code: int) -> str:
    """A process's end as a predicate; below 0, its exit code is that of a signal."""
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"was killed by {name}" + (" (out of memory?)" if -code == signal.SIGKILL else "")


def exit_record_in(path: str) -> ExitRecord | None:
    """What a worker left in its error file; None = nothing."""
    try:
        return ExitRecord(**json.loads(Path(path).read_text(encoding="utf-8"))["ending"])
    except (OSError, ValueError, KeyError):
        return None
