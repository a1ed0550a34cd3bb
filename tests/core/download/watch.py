"""A download as a test watches it."""

from pathlib import Path

from llama_acc.core.download.downloads import Downloaded, Downloader, understand
from llama_acc.core.download.transfer import Patience

QUICK = Patience(tries=4, first_wait=0.01)


class Watch:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.begun: list[tuple[int, int | None]] = []
        self.first: dict[str, int] = {}

    def begin(self, files: int, total: int | None) -> None:
        self.begun.append((files, total))

    def receiving(self, name: str, done: int, total: int | None) -> None:
        self.first.setdefault(name, done)

    def working(self, doing: str, name: str, done: int, total: int) -> None:
        pass

    def finished(self, name: str) -> None:
        pass

    def note(self, text: str) -> None:
        self.notes.append(text)


def download(name: str, to: Path | None, watch: Watch | None = None, token: str | None = None) -> Downloaded:
    """Downloads, without waiting long between tries."""
    (wanted,) = understand([name], to)
    return Downloader(token, watch or Watch(), QUICK).download(wanted)


def visible(folder: Path) -> list[str]:
    """What a user sees of a folder."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
