"""Pushing to Hugging Face: what of a run or a folder goes there, with its model card, whether it may, and the upload.

The card has the facts of the run, and no folder of this machine, in recipes/model_card.md.jinja.

Large files are stored on their own before one commit names all of them: a repository never holds a half, and a second
try sends only what is not stored yet (whole files; with hf_xet, parts of them).
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, Literal, NamedTuple

import yaml

from llama_acc import __version__
from llama_acc.core.atomic import check_manifest
from llama_acc.core.catalogue import HubAddress, catalogue, hub_name, is_address, parse_address
from llama_acc.core.checkpoint.adapter import BASE_FILE, is_adapter_only
from llama_acc.core.checkpoint.convert import Progress, Request, convert
from llama_acc.core.checkpoint.layout import inspect, latest_checkpoint, locate, read_config
from llama_acc.core.checkpoint.peft import PEFT_FILE
from llama_acc.core.data.templates import TEMPLATE_FILE, Template, Turn
from llama_acc.core.errors import LlamaAccError, RunError, UserError, listed
from llama_acc.core.hugging_face import REACH_SECONDS, HuggingFace, Note, explained, within
from llama_acc.core.input_files import parse_yaml, read_object, read_text
from llama_acc.core.recipe import Recipe
from llama_acc.core.train.runs import read_metrics

CARD_FILE = "README.md"
_PEFT_CONFIG = "adapter_config.json"
_OWN = ("manifest.json", "recipe.yaml")  # for this machine: a recipe names folders
_RESUME = "what is stored there is not sent again: the same command sends the rest"
_WEIGHTS = (".safetensors", ".bin", ".pth", ".index.json")
_TEMPLATE = Path(__file__).parents[1] / "recipes" / "model_card.md.jinja"
_LIBRARIES = {"peft": "peft", "hf": "transformers", "gguf": "llama.cpp", "consolidated": "llama-acc"}
_PAGE = "https://huggingface.co/"
_CURVE = 12  # lines of the table of losses
Kind = Literal["peft", "hf", "consolidated", "gguf"]


class Package(NamedTuple):
    """What is pushed: in which form, its files by name (those made here as their content), and notes for the user."""

    kind: Kind
    files: Mapping[str, Path | bytes]
    notes: list[str]


def parse_repo(text: str) -> str:
    """OWNER/NAME of `hf:OWNER/NAME`."""
    address = parse_address(text if text.startswith("hf:") else f"hf:{text}")
    if not isinstance(address, HubAddress) or address.kind == "dataset" or address.revision or address.path:
        raise UserError(f"{text!r} is not the name of a model's repository", "write hf:OWNER/NAME")
    return address.repo


def checkpoint_to_push(folder: str) -> Path:
    """The checkpoint that is meant by a run's folder or its own."""
    source = locate(folder)
    if (source / "metrics.jsonl").is_file() and latest_checkpoint(source) is None:
        hint = f"let it end, or go on with: llama-acc finetune --output {source} --resume"
        raise UserError(f"{source} is a run without a whole checkpoint yet", hint)
    check_manifest(source)
    return source


def make_package(
    source: Path, repo: str, aside: Path, base: str | None, merge: bool, results: Sequence[Path], progress: Progress
) -> Package:
    """What of a checkpoint is pushed, with its card. One that PEFT or transformers loads goes as it is, another is
    converted into `aside`, LoRA pairs merged if asked for. `base` is a checkpoint or hf:OWNER/NAME that what was
    trained goes on, None: what the run says; `results` are JSON files for the card.

    Raises:
        UserError: it cannot be written in that form.
    """
    run = source.parent if (source.parent / "metrics.jsonl").is_file() else source
    recipe = Recipe.load(str(run / "recipe.yaml")) if (run / "recipe.yaml").is_file() else None
    bases = [base] if base else [] if recipe is None else recipe.model.pretrained_list()
    kind, made, notes = _kind(source, base, merge), source, list[str]()
    is_so = (source / PEFT_FILE).is_file() or (not merge and kind == "hf" and inspect(source).format == "huggingface")
    if kind in ("peft", "hf") and not is_so:
        made = aside / "model"
        request = Request(source, made, kind, base=base if _is_here(base) else None, merge=merge)
        notes = [note for note in convert(request, progress).notes if _PEFT_CONFIG not in note]
    shown = [path for path in sorted(made.iterdir()) if path.is_file() and path.name[0] != "."]
    files: dict[str, Path | bytes] = {path.name: path for path in shown if path.name not in _OWN}
    if not bases and _PEFT_CONFIG in files:
        said = str(read_object(made / _PEFT_CONFIG).get("base_model_name_or_path") or "")
        is_name = "/" in said and not (Path(said).is_absolute() or Path(said).exists())
        bases = [f"hf:{said}" if is_name else said] if said else []
    origin = hub_name(bases[0]) if len(bases) == 1 else None
    if kind == "peft" and origin is None:
        notes.append(f"{_PEFT_CONFIG} names no base, which PEFT needs: give its name with --base hf:OWNER/NAME")
    # No folder of this machine is told.
    for name, key, value in ((_PEFT_CONFIG, "base_model_name_or_path", origin), (BASE_FILE, "pretrained", [origin])):
        if name in files:
            files[name] = (json.dumps(read_object(made / name) | {key: value}, indent=2) + "\n").encode()
    if CARD_FILE not in files:
        if (picture := run / "loss.png").is_file():
            files[picture.name] = picture
        files[CARD_FILE] = write_card(repo, kind, source, run, recipe, origin, bases, results).encode()
    return Package(kind, files, notes)


def _kind(source: Path, base: str | None, merge: bool) -> Kind:
    """The form a checkpoint is pushed in: PEFT's of a method that PEFT has, a whole model, or else its own."""
    if (source / PEFT_FILE).is_file():
        return "peft"
    if any(source.glob("*.gguf")):
        return "gguf"
    layout = inspect(source)
    config = read_config([layout])
    if merge or config is None or layout.format == "huggingface":
        return "hf"
    tuning = config.tuning
    if config.vision is not None or not tuning.can_merge:
        return "consolidated"
    if tuning.merged() == tuning:  # nothing of it needs a place of its own
        return "consolidated" if is_adapter_only(layout) and base is None else "hf"
    has_twice = config.qkv_bias and "bias" in tuning.peft_names
    return "peft" if tuning.peft_names and not has_twice else "consolidated"


def _is_here(name: str | None) -> bool:
    try:
        return name is not None and locate(name).is_dir()
    except UserError:
        return False


# The model card


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


# The repository


class Destination:
    """A model's repository on Hugging Face, there or to be made."""

    def __init__(self, repo: str, note: Note) -> None:
        """Looks for the token; asks nothing yet."""
        self._repo, self._hub = repo, HuggingFace(None, note)
        self._settings = f"{self._hub.endpoint}/settings/tokens"
        if self._hub.token is None:
            hint = f"make one that may write on {self._settings}; give it in HF_TOKEN, or once with `hf auth login`"
            raise UserError("pushing needs a token of Hugging Face, and there is none", hint)

    def check(self) -> bool | None:
        """Checks the token, the owner's name and the permission, and makes nothing.

        Returns whether the repository is private; None = it is not there yet.

        Raises:
            UserError: one of them will not do.
            RunError: the network.
        """
        from huggingface_hub.errors import RepositoryNotFoundError

        owner, _, name = self._repo.partition("/")
        with self._explained():
            who = within(REACH_SECONDS, self._hub.host, self._hub.api.whoami)
        roles = {org["name"]: org.get("roleInOrg") for org in who.get("orgs", [])} | {who["name"]: "owner"}
        if owner not in roles:
            raise UserError(f"the token is {who['name']}'s, who is no member of {owner}", f"hf:{who['name']}/{name}?")
        token = (who.get("auth") or {}).get("accessToken") or {}
        if "read" in (token.get("role"), roles[owner]):
            raise self._may_not_write()
        with self._explained():
            try:
                is_private = bool(self._hub.api.repo_info(self._repo).private)
            except RepositoryNotFoundError:
                return None
            self._hub.api.auth_check(self._repo, write=True)
        return is_private

    def push(self, package: Package, public: bool, bars: bool) -> str:
        """Makes the repository, private unless `public`, if it is not there, and sends what it does not hold yet.

        With `bars`, huggingface_hub shows its progress. Returns the address of its page.

        Raises:
            UserError: it may not, or the repository holds weights of something else.
            RunError: the network; a second call sends the rest.
        """
        from huggingface_hub import CommitOperationAdd
        from huggingface_hub.utils import disable_progress_bars

        if not bars:
            disable_progress_bars()
        api, repo = self._hub.api, self._repo
        with self._explained():
            api.create_repo(repo, private=not public, exist_ok=True)
            there = [name for name in api.list_repo_files(repo) if name.endswith(_WEIGHTS) and "/" not in name]
            if others := [name for name in there if name not in package.files]:
                raise UserError(
                    f"{repo} holds other weights, which would stay beside these:\n{listed(others, most=8)}",
                    "push to another name, or delete them on its page first",
                )
            added = [CommitOperationAdd(name, file) for name, file in package.files.items()]
            api.create_commit(repo, added, commit_message=f"Push {package.kind} by llama-acc")
        return f"{self._hub.endpoint}/{repo}"

    def _explained(self) -> Any:
        return explained(f"hf:{self._repo}", self._hub.host, self._refusal, _RESUME)

    def _may_not_write(self) -> UserError:
        hint = f"make one of kind 'write' on {self._settings}, and give it in HF_TOKEN"
        return UserError(f"the token may not write to {self._repo}", hint)

    def _refusal(self, error: Any) -> LlamaAccError:
        """What an answer of 4xx or 5xx means."""
        code = error.response.status_code
        if code == 401:
            return UserError(f"{self._hub.host} does not know the token (401)", f"make a new one: {self._settings}")
        if code in (403, 404):
            return self._may_not_write()
        said = f": {error.server_message}" if error.server_message else ""
        return RunError(f"{self._hub.host} answers {code} for hf:{self._repo}{said}", f"try again later; {_RESUME}")
