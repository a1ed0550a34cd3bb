"""Bytes from Hugging Face's chunk storage, by hf_xet, which huggingface_hub brings along where it is built."""

import os
from collections.abc import Iterator

from llama_acc.core.download.http import Transient

# It should give up soon: the same bytes can be had over HTTP.
_SETTINGS = {
    "client.connect_timeout": "6s",
    "client.read_timeout": "30s",
    "client.retry_max_attempts": 2,
    "client.retry_max_duration": "15s",
    "telemetry.enabled": False,
}


def is_available() -> bool:
    """Whether hf_xet is installed, in a version that can begin in the middle of a file, and not switched off."""
    if os.environ.get("HF_HUB_DISABLE_XET", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    try:
        from hf_xet import XetConfig, XetDownloadStreamGroup  # noqa: F401
    except ImportError:
        return False
    return True


def chunks(xet_hash: str, size: int, offset: int, token_url: str, headers: dict[str, str]) -> Iterator[bytes]:
    """A file's bytes from `offset` on.

    Args:
        xet_hash: of the file.
        size: of the file.
        offset: where to begin.
        token_url: of the hub: gives the storage's address and a token for it. Only the hub sees `headers`.
        headers: with the hub's token.

    Raises:
        Transient: something went wrong; over HTTP it may work.
    """
    from hf_xet import XetConfig, XetFileInfo, XetSession

    try:
        session = XetSession(config=XetConfig().with_config(_SETTINGS))
        group = session.new_download_stream_group(token_refresh_url=token_url, token_refresh_headers=headers)
        yield from group.download_stream(XetFileInfo(xet_hash, size), start=offset)
    except (OSError, RuntimeError, ValueError) as error:
        raise Transient(f"hf_xet: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from error
