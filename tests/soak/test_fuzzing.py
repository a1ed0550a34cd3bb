"""Ten minutes of random data for every reader of data files, all at once: nothing but a UserError may come of it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.soak.fuzz_readers import READERS

_SECONDS = float(os.environ.get("FUZZ_SECONDS", "600"))


@pytest.mark.soak
def test_no_bytes_crash_a_reader(tmp_path: Path) -> None:
    running = {}
    for reader in READERS:
        folder = tmp_path / reader
        folder.mkdir()
        command = [sys.executable, "-m", "tests.soak.fuzz_readers", reader, str(_SECONDS), str(folder)]
        with (folder / "log").open("w") as log:
            running[reader] = subprocess.Popen(command, stdout=log, stderr=log, cwd=Path(__file__).parents[2])
    try:
        codes = {reader: process.wait(timeout=_SECONDS + 300) for reader, process in running.items()}
    finally:
        for process in running.values():
            process.kill()
    logs = {reader: (tmp_path / reader / "log").read_text(errors="replace") for reader in READERS}
    crashed = {reader: log[-3000:] for reader, log in logs.items() if codes[reader]}
    assert not crashed, "\n".join(f"{reader}:\n{log}" for reader, log in crashed.items())
    for reader, log in logs.items():
        executed = re.search(r"number_of_executed_units: (\d+)", log)
        assert executed is not None, log[-2000:]
        print(f"{reader}: {int(executed[1]):,} inputs")
