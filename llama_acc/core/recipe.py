"""What a run is: a strict schema, shipped recipes, `key=value` overrides. Imports no torch.

A recipe is a YAML file. Every key is known and typed; all problems of a recipe come together, an unknown key with the
nearest known one. What the keys mean is in docs/recipes.md.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from llama_acc.core.errors import UserError, did_you_mean, listed, schema_problems
from llama_acc.core.input_files import parse_yaml, read_yaml
from llama_acc.core.model.tuning import METHODS, Tuning
from llama_acc.core.model.vision_config import Vision, VisionTraining, vision_of

RECIPES_FOLDER = Path(str(files("llama_acc"))) / "recipes"
# Beyond these a number is a slip of the hand, and would fail only where something is computed with it.
_LENGTH, _STEPS = 2**24, 10**9
# Examples in a micro-batch, where neither the recipe nor a GPU's memory says how many.
_BATCH_SIZE = 4
_Count = Annotated[int, Field(ge=1, le=2**31)]
_Auto = Literal["auto"]
_Beta = Annotated[float, Field(ge=0, lt=1)]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, values are checked when they change."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)


class ModelSection(Section):
    """Which model, and where its weights come from: folders or downloaded names, left to right; null = random."""

    pretrained: str | list[str] | None
    size: str | None = None
    params: dict[str, Any] | str | list[str] | None = None
    max_seq_len: int | None = Field(default=None, ge=2, le=_LENGTH)
    tokenizer: str | None = None

    def pretrained_list(self) -> list[str]:
        """The checkpoints to load, left to right."""
        if self.pretrained is None:
            return []
        return [self.pretrained] if isinstance(self.pretrained, str) else list(self.pretrained)


class TuningSection(Section):
    """What trains, and what is added for it. A method's own settings, such as `lora_rank`, are keys besides, which
    `_add_settings` takes from its class in `core.model.tuning`; null = the method's own default."""

    method: str = "full"
    quantize: Literal["none", "nf4"] = "none"
    quantize_skip: list[str] = []

    @field_validator("method")
    @classmethod
    def _known_method(cls, method: str) -> str:
        if method not in METHODS:
            hint = did_you_mean(method, METHODS) or f"known are {', '.join(METHODS)}"
            raise ValueError(f"there is no method '{method}': {hint}")
        return method

    @model_validator(mode="after")
    def _only_what_the_method_has(self) -> "TuningSection":
        method = METHODS[self.method]
        own = {field.name for field in fields(method)}
        if wrong := [key for key in type(self).model_fields if key in _SETTINGS - own and getattr(self, key)]:
            raise ValueError(f"method {self.method} has no {' and no '.join(wrong)}")
        if method.trains_all and self.quantize != "none":
            problem = f"quantize {self.quantize} is for what does not train, and method {self.method} trains all"
            raise ValueError(problem)
        return self

    def resolved(self) -> Tuning:
        """The method with its settings; it is to be put `with_num_layers`."""
        method = METHODS[self.method]
        values = {field.name: getattr(self, field.name) for field in fields(method)}
        return method(**{key: value for key, value in values.items() if value is not None})


def _add_settings() -> set[str]:
    """Makes the methods' settings keys of the section; returns them."""
    for method in METHODS.values():
        types = get_type_hints(method, include_extras=True)
        for field in fields(method):
            is_switch = types[field.name] is bool
            kind, default = (bool, field.default) if is_switch else (types[field.name] | None, None)
            TuningSection.model_fields[field.name] = FieldInfo.from_annotated_attribute(kind, default)
    TuningSection.model_rebuild(force=True)
    return TuningSection.model_fields.keys() - {"method", "quantize", "quantize_skip"}


_SETTINGS = _add_settings()


class VisionSection(Section):
    """The encoder of images, if any, and how it is trained; see `core.model.config`."""

    encoder: str | None = None
    params: dict[str, int | float] | None = None
    stage: Literal[1, 2] = 2
    cache_features: bool = False
    reference_trainables: bool = False

    @model_validator(mode="after")
    def _is_known(self) -> "VisionSection":
        try:
            vision = self.resolved()
        except UserError as error:
            raise ValueError(error.message + (f": {error.hint}" if error.hint else "")) from None
        if vision is None and (self.params is not None or self.cache_features or self.reference_trainables):
            raise ValueError("without vision.encoder there is nothing else to say of vision")
        if self.cache_features and vision is not None and vision.trains_encoder:
            raise ValueError(f"cache_features is for encoders that are frozen, and {self.encoder} trains")
        return self

    def resolved(self) -> Vision | None:
        """The kind of vision with its sizes."""
        return None if self.encoder is None else vision_of(self.encoder, self.params)

    def training(self) -> VisionTraining:
        """How vision is trained."""
        return VisionTraining(self.stage, self.reference_trainables)


class SourceSection(Section):
    """A file, glob, folder, downloaded name or address; a fixed random `ratio` of its items is kept, and each of these
    is used `weight` times in an epoch; of a fraction, which ones are is drawn for each epoch. `train_on` last: only the
    last reply of a dialogue is trained."""

    path: str
    format: Literal["auto", "single_turn", "dialogue", "single_turn_llava", "text"] = "auto"
    template: str = "auto"
    ratio: float = Field(default=1.0, gt=0, le=1)
    weight: float = Field(default=1.0, gt=0, le=1000)
    root: str | None = None
    train_on: Literal["all", "last"] = "all"
    reasoning: Literal["keep", "drop"] = "keep"


class ValidationSection(Section):
    """Held-out data: a fraction of the items or a file; evaluated every N steps (0 = each epoch) and at the end."""

    fraction: float = Field(default=0.0, ge=0, lt=1)
    path: str | None = None
    every_steps: int = Field(default=0, ge=0, le=_STEPS)

    @model_validator(mode="after")
    def _one_of_both(self) -> "ValidationSection":
        if self.fraction and self.path is not None:
            raise ValueError("give validation.fraction or validation.path, not both")
        return self


class ImagesSection(Section):
    """How pictures become squares of pixels, for training; held-out ones are padded, as for generation."""

    transform: Literal["random_resized_crop", "center_crop", "pad_to_square"] = "random_resized_crop"
    max_pixels: int = Field(default=100_000_000, ge=1, le=2**32)
    workers: int | None = Field(default=None, ge=1, le=1024)


class DataSection(Section):
    """What is learned. Longer examples are cut, and counted; items with errors stop the run, or are skipped."""

    sources: list[SourceSection] = Field(min_length=1)
    max_tokens: int = Field(default=2048, ge=2, le=_LENGTH)
    on_error: Literal["stop", "skip"] = "stop"
    validation: ValidationSection = ValidationSection()
    images: ImagesSection = ImagesSection()


class OptimizerSection(Section):
    """AdamW with a linear warm-up and a cosine to `min_lr`."""

    lr: float = Field(ge=0)
    min_lr: float = Field(default=0.0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[_Beta, _Beta] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0, le=1)
    clip_grad_norm: float = Field(default=2.0, gt=0)

    @model_validator(mode="after")
    def _falling(self) -> "OptimizerSection":
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr ({self.min_lr}) must not be above lr ({self.lr})")
        return self


class TrainSection(Section):
    """How it is learned. `global_batch_size` examples make an optimizer step, whatever the number of processes;
    `batch_size` and `micro_batch_tokens` bound a micro-batch, and with it the memory; "auto", here and of
    `activation_checkpointing`, is what fills a GPU: see `core.memory.guard`. With `stream_base` the frozen matrices of
    the blocks stay in their files; "auto": where they have to. The sample prompts, a list or a file of them, are
    answered every N steps (0 = each epoch), at the beginning and at the end."""

    epochs: float = Field(default=3, gt=0, le=1_000_000)
    warmup_epochs: float = Field(default=0.0, ge=0)
    global_batch_size: int = Field(default=256, ge=1, le=2**31)
    batch_size: _Count | _Auto = _BATCH_SIZE
    micro_batch_tokens: _Count | _Auto | None = None
    precision: Literal["bf16", "fp32"] = "bf16"
    activation_checkpointing: bool | _Auto = True
    stream_base: bool | _Auto = "auto"
    compile: bool = False
    shuffle: bool = True
    seed: int = Field(default=0, ge=0, lt=2**32)
    max_steps: int | None = Field(default=None, ge=1, le=_STEPS)
    early_stopping_patience: int | None = Field(default=None, ge=1, le=_STEPS)
    deterministic: bool = False
    sample_prompts: list[str] | str | None = None
    sample_every_steps: int = Field(default=0, ge=0, le=_STEPS)
    sample_max_new_tokens: int = Field(default=128, ge=1, le=_LENGTH)
    trackers: list[Tracker] = ["tensorboard"]

    @model_validator(mode="after")
    def _warm_up_ends(self) -> "TrainSection":
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs ({self.warmup_epochs:g}) must be below epochs ({self.epochs:g})")
        return self

    @property
    def has_auto(self) -> bool:
        """Whether something is left to be chosen."""
        return "auto" in (self.batch_size, self.micro_batch_tokens, self.activation_checkpointing)

    def bounds(self) -> tuple[int, int | None]:
        """The most examples and the most tokens of a micro-batch; None: as many as there are. "auto" counts as on a
        CPU."""
        tokens = None if self.micro_batch_tokens == "auto" else self.micro_batch_tokens
        if self.batch_size != "auto":
            return self.batch_size, tokens
        return (_BATCH_SIZE if tokens is None else self.global_batch_size), tokens

    def as_in(self, other: "TrainSection") -> "TrainSection":
        """A copy with the other's values in place of "auto"."""
        keys = ("batch_size", "micro_batch_tokens", "activation_checkpointing")
        return self.model_copy(update={key: getattr(other, key) for key in keys if getattr(self, key) == "auto"})

    def without_auto(self, tokens: int | None = None, recompute: bool = True) -> "TrainSection":
        """A copy with these in place of "auto"; without them, what "auto" is on a CPU."""
        chosen = self.model_copy()
        if chosen.micro_batch_tokens == "auto":
            chosen.micro_batch_tokens = tokens
        if chosen.activation_checkpointing == "auto":
            chosen.activation_checkpointing = recompute or self.stream_base is True
        chosen.batch_size, _ = chosen.bounds()
        return chosen


class ParallelSection(Section):
    """How the work is split over processes: ddp keeps all of it, sdp shards gradients and optimizer state, fsdp
    parameters too."""

    model_parallel_size: int = Field(default=1, ge=1, le=1024)
    data_parallel: Literal["ddp", "sdp", "fsdp"] = "sdp"
    accumulate_unsharded: bool = False


class CheckpointSection(Section):
    """When to save, in what type, and how many folders to keep (0 = all). The end of a run always saves."""

    every_epochs: int = Field(default=1, ge=0, le=_STEPS)
    every_steps: int = Field(default=0, ge=0, le=_STEPS)
    keep: int = Field(default=3, ge=0, le=_STEPS)
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    asynchronous: bool = True
    trainable_only: bool = False


class Recipe(Section):
    """A whole run. `Recipe.load("lima", ["train.epochs=1"])` gives a shipped one, changed."""

    name: str
    description: str = ""
    model: ModelSection
    tuning: TuningSection = TuningSection()
    vision: VisionSection = VisionSection()
    data: DataSection
    optimizer: OptimizerSection
    train: TrainSection = TrainSection()
    parallel: ParallelSection = ParallelSection()
    checkpoint: CheckpointSection = CheckpointSection()
    _folder: Path | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _sections_go_together(self) -> "Recipe":
        method, encoder, quantize = self.tuning.method, self.vision.encoder, self.tuning.quantize
        if quantize != "none" and not self.checkpoint.trainable_only:
            raise ValueError(f"tuning.quantize={quantize} saves only what trains: set checkpoint.trainable_only=true")
        if method == "frozen" and encoder is None:
            raise ValueError("method frozen trains only what vision adds: set vision.encoder")
        if method == "frozen" and self.vision.reference_trainables:
            raise ValueError("vision.reference_trainables is for the methods that LLaMA2-Accessory has, not for frozen")
        if self.train.stream_base is True and (why := self.why_resident()) is not None:
            raise ValueError(f"train.stream_base=true: {why}")
        if encoder is not None and (encoder == "clip") != (method == "adapter"):
            raise ValueError(f"vision.encoder clip and tuning.method adapter go together, not {encoder} and {method}")
        if self.train.early_stopping_patience is not None:
            if not self.data.validation.fraction and self.data.validation.path is None:
                raise ValueError(
                    "train.early_stopping_patience counts validations: set data.validation.fraction or .path"
                )
            if self.checkpoint.keep == 1:
                raise ValueError("early stopping keeps the best checkpoint beside the newest: set checkpoint.keep=2")
        if self.vision.cache_features and self.data.images.transform == "random_resized_crop":
            raise ValueError(
                "vision.cache_features keeps one result for each image, and data.images.transform random_resized_crop "
                "makes another in each epoch: set data.images.transform=pad_to_square"
            )
        return self

    @property
    def has_frozen(self) -> bool:
        """Whether a run has weights that do not train."""
        vision = self.vision.resolved()
        return self.tuning.method != "full" or (vision is not None and not vision.trains_encoder)

    def why_resident(self) -> str | None:
        """Why the frozen blocks cannot be streamed from their files, whatever lies in these; None: they can."""
        problems = {
            "method full trains all: choose another tuning.method": METHODS[self.tuning.method].trains_all,
            "blocks are recomputed: set train.activation_checkpointing=true": self.train.activation_checkpointing
            is False,
            "blocks are not compiled: set train.compile=false": self.train.compile,
            "only what trains is saved: set checkpoint.trainable_only=true": not self.checkpoint.trainable_only,
            "it is for a single process: set parallel.model_parallel_size=1": self.parallel.model_parallel_size > 1,
        }
        return next((problem for problem, is_there in problems.items() if is_there), None)

    @classmethod
    def load(cls, source: str | Path, overrides: Sequence[str] = ()) -> "Recipe":
        """Reads a shipped recipe by name, or a YAML file, and applies `key=value` overrides."""
        path = find_recipe(source)
        values = read_yaml(path, _Loader)
        if not isinstance(values, dict):
            raise UserError(f"recipe {path} must be a mapping with keys such as model, data and train")
        recipe = cls.from_mapping(values, overrides, where=str(source))
        recipe._folder = None if path.parent == RECIPES_FOLDER else path.parent.absolute()
        return recipe

    @property
    def folder(self) -> Path | None:
        """Where relative paths are looked for first: beside the recipe's file; None: it has none of its own."""
        return self._folder

    @classmethod
    def from_mapping(cls, values: dict[str, Any], overrides: Sequence[str] = (), where: str = "recipe") -> "Recipe":
        """Checks a mapping, after applying `key=value` overrides to it."""
        try:
            return cls.model_validate(_overridden(values, overrides))
        except ValidationError as error:
            raise UserError(f"recipe {where} is not valid:\n{listed(schema_problems(error, _suggestion))}") from None

    def to_yaml(self) -> str:
        """The recipe with every key resolved."""
        values = self.model_dump(mode="json")
        return yaml.dump(values, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)


def recipe_names() -> list[str]:
    """Names of the shipped recipes, sorted."""
    return sorted(path.stem for path in RECIPES_FOLDER.glob("*.yaml"))


def find_recipe(source: str | Path) -> Path:
    """The file of a shipped recipe's name, or of a path."""
    shipped = RECIPES_FOLDER / f"{source}.yaml"
    if shipped.is_file() and re.fullmatch(r"[\w.-]+", str(source)):
        return shipped
    path = Path(source)
    if path.exists() and not path.is_dir():
        return path
    if path.suffix in {".yaml", ".yml"} or len(path.parts) > 1:
        raise UserError(f"recipe file {source} does not exist", "`llama-acc recipes` lists the shipped ones")
    hint = did_you_mean(str(source), recipe_names())
    raise UserError(f"unknown recipe '{source}'" + (f": {hint}" if hint else ""), "`llama-acc recipes` lists them all")


def known_keys(section: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """Every dotted key of the schema."""
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += known_keys(field.annotation, f"{prefix}{name}.")
    return keys + (known_keys(SourceSection, "data.sources.") if section is Recipe else [])


def _suggestion(key: str) -> str:
    """What an unknown key may have been meant to be, as a question."""
    source = re.match(r"data\.sources\.\d+\.", key)
    known = [name.replace("data.sources.", source[0] if source else "data.sources.") for name in known_keys()]
    homes = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    # The right name in the wrong section, or a wrong name.
    return f"did you mean {' or '.join(map(repr, homes))}?" if homes else did_you_mean(key, known)


class _Loader(yaml.SafeLoader):
    """Reads 1e-5 as a number, as YAML 1.2 and everybody does; PyYAML alone wants 1.0e-5. Of a key that is there twice
    PyYAML takes the last; YAML has no such mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set[str]()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key '{key.value}' is there twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Puts quotes around a text that `_Loader` would read as a number."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def _overridden(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `values` with each `a.b.c=VALUE` set; VALUE is read as YAML, list items are addressed by number."""
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
        except (LookupError, ValueError, TypeError):
            problems.append(f"'{override}': there is no key '{key}'")
    if problems:
        raise UserError(f"these overrides cannot be applied:\n{listed(problems)}")
    return values


def _assign(values: Any, keys: list[str], value: Any) -> None:
    key: Any = int(keys[0]) if isinstance(values, list) else keys[0]
    if len(keys) == 1:
        values[key] = value
        return
    if isinstance(values, dict) and values.get(key) is None:
        values[key] = {}  # a section the file leaves out; a wrong name is found by the schema
    _assign(values[key], keys[1:], value)
