"""One checkpoint layout into another, a few megabytes at a time, and read back to be sure.

`convert` reads any layout at any model-parallel size (see shards.py), so there is one way through: the whole parameters
are known as parts of mapped files; every file to be made takes its share of each of them, in turn, tensor by tensor.
The new folder appears when all of it was read back and compared, or not at all.
"""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from llama_acc.core.checkpoint.companions import companions, special_ids
from llama_acc.core.checkpoint.computed import (
    Quantiser,
    Source,
    deinterleaved,
    difference,
    read_block,
    rounded,
)
from llama_acc.core.checkpoint.files import check_checkpoint, whole_folder
from llama_acc.core.checkpoint.fingerprint import BASE_FILE, base_fingerprint, base_of, check_base, trained_on
from llama_acc.core.checkpoint.huggingface import INDEX_FILE, huggingface_config, huggingface_name, rotated_heads
from llama_acc.core.checkpoint.layout import Layout, inspect, locate, read_config
from llama_acc.core.checkpoint.merge import MERGE_TOLERANCE, MergeError, merge_error, merged_source
from llama_acc.core.checkpoint.parts import Part, blocks_of
from llama_acc.core.checkpoint.peft_files import PEFT_FILE, check_peft, peft_config, peft_name
from llama_acc.core.checkpoint.quantised import QUANTIZATION_FILE, Quantization
from llama_acc.core.checkpoint.save import free_bytes
from llama_acc.core.checkpoint.shards import Weights, check_tensors, open_checkpoint, open_safetensors, read_weights
from llama_acc.core.checkpoint.tensor_files import (
    Spec,
    lay_out_pth,
    lay_out_safetensors,
    pth_offsets,
    safetensors_offsets,
    seal_pth,
    write_at,
)
from llama_acc.core.errors import RunError, UserError, listed
from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.sharding import check_divides, local_shape, split_dimension
from llama_acc.core.model.tuning import FULL, Tuning, merged_tuning
from llama_acc.core.tokenizer import CONFIG_FILE, SENTENCEPIECE_FILE

Target = Literal["meta", "consolidated", "hf", "peft"]
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Progress = Callable[[str, int, int], None]
"""What is being done, bytes done, bytes in all."""


@dataclass(frozen=True)
class Request:
    """What is to be converted.

    Attributes:
        source: a checkpoint folder.
        target: the folder to make; absent, or empty.
        to: its layout.
        model_parallel_size: number of shards; None = as many as the source has, 1 from Hugging Face.
        dtype: bf16, fp16 or fp32; None = each tensor keeps its type.
        base: a checkpoint that goes below the source (a diff, or one that holds only some tensors).
        diff: write the difference of source and base instead.
        merge: merge LoRA pairs into their matrices.
        merge_into: of a source that was trained on a quantised base: the matrices as they were trained on, or the
            original ones.
        quantize: write the matrices in NF4.
        quantize_output: with `quantize`, the output matrix, too.
        file_bytes: most bytes of tensors in one safetensors file.
    """

    source: str | Path
    target: Path
    to: Target
    model_parallel_size: int | None = None
    dtype: str | None = None
    base: str | Path | None = None
    diff: bool = False
    merge: bool = False
    merge_into: Literal["trained", "original"] = "trained"
    quantize: Literal["nf4"] | None = None
    quantize_output: bool = True
    file_bytes: int = 5 * 10**9


@dataclass(frozen=True)
class Converted:
    """What was made.

    Attributes:
        folder: where it is.
        tensors: number of parameters.
        files: number of files with weights.
        bytes: size of the tensors.
        largest_error: of a diff: the largest difference of base + diff and the source; else None.
        merge_error: of a merge; else None.
    """

    folder: Path
    tensors: int
    files: int
    bytes: int
    largest_error: float | None
    merge_error: MergeError | None = None


@dataclass(frozen=True)
class _Entry:
    """One tensor of an output file: its name there, what it is made of, its type."""

    parameter: str
    name: str
    source: Source
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.source.shape).numel() * self.dtype.itemsize


class _File(NamedTuple):
    """An output file that was laid out, open for writing."""

    descriptor: int
    offsets: Mapping[str, int]

    def write(self, entry: _Entry) -> None:
        offset = self.offsets[entry.name]
        for start, stop in blocks_of(entry.source.shape):
            block = read_block(entry.source, start, stop, entry.dtype)
            write_at(self.descriptor, offset, block)
            offset += block.nbytes


class _Conversion:
    """A request whose input was found and checked.

    Attributes:
        layouts: what is converted, from left to right.
        tuned: the shape of that.
        config: the shape of what is made.
        meant: what is to be written, by Meta's names.
        dtypes: in which type.
        files: the files to be made, with their tensors.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        source = inspect(locate(str(request.source)))
        base = None if request.base is None else inspect(locate(str(request.base)))
        if source.is_diff and base is None:
            raise UserError(
                f"{source.folder} is a diff checkpoint: it is added to its base", "give that with --base DIR"
            )
        self.base = read_weights([base]) if request.diff and base is not None else None
        self.layouts = [source] if request.diff or base is None else [base, source]
        self.weights = read_weights(self.layouts)
        self.tuned = _config(self.layouts, self.weights)
        # What was trained alone is converted as that, unless its base is given.
        self.is_part = base is None and (source.folder / BASE_FILE).is_file()
        _check_tuned(request, self.tuned, self.is_part, source.folder)
        if not self.is_part:
            check_base(self.layouts, self.tuned)
        self.config = replace(self.tuned, tuning=merged_tuning(self.tuned.tuning)) if request.merge else self.tuned
        for layout in [*self.layouts, *([base] if base else [])]:
            check_checkpoint(layout.folder, verify=False)
        shapes = self.tuned.parameter_shapes()
        if self.is_part:
            shapes = {name: shape for name, shape in shapes.items() if self.tuned.tuning.trains(name)}
        check_tensors(self.weights, shapes, source.folder)
        if self.base is not None and base is not None:
            check_tensors(self.base, self.config.parameter_shapes(), base.folder)
        self.size = _size(request, source, self.config)
        self.quantiser = Quantiser()
        self.sources = self._sources()
        self.meant = self._meant()
        self.dtypes = _dtypes(request, self.weights, list(self.meant))
        self.tied = request.to == "hf" and self._is_tied()
        self.quantised = set(self.config.quantisable(request.quantize_output) if request.quantize else [])
        self.files = dict(self._single_files() if request.to in ("hf", "peft") else self._shards())

    def _is_tied(self) -> bool:
        """Whether the output matrix is the embedding, to the bit, in the file to be made."""
        output, embedding = self.meant["output.weight"], self.meant["tok_embeddings.weight"]
        dtype = self.dtypes["output.weight"]
        return dtype == self.dtypes["tok_embeddings.weight"] and _same(output, embedding, dtype)

    def _sources(self) -> dict[str, Source]:
        """The parameters as they were trained: where on a quantised base, its matrices are those after quantising."""
        sources: dict[str, Source] = dict(self.weights.tensors)
        quantised = trained_on(self.layouts[-1].folder)
        if self.request.merge and quantised is not None and self.request.merge_into == "trained":
            for name in self.tuned.quantisable(quantised["output"]):
                sources[name] = self.quantiser.rounded(name, self.weights.tensors[name])
        return sources

    def _meant(self) -> dict[str, Source]:
        names = [name for name in self.config.parameter_shapes() if not self.is_part or name in self.weights.tensors]
        if self.request.to == "peft":
            names = [name for name in names if self.config.tuning.trains(name)]
        if self.base is not None:
            return {name: difference(self.sources[name], self.base.tensors[name]) for name in names}
        return {name: merged_source(name, self.sources) if self.request.merge else self.sources[name] for name in names}

    def _shards(self) -> Iterator[tuple[str, list[_Entry]]]:
        for rank in range(self.size):
            name = f"consolidated.{rank:02d}"
            if self.request.to == "consolidated":
                name += f"-of-{self.size:02d}.model" + ("-diff" if self.request.diff else "")
            yield f"{name}.pth", [entry for parameter in self.meant for entry in self._shares(parameter, rank)]

    def _shares(self, parameter: str, rank: int) -> Iterator[_Entry]:
        whole, dimension = self.meant[parameter], split_dimension(parameter)
        prefix = "llma." if self.request.to == "consolidated" else ""
        if parameter in self.quantised:
            matrix = parameter.removesuffix(".weight")
            for leaf, (source, dtype) in self.quantiser.tensors(parameter, self.weights.tensors[parameter]).items():
                yield _Entry(parameter, f"{prefix}{matrix}.{leaf}", source, dtype)
            return
        if dimension is not None:
            length = local_shape(parameter, whole.shape, self.size)[dimension]
            whole = whole.narrow(dimension, rank * length, (rank + 1) * length)
        yield _Entry(parameter, prefix + parameter, whole, self.dtypes[parameter])

    def _single_files(self) -> Iterator[tuple[str, list[_Entry]]]:
        """Hugging Face's, or PEFT's one file."""
        files: list[list[_Entry]] = [[]]
        for parameter in self.meant:
            if self.tied and parameter == "output.weight":
                continue
            source, heads = self.meant[parameter], rotated_heads(parameter, self.config)
            source = source if heads is None else deinterleaved(source, heads)
            name = peft_name(parameter) if self.request.to == "peft" else huggingface_name(parameter)
            entry = _Entry(parameter, name, source, self.dtypes[parameter])
            if files[-1] and sum(other.nbytes for other in files[-1]) + entry.nbytes > self.request.file_bytes:
                files.append([])
            files[-1].append(entry)
        for place, entries in enumerate(files, 1):
            numbered = f"model-{place:05d}-of-{len(files):05d}.safetensors"
            name = PEFT_FILE if self.request.to == "peft" else "model.safetensors"
            yield name if len(files) == 1 else numbered, entries

    def nbytes(self) -> int:
        """Size of the tensors to be written."""
        return sum(entry.nbytes for entries in self.files.values() for entry in entries)

    def write(self, folder: Path, progress: Callable[[int], None]) -> None:
        """Writes the files with weights: all shares of a parameter, then the next parameter."""
        with contextlib.ExitStack() as stack:
            files = {name: stack.enter_context(self._open(folder / name, held)) for name, held in self.files.items()}
            waiting = {name: list(entries) for name, entries in self.files.items()}
            for parameter in self.meant:
                for name, entries in waiting.items():
                    while entries and entries[0].parameter == parameter:
                        entry = entries.pop(0)
                        files[name].write(entry)
                        progress(entry.nbytes)
        if self.request.to not in ("hf", "peft"):
            for name in self.files:
                seal_pth(folder / name)

    @contextlib.contextmanager
    def _open(self, path: Path, entries: list[_Entry]) -> Iterator["_File"]:
        specs = {entry.name: Spec(entry.source.shape, entry.dtype) for entry in entries}
        if self.request.to in ("hf", "peft"):
            lay_out_safetensors(path, specs)
            offsets = safetensors_offsets(path)
        else:
            lay_out_pth(path, specs, flat=self.request.to == "meta")
            offsets = pth_offsets(path, specs)
        descriptor = os.open(path, os.O_WRONLY)
        try:
            yield _File(descriptor, offsets)
        finally:
            os.close(descriptor)

    def describe(self, folder: Path) -> None:
        """Writes what says the shape, and what belongs to a checkpoint besides."""
        for path in companions(self.layouts):
            (folder / path.name).write_bytes(path.read_bytes())
        if self.request.to == "peft":
            _write_json(folder / "adapter_config.json", peft_config(self.config.tuning, self._base_name()))
            return
        if self.request.to == "hf":
            dtype = str(self.dtypes["output.weight"]).removeprefix("torch.")
            config = huggingface_config(self.config, dtype, self.tied, special_ids(self.layouts))
            _write_json(folder / "config.json", config)
            if (folder / SENTENCEPIECE_FILE).exists() and not (folder / CONFIG_FILE).exists():
                # Without it transformers 5 leaves BOS out and splits the first word otherwise.
                _write_json(folder / CONFIG_FILE, {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True})
            if len(self.files) > 1:
                places = {entry.name: name for name, entries in self.files.items() for entry in entries}
                _write_json(folder / INDEX_FILE, {"metadata": {"total_size": self.nbytes()}, "weight_map": places})
            return
        name = "params.json" if self.request.to == "meta" else "config.json"
        _write_json(folder / name, self.config.to_params())
        if self.request.to == "consolidated":
            _write_json(folder / "meta.json", {"llama_type": self.config.tuning.llama_type})
        if self.is_part:
            (folder / BASE_FILE).write_bytes((self.layouts[-1].folder / BASE_FILE).read_bytes())
        if self.request.quantize:
            told = Quantization(self.request.quantize_output, base_fingerprint(self.layouts, self.config))
            (folder / QUANTIZATION_FILE).write_bytes(told.to_json())

    def _base_name(self) -> str:
        if self.request.base is not None:
            return str(self.request.base)
        known = base_of(self.layouts[-1].folder)
        return known[0] if known else ""

    def read_back(self, folder: Path, progress: Callable[[int], None]) -> float | None:
        """Compares what is in the folder with what was meant, bit by bit; of a diff, the largest error of base + diff.

        Raises:
            RunError: they differ.
        """
        if self.request.to == "peft":
            self._read_back_peft(folder, progress)
            return None
        layout = inspect(folder)
        written = open_checkpoint(layout)
        config = read_config([layout]) if not layout.is_diff else self.config
        if config is None or not _same_model(config, self.config) or written.tensors.keys() != self.meant.keys():
            raise RunError(f"what was written to {self.request.target} does not describe the model it was made from")
        errors, problems = [], []
        for name, meant in self.meant.items():
            back = written.tensors[name]
            if name in self.quantised:
                meant = self.quantiser.rounded(name, self.weights.tensors[name])
            if not _same(back, meant, self.dtypes[name]):
                problems.append(f"{name} is not what was written")
            elif self.dtypes[name] == torch.float16 and _overflows(back):
                problems.append(f"{name} has values above 65504, too large for fp16: choose --dtype bf16")
            if self.base is not None:
                errors.append(self._error(name, back))
            progress(back.nbytes)
        if problems:
            raise RunError(f"read back from the disk:\n{listed(problems)}")
        return max(errors) if errors else None

    def _read_back_peft(self, folder: Path, progress: Callable[[int], None]) -> None:
        written = open_safetensors(folder / PEFT_FILE).tensors
        (entries,) = self.files.values()
        if written.keys() != {entry.name for entry in entries}:
            raise RunError(f"what was written to {self.request.target} is not what was meant")
        for entry in entries:
            if not _same(Part.of(written[entry.name]), entry.source, entry.dtype):
                raise RunError(f"read back from the disk: {entry.name} is not what was written")
            progress(entry.nbytes)

    def compare(self) -> MergeError:
        """Compares the logits of what was made with those of what it was made from.

        Raises:
            RunError: a block computes something else.
        """
        saved = {name: rounded(source, self.dtypes[name]) for name, source in self.meant.items()}
        error = merge_error((self.tuned, self.sources), (self.config, self.meant), (self.config, saved))
        if not error.block <= MERGE_TOLERANCE:
            raise RunError(
                f"the merged model computes something else: a block is off by {error.block:.3g} of the largest value"
            )
        return error

    def _error(self, name: str, diff: Part) -> float:
        assert self.base is not None
        restored, wanted = self.base.tensors[name].plus(diff), self.weights.tensors[name]
        return max(
            (read_block(restored, *rows, torch.float32) - read_block(wanted, *rows, torch.float32)).abs_().max().item()
            for rows in blocks_of(wanted.shape)
        )


def convert(request: Request, progress: Progress = lambda what, done, total: None) -> Converted:
    """Converts a checkpoint.

    Args:
        request: what into what.
        progress: told now and then.

    Raises:
        UserError: the request or the checkpoint is at fault; nothing was written.
        RunError: what was written is not what was meant; nothing is left of it.
    """
    _check_request(request)
    conversion = _Conversion(request)
    total = conversion.nbytes()
    _check_disk(request.target, total)
    done = 0

    def told(what: str) -> Callable[[int], None]:
        def tell(count: int) -> None:
            nonlocal done
            done += count
            progress(what, min(done, 2 * total), 2 * total)

        return tell

    with whole_folder(request.target) as folder:
        conversion.write(folder, told("writing"))
        conversion.describe(folder)
        error = conversion.read_back(folder, told("reading back"))
        merge_error = None
        if request.merge:
            progress("comparing logits", 2 * total, 2 * total)
            merge_error = conversion.compare()
        progress("taking checksums", 2 * total, 2 * total)
    return Converted(request.target, len(conversion.meant), len(conversion.files), total, error, merge_error)


def _check_request(request: Request) -> None:
    target = request.target
    if request.diff and request.base is None:
        raise UserError("a difference has two sides: --diff needs --base DIR", "give the checkpoint to subtract")
    if request.diff and request.to != "consolidated":
        raise UserError(f"there are no diffs in the layout '{request.to}'", "use --to consolidated")
    if request.to == "hf" and request.model_parallel_size not in (None, 1):
        raise UserError(
            "Hugging Face's files are not split by model parallelism", "leave --model-parallel-size out with --to hf"
        )
    if request.quantize and (request.to != "consolidated" or request.diff or request.merge):
        raise UserError(
            "matrices in NF4 are written with --to consolidated, and neither of a diff nor of a merge",
            "merge first, then quantise what that gave",
        )
    if request.quantize and request.model_parallel_size not in (None, 1):
        raise UserError("a quantised checkpoint is not split", "leave --model-parallel-size out: it is read at any")
    if request.merge and request.diff:
        raise UserError("--merge and --diff do not go together", "merge first, then take the difference")
    if request.to == "peft" and (request.merge or request.model_parallel_size not in (None, 1)):
        raise UserError("an adapter is neither merged nor split", "leave --merge and --model-parallel-size out")
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file", "give a folder that is not there yet")
    if target.resolve() in {Path(path).resolve() for path in (request.source, request.base) if path is not None}:
        raise UserError(f"{target} is what is to be converted", "give another folder")
    if target.is_dir() and any(target.iterdir()):
        raise UserError(f"{target} is not empty", "give a folder that is not there yet")


def _config(layouts: Sequence[Layout], weights: Weights) -> ModelConfig:
    config = read_config(layouts)
    if config is None:
        raise UserError(f"{layouts[-1].folder} has no params.json or config.json: the model's shape is not known")
    # Meta's files say -1; what the embedding has is the vocabulary.
    rows = weights.shapes.get("tok_embeddings.weight", (config.vocab_size,))[0]
    return config.with_vocabulary(rows)


def _check_tuned(request: Request, config: ModelConfig, is_part: bool, folder: Path) -> None:
    """Refuses what a method cannot become.

    Raises:
        UserError: saying what it can.
    """
    tuning = config.tuning
    if request.to == "peft":
        check_peft(tuning)
        return
    if request.merge:
        left = merged_tuning(tuning)
        if tuning == FULL:
            raise UserError(f"{folder} has nothing to merge: no method added anything", "leave --merge out")
        if is_part:
            base = " and ".join(base_of(folder)) or "its base"
            raise UserError(f"{folder} holds only what was trained on top of {base}", f"give that: --base {base}")
        if left != FULL and request.to == "meta":
            raise UserError(
                f"{folder} has biases (method {tuning.method}), and Meta's layout has no place for them",
                "use --to hf or --to consolidated",
            )
        return
    if tuning != FULL and (request.to == "meta" or (request.to == "hf" and tuning != Tuning("bias_norm"))):
        hint = "keep it with --to consolidated" + ("" if tuning.what.prefix else ", or merge it with --merge")
        raise UserError(
            f"{folder} was tuned with method {tuning.method}, which layout '{request.to}' has no place for", hint
        )
    if is_part and request.to != "consolidated":
        base = " and ".join(base_of(folder)) or "its base"
        raise UserError(f"{folder} holds only what was trained on top of {base}", f"give that: --base {base}")


def _size(request: Request, source: Layout, config: ModelConfig) -> int:
    if request.to in ("hf", "peft"):
        return 1
    size = 1 if request.quantize else request.model_parallel_size or source.model_parallel_size
    check_divides(config, size)
    return size


def _dtypes(request: Request, weights: Weights, names: Sequence[str]) -> dict[str, torch.dtype]:
    """In which type each parameter is written."""
    if request.dtype is not None:
        return dict.fromkeys(names, TYPES[request.dtype])
    dtypes = {name: weights.tensors[name].dtype for name in names}
    strange = [f"{name} holds {dtype}" for name, dtype in dtypes.items() if dtype not in TYPES.values()]
    if strange:
        raise UserError(f"types that cannot be written:\n{listed(strange)}", f"choose one: --dtype {'|'.join(TYPES)}")
    return dtypes


def _check_disk(target: Path, needed: int) -> None:
    needed += 64 << 20  # tokenizer, heads of files
    free = free_bytes(target)
    if needed > free:
        raise UserError(
            f"too little disk: {target} takes {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free",
            "free some, or give a folder on another disk",
        )


def _same(one: Source, other: Source, dtype: torch.dtype) -> bool:
    """Whether two sources are the same in a type, compared as whole numbers: so NaN is NaN, and 0 is not -0."""
    whole = torch.int32 if dtype.itemsize == 4 else torch.int16
    return all(
        torch.equal(read_block(one, *rows, dtype).view(whole), read_block(other, *rows, dtype).view(whole))
        for rows in blocks_of(one.shape)
    )


def _overflows(part: Part) -> bool:
    return any(read_block(part, *rows, part.dtype).isinf().any().item() for rows in blocks_of(part.shape))


def _same_model(one: ModelConfig, other: ModelConfig) -> bool:
    """Whether two shapes compute the same; a width can be said in several ways, and a factor is rounded."""
    scalings = [1.0 if config.rope_scaling is None else config.rope_scaling for config in (one, other)]
    plain = [
        replace(config, n_kv_heads=config.kv_heads, multiple_of=config.hidden_dim, ffn_dim_multiplier=None)
        for config in (one, other)
    ]
    return (
        one.parameter_shapes() == other.parameter_shapes()
        and replace(plain[0], rope_scaling=None) == replace(plain[1], rope_scaling=None)
        and math.isclose(*scalings, rel_tol=1e-12)
    )


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
