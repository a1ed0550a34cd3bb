"""What can go wrong, as the user is told it. Imports nothing, so every module may use it."""

import difflib
from collections.abc import Iterable, Sequence


class LlamaAccError(Exception):
    """A failure with one clear message. `exit_code` is what the command returns."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        """Args:
        message: what is wrong and where.
        hint: what to type or try next.
        """
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n{self.hint}"


class UserError(LlamaAccError):
    """The user's input is at fault: a flag, a recipe, data, a checkpoint. Found before the first step."""

    exit_code = 2


class DataError(UserError):
    """Problems in data files, one to a line. `problems` names each of them with its place."""

    def __init__(self, problems: list[str], hint: str | None = None) -> None:
        one = len(problems) == 1
        super().__init__(problems[0] if one else f"{len(problems)} problems in the data:\n{listed(problems)}", hint)
        self.problems = problems


class RunError(LlamaAccError):
    """It failed while running: a non-finite loss, no memory, a full disk."""

    exit_code = 1


def raise_together(errors: Sequence[UserError]) -> None:
    """Raise one error for all of `errors`, if there are any."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        problems = [p for e in errors for p in (e.problems if isinstance(e, DataError) else [e.message])]
        raise DataError(problems, next((e.hint for e in errors if e.hint), None))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A question naming the closest of `known` ("did you mean 'lima'?"), or an empty string if none is close."""
    close = difflib.get_close_matches(word, list(known), n=2, cutoff=0.6)
    return f"did you mean {' or '.join(repr(name) for name in close)}?" if close else ""


def listed(problems: Sequence[str], most: int = 20) -> str:
    """Problems one to a line, at most `most` of them, then the count of the rest."""
    lines = [f"  {problem}" for problem in problems[:most]]
    if len(problems) > most:
        lines.append(f"  ... and {len(problems) - most} more")
    return "\n".join(lines)
