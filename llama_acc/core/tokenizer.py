"""Tokenizers: a SentencePiece `tokenizer.model` or a Hugging Face `tokenizer.json`, behind one interface.

- Spans are in characters of the text, also for byte pieces: every piece of a multi-byte character spans that character.
- BOS and EOS are added by us, never by the tokenizer's own post-processing.
- `StreamDecoder` gives a generated text piece by piece, exactly as `decode` gives it whole.
"""

import bisect
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from llama_acc.core.errors import UserError
from llama_acc.core.sentencepiece_json import fast_tokenizer

SENTENCEPIECE_FILE = "tokenizer.model"
HUGGING_FACE_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"

# Used where no tokenizer_config.json says which they are; the first pair of which both are in the vocabulary wins.
_KNOWN_BOS_EOS = [
    ("<s>", "</s>"),
    ("<|begin_of_text|>", "<|eot_id|>"),
    ("<|begin_of_text|>", "<|end_of_text|>"),
    ("<|im_start|>", "<|im_end|>"),
    ("<|endoftext|>", "<|endoftext|>"),
]
_PRIVATE_USE = ("\U000f0000", "\U0010fffd")
_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


Own = Sequence[tuple[int, int]]
"""Characters [begin, end) of a text in which the text of a special token is not that token."""


class Spans(NamedTuple):
    """A text's tokens, and the characters of the text [begin, end) that each of them stands for."""

    ids: list[int]
    begins: NDArray[np.int64]
    ends: NDArray[np.int64]


class Tokenizer(Protocol):
    """What encodes and decodes text. `path` is its main file."""

    path: Path
    vocab_size: int
    bos_id: int
    eos_id: int
    # Tokens that end an answer: EOS, and what else has no place in a text.
    end_ids: frozenset[int]

    def fingerprint(self) -> str:
        """sha256 of the files that decide how text is encoded."""

    def files(self) -> list[Path]:
        """The files to copy next to a checkpoint."""

    def encode(self, text: str, bos: bool = False, eos: bool = False, own: Own = ()) -> list[int]:
        """The tokens of a text, between BOS and EOS if asked for. Of `own` see `encode_batch`."""

    def encode_batch(self, texts: list[str], own: Sequence[Own] | None = None) -> list[list[int]]:
        """The tokens of every text, without BOS or EOS; uses all cores.

        Args:
            texts: the texts.
            own: for each text the spans of it, in ascending order, that somebody wrote who is not to write special
                tokens, such as the user: what overlaps them is encoded as text. None: there are none.
        """

    def encode_batch_with_spans(self, texts: list[str], own: Sequence[Own] | None = None) -> list[Spans]:
        """The tokens of every text and where in the text they stand; uses all cores. Of `own` see `encode_batch`."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens. BOS, EOS and ids outside the vocabulary have none."""

    def piece(self, token: int) -> str:
        """A token as the vocabulary writes it, for display."""

    def may_change(self, token: int) -> bool:
        """Whether what follows this token can change how it decodes, other than by completing a character."""


class SentencePieceTokenizer:
    """LLaMA's own kind: a SentencePiece `tokenizer.model`."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        """Args:
            path: the model file.
            threads: for batches; None: one for each core.

        Raises:
            UserError: it cannot be read, is not a SentencePiece model, or has no BOS or EOS.
        """
        from sentencepiece import SentencePieceProcessor

        self.path, self._threads = path, threads or -1
        data = _read(path)
        try:
            if not data:
                raise RuntimeError("empty")
            self._processor: Any = SentencePieceProcessor(model_proto=data)
        except RuntimeError as error:
            raise _not_sentencepiece(path, data) from error
        self._fingerprint = hashlib.sha256(data).hexdigest()
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise UserError(f"{path} has no BOS or no EOS piece", "train it with bos_id=1 and eos_id=2, as LLaMA's is")
        self.end_ids = frozenset({self.eos_id})
        self._data = data
        controls = (i for i in range(self.vocab_size) if self._processor.IsControl(i) or self._processor.IsUnknown(i))
        self._special = _any_of(self._processor.IdToPiece(i) for i in controls)

    def fingerprint(self) -> str:
        return self._fingerprint

    def files(self) -> list[Path]:
        return [self.path]

    def encode(self, text: str, bos: bool = False, eos: bool = False, own: Own = ()) -> list[int]:
        return [self.bos_id] * bos + self.encode_batch([text], [own])[0] + [self.eos_id] * eos

    def encode_batch(self, texts: list[str], own: Sequence[Own] | None = None) -> list[list[int]]:
        encoded: list[list[int]] = self._processor.encode(texts, num_threads=self._threads)
        for i in self._with_special_tokens(texts, own):
            encoded[i] = self._in_json.encode_batch([texts[i]], own and [own[i]])[0]
        return encoded

    def encode_batch_with_spans(self, texts: list[str], own: Sequence[Own] | None = None) -> list[Spans]:
        mappings = self._processor.encode(texts, return_type="offset_mapping", num_threads=self._threads)
        encoded = [_character_spans(m["ids"], m["offsets"], self._processor.IsByte) for m in mappings]
        for i in self._with_special_tokens(texts, own):
            encoded[i] = self._in_json.encode_batch_with_spans([texts[i]], own and [own[i]])[0]
        return encoded

    def _with_special_tokens(self, texts: list[str], own: Sequence[Own] | None) -> list[int]:
        """Which texts hold special tokens: SentencePiece knows none in a text."""
        return [
            i
            for i, text in enumerate(texts)
            if any(not _overlaps(match.span(), own[i] if own else ()) for match in self._special.finditer(text))
        ]

    @functools.cached_property
    def _in_json(self) -> "HuggingFaceTokenizer":
        """The same tokenizer, of the kind that knows special tokens in a text."""
        fast = fast_tokenizer(self._data, self.path)
        return HuggingFaceTokenizer(self.path, fast.to_str().encode())

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._processor.decode([int(i) for i in ids if 0 <= i < self.vocab_size])
        return text

    def piece(self, token: int) -> str:
        return str(self._processor.IdToPiece(token)) if 0 <= token < self.vocab_size else f"<{token}>"

    def may_change(self, token: int) -> bool:
        return False


class HuggingFaceTokenizer:
    """A Hugging Face `tokenizer.json`."""

    def __init__(self, path: Path, data: bytes | None = None) -> None:
        """Args:
            path: the `tokenizer.json`; a `tokenizer_config.json` beside it names BOS and EOS.
            data: its content; None: read it.

        Raises:
            UserError: a file cannot be read, or BOS and EOS cannot be told.
        """
        from tokenizers import Tokenizer as Fast
        from tokenizers import processors

        self.path = path
        data = _read(path) if data is None else data
        try:
            self._fast: Any = Fast.from_str(data.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path} is not a tokenizer.json that can be read: {error}") from error
        self._fast.no_truncation()
        self._fast.no_padding()
        # We never add special tokens through it, and what else it does is trim white space off the spans.
        self._fast.post_processor = processors.ByteLevel(trim_offsets=False)
        config_path = path.parent / CONFIG_FILE
        config = _read(config_path) if config_path.exists() else b""
        self._fingerprint = hashlib.sha256(data + config).hexdigest()
        vocabulary: dict[str, int] = self._fast.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values()) + 1
        self.bos_id, self.eos_id = _bos_eos(path, config, vocabulary)
        # Models are published with an EOS that is not the token their answers end with (<|eot_id|>, <|im_end|>), and
        # a special token inside an answer would be the start of another turn.
        self._fast.add_special_tokens([self.piece(self.bos_id), self.piece(self.eos_id)])
        added = self._fast.get_added_tokens_decoder()
        self._special_tokens = {token: entry for token, entry in added.items() if entry.special}
        self._special = _any_of(entry.content for entry in self._special_tokens.values())
        self.end_ids = frozenset({self.eos_id, *self._special_tokens})
        self._with_marks = functools.lru_cache(maxsize=1)(self._make_marked)
        # A run of byte pieces is decoded as a whole by this decoder: one wrong byte spoils all of it.
        self._bytes_fall_back = b'"ByteFallback"' in data

    def fingerprint(self) -> str:
        return self._fingerprint

    def files(self) -> list[Path]:
        beside = (self.path.parent / name for name in (CONFIG_FILE, CHAT_TEMPLATE_FILE))
        return [self.path, *(file for file in beside if file.exists())]

    def encode(self, text: str, bos: bool = False, eos: bool = False, own: Own = ()) -> list[int]:
        return [self.bos_id] * bos + self.encode_batch([text], [own])[0] + [self.eos_id] * eos

    def encode_batch(self, texts: list[str], own: Sequence[Own] | None = None) -> list[list[int]]:
        encoded = [e.ids for e in self._fast.encode_batch_fast(texts, add_special_tokens=False)]
        for i in self._with_special_tokens_in_own(texts, own):
            encoded[i] = self._encode_own(texts[i], own[i] if own else ()).ids
        return encoded

    def encode_batch_with_spans(self, texts: list[str], own: Sequence[Own] | None = None) -> list[Spans]:
        encoded = self._fast.encode_batch(texts, add_special_tokens=False)
        spans = [_character_spans(e.ids, e.offsets, self._is_byte) for e in encoded]
        for i in self._with_special_tokens_in_own(texts, own):
            spans[i] = self._encode_own(texts[i], own[i] if own else ())
        return spans

    def _with_special_tokens_in_own(self, texts: list[str], own: Sequence[Own] | None) -> list[int]:
        return [
            i
            for i, spans in enumerate(own or ())
            if spans and any(_overlaps(match.span(), spans) for match in self._special.finditer(texts[i]))
        ]

    def _encode_own(self, text: str, own: Own) -> Spans:
        """Encodes special tokens of `text` that overlap `own` as text.

        The others are written as marks of the same length, so that one pass cuts and normalizes the text as ever.
        """
        first = _unused_private_use(text, len(self._special_tokens))
        marked, where = text, self._fast.encode(text, add_special_tokens=False)
        marks = dict(zip(self._special_tokens, range(first, first + len(self._special_tokens)), strict=True))
        for token, (begin, end) in zip(where.ids, where.offsets, strict=True):
            content = self._special_tokens[token].content if token in self._special_tokens else ""
            begin = text.find(content, begin, end) if content else -1
            if begin >= 0 and not _overlaps((begin, begin + len(content)), own):
                marked = marked[:begin] + chr(marks[token]) * len(content) + marked[begin + len(content) :]
        fast, ids = self._with_marks(first)
        encoded = fast.encode(marked, add_special_tokens=False)
        spans = _character_spans(encoded.ids, encoded.offsets, self._is_byte)
        return spans._replace(ids=[ids.get(token, token) for token in spans.ids])

    def _make_marked(self, first: int) -> tuple[Any, dict[int, int]]:
        """The tokenizer that knows no special tokens but their marks, characters from `first` on; the marks' ids."""
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as Fast

        fast: Any = Fast.from_str(self._fast.to_str())
        fast.encode_special_tokens = True
        ids = {}
        for mark, (token, entry) in enumerate(self._special_tokens.items(), first):
            content = chr(mark) * len(entry.content)
            fast.add_tokens([AddedToken(content, lstrip=entry.lstrip, rstrip=entry.rstrip, normalized=False)])
            ids[fast.token_to_id(content)] = token
        return fast, ids

    def decode(self, ids: Sequence[int]) -> str:
        kept = [int(i) for i in ids if 0 <= i < self.vocab_size and i != self.bos_id and i != self.eos_id]
        # Other special tokens stay: a stop string such as <|eot_id|> must be findable in the text.
        text: str = self._fast.decode(kept, skip_special_tokens=False)
        return text

    def piece(self, token: int) -> str:
        piece = self._fast.id_to_token(token) if 0 <= token < self.vocab_size else None
        return f"<{token}>" if piece is None else str(piece)

    def may_change(self, token: int) -> bool:
        # What decode leaves out does not end a run of byte pieces either.
        skipped = token in (self.bos_id, self.eos_id) or not 0 <= token < self.vocab_size
        return self._bytes_fall_back and (skipped or self._is_byte(token))

    def _is_byte(self, token: int) -> bool:
        return _BYTE_PIECE.fullmatch(self.piece(token)) is not None


class StreamDecoder:
    """Turns tokens into text as they come. All that it gives, put together, is `tokenizer.decode` of all of them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # The tokens from the last ones given (whose text decides, say, whether a leading space is dropped) on,
        # and how many of them have been given.
        self._window: list[int] = []
        self._given = 0

    def push(self, token: int) -> str:
        """The text that `token` completes; empty as long as a character is incomplete."""
        self._window.append(token)
        if self._tokenizer.may_change(token):
            return ""
        text = self._tokenizer.decode(self._window)
        return "" if text.endswith("\ufffd") else self._give(text)

    def flush(self) -> str:
        """What is left at the end, incomplete or not."""
        return self._give(self._tokenizer.decode(self._window))

    def _give(self, text: str) -> str:
        new = text[len(self._tokenizer.decode(self._window[: self._given])) :]
        # A window must begin with tokens that have a text, or what follows would be taken for the text's start.
        if self._tokenizer.decode(self._window[self._given :]):
            self._window = self._window[self._given :]
        self._given = len(self._window)
        return new


def load_tokenizer(path: str | Path, threads: int | None = None) -> Tokenizer:
    """The tokenizer of a file, or of a folder that holds one.

    Args:
        path: the file or folder.
        threads: that SentencePiece encodes batches with; None: one for each core. (The other library obeys
            TOKENIZERS_PARALLELISM.)

    Raises:
        UserError: there is none, or it cannot be read.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        found = _tokenizer_in(path)
        if found is None:
            raise UserError(
                f"no tokenizer in {path}: it has neither {SENTENCEPIECE_FILE} nor {HUGGING_FACE_FILE}",
                "give one with --tokenizer FILE",
            )
        path = found
    return HuggingFaceTokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path, threads)


def find_tokenizer(folder: str | Path) -> Path | None:
    """The tokenizer file in a checkpoint's folder, or one level up, where Meta's release has it."""
    folder = Path(folder)
    return _tokenizer_in(folder) or _tokenizer_in(folder.absolute().parent)


def _tokenizer_in(folder: Path) -> Path | None:
    names = (SENTENCEPIECE_FILE, HUGGING_FACE_FILE)
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"there is no tokenizer {path}", "give one with --tokenizer FILE") from error
    except OSError as error:
        raise UserError(f"cannot read the tokenizer {path}: {error.strerror}") from error


def _not_sentencepiece(path: Path, data: bytes) -> UserError:
    """LLaMA 3 ships a tiktoken file, lines of "base64 rank", under the same name."""
    if re.match(rb"[A-Za-z0-9+/=]+ \d+\s", data):
        hint = f"it is a tiktoken file (LLaMA 3's): use the {HUGGING_FACE_FILE} of the same model"
    else:
        hint = "it may be a Git LFS pointer or a download that was cut off: fetch it again"
    return UserError(f"{path} is not a SentencePiece model", hint)


def _bos_eos(path: Path, config: bytes, vocabulary: dict[str, int]) -> tuple[int, int]:
    try:
        settings = json.loads(config) if config else {}
    except ValueError as error:
        raise UserError(f"{path.parent / CONFIG_FILE} is not JSON: {error}") from error
    bos, eos = (_token_text(settings.get(key)) for key in ("bos_token", "eos_token"))
    if eos is not None:
        # LLaMA2-Accessory too begins with EOS where a model has no BOS (GPT-2's family).
        bos = bos if bos is not None else eos
    else:
        known = ((b, e) for b, e in _KNOWN_BOS_EOS if b in vocabulary and e in vocabulary)
        bos, eos = next(known, (None, None))
    if bos is None or eos is None:
        raise UserError(f"cannot tell BOS and EOS of {path}", f"name them in {CONFIG_FILE}: bos_token and eos_token")
    missing = [repr(token) for token in (bos, eos) if token not in vocabulary]
    if missing:
        raise UserError(f"{path.parent / CONFIG_FILE} names {' and '.join(missing)}, which {path.name} does not have")
    return vocabulary[bos], vocabulary[eos]


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Finds the longest of some texts."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")


def _overlaps(span: tuple[int, int], own: Own) -> bool:
    """Whether a span shares a character with one of `own`."""
    at = bisect.bisect_right(own, span[0], key=lambda other: other[1])
    return at < len(own) and own[at][0] < span[1] and own[at][0] < own[at][1]


def _unused_private_use(text: str, count: int) -> int:
    """The first of `count` characters in a row without a meaning that `text` does not use."""
    used = {ord(character) for character in text if character >= _PRIVATE_USE[0]}
    low, high = map(ord, _PRIVATE_USE)
    free = (first for first in range(low, high - count, count) if used.isdisjoint(range(first, first + count)))
    found = next(free, None)
    if found is None:
        raise UserError("a text that holds a special token uses all of Unicode's private-use characters")
    return found


def _token_text(setting: Any) -> str | None:
    """A special token in tokenizer_config.json is a string, or an object with its `content`."""
    content = setting.get("content") if isinstance(setting, dict) else setting
    return content if isinstance(content, str) else None


def _character_spans(ids: list[int], offsets: list[tuple[int, int]], is_byte: Callable[[int], bool]) -> Spans:
    """Spans as arrays. SentencePiece gives a character to the last of its byte pieces; here all of them span it."""
    flat = np.fromiter(chain.from_iterable(offsets), dtype=np.int64, count=2 * len(offsets)).reshape(-1, 2)
    begins, ends = flat[:, 0].copy(), flat[:, 1].copy()
    for i in np.flatnonzero(begins == ends)[::-1].tolist():
        if i + 1 < len(ids) and is_byte(ids[i]):
            ends[i] = ends[i + 1]
    return Spans(list(ids), begins, ends)
