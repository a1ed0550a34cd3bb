"""Recipes as text: YAML files, and `key=value` overrides of what they say; `recipe` knows today's keys."""

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from llama_acc.core.errors import UserError, listed
from llama_acc.core.input_files import parse_yaml, read_yaml


class _Loader(yaml.SafeLoader):
    """Reads 1e-5 as a number, as YAML 1.2 and everybody does; PyYAML alone wants 1.0e-5."""


class _Dumper(yaml.SafeDumper):
    """Puts quotes around a text that `_Loader` would read as a number."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def to_yaml(values: dict[str, Any]) -> str:
    """A mapping as YAML, its keys in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)


def read_recipe(path: Path) -> dict[str, Any]:
    """A recipe file's mapping.

    Raises:
        UserError: unreadable, not YAML, or not a mapping.
    """
    values = read_yaml(path, _Loader)
    if not isinstance(values, dict):
        raise UserError(f"recipe {path} must be a mapping with keys such as model, data and train")
    return values


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `values` with each `a.b.c=VALUE` set; VALUE is read as YAML, list items are addressed by number.

    Raises:
        UserError: an override without '=', unreadable values, or keys that lead nowhere; all of them listed.
    """
    values = copy.deepcopy(values)
    problems = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            problems.append(f"'{override}': an override is written key=value, such as train.epochs=1")
            continue
        try:
            _assign(values, key.split("."), parse_yaml(text, "the value", _Loader))
        except UserError as error:
            problems.append(f"'{override[:60]}': {error.message.splitlines()[0]}")
        except (KeyError, IndexError, ValueError, TypeError):
            problems.append(f"'{override}': there is no key '{key}'")
    if problems:
        raise UserError(f"these overrides cannot be applied:\n{listed(problems)}")
    return values


def _assign(values: Any, keys: list[str], value: Any) -> None:
    for position, key in enumerate(keys[:-1]):
        if isinstance(values, list):
            values = values[int(key)]
            continue
        if values.get(key) is None:
            # A section the file leaves out: its defaults come from the schema, a wrong name is found there.
            values[key] = {}
        values = values[key]
        if not isinstance(values, (dict, list)):
            raise KeyError(".".join(keys[: position + 1]))
    if isinstance(values, list):
        values[int(keys[-1])] = value
    else:
        values[keys[-1]] = value
