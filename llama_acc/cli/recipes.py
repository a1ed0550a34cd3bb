"""`llama-acc recipes`: list, show, copy."""

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument

from llama_acc.cli import console, options
from llama_acc.core.errors import UserError

app = typer.Typer(
    help="""Recipes: everything a run is, in one YAML file.

Examples:

  llama-acc recipes

  llama-acc recipes show lima

  llama-acc recipes copy lima my.yaml    (then: llama-acc finetune --recipe my.yaml)
""",
)


def default(context: typer.Context) -> None:
    """Without a subcommand, list the recipes."""
    if context.invoked_subcommand is None:
        list_recipes()


def list_recipes(as_json: options.Json = False) -> None:
    """List the shipped recipes.

    Examples:

      llama-acc recipes list

      llama-acc recipes list --json
    """
    from llama_acc.core.recipe import Recipe, recipe_names

    found = [Recipe.load(name) for name in recipe_names()]
    if as_json:
        typer.echo(json.dumps([{"name": recipe.name, "description": recipe.description} for recipe in found], indent=1))
    else:
        console.pairs([(recipe.name, recipe.description) for recipe in found], console.out)


def show(name: Annotated[str, Argument(help="A shipped recipe, or a file.")]) -> None:
    """Print a recipe.

    Example:

      llama-acc recipes show lima
    """
    typer.echo(_text_of(name), nl=False)


def copy(
    name: Annotated[str, Argument(help="A shipped recipe, or a file.")],
    file: Annotated[Path, Argument(help="Where to write it; it must not exist yet.")],
) -> None:
    """Copy a recipe to a file, to change it.

    Examples:

      llama-acc recipes copy lima my.yaml

      llama-acc finetune --recipe my.yaml
    """
    text = _text_of(name)
    try:
        with file.open("x", encoding="utf-8") as target:
            target.write(text)
    except FileExistsError:
        raise UserError(f"{file} exists already", "choose another name, or remove it") from None
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from None
    console.note(f"wrote {file}; use it with: llama-acc finetune --recipe {shlex.quote(str(file))}")


def _text_of(name: str) -> str:
    from llama_acc.core.input_files import read_text
    from llama_acc.core.recipe import Recipe, find_recipe

    path = find_recipe(name)
    Recipe.load(path)
    return read_text(path)


SUBCOMMANDS = {"list": list_recipes, "show": show, "copy": copy}
