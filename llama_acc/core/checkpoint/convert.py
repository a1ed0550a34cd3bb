"""One checkpoint layout into another, a few megabytes at a time, and read back to be sure.

`convert` reads any layout at any model-parallel size (see load.py), so there is one way through: the parameters are
lazy tensors; every file to be made takes its share of each of them, in turn, tensor by tensor. The new folder appears
when all of it was read back and compared, or not at all.
"""

import contextlib
import gc
import json
import math
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from queue import Queue
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from llama_acc.core.atomic import check_manifest, digests_of_written, sync, whole_folder
from llama_acc.core.catalogue import hub_name
from llama_acc.core.checkpoint.adapter import (
    BASE_FILE,
    base_fingerprint,
    check_base,
    check_same_base,
    is_adapter_only,
    missing_base_error,
    read_base,
)
from llama_acc.core.checkpoint.gguf import GGUFType, gguf_tensors, gguf_values, lay_out_gguf, open_gguf
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
from llama_acc.core.checkpoint.peft import (
    MERGE_TOLERANCE,
    PEFT_FILE,
    MergeError,
    merge_error,
    merged,
    peft_config,
    peft_name,
    peft_tensor,
)
from llama_acc.core.checkpoint.quantized import QUANTIZATION_FILE, Quantization, nf4_rounded, nf4_tensors
from llama_acc.core.checkpoint.save import Specs, TensorFile, TensorSpec, free_bytes, lay_out
from llama_acc.core.checkpoint.tokenizer_files import extra_files, special_ids, tokenizer_of, write_tokenizer
from llama_acc.core.distributed.environment import in_background
from llama_acc.core.errors import RunError, UserError, listed
from llama_acc.core.model.config import ModelConfig, check_divides
from llama_acc.core.model.transformer import describe, quantizable, shapes_of
from llama_acc.core.model.tuning import FULL
from llama_acc.core.model.tuning.bias_norm import BiasNorm
from llama_acc.core.model.vision_config import VISION_FILE
from llama_acc.core.text import size_text
from llama_acc.core.tokenizer import Tokenizer

Target = Literal["meta", "consolidated", "hf", "peft", "gguf"]
Progress = Callable[[str, int, int], None]
"""What is being done, bytes done, bytes in all."""
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Request:
    """What is to be converted."""

    source: str | Path  # a checkpoint folder
    target: Path  # the folder to make; absent, or empty
    to: Target  # its layout
    model_parallel_size: int | None = None  # number of shards; None = as many as the source has, 1 from Hugging Face
    dtype: str | None = None  # bf16, fp16 or fp32; None = each tensor keeps its type
    base: str | Path | None = None  # a checkpoint that goes below the source (a diff, or an adapter checkpoint)
    diff: bool = False  # write the difference of source and base instead
    merge: bool = False  # merge LoRA pairs into their matrices
    merge_into: Literal["trained", "original"] = "trained"
    """Of a source that was trained on a quantized base: the matrices as they were trained on, or the original ones."""
    quantize: Literal["nf4"] | None = None  # write the matrices in NF4
    quantize_skip: Sequence[str] = ()  # with `quantize`, matrices to leave unchanged; see `transformer.quantizable`
    context: int | None = None  # longest sequence that the description of what is made says; None = the source's
    file_bytes: int = 5 * 10**9  # most bytes of tensors in one safetensors file of Hugging Face's layout
    gguf_type: GGUFType | None = None  # of the matrices in GGUF; None = bf16 for a checkpoint in bf16, else f16


class Converted(NamedTuple):
    """What was made: where, the number of parameters, of files with weights, and the size of all tensors.

    Of a diff there is the largest difference of base + diff and the source besides, of a merge its error; `notes` are
    what the user should know of the source or of the result.
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

    def count(label: str, nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(label, min(done, total), total)

    digests: dict[str, str] = {}
    written = Queue[tuple[Path, int] | None]()
    hashed = in_background(lambda: digests_of_written(iter(written.get, None)))
    with contextlib.ExitStack() as stack:
        gc.freeze()  # or every search for garbage while a tokenizer is written goes through all of torch
        stack.callback(gc.unfreeze)
        stack.callback(sys.setswitchinterval, sys.getswitchinterval())
        sys.setswitchinterval(2e-4)  # the thread that hashes waits so long for each turn of the interpreter
        stack.callback(written.put, None)
        folder = stack.enter_context(whole_folder(request.target, digests))
        if not (request.quantize or request.merge):  # which compute; the rest waits for the core that takes checksums
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(max(1, torch.get_num_threads() - 1))
        work.write_weights(folder, written, lambda nbytes: count("writing", nbytes))
        written.put(None)
        synced = in_background(lambda: list(map(sync, (folder / name for name in work.files))))
        work.write_description(folder)
        error = work.verify(folder, lambda nbytes: count("reading back", nbytes))
        compared = None
        if request.merge:
            progress("comparing logits", total, total)
            models = (work.tuned, work.sources), (work.config, work.parameters), (work.config, work.saved)
            compared = merge_error(*models)
            if not compared.exact <= MERGE_TOLERANCE:
                raise RunError(
                    f"the merged model computes something else: logits are off by {compared.exact:.3g} of the largest"
                )
        progress("taking checksums", total, total)
        digests |= hashed.result()
        synced.result()
    notes = tuple(work.notes)
    return Converted(request.target, len(work.targets), len(work.files), work.nbytes, error, compared, notes)


def _check_request(request: Request) -> None:
    """Refuses what does not go together, before anything is looked at.

    Raises:
        UserError: saying what does not, and what to do.
    """
    whole = ("meta", "consolidated", "hf", "gguf")
    options: dict[str, tuple[bool, Sequence[str]]] = {  # whether it is given, and the layouts that it goes with
        "--diff": (request.diff, ("consolidated",)),
        "--model-parallel-size": (request.model_parallel_size not in (None, 1), ("meta", "consolidated")),
        "--merge": (request.merge, whole),
        "--context": (request.context is not None, whole),
        "--quantize": (request.quantize is not None, ("consolidated",)),
        "--dtype": (request.dtype is not None, ("meta", "consolidated", "hf", "peft")),
        "--gguf-type": (request.gguf_type is not None, ("gguf",)),
    }
    for option, (is_given, layouts) in options.items():
        if is_given and request.to not in layouts:
            places = " or ".join(f"--to {layout}" for layout in layouts)
            raise UserError(f"{option} does not go with --to {request.to}", f"leave it out, or use {places}")
    for one, other in (
        ("merge", "diff"),
        ("quantize", "diff"),
        ("quantize", "merge"),
        ("quantize", "model-parallel-size"),
    ):
        if options[f"--{one}"][0] and options[f"--{other}"][0]:
            raise UserError(f"--{one} and --{other} do not go together", f"convert twice, with --{other} first")
    if request.diff and request.base is None:
        raise UserError("a difference has two sides: --diff needs --base DIR", "give the checkpoint to subtract")
    if request.quantize_skip and not request.quantize:
        raise UserError("--quantize-skip is about what is not quantized", "add --quantize nf4, or leave it out")
    target, given = request.target, [Path(path).resolve() for path in (request.source, request.base or "")]
    problem = "is a file" if target.exists() and not target.is_dir() else None
    if problem is None and target.is_dir():
        problem = "is what is to be converted" if target.resolve() in given else "is not empty" * any(target.iterdir())
    if problem is None and request.to == "gguf" and target.suffix == ".gguf":
        problem = "is to be a folder, in which a .gguf is made"
    if problem:
        raise UserError(f"{target} {problem}", "give a folder that is not there yet")
    if request.to == "gguf" and find_spec("gguf") is None:
        raise UserError("the package gguf, which writes GGUF, is not installed", "type: pip install gguf")


def _check_tuned(request: Request, config: ModelConfig, is_alone: bool, source: Layout) -> None:
    """Refuses what a method cannot become.

    Raises:
        UserError: saying what it can.
    """
    tuning, folder = config.tuning, source.folder
    no_place = f"which layout '{request.to}' has no place for"
    if config.vision is not None and request.to != "consolidated":
        message = f"{folder} has a vision encoder ({config.vision.encoder}), {no_place}"
        raise UserError(message, "keep it with --to consolidated")
    if request.to == "peft":
        tuning.peft_config()  # raises where PEFT has no such method
        if config.qkv_bias and "bias" in tuning.peft_names:
            message = f"{folder} has trained biases that its base has, too, and PEFT would add both"
            raise UserError(message, "keep it: --to consolidated")
    elif request.merge:
        left = tuning.merged()
        if tuning == FULL:
            raise UserError(f"{folder} has nothing to merge: no method added anything", "leave --merge out")
        if is_alone:
            raise missing_base_error(source, "--base")
        if left != FULL and request.to == "meta":
            message = f"{folder} has biases (method {tuning.method}), and Meta's layout has no place for them"
            raise UserError(message, "use --to hf or --to consolidated")
    elif (
        tuning != FULL and request.to != "consolidated" and not (isinstance(tuning, BiasNorm) and request.to != "meta")
    ):
        hint = "keep it with --to consolidated" + (", or merge it with --merge" if tuning.can_merge else "")
        raise UserError(f"{folder} was tuned with method {tuning.method}, {no_place}", hint)
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

    From `layouts`, laid over each other, come `weights` of the shape `tuned`, and from these `sources`, the parameters
    as they were trained. Of these are made the `targets`, of the shape `config` and the types `dtypes`.
    """

    def __init__(self, request: Request) -> None:
        """Finds what is to be converted and checks it; nothing but headers and samples is read.

        Raises:
            UserError: a checkpoint is missing, damaged, does not fit the other one, or cannot become what is wanted.
        """
        self.request = request
        self._read_inputs()
        weights, config = self.weights, self.tuned
        if request.context is not None:
            config = replace(config, max_seq_len=request.context)
        self.config = replace(config, tuning=config.tuning.merged()) if request.merge else config
        self.size = 1
        if request.to not in ("hf", "peft"):
            if not request.quantize:
                self.size = request.model_parallel_size or self.source.model_parallel_size
            check_divides(self.config, self.size)
        self.quantized = set(quantizable(self.config, request.quantize_skip) if request.quantize else [])
        self.sources = dict(weights.tensors)
        base = read_base(self.source.folder)
        if request.merge and base and base.quantized and request.merge_into == "trained":
            # On a quantized base, its matrices are those after quantizing.
            names = quantizable(self.tuned, base.quantized.skip)
            self.sources |= {name: nf4_rounded(weights.tensors[name]) for name in names}
        self.targets = self._targets()
        self.dtypes = {name: weights.tensors[name].dtype for name in self.targets}
        if request.dtype is not None:
            self.dtypes = dict.fromkeys(self.targets, _DTYPES[request.dtype])
        strange = [f"{name} holds {dtype}" for name, dtype in self.dtypes.items() if dtype not in _DTYPES.values()]
        if strange and request.to != "gguf":
            hint = f"choose one: --dtype {'|'.join(_DTYPES)}"
            raise UserError(f"types that cannot be written:\n{listed(strange)}", hint)
        self.notes = weights.notes + ([] if self.subtracted is None else self.subtracted.notes)
        self.dtype, more = main_dtype(self.targets, self.dtypes)
        self.notes += more if request.to == "hf" else []
        self.gguf_type: GGUFType = request.gguf_type or ("bf16" if self.dtype == torch.bfloat16 else "f16")
        if request.to != "peft" and request.context is None and not says_context(self.layouts):
            context = self.config.max_seq_len
            self.notes.append(f"{self.source.folder} does not say its context: {context} is written (--context N)")
        head, embedding = "output.weight", "tok_embeddings.weight"
        if request.to == "meta" and self.config.tie_word_embeddings:
            # Its readers expect both.
            self.targets[head], self.dtypes[head] = self.targets[embedding], self.dtypes[embedding]
            self.config = replace(self.config, tie_word_embeddings=False)
        if (
            request.to in ("hf", "gguf")
            and head in self.targets
            and self.dtypes[head] == self.dtypes[embedding]
            and same_values(self.targets[head], self.targets[embedding], self.dtypes[head])
        ):
            del self.targets[head], self.dtypes[head]
            self.config = replace(self.config, tie_word_embeddings=True)
        self.parameters = self.targets  # by Meta's names, and their values in the files:
        self.saved = {name: rounded(tensor, self.dtypes[name]) for name, tensor in self.targets.items()}
        if request.to == "gguf":
            kind = self.gguf_type
            self.saved = {name: gguf_values(tensor, kind) for name, tensor in self.targets.items()}
            self.targets, self.dtypes = gguf_tensors(self.config, self.targets, kind)
        self.files = dict(self._shards() if request.to in ("meta", "consolidated") else self._single_files())
        self.nbytes = sum(entry.nbytes for entries in self.files.values() for entry in entries)

    def _read_inputs(self) -> None:
        request = self.request
        self.source = source = inspect(locate(str(request.source)))
        base = None if request.base is None else inspect(locate(str(request.base)))
        if (source.is_diff or source.format == "peft") and base is None:
            kind = "a diff checkpoint: it is added to" if source.is_diff else "an adapter of PEFT: it goes on"
            message = f"{source.folder} is {kind} its base"
            raise UserError(message, "give that with --base DIR")
        self.layouts = [source] if request.diff or base is None else [base, source]
        self.weights, config = read_weights(self.layouts), read_config(self.layouts)
        if config is None:
            raise UserError(f"{source.folder} has no params.json or config.json: the model's shape is not known")
        self.tuned = config = with_rows(config, self.weights)
        is_adapter = is_adapter_only(source)
        self.is_alone = is_adapter and base is None
        _check_tuned(request, config, self.is_alone, source)
        if not self.is_alone:
            check_base(self.layouts, config)
        if base is not None and not (is_adapter or config.tuning == FULL or request.diff or source.is_diff):
            check_same_base(source, self.weights, base, config)
        for layout in [source, *([base] if base else [])]:
            check_manifest(layout.folder)
        shapes = shapes_of(config)
        if self.is_alone:
            # What vision has of its own depends on the stage: it is what is there.
            own = {name for name, one in describe(config).items() if one.trains and one.part != "vision"}
            own |= set() if config.vision is None else self.weights.tensors.keys()
            shapes = {name: shape for name, shape in shapes.items() if name in own}
        check_tensors(self.weights, shapes, source.folder)
        self.subtracted: Weights | None = None
        if base is not None and request.diff:
            self.subtracted = read_weights([base])
            check_tensors(self.subtracted, shapes_of(config), base.folder)

    def _targets(self) -> dict[str, LazyTensor]:
        names, subtracted = list(shapes_of(self.config)), self.subtracted
        if self.is_alone:
            names = [name for name in names if name in self.weights.tensors]
        if self.request.to == "peft":
            names = [name for name in names if describe(self.config)[name].trains]
            if self.source.format == "peft" and (lost := open_checkpoint(self.source).tensors.keys() - set(names)):
                message = f"{self.source.folder} has whole modules, which would be lost:\n{listed(sorted(lost))}"
                raise UserError(message, "it is an adapter of PEFT already; as a whole model: --to hf --merge")
            return {name: peft_tensor(name, self.sources[name], self.config.tuning) for name in names}
        if subtracted is not None:
            return {name: subtract(self.sources[name], subtracted.tensors[name]) for name in names}
        if self.request.merge:
            return {name: merged(name, self.sources, self.tuned.tuning) for name in names}
        return {name: self.sources[name] for name in names}

    def _shards(self) -> Iterator[tuple[str, list[_Entry]]]:
        for rank in range(self.size):
            name, prefix = f"consolidated.{rank:02d}", ""
            if self.request.to == "consolidated":
                name, prefix = f"{name}-of-{self.size:02d}.model{'-diff' * self.request.diff}", "llma."
            entries = []
            for parameter, tensor in self.targets.items():
                if parameter in self.quantized:
                    matrix = prefix + parameter.removesuffix(".weight")
                    parts = nf4_tensors(self.weights.tensors[parameter])
                    entries += [_Entry(parameter, f"{matrix}.{leaf}", part, part.dtype) for leaf, part in parts.items()]
                else:
                    share = share_of(parameter, tensor, rank, self.size)
                    entries.append(_Entry(parameter, prefix + parameter, share, self.dtypes[parameter]))
            yield f"{name}.pth", entries

    def _single_files(self) -> Iterator[tuple[str, list[_Entry]]]:
        """Hugging Face's, of which each is kept small, or GGUF or PEFT's, of which there is one whatever its size."""
        if self.request.to == "gguf":
            entries = [_Entry(name, name, tensor, self.dtypes[name]) for name, tensor in self.targets.items()]
            yield f"model-{self.gguf_type}.gguf", entries
            return
        is_peft, size = self.request.to == "peft", 0
        files: list[list[_Entry]] = [[]]
        for parameter, tensor in self.targets.items():
            heads = rotated_heads(parameter, self.config)
            tensor = tensor if heads is None else reorder_heads(tensor, heads, to_meta=False)
            name = peft_name(parameter, self.config.tuning) if is_peft else huggingface_name(parameter)
            entry = _Entry(parameter, name, tensor, self.dtypes[parameter])
            if files[-1] and not is_peft and size + entry.nbytes > self.request.file_bytes:
                files.append([])
                size = 0
            files[-1].append(entry)
            size += entry.nbytes
        for place, entries in enumerate(files, 1):
            name = PEFT_FILE if is_peft else "model.safetensors"
            yield name if len(files) == 1 else f"model-{place:05d}-of-{len(files):05d}.safetensors", entries

    def write_weights(self, folder: Path, written: "Queue[Any]", progress: Callable[[int], None]) -> None:
        """Writes the files with weights, and reads each block back: all shares of a parameter, then the next; what is
        `written` is as it stays.

        Raises:
            RunError: float16 cannot hold it, or it is not what was written.
        """
        with contextlib.ExitStack() as stack:
            files = []
            for name, entries in self.files.items():
                specs = {entry.name: TensorSpec(entry.tensor.shape, entry.dtype) for entry in entries}
                if self.request.to == "gguf":
                    self._lay_out_gguf(folder / name, specs)
                else:
                    lay_out(folder / name, specs, flat=self.request.to == "meta")
                file = TensorFile(folder / name, specs)
                stack.callback(file.close, durable=False)
                files.append((file, list(entries)))
            for parameter in self.targets:
                for file, waiting in files:
                    while waiting and waiting[0].parameter == parameter:
                        entry = waiting.pop(0)
                        for start, block in entry.tensor.blocks(entry.dtype):
                            if entry.dtype == torch.float16 and _has_infinity(block):
                                raise RunError(f"{parameter} has values above 65504, too large for fp16: choose bf16")
                            file.write(entry.name, block, start, verified=True)
                        written.put((file.path, file.settled(entry.name)))
                        progress(entry.nbytes)
            for file, _ in files:
                file.seal()
                written.put((file.path, file.path.stat().st_size))

    def write_description(self, folder: Path) -> None:
        """Writes what says the shape, and what belongs to a checkpoint besides."""
        request, layouts, to = self.request, self.layouts, self.request.to
        if to == "gguf":
            return  # all of it is in the file
        _, ids = self._write_tokenizer(folder)
        if to == "peft":
            _write_json(folder / "adapter_config.json", peft_config(self.config, self._peft_base()))
        elif to == "hf":
            dtype = str(self.dtype).removeprefix("torch.")
            _write_json(folder / "config.json", huggingface_config(self.config, dtype, ids))
            if len(self.files) > 1:
                places = {entry.name: name for name, entries in self.files.items() for entry in entries}
                _write_json(folder / INDEX_FILE, {"metadata": {"total_size": self.nbytes}, "weight_map": places})
        else:
            _write_json(folder / ("params.json" if to == "meta" else "config.json"), self.config.to_params())
        if to == "consolidated":
            _write_json(folder / "meta.json", {"llama_type": self.config.llama_type})
            if self.config.vision is not None:
                (folder / VISION_FILE).write_bytes(self.config.vision.to_json())
            base = self.source.folder / BASE_FILE
            if self.is_alone and base.is_file():
                (folder / BASE_FILE).write_bytes(base.read_bytes())
            if request.quantize:
                origin = base_fingerprint(layouts, self.config)
                (folder / QUANTIZATION_FILE).write_bytes(Quantization(tuple(request.quantize_skip), origin).to_json())

    def _write_tokenizer(self, folder: Path) -> tuple[Tokenizer | None, dict[str, Any]]:
        """Writes the tokenizer and what goes with it; returns it, and the ids of BOS and EOS for a config.json."""
        for path in extra_files(self.layouts):
            (folder / path.name).write_bytes(path.read_bytes())
        tokenizer = tokenizer_of(self.layouts)
        for name, data in {} if tokenizer is None else tokenizer.files().items():
            (folder / name).write_bytes(data)
        ids = special_ids(self.layouts, tokenizer)
        if self.request.to in ("hf", "peft", "gguf") and tokenizer is not None:
            # llama.cpp merges a SentencePiece model's by their scores.
            self.notes.extend(write_tokenizer(tokenizer, folder, ids, merges=self.request.to != "gguf"))
        return tokenizer, ids

    def _lay_out_gguf(self, path: Path, specs: Specs) -> None:
        with tempfile.TemporaryDirectory() as exported:
            tokenizer, _ = self._write_tokenizer(Path(exported))
            if tokenizer is None:
                message = f"{self.source.folder} has no tokenizer that is read here, and GGUF has it in the file"
                raise UserError(message, "copy it there, or use --to hf")
            name = self.request.target.name
            self.notes += lay_out_gguf(path, specs, self.config, self.gguf_type, name, tokenizer, Path(exported))

    def _peft_base(self) -> str | None:
        """The base by its name on Hugging Face or its folder, if PEFT can load it: it is Hugging Face's; else None, and
        a note on what to do.
        """
        known = read_base(self.source.folder)
        given = None if self.request.base is None else [str(self.request.base)]
        bases = given or (list(known.pretrained) if known else [])
        if len(bases) == 1:
            with contextlib.suppress(UserError):  # it was moved, or it is on another machine
                base = inspect(locate(bases[0]))
                if base.format == "huggingface":
                    return hub_name(str(base.folder)) or str(base.folder.resolve())
        base_name = shlex.quote(bases[0]) if len(bases) == 1 else "BASE"
        self.notes.append(
            "adapter_config.json names no base, as PEFT loads Hugging Face's models only: make one with llama-acc "
            f"convert-checkpoint {base_name} NEW --to hf and give it with --base NEW, or write its name into that file"
        )
        return None

    def verify(self, folder: Path, progress: Callable[[int], None]) -> float | None:
        """Compares what a reader of the folder finds with what was meant, a block of each sixteen: `write_weights` has
        compared every byte, so what is left is whose they are. Of a diff, returns the largest error of base + diff.

        Raises:
            RunError: they differ.
        """
        written, subtracted = self._read_back(folder), self.subtracted
        errors, problems = [], []
        for name, dtype in self.dtypes.items():
            back, expected = written[name], self.targets[name]
            if name in self.quantized:
                expected = nf4_rounded(self.weights.tensors[name])
            if back.shape != expected.shape or not all(
                same_values(back.rows(start, stop), expected.rows(start, stop), dtype)
                for start, stop in blocks_of(back.shape)[::16]
            ):
                problems.append(f"{name} is not what was meant")
            if subtracted is not None:
                restored = add(subtracted.tensors[name], back)
                errors.append(subtract(restored, self.weights.tensors[name]).largest())
            progress(back.nbytes)
        if problems:
            raise RunError(f"read back from the disk:\n{listed(problems)}")
        return max(errors) if errors else None

    def _read_back(self, folder: Path) -> dict[str, LazyTensor]:
        """The parameters in the folder, by Meta's names, read as any checkpoint is.

        Raises:
            RunError: they are others, or of another shape of model.
        """
        if self.request.to == "gguf":
            ((name, entries),) = self.files.items()
            specs = {entry.name: TensorSpec(entry.tensor.shape, entry.dtype) for entry in entries}
            found = open_gguf(folder / name, specs)
            is_described = True
        elif self.request.to == "peft":
            ours, is_described = {peft_name(name, self.config.tuning): name for name in self.targets}, True
            found = {ours.get(name, name): tensor for name, tensor in open_safetensors(folder / PEFT_FILE).items()}
            for name, tensor in found.items():
                if heads := rotated_heads(name, self.config):
                    found[name] = reorder_heads(tensor, heads, to_meta=True)
        else:
            layout = inspect(folder)
            found = open_checkpoint(layout).tensors
            config = None if layout.is_diff else read_config([layout])
            is_described = layout.is_diff or (config is not None and _same_model(config, self.config))
        if not is_described or found.keys() != self.targets.keys():
            raise RunError(f"what was written to {self.request.target} does not describe the model it was made from")
        return found


def _has_infinity(block: Tensor) -> bool:
    """Whether a block has one; the extremes, which are found ten times as fast, are NaN where it has a NaN."""
    low, high = (extreme.item() for extreme in block.aminmax())
    return math.isinf(low) or math.isinf(high) or (math.isnan(low) and bool(block.isinf().any()))


def _same_model(one: ModelConfig, other: ModelConfig) -> bool:
    """Whether two shapes compute the same; a width can be said in several ways, and a factor is rounded."""
    plain = [
        replace(
            c,
            n_kv_heads=c.kv_heads,
            head_dim=c.head_size,
            multiple_of=c.hidden_dim,
            family="llama",
            ffn_dim_multiplier=None,
            qkv_bias=c.qkv_bias and not isinstance(c.tuning, BiasNorm),  # which has them anyhow
            rope_scaling=float(f"{c.rope_scaling:.12g}") if isinstance(c.rope_scaling, float) else c.rope_scaling,
        )
        for c in (one, other)
    ]
    return shapes_of(one) == shapes_of(other) and plain[0] == plain[1]


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
