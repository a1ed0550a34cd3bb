"""The documentation says what the code does: its example runs, its commands parse, its links and tables are right."""

import ast
import fnmatch
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

import llama_acc
from llama_acc.cli.app import app, load_command
from llama_acc.core.data import keys
from llama_acc.core.data.items import ROLES
from llama_acc.core.data.templates import TEMPLATES, Template, Turn
from llama_acc.core.data.tools import MESSAGE_KEYS, TOOLS
from llama_acc.core.recipe import Recipe, SourceSection, known_keys, recipe_names
from llama_acc.core.train.run_folder import _MAY_CHANGE

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/*.md"))
PACKAGE = ROOT / "llama_acc"
COMMAND: Any = typer.main.get_command(app)
LISTED = COMMAND.commands
COMMAND.commands = {name: load_command(name) for name in LISTED}


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def section(text: str, heading: str) -> str:
    """What stands under a heading, up to the next one of the same or a higher level."""
    level = heading.split()[0]
    start = text.index(f"\n{heading}\n") + len(heading) + 2
    end = re.search(rf"^#{{1,{len(level)}}} ", text[start:], re.MULTILINE)
    return text[start : start + end.start()] if end else text[start:]


def table_rows(text: str) -> list[list[str]]:
    """The cells of every table row but the rules between header and body."""
    rows = [line.strip().strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows if set("".join(row)) - set("-: ")]


def code(cell: str) -> str:
    return cell.strip("`")


# README's Python example


class Run(NamedTuple):
    stdout: str
    folder: Path


@pytest.fixture(scope="module")
def readme_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """README's only python block, run as a user would: as a script, in a folder of its own."""
    (example,) = re.findall(r"^```python\n(.*?)^```", read("README.md"), re.MULTILINE | re.DOTALL)
    folder = tmp_path_factory.mktemp("readme")
    environment = os.environ | {"LLAMA_ACC_HOME": str(folder / "home"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", example], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return Run(done.stdout, folder / "runs" / "python")


def test_readme_example_learns_its_answer(readme_run: Run) -> None:
    assert readme_run.stdout == "LLaMA is a family of language models made by Meta.\n"
    model = llama_acc.load_model(readme_run.folder, device="cpu")
    assert (model.template.name, model.template_from) == ("alpaca", "alpaca, from template.json")
    for item in json.loads((PACKAGE / "recipes/quickstart/instructions.json").read_text(encoding="utf-8"))[:6]:
        if not item["input"]:
            assert llama_acc.generate(model, item["instruction"], temperature=0) == item["output"]


def test_readme_lists_what_a_run_leaves(readme_run: Run) -> None:
    listed = section(read("README.md"), "## What a run leaves")
    for path in readme_run.folder.iterdir():
        assert re.sub(r"epoch\d+.*", "epoch0/", path.name) in listed
    for name in re.findall(r"^    (\S+?\.\w+|latest)[ ,]", listed, re.MULTILINE):
        assert (readme_run.folder / name).exists(), name


def test_checkpoints_page_lists_what_a_checkpoint_holds(readme_run: Run) -> None:
    (checkpoint,) = readme_run.folder.glob("epoch*")
    saved = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    assert {code(row[0]) for row in table_rows(section(read("docs/checkpoints.md"), "## What is saved"))[1:]} == saved


def test_data_page_lists_the_fields_of_the_report(readme_run: Run) -> None:
    report = json.loads((readme_run.folder / "data.json").read_text(encoding="utf-8"))
    text = section(read("docs/data.md"), "## The data report")
    assert {code(row[0]) for row in table_rows(text)[1:]} == set(report)
    assert ", ".join(f"`{quantile}`" for quantile in report["lengths"]) in text


# Command lines


class CommandLine(NamedTuple):
    page: str
    words: list[str]
    whole: bool
    """It can be typed as it stands; else it is a mention, which may leave out what is required."""


def command_lines() -> Iterator[CommandLine]:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for line in re.findall(r"^(?:    |\$ )(.*\bllama-acc .*)$", text, re.MULTILINE):
            yield CommandLine(page.name, words_of(line), True)
        for mention in re.findall(r"`(llama-acc [^`\n]+)`", text):
            yield CommandLine(page.name, words_of(mention), False)


def words_of(line: str) -> list[str]:
    """The words after `llama-acc`, up to a pipe or a redirection."""
    words = shlex.split(line, comments=True)
    words = words[words.index("llama-acc") + 1 :]
    ends = [i for i, word in enumerate(words) if word in ("|", ">", "<", "&&")]
    return words[: ends[0]] if ends else words


def parse(words: list[str], whole: bool = False) -> None:
    """Parses the words after `llama-acc`; unless they are `whole`, what is required may be missing."""
    command, context = COMMAND, COMMAND.context_class(COMMAND, info_name="llama-acc", **COMMAND.context_settings)
    while words and hasattr(command, "commands") and re.match("[a-z]", words[0]) and "X" not in words[0]:
        assert words[0] in command.commands, f"there is no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
        context = command.context_class(command, info_name=command.name, parent=context)
    if whole:
        command.make_context(command.name, list(words), parent=context.parent)
    else:
        command.make_parser(context).parse_args(list(words))


@pytest.mark.parametrize("line", command_lines(), ids=lambda line: f"{line.page}: {' '.join(line.words)}")
def test_every_command_line_parses(line: CommandLine) -> None:
    parse(line.words, line.whole)


@pytest.mark.parametrize(
    "line",
    [line for line in command_lines() if line.words[:1] == ["finetune"] and any("=" in word for word in line.words)],
    ids=lambda line: " ".join(line.words),
)
def test_every_override_is_a_key_with_a_possible_value(line: CommandLine) -> None:
    name = line.words[line.words.index("--recipe") + 1] if "--recipe" in line.words else "alpaca"
    Recipe.load(name, [word for word in line.words if "=" in word])


def test_chat_page_lists_every_option() -> None:
    chat = COMMAND.commands["chat"]
    options = {parameter.opts[0] for parameter in chat.params} - {"--ckpt", "--help", "-h"}
    rows = table_rows(section(read("docs/chat.md"), "## Options"))[1:]
    assert {code(row[0]).split()[0] for row in rows} == options


def test_serving_page_lists_every_option() -> None:
    options = {parameter.opts[0] for parameter in COMMAND.commands["serve"].params} - {"--help", "-h"}
    rows = table_rows(section(read("docs/serving.md"), "## Options"))[1:]
    assert {code(name).split()[0] for row in rows for name in row[0].split(", ")} == options


def test_evaluation_page_lists_every_option() -> None:
    evaluate = COMMAND.commands["evaluate"]
    text = section(read("docs/evaluation.md"), "## Options")
    rows, as_in_chat = table_rows(text)[1:], set(re.findall(r"`(--[\w-]+)`", text.splitlines()[-2]))
    for name in ("gorilla", "perplexity", "lm-eval"):
        options = {parameter.opts[0] for parameter in evaluate.commands[name].params} - {"--help", "-h", "tasks"}
        listed = {code(row[0]).split()[0] for row in rows if row[1] == "all" or name in row[1].split(", ")}
        assert listed | as_in_chat == options


def test_the_list_of_commands_says_what_each_says_itself() -> None:
    said = {name: command.help.split("\n\n")[0].strip() for name, command in COMMAND.commands.items()}
    assert said == {name: command.help for name, command in LISTED.items()}


# Links


def links() -> Iterator[tuple[Path, str]]:
    for page in PAGES:
        prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", prose):
            if not target.startswith(("http://", "https://")):
                yield page, target


def anchors(page: Path) -> set[str]:
    """GitHub's names for the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(("page", "target"), links(), ids=lambda part: part if isinstance(part, str) else part.name)
def test_every_link_leads_somewhere(page: Path, target: str) -> None:
    file, _, anchor = target.partition("#")
    path = page.parent / file if file else page
    assert path.exists()
    assert not anchor or anchor in anchors(path)


def test_readme_tree_names_every_room_and_nothing_else() -> None:
    tree = section(read("README.md"), "## Architecture").split("The first line")[0]
    rooms = {path.parent.relative_to(PACKAGE).as_posix() for path in PACKAGE.glob("**/__init__.py")} - {".", "core"}
    named = set(re.findall(r"^ +([\w/]+)/ ", tree, re.MULTILINE))
    assert {room.removeprefix("core/") for room in rooms} == named - {"recipes"}
    assert set(re.findall(r"\b(\w+\.py)\b", tree)) <= {path.name for path in PACKAGE.rglob("*.py")}


def test_readme_gives_a_reason_for_every_dependency() -> None:
    # Python 3.10 has no TOML reader; the list is plain enough.
    (listed,) = re.findall(r"^dependencies = \[\n(.*?)^\]", read("pyproject.toml"), re.MULTILINE | re.DOTALL)
    rows = table_rows(section(read("README.md"), "## Dependencies"))[1:]
    assert sorted(row[0] for row in rows) == sorted(re.findall(r'^ +"([\w.-]+)', listed, re.MULTILINE))


# Recipes


def defaults(schema: type[BaseModel] = Recipe, prefix: str = "") -> dict[str, Any]:
    """Every key that holds a value, with its default."""
    found: dict[str, Any] = {}
    for name, field in schema.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= defaults(field.annotation, f"{prefix}{name}.")
        elif name != "sources":
            default = field.default
            found[prefix + name] = list(default) if isinstance(default, tuple) else default
    return found | (defaults(SourceSection, "data.sources.") if schema is Recipe else {})


def documented_keys() -> dict[str, Any]:
    rows = table_rows(section(read("docs/recipes.md"), "## Every key"))
    return {
        code(row[0]): PydanticUndefined if row[2] == "required" else yaml.safe_load(code(row[2]))
        for row in rows
        if row[0] != "key"
    }


def test_recipes_page_has_every_key_and_no_other() -> None:
    known = known_keys()
    with_a_value = [key for key in known if not any(other.startswith(f"{key}.") for other in known)]
    assert sorted(documented_keys()) == sorted(with_a_value)


def test_recipes_page_has_the_defaults() -> None:
    assert documented_keys() == defaults()


def test_recipes_page_has_what_may_change_on_resume() -> None:
    text = section(read("docs/recipes.md"), "## What may change on `--resume`")
    listed = [line for line in text.splitlines() if line.startswith("- ")]
    assert set(re.findall(r"`([\w.]+)`", "\n".join(listed))) == _MAY_CHANGE


def test_recipes_page_has_every_shipped_recipe_with_its_values() -> None:
    header, *rows = table_rows(section(read("docs/recipes.md"), "## The shipped recipes"))
    whole = [row for row in rows if len(row) == len(header)]  # the table behind it is of parts of names
    rows = [[name, *cells] for names, *cells in whole for name in re.findall(r"`([\w.-]+)`", names)]
    assert sorted(name for name, *_ in rows) == recipe_names()
    for name, *cells in rows:
        recipe = Recipe.load(name).model_dump()
        for key, cell in zip(header[1:], cells, strict=True):
            assert yaml.safe_load(cell) == value_at(recipe, code(key)), f"{name} {key}"


def test_the_name_of_a_recipe_says_what_the_recipes_page_says() -> None:
    methods = {"biasnorm": "bias_norm", "lora": "lora_bias_norm", "adapter": "adapter"}
    sizes = {"13b": ("llama2-13b", 2), "34b": ("codellama-34b", 4), "70b": ("llama2-70b", 8)}
    for name in recipe_names():
        recipe, words = Recipe.load(name), name.split("-")
        quickstart, nf4 = "quickstart" in words, "nf4" in words
        default = "frozen" if name == "caption-qformer-13b" else "full"
        method = next((methods[word] for word in words if word in methods), default)
        size, ranks = next((sizes[word] for word in words if word in sizes), ("llama2-7b", 1))
        if words[0] == "sft":
            method, size = method.removesuffix("_bias_norm"), "-".join(words[1:3])
        assert (recipe.tuning.method, recipe.tuning.quantize) == (method, "nf4" if nf4 else "none"), name
        assert recipe.model.size == (None if quickstart else size), name
        assert recipe.parallel.model_parallel_size == (1 if nf4 else ranks), name
        assert recipe.train.precision == ("fp32" if quickstart else "bf16"), name
        no_checkpointing = quickstart or name in ("alpaca-adapter", "sft-llama3.2-1b-lora")
        assert recipe.train.activation_checkpointing == (False if no_checkpointing else "auto"), name
        left = (recipe.train.batch_size == "auto", recipe.train.micro_batch_tokens == "auto")
        assert left == (not quickstart,) * 2, name


def value_at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values[int(part)] if isinstance(values, list) else values[part]
    return values


def test_recipes_page_says_where_the_data_of_every_recipe_comes_from() -> None:
    rows = table_rows(section(read("docs/recipes.md"), "## Data of each recipe"))[1:]
    patterns = [pattern for row in rows for pattern in re.findall(r"`([\w.*-]+)`", row[0])]
    assert sorted(name for pattern in patterns for name in fnmatch.filter(recipe_names(), pattern)) == recipe_names()


# Prompt formats


def marked(template: Template, item: Any) -> str:
    """An example's text with what is trained between ⟦ and ⟧."""
    bos, eos = "<s>" * template.bos, "</s>" * template.eos
    if template.kind == "single_turn":
        prompt = template.single_turn_text(item["instruction"], item["input"], "").text
        return f"{bos}{prompt}⟦{item['output']}{eos}⟧"
    text, _, trained, *_ = template.dialogue_text(
        [Turn(ROLES[turn["from"]], turn["value"]) for turn in item["conversations"]]
    )
    for begin, end in reversed(trained):
        text = f"{text[:begin]}⟦{text[begin:end]}⟧{text[end:]}"
    return f"{bos}{text}{eos}"


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def documented_examples() -> Iterator[tuple[str, Any]]:
    """The name of every prompt format, with the items of the page that it is shown for."""
    (without, with_input), (dialogue,), *_ = map(json.loads, fenced(read("docs/data.md"), "json"))
    for name, template in TEMPLATES.items():
        yield name, without if template.kind == "single_turn" else dialogue
        if template.prompt_with_input is not None:
            yield name, with_input


@pytest.mark.parametrize(("name", "item"), documented_examples())
def test_data_page_has_the_exact_text_of_every_prompt_format(name: str, item: Any) -> None:
    formats = section(read("docs/data.md"), "## Prompt formats")
    assert f"`{name}`" in formats
    assert marked(TEMPLATES[name], item).rstrip("\n") + "\n" in fenced(formats, "text")


def test_the_guide_names_every_key_that_changes_an_item() -> None:
    table = section(read("docs/data.md"), "### Keys")
    named = {word for row in table_rows(table)[1:] for word in re.findall(r"`(\w+)`", row[0])}
    used = {
        *keys.SYSTEM,
        *keys.TRAINED,
        *keys.INPUT[1:],
        *keys.IMAGES[1:],
        *TOOLS,
        *chain(*MESSAGE_KEYS.values()),
        "history",
    }
    assert named == {*used, *keys.UNUSABLE, *keys.UNDESIRABLE, "completion"}


# The walks of docs/architecture.md


@pytest.mark.parametrize(
    ("file", "name"), re.findall(r"^\d+\. `([^`]+)` `([^`]+)`: ", read("docs/architecture.md"), re.MULTILINE)
)
def test_a_walk_names_what_is_there(file: str, name: str) -> None:
    scope: Any = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
    for part in name.split("."):
        defined = [n for n in scope.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == part]
        assert defined, f"{file} has no {name}"
        scope = defined[0]


# What a message says to type next exists: commands, their flags and the recipe's keys


_OF_PIP = {"--upgrade"}


@cache
def messages() -> list[tuple[str, str]]:
    """Every text in the package that is no docstring, but for those that are a command's help, with its place.

    What is filled in stands as X.
    """
    texts = []
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        nodes = list(ast.walk(tree))
        inner = {part for node in nodes if isinstance(node, ast.JoinedStr) for part in ast.walk(node) if part != node}
        inner |= {node.value for node in nodes if isinstance(node, ast.Expr) and path.parent.name != "cli"}
        for node in nodes:
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "X" for part in node.values]
                texts.append((f"{path.name}:{node.lineno}", "".join(map(str, parts))))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in inner:
                texts.append((f"{path.name}:{node.lineno}", node.value))
    return texts


def commands(command: Any) -> Iterator[Any]:
    yield command
    for inner in getattr(command, "commands", {}).values():
        yield from commands(inner)


def found(pattern: str) -> list[tuple[str, str]]:
    return [(place, match) for place, text in messages() for match in re.findall(pattern, text)]


def test_every_command_that_a_message_names_parses() -> None:
    named = found(r"(?<!this )llama-acc ([^`;,()\n]+)")
    assert len(named) > 50
    for place, line in named:
        try:
            parse(shlex.split(line.replace("'", ""), comments=True))
        except Exception as error:
            pytest.fail(f"{place}: llama-acc {line}: {error}")


def test_every_flag_that_a_message_names_exists() -> None:
    options = [parameter for command in commands(COMMAND) for parameter in command.params]
    known = {name for option in options for name in (*option.opts, *option.secondary_opts)} | {"--help"}
    named = found(r"(?<![\w-])(?<!var\()--[a-z][\w-]*(?![\w-]*:)")  # CSS has variables of this form
    assert len(named) > 100
    assert [(place, flag) for place, flag in named if flag not in known | _OF_PIP] == []


def test_every_recipe_key_that_a_message_names_exists() -> None:
    keys = {re.sub(r"\.\d+\.", ".", key) for key in known_keys()}
    named = found(
        r"\b(?!(?:tuning|train)\.X)((?:model|tuning|vision|data|optimizer|train|parallel|checkpoint)\.[\w.]+)="
    )
    assert len(named) > 20
    assert [(place, key) for place, key in named if re.sub(r"\.\d+\.", ".", key) not in keys] == []
