"""A SentencePiece `tokenizer.model` as a Hugging Face `tokenizer.json` that gives the same tokens.

Of two pieces SentencePiece makes the one with the higher score first, so the merges are in the order of the scores (in
LLaMA's file the order of the ids is the same but for runs of spaces). Format: sentencepiece_model.proto.
"""

from pathlib import Path
from typing import Any

from llama_acc.core.errors import UserError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_UNIGRAM, _BPE = 1, 2


def fast_tokenizer(data: bytes, path: Path, first_only: bool = False) -> Any:
    """The tokenizer of a SentencePiece model, as the library `tokenizers` has it.

    Args:
        data: the content of the model file.
        path: where it is from, for messages.
        first_only: the space that SentencePiece puts in front of a text is not put behind special tokens too
            (transformers: `legacy: false`).

    Raises:
        UserError: it is of a kind that cannot be said there.
    """
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    proto = sentencepiece_model_pb2.ModelProto.FromString(data)
    kind, rules = proto.trainer_spec.model_type, proto.normalizer_spec
    if kind not in (_UNIGRAM, _BPE) or proto.trainer_spec.treat_whitespace_as_suffix or not rules.escape_whitespaces:
        raise UserError(
            f"{path} is a SentencePiece model of a kind that takes no added tokens and is not exported",
            "use the tokenizer.json of the same model",
        )
    unknown = proto.trainer_spec.unk_id
    has_bytes = any(piece.type == _BYTE for piece in proto.pieces)
    if kind == _BPE:
        fast = Tokenizer(
            models.BPE(
                vocab={piece.piece: i for i, piece in enumerate(proto.pieces)},
                merges=_merges({piece.piece: piece.score for piece in proto.pieces if piece.type == _NORMAL}),
                unk_token=proto.pieces[unknown].piece,
                fuse_unk=True,
                byte_fallback=has_bytes,
            )
        )
    else:
        fast = Tokenizer(models.Unigram([(p.piece, p.score) for p in proto.pieces], unknown, has_bytes))
    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if first_only and rules.add_dummy_prefix:
        fast.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
    else:
        steps += [normalizers.Prepend("▁")] * rules.add_dummy_prefix + [normalizers.Replace(" ", "▁")]
    if steps:
        fast.normalizer = normalizers.Sequence(steps)
    strip = [decoders.Strip(" ", 1, 0)] * rules.add_dummy_prefix
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    special = [piece.piece for piece in proto.pieces if piece.type in (_UNKNOWN, _CONTROL)]
    fast.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    defined = [piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED]
    fast.add_tokens([AddedToken(piece, special=False, normalized=False) for piece in defined])
    return fast


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """All ways to make a piece of two others, the piece with the highest score first.

    Of several ways to make one piece the one with the longer left half comes first: SentencePiece takes the leftmost,
    and in a run of one character what is left over stands at the run's end.
    """
    ways = [
        (-score, at, piece)
        for piece, score in scores.items()
        for at in range(len(piece) - 1, 0, -1)
        if piece[:at] in scores and piece[at:] in scores
    ]
    ways.sort(key=lambda way: (way[0], -way[1]))
    return [(piece[:at], piece[at:]) for _, at, piece in ways]
