"""A download as a test watches it."""

from pathlib import Path

from llama_acc.core.catalogue import resolve
from llama_acc.core.hub import Downloaded, Downloader


class Watch:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.first: dict[str, int] = {}

    def progress(self, label: str, done: int, total: int | None) -> None:
        self.first.setdefault(label, done)


def download(name: str, to: Path | None, watch: Watch | None = None, token: str | None = None) -> Downloaded:
    """Downloads."""
    watch = watch or Watch()
    (request,) = resolve([name], to)
    return Downloader(watch.progress, watch.notes.append, token).download(request)


def visible(folder: Path) -> list[str]:
    """What a user sees of a folder."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
