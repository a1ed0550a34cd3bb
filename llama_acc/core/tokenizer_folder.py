"""The files of a tokenizer: what a folder says besides the vocabulary, and all of it for the library `tokenizers`.

Read as transformers does: `tokenizer_config.json`, before it `special_tokens_map.json` and `added_tokens.json` (older
folders), and of `generation_config.json` and a model's `config.json` the tokens that end an answer.

A SentencePiece `tokenizer.model` becomes a `tokenizer.json` that gives the same tokens. SentencePiece first makes the
piece with the highest score, so the merges are in the order of the scores. That is not the order of the ids where a
file has pieces of one score, such as LLaMA's runs of spaces. (A Unigram model may cut a run of one character in another
order: of ways with the same score the two libraries take different ones.)
"""

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from llama_acc.core.errors import UserError
from llama_acc.core.input_files import read_object

SENTENCEPIECE_FILE = "tokenizer.model"
MISTRAL_FILE = "tokenizer.model.v3"  # SentencePiece too, in Mistral's releases, where it is the only one
HUGGING_FACE_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
GENERATION_FILE = "generation_config.json"
_ADDED_FILE = "added_tokens.json"
_SPECIAL_FILE = "special_tokens_map.json"
_FILES = (CONFIG_FILE, _SPECIAL_FILE, _ADDED_FILE, CHAT_TEMPLATE_FILE, GENERATION_FILE)
TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_UNIGRAM, _BPE = 1, 2


@dataclass(frozen=True)
class Settings:
    """What the files beside a tokenizer's main file say; None: nothing says it."""

    tokens: Mapping[int, dict[str, Any]] = field(default_factory=dict)  # by id, as in a tokenizer.json's added_tokens
    roles: Mapping[str, str] = field(default_factory=dict)  # texts by their names in a chat template: "pad_token"
    end_ids: frozenset[int] = frozenset()  # what ends an answer, as the model's files say it
    first_only: bool | None = None  # the space in front of a text is not put behind special tokens too
    add_bos: bool | None = None  # a text begins with BOS
    add_eos: bool | None = None  # a text ends with EOS
    files: tuple[Path, ...] = ()  # those that are needed to load it the same
    rows: int | None = None  # how many tokens the model beside has room for
    left_out: tuple[str, ...] = ()  # added tokens that it has no room for, such as a `<pad>` that no model uses

    def key(self) -> str:
        """Differs where a text may be encoded differently; empty where nothing is said."""
        parts = [sorted(self.tokens.items()), self.roles.get("bos_token"), self.roles.get("eos_token"), self.first_only]
        return "" if parts == [[], None, None, None] else json.dumps(parts, sort_keys=True)


def read_folder(folder: Path) -> Settings:
    """What a tokenizer's folder says of it.

    Raises:
        UserError: a file cannot be read, or two of them call one token by different names.
    """
    config, special, added = (read_object(folder / name, True) for name in (CONFIG_FILE, _SPECIAL_FILE, _ADDED_FILE))
    model, generation = (read_object(folder / name, True) for name in ("config.json", GENERATION_FILE))
    settings = special | {key: value for key, value in config.items() if value is not None}
    texts = {role: token_text(settings.get(role)) for role in TOKEN_NAMES}
    roles = {role: text for role, text in texts.items() if text is not None}
    special_texts = set(roles.values())
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = settings.get(key)
        listed = more.values() if isinstance(more, dict) else more if isinstance(more, list) else ()
        special_texts |= {token_text(token) or "" for token in listed}
    tokens = _added_tokens(folder, config, added, special_texts)
    rows = model["vocab_size"] if type(model.get("vocab_size")) is int and model["vocab_size"] > 0 else None
    left_out = sorted(token for token in tokens if rows is not None and token >= rows)
    ends: set[int] = set()
    for end in (generation.get("eos_token_id"), model.get("eos_token_id")):
        ends |= {token for token in (end if isinstance(end, list) else [end]) if type(token) is int and token >= 0}
    flags = [config.get(key) for key in ("legacy", "add_bos_token", "add_eos_token")]
    legacy, add_bos, add_eos = (value if isinstance(value, bool) else None for value in flags)
    return Settings(
        tokens={token: entry for token, entry in tokens.items() if token not in left_out},
        roles=roles,
        end_ids=frozenset(ends),
        first_only=None if legacy is None else not legacy,
        add_bos=add_bos,
        add_eos=add_eos,
        files=tuple(folder / name for name in _FILES if (folder / name).is_file()),
        rows=rows,
        left_out=tuple(tokens[token]["content"] for token in left_out),
    )


def _added_tokens(
    folder: Path, config: dict[str, Any], added: dict[str, Any], special: set[str]
) -> dict[int, dict[str, Any]]:
    tokens: dict[int, dict[str, Any]] = {}
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise UserError(f"{folder / CONFIG_FILE}: added_tokens_decoder must hold an object of ids and tokens")
    for number, entry in decoder.items():
        text = token_text(entry)
        if not text or not isinstance(entry, dict) or not str(number).isdecimal():
            raise UserError(f"{folder / CONFIG_FILE}: added_tokens_decoder has no text for token {number}")
        flags = {key: bool(entry.get(key)) for key in _FLAGS}
        tokens[int(number)] = {"content": text, **flags, "special": flags["special"] or text in special}
    for text, number in added.items():
        if type(number) is not int or number < 0:
            raise UserError(f"{folder / _ADDED_FILE}: the id of {text!r} is {number!r}, not a number")
        entry = {"content": text, **dict.fromkeys(_FLAGS, False), "special": text in special}
        if (other := tokens.setdefault(number, entry)["content"]) != text:
            raise UserError(
                f"token {number} is {other!r} in {folder / CONFIG_FILE}, and {text!r} in {_ADDED_FILE}",
                "keep the one that the model was trained with",
            )
    return tokens


def token_text(setting: Any) -> str | None:
    """A special token in these files is a string, or an object with its `content`."""
    content = setting.get("content") if isinstance(setting, dict) else setting
    return content if isinstance(content, str) else None


# As the library `tokenizers` has it


class _OfJson(msgspec.Struct):
    """What is looked at in a tokenizer.json."""

    added_tokens: list[dict[str, Any]] = []


def parse_json_tokenizer(path: Path, data: bytes, rows: int | None) -> tuple[Any, tuple[str, ...]]:
    """A tokenizer.json, and those of its added tokens that a model of so many rows has no row for, which it lacks."""
    from tokenizers import Tokenizer as Fast

    try:
        added = msgspec.json.decode(data, type=_OfJson).added_tokens
        left_out = tuple(entry["content"] for entry in added if rows is not None and entry["id"] >= rows)
        if left_out:
            values = json.loads(data)
            values["added_tokens"] = added = [entry for entry in added if entry["content"] not in left_out]
            data = json.dumps(values).encode()
        fast = Fast.from_str(data.decode("utf-8"))
        is_as_written = all(fast.token_to_id(entry["content"]) == entry["id"] for entry in added)
        return fast if is_as_written else _with_ids(path, json.loads(data), {}), left_out
    except UserError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path} is not a tokenizer.json that can be read: {error}") from error


def add_tokens(fast: Any, path: Path, settings: Settings) -> Any:
    """Add the tokens that are named beside the main file under their own ids.

    Raises:
        UserError: an id or a text is taken, or there is no way to leave ids out.
    """
    if not settings.tokens:
        return fast
    from tokenizers import AddedToken

    vocabulary: dict[str, int] = fast.get_vocab(with_added_tokens=True)
    by_id = {token: text for text, token in vocabulary.items()}
    for token, entry in settings.tokens.items():
        text, known, has = entry["content"], by_id.get(token), vocabulary.get(entry["content"], token)
        if known not in (None, text) or has != token:
            other = f"that is {known!r}" if known not in (None, text) else f"{text!r} is token {has}"
            raise UserError(f"a file beside {path} says that token {token} is {text!r}, and in it {other}")
    new = sorted(set(settings.tokens) - set(by_id))
    if new and new != list(range(len(vocabulary), len(vocabulary) + len(new))):
        fast = _with_ids(path, json.loads(fast.to_str()), {settings.tokens[token]["content"]: token for token in new})
    for token in new if path.suffix == ".json" else sorted(settings.tokens):
        fast.add_tokens([AddedToken(**settings.tokens[token])])
    return fast


def _with_ids(path: Path, values: dict[str, Any], more: dict[str, int]) -> Any:
    """A tokenizer.json's tokenizer whose added tokens, and more, keep their ids.

    The library numbers added tokens on from the vocabulary's size whatever ids they are given, so they go into it.
    """
    from tokenizers import Tokenizer as Fast

    if not isinstance(values["model"].get("vocab"), dict):
        raise UserError(f"the added tokens of {path} leave out ids, which a vocabulary of its kind cannot")
    values["model"]["vocab"] |= {entry["content"]: entry["id"] for entry in values["added_tokens"]} | more
    return Fast.from_str(json.dumps(values))


class _Piece(NamedTuple):
    text: str
    score: float
    kind: int


def sentencepiece_to_json(data: bytes, path: Path, settings: Settings, merges: bool = True) -> Any:
    """A SentencePiece model with the tokens that are named beside it.

    `data` is the content of the model file. `settings` give other texts for some of its pieces; more tokens; and
    whether the space in front of a text comes at its beginning only (transformers: `legacy: false`), and not also
    behind each special token. Where there are user-defined pieces, it does in any case: the library cuts a text at
    them, too, and SentencePiece puts no space behind them. Without `merges` it has pieces only, and encodes nothing.

    Raises:
        UserError: it is of a kind that cannot be said there, or a piece that is text is to be renamed.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pieces, trainer, rules = _read_model(data)
    kind, has_prefix = trainer.get(3, _UNIGRAM), rules.get(3, True)
    if kind not in (_UNIGRAM, _BPE) or trainer.get(24, False) or not rules.get(5, True):
        raise UserError(
            f"{path} is a SentencePiece model of a kind that takes no special tokens in a text and is not exported",
            "use the tokenizer.json of the same model",
        )
    for i, name in ((i, entry["content"]) for i, entry in settings.tokens.items() if i < len(pieces)):
        if pieces[i].kind in (_NORMAL, _BYTE) and pieces[i].text != name:
            raise UserError(f"token {i} of {path} is {pieces[i].text!r}, and a file beside it calls it {name!r}")
        pieces[i] = pieces[i]._replace(text=name)
    first_only = settings.first_only or any(piece.kind == _USER_DEFINED for piece in pieces)
    has_bytes = any(piece.kind == _BYTE for piece in pieces)
    unknown = next((i for i, piece in enumerate(pieces) if piece.kind == _UNKNOWN), 0)
    model: Any = None
    if kind == _BPE:
        model = models.BPE(
            vocab={piece.text: i for i, piece in enumerate(pieces)},
            merges=_merges({piece.text: piece.score for piece in pieces if piece.kind == _NORMAL}) if merges else [],
            unk_token=pieces[unknown].text,
            fuse_unk=True,
            byte_fallback=has_bytes,
        )
    fast = Tokenizer(model or models.Unigram([(piece.text, piece.score) for piece in pieces], unknown, has_bytes))
    steps: list[Any] = [normalizers.Precompiled(rules[2])] if rules.get(2) else []
    if rules.get(4, True):
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if has_prefix and not first_only:
        steps.append(normalizers.Prepend("▁"))
    fast.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    if has_prefix and first_only:
        # The first puts a space before the text, also where the text begins with one ("▁" by then); SentencePiece does.
        first, rest = pre_tokenizers.Metaspace(" ", "first", split=False), pre_tokenizers.Metaspace("▁", "never", False)
        fast.pre_tokenizer = pre_tokenizers.Sequence([first, rest])
    strip = [decoders.Strip(" ", 1, 0)] * has_prefix
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    special = [piece.text for piece in pieces if piece.kind in (_UNKNOWN, _CONTROL)]
    fast.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    # One with a space SentencePiece never finds: by then a text has "▁" for it, which other pieces are written with.
    defined = [piece.text for piece in pieces if piece.kind == _USER_DEFINED and " " not in piece.text]
    fast.add_tokens([AddedToken(text, normalized="▁" in text) for text in defined])
    # Matched in the text unchanged: normalized, a token would have the space in front that a text gets.
    entries = {token: entry | {"normalized": False} for token, entry in settings.tokens.items()}
    return add_tokens(fast, path, replace(settings, tokens=entries))


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """All ways to make a piece of two others, the piece with the highest score first.

    Of several ways to make one piece the one with the longer left half comes first: SentencePiece takes the leftmost,
    and in a run of one character what is left over stands at the run's end.
    """
    ways = [
        (-score, -at, left, right)
        for piece, score in scores.items()
        for at in range(1, len(piece))
        if (left := piece[:at]) in scores and (right := piece[at:]) in scores
    ]
    ways.sort(key=itemgetter(0, 1))
    return [way[2:] for way in ways]


def _read_model(data: bytes) -> tuple[list[_Piece], dict[int, Any], dict[int, Any]]:
    """The pieces, the trainer's settings and the normalizer's, by their numbers in sentencepiece_model.proto.

    Its own reader needs the very version of protobuf that SentencePiece was built with, or a later one.
    """
    pieces: list[_Piece] = []
    settings: dict[int, dict[int, Any]] = {2: {}, 3: {}}
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(value))
            (score,) = struct.unpack("<f", piece.get(2, bytes(4)))
            pieces.append(_Piece(piece.get(1, b"").decode("utf-8"), score, piece.get(3, _NORMAL)))
        elif number in settings:
            settings[number] = dict(_fields(value))
    return pieces, settings[2], settings[3]


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protobuf message: (number, integer or bytes)."""
    at = 0
    while at < len(data):
        key, at = (data[at], at + 1) if data[at] < 128 else _integer(data, at)
        if key & 7 == 0:
            value, at = _integer(data, at)
            yield key >> 3, value
            continue
        if key & 7 == 2:
            length, at = (data[at], at + 1) if data[at] < 128 else _integer(data, at)
        else:
            length = {1: 8, 5: 4}[key & 7]
        yield key >> 3, data[at : at + length]
        at += length


def _integer(data: bytes, at: int) -> tuple[int, int]:
    """A number in 7 bits a byte, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
