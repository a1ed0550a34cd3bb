"""Quantities as people say them, and text of any origin shown so that it cannot act on what shows it."""

# U+202A and its like turn the direction of all that follows; U+2028 and U+2029 break lines.
_HIDDEN = frozenset("\u200e\u200f\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


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


def escape_control_chars(text: str) -> str:
    """The text with its code, or its picture, for every character that acts on a terminal or a page."""
    return text if text.isprintable() else "".join(map(_escaped, text))


def _escaped(character: str) -> str:
    code = ord(character)
    if code < 0x20 and character not in "\n\t":
        return chr(0x2400 + code)  # the picture of the control character
    if code == 0x7F:
        return "\u2421"
    return f"<U+{code:04X}>" if 0x80 <= code < 0xA0 or character in _HIDDEN else character
