"""The formats data is published in: how a row becomes items, and by which keys `auto` tells them apart."""

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from llama_acc.core.data.convert.markdown import html_to_markdown
from llama_acc.core.data.keys import (
    IMAGES,
    INPUT,
    PAIRS,
    SYSTEM,
    Malformed,
    as_list,
    is_empty,
    key_of,
    type_name,
    weight_of,
)
from llama_acc.core.data.tools import CALL_ROLES, RESULT_ROLES, TOOLS, Turn, called_in, message_fields, tools_of

if TYPE_CHECKING:
    from llama_acc.core.tokenizer import Tokenizer

AUTO = "auto"
MAPPED = ("instruction", "input", "output", "system", "conversations")
"""Our fields, which `--map` names columns for."""
Row = dict[str, Any]
Record = dict[str, Any]
"""An item as it is written: single-turn, or a dialogue."""
_SINGLE_TURN = ("instruction", "output", "history", *INPUT)
_Value = TypeVar("_Value")


class Skipped(Exception):
    """The format gives no item for this row; the message is the reason, the same for all such rows."""


@dataclass(frozen=True)
class Options:
    """What can be asked of the formats; each looks at its own."""

    all_forms: bool = False  # gorilla: also rows in the form of a Python dictionary
    dialogues: bool = False  # llava: whole dialogues, not one item for each question and answer
    reference: bool = False  # llava: exactly what LLaMA2-Accessory's tool gives
    keep_html: bool = False  # sharegpt: leave HTML unchanged
    tokenizer: "Tokenizer | None" = None
    max_tokens: int | None = None  # sharegpt: dialogues are split so that each has at most so many tokens
    languages: tuple[str, ...] = ()  # sharegpt: only dialogues in these languages, by their ISO 639-1 codes
    mapping: dict[str, str] = field(default_factory=dict)  # csv, jsonl: our field to the row's


class Format(NamedTuple):
    """How rows become items, and which keys that uses besides `id`, images and the system text."""

    items: Callable[[Row, Options, Counter[str]], Iterable[Record]]
    """The items of a row; counts what it changes on the way. Raises Skipped: it gives none; Malformed: it is wrong."""
    keys: tuple[str, ...] = _SINGLE_TURN
    turn_keys: tuple[str, ...] = ("from", "value", "role", "content")
    turns_in: tuple[str, ...] = ("conversations",)  # where a row has its turns
    is_choice: bool = False  # which of a preferred and a rejected reply is trained on was said
    may_be_empty: bool = False  # no item at all is a result, of which LLaMA2-Accessory makes an empty array


# Fields of a row


def _field(row: Row, field: str, kind: type[_Value]) -> _Value:
    value = row.get(field)
    if isinstance(value, kind):
        return value
    if value is not None:
        raise Malformed(f"{field!r} should be {type_name(kind())}, but is {type_name(value)}")
    if field in row:
        raise Malformed(f"{field!r} is null")
    raise Malformed(f"no {field!r} (its keys: {', '.join(repr(key) for key in list(row)[:6]) or 'none'})")


def _text(row: Row, field: str) -> str:
    return _field(row, field, str)


def _list(row: Row, field: str) -> list[Any]:
    value = as_list(row.get(field))
    return value if isinstance(value, list) else _field(row, field, list)


def _object(value: Any) -> Row:
    if not isinstance(value, dict):
        raise Malformed(f"should be an object, but is {type_name(value)}")
    return value


def _optional(row: Row, field: str, names: Sequence[str], mapping: Mapping[str, str]) -> str:
    """The text of a field that may be null, under the name that was mapped, or missing, under its usual ones."""
    unmapped = [name for name in names if name not in mapping.values()] if mapping else names
    key = mapping.get(field) or key_of(row, unmapped)
    return "" if key is None or (key in row and row[key] is None) else _text(row, key)


def _about(row: Row, system: str, part: int | None = None) -> Record:
    """The beginning of a record: its row's `id`, with the number of a part, its images, and its system text."""
    named = {} if row.get("id") is None else {"id": row["id"] if part is None else f"{row['id']}_{part}"}
    images = {key: row[key] for key in IMAGES if not is_empty(row.get(key))}
    for given in images.values():
        if not all(isinstance(path, str) for path in (given if isinstance(given, list) else [given])):
            raise Skipped("has images that are not given by a path")
    return {**named, **images, **({"system": system} if system.strip() else {})}


def _single_turn(row: Row, mapping: Mapping[str, str] = {}) -> Record:
    """A row with an instruction and an output as a single-turn item."""
    instruction, output = mapping.get("instruction", "instruction"), mapping.get("output", "output")
    context, system = _optional(row, "input", INPUT, mapping), _optional(row, "system", SYSTEM, mapping)
    is_blank = is_empty(row.get(output)) and is_empty(row.get(instruction)) and not context.strip()
    if is_blank and {instruction, output} <= row.keys():
        raise Skipped("blank: no question and no answer")
    record = {"instruction": _text(row, instruction), "input": context, "output": _text(row, output)}
    history = {} if is_empty(as_list(row.get("history"))) else {"history": _list(row, "history")}
    return {**_about(row, system), **record, **history}


# Turns of a dialogue

_ROLES = {
    **dict.fromkeys(("human", "user", "prompter"), "human"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "claude", "bot", "model"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(CALL_ROLES, "assistant"),
    **dict.fromkeys(RESULT_ROLES, "tool"),
}
_WRITTEN = {"human": "human", "assistant": "gpt", "tool": "tool"}


def _each(values: Iterable[Any], made_of: Callable[[Any], _Value]) -> list[_Value]:
    """What is made of all turns; an error names the turn's number."""
    made = []
    for number, value in enumerate(values, start=1):
        try:
            made.append(made_of(value))
        except Malformed as error:
            raise Malformed(f"turn {number}: {error}") from error
    return made


def role_of(turn: Row) -> str | None:
    """The role of a turn, by our name; None: it has none that is known."""
    said = str(turn.get("role", turn.get("from")))
    return _ROLES.get(said) or _ROLES.get(said.strip().lower())


def _turn(value: Any) -> Turn:
    """A turn of `from` and `value`, or of `role` and `content`, which may be in parts."""
    turn = _object(value)
    if len(turn) == 2 and type(text := turn.get("value")) is str and turn.get("from") in ("human", "gpt"):
        return Turn(_ROLES[turn["from"]], text)  # most are so, and need no further look
    role, text = ("role", "content") if turn.keys() & {"role", "content"} else ("from", "value")
    said = _text(turn, role)
    if (name := role_of(turn)) is None:
        raise Malformed(f"unknown role {said!r}: it is one of {', '.join(_ROLES)}")
    weight, more = weight_of(turn, name == "assistant"), message_fields(turn, name)
    content = turn.get(text)
    if said.strip().lower() in CALL_ROLES:
        return Turn(name, "", weight, more | called_in(_text(turn, text)))
    if content is None and "tool_calls" in more:
        return Turn(name, "", weight, more)
    joined = "\n\n".join(map(_part, content)) if isinstance(content, list) else _text(turn, text)
    return Turn(name, joined, weight, more)


def _turns(values: list[Any]) -> list[Turn]:
    """Turns of objects; of texts, question and reply in turn; or of pairs of `input` and `output`, as Capybara's."""
    if values and all(isinstance(value, dict) and {"input", "output"} <= value.keys() for value in values):
        values = [pair[side] for pair in values for side in ("input", "output")]
    if not values or not isinstance(values[0], str):
        return _each(values, _turn)
    for number, text in enumerate(values, start=1):
        if not isinstance(text, str):
            raise Malformed(f"turn {number}: should be text, but is {type_name(text)}")
    return [Turn(("human", "assistant")[i % 2], text) for i, text in enumerate(values)]


def _part(value: Any) -> str:
    kind = _object(value).get("type")
    if kind in ("image_url", "input_audio", "file", "image", "audio"):
        raise Skipped("has images, sound or files")
    if kind not in ("text", "input_text", "output_text"):
        raise Malformed(f"unknown type of content {kind!r}")
    return _text(value, "text")


def _exchanges(
    row: Row, turns: list[Turn], notes: Counter[str], mapping: Mapping[str, str] = {}
) -> tuple[str, list[Turn]]:
    """A dialogue's system text, and its questions and replies in turn.

    A system text before the first question is the dialogue's; another goes in front of the question that follows it.
    Turns of one role in a row become one, but for calls of tools and their results. Replies without a question,
    questions without a reply, results that nothing answers and exchanges with a blank side are left out. `notes` counts
    what was changed.

    Raises:
        Skipped: nothing is left, or a reply is to be trained on in part.
    """
    first = next((place for place, turn in enumerate(turns) if turn.role == "human"), 0)
    own = [_optional(row, "system", SYSTEM, mapping), *(turn.text for turn in turns[:first] if turn.role == "system")]
    # Some collections have the same text in a column and in a turn.
    system, pairs = "\n\n".join(dict.fromkeys(filter(str.strip, own))), ["human", "assistant"] * (len(turns) // 2)
    if len(own) > 1 and not system:
        notes["empty system texts were left out"] += 1
    if turns and [turn.role for turn in turns] == pairs and all(turn.text.strip() and not turn.more for turn in turns):
        return system, turns  # as most are
    joined: list[Turn] = []
    waiting: list[str] = []  # system texts for the next question
    for place, turn in enumerate(turns):
        if turn.role == "system":
            if place >= first and turn.text.strip():
                notes["system texts were put in front of the question that follows"] += 1
                waiting.append(turn.text)
            continue
        if turn.role == "human" and waiting:
            turn, waiting = turn._replace(text="\n\n".join([*waiting, turn.text])), []
        if not joined or joined[-1].role != turn.role or turn.role == "tool" or turn.more or joined[-1].more:
            joined.append(turn)
        elif joined[-1].weight != turn.weight:
            raise Skipped("replies in a row, of which only some are to be trained on")
        else:
            notes["turns of one role in a row were joined"] += 1
            joined[-1] = turn._replace(text=f"{joined[-1].text}\n\n{turn.text}")
    if waiting:
        notes["system texts without a question were left out"] += len(waiting)
    questions = [place for place, turn in enumerate(joined) if turn.role == "human"]
    if joined and joined[0].role != "human":
        notes["replies without a question were left out"] += 1
    kept = []
    for begin, end in pairwise([*questions, len(joined)]):
        question, *replies = joined[begin:end]
        while replies and replies[-1].role == "tool":
            notes["results of tools that nothing answers were left out"] += 1
            del replies[-1]
        if not replies:
            notes["questions without a reply were left out"] += 1
        elif question.text.strip() and all(
            turn.role == "tool" or turn.text.strip() or "tool_calls" in turn.more for turn in replies
        ):
            kept += [question, *replies]
        else:
            notes["exchanges with nothing on one side were left out"] += 1
    if not kept:
        raise Skipped("no question with a reply")
    return system, kept


def _record(row: Row, system: str, turns: list[Turn], part: int | None = None) -> Record:
    """A dialogue as it is written; `part`: which part of its row it is."""
    written: list[Record] = []
    for turn in turns:
        weight: Record = {} if turn.weight == 1 else {"weight": turn.weight} if turn.weight else {"train": False}
        written.append({"from": _WRITTEN[turn.role], "value": turn.text, **turn.more, **weight})
    tools = tools_of(row)
    return {**_about(row, system, part), **({"tools": tools} if tools else {}), "conversations": written}


def _dialogue(row: Row, turns: list[Turn], notes: Counter[str], mapping: Mapping[str, str] = {}) -> list[Record]:
    return [_record(row, *_exchanges(row, turns, notes, mapping))]


# The formats

# {'Instruction': Find me an API., 'Output': {...}}: a Python dictionary in looks only, as quotes are missing. Some rows
# break off before the end.
_DICTIONARY = re.compile(r"\s*\{\s*['\"]Instruction['\"]\s*:(.*?),\s*['\"]Output['\"]\s*:(.*)", re.DOTALL)


def _gorilla(row: Row, options: Options, notes: Counter[str]) -> Iterable[Record]:
    """APIBench by LLaMA2-Accessory's rule, to the byte; TorchHub's training data has a form that it does not know."""
    code = _text(row, "code").replace("###Instruction.", "###Instruction:")
    if "Output:" in code:
        question, output = code.split("Output:")[:2]
        if "Instruction:" not in question:
            raise Malformed("no 'Instruction:' before 'Output:' in 'code'")
        return [{"instruction": question.split("Instruction:")[1].split("###")[0], "input": "", "output": output}]
    form = _DICTIONARY.fullmatch(code)
    if form is None:
        raise Skipped("no 'Output:' in 'code'")
    if not options.all_forms:
        raise Skipped("of the form {'Instruction': ...}, which the rule does not know (--all-forms takes it)")
    instruction, output = form[1].strip(), form[2].rstrip()
    if len(instruction) > 1 and instruction[0] == instruction[-1] and instruction[0] in "'\"":
        instruction = instruction[1:-1]
    if output.endswith("}") and output.count("}") > output.count("{"):
        output = output[:-1]  # the brace that closes the whole
    return [{"instruction": instruction, "input": "", "output": output}]


_MARK = "<image>"


def _llava(row: Row, options: Options, notes: Counter[str]) -> Iterable[Record]:
    """LLaVA-Instruct: an item for each question and its answer, or whole dialogues; the mark of the image goes."""
    values = _list(row, "conversations")
    if options.reference:
        others = {key: value for key, value in row.items() if key != "conversations"}
        flat = _each(values[: len(values) // 2 * 2], _flat)
        return [{**others, "conversations": flat[place : place + 2]} for place in range(0, len(flat), 2)]
    read = _each(values, _turn)
    turns = [turn._replace(text=turn.text.replace(_MARK, "").strip()) if _MARK in turn.text else turn for turn in read]
    system, turns = _exchanges(row, turns, notes)
    if options.dialogues:
        return [_record(row, system, turns)]
    if any(turn.more for turn in turns):
        raise Skipped("has calls of tools")
    pairs = list(zip(turns[::2], turns[1::2], strict=True))
    if left_out := sum(not reply.is_label for _, reply in pairs):
        notes["replies that are not to be trained on were left out"] += left_out
    start = _about(row, system)
    return [
        {**start, "instruction": question.text, "input": "", "output": reply.text}
        for question, reply in pairs
        if reply.is_label
    ]


def _flat(value: Any) -> Record:
    """All of a turn's fields as LLaMA2-Accessory's tool has them: without the mark and without new lines."""
    turn = _object(value)
    return {key: _text(turn, key).replace(_MARK, "").replace("\n", "") for key in turn}


def _sharegpt(row: Row, options: Options, notes: Counter[str]) -> Iterable[Record]:
    """ShareGPT: HTML to Markdown, in languages asked for, split at a number of tokens."""
    # Older collections call it "items".
    field = "items" if "items" in row and "conversations" not in row else "conversations"
    turns = _each(_list(row, field), _turn)
    for place, turn in enumerate(turns if not options.keep_html else ()):
        if turn.role != "tool" and (clean := html_to_markdown(turn.text)) != turn.text:
            notes["turns had HTML or marks of the web page, which were cleaned"] += 1
            turns[place] = turn._replace(text=clean)
    system, turns = _exchanges(row, turns, notes)
    if options.languages:
        from llama_acc.core.data.checks import language_of

        language = next((found for turn in turns if (found := language_of(turn.text))), None)
        if language is not None and language not in options.languages:
            raise Skipped(f"in another language ({language})")
    if options.tokenizer is None or options.max_tokens is None:
        return [_record(row, system, turns)]
    if tools_of(row) or any(turn.more for turn in turns):
        notes["dialogues with calls of tools or reasoning were not split"] += 1
        return [_record(row, system, turns)]
    parts = list(_parts(system, turns, options.tokenizer, options.max_tokens, notes))
    if len(parts) == 1:
        return [_record(row, system, turns)]
    notes[f"dialogues of more than {options.max_tokens:,} tokens were split"] += 1
    return [_record(row, system, part, number) for number, part in enumerate(parts)]


def _parts(
    system: str, turns: list[Turn], tokenizer: "Tokenizer", most: int, notes: Counter[str]
) -> Iterator[list[Turn]]:
    """A dialogue cut before questions, into parts of as many exchanges as fit into so many tokens, or of one."""
    from llama_acc.core.data.templates import TEMPLATES

    template = TEMPLATES["dialogue"]

    def tokens(begin: int, end: int) -> int:
        text, own, *_ = template.dialogue_text(turns[begin:end], system or None)
        return len(tokenizer.encode(text, template.bos, template.eos, own))

    begin = 0
    while begin < len(turns):
        ends = range(begin + 2, len(turns) + 1, 2)
        fits = tokens(begin, len(turns)) <= most
        count = len(ends) if fits else bisect_right(ends, most, key=partial(tokens, begin))
        if not count:
            notes[f"single exchanges have more than {most:,} tokens, and would be cut"] += 1
        end = ends[max(count - 1, 0)]
        yield turns[begin:end]
        begin = end


def _wizardlm(row: Row, options: Options, notes: Counter[str]) -> Iterable[Record]:
    """WizardLM's Evol-Instruct: dialogues (V2), or instructions and outputs; its test set has no outputs."""
    if "conversations" in row:
        return _dialogue(row, _each(_list(row, "conversations"), _turn), notes)
    if "Instruction" in row and "output" not in row:
        raise Skipped("an instruction without an output, to test with")
    return [_single_turn(row)]


def _lima(row: Row, options: Options, notes: Counter[str]) -> Iterable[Record]:
    """LIMA: lists of texts, question and reply in turn, or Vicuna's format; its test questions have no reply."""
    values = _list(row, "conversations")
    if len(values) == 1:
        raise Skipped("a question without a reply, to test with")
    return _dialogue(row, _turns(values), notes)


def _openai(row: Row, options: Options, notes: Counter[str]) -> Iterable[Record]:
    """OpenAI's messages, which some data sets call conversations."""
    field = "conversations" if "conversations" in row and "messages" not in row else "messages"
    return _dialogue(row, _each(_list(row, field), _turn), notes)


_MOSS_MARKS = re.compile(r"\A<\|[\w ]+\|>:[ ]?|<eo[a-z]>\s*\Z")


def _moss(row: Row, options: Options, notes: Counter[str]) -> Iterable[Record]:
    """MOSS 003: each text between marks, and the description of MOSS, which is left out."""
    chat = _field(row, "chat", dict)
    for name in chat:
        if re.fullmatch(r"(turn_)?[0-9]{1,8}", name) is None:
            raise Malformed(f"'chat' should have the keys turn_1, turn_2, ..., but has {name!r}")
    values = [chat[name] for name in sorted(chat, key=lambda name: int(name.removeprefix("turn_")))]
    turns = [turn for exchange in _each(values, _moss_exchange) for turn in exchange]
    if row.get("meta_instruction"):
        notes["descriptions of MOSS were left out"] += 1
    return _dialogue({"id": row.get("conversation_id")}, turns, notes)


def _moss_exchange(value: Any) -> list[Turn]:
    turn = _object(value)
    used = [turn[field] for field in ("Commands", "Tool Responses") if isinstance(turn.get(field), str)]
    if any(_MOSS_MARKS.sub("", text) not in ("", "None") for text in used):
        raise Skipped("has calls of tools")
    question, reply = (_MOSS_MARKS.sub("", _text(turn, field)) for field in ("Human", "MOSS"))
    return [Turn("human", question), Turn("assistant", reply)]


def _mapped(row: Row, options: Options, notes: Counter[str]) -> Iterable[Record]:
    """Columns by our names, or by those of `--map`."""
    mapping = options.mapping
    if (field := mapping.get("conversations")) is not None:
        return _dialogue(row, _turns(_list(row, field)), notes, mapping)
    prompt, completion = (as_list(row.get(mapping.get(field, field))) for field in ("instruction", "output"))
    if isinstance(prompt, list) and isinstance(completion, list):  # messages, of which TRL trains the completion's
        asked = [turn._replace(weight=float(turn.role != "assistant")) for turn in _each(prompt, _turn)]
        return _dialogue(row, [*asked, *_each(completion, _turn)], notes, mapping)
    if "output" in mapping and "instruction" not in mapping and "instruction" not in row:
        if not is_empty(row.get(mapping["output"])):
            notes["rows without an instruction became plain text, to be trained with template: none"] += 1
        row = {**row, "instruction": ""}
    return [_single_turn(row, mapping)]


FORMATS: dict[str, Format] = {
    "gorilla": Format(_gorilla, ("code",), may_be_empty=True),
    "llava": Format(_llava, ("conversations",)),
    "sharegpt": Format(_sharegpt, ("conversations", "items", *TOOLS), turns_in=("conversations", "items")),
    "wizardlm": Format(_wizardlm, (*_SINGLE_TURN, "conversations")),
    "lima": Format(_lima, ("conversations",)),
    "alpaca": Format(lambda row, options, notes: [_single_turn(row)]),
    "openai": Format(_openai, ("messages", "conversations", *TOOLS), turns_in=("messages", "conversations")),
    "moss": Format(
        _moss,
        ("chat", "meta_instruction", "conversation_id"),
        ("Human", "MOSS", "Commands", "Tool Responses"),
        turns_in=("chat",),
    ),
    "csv": Format(_mapped),
    "jsonl": Format(_mapped),
}


def format_of(name: str, mapping: Mapping[str, str]) -> Format:
    """The format of that name, with the keys that a mapping names."""
    format = FORMATS[name]
    if format.items is not _mapped or not mapping:
        return format
    if "conversations" in mapping:
        field = (mapping["conversations"],)
        turn_keys = (*format.turn_keys, "input", "output")
        return format._replace(keys=(*field, *TOOLS), turn_keys=turn_keys, turns_in=field, is_choice=True)
    unmapped = [key for key in ("instruction", "output", "history") if key not in mapping]
    keys = (*unmapped, *mapping.values(), *(() if "input" in mapping else INPUT))
    return format._replace(keys=keys, is_choice="output" in mapping)


def required_columns(mapping: Mapping[str, str]) -> list[str]:
    """The columns that a table must have."""
    if "conversations" in mapping:
        return list(mapping.values())
    is_plain = "output" in mapping and "instruction" not in mapping
    return list({**({} if is_plain else {"instruction": "instruction"}), "output": "output", **mapping}.values())


def recognize(row: Row) -> tuple[str, str, dict[str, str]] | None:
    """The format of a file by one of its rows, how it is known, and a mapping for other names; None: it is unknown."""
    for name in ("conversations", "items", "messages"):
        if isinstance(turns := as_list(row.get(name)), list):
            return *_kind_of_dialogue(row, name, turns), {}
    if isinstance(chat := row.get("chat"), dict) and "turn_1" in chat:
        return "moss", "its 'chat' has 'turn_1'", {}
    if isinstance(code := row.get("code"), str) and "Instruction" in code:
        return "gorilla", "it has 'code' with an 'Instruction' in it", {}
    if {"Instruction", "Skill"} <= row.keys():
        return "wizardlm", "it has 'Instruction' and 'Skill', as WizardLM's test set", {}
    if {"instruction", "output"} <= row.keys():
        return "alpaca", "it has 'instruction' and 'output'", {}
    for question, answer in PAIRS:
        if question in row and answer in row:
            return "jsonl", f"it has {question!r} and {answer!r}", {"instruction": question, "output": answer}
    return None


def _kind_of_dialogue(row: Row, field: str, turns: list[Any]) -> tuple[str, str]:
    first = turns[0] if turns else None
    if isinstance(first, str):
        return "lima", f"its {field!r} are a list of texts"
    if isinstance(first, dict) and "role" in first and field != "items":
        return "openai", f"its {field!r} have 'role' and 'content'"
    if row.get("image"):
        return "llava", f"it has an 'image' and {field!r}"
    if str(row.get("id", "")).startswith("lima"):
        return "lima", "its 'id' begins with 'lima'"
    if row.get("idx") is not None:
        return "wizardlm", f"it has 'idx' and {field!r}"
    if field == "messages":
        return "openai", "it has 'messages'"
    return "sharegpt", f"its {field!r} have 'from' and 'value'"
