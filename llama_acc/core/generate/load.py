"""Loading a trained model for generation, or a rank's share of it, with the encoder of its images.

Shapes: I images, S their width and height; input_shape is that of `Vision`.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from llama_acc.core.atomic import check_manifest
from llama_acc.core.checkpoint.adapter import check_base, fingerprint, read_base
from llama_acc.core.checkpoint.huggingface import check_tower
from llama_acc.core.checkpoint.layout import Layout, inspect, locate, read_config, without_towers
from llama_acc.core.checkpoint.load import Weights, check_tensors, fill, main_dtype, read_weights, with_rows
from llama_acc.core.checkpoint.quantized import read_quantization
from llama_acc.core.checkpoint.streaming import BlockStream, stream_blocks
from llama_acc.core.data.chat_template import ChatTemplate, end_note, template_for, template_of_folder
from llama_acc.core.data.images import normalize
from llama_acc.core.data.templates import KINDS, Template
from llama_acc.core.device import pick_device, to_device
from llama_acc.core.distributed.groups import Parallel
from llama_acc.core.errors import UserError
from llama_acc.core.model.config import ModelConfig, check_divides
from llama_acc.core.model.layers import Linear
from llama_acc.core.model.multi_adapter import MultiAdapter
from llama_acc.core.model.transformer import (
    Transformer,
    build_on_meta,
    describe,
    pack_small,
    quantization_notes,
    quantize_on_meta,
    shapes_of,
)
from llama_acc.core.model.vision import Tower, make_tower
from llama_acc.core.model.vision_config import Vision
from llama_acc.core.tokenizer import Tokenizer, find_tokenizer, load_tokenizer

_ALONE = Parallel()


class VisionEncoder:
    """From pixels to a multimodal model's inputs. A frozen tower runs once, on the first rank of a model-parallel
    group; the others get its features from there.
    """

    def __init__(
        self, vision: Vision, tower: Tower | None, dtype: torch.dtype, device: torch.device, parallel: Parallel
    ) -> None:
        self.vision, self.tower = vision, tower  # the kind, and its frozen tower on the ranks that have it
        self.dtype, self.device, self.parallel = dtype, device, parallel
        # Whether this rank needs images' pixels: where the encoder trains, every rank does.
        self.is_leader = vision.trains_encoder or parallel.model_rank == 0

    def fingerprint(self) -> str:
        """SHA-256 of what decides the features of given pixels: the tower's weights, sampled, and the type."""
        assert self.tower is not None
        weights = Weights.of({name: parameter.detach() for name, parameter in self.tower.named_parameters()})
        values = fingerprint(weights, list(weights.tensors))
        return hashlib.sha256(f"{self.vision} {self.dtype} {values}".encode()).hexdigest()

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [I, 3, S, S] of 0 to 255 to [I, *input_shape], on the device; for a rank that `is_leader`."""
        normalized = normalize(to_device(pixels, self.device), self.dtype)
        if self.vision.trains_encoder:
            return normalized
        assert self.tower is not None
        return self.tower(normalized)

    def inputs(self, count: int, make: Callable[[], Tensor]) -> Tensor:
        """The model's inputs for `count` images, [I, *input_shape]: `make` is called on ranks that are leaders."""
        if count and (self.vision.trains_encoder or self.parallel.model_size == 1):
            return make()
        if count and self.is_leader:
            shared = make().contiguous()
        else:
            shared = torch.empty((count, *self.vision.input_shape), dtype=self.dtype, device=self.device)
        if count:
            dist.broadcast(shared, self.parallel.rank - self.parallel.model_rank, group=self.parallel.model_group)
        return shared


def load_vision_encoder(
    model: Transformer, weights: Weights | None, device: torch.device, seed: int = 0, keep_all: bool = False
) -> VisionEncoder | None:
    """The encoder of a model, or None if it is not multimodal.

    The tower's weights are used up; where none of them are given, they are random. With `keep_all`, ranks that do not
    compute with the tower keep it, too, in the host's memory or its file: to save it.
    """
    vision, parallel = model.config.vision, model.parallel
    if vision is None:
        return None
    tower, computes = None, parallel.model_rank == 0
    if not vision.trains_encoder and (computes or keep_all):
        place = device if computes else torch.device("cpu")
        if weights is None or not any(name.startswith(vision.tower_prefix) for name in weights.tensors):
            tower = make_tower(vision, model.dtype, seed)
        else:
            tower = make_tower(vision, model.dtype)
            fill(tower, weights, place, model.dtype, copy=False, prefix=vision.tower_prefix)
        tower.to(place)
    return VisionEncoder(vision, tower, model.dtype, device, parallel)


@dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer and the prompt format it was trained with."""

    model: Transformer  # its parameters may lie in the checkpoint's file; they must not be trained
    tokenizer: Tokenizer
    template: Template
    template_from: str  # where the prompt format came from, for the user
    device: torch.device
    vision_encoder: VisionEncoder | None = None  # encodes images; None = the model takes none
    notes: tuple[str, ...] = ()  # where the checkpoint's files disagree and which of them counts, for the user
    adapter: int = 0  # its number among those that share a base in memory; prompts to it have it, too
    siblings: list["LoadedModel"] = field(default_factory=list, compare=False, repr=False)
    """All of these by that number; none, if it is alone."""
    stream: BlockStream | None = None  # what reads the model's blocks from their files; None = they are in memory

    @property
    def vision(self) -> Vision | None:
        """The kind of vision it has."""
        return self.model.config.vision

    def sibling(self, adapter: int) -> "LoadedModel":
        """The one of this number among those that share its base."""
        return self if adapter == self.adapter else self.siblings[adapter]


def load_model(
    *checkpoints: str | Path,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    tokenizer: str | Path | None = None,
    template: str = "auto",
    verify: bool = False,
    quantize: Literal["nf4", "none"] | None = None,
    context: int | None = None,
    parallel: Parallel = _ALONE,
    stream: bool = False,
) -> LoadedModel:
    """Loads a checkpoint, or a rank's share of it, for generation.

    Args:
        checkpoints: folders, or run folders (their latest checkpoint); a later one overrides an earlier one.
        device: such as "cpu"; None picks CUDA, then MPS, then CPU.
        dtype: type of weights and activations; None = the checkpoint's.
        tokenizer: its file; None = the one beside the checkpoint.
        template: a prompt format's name; "auto" = the one kept in the checkpoint, else its chat template, else none.
        verify: compare the SHA-256 of every file with the manifest.
        quantize: keep the matrices in NF4, or "none" of them; None = as the checkpoint was trained. Those of a
            quantized checkpoint are in any case.
        context: most tokens of prompt and answer; None = the checkpoint's.
        parallel: the ranks that share the model, whatever the size it was saved at.
        stream: leave the matrices of the blocks in their files, of which two are in memory at a time.

    Raises:
        UserError: something is missing, damaged or does not fit.
    """
    opened = _open(checkpoints, dtype, tokenizer, template, verify, quantize, context, parallel)
    target = pick_device(device)
    return _loaded(opened, target, *_build(opened, target, parallel, stream=stream))


def load_models(
    checkpoints: Mapping[str, Sequence[str | Path]],
    device: str | None = None,
    dtype: torch.dtype | None = None,
    tokenizer: str | Path | None = None,
    template: str = "auto",
    verify: bool = False,
    quantize: Literal["nf4", "none"] | None = None,
    context: int | None = None,
    parallel: Parallel = _ALONE,
    stream: bool = False,
) -> dict[str, LoadedModel]:
    """Loads checkpoints of one base, which is in memory once, for one engine: `Engine` of any of them serves all.

    They compute in the first one's type, in its context.

    Args:
        checkpoints: by a name each, folders that are laid over each other. The rest: see `load_model`.

    Raises:
        UserError: what `load_model` raises; several bases; one of several that takes images, or is to be streamed.
    """
    if stream and len(checkpoints) > 1:
        raise UserError("a model is streamed alone", "leave out --stream, or the others")
    opened: dict[str, _Opened] = {}
    for name, folders in checkpoints.items():
        opened[name] = _open(folders, dtype, tokenizer, template, verify, quantize, context, parallel)
        dtype = opened[name].dtype
    names = [_shared_parameters(opened, name) for name in opened] if len(opened) > 1 else []
    target, (first, *others) = pick_device(device), opened.values()
    model, blocks = _build(first, target, parallel, stream=stream)
    if others:
        rest = zip(others, names[1:], strict=True)
        model = MultiAdapter([model, *(_build(one, target, parallel, (model, shared))[0] for one, shared in rest)])
    siblings: list[LoadedModel] = []
    siblings += [
        replace(_loaded(one, target, model, blocks), adapter=adapter, siblings=siblings)
        for adapter, one in enumerate(opened.values())
    ]
    return dict(zip(opened, siblings, strict=True))


@dataclass(frozen=True)
class _Opened:
    """What is known of a checkpoint before its weights are read."""

    config: ModelConfig
    weights: Weights
    tokenizer: Tokenizer
    template: tuple[Template, str]
    dtype: torch.dtype
    quantize_skip: Sequence[str] | None
    notes: tuple[str, ...]


def _open(
    checkpoints: Sequence[str | Path],
    dtype: torch.dtype | None,
    tokenizer: str | Path | None,
    template: str,
    verify: bool,
    quantize: Literal["nf4", "none"] | None,
    context: int | None,
    parallel: Parallel,
) -> _Opened:
    """Checks a checkpoint and what goes with it; see `load_model`."""
    layouts = [inspect(locate(str(checkpoint))) for checkpoint in checkpoints]
    last = (without_towers(layouts) or layouts)[-1].folder
    config = read_config(layouts)
    if config is None:
        raise UserError(f"{last} has no params.json or config.json: the model's shape is not known")
    for layout in layouts:
        check_manifest(layout.folder, verify and parallel.is_main)
    check_base(layouts, config)
    if layouts[-1].format == "peft" and find_tokenizer(last) is None:
        last = layouts[-2].folder  # an adapter often comes without, and then has no prompt format either
    path = find_tokenizer(last) if tokenizer is None else Path(tokenizer)
    if path is None:
        raise UserError(f"there is no tokenizer in {last}", "put tokenizer.model or tokenizer.json beside the weights")
    words = load_tokenizer(path)
    weights = read_weights(layouts, parallel.model_rank, parallel.model_size)
    config = with_rows(config, weights).with_vocabulary(words.vocab_size)
    if context is not None:
        config = replace(config, max_seq_len=context)
    config.check_tokenizer(words.vocab_size, path)
    asked = None if template == "auto" else template_for(template, KINDS[0], words)
    chosen = template_of_folder(last, words) if asked is None else (asked, "asked for")
    check_divides(config, parallel.model_size)
    check_tower(config.vision, weights.tensors, last)
    check_tensors(weights, shapes_of(config), last)
    notes = weights.notes
    if (asked is not None or isinstance(chosen[0], ChatTemplate)) and (note := end_note(chosen[0], words)):
        notes = [*notes, f"{note}: only a model that was trained so ends its answers there"]
    if dtype is None:
        tower = shapes_of(config, "tower")
        dtype, rounded = main_dtype({name: part for name, part in weights.tensors.items() if name not in tower})
        dtype, notes = (dtype, notes + rounded) if dtype == torch.bfloat16 else (torch.float32, notes)
    skip = _quantize_skip(layouts, quantize)
    notes = [*notes, *quantization_notes(config, skip, parallel.model_size)]
    return _Opened(config, weights, words, chosen, dtype, skip, tuple(notes))


def _build(
    opened: _Opened,
    device: torch.device,
    parallel: Parallel,
    shared: tuple[Transformer, Sequence[str]] | None = None,
    stream: bool = False,
) -> tuple[Transformer, BlockStream | None]:
    """A rank's part of a checkpoint's model, and what reads its blocks if it is to `stream`. `shared`: another model,
    and names of parameters that they share."""
    if stream and (parallel.world_size > 1 or device.type == "mps"):
        raise UserError("a model is streamed by a single process, to a GPU of CUDA or a CPU", "leave out --stream")
    model = model_for_generation(opened.config, opened.dtype, parallel, opened.quantize_skip)
    base, names = shared or (model, ())
    for name in names:
        owner, _, leaf = name.rpartition(".")
        own, other = model.get_submodule(owner), base.get_submodule(owner)
        if isinstance(own, Linear) and isinstance(other, Linear) and other.scales is not None and leaf == "weight":
            own.take(other.weight, other.scales)
        else:
            setattr(own, leaf, getattr(other, leaf))
    blocks = stream_blocks(model, opened.weights, device) if stream else None
    fill(model, opened.weights, device, opened.dtype, copy=False)
    return model, blocks


def _loaded(opened: _Opened, device: torch.device, model: Transformer, stream: BlockStream | None) -> LoadedModel:
    if not isinstance(model, MultiAdapter) and stream is None:
        pack_small(model)
    encoder = load_vision_encoder(model, opened.weights, device)
    return LoadedModel(model, opened.tokenizer, *opened.template, device, encoder, opened.notes, stream=stream)


def _shared_parameters(opened: Mapping[str, _Opened], name: str) -> list[str]:
    """Names of what a checkpoint has in common with the first: what did not train in either, and is the same."""
    (first_name, first), own = next(iter(opened.items())), opened[name]
    if own.config.vision is not None:
        raise UserError(f"{name} takes images", "a model that does is served in a process of its own")
    names = sorted(_of_base(first.config) & _of_base(own.config))
    shapes = [replace(one.config.base(), max_seq_len=1) for one in (first, own)]
    if shapes[0] != shapes[1] or fingerprint(first.weights, names) != fingerprint(own.weights, names):
        hint = "models in one process are adapters of the same base: serve others in a process of their own"
        raise UserError(f"{name} has another base than {first_name}", hint)
    if first.quantize_skip != own.quantize_skip:
        message = f"{first_name} and {name} were trained on their base in different types, and it is in memory once"
        raise UserError(message, "choose one for all: --quantize nf4, or none")
    return names


def _of_base(config: ModelConfig) -> set[str]:
    """What is the LLaMA's and, if there is a base, the base's."""
    parameters = describe(config).items()
    trains_all = config.tuning.trains_all
    return {name for name, one in parameters if one.part == "llama" and (trains_all or not one.trains)}


def checkpoint_fingerprint(checkpoints: Sequence[str]) -> str:
    """SHA-256 over names, shapes and sampled values of the weights of checkpoints laid over each other."""
    weights = read_weights([inspect(locate(checkpoint)) for checkpoint in checkpoints])
    return fingerprint(weights, list(weights.tensors))


def model_for_generation(
    config: ModelConfig, dtype: torch.dtype, parallel: Parallel, quantize_skip: Sequence[str] | None
) -> Transformer:
    """A rank's part of a model for generation, without storage, its matrices but these in NF4; None = none is."""
    model = build_on_meta(config, dtype, parallel).requires_grad_(False)
    model.before_blocks = None  # nothing is random
    if quantize_skip is not None:
        quantize_on_meta(model, quantize_skip)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model


def _quantize_skip(layouts: Sequence[Layout], quantize: str | None) -> Sequence[str] | None:
    """The matrices that are not in NF4, as in the base or as it was trained on; None = none is in NF4."""
    if (quantization := read_quantization(layouts[0].folder)) is not None:
        return quantization.skip
    bases = [read_base(layout.folder) for layout in reversed(layouts)]
    trained = [base.quantized for base in bases if base is not None and base.quantized is not None]
    if quantize == "none" or (quantize is None and not trained):
        return None
    return trained[0].skip if trained else ()
