"""Text of any origin, shown so that it cannot act on what shows it. Imports nothing, so every module may use it."""

# U+202A and its like turn the direction of all that follows; U+2028 and U+2029 break lines.
_HIDDEN = frozenset("\u200e\u200f\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def visible(text: str) -> str:
    """A text without characters that act on a terminal or a page instead of being shown; those as their code."""
    if text.isprintable():
        return text
    return "".join(_visible(character) for character in text)


def _visible(character: str) -> str:
    code = ord(character)
    if character in "\n\t":
        return character
    if code < 0x20:
        return chr(0x2400 + code)  # the picture of the control character
    if code == 0x7F:
        return "\u2421"
    return f"<U+{code:04X}>" if 0x80 <= code < 0xA0 or character in _HIDDEN else character
