"""Quantities as people say them."""


def size_text(size: float) -> str:
    """Bytes: 512 bytes, 1.5 MiB, 33.5 GiB."""
    for exponent, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >= 2**exponent:
            return f"{size / 2**exponent:,.1f} {unit}"
    return f"{size:.0f} byte{'' if size == 1 else 's'}"
