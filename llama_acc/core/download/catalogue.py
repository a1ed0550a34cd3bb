"""What `llama-acc download NAME` knows by name: recipes/downloads/catalogue.yaml."""

import functools
import re
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from llama_acc.core.errors import UserError, did_you_mean

CATALOGUE = Path(__file__).parents[2] / "recipes" / "downloads" / "catalogue.yaml"

_Hex = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]+$")]


class File(BaseModel):
    """One address of an entry.

    Attributes:
        get: `hf:...` or `https://...`; a Hugging Face address may be a folder or a glob.
        name: what the file is called here, if not as there; may hold folders.
        bytes: its exact size.
        sha256: of its content.
        git_blob: git's identity of its content, as GitHub's listings give it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    get: str
    name: str | None = None
    bytes: int | None = None
    sha256: Annotated[_Hex, StringConstraints(min_length=64, max_length=64)] | None = None
    git_blob: Annotated[_Hex, StringConstraints(min_length=40, max_length=40)] | None = None


class Entry(BaseModel):
    """What is known of a name.

    Attributes:
        name: what to type.
        kind: data to train on, captions whose images have to be fetched, a language model, or a vision tower.
        what: one line.
        page: where it is described.
        licence: as its page states it.
        size: as its page states it.
        gated: access has to be asked for on `page`.
        recipe: a shipped recipe that uses it.
        convert: the FORMAT of `llama-acc convert-data` that makes of it what `finetune` takes.
        all_forms: it is converted with --all-forms.
        template: the prompt format of a checkpoint that does not say it itself.
        llama_type: LLaMA2-Accessory's name of the architecture, for a checkpoint without meta.json.
        note: what else to know.
        files: what is fetched.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kind: Literal["data", "images", "model", "vision"]
    what: str
    page: str
    licence: str
    size: str | None = None
    gated: bool = False
    recipe: str | None = None
    convert: str | None = None
    all_forms: bool = False
    template: str | None = None
    llama_type: str | None = None
    note: str | None = None
    files: tuple[File, ...] = Field(min_length=1)

    @property
    def conversion(self) -> str:
        """The command that converts it."""
        return f"llama-acc convert-data {self.convert} {self.name}" + " --all-forms" * self.all_forms

    @property
    def is_model(self) -> bool:
        """Whether it is found by `--pretrained` and `--ckpt`, not by `--data`."""
        return self.kind in ("model", "vision")


@functools.cache
def catalogue() -> dict[str, Entry]:
    """Every entry by its name, in the catalogue's order."""
    raw = yaml.safe_load(CATALOGUE.read_text(encoding="utf-8"))
    return {name: Entry(name=name, **values) for name, values in raw.items()}


def find_entry(name: str) -> Entry:
    """The entry of a name.

    Raises:
        UserError: there is none; near names are suggested.
    """
    found = catalogue().get(name)
    if found is None:
        near = did_you_mean(name.lower(), catalogue())
        lists = "`llama-acc download --list` shows every name; an address also does: hf:OWNER/NAME or https://..."
        is_repository = re.fullmatch(r"[\w.-]+/[\w./-]+", name)
        raise UserError(
            f"the catalogue has no {name!r}" + (f": {near}" if near else ""),
            f"of Hugging Face, type: llama-acc download hf:{name}" if is_repository else lists,
        )
    return found


def names_of_repository(repository: str) -> list[str]:
    """The entries that are a repository of Hugging Face ("owner/name") as a whole."""
    return [name for name, entry in catalogue().items() if entry.page == f"https://huggingface.co/{repository}"]
