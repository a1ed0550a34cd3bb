"""Which language a text is in."""

import re
from functools import cache
from typing import Any

_CHARACTERS = 300
"""How much of a text is looked at."""
_BYTES = 40
"""A text shorter than this (in UTF-8, white space aside) is no evidence."""
_PROBABILITY = 0.9
_WORD = re.compile(r"[a-z']+")
# The commonest words of English: where they are many, the slow look is spared.
_ENGLISH = frozenset(
    "the of and to in is you that it he was for on are as with his they at be this have from or had by but not what "  # noqa: SIM905
    "all were we when your can said there use an each which she do how their if will up other about out many then them "
    "these so some her would make like him into time has its".split()
)
_ENGLISH_DISTINCT = 5
_ENGLISH_SHARE = 0.25


def known_languages() -> list[str]:
    """The ISO 639-1 codes of the languages that are told apart."""
    return sorted({str(label) for label in _identifier().nb_classes if len(label) == 2})


def language_of(text: str) -> str | None:
    """The ISO 639 code of the language a text begins in; None where that cannot be told for sure."""
    text = text[:_CHARACTERS]
    if len("".join(text.split()).encode("utf-8")) < _BYTES:
        return None
    if _is_plainly_english(text):
        return "en"
    language, probability = _identifier().classify(text)
    # "zxx" is what is in no language: code, numbers, addresses.
    return str(language) if probability >= _PROBABILITY and language != "zxx" else None


def _is_plainly_english(text: str) -> bool:
    if not text.isascii():
        return False
    words = _WORD.findall(text.lower())
    common = [word for word in words if word in _ENGLISH]
    return len(set(common)) >= _ENGLISH_DISTINCT and len(common) >= _ENGLISH_SHARE * len(words)


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
