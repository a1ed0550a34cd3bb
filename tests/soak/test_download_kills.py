"""A download that is killed again and again comes to its end, with not a byte wrong and nothing left behind."""

import random
import time
from pathlib import Path

import pytest

from tests.cli.commands import run, start
from tests.hub import Fault, Servers

SIZE = 40_000_000
KILLS = 25


@pytest.mark.soak
@pytest.mark.parametrize("kept_by", ["hub", "plain"])
def test_a_download_survives_any_number_of_kills(kept_by: str, servers: Servers, tmp_path: Path) -> None:
    rng = random.Random(kept_by)
    content = rng.randbytes(SIZE)
    servers.plain["/big.bin"] = content
    servers.plain_headers["/big.bin"] = {"ETag": '"one"'}
    servers.model("owner/name", {"big.bin": content})
    address = f"{servers.url}/big.bin" if kept_by == "plain" else "hf:owner/name/big.bin"
    command = ("download", address, "--to", tmp_path)
    for _ in range(KILLS):
        servers.fail("big.bin", Fault(delay=0.01))
        with start(*command) as process:
            time.sleep(rng.uniform(0.2, 3.0))
            process.kill()
        assert not (tmp_path / "big.bin").exists() or (tmp_path / "big.bin").read_bytes() == content
        servers.faults["big.bin"].clear()
    assert run(*command).returncode == 0
    assert (tmp_path / "big.bin").read_bytes() == content
    assert not (tmp_path / ".incoming").exists()
