"""A download that is killed again and again comes to its end, with not a byte wrong and few of them twice."""

import random
import time
from pathlib import Path

import pytest

from tests.cli.commands import run, start
from tests.hub import Fault, Servers

SIZE = 40_000_000
KILLS = 25


@pytest.mark.soak
@pytest.mark.parametrize("kept_by", ["hub", "storage", "plain"])
def test_a_download_survives_any_number_of_kills(kept_by: str, servers: Servers, tmp_path: Path) -> None:
    rng = random.Random(kept_by)
    content = rng.randbytes(SIZE)
    servers.plain["/big.bin"] = content
    servers.plain_headers["/big.bin"] = {"ETag": '"one"'}
    servers.model("owner/name", {"big.bin": content}, large=10**12 if kept_by == "hub" else 1000)
    address = f"{servers.url}/big.bin" if kept_by == "plain" else "hf:owner/name/big.bin"
    command = ("download", address, "--to", tmp_path)
    for _ in range(KILLS):
        # The server may also cut the connection by itself.
        servers.fail("big.bin", Fault(delay=0.01, cut=rng.randrange(1, 20_000_000)))
        with start(*command) as process:
            time.sleep(rng.uniform(0.2, 3.0))
            process.kill()
        assert not (tmp_path / "big.bin").exists()
        servers.faults["big.bin"].clear()
        if (tmp_path / ".big.bin.part").exists() and (tmp_path / ".big.bin.part").stat().st_size > SIZE - 4_000_000:
            break
    assert run(*command).returncode == 0
    assert (tmp_path / "big.bin").read_bytes() == content
    # What was on its way when a kill came, in buffers of both sides, is asked for again.
    assert servers.sent["big.bin"] < SIZE + KILLS * 8_000_000
