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
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llama_acc.core.errors import UserError
from llama_acc.core.input_files import read_bytes, read_object
from llama_acc.core.tokenizer_folder import (
    CONFIG_FILE,
    GENERATION_FILE,
    HUGGING_FACE_FILE,
    MISTRAL_FILE,
    SENTENCEPIECE_FILE,
    Settings,
    add_tokens,
    parse_json_tokenizer,
    read_folder,
    sentencepiece_to_json,
)

# Used where no tokenizer_config.json says which they are; the first pair of which both are in the vocabulary wins.
_KNOWN_BOS_EOS = [
    ("<s>", "</s>"),
    ("<|begin_of_text|>", "<|eot_id|>"),
    ("<|begin_of_text|>", "<|end_of_text|>"),
    ("<|im_start|>", "<|im_end|>"),
    ("<|endoftext|>", "<|endoftext|>"),
]
_PRIVATE_USE = (0xF0000, 0x10FFFD)
_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_MAX_BYTES = 1 << 28

Own = Sequence[tuple[int, int]]
"""Characters [begin, end) of a text in which the text of a special token is not that token."""


class Spans(NamedTuple):
    """A text's tokens, and the characters of the text [begin, end) that each of them stands for."""

    ids: list[int]
    begins: NDArray[np.int64]
    ends: NDArray[np.int64]


class Tokenizer(ABC):
    """What encodes and decodes text."""

    vocab_size: int
    bos_id: int
    eos_id: int
    end_ids: frozenset[int]  # tokens that end an answer: EOS, and what else has no place in a text
    named: Collection[int]  # ids that stand for a token
    special_texts: frozenset[str]  # of the special tokens

    def __init__(self, path: Path, settings: Settings, data: bytes) -> None:
        """`data` is the content of the main file, `settings` what stands beside it."""
        self.path, self.settings, self._data = path, settings, data

    @abstractmethod
    def encode_batch(self, texts: list[str], own: Sequence[Own] | None = None) -> list[list[int]]:
        """The tokens of every text, without BOS or EOS; uses all cores.

        Of each text `own` are the spans of it, in ascending order, that somebody wrote who is not to write special
        tokens, such as the user: what overlaps them is encoded as text.
        """

    @abstractmethod
    def encode_batch_with_spans(self, texts: list[str], own: Sequence[Own] | None = None) -> list[Spans]:
        """The tokens of every text and where in the text they stand; uses all cores. Of `own` see `encode_batch`."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens. BOS, EOS and ids outside the vocabulary have none."""

    @abstractmethod
    def piece(self, token: int) -> str:
        """A token as the vocabulary writes it, for display."""

    @abstractmethod
    def token_id(self, text: str) -> int | None:
        """The token that the vocabulary writes so; None: there is none."""

    @abstractmethod
    def to_json(self, merges: bool = True) -> dict[str, Any]:
        """The same tokenizer as a tokenizer.json; a SentencePiece model's, if asked so, without `merges`, which take
        most of the time."""

    def encode(self, text: str, bos: bool = False, eos: bool = False, own: Own = ()) -> list[int]:
        """The tokens of a text, between BOS and EOS if asked for. Of `own` see `encode_batch`."""
        return [self.bos_id] * bos + self.encode_batch([text], [own])[0] + [self.eos_id] * eos

    def prefix_length(self, ids: Sequence[int], text: str, end: int) -> int | None:
        """How many tokens `text[:end]` has by itself, told from those of the whole text; None: it must be encoded."""
        return None

    def may_change(self, token: int) -> bool:
        """Whether what follows this token can change how it decodes, other than by completing a character."""
        return False

    def is_special(self, text: str) -> bool:
        """Whether a text is that of a special token."""
        return text in self.special_texts

    def find_special(self, text: str) -> str | None:
        """The first special token that is written in a text."""
        return found.group() if (found := self._special.search(text)) else None

    @functools.cached_property
    def _special(self) -> re.Pattern[str]:
        """Finds the longest of them."""
        return re.compile("|".join(map(re.escape, sorted(self.special_texts, key=len, reverse=True))) or r"(?!)")

    def _with_special_tokens(self, texts: list[str], own: Sequence[Own] | None, in_own: bool) -> list[int]:
        """Which texts hold a special token that overlaps `own`, or one that does not."""
        return [
            i
            for i, (text, spans) in enumerate(zip(texts, own or [()] * len(texts), strict=True))
            if (spans or not in_own)
            and any(_overlaps(match.span(), spans) is in_own for match in self._special.finditer(text))
        ]

    def fingerprint(self) -> str:
        """sha256 of what decides how text is encoded."""
        return hashlib.sha256(self._data + self.settings.key().encode()).hexdigest()

    def files(self) -> dict[str, bytes]:
        """The files that make the same tokenizer of a checkpoint's folder, by name."""
        # What the file is called says how it is read.
        name = {".json": HUGGING_FACE_FILE, ".v3": MISTRAL_FILE}.get(self.path.suffix, SENTENCEPIECE_FILE)
        found = {name: self._data} | {file.name: read_bytes(file, _MAX_BYTES) for file in self.settings.files}
        # A model's config.json is another one beside a checkpoint: what it says of ends goes here.
        if self.settings.end_ids:
            generation = json.loads(found.get(GENERATION_FILE, b"{}")) | {"eos_token_id": sorted(self.settings.end_ids)}
            found[GENERATION_FILE] = json.dumps(generation, indent=1).encode()
        return found


class SentencePieceTokenizer(Tokenizer):
    """LLaMA's own kind: a SentencePiece `tokenizer.model` without added tokens."""

    def __init__(self, path: Path, settings: Settings, data: bytes, processor: Any, threads: int | None = None) -> None:
        """`processor` is the opened model; `threads` are for batches, None: one for each core.

        Raises:
            UserError: it has no BOS or EOS.
        """
        super().__init__(path, settings, data)
        self._processor, self._threads = processor, threads or -1
        self.vocab_size = processor.vocab_size()
        self.named = range(self.vocab_size)
        self.bos_id, self.eos_id = _bos_eos(path, settings, self.token_id, processor.bos_id(), processor.eos_id())
        self.end_ids = frozenset({self.eos_id, *settings.end_ids})
        controls = (i for i in self.named if processor.IsControl(i) or processor.IsUnknown(i))
        self.special_texts = frozenset(self.piece(i) for i in {*controls, self.bos_id, self.eos_id})

    def encode_batch(self, texts: list[str], own: Sequence[Own] | None = None) -> list[list[int]]:
        encoded: list[list[int]] = self._processor.encode(texts, num_threads=self._threads)
        for i in self._with_special_tokens(texts, own, in_own=False):  # SentencePiece knows none in a text
            encoded[i] = self._in_json.encode_batch([texts[i]], own and [own[i]])[0]
        return encoded

    def encode_batch_with_spans(self, texts: list[str], own: Sequence[Own] | None = None) -> list[Spans]:
        ids = self._processor.encode(texts, num_threads=self._threads)
        encoded = list(map(self._spans, ids, texts))
        for i in self._with_special_tokens(texts, own, in_own=False):
            encoded[i] = self._in_json.encode_batch_with_spans([texts[i]], own and [own[i]])[0]
        return encoded

    def _spans(self, ids: list[int], text: str) -> Spans:
        """Told from the tokens' bytes, where they are the text's; that costs a tenth of what SentencePiece takes."""
        content, space = text.encode(), self._space_in_front
        if b"".join([self._surfaces[token] for token in ids]) != b" " * space + content:
            mapping = self._processor.encode(text, return_type="offset_mapping")
            spans = _spans(mapping["ids"], mapping["offsets"])
            # It gives a character to the last of its byte pieces; here all of them span it.
            for i in np.flatnonzero(spans.begins == spans.ends)[::-1].tolist():
                if i + 1 < len(ids) and self._processor.IsByte(ids[i]):
                    spans.ends[i] = spans.ends[i + 1]
            return spans
        counts = self._byte_counts[np.array(ids, np.int32)]
        ends = counts.cumsum() - space
        begins = np.maximum(ends - counts, 0)
        if len(content) > len(text):
            first = (np.frombuffer(content, np.uint8) & 0xC0) != 0x80  # a character's first byte
            characters = np.concatenate([[0], first.cumsum()])
            begins, ends = characters[np.minimum(begins + 1, len(content))] - 1, characters[ends]
        return Spans(ids, begins, ends)

    @functools.cached_property
    def _in_json(self) -> "HuggingFaceTokenizer":
        """The same tokenizer, of the kind that knows special tokens in a text."""
        fast = sentencepiece_to_json(self._data, self.path, self.settings)
        return HuggingFaceTokenizer(self.path, self.settings, self._data, fast, self.bos_id, self.eos_id)

    def prefix_length(self, ids: Sequence[int], text: str, end: int) -> int | None:
        # Where a token ends at `end`, no merge went across it, so what is left of it came about without the rest.
        ends = self._byte_counts[np.array(ids, np.int32)].cumsum()
        position = len(text[:end].encode()) + self._space_in_front
        count = int(ends.searchsorted(position)) + 1
        known = end > 0 and count <= len(ids) and ends[count - 1] == position
        return count if known and ends[-1] == len(text.encode()) + self._space_in_front else None

    @functools.cached_property
    def _byte_counts(self) -> NDArray[np.int64]:
        """How many bytes of a text each token stands for; the unknown token: more than any text has."""
        counts = np.array([len(surface) for surface in self._surfaces])
        counts[self._processor.unk_id()] = 1 << 40
        return counts

    @functools.cached_property
    def _surfaces(self) -> list[bytes]:
        """The bytes of a text that each token stands for; the unknown token: those of none."""
        surfaces = [piece.replace("\u2581", " ").encode() for piece in map(self._processor.IdToPiece, self.named)]
        for token in (token for token, surface in enumerate(surfaces) if surface.startswith(b"<0x")):
            if self._processor.IsByte(token):
                surfaces[token] = bytes.fromhex(surfaces[token][3:5].decode())
        surfaces[self._processor.unk_id()] = b"\xff"
        return surfaces

    @functools.cached_property
    def _space_in_front(self) -> int:
        """How many bytes SentencePiece puts in front of a text."""
        return int(self._byte_counts[self._processor.encode("a")].sum()) - 1

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._processor.decode([int(i) for i in ids if 0 <= i < self.vocab_size])
        return text

    def piece(self, token: int) -> str:
        return str(self._processor.IdToPiece(token)) if 0 <= token < self.vocab_size else f"<{token}>"

    def token_id(self, text: str) -> int | None:
        token: int = self._processor.PieceToId(text)
        return token if self.piece(token) == text else None

    def to_json(self, merges: bool = True) -> dict[str, Any]:
        if merges:
            return self._in_json.to_json()
        fast = sentencepiece_to_json(self._data, self.path, self.settings, merges)
        values: dict[str, Any] = json.loads(fast.to_str())
        return values


class HuggingFaceTokenizer(Tokenizer):
    """A Hugging Face `tokenizer.json`, or a `tokenizer.model` with added tokens in the same terms."""

    def __init__(
        self,
        path: Path,
        settings: Settings,
        data: bytes,
        fast: Any,
        bos_id: int | None = None,
        eos_id: int | None = None,
    ) -> None:
        """`fast` is what the library `tokenizers` makes of the files; BOS and EOS are for where nothing beside says it.

        Raises:
            UserError: the vocabulary is empty, or BOS and EOS cannot be told.
        """
        from tokenizers import processors

        super().__init__(path, settings, data)
        self._fast = fast
        fast.no_truncation()
        fast.no_padding()
        # We never add special tokens through it, and what else it does is trim white space off the spans.
        fast.post_processor = processors.ByteLevel(trim_offsets=False)
        vocabulary: dict[str, int] = fast.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise UserError(f"{path} has no tokens: its vocabulary is empty", "copy it again from the model it is of")
        self.named = frozenset(vocabulary.values())
        self.vocab_size = max(self.named) + 1
        self.bos_id, self.eos_id = _bos_eos(path, settings, vocabulary.get, bos_id, eos_id)
        # Models are published with an EOS that is not the token their answers end with (<|eot_id|>, <|im_end|>), and
        # a special token inside an answer would be the start of another turn.
        fast.add_special_tokens([self.piece(self.bos_id), self.piece(self.eos_id)])
        added = fast.get_added_tokens_decoder()
        self._special_tokens = {token: entry for token, entry in added.items() if entry.special}
        self.special_texts = frozenset(entry.content for entry in self._special_tokens.values())
        self.end_ids = frozenset({self.eos_id, *self._special_tokens, *settings.end_ids})
        self._with_marks = functools.lru_cache(maxsize=1)(self._make_marked)
        # A run of byte pieces is decoded as a whole by this decoder: one wrong byte spoils all of it.
        self._bytes_fall_back = "ByteFallback" in str(fast.decoder)

    def encode_batch(self, texts: list[str], own: Sequence[Own] | None = None) -> list[list[int]]:
        encoded = [e.ids for e in self._fast.encode_batch_fast(texts, add_special_tokens=False)]
        for i in self._with_special_tokens(texts, own, in_own=True):
            encoded[i] = self._encode_own(texts[i], own[i] if own else ()).ids
        return encoded

    def encode_batch_with_spans(self, texts: list[str], own: Sequence[Own] | None = None) -> list[Spans]:
        fast = self._fast.encode_batch(texts, add_special_tokens=False)
        encoded = [_spans(e.ids, e.offsets) for e in fast]
        for i in self._with_special_tokens(texts, own, in_own=True):
            encoded[i] = self._encode_own(texts[i], own[i] if own else ())
        return encoded

    def _encode_own(self, text: str, own: Own) -> Spans:
        """Encodes special tokens of `text` that overlap `own` as text.

        The others are written as marks of the same length, so that one pass cuts and normalizes the text as ever.
        """
        first = _unused_private_use(text, len(self._special_tokens))
        marked, where = text, self._fast.encode(text, add_special_tokens=False)
        marks = {token: chr(first + number) for number, token in enumerate(self._special_tokens)}
        for token, (begin, end) in zip(where.ids, where.offsets, strict=True):
            content = self._special_tokens[token].content if token in marks else ""
            begin = text.find(content, begin, end) if content else -1
            if begin >= 0 and not _overlaps((begin, begin + len(content)), own):
                marked = marked[:begin] + marks[token] * len(content) + marked[begin + len(content) :]
        fast, ids = self._with_marks(first)
        encoded = fast.encode(marked, add_special_tokens=False)
        return _spans([ids.get(token, token) for token in encoded.ids], encoded.offsets)

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

    def may_change(self, token: int) -> bool:
        # What decode leaves out does not end a run of byte pieces either.
        skipped = token in (self.bos_id, self.eos_id) or not 0 <= token < self.vocab_size
        return self._bytes_fall_back and (skipped or _BYTE_PIECE.fullmatch(self.piece(token)) is not None)

    def piece(self, token: int) -> str:
        piece = self._fast.id_to_token(token) if 0 <= token < self.vocab_size else None
        return f"<{token}>" if piece is None else str(piece)

    def token_id(self, text: str) -> int | None:
        token: int | None = self._fast.token_to_id(text)
        return token

    def to_json(self, merges: bool = True) -> dict[str, Any]:
        values: dict[str, Any] = json.loads(self._fast.to_str())
        is_json = self.path.suffix == ".json"
        return values | {"post_processor": json.loads(self._data).get("post_processor") if is_json else None}


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
    """The tokenizer of a file, or of a folder that holds one. SentencePiece encodes batches with so many `threads`;
    None: one for each core. (The other library obeys TOKENIZERS_PARALLELISM.)
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
    settings, data = read_folder(path.parent), read_bytes(path, _MAX_BYTES)
    if path.suffix == ".json":
        fast, left_out = parse_json_tokenizer(path, data, settings.rows)
        settings = replace(settings, left_out=tuple(dict.fromkeys(settings.left_out + left_out)))
        return HuggingFaceTokenizer(path, settings, data, add_tokens(fast, path, settings))
    processor = _processor(path, data)
    settings = _with_prefix_rule(path, settings, processor)
    # Those of SentencePiece's own that are in no text, such as BOS, need not be added.
    added = [
        token
        for token, entry in settings.tokens.items()
        if token >= len(processor)
        or processor.IdToPiece(token) != entry["content"]
        or not (processor.IsControl(token) or processor.IsUnknown(token))
    ]
    if not added:
        return SentencePieceTokenizer(path, settings, data, processor, threads)
    fast = sentencepiece_to_json(data, path, settings)
    return HuggingFaceTokenizer(path, settings, data, fast, processor.bos_id(), processor.eos_id())


def find_tokenizer(folder: str | Path) -> Path | None:
    """The tokenizer file in a checkpoint's folder, or one level up, where Meta's release has it."""
    folder = Path(folder)
    return _tokenizer_in(folder) or _tokenizer_in(folder.absolute().parent)


def tokenizer_notes(tokenizer: Tokenizer, rows: int) -> list[str]:
    """What a user should know of a tokenizer beside a model of so many rows."""
    notes, settings, unnamed = [], tokenizer.settings, [row for row in range(rows) if row not in tokenizer.named]
    if unnamed:
        notes.append(f"rows of the vocabulary without a token: {len(unnamed)}, the first is {unnamed[0]}")
    if settings.left_out:
        notes.append(f"left out, as the model has no row for them: {', '.join(map(repr, settings.left_out))}")
    if settings.add_bos is False:
        notes.append(f"texts begin without BOS, as {CONFIG_FILE} says (add_bos_token: false)")
    if settings.add_eos:
        notes.append(f"{CONFIG_FILE} says add_eos_token: true; which formats end with EOS is still theirs to say")
    return notes


def _tokenizer_in(folder: Path) -> Path | None:
    """The main file. Of two, tokenizer.json where it has a token that tokenizer.model has not; a UserError if they give
    one token different ids."""
    model, fast = (folder / name for name in (SENTENCEPIECE_FILE, HUGGING_FACE_FILE))
    if not (model.is_file() and fast.is_file()):
        return next((path for path in (model, fast, folder / MISTRAL_FILE) if path.is_file()), None)
    try:
        processor = _processor(model, read_bytes(model, _MAX_BYTES))
    except UserError:
        return fast  # LLaMA 3's file of that name is of another kind
    vocabulary = _vocabulary(fast)
    pieces = {processor.IdToPiece(i): i for i in range(len(processor))}
    if not vocabulary.keys() <= pieces.keys():
        return fast
    for token, number in vocabulary.items():
        if number != pieces[token]:
            raise UserError(
                f"token {token!r} is {number} in {fast} and {pieces[token]} in {model.name}",
                "give the one that the model was trained with: --tokenizer FILE",
            )
    return model


def _vocabulary(path: Path) -> dict[str, int]:
    """The tokens of a tokenizer.json that the model beside has room for."""
    try:
        values, rows = read_object(path, optional=True), read_folder(path.parent).rows
        vocabulary = values["model"]["vocab"]
        if isinstance(vocabulary, list):  # a Unigram model's pieces with their scores
            vocabulary = {piece: i for i, (piece, _) in enumerate(vocabulary)}
        vocabulary |= {entry["content"]: entry["id"] for entry in values.get("added_tokens") or ()}
        return {token: number for token, number in vocabulary.items() if rows is None or number < rows}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a tokenizer.json that can be read: {error}") from error


def _with_prefix_rule(path: Path, settings: Settings, processor: Any) -> Settings:
    """Adds what a tokenizer.json of no more tokens says of the space in front: Meta's models come with both."""
    if path.name == MISTRAL_FILE:  # there a chat's parts are encoded by themselves; in a template they have the spaces
        return replace(settings, first_only=True)
    beside = path.parent / HUGGING_FACE_FILE
    if not beside.is_file() or not _vocabulary(beside).keys() <= set(map(processor.IdToPiece, range(len(processor)))):
        return settings
    values = read_object(beside)
    steps = json.dumps([values.get("normalizer"), values.get("pre_tokenizer")])
    first_only = settings.first_only if '"Prepend"' not in steps else False
    first_only = True if '"prepend_scheme": "first"' in steps else first_only
    return replace(settings, first_only=first_only, files=(*settings.files, beside))


def _processor(path: Path, data: bytes) -> Any:
    from sentencepiece import SentencePieceProcessor

    try:
        if not data:
            raise RuntimeError("empty")
        return SentencePieceProcessor(model_proto=data)
    except RuntimeError as error:
        # LLaMA 3 ships a tiktoken file, lines of "base64 rank", under the same name.
        is_tiktoken = re.match(rb"[A-Za-z0-9+/=]+ \d+\s", data)
        hint = "it may be a Git LFS pointer or a download that was cut off: fetch it again"
        if is_tiktoken:
            hint = f"it is a tiktoken file (LLaMA 3's): use the {HUGGING_FACE_FILE} of the same model"
        raise UserError(f"{path} is not a SentencePiece model", hint) from error


def _bos_eos(
    path: Path,
    settings: Settings,
    find: Callable[[str], int | None],
    bos_id: int | None = None,
    eos_id: int | None = None,
) -> tuple[int, int]:
    """BOS and EOS: as they are named beside the main file, else as it has them itself, else a usual pair."""
    bos, eos = settings.roles.get("bos_token"), settings.roles.get("eos_token")
    bos_id, eos_id = (None if token == -1 else token for token in (bos_id, eos_id))  # SentencePiece's for none
    if eos is None and eos_id is None:
        known = ((b, e) for b, e in _KNOWN_BOS_EOS if find(b) is not None and find(e) is not None)
        bos, eos = next(known, (None, None))
    elif bos is None and bos_id is None:
        bos = eos  # LLaMA2-Accessory too begins with EOS where a model has no BOS (GPT-2's family)
    missing = [repr(token) for token in (bos, eos) if token is not None and find(token) is None]
    if missing:
        raise UserError(f"{path.parent / CONFIG_FILE} names {' and '.join(missing)}, which {path.name} does not have")
    begin, end = bos_id if bos is None else find(bos), eos_id if eos is None else find(eos)
    if begin is None or end is None:
        raise UserError(f"cannot tell BOS and EOS of {path}", f"name them in {CONFIG_FILE}: bos_token and eos_token")
    return begin, end


def _overlaps(span: tuple[int, int], own: Own) -> bool:
    """Whether a span shares a character with one of `own`."""
    at = bisect.bisect_right(own, span[0], key=lambda other: other[1])
    return at < len(own) and own[at][0] < span[1] and own[at][0] < own[at][1]


def _unused_private_use(text: str, count: int) -> int:
    """The first of `count` characters in a row without a meaning that `text` does not use."""
    low, high = _PRIVATE_USE
    used = {ord(character) for character in text if ord(character) >= low}
    for first in range(low, high - count, count):
        if used.isdisjoint(range(first, first + count)):
            return first
    raise UserError("a text that holds a special token uses all of Unicode's private-use characters")


def _spans(ids: list[int], offsets: list[tuple[int, int]]) -> Spans:
    flat = np.fromiter(chain.from_iterable(offsets), dtype=np.int64, count=2 * len(offsets)).reshape(-1, 2)
    return Spans(ids, flat[:, 0].copy(), flat[:, 1].copy())
