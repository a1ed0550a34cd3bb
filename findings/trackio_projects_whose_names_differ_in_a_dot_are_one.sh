#!/usr/bin/env bash
# trackio: projects whose names differ only in dots, spaces or slashes share one database, and resume each other's runs.
#
# One would expect: a project is its name, or a name that cannot be one is refused.
# What happens: a project's file is named by the letters, digits, "-" and "_" of its name, the rest is left out without a
# word. "llama 1.1" and "llama 11" are both llama11.db: the runs of one are listed among those of the other, and with
# resume="allow" a run of a name that the other project has goes on there, its points behind the other's.
# What follows: use project names of letters, digits, "-" and "_" only.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q trackio==0.40.0
export TRACKIO_DIR="$folder/tracked" HF_HUB_OFFLINE=1
"$folder/venv/bin/python" - <<'PYTHON'
import contextlib
import importlib.metadata
import io
import pathlib
import os
import sys
import warnings

import trackio
from trackio.sqlite_storage import SQLiteStorage

print("trackio", importlib.metadata.version("trackio"))
said = io.StringIO()
with warnings.catch_warnings(record=True) as warned, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
    warnings.simplefilter("always")
    for project, loss in (("llama 1.1", 2.0), ("llama 11", 1.0)):
        trackio.init(project=project, name="sft", resume="allow", private=True, embed=False)
        trackio.log({"loss": loss}, step=1)
        trackio.finish()
files = sorted(path.name for path in pathlib.Path(os.environ["TRACKIO_DIR"]).glob("*.db"))
points = [(line["step"], line["loss"]) for line in SQLiteStorage.get_logs("llama 11", "sft")]
told = [str(one.message) for one in warned if "project" in str(one.message).lower()]
resumed = [line.strip() for line in said.getvalue().splitlines() if "Resumed" in line]
print("files:", files)
print("points of the run 'sft' of 'llama 11':", points)
print("said:", resumed + told)
as_seen = files == ["llama11.db"] and points == [(1, 2.0), (1, 1.0)] and len(resumed) == 1 and not told
print("as described" if as_seen else "the behavior changed")
sys.exit(0 if as_seen else 1)
PYTHON
