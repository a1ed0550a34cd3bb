"""Where llama-acc keeps downloads and its token cache."""

import os
from pathlib import Path


def home() -> Path:
    """The folder of downloads and caches: `LLAMA_ACC_HOME`, else `llama-acc` in the XDG data folder."""
    chosen = os.environ.get("LLAMA_ACC_HOME")
    if chosen:
        return Path(chosen).expanduser()
    data = os.environ.get("XDG_DATA_HOME")
    # The XDG specification says a relative path there is to be ignored.
    base = Path(data) if data and Path(data).is_absolute() else Path.home() / ".local" / "share"
    return base / "llama-acc"
