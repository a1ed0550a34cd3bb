"""The model card of what is pushed: facts of the run, and no folder of this machine, in recipes/model_card.md.jinja."""

import re
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

import yaml

from llama_acc import __version__
from llama_acc.core.catalogue import HubAddress, catalogue, is_address, parse_address
from llama_acc.core.checkpoint.layout import locate
from llama_acc.core.data.templates import TEMPLATE_FILE, Template, Turn
from llama_acc.core.errors import UserError
from llama_acc.core.input_files import parse_yaml, read_object, read_text
from llama_acc.core.recipe import Recipe
from llama_acc.core.train.runs import read_metrics

CARD_FILE = "README.md"
_TEMPLATE = Path(__file__).parents[1] / "recipes" / "model_card.md.jinja"
_LIBRARIES = {"peft": "peft", "hf": "transformers", "gguf": "llama.cpp", "consolidated": "llama-acc"}
_PAGE = "https://huggingface.co/"
_CURVE = 12  # lines of the table of losses


def write_card(
    repo: str,
    kind: str,
    folder: Path,
    run: Path,
    recipe: Recipe | None,
    origin: str | None,
    bases: Sequence[str],
    results: Sequence[Path],
) -> str:
    """README.md of a repository, OWNER/NAME, for what is pushed in the form `kind`: a checkpoint in `folder`.

    Of its run's folder is told what is there. `origin` is the base's name on Hugging Face, `bases` what the run started
    from, as it was given; `results` are JSON files of evaluations.

    Raises:
        UserError: a file cannot be read.
    """
    import jinja2

    license, method = _license(bases, origin), None if recipe is None else recipe.tuning.method
    header = {
        "base_model": origin,
        "base_model_relation": origin and ("adapter" if kind == "peft" else "finetune"),
        **license,
        "library_name": _LIBRARIES[kind],
        "pipeline_tag": "text-generation",
        "tags": ["llama-acc", *([method] if method else [])],
        "datasets": [] if recipe is None else _datasets(recipe),
    }
    lines, _ = read_metrics(run / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    held_out = [f"{line['validation_loss']:.4f} at step {line['step']}" for line in lines if "validation_loss" in line]
    rows = [("validation loss, at the end", loss) for loss in held_out[-1:]]
    for path in results:
        found = read_object(path)
        rows += _rows(path.stem, found.get("results", found))  # lm-evaluation-harness's have their settings besides
    report = read_object(run / "data.json") if (run / "data.json").is_file() else {}
    template = folder / TEMPLATE_FILE
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters["cell"] = lambda value: str(value).replace("|", "&#124;").replace("\n", " ")
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        header=yaml.safe_dump({key: value for key, value in header.items() if value}, sort_keys=False),
        repo=repo,
        kind=kind,
        method=method,
        origin=origin,
        base=" and ".join(PurePath(base).name for base in bases),
        recipe=recipe,
        settings=None if recipe is None else _settings(recipe),
        version=__version__,
        data=[{**file, "name": PurePath(file["path"]).name} for file in report.get("files", [])],
        prompt=Template.load(template).prompt_text([Turn("human", "{instruction}")]) if template.is_file() else None,
        curve=[steps[(len(steps) - 1) * i // (_CURVE - 1)] for i in range(_CURVE)] if len(steps) > _CURVE else steps,
        has_picture=(run / "loss.png").is_file(),
        results=rows,
        license=license.get("license_name") or license.get("license"),
    )


def _license(bases: Sequence[str], origin: str | None) -> dict[str, str]:
    """The base's license, as its own card says it, or as the catalogue does."""
    for base in bases:
        try:
            card = read_text(locate(base) / CARD_FILE)
        except UserError:  # it is not here, or has no card
            continue
        if (match := re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)) is not None:
            said = parse_yaml(match[1], f"{base}/{CARD_FILE}")
            names = ("license", "license_name", "license_link")
            if isinstance(said, dict) and said.get("license"):
                return {name: str(said[name]) for name in names if said.get(name)}
    entry = next((entry for entry in catalogue().values() if entry.page == f"{_PAGE}{origin}"), None)
    if entry is None:
        return {}
    if entry.license.lower() in ("apache-2.0", "mit"):
        return {"license": entry.license.lower()}
    return {"license": "other", "license_name": entry.license, "license_link": entry.page}


def _datasets(recipe: Recipe) -> list[str]:
    """The data sets of Hugging Face among a run's data."""
    found = []
    for source in recipe.data.sources:
        entry = catalogue().get(source.path)
        text = source.path if entry is None else entry.page
        if is_address(text):
            address = parse_address(text)
            if isinstance(address, HubAddress) and address.kind == "dataset":
                found.append(address.repo)
    return list(dict.fromkeys(found))


def _settings(recipe: Recipe) -> str:
    """What decides a run's numbers besides model and data, as YAML."""
    kept = recipe.model_dump(mode="json", exclude_none=True, include={"tuning", "optimizer", "train", "parallel"})
    return yaml.safe_dump(kept | {"data": {"max_tokens": recipe.data.max_tokens}}, sort_keys=False)


def _rows(name: str, value: Any) -> list[tuple[str, str]]:
    """The numbers and texts of nested results, each by the way to it."""
    if isinstance(value, dict):
        return [row for key, inner in value.items() for row in _rows(f"{name}, {key}", inner)]
    shown = f"{value:.4g}" if isinstance(value, float) else str(value)
    return [] if isinstance(value, list) or value is None else [(name, shown)]
