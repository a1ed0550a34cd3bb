"""Fetching data that a recipe names by its address, with nobody watching."""

from pathlib import Path


class Unwatched:
    """A `Watch` that tells nobody."""

    def begin(self, files: int, total: int | None) -> None:
        """See `Watch`."""

    def receiving(self, name: str, done: int, total: int | None) -> None:
        """See `Watch`."""

    def working(self, doing: str, name: str, done: int, total: int) -> None:
        """See `Watch`."""

    def finished(self, name: str) -> None:
        """See `Watch`."""

    def note(self, text: str) -> None:
        """See `Watch`."""


def fetch_quietly(address: str) -> list[Path]:
    """See `downloads.fetch_data`."""
    # It brings the hub's client along, which takes a while to import.
    from llama_acc.core.download.downloads import fetch_data

    return fetch_data(address, Unwatched())
