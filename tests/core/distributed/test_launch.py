"""What the launcher makes of the ends of ranks, which here are a small program in place of the command.

The command itself is in tests/cli/test_launch.py.
"""

import json
import os
import signal
import tempfile
import threading
import time
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from llama_acc.core.distributed import Launch
from llama_acc.core.distributed.launch import first_failure, how_it_ended, launch
from llama_acc.core.errors import LlamaAccError, RunError, UserError

# Every rank leaves a file that says it is there, then does what its line of `ENDS` says.
_STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path

rank, start = os.environ["RANK"], os.environ["LLAMA_ACC_START"]
signals, got = (signal.SIGINT, signal.SIGTERM), []
for number in signals:
    signal.signal(number, lambda number, frame: got.append(number))
held_back = signal.pthread_sigmask(signal.SIG_UNBLOCK, signals).issuperset(signals)
Path(f"{start}-{rank}").write_text(json.dumps([held_back, *sys.argv[1:]]))
does = json.loads(Path("ends.json").read_text()).get(f"{start}-{rank}", {"when": "told"})
deadline = time.monotonic() + 60
while time.monotonic() < deadline and not got and does["when"] == "told":
    time.sleep(0.02)
while len(list(Path().glob(f"{start}-?"))) < 2:
    time.sleep(0.02)
by_user = Path(os.environ["LLAMA_ACC_STOP_FILE"]).exists()
Path(f"{start}-{rank}-got").write_text(json.dumps([got, by_user]))
if "kind" in does:
    message = {"message": does["message"], "extraInfo": {"timestamp": str(int(time.time()))}}
    record = {"hint": "so", "exit_code": does["code"], "kind": does["kind"], "time": time.time(), "rank": int(rank)}
    record["message"] = message
    Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(record))
if does.get("code", 0) < 0:
    os.kill(os.getpid(), -does["code"])
sys.exit(does.get("code", 128 + got[0] if got else 0))
"""
_KILLED = {"when": "now", "code": -9}
_CRASH = {"when": "now", "code": 1, "kind": "crash", "message": "ValueError: no"}
_ERROR = {"when": "now", "code": 2, "kind": "error", "message": "no data"}
_LOST = {"when": "told", "code": 1, "kind": "lost", "message": "closed by peer"}
_FULL = {"when": "told", "code": 1, "kind": "error", "message": "the disk is full"}
_DONE = {"when": "now"}


@pytest.mark.parametrize(
    ("ends", "restarts", "sent", "expected"),
    [
        ({"1-0": _DONE, "1-1": _DONE}, 0, None, 0),
        ({"1-1": _KILLED, "1-0": _LOST}, 0, None, RunError("rank 1 was killed by SIGKILL (out of memory?)")),
        ({"1-1": _CRASH}, 0, None, RunError("rank 1 failed: ValueError: no", "so")),
        ({"1-1": _ERROR}, 2, None, UserError("no data", "so")),
        ({"1-1": _KILLED, "2-0": _DONE, "2-1": _DONE}, 2, None, 0),
        ({}, 1, signal.SIGINT, 130),
        ({}, 1, signal.SIGTERM, 143),
        ({"1-0": _FULL}, 1, signal.SIGTERM, RunError("the disk is full", "so")),
    ],
    ids=["done", "killed", "crash", "error", "restarted", "Ctrl-C", "SIGTERM", "not saved"],
)
def test_how_ranks_end_is_how_the_command_ends(
    ends: dict[str, dict[str, object]],
    restarts: int,
    sent: signal.Signals | None,
    expected: int | LlamaAccError,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "llama_acc").mkdir()
    (tmp_path / "llama_acc" / "__init__.py").touch()
    (tmp_path / "llama_acc" / "__main__.py").write_text(_STAND_IN)
    (tmp_path / "ends.json").write_text(json.dumps(ends))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # so that it is restored
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    if sent is not None:
        threading.Thread(target=_send, args=(sent, tmp_path), daemon=True).start()
    said: list[str] = []
    outcome: int | LlamaAccError
    try:
        outcome = launch(Launch("2", max_restarts=restarts), 2, ["$RANK", "$$ {x}"], said.append)
    except LlamaAccError as error:
        outcome = error
    assert repr(outcome) == repr(expected)
    if isinstance(expected, LlamaAccError):
        assert vars(outcome) == vars(expected)
    restarted = "2-0" in ends
    begun = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("?-?")}
    assert sorted(begun) == (["1-0", "1-1", "2-0", "2-1"] if restarted else ["1-0", "1-1"])
    again = "rank 1 was killed by SIGKILL (out of memory?); restarting from the last whole checkpoint (1 of 2)"
    assert said == [again] * restarted
    for name, (held_back, *words) in begun.items():
        assert held_back, f"a signal would end {name} with a traceback while Python begins"
        assert words == ["$RANK", "$$ {x}"]
    for path in tmp_path.glob("?-?-got"):
        got, by_user = json.loads(path.read_text())
        assert got in ([], [sent or signal.SIGTERM]), "once"
        assert by_user == (sent is not None), "torch ends the others of a rank that failed by the same signal"
    assert not [*tmp_path.glob("torchelastic*"), *tmp_path.glob("llama-acc-*")]


def _send(number: signal.Signals, folder: Path) -> None:
    while len(list(folder.glob("1-?"))) < 2:
        time.sleep(0.02)
    os.kill(os.getpid(), number)


def test_how_a_process_ended_is_said_in_words() -> None:
    assert how_it_ended(3) == "ended with exit code 3"
    assert how_it_ended(-11) == "was killed by SIGSEGV"


@pytest.mark.parametrize(
    ("ends", "first"),
    [
        ([(143, None), (-9, None)], 1),  # torch ended rank 0 as rank 1 was killed
        ([(1, "lost"), (-9, None)], 1),
        ([(1, "lost"), (-11, None), (-15, None)], 1),
        ([(1, "crash"), (1, "lost")], 0),
        ([(-15, None), (1, "lost"), (2, "error")], 2),
        ([(1, "lost"), (1, "crash"), (1, "error")], 1),  # recorded in this order
        ([(143, None), (143, None)], 0),
    ],
)
def test_the_rank_that_failed_first_is_the_cause(
    ends: list[tuple[int, str | None]], first: int, tmp_path: Path
) -> None:
    failures, now = {}, time.time()
    for rank, (code, kind) in enumerate(ends):
        path = tmp_path / f"{rank}.json"
        if kind is not None:  # what a rank leaves, half a second after the one before
            record = {"message": {"message": "", "extraInfo": {"timestamp": str(int(now))}}, "kind": kind}
            path.write_text(json.dumps({**record, "time": now + rank / 2}))
        failures[rank] = ProcessFailure(local_rank=rank, pid=1, exitcode=code, error_file=str(path))
    assert first_failure(failures)[0] == first
