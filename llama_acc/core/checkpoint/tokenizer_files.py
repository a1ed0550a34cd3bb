"""What lies beside a checkpoint's weights and goes with them, and the tokenizer of a folder made for transformers.

transformers 5 rebuilds a LLaMA's tokenizer from its vocabulary and loses runs of spaces that way, and 4 and 5 differ in
the space in front of a text. Both take a `tokenizer.json` unchanged where `tokenizer_config.json` names the class
`PreTrainedTokenizerFast`, so that is what is written, from the tokenizer that trained. Imports no torch.
"""

import json
import string
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from llama_acc.core.checkpoint.layout import Layout, without_towers
from llama_acc.core.data.templates import TEMPLATE_FILE, Template, Turn
from llama_acc.core.errors import UserError
from llama_acc.core.input_files import read_object
from llama_acc.core.tokenizer import Tokenizer, find_tokenizer, load_tokenizer
from llama_acc.core.tokenizer_folder import (
    CHAT_TEMPLATE_FILE,
    CONFIG_FILE,
    GENERATION_FILE,
    HUGGING_FACE_FILE,
    MISTRAL_FILE,
    SENTENCEPIECE_FILE,
)

_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "vocab.json",
    "merges.txt",
)
_OTHER_FILES = ("generation_config.json", "template.json", "recipe.yaml")
# Would be read besides tokenizer.json and may say otherwise; what they say is in it.
_OLDER = ("special_tokens_map.json", "added_tokens.json")
_OF_OTHER_CLASSES = ("added_tokens_decoder", "legacy", "sp_model_kwargs", "use_default_system_prompt")


# In jinja, by what a format has as jinja's literals. See `chat_template`.
_DIALOGUE = string.Template("""\
{%- set turns = messages %}
{%- set system = $system %}
{%- if messages and messages[0]['role'] == 'system' %}
{%- set system = messages[0]['content'] %}
{%- set turns = messages[1:] %}
{%- endif %}
{%- if system is not none %}
{{- $system_begin + system + $system_end }}
{%- endif %}
{%- for message in turns %}
{%- if message['role'] == 'user' %}
{{- $human + (message['content']$cleaned) + $turn_end }}
{%- elif message['role'] == 'assistant' %}
{{- $assistant + (message['content']$cleaned) + $turn_end }}
{%- else %}
{{- raise_exception('this format has turns of user and assistant, not of ' + message['role']) }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- $prompt }}
{%- else %}
{{- $eos }}
{%- endif %}""")
# The last question, and what answers it: the format shows no more.
_SINGLE_TURN = string.Template("""\
{%- set ns = namespace(system='', question='', answer='') %}
{%- for message in messages %}
{%- if message['role'] == 'system' %}
{%- set ns.system = message['content'] %}
{%- elif message['role'] == 'user' %}
{%- set ns.question = message['content'] %}
{%- set ns.answer = '' %}
{%- else %}
{%- set ns.answer = message['content'] %}
{%- endif %}
{%- endfor %}
{%- set prompt = ((ns.system + '\\n\\n') if ns.system.strip() else '') + $prompt %}
{%- if add_generation_prompt %}
{{- prompt$ending }}
{%- else %}
{{- prompt + (ns.answer$cleaned) + $eos }}
{%- endif %}""")


def extra_files(layouts: Sequence[Layout]) -> list[Path]:
    """The files that go with checkpoints laid over each other: tokenizer, prompt format, recipe; the last ones found.

    A tokenizer's files belong together, so they come from one folder; Meta's may lie one level up.
    """
    folders = [layout.folder for layout in without_towers(layouts)]
    found = {name: folder / name for folder in folders for name in _OTHER_FILES if (folder / name).is_file()}
    path = _main_file(folders)
    if path is None or path.parent not in folders:
        return [*([] if path is None else [path]), *found.values()]
    own = {file for pattern in _TOKENIZER_FILES for file in path.parent.glob(pattern) if file.is_file()}
    return [*sorted(own), *found.values()]


def _main_file(folders: Sequence[Path]) -> Path | None:
    """The last tokenizer, rather beside weights than one level up."""
    names = (SENTENCEPIECE_FILE, HUGGING_FACE_FILE, MISTRAL_FILE)
    beside = [folder for folder in folders if any((folder / name).is_file() for name in names)]
    return next((path for folder in reversed(beside or folders) if (path := find_tokenizer(folder)) is not None), None)


def tokenizer_of(layouts: Sequence[Layout]) -> Tokenizer | None:
    """The tokenizer that goes with checkpoints laid over each other; None: there is none, or none that is read here."""
    path = _main_file([layout.folder for layout in without_towers(layouts)])
    try:
        return None if path is None else load_tokenizer(path)
    except UserError:
        return None  # of a kind that is not read here: it can still go with the weights


def special_ids(layouts: Sequence[Layout], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """`bos_token_id` and `eos_token_id` for a config.json: the tokenizer's, else what a Hugging Face folder says."""
    if tokenizer is not None:
        ends = [tokenizer.eos_id, *sorted(tokenizer.settings.end_ids - {tokenizer.eos_id})]
        return {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends if len(ends) > 1 else ends[0]}
    for layout in reversed(without_towers(layouts)):
        if layout.format == "huggingface" and layout.params_path is not None:
            values = read_object(layout.params_path)
            return {key: values[key] for key in ("bos_token_id", "eos_token_id") if key in values}
    return {}


def write_tokenizer(tokenizer: Tokenizer, folder: Path, ids: Mapping[str, Any], merges: bool = True) -> list[str]:
    """Writes the tokenizer of the training, its chat template, and which tokens end an answer.

    The folder holds what lay beside the checkpoint, such as template.json; `ids` are `bos_token_id` and `eos_token_id`;
    of `merges` see `Tokenizer.to_json`.
    Returns what the user should know.
    """
    config = read_object(folder / CONFIG_FILE, optional=True)
    try:
        values = tokenizer.to_json(merges) | {"truncation": None, "padding": None}
    except UserError as error:
        return [f"the tokenizer goes along as it is: {error.message}"]
    adds_bos, adds_eos = adds_bos_to_texts(tokenizer, config), bool(tokenizer.settings.add_eos)
    if adds_bos is not None:
        values["post_processor"] = _framing(tokenizer, adds_bos, adds_eos)
        config |= {"add_bos_token": adds_bos, "add_eos_token": adds_eos}
    (folder / HUGGING_FACE_FILE).write_bytes(msgspec.json.encode(values))
    roles = {"unk_token": values["model"].get("unk_token"), **tokenizer.settings.roles}
    roles |= {"bos_token": tokenizer.piece(tokenizer.bos_id), "eos_token": tokenizer.piece(tokenizer.eos_id)}
    for key in _OF_OTHER_CLASSES:
        config.pop(key, None)
    for name in _OLDER:
        (folder / name).unlink(missing_ok=True)
    notes: list[str] = []
    generation = read_object(folder / GENERATION_FILE, optional=True) | dict(ids)
    if (folder / TEMPLATE_FILE).is_file():
        template, ends = Template.load(folder / TEMPLATE_FILE), ids["eos_token_id"]
        ends = ends if isinstance(ends, list) else [ends]
        stops = {token for stop in template.stop if (token := tokenizer.token_id(stop)) in tokenizer.end_ids}
        if more := stops - set(ends):
            generation["eos_token_id"] = [*ends, *sorted(more)]
        # In place of the base's, which the model was not trained on.
        config.pop("chat_template", None)
        for name in (CHAT_TEMPLATE_FILE, "chat_template.json"):
            (folder / name).unlink(missing_ok=True)
        text = chat_template(template, tokenizer)
        if text is not None:
            (folder / CHAT_TEMPLATE_FILE).write_text(text, encoding="utf-8")
        else:
            why = f"transformers cannot write the format {template.name!r} as it was trained"
            notes.append(f"no chat template is written: {why}")
    # Unless asked not to, the generic class gives token_type_ids too, which `generate` of transformers 4 refuses.
    usual = {"clean_up_tokenization_spaces": False, "model_input_names": ["input_ids", "attention_mask"]}
    config = usual | config | {role: text for role, text in roles.items() if tokenizer.token_id(text or "") is not None}
    for name, content in (
        (CONFIG_FILE, config | {"tokenizer_class": "PreTrainedTokenizerFast"}),
        (GENERATION_FILE, generation),
    ):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    return notes


def adds_bos_to_texts(tokenizer: Tokenizer, config: Mapping[str, Any]) -> bool | None:
    """Whether the tokenizer of a folder made for transformers begins a text with BOS; None: its tokenizer.json says it.

    `config` is the tokenizer_config.json beside.
    """
    is_llamas = str(config.get("tokenizer_class")).startswith("LlamaTokenizer")
    if tokenizer.settings.add_bos is None and (is_llamas or tokenizer.path.name != HUGGING_FACE_FILE):
        return True  # what transformers takes for a LLaMA's
    return tokenizer.settings.add_bos


def _framing(tokenizer: Tokenizer, bos: bool, eos: bool) -> dict[str, Any]:
    """What puts BOS and EOS around a text, as in a tokenizer.json."""
    names = [tokenizer.piece(token) for token in (tokenizer.bos_id, tokenizer.eos_id)]

    def framed(sequence: str, kind: int) -> list[dict[str, Any]]:
        begin, end = ({"SpecialToken": {"id": name, "type_id": kind}} for name in names)
        return [begin] * bos + [{"Sequence": {"id": sequence, "type_id": kind}}] + [end] * eos

    ids = zip(names, (tokenizer.bos_id, tokenizer.eos_id), strict=True)
    return {
        "type": "TemplateProcessing",
        "single": framed("A", 0),
        "pair": framed("A", 0) + framed("B", 1),
        "special_tokens": {name: {"id": name, "ids": [token], "tokens": [name]} for name, token in ids},
    }


def chat_template(template: Template, tokenizer: Tokenizer) -> str | None:
    """A format in jinja, for transformers' `apply_chat_template`; None: it cannot be said there.

    Rendered with `add_generation_prompt` it is the prompt of chat, else the text of the training.
    """
    quoted = partial(json.dumps, ensure_ascii=False)  # all escapes of JSON are among jinja's
    if template.kind == "single_turn" and "{instruction}" not in template.prompt:
        return None
    begin = ""
    if template.bos:
        gap = _gap(template, tokenizer)
        if gap is None:
            return None
        begin = "{{- bos_token" + (f" + {quoted(gap)}" if gap else "") + " }}\n"
    cleaned = "".join(f" | replace({quoted(mark)}, '')" for mark in template.removed) + " | trim" * template.strip
    eos = "eos_token" if template.eos else "''"
    if template.kind != "dialogue":
        prompt = " + ns.question + ".join(map(quoted, template.prompt.split("{instruction}")))
        # Spaces at a prompt's end are the model's to write.
        ending = ".rstrip(' ')" if template.prompt.endswith(("{instruction}", " ")) else ""
        return begin + _SINGLE_TURN.substitute(prompt=prompt, ending=ending, cleaned=cleaned, eos=eos)
    roles = template.roles
    return begin + _DIALOGUE.substitute(
        system="none" if template.system is None else quoted(template.system),
        system_begin=quoted(template.system_begin),
        system_end=quoted(template.system_end),
        human=quoted(template.turn_begin + roles["human"] + template.turn_separator),
        assistant=quoted(template.turn_begin + roles["assistant"] + template.turn_separator),
        cleaned=cleaned,
        turn_end=quoted(template.turn_end),
        prompt=quoted(template.turn_begin + roles["assistant"] + template.prompt_end),
        eos=eos,
    )


def _gap(template: Template, tokenizer: Tokenizer) -> str | None:
    """What must stand between BOS and the text to give the text's own tokens, if BOS is read in the text too.

    Some tokenizers put a space in front of a text, and none behind a special token.
    """
    bos, words = tokenizer.piece(tokenizer.bos_id), ("x",) if not template.prompt.startswith("{") else ("x", " x")
    probes = [template.prompt_text([Turn("human", word)]) for word in words]
    wanted = [tokenizer.encode(text, bos=True) for text in probes]
    return next((gap for gap in ("", " ") if [tokenizer.encode(bos + gap + text) for text in probes] == wanted), None)
