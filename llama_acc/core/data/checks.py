"""What may be wrong with items that can be trained on: each of them, and all of a file. None of it stops a run."""

import re
from array import array
from collections.abc import Iterator, Sequence
from functools import cache
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llama_acc.core.data.findings import EXAMPLES, Finding, Findings, beginning
from llama_acc.core.data.items import Checked, Dialogue, Item
from llama_acc.core.data.plain_text import Text, continues
from llama_acc.core.data.templates import Template

if TYPE_CHECKING:
    from llama_acc.core.data.cache import Encoded

CHECKS_VERSION = 9
"""Part of the cache's key: raise it whenever the same item may lead to other findings."""

Hashes = NDArray[np.uint64]
"""One for every item; 0: there is none."""

_ECHO_CHARACTERS = 20
"""A reply that begins with a question shorter than this may do so by chance ("Hi.", "Thank you")."""
_BEFORE = 20
"""Characters that are shown before a place within a text."""
_AROUND = 8
_NOT_ASCII = re.compile(rf"[^\x00-\x7f](?:[\x00-\x7f]{{0,{_AROUND}}}[^\x00-\x7f])*")

# The language of so many of the items, and of so many at least, is that of the file.
_MAIN_LANGUAGE_SHARE, _MAIN_LANGUAGE_ITEMS = 0.75, 4
_LANGUAGE_CHARACTERS, _LANGUAGE_BYTES, _LANGUAGE_PROBABILITY = 300, 40, 0.9
"""How much of a text is looked at; a shorter one (in UTF-8, white space aside) is no evidence; how sure it must be."""
_MOST_NOT_ASCII = 0.02  # quotation marks and dashes of English, but hardly another language's letters
_WORD = re.compile(r"[a-z']+")
# Common words of English that are no common words of another language in Latin letters. Where they are, and what is not
# ASCII is rare, the slow look is spared.
_ENGLISH_ALONE = frozenset(
    "the and that they this from but not what were when your can said there each which she how their other about many "  # noqa: SIM905
    "then them these some would him into its been because should could through who than those only between does".split()
)
_ENGLISH = _ENGLISH_ALONE.union(
    "a of to in is you it he was for on are as with his at be have or had by all we".split()  # noqa: SIM905
)
_AT_ONCE = 1 << 20  # documents that are compared
_PLACE = np.dtype([("file", np.int64), ("row", np.int64), ("digest", np.uint64)])


_QUANTILES = {"min": 0, "p25": 25, "p50": 50, "p75": 75, "p95": 95, "p99": 99, "max": 100}


def quantiles(lengths: ArrayLike) -> dict[str, int]:
    """Quantiles, each the length of an item that is there: the highest at or below it. Of none: empty. [N]"""
    values = np.asarray(lengths)
    figures = np.percentile(values, list(_QUANTILES.values()), method="lower").tolist() if len(values) else []
    return dict(zip(_QUANTILES, figures, strict=False))


class DatasetStats:
    """What is found in the rows of a file, in memory that hardly grows: counts, the first of each kind, 8 bytes a row.

    Rows are added in their order. The statistics of consecutive parts of a file can be made by several processes and
    merged: the result is the same. `most` findings of a kind are kept; None: all.
    """

    def __init__(self, most: int | None = EXAMPLES) -> None:
        self.findings = Findings(most)
        self.rows = 0
        self.items = 0  # rows that can be trained on
        self._languages = Findings(most)  # which of them is that of the rest is known at the end only
        self._hashes = array("Q")

    def add(self, row: Checked, stops: Sequence[str] = (), marks: Sequence[str] = ()) -> None:
        """Look at one more row, to be written in a format of these `text_stops` and `marks`. Of a document in sections,
        which counts once, the first one is looked at."""
        if continues(row.item):
            return
        self.rows += 1
        for problem in row.problems:
            self.findings.add(problem)
        self._hashes.append(0 if row.item is None else item_hash(row.item))
        if row.item is None:
            return
        self.items += 1
        for finding in (*check_item(row.item, row.where), *format_findings(row.item, row.where, stops, marks)):
            self.findings.add(finding)
        for name, text in replies_of(row.item):
            if (language := language_of(text)) is not None:
                self._languages.add(Finding(language, row.where, name, f"a reply in {language!r}", beginning(text)))
                break

    def merge(self, later: "DatasetStats") -> None:
        """Add the statistics of what follows in the file."""
        self.findings.merge(later.findings)
        self._languages.merge(later._languages)
        self.rows += later.rows
        self.items += later.items
        self._hashes.extend(later._hashes)

    @property
    def languages(self) -> dict[str, int]:
        """How many items are in each language, most first; those in none for sure are not counted."""
        return dict(self._languages.counts.most_common())

    @property
    def language(self) -> str | None:
        """The language that most of the items are in, if there is one."""
        total = self._languages.counts.total()
        for language, count in self._languages.counts.most_common(1):
            if total >= _MAIN_LANGUAGE_ITEMS and count >= _MAIN_LANGUAGE_SHARE * total:
                return language
        return None

    def hashes(self) -> Hashes:
        """One for every row; 0 where it is no item."""
        return np.array(self._hashes, dtype=np.uint64)

    def all_findings(self, with_duplicates: bool = True) -> Findings:
        """All findings so far, and those that only the whole file shows."""
        found = Findings(self.findings.most)
        found.merge(self.findings)
        main = self.language
        for language, count in self._languages.counts.items():
            if main not in (None, language):
                places = [
                    place._replace(kind="language", message=f"{place.message}, but the rest is in {main!r}")
                    for place in self._languages.places[language]
                ]
                found.extend("language", count, places)
        for row, first in duplicates(self.hashes()) if with_duplicates else ():
            found.add(duplicate_finding(f"item {row + 1}", f"item {first + 1}"))
        return found


def duplicates(hashes: Hashes) -> list[tuple[int, int]]:
    """The position of every item that was there before, in order, and the first position of the same. [N]"""
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    first = first[group]
    again = np.flatnonzero((first < np.arange(len(hashes))) & (hashes != 0))
    return list(zip(again.tolist(), first[again].tolist(), strict=True))


def duplicate_finding(where: str, first: str, value: str = "") -> Finding:
    """Says that an item was there before."""
    return Finding("duplicate", where, "", f"the same as {first}", value)


def cross_file_duplicates(
    names: Sequence[str], parts: Sequence["Encoded"], kept: int
) -> list[tuple[int, list[Finding]]]:
    """For every file what earlier ones have too, token by token and label by label: how much, and the first of it.

    What is in a file twice counts once; the rest is the file's own. A file that is used twice is not its own duplicate.
    `kept` places are reported of a file.
    """
    first_use: dict[Path, int] = {}
    for number, part in enumerate(parts):
        first_use.setdefault(part.path, number)
    counts = [0] * len(parts)
    found: list[list[tuple[int, int, int]]] = [[] for _ in parts]  # row, first file, row in that
    # In groups that memory has room for: those of one remainder.
    groups = -(-sum(len(parts[number]) for number in first_use.values()) // _AT_ONCE) if len(first_use) > 1 else 0
    for remainder in range(groups):
        chosen = []
        for number in first_use.values():
            digests = parts[number].table["digest"].copy()
            parts[number].release()
            rows = np.flatnonzero(digests % np.uint64(groups) == remainder)
            rows = rows[np.sort(np.unique(digests[rows], return_index=True)[1])]
            chosen.append(np.rec.fromarrays([np.full(len(rows), number), rows, digests[rows]], dtype=_PLACE))
        documents = np.concatenate(chosen)
        for again, first in duplicates(documents["digest"]):
            file, row, _ = documents[again].tolist()
            counts[file] += 1
            found[file].append((row, *documents[first].tolist()[:2]))
        found = [sorted(places)[:kept] for places in found]

    def item(number: int, row: int) -> str:
        return f"item {parts[number].table['item'][row] + 1}"

    def finding(number: int, row: int, first: int, first_row: int) -> Finding:
        return duplicate_finding(item(number, row), f"{item(first, first_row)} of {names[first]}")

    return [(count, [finding(i, *place) for place in found[i]]) for i, count in enumerate(counts)]


def check_item(item: Item, where: str) -> Iterator[Finding]:
    """Everything found in one item: roles out of order, empty replies, echoes, texts decoded wrongly."""
    question: str | None
    if isinstance(item, Dialogue):
        yield from _role_order(item, where)
        question = None
        for number, turn in enumerate(item.turns, start=1):
            if turn.is_label and "tool_calls" not in turn.more:
                yield from _reply(f"turn {number}, value", question, turn.text, where)
            question = turn.text if turn.role == "human" else None
    elif not isinstance(item, Text):
        question = f"{item.instruction}\n{item.input}" if item.input else item.instruction
        yield from _reply("output", question, item.output, where)
    for field, text in fields_of(item):
        if text.isascii():
            continue
        if (lost := text.find("\ufffd")) >= 0:
            message = f"U+FFFD stands for bytes that were lost, at character {lost + 1}"
            yield Finding("mojibake", where, field, message, _excerpt(text, lost))
        elif (garbled := _garbled(text)) is not None:
            message = f"UTF-8 read as another encoding, near character {garbled + 1}"
            yield Finding("mojibake", where, field, message, _excerpt(text, garbled))


def format_findings(item: Item, where: str, stops: Sequence[str], marks: Sequence[str]) -> Iterator[Finding]:
    """Texts of an item that look like a part of the prompt format, given its `text_stops` and `marks`."""
    for field, text in replies_of(item):
        if stop := next((stop for stop in stops if stop in text), None):
            place = text.index(stop)
            message = f"{stop!r}, with which a reply ends, at character {place + 1}"
            yield Finding("stop_in_reply", where, field, message, _excerpt(text, place))
    for field, text in fields_of(item):
        if mark := next((mark for mark in marks if mark in text), None):
            message = f"{mark!r} looks like a part of the prompt format; the model cannot tell them apart"
            yield Finding("format_mark", where, field, message, _excerpt(text, text.index(mark)))


def merged_finding(item: Item, where: str, template: Template) -> Finding:
    """Reports an item whose prompt and answer merge into one token (`encode.Document.merged`)."""
    trained = ", and is not trained, as in LLaMA2-Accessory" if template.prefix_labels else ""
    field, text = next(replies_of(item), ("", ""))
    return Finding("merged", where, field, f"the first token begins in the prompt{trained}", beginning(text))


def fields_of(item: Item) -> Iterator[tuple[str, str]]:
    """Names and texts of an item, in order; a dialogue's as "turn 2, value"."""
    if isinstance(item, Dialogue):
        for number, turn in enumerate(item.turns, start=1):
            yield f"turn {number}, value", turn.text
    elif isinstance(item, Text):
        yield "text", item.text
    else:
        yield "instruction", item.instruction
        if item.input is not None:
            yield "input", item.input
        yield "output", item.output
    if item.system is not None:
        yield "system", item.system


def replies_of(item: Item) -> Iterator[tuple[str, str]]:
    """Names and texts of what an item teaches."""
    if not isinstance(item, Dialogue):
        yield ("text", item.text) if isinstance(item, Text) else ("output", item.output)
        return
    for number, turn in enumerate(item.turns, start=1):
        if turn.is_label:
            yield f"turn {number}, value", turn.text


def item_hash(item: Item) -> int:
    """64 bits, the same for the same roles, weights, texts, calls and images; never 0."""
    digest = blake2b(digest_size=8)
    roles = (
        [turn.role + " " * (not turn.weight) for turn in item.turns] if isinstance(item, Dialogue) else ["single_turn"]
    )
    for part in (*roles, *(text for _, text in fields_of(item)), *item.images):
        digest.update(len(part).to_bytes(8, "little") + part.encode("utf-8"))
    return int.from_bytes(digest.digest(), "little") or 1


def known_languages() -> list[str]:
    """The ISO 639-1 codes of the languages that are distinguished."""
    return sorted({str(label) for label in _identifier().nb_classes if len(label) == 2})


def language_of(text: str) -> str | None:
    """The ISO 639 code of the language a text begins in; None where that is not sure."""
    text = text[:_LANGUAGE_CHARACTERS]
    if len("".join(text.split()).encode("utf-8")) < _LANGUAGE_BYTES:
        return None
    if len(text) - len(text.encode("ascii", "ignore")) <= _MOST_NOT_ASCII * len(text):
        words = _WORD.findall(text.lower())
        common = [word for word in words if word in _ENGLISH]
        if len(_ENGLISH_ALONE.intersection(common)) >= 2 and len(common) >= 0.2 * len(words):
            return "en"
    language, probability = _identifier().classify(text)
    # "zxx" is what is in no language: code, numbers, addresses.
    return str(language) if probability >= _LANGUAGE_PROBABILITY and language != "zxx" else None


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _role_order(item: Dialogue, where: str) -> Iterator[Finding]:
    roles = [turn.role for turn in item.turns]
    wrong = [] if roles[0] == "human" else [(1, f"the {roles[0]} begins")]
    for number, (before, role) in enumerate(pairwise(roles), start=2):
        if role == "tool" and before == "human":
            wrong.append((number, "a result of a tool that the assistant did not call"))
        elif before == role != "tool":
            wrong.append((number, f"a second {'reply' if role == 'assistant' else 'human turn'} in a row"))
    if roles[-1] != "assistant":
        of = "human" if roles[-1] == "human" else "a tool's"
        wrong.append((len(roles), f"the last turn is {of}: nothing answers it"))
    for number, message in wrong:
        yield Finding("role_order", where, f"turn {number}", message, beginning(item.turns[number - 1].text))


def _reply(field: str, question: str | None, reply: str, where: str) -> Iterator[Finding]:
    if not reply.strip():
        yield Finding("empty_reply", where, field, "an empty reply", beginning(reply))
        return
    if not question or question.lstrip()[:1].casefold() != reply.lstrip()[:1].casefold():
        return  # so most replies need no further look
    asked, answered = " ".join(question.split()).casefold(), " ".join(reply.split()).casefold()
    if asked == answered:
        yield Finding("echo", where, field, "the reply is the question", beginning(reply))
    elif len(asked) >= _ECHO_CHARACTERS and answered.startswith(asked):
        yield Finding("echo", where, field, "the reply begins with the whole question", beginning(reply))


def _garbled(text: str) -> int | None:
    """Where UTF-8 was read as Latin-1 or the like, so that ftfy would change it."""
    from ftfy import fix_encoding
    from ftfy.badness import BADNESS_RE

    done = 0
    for group in _NOT_ASCII.finditer(text):
        # To look around these characters only is several times faster than to look through the whole text.
        begin, end = group.start() - _AROUND, group.end() + _AROUND
        while (match := BADNESS_RE.search(text, max(begin, done), end)) is not None:
            # Such characters may be meant, as in »Über«: then they are not bytes of UTF-8.
            first, last = text.rfind("\n", 0, match.start()) + 1, text.find("\n", match.end())
            line = text[first : last if last >= 0 else None]
            if fix_encoding(line) != line:
                return int(match.start())
            done = first + len(line)
    return None


def _excerpt(text: str, place: int) -> str:
    return beginning(text[max(place - _BEFORE, 0) :])
