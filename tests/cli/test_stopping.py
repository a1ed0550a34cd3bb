"""Ctrl-C and SIGTERM end a command with 130 and 143 and no traceback, wherever in it they fall."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.commands import PATIENCE, environment

# Runs the command line, which gets a signal where `{place}` puts it.
_PROGRAM = """
import os, signal, sys, time
def send():
    os.kill(os.getpid(), {number})
class Importing:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            if {module!r} != "typer":
                from llama_acc.cli import stopping
                stopping._IMPORT_PATIENCE = 60.0  # a slow machine is not what is tried
            send()
            time.sleep(0.1)  # it must not be broken off here
            print("went on", file=sys.stderr)
            if {module!r} != "typer":
                stopping._IMPORT_PATIENCE = 0.0
sys.meta_path.insert(0, Importing())
def in_reading():
    from llama_acc.core.errors import UserError
    import llama_acc.core.data.convert.run as run
    def swallowed(*arguments, **named):
        try:
            send()
            time.sleep(9)
        except: pass
        while True:
            time.sleep(0.01)
    def damaged(*arguments, **named):
        try:
            send()
            time.sleep(9)
        except BaseException as error:
            raise UserError("the file is damaged: copy it again") from error
    run.convert = {{"swallowed": swallowed, "damaged": damaged}}[{place!r}]
if {place!r} != "importing":
    in_reading()
from llama_acc.__main__ import main
main()
"""


@pytest.mark.parametrize(
    ("place", "module", "number"),
    [
        ("importing", "typer", signal.SIGINT),  # the command has not begun
        ("importing", "llama_acc.core.data.convert.run", signal.SIGTERM),  # it has, and imports what it needs
        ("swallowed", "", signal.SIGINT),
        ("damaged", "", signal.SIGTERM),
    ],
)
def test_a_signal_ends_a_command_wherever_it_falls(
    place: str, module: str, number: signal.Signals, tmp_path: Path
) -> None:
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"instruction": "Why?", "output": "So."}]))
    program = _PROGRAM.format(number=int(number), place=place, module=module)
    done = subprocess.run(
        [sys.executable, "-c", program, "convert-data", "alpaca", data, "--output", tmp_path / "converted.json"],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=PATIENCE,
    )
    assert done.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number], done.stderr
    assert not re.search("Traceback|damaged|Error", done.stderr), done.stderr
    assert done.stdout == ""
    if module == "typer":
        assert done.stderr == ""
    else:
        assert place == "importing" or not (tmp_path / "converted.json").exists()
        assert f"stopped by {'Ctrl-C' if number == signal.SIGINT else 'SIGTERM'}" in done.stderr
        assert ("went on" in done.stderr) == bool(module)


def test_ignored_signals_stay_ignored() -> None:
    """As `nohup` and a shell's `&` have it."""
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN);"
        "from llama_acc.cli import stopping; stopping.watch();"
        "print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN, callable(signal.getsignal(signal.SIGTERM)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment())
    assert done.stdout == "True True\n", done.stderr
