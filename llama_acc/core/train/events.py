"""What a run tells whoever watches it."""

from pathlib import Path
from typing import Protocol

from llama_acc.core.hub import fetch_data
from llama_acc.core.train.metrics import Metrics
from llama_acc.core.train.plan import Plan


class Events(Protocol):
    """A watcher of a run: the command line's console, or a test."""

    def note(self, text: str) -> None:
        """Something the user should know."""

    def fetch(self, address: str) -> list[Path]:
        """The files that an address of data means; what is not there yet is fetched, and that may be shown."""

    def working(self, text: str) -> None:
        """What is being done from now on, such as "loading the weights"."""

    def encoding(self, file: str, items: int, fraction: float) -> None:
        """So many items of a file are encoded, which are about this part of it."""

    def opening(self, done: int, total: int) -> None:
        """So many of the data's images were opened."""

    def plan(self, plan: Plan) -> None:
        """What will be done, before it starts."""

    def step(self, metrics: Metrics, plan: Plan) -> None:
        """An optimizer step, as in metrics.jsonl."""

    def validation(self, metrics: Metrics) -> None:
        """A validation line, as in metrics.jsonl."""

    def saved(self, checkpoint: Path) -> None:
        """A checkpoint is whole on disk."""


class Quiet:
    """Watches and says nothing."""

    def note(self, text: str) -> None:
        """See `Events`."""

    def fetch(self, address: str) -> list[Path]:
        """See `Events`."""
        return fetch_data(address)

    def working(self, text: str) -> None:
        """See `Events`."""

    def encoding(self, file: str, items: int, fraction: float) -> None:
        """See `Events`."""

    def opening(self, done: int, total: int) -> None:
        """See `Events`."""

    def plan(self, plan: Plan) -> None:
        """See `Events`."""

    def step(self, metrics: Metrics, plan: Plan) -> None:
        """See `Events`."""

    def validation(self, metrics: Metrics) -> None:
        """See `Events`."""

    def saved(self, checkpoint: Path) -> None:
        """See `Events`."""
