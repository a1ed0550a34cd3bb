"""One checkpoint layout into another, a few megabytes at a time, and read back to be sure.

`convert` reads any layout at any model-parallel size (see load.py), so there is one way through: the parameters are
lazy tensors; every file to be made takes its share of each of them, in turn, tensor by tensor. The new folder appears
when all of it was read back and compared, or not at all.
"""

import contextlib
import json
import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from llama_acc.core.atomic import check_checkpoint, whole_folder
from llama_acc.core.checkpoint.adapter import (
    BASE_FILE,
    base_fingerprint,
    check_base,
    check_same_base,
    is_adapter_only,
    missing_base_error,
    read_base,
)
from llama_acc.core.checkpoint.huggingface import INDEX_FILE, huggingface_config, huggingface_name, rotated_heads
from llama_acc.core.checkpoint.layout import Layout, inspect, locate, read_config, says_context
from llama_acc.core.checkpoint.lazy import LazyTensor, add, blocks_of, reorder_heads, rounded, same_values, subtract
from llama_acc.core.checkpoint.load import (
    Weights,
    check_tensors,
    main_dtype,
    open_checkpoint,
    open_safetensors,
    read_weights,
    share_of,
    with_rows,
)
from llama_acc.core.checkpoint.merge import MERGE_TOLERANCE, MergeError, merge_error, merged
from llama_acc.core.checkpoint.peft import PEFT_FILE, peft_config, peft_name
from llama_acc.core.checkpoint.quantized import QUANTIZATION_FILE, Quantization, Quantizer
from llama_acc.core.checkpoint.save import free_bytes
from llama_acc.core.checkpoint.tensor_files import Spec, TensorFile, lay_out
from llama_acc.core.checkpoint.tokenizer_files import extra_files, special_ids, tokenizer_of, write_tokenizer
from llama_acc.core.errors import RunError, UserError, listed
from llama_acc.core.model.config import VISION_FILE, ModelConfig, check_divides
from llama_acc.core.model.transformer import describe, quantizable, shapes_of
from llama_acc.core.model.tuning import FULL
from llama_acc.core.model.tuning.bias_norm import BiasNorm
from llama_acc.core.text import size_text

Target = Literal["meta", "consolidated", "hf", "peft"]
Progress = Callable[[str, int, int], None]
"""What is being done, bytes done, bytes in all."""
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


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
        merge_into: of a source that was trained on a quantized base: the matrices as they were trained on, or the
            original ones.
        quantize: write the matrices in NF4.
        quantize_skip: with `quantize`, matrices to leave unchanged; see `transformer.quantizable`.
        context: longest sequence that the description of what is made says; None = the source's.
        file_bytes: most bytes of tensors in one safetensors file of Hugging Face's layout.
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
    quantize_skip: Sequence[str] = ()
    context: int | None = None
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
        notes: what the user should know of the source or of the result.
    """

    folder: Path
    tensors: int
    files: int
    bytes: int
    largest_error: float | None
    merge_error: MergeError | None = None
    notes: tuple[str, ...] = ()


def convert(request: Request, progress: Progress = lambda label, done, total: None) -> Converted:
    """Converts a checkpoint.

    Args:
        request: what into what.
        progress: called with what is being done, bytes done, bytes in all.

    Raises:
        UserError: the request or the checkpoint is at fault; nothing was written.
        RunError: what was written is not what was meant; nothing is left of it.
    """
    _check_request(request)
    work = _Conversion(request)
    needed, free = work.nbytes + (64 << 20), free_bytes(request.target)  # tokenizer, heads of files
    if needed > free:
        raise UserError(
            f"too little disk: {request.target} takes {size_text(needed)}, {size_text(free)} are free",
            "free some, or give a folder on another disk",
        )
    done, total = 0, 2 * work.nbytes

    def counting(label: str) -> Callable[[int], None]:
        def count(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            progress(label, min(done, total), total)

        return count

    with whole_folder(request.target) as folder:
        work.write_weights(folder, counting("writing"))
        work.write_description(folder)
        error = work.verify(folder, counting("reading back"))
        compared = None
        if request.merge:
            progress("comparing logits", total, total)
            compared = work.compare_merged()
        progress("taking checksums", total, total)
    return Converted(
        request.target, len(work.targets), len(work.files), work.nbytes, error, compared, tuple(work.notes)
    )


def _check_request(request: Request) -> None:
    """Refuses what does not go together, before anything is looked at.

    Raises:
        UserError: saying what does not, and what to do.
    """
    is_split, to, target = request.model_parallel_size not in (None, 1), request.to, request.target
    if request.diff and request.base is None:
        raise UserError("a difference has two sides: --diff needs --base DIR", "give the checkpoint to subtract")
    if request.diff and to != "consolidated":
        raise UserError(f"there are no diffs in the layout '{to}'", "use --to consolidated")
    if request.diff and request.merge:
        raise UserError("--merge and --diff do not go together", "merge first, then take the difference")
    if to in ("hf", "peft") and is_split:
        raise UserError(
            f"files of the layout '{to}' are not split by model parallelism",
            f"leave --model-parallel-size out with --to {to}",
        )
    if to == "peft" and (request.merge or request.context is not None):
        flag, reason = ("--merge", "is not merged") if request.merge else ("--context", "has the context of its base")
        raise UserError(f"an adapter {reason}", f"leave {flag} out with --to peft")
    if request.quantize and (to != "consolidated" or request.diff or request.merge):
        raise UserError(
            "matrices in NF4 are written with --to consolidated, and neither of a diff nor of a merge",
            "merge first, then quantize what that gave",
        )
    if request.quantize and is_split:
        raise UserError("a quantized checkpoint is not split", "leave --model-parallel-size out: it is read at any")
    if request.quantize_skip and not request.quantize:
        raise UserError("--quantize-skip is about what is not quantized", "add --quantize nf4, or leave it out")
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file", "give a folder that is not there yet")
    if target.resolve() in {Path(path).resolve() for path in (request.source, request.base) if path is not None}:
        raise UserError(f"{target} is what is to be converted", "give another folder")
    if target.is_dir() and any(target.iterdir()):
        raise UserError(f"{target} is not empty", "give a folder that is not there yet")


@dataclass(frozen=True)
class _Inputs:
    """What a conversion starts from: checkpoints that were found and checked against one another.

    Attributes:
        layouts: what is converted, laid over each other from left to right; the last is the one asked for.
        weights: theirs.
        config: their shape, with what a tuning method added.
        is_alone: it is an adapter checkpoint without its base, and converted as that.
        subtracted: the weights to subtract, for a diff; else None.
    """

    layouts: list[Layout]
    weights: Weights
    config: ModelConfig
    is_alone: bool
    subtracted: Weights | None


def _inputs(request: Request) -> _Inputs:
    """Finds what is to be converted and checks it; nothing but headers and samples is read.

    Raises:
        UserError: a checkpoint that is missing or damaged, does not fit the other one, or cannot become what is wanted.
    """
    source = inspect(locate(str(request.source)))
    base = None if request.base is None else inspect(locate(str(request.base)))
    if source.is_diff and base is None:
        raise UserError(f"{source.folder} is a diff checkpoint: it is added to its base", "give that with --base DIR")
    layouts = [source] if request.diff or base is None else [base, source]
    weights, config = read_weights(layouts), read_config(layouts)
    if config is None:
        raise UserError(f"{source.folder} has no params.json or config.json: the model's shape is not known")
    config = with_rows(config, weights)
    is_adapter = is_adapter_only(source)
    is_alone = is_adapter and base is None
    _check_tuned(request, config, is_alone, source)
    if not is_alone:
        check_base(layouts, config)
    if base is not None and not (is_adapter or config.tuning == FULL or request.diff or source.is_diff):
        check_same_base(source, weights, base, config)
    for layout in [source, *([base] if base else [])]:
        check_checkpoint(layout.folder, verify=False)
    shapes = shapes_of(config)
    if is_alone:
        # What vision has of its own depends on the stage: it is what is there.
        own = {name for name, one in describe(config).items() if one.trains and one.part != "vision"}
        own |= set() if config.vision is None else weights.tensors.keys()
        shapes = {name: shape for name, shape in shapes.items() if name in own}
    check_tensors(weights, shapes, source.folder)
    subtracted = None
    if base is not None and request.diff:
        subtracted = read_weights([base])
        check_tensors(subtracted, shapes_of(config), base.folder)
    return _Inputs(layouts, weights, config, is_alone, subtracted)


def _check_tuned(request: Request, config: ModelConfig, is_alone: bool, source: Layout) -> None:
    """Refuses what a method cannot become.

    Raises:
        UserError: saying what it can.
    """
    tuning, folder = config.tuning, source.folder
    if config.vision is not None and request.to != "consolidated":
        raise UserError(
            f"{folder} has a vision encoder ({config.vision.encoder}), which layout '{request.to}' has no place for",
            "keep it with --to consolidated",
        )
    if request.to == "peft":
        tuning.peft_config()  # raises where PEFT has no such method
    elif request.merge:
        left = tuning.merged()
        if tuning == FULL:
            raise UserError(f"{folder} has nothing to merge: no method added anything", "leave --merge out")
        if is_alone:
            raise missing_base_error(source, "--base")
        if left != FULL and request.to == "meta":
            raise UserError(
                f"{folder} has biases (method {tuning.method}), and Meta's layout has no place for them",
                "use --to hf or --to consolidated",
            )
    elif tuning != FULL and (request.to == "meta" or (request.to == "hf" and not isinstance(tuning, BiasNorm))):
        hint = "keep it with --to consolidated" + (", or merge it with --merge" if tuning.can_merge else "")
        raise UserError(
            f"{folder} was tuned with method {tuning.method}, which layout '{request.to}' has no place for", hint
        )
    elif is_alone and request.to != "consolidated":
        raise missing_base_error(source, "--base")


class _Entry(NamedTuple):
    """One tensor of an output file: the parameter (Meta's name) it belongs to, its own name, values and type."""

    parameter: str
    name: str
    tensor: LazyTensor
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.tensor.numel() * self.dtype.itemsize


class _Conversion:
    """The files of a conversion, what each tensor is made of, and their writing.

    Attributes:
        inputs: what it starts from.
        config: the shape of what is made.
        sources: the parameters it starts from, as they were trained.
        targets: what is to be written, by Meta's names.
        dtypes: in which type.
        quantized: the names of those to be written in NF4.
        dtype: the type of most of what is written.
        notes: what the user should know of the source or of the result.
        tied: the output matrix is the embedding, and is not written.
        files: the files to be made, with their tensors.
        nbytes: size of the tensors to be written.
    """

    def __init__(self, request: Request) -> None:
        """Raises:
        UserError: inputs at fault, a size that does not divide the model, or types that cannot be written.
        """
        self.request, self.inputs = request, _inputs(request)
        inputs, tuned, weights = self.inputs, self.inputs.config, self.inputs.weights
        self.source = inputs.layouts[-1]
        if request.context is not None:
            tuned = replace(tuned, max_seq_len=request.context)
        self.config = replace(tuned, tuning=tuned.tuning.merged()) if request.merge else tuned
        self.size = 1
        if request.to not in ("hf", "peft"):
            if not request.quantize:
                self.size = request.model_parallel_size or self.source.model_parallel_size
            check_divides(self.config, self.size)
        self.quantized = set(quantizable(self.config, request.quantize_skip) if request.quantize else [])
        self.quantizer = Quantizer()
        self.sources = self._sources()
        self.targets = self._targets()
        self.dtypes = _dtypes(request, weights, list(self.targets))
        self.notes = weights.notes + ([] if inputs.subtracted is None else inputs.subtracted.notes)
        self.dtype, more = main_dtype(self.targets, self.dtypes)
        if request.to == "hf":
            self.notes += more
        if request.to != "peft" and request.context is None and not says_context(inputs.layouts):
            context = self.config.max_seq_len
            self.notes.append(f"{self.source.folder} does not say its context: {context} is written (--context N)")
        self.tied = request.to == "hf" and self._is_tied()
        self.files = dict(self._single_files() if request.to in ("hf", "peft") else self._shards())
        self.nbytes = sum(entry.nbytes for entries in self.files.values() for entry in entries)

    def _sources(self) -> dict[str, LazyTensor]:
        """The parameters as they were trained: where on a quantized base, its matrices are those after quantizing."""
        tensors, base = self.inputs.weights.tensors, read_base(self.source.folder)
        if not (self.request.merge and base and base.quantised and self.request.merge_into == "trained"):
            return dict(tensors)
        names = quantizable(self.inputs.config, base.quantised.skip)
        return tensors | {name: self.quantizer.rounded(name, tensors[name]) for name in names}

    def _targets(self) -> dict[str, LazyTensor]:
        inputs, request = self.inputs, self.request
        names = list(shapes_of(self.config))
        if inputs.is_alone:
            names = [name for name in names if name in inputs.weights.tensors]
        if request.to == "peft":
            names = [name for name in names if describe(self.config)[name].trains]
        if inputs.subtracted is not None:
            return {name: subtract(self.sources[name], inputs.subtracted.tensors[name]) for name in names}
        return {
            name: merged(name, self.sources, inputs.config.tuning) if request.merge else self.sources[name]
            for name in names
        }

    def _is_tied(self) -> bool:
        """Whether the output matrix is the embedding, to the bit, in the file to be made."""
        dtype = self.dtypes["output.weight"]
        return dtype == self.dtypes["tok_embeddings.weight"] and same_values(
            self.targets["output.weight"], self.targets["tok_embeddings.weight"], dtype
        )

    def _shards(self) -> Iterator[tuple[str, list[_Entry]]]:
        for rank in range(self.size):
            name = f"consolidated.{rank:02d}"
            if self.request.to == "consolidated":
                name += f"-of-{self.size:02d}.model" + ("-diff" if self.request.diff else "")
            yield f"{name}.pth", [entry for parameter in self.targets for entry in self._shares(parameter, rank)]

    def _shares(self, parameter: str, rank: int) -> Iterator[_Entry]:
        prefix = "llma." if self.request.to == "consolidated" else ""
        if parameter in self.quantized:
            matrix = prefix + parameter.removesuffix(".weight")
            for leaf, tensor in self.quantizer.tensors(parameter, self.inputs.weights.tensors[parameter]).items():
                yield _Entry(parameter, f"{matrix}.{leaf}", tensor, tensor.dtype)
            return
        share = share_of(parameter, self.targets[parameter], rank, self.size)
        yield _Entry(parameter, prefix + parameter, share, self.dtypes[parameter])

    def _single_files(self) -> Iterator[tuple[str, list[_Entry]]]:
        """Hugging Face's, of which each is kept small, or PEFT's, of which there is one whatever its size."""
        is_peft = self.request.to == "peft"
        files: list[list[_Entry]] = [[]]
        for parameter, tensor in self.targets.items():
            if self.tied and parameter == "output.weight":
                continue
            heads = rotated_heads(parameter, self.config)
            tensor = tensor if heads is None else reorder_heads(tensor, heads, to_meta=False)
            name = peft_name(parameter, self.config.tuning) if is_peft else huggingface_name(parameter)
            entry = _Entry(parameter, name, tensor, self.dtypes[parameter])
            size = sum(other.nbytes for other in files[-1]) + entry.nbytes
            if files[-1] and not is_peft and size > self.request.file_bytes:
                files.append([])
            files[-1].append(entry)
        for place, entries in enumerate(files, 1):
            name = PEFT_FILE if is_peft else "model.safetensors"
            yield name if len(files) == 1 else f"model-{place:05d}-of-{len(files):05d}.safetensors", entries

    def write_weights(self, folder: Path, progress: Callable[[int], None]) -> None:
        """Writes the files with weights: all shares of a parameter, then the next parameter."""
        with contextlib.ExitStack() as stack:
            files = []
            for name, entries in self.files.items():
                specs = {entry.name: Spec(entry.tensor.shape, entry.dtype) for entry in entries}
                lay_out(folder / name, specs, flat=self.request.to == "meta")
                file = stack.enter_context(contextlib.closing(TensorFile(folder / name, specs)))
                files.append((file, list(entries)))
            for parameter in self.targets:
                for file, waiting in files:
                    while waiting and waiting[0].parameter == parameter:
                        entry = waiting.pop(0)
                        for start, stop in blocks_of(entry.tensor.shape):
                            file.write(entry.name, entry.tensor.rows(start, stop).to(entry.dtype), start)
                        progress(entry.nbytes)
            for file, _ in files:
                file.seal()

    def write_description(self, folder: Path) -> None:
        """Writes what says the shape, and what belongs to a checkpoint besides."""
        request, layouts = self.request, self.inputs.layouts
        for path in extra_files(layouts):
            (folder / path.name).write_bytes(path.read_bytes())
        tokenizer = tokenizer_of(layouts)
        for name, data in {} if tokenizer is None else tokenizer.files().items():
            (folder / name).write_bytes(data)
        ids = special_ids(layouts, tokenizer)
        if request.to in ("hf", "peft") and tokenizer is not None:
            self.notes.extend(write_tokenizer(tokenizer, folder, ids))
        if request.to == "peft":
            _write_json(folder / "adapter_config.json", peft_config(self.config.tuning, self._peft_base()))
        elif request.to == "hf":
            dtype = str(self.dtype).removeprefix("torch.")
            _write_json(folder / "config.json", huggingface_config(self.config, dtype, self.tied, ids))
            if len(self.files) > 1:
                places = {entry.name: name for name, entries in self.files.items() for entry in entries}
                _write_json(folder / INDEX_FILE, {"metadata": {"total_size": self.nbytes}, "weight_map": places})
        else:
            self._describe_shards(folder)

    def _describe_shards(self, folder: Path) -> None:
        request, base = self.request, self.source.folder / BASE_FILE
        _write_json(folder / ("params.json" if request.to == "meta" else "config.json"), self.config.to_params())
        if request.to == "consolidated":
            _write_json(folder / "meta.json", {"llama_type": self.config.llama_type})
            if self.config.vision is not None:
                (folder / VISION_FILE).write_bytes(self.config.vision.to_json())
        if self.inputs.is_alone and base.is_file():
            (folder / BASE_FILE).write_bytes(base.read_bytes())
        if request.quantize:
            origin = base_fingerprint(self.inputs.layouts, self.config)
            (folder / QUANTIZATION_FILE).write_bytes(Quantization(tuple(request.quantize_skip), origin).to_json())

    def _peft_base(self) -> str | None:
        """The folder of the base if PEFT can load it: it is Hugging Face's; else None, and a note on what to do."""
        known = read_base(self.source.folder)
        given = None if self.request.base is None else [str(self.request.base)]
        bases = given or (list(known.pretrained) if known else [])
        if len(bases) == 1:
            with contextlib.suppress(UserError):  # it was moved, or it is on another machine
                base = inspect(locate(bases[0]))
                if base.format == "huggingface":
                    return str(base.folder.resolve())
        base_name = shlex.quote(bases[0]) if len(bases) == 1 else "BASE"
        self.notes.append(
            "adapter_config.json names no base, as PEFT loads Hugging Face's models only: make one with llama-acc "
            f"convert-checkpoint {base_name} NEW --to hf and give it with --base NEW, or write its name into that file"
        )
        return None

    def verify(self, folder: Path, progress: Callable[[int], None]) -> float | None:
        """Compares what is in the folder with what was meant, bit by bit; of a diff, the largest error of base + diff.

        Raises:
            RunError: they differ.
        """
        written, subtracted = self._read_back(folder), self.inputs.subtracted
        errors, problems = [], []
        for name, dtype in self.dtypes.items():
            back, expected = written[name], self.targets[name]
            if name in self.quantized:
                expected = self.quantizer.rounded(name, self.inputs.weights.tensors[name])
            if back.shape != expected.shape or not same_values(back, expected, dtype):
                problems.append(f"{name} is not what was written")
            elif dtype == torch.float16 and _largest(back) == math.inf:
                problems.append(f"{name} has values above 65504, too large for fp16: choose --dtype bf16")
            if subtracted is not None:
                restored = add(subtracted.tensors[name], back)
                errors.append(_largest(subtract(restored, self.inputs.weights.tensors[name])))
            progress(back.nbytes)
        if problems:
            raise RunError(f"read back from the disk:\n{listed(problems)}")
        return max(errors) if errors else None

    def _read_back(self, folder: Path) -> dict[str, LazyTensor]:
        """The parameters in the folder, by Meta's names, read as any checkpoint is.

        Raises:
            RunError: they are others, or of another shape of model.
        """
        if self.request.to == "peft":
            written = open_safetensors(folder / PEFT_FILE)
            ours = {peft_name(name, self.config.tuning): name for name in self.targets}
            found = {ours.get(theirs, theirs): tensor for theirs, tensor in written.items()}
            for name, tensor in found.items():
                if heads := rotated_heads(name, self.config):
                    found[name] = reorder_heads(tensor, heads, to_meta=True)
            described = True
        else:
            layout = inspect(folder)
            found = open_checkpoint(layout).tensors
            config = None if layout.is_diff else read_config([layout])
            described = layout.is_diff or (config is not None and _same_model(config, self.config))
        if not described or found.keys() != self.targets.keys():
            raise RunError(f"what was written to {self.request.target} does not describe the model it was made from")
        return found

    def compare_merged(self) -> MergeError:
        """Compares what was merged with what it was merged from.

        Raises:
            RunError: a block computes something else.
        """
        saved = {name: rounded(tensor, self.dtypes[name]) for name, tensor in self.targets.items()}
        error = merge_error((self.inputs.config, self.sources), (self.config, self.targets), (self.config, saved))
        if not error.block <= MERGE_TOLERANCE:
            raise RunError(
                f"the merged model computes something else: a block is off by {error.block:.3g} of the largest value"
            )
        return error


def _dtypes(request: Request, weights: Weights, names: Sequence[str]) -> dict[str, torch.dtype]:
    """In which type each parameter is written."""
    if request.dtype is not None:
        return dict.fromkeys(names, _DTYPES[request.dtype])
    dtypes = {name: weights.tensors[name].dtype for name in names}
    strange = [f"{name} holds {dtype}" for name, dtype in dtypes.items() if dtype not in _DTYPES.values()]
    if strange:
        hint = f"choose one: --dtype {'|'.join(_DTYPES)}"
        raise UserError(f"types that cannot be written:\n{listed(strange)}", hint)
    return dtypes


def _largest(tensor: LazyTensor) -> float:
    """The largest magnitude; NaN counts as 0."""
    blocks = (tensor.rows(*rows).to(torch.float32).abs_() for rows in blocks_of(tensor.shape))
    return max(block.nan_to_num_(nan=0.0, posinf=math.inf).max().item() for block in blocks)


def _same_model(one: ModelConfig, other: ModelConfig) -> bool:
    """Whether two shapes compute the same; a width can be said in several ways, and a factor is rounded."""
    scalings = [1.0 if config.rope_scaling is None else config.rope_scaling for config in (one, other)]
    plain = [
        replace(
            config,
            n_kv_heads=config.kv_heads,
            multiple_of=config.hidden_dim,
            ffn_dim_multiplier=None,
            rope_scaling=None,
        )
        for config in (one, other)
    ]
    return shapes_of(one) == shapes_of(other) and plain[0] == plain[1] and math.isclose(*scalings, rel_tol=1e-12)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
