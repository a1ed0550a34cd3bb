"""Ten minutes of random data for every reader of data files, all at once: nothing but a UserError may come of it."""

import os
import re
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.soak.fuzz_readers import READERS

_SECONDS = float(os.environ.get("FUZZ_SECONDS", "600"))
# Thirteen processes start on few cores; one that hangs on an input gives up thirty seconds after its time.
_TO_END = 50


class _Fuzzed(NamedTuple):
    """What became of a reader."""

    reader: str
    code: int | None
    """Its exit code; None: it did not end."""
    log: str

    @property
    def inputs(self) -> int | None:
        """How many it was given; None: it did not come to say."""
        # Of libFuzzer's lines on the way, "#4096 NEW ...", the last one tells, if it was stopped.
        said = re.findall(r"^(?:stat::number_of_executed_units: |#)(\d+)", self.log, re.MULTILINE)
        return int(said[-1]) if said else None

    def __str__(self) -> str:
        outcome = {0: "no crash", None: "did not end"}.get(self.code, f"crashed ({self.code})")
        return f"{self.reader:8} {'?' if self.inputs is None else f'{self.inputs:,}':>10} inputs, {outcome}"


def _fuzz(folder: Path, seconds: float) -> list[_Fuzzed]:
    end = time.monotonic() + seconds + _TO_END
    with ExitStack() as stack:
        running = {}
        for reader in READERS:
            (folder / reader).mkdir()
            command = [sys.executable, "-m", "tests.soak.fuzz_readers", reader, str(seconds), str(folder / reader)]
            log = stack.enter_context((folder / reader / "log").open("w"))
            running[reader] = subprocess.Popen(command, stdout=log, stderr=log, cwd=Path(__file__).parents[2])
            stack.callback(running[reader].wait)
            stack.callback(running[reader].kill)
        while time.monotonic() < end and any(process.poll() is None for process in running.values()):
            time.sleep(0.2)
        codes = {reader: process.poll() for reader, process in running.items()}
    return [
        _Fuzzed(reader, code, (folder / reader / "log").read_text(errors="replace")) for reader, code in codes.items()
    ]


@pytest.mark.soak
def test_no_bytes_crash_a_reader(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    fuzzed = _fuzz(tmp_path, _SECONDS)
    with capsys.disabled():
        print(f"\n{_SECONDS:.0f} s of random data for each reader, {time.monotonic() - began:.0f} s in all:")
        print("\n".join(f"  {each}" for each in fuzzed))
    bad = [each for each in fuzzed if each.code != 0 or not each.inputs]
    assert not bad, "\n".join(f"{each}:\n{each.log[-3000:]}" for each in bad)
