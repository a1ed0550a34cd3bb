"""What a run reports to whoever watches it. Imports no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_acc.core.hub import fetch_data

if TYPE_CHECKING:
    from llama_acc.core.train.plan import Plan


class Callback:
    """Watches a run and shows nothing; a subclass shows what it overrides."""

    def note(self, text: str) -> None:
        """Something the user should know."""

    def fetch(self, address: str) -> list[Path]:
        """The files that an address of data means; missing ones are downloaded, and that may be shown."""
        return fetch_data(address)

    def progress(self, label: str, done: int = 0, total: int = 0) -> None:
        """What is being done, such as "loading the model", and how far it is; `total` 0: that is not known."""

    def plan(self, plan: "Plan") -> list[tuple[str, str]]:
        """What will be done, before it starts. Returns what report.md says of it: subjects and texts."""
        return []

    def step(self, metrics: dict[str, Any], plan: "Plan") -> None:
        """An optimizer step, as in metrics.jsonl."""

    def validation(self, metrics: dict[str, Any]) -> None:
        """A validation line, as in metrics.jsonl."""

    def samples(self, step: int, answers: Mapping[str, str]) -> None:
        """What the model answers to each sample prompt after so many steps."""

    def saved(self, checkpoint: Path) -> None:
        """A checkpoint is whole on disk."""
