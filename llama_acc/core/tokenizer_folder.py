"""What a folder says of its tokenizer besides the vocabulary: added tokens, BOS and EOS, what ends an answer.

Read as transformers does: `tokenizer_config.json`, before it `special_tokens_map.json` and `added_tokens.json` (older
folders), and of `generation_config.json` and a model's `config.json` the tokens that end an answer.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_acc.core.errors import UserError
from llama_acc.core.input_files import read_object

SENTENCEPIECE_FILE = "tokenizer.model"
HUGGING_FACE_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
GENERATION_FILE = "generation_config.json"
_ADDED_FILE = "added_tokens.json"
_SPECIAL_FILE = "special_tokens_map.json"
_MODEL_FILE = "config.json"
FILES = (CONFIG_FILE, _SPECIAL_FILE, _ADDED_FILE, CHAT_TEMPLATE_FILE, GENERATION_FILE)

_ROLES = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")


@dataclass(frozen=True)
class Said:
    """What stands beside a tokenizer's main file.

    Attributes:
        tokens: added tokens by id, each as in a tokenizer.json's `added_tokens`.
        bos: BOS's text; None: nothing says it.
        eos: EOS's text; None: nothing says it.
        roles: the texts of all special tokens by their name in a chat template, such as "pad_token".
        end_ids: what ends an answer, as the model's files say it.
        first_only: the space in front of a text is not put behind special tokens too; None: nothing says it.
        add_bos: whether a text begins with BOS; None: nothing says it.
        add_eos: whether a text ends with EOS; None: nothing says it.
        files: the files beside the main one that are needed to load it the same.
        rows: how many tokens the model beside has room for; None: there is none, or it does not say.
        left_out: added tokens that are named and that it has no room for, such as a `<pad>` that no model uses.
    """

    tokens: Mapping[int, dict[str, Any]] = field(default_factory=dict)
    bos: str | None = None
    eos: str | None = None
    roles: Mapping[str, str] = field(default_factory=dict)
    end_ids: frozenset[int] = frozenset()
    first_only: bool | None = None
    add_bos: bool | None = None
    add_eos: bool | None = None
    files: tuple[Path, ...] = ()
    rows: int | None = None
    left_out: tuple[str, ...] = ()

    def key(self) -> str:
        """Differs where a text may be encoded differently; empty where nothing is said."""
        told = [sorted(self.tokens.items()), self.bos, self.eos, self.first_only]
        return "" if told == [[], None, None, None] else json.dumps(told, sort_keys=True)


def read_folder(folder: Path) -> Said:
    """What a tokenizer's folder says of it.

    Raises:
        UserError: a file cannot be read, or two of them call one token by different names.
    """
    config, special, added = (read_json(folder / name) for name in (CONFIG_FILE, _SPECIAL_FILE, _ADDED_FILE))
    settings = special | {key: value for key, value in config.items() if value is not None}
    texts = {f"{role}_token": token_text(settings.get(f"{role}_token")) for role in _ROLES}
    roles = {role: text for role, text in texts.items() if text is not None}
    others = [settings.get(key) or [] for key in ("additional_special_tokens", "extra_special_tokens")]
    special_texts = set(roles.values())
    for more in others:
        listed = more.values() if isinstance(more, dict) else more if isinstance(more, list) else ()
        special_texts |= {token_text(token) or "" for token in listed}
    tokens = _added(folder, config, added, special_texts)
    ends: set[int] = set()
    model, generation = read_json(folder / _MODEL_FILE), read_json(folder / GENERATION_FILE)
    rows = model["vocab_size"] if type(model.get("vocab_size")) is int and model["vocab_size"] > 0 else None
    left_out = {token for token in tokens if rows is not None and token >= rows}
    for end in (generation.get("eos_token_id"), model.get("eos_token_id")):
        ends |= {token for token in (end if isinstance(end, list) else [end]) if type(token) is int and token >= 0}
    legacy = config.get("legacy")
    return Said(
        tokens={token: entry for token, entry in tokens.items() if token not in left_out},
        bos=roles.get("bos_token"),
        eos=roles.get("eos_token"),
        roles=roles,
        end_ids=frozenset(ends),
        first_only=not legacy if isinstance(legacy, bool) else None,
        add_bos=_flag(config, "add_bos_token"),
        add_eos=_flag(config, "add_eos_token"),
        files=tuple(folder / name for name in FILES if (folder / name).is_file()),
        rows=rows,
        left_out=tuple(tokens[token]["content"] for token in sorted(left_out)),
    )


def _added(folder: Path, config: dict[str, Any], added: dict[str, Any], special: set[str]) -> dict[int, dict[str, Any]]:
    tokens: dict[int, dict[str, Any]] = {}
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise UserError(f"{folder / CONFIG_FILE}: added_tokens_decoder must hold an object of ids and tokens")
    for number, entry in decoder.items():
        text = token_text(entry)
        if not text or not isinstance(entry, dict) or not str(number).isdecimal():
            raise UserError(f"{folder / CONFIG_FILE}: added_tokens_decoder has no text for token {number}")
        flags = {key: bool(entry.get(key)) for key in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        tokens[int(number)] = {"content": text, **flags, "special": flags["special"] or text in special}
    for text, number in added.items():
        if type(number) is not int or number < 0:
            raise UserError(f"{folder / _ADDED_FILE}: the id of {text!r} is {number!r}, not a number")
        other = tokens.get(number)
        if other is not None and other["content"] != text:
            raise UserError(
                f"token {number} is {other['content']!r} in {folder / CONFIG_FILE}, and {text!r} in {_ADDED_FILE}",
                "keep the one that the model was trained with",
            )
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        tokens.setdefault(number, {"content": text, **flags, "special": text in special})
    return tokens


def _flag(config: dict[str, Any], key: str) -> bool | None:
    value = config.get(key)
    return value if isinstance(value, bool) else None


def token_text(setting: Any) -> str | None:
    """A special token in these files is a string, or an object with its `content`."""
    content = setting.get("content") if isinstance(setting, dict) else setting
    return content if isinstance(content, str) else None


def read_json(path: Path) -> dict[str, Any]:
    """A file's object; empty where there is no file.

    Raises:
        UserError: it cannot be read, or holds no object.
    """
    return read_object(path) if path.exists() else {}
