"""Lines and files of each room of the package and of its tests, as `make size` prints them."""

from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def room(path: Path) -> str:
    """The folder a file is counted under: a package of `core`, or what stands beside these."""
    *folders, _ = path.relative_to(ROOT).parts
    return "/".join(folders[:3])


def print_table(top: str) -> None:
    """Prints the rooms of `llama_acc` or `tests`: lines (docstrings and blank lines counted) and files."""
    files, lines = Counter[str](), Counter[str]()
    for path in sorted((ROOT / top).rglob("*.py")):
        files[room(path)] += 1
        lines[room(path)] += len(path.read_text(encoding="utf-8").splitlines())
    for name in files:
        print(f"{name:<28}{lines[name]:>8,}{files[name]:>6}")
    print(f"{top + ', in all':<28}{lines.total():>8,}{files.total():>6}\n")


if __name__ == "__main__":
    print(f"{'room':<28}{'lines':>8}{'files':>6}\n")
    print_table("llama_acc")
    print_table("tests")
