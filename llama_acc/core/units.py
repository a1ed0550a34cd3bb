"""Quantities as people say them."""


def size_text(size: float) -> str:
    """Bytes: 512 bytes, 1.5 MiB, 33.5 GiB."""
    for exponent, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >= 2**exponent:
            return f"{size / 2**exponent:,.1f} {unit}"
    return count_text(round(size), "byte")


def count_text(count: float, thing: str) -> str:
    """So many things of one kind: 1 item, 2 items, 1,234 items, 0.5 epochs."""
    number = f"{count:g}" if isinstance(count, float) else f"{count:,}"
    return f"{number} {thing}{'' if count == 1 else 's'}"
