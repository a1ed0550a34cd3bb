"""Reading weights: shards are memory-mapped, checked as a whole, and read tensor by tensor, only what a rank needs."""

import pickle
import re
import warnings
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from llama_acc.core.checkpoint.huggingface import from_open_clip, meta_name, read_huggingface, rotated_heads, tower_name
from llama_acc.core.checkpoint.layout import PEFT_CONFIG, Layout, check_order, read_config, shape_notes
from llama_acc.core.checkpoint.lazy import LazyTensor, add, concatenate, reorder_heads, same_values
from llama_acc.core.checkpoint.quantized import NF4Matrix, each_on_all_cores, read_quantization, take_quantized, to_nf4
from llama_acc.core.distributed.groups import local_part
from llama_acc.core.errors import UserError, listed
from llama_acc.core.input_files import read_object
from llama_acc.core.model.config import ModelConfig, config_from_params, read_params
from llama_acc.core.model.layers import Linear
from llama_acc.core.model.transformer import Transformer, split_dimension, store_quantized
from llama_acc.core.model.vision_config import ClipVision

_FLOATS = ("float32", "bfloat16", "float16", "float64")
_BUFFERS = ("rope.freqs", ".position_ids")  # in others' files; they follow from the shape
Shard = dict[str, LazyTensor]
"""The tensors of one file by name."""


@dataclass
class Weights:
    """A rank's share of every parameter, by Meta's names."""

    tensors: Shard = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # the shapes of the whole parameters
    # What does not fit together among the files, by parameter; see `check_tensors`.
    problems: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # where the files disagree and which of them counts, for the user

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> "Weights":
        """Tensors in memory."""
        lazy = {name: LazyTensor.of(tensor) for name, tensor in tensors.items()}
        return Weights(lazy, {name: tensor.shape for name, tensor in lazy.items()})

    def filter_names(self, names: Container[str]) -> None:
        """Drops all others."""
        for kept in (self.tensors, self.shapes, self.problems):
            for name in [name for name in kept if name not in names]:
                del kept[name]

    def overlay(self, other: "Weights") -> "Weights":
        """These with those of another over them."""
        return Weights(
            self.tensors | other.tensors,
            self.shapes | other.shapes,
            self.problems | other.problems,
            self.notes + other.notes,
        )


# Files


def open_shard(path: object) -> Shard:
    """The tensors of a file by the names they have in it, memory-mapped: nothing is read until it is used.

    Accepts safetensors; of a .pth file a flat mapping (Meta) or `{"model": mapping}` with or without the prefix `llma.`
    (consolidated).
    """
    if str(path).endswith(".safetensors"):
        return open_safetensors(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError, KeyError) as error:
        if code := re.search(r"GLOBAL ([\w.]+)", str(error)):
            message = f"{path} is refused: it holds Python code besides tensors ({code[1]})"
            raise UserError(message, "none of it was run") from None
        raise _unreadable(path, error) from None
    tensors = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(tensors, Mapping) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"{path} is not a checkpoint: a mapping from names to tensors is expected")
    named = {str(name).removeprefix("llma."): tensor.detach() for name, tensor in tensors.items()}
    strange = [
        f"{name} ({_type_name(tensor.layout)}, {_type_name(tensor.dtype)}, {tensor.device})"
        for name, tensor in named.items()
        if tensor.is_meta or tensor.is_nested or tensor.is_quantized or tensor.layout != torch.strided
    ]
    if strange:
        raise UserError(f"{path} holds tensors that are no weights:\n{listed(strange)}", "save them as dense tensors")
    shard = {name: LazyTensor.of(tensor, True) for name, tensor in named.items() if not name.endswith(_BUFFERS)}
    return from_open_clip(shard, ClipVision.tower_prefix)  # beside a LLaMA, CLIP may have open_clip's names


def open_safetensors(path: object) -> Shard:
    """The tensors of a safetensors file by the names they have in it, memory-mapped."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
            # Asked twice, a mapped file gives the same memory. Only what is mapped may have its pages let go.
            is_mapped = all(tensors[name].data_ptr() == file.get_tensor(name).data_ptr() for name in names[:1])
    except (SafetensorError, RuntimeError, ValueError, OSError) as error:
        raise _unreadable(path, error) from None
    return {name: LazyTensor.of(tensor, is_mapped) for name, tensor in tensors.items()}


def _unreadable(path: object, error: Exception) -> UserError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    hint = "the file may be cut short: copy it again"
    is_not_zip = "mmap can only be used" in reason
    if is_not_zip and _begins(path, pickle.PROTO):
        reason, hint = "it was saved before torch 1.6", "load it and save it again with torch.load and torch.save"
    elif is_not_zip or isinstance(error, pickle.UnpicklingError):  # whose words advise to run whatever is in it
        reason = "it is no file of tensors"
    return UserError(f"cannot read {path}: {reason}", hint)


def _begins(path: object, mark: bytes) -> bool:
    with open(str(path), "rb") as file:
        return file.read(len(mark)) == mark


# Checkpoints


def read_weights(layouts: Sequence[Layout], rank: int = 0, size: int = 1) -> Weights:
    """A rank's share of all tensors of the checkpoints, from left to right; nothing is read until it is used.

    A later checkpoint overrides the tensors it has, a diff is added to them. `size` is the model-parallel size to read
    at; that of the checkpoints is any that divides it or is divided by it.
    """
    check_order(layouts)
    for layout in layouts:
        own = layout.model_parallel_size
        if own % size and size % own:
            raise UserError(
                f"{layout.folder} has model-parallel size {own}, which cannot be read at size {size}: "
                "one of the two must be a multiple of the other",
                f"choose a size that divides {own} or is a multiple of it",
            )
    weights = Weights(notes=shape_notes(layouts))
    for place, layout in enumerate(layouts):
        whole = open_checkpoint(layout)
        if layout.format == "peft":
            _on_base(whole, layout, layouts[:place])
        weights.problems |= whole.problems
        weights.notes += whole.notes
        for name, tensor in whole.tensors.items():
            shape, base = list(tensor.shape), weights.tensors.get(name)
            if layout.is_diff and base is None:
                text = f"unknown: {name} {shape} is in the diff {layout.folder}, in no checkpoint before it"
                weights.problems[name] = text
            elif layout.is_diff and weights.shapes[name] != tensor.shape:
                before = list(weights.shapes[name])
                weights.problems[name] = f"shape: {name} is {shape} in the diff {layout.folder}, {before} before it"
            dimension = split_dimension(name)
            if size > 1 and dimension is not None and any(n % size for n in tensor.shape[dimension : dimension + 1]):
                weights.problems.setdefault(name, f"shape: {name} {shape} cannot be split in {size}")
            share = share_of(name, tensor, rank, size)
            if layout.is_diff and base is not None:
                if isinstance(base.source, NF4Matrix):
                    raise UserError("a diff cannot be added to a quantized checkpoint", "give the base it was made of")
                share = add(base, share)
            weights.tensors[name], weights.shapes[name] = share, tensor.shape
    return weights


def share_of(name: str, tensor: LazyTensor, rank: int, size: int) -> LazyTensor:
    """A model-parallel rank's share of a whole parameter, or of what is kept for one under a name that ends so."""
    dimension = split_dimension(name)
    if dimension is None or size == 1 or len(tensor.shape) <= dimension:
        return tensor
    length = tensor.shape[dimension] // size
    return tensor.narrow(dimension, rank * length, (rank + 1) * length)


def open_checkpoint(layout: Layout) -> Weights:
    """The whole parameters of one checkpoint, whatever its format and model-parallel size; a diff's are differences."""
    if layout.format == "peft":
        from llama_acc.core.checkpoint.peft import read_peft

        weights = Weights(read_peft(layout)[1])
    elif layout.format != "huggingface":
        weights = _open_consolidated(layout)
    elif layout.tower is None:
        weights = _open_huggingface(layout)
    else:
        weights = Weights(notes=list(layout.notes))
        for _, shard in _huggingface_shards(layout, weights.notes):
            named = {tower_name(layout.tower, theirs): tensor for theirs, tensor in from_open_clip(shard).items()}
            weights.tensors |= {name: tensor for name, tensor in named.items() if name is not None}
    weights.shapes = {name: tensor.shape for name, tensor in weights.tensors.items()}
    return weights


def _on_base(adapter: Weights, layout: Layout, bases: Sequence[Layout]) -> None:
    """Makes of an adapter of PEFT what it is on its base: rows of queries and keys in Meta's order, biases of `lora_B`
    added to the base's, and an output matrix that stays as it was where a tied embedding was trained alone."""
    from llama_acc.core.checkpoint.peft import peft_notes, refusal

    config = read_config(bases)
    if config is None:
        raise UserError(f"{layout.folder} goes on a base, the shape of which is not known", "give config.json with it")
    layers = config.n_layers
    pairs = Counter(name.split(".")[-3] for name in adapter.tensors if name.endswith(".lora_a.weight"))
    if some := [f"LoRA pairs of {pair} in {n} of {layers} layers" for pair, n in pairs.items() if n < layers]:
        raise refusal(layout, some)
    said, below = read_object(layout.folder / PEFT_CONFIG), read_weights(bases).tensors
    for name, tensor in adapter.tensors.items():
        if (heads := rotated_heads(name, config)) and tensor.shape[0] % (2 * heads) == 0:
            adapter.tensors[name] = tensor = reorder_heads(tensor, heads, to_meta=True)
        if said.get("lora_bias") and name.endswith(".bias") and name in below:
            adapter.tensors[name] = add(below[name], tensor)
    copied = {str(name).rpartition(".")[2] for name in said.get("modules_to_save") or ()}
    is_apart = "embed_tokens" in copied and not said.get("ensure_weight_tying")
    if is_apart and "output.weight" not in {**adapter.tensors, **below} and "tok_embeddings.weight" in below:
        adapter.tensors["output.weight"] = below["tok_embeddings.weight"]
    adapter.notes += peft_notes(layout, bases)


def _open_consolidated(layout: Layout) -> Weights:
    shards, weights = [open_shard(path) for path in layout.shards], Weights()
    quantization = read_quantization(layout.folder)
    if quantization is not None:
        if len(shards) > 1:
            raise UserError(f"{layout.folder} is quantized and split, which is not known", "quantize it in one part")
        weights.tensors, weights.problems = take_quantized(shards[0], quantization)
    for name in dict.fromkeys(name for shard in shards for name in shard):
        kinds: dict[str, list[str]] = {}
        for shard, path in zip(shards, layout.shards, strict=True):
            tensor = shard.get(name)
            kind = "missing" if tensor is None else f"{list(tensor.shape)} {_type_name(tensor.dtype)}"
            kinds.setdefault(kind, []).append(path.name)
        if len(kinds) > 1:
            differing = ", ".join(f"{kind} in {' and '.join(files)}" for kind, files in kinds.items())
            weights.problems[name] = f"shards: {name} is {differing}"
        weights.tensors[name] = join_shards(name, shards)
    if layout.format == "meta_ori" and layout.params_path is not None:
        params = read_params([layout.params_path])
        if params.get("use_scaled_rope") and config_from_params(params).tie_word_embeddings:
            _tie(weights, layout)
    return weights


def join_shards(name: str, shards: Sequence[Shard]) -> LazyTensor:
    """One parameter out of the shards that have it; what is not split is taken from the first."""
    tensors = [shard[name] for shard in shards if name in shard]
    dimension = split_dimension(name)
    if dimension is None or len(tensors) == 1 or any(len(tensor.shape) <= dimension for tensor in tensors):
        return tensors[0]
    return concatenate(tensors, dimension)


def _open_huggingface(layout: Layout) -> Weights:
    assert layout.params_path is not None
    config, values, notes = read_huggingface(layout.params_path)
    weights, found_in = Weights(notes=[*layout.notes, *notes]), dict[str, str]()
    for file, shard in _huggingface_shards(layout, weights.notes):
        for theirs, tensor in shard.items():
            name = meta_name(theirs)
            if name is None:
                continue
            if name in found_in:
                weights.problems[name] = f"twice: {theirs} is in {found_in[name]} and in {file}"
            found_in[name] = file
            heads = rotated_heads(name, config)
            if heads is not None and tensor.shape and tensor.shape[0] % (2 * heads) == 0:
                tensor = reorder_heads(tensor, heads, to_meta=True)
            weights.tensors[name] = tensor
    if values["tie_word_embeddings"]:
        _tie(weights, layout)
    said = values.get("dtype") or values.get("torch_dtype")
    if said in _FLOATS and weights.tensors and said != (own := _type_name(main_dtype(weights.tensors)[0])):
        weights.notes.append(f"{layout.params_path} says {said!r:.40}, most tensors are {own}, which counts")
    return weights


def _huggingface_shards(layout: Layout, notes: list[str]) -> Iterator[tuple[str, Shard]]:
    """Each of Hugging Face's files by its name, without the tensors that the index has in another one; where it decides
    between two files, or does not name a tensor, that is added to the notes."""
    places = layout.weight_map or {}
    unnamed, passed_over = list[str](), list[str]()
    for path in layout.shards:
        shard = open_shard(path)
        elsewhere = {name for name in shard if places.get(name, path.name) != path.name}
        passed_over += [f"{name} of {path.name}: that of {places[name]} counts" for name in sorted(elsewhere)]
        unnamed += [f"{name} of {path.name}" for name in shard if places and name not in places]
        yield path.name, {name: tensor for name, tensor in shard.items() if name not in elsewhere}
    for said, tensors in (
        ("by its index, these tensors are not used", passed_over),
        ("used, though its index does not name them", unnamed),
    ):
        if tensors:
            notes.append(f"{layout.folder}: {said}:\n{listed(tensors, most=5)}")


def _tie(weights: Weights, layout: Layout) -> None:
    """Makes output matrix and embedding one, as transformers does: if they differ in the files, they stay two."""
    head, embedding = (weights.tensors.get(name) for name in ("output.weight", "tok_embeddings.weight"))
    if head is not None and embedding is not None and not same_values(head, embedding, torch.float32):
        weights.notes.append(
            f"by {layout.params_path} output matrix and embedding are one (tie_word_embeddings), but in the files they "
            "differ: both count, as in transformers"
        )
    elif (one := embedding or head) is not None:
        weights.tensors["tok_embeddings.weight"] = one
        weights.tensors.pop("output.weight", None)


# What they are


def with_rows(config: ModelConfig, weights: Weights) -> ModelConfig:
    """The shape with a vocabulary of -1 (Meta's files) replaced by the embedding's number of rows, if that is there; an
    output matrix that is there is not tied to the embedding, whatever the file says.
    """
    if "output.weight" in weights.tensors:
        config = replace(config, tie_word_embeddings=False)
    shape = weights.shapes.get("tok_embeddings.weight")
    if not shape or config.vocab_size > 0:
        return config
    if shape[0] < 1:
        raise UserError("tok_embeddings.weight has no rows: the vocabulary is empty", "copy the checkpoint again")
    return config.with_vocabulary(shape[0])


def main_dtype(
    tensors: Mapping[str, LazyTensor], dtypes: Mapping[str, torch.dtype] | None = None
) -> tuple[torch.dtype, list[str]]:
    """The type of most values of a model, and a note where others lose digits in it; `dtypes` in place of its own."""
    dtypes = dtypes or {name: tensor.dtype for name, tensor in tensors.items()}
    sizes: dict[torch.dtype, int] = {}
    for name, tensor in tensors.items():
        sizes[dtypes[name]] = sizes.get(dtypes[name], 0) + tensor.numel()
    main = max(sizes, key=lambda dtype: sizes[dtype])
    names = [name for name in tensors if torch.promote_types(dtypes[name], main) != main]
    if not names:
        return main, []
    types = " and ".join(sorted({_type_name(dtypes[name]) for name in names}))
    few = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return main, [
        f"most weights are {_type_name(main)}; {len(names)} of {types} are rounded to it ({few}): "
        "llama-acc convert-checkpoint DIR NEW --to consolidated --dtype fp32 makes one that rounds none"
    ]


def _type_name(kind: torch.dtype | torch.layout) -> str:
    return str(kind).removeprefix("torch.")


def check_tensors(weights: Weights, shapes: Mapping[str, tuple[int, ...]], where: object) -> None:
    """Compares names, shapes and types of the whole parameters, over all shards, with what the model needs."""
    problems = [f"missing: {name} {list(shape)}" for name, shape in shapes.items() if name not in weights.tensors]
    problems += weights.problems.values()
    for name, tensor in weights.tensors.items():
        shape = weights.shapes[name]
        if name in weights.problems:
            continue
        if name not in shapes:
            problems.append(f"unknown: {name} {list(shape)}")
        elif shape != shapes[name]:
            problems.append(f"shape: {name} is {list(shape)}, the model needs {list(shapes[name])}")
        elif not tensor.dtype.is_floating_point:
            problems.append(f"type: {name} holds {tensor.dtype}, not numbers with a fraction")
    if problems:
        raise UserError(
            f"the weights in {where} do not fit the model:\n{listed(problems, most=60)}",
            "is params.json (or config.json) the one that came with these weights?",
        )


# Into models


def fill(
    model: nn.Module, weights: Weights, device: torch.device, dtype: torch.dtype, copy: bool, prefix: str = ""
) -> None:
    """Puts weights into a model, or a vision tower, made on the meta device, one tensor at a time; what is no longer
    on it is kept.

    The parameters, which have the shapes of the weights' shares or are to be quantized, are replaced. The weights were
    checked, and their names begin with `prefix`; they are removed as they are used, so their memory is free again.
    With `copy` every parameter has storage of its own. Otherwise a tensor that is already of this type and on this
    device stays mapped to its file: loading costs nothing, but the parameters must not be trained.
    """
    parameters = [(name, parameter) for name, parameter in model.named_parameters() if parameter.is_meta]
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name, _ in parameters}
    matrices = {
        name: owner
        for name, parameter in parameters
        if isinstance(owner := owners[name], Linear) and owner.is_quantized and parameter is owner.weight
    }
    quantize = lambda name: matrices[name].take(*to_nf4(weights.tensors.pop(prefix + name), device))  # noqa: E731
    each_on_all_cores(quantize, matrices, device)
    for name, parameter in parameters:
        if name in matrices:
            continue
        share = weights.tensors.pop(prefix + name)
        value = None if copy else share.in_place(dtype, device)
        value = share.to(dtype, device) if value is None else value
        setattr(owners[name], name.rpartition(".")[2], nn.Parameter(value, requires_grad=parameter.requires_grad))


def load_parameters(model: Transformer, weights: Weights) -> None:
    """Puts weights into the storage a model has, as far as they are there; `weights`, of its rank, are used up."""
    there = {name: local_part(one) for name, one in model.named_parameters() if name in weights.tensors}
    matrices = [name for name, local in there.items() if not local.tensor.is_floating_point()]
    for name, local in there.items():
        if local.tensor.is_floating_point():
            weights.tensors.pop(name).rows(local.rows.start, local.rows.stop).copy_into(local.tensor)
    if matrices:
        device = there[matrices[0]].tensor.device
        quantize = lambda name: store_quantized(model, name, *to_nf4(weights.tensors.pop(name), device))  # noqa: E731
        each_on_all_cores(quantize, matrices, device)
