"""A SentencePiece `tokenizer.model` as a Hugging Face `tokenizer.json` that gives the same tokens.

SentencePiece first makes the piece with the highest score, so the merges are in the order of the scores. That is not
the order of the ids where a file has pieces of one score, such as LLaMA's runs of spaces. (A Unigram model may
cut a run of one character in another order: of ways with the same score the two libraries take different ones.)
"""

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llama_acc.core.errors import UserError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_UNIGRAM, _BPE = 1, 2


class _Piece(NamedTuple):
    text: str
    score: float
    kind: int


def fast_tokenizer(data: bytes, path: Path, names: Mapping[int, str] = {}, first_only: bool = False) -> Any:
    """The tokenizer of a SentencePiece model, as the library `tokenizers` has it.

    Args:
        data: the content of the model file.
        path: where it is from, for messages.
        names: other texts for some of its pieces.
        first_only: the space that SentencePiece puts in front of a text comes at its beginning only, and not also
            behind each special token (transformers: `legacy: false`). Where there are user-defined pieces, it does in
            any case: the library cuts a text at them, too, and SentencePiece puts no space behind them.

    Raises:
        UserError: it is of a kind that cannot be said there, or a piece that is text is to be renamed.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pieces, trainer, rules = _read(data)
    kind, has_prefix = trainer.get(3, _UNIGRAM), rules.get(3, True)
    if kind not in (_UNIGRAM, _BPE) or trainer.get(24, False) or not rules.get(5, True):
        raise UserError(
            f"{path} is a SentencePiece model of a kind that takes no special tokens in a text and is not exported",
            "use the tokenizer.json of the same model",
        )
    for i, name in names.items():
        if pieces[i].kind in (_NORMAL, _BYTE) and pieces[i].text != name:
            raise UserError(f"token {i} of {path} is {pieces[i].text!r}, and a file beside it calls it {name!r}")
        pieces[i] = pieces[i]._replace(text=name)
    first_only = first_only or any(piece.kind == _USER_DEFINED for piece in pieces)
    has_bytes = any(piece.kind == _BYTE for piece in pieces)
    unknown = next((i for i, piece in enumerate(pieces) if piece.kind == _UNKNOWN), 0)
    model: Any
    if kind == _BPE:
        model = models.BPE(
            vocab={piece.text: i for i, piece in enumerate(pieces)},
            merges=_merges({piece.text: piece.score for piece in pieces if piece.kind == _NORMAL}),
            unk_token=pieces[unknown].text,
            fuse_unk=True,
            byte_fallback=has_bytes,
        )
    else:
        model = models.Unigram([(piece.text, piece.score) for piece in pieces], unknown, has_bytes)
    fast = Tokenizer(model)
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
    defined = [piece.text for piece in pieces if piece.kind == _USER_DEFINED]
    fast.add_tokens([AddedToken(text, normalized=False) for text in defined])
    return fast


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """All ways to make a piece of two others, the piece with the highest score first.

    Of several ways to make one piece the one with the longer left half comes first: SentencePiece takes the leftmost,
    and in a run of one character what is left over stands at the run's end.
    """
    ways = [
        (-score, -at, piece)
        for piece, score in scores.items()
        for at in range(1, len(piece))
        if piece[:at] in scores and piece[at:] in scores
    ]
    ways.sort(key=lambda way: way[:2])
    return [(piece[:-at], piece[-at:]) for _, at, piece in ways]


def _read(data: bytes) -> tuple[list[_Piece], dict[int, Any], dict[int, Any]]:
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
        key, at = _integer(data, at)
        if key & 7 == 0:
            value, at = _integer(data, at)
            yield key >> 3, value
            continue
        length, at = _integer(data, at) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], at)
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
