"""What a conversion will write: which tensors of which files, and what each is made of."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from llama_acc.core.checkpoint.adapter import read_base
from llama_acc.core.checkpoint.computed import difference, same_values
from llama_acc.core.checkpoint.conversion.found import Found
from llama_acc.core.checkpoint.conversion.request import Request
from llama_acc.core.checkpoint.huggingface import huggingface_name, rotated_heads
from llama_acc.core.checkpoint.layout import says_context
from llama_acc.core.checkpoint.lazy import Part
from llama_acc.core.checkpoint.load import Weights, main_dtype
from llama_acc.core.checkpoint.merge import merged_source
from llama_acc.core.checkpoint.peft import PEFT_FILE, peft_name
from llama_acc.core.checkpoint.quantiser import Quantiser
from llama_acc.core.errors import UserError, listed
from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.sharding import check_divides, local_shape, split_dimension
from llama_acc.core.model.tuning import merged_tuning

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Entry:
    """One tensor of an output file.

    Attributes:
        parameter: what it is, or belongs to, by Meta's names.
        name: its name in the file.
        source: what it is made of.
        dtype: its type.
    """

    parameter: str
    name: str
    source: Part
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return self.source.numel() * self.dtype.itemsize


class Plan:
    """The files of a conversion, before anything is written.

    Attributes:
        request: what was asked for.
        found: what it starts from.
        config: the shape of what is made.
        sources: the parameters it starts from, as they were trained.
        meant: what is to be written, by Meta's names.
        dtypes: in which type.
        quantised: the names of those to be written in NF4.
        dtype: the type of most of what is written.
        notes: what the user should know of the source or of the result.
        tied: the output matrix is the embedding, and is not written.
        files: the files to be made, with their tensors.
    """

    def __init__(self, request: Request, found: Found) -> None:
        """Raises:
        UserError: a size that does not divide the model, or types that cannot be written.
        """
        self.request, self.found = request, found
        tuned = found.config if request.context is None else replace(found.config, max_seq_len=request.context)
        self.config = replace(tuned, tuning=merged_tuning(tuned.tuning)) if request.merge else tuned
        self.size = _size(request, found, self.config)
        self.quantised = set(self.config.quantisable(request.quantize_skip) if request.quantize else [])
        self.quantiser = Quantiser()
        self.sources = self._sources()
        self.meant = self._meant()
        self.dtypes = _dtypes(request, found.weights, list(self.meant))
        self.dtype, self.notes = self._dtype_and_notes()
        self.tied = request.to == "hf" and self._is_tied()
        self.files = dict(self._single_files() if self.is_safetensors else self._shards())

    @property
    def is_safetensors(self) -> bool:
        """Whether its files are safetensors, not torch's."""
        return self.request.to in ("hf", "peft")

    @property
    def nbytes(self) -> int:
        """Size of the tensors to be written."""
        return sum(entry.nbytes for entries in self.files.values() for entry in entries)

    def written(self, name: str) -> Part:
        """What a parameter is once it is written: of one in NF4, its values after quantising."""
        if name in self.quantised:
            return self.quantiser.rounded(name, self.found.weights.tensors[name])
        return self.meant[name]

    def _dtype_and_notes(self) -> tuple[torch.dtype, list[str]]:
        found, request = self.found, self.request
        notes = found.weights.notes + ([] if found.subtracted is None else found.subtracted.notes)
        dtype, rounded = main_dtype(self.meant, self.dtypes)
        if request.to == "hf":
            notes = notes + rounded
        if request.to != "peft" and request.context is None and not says_context(found.layouts):
            context = self.config.max_seq_len
            notes = [*notes, f"{found.source.folder} does not say its context: {context} is written (--context N)"]
        return dtype, notes

    def _is_tied(self) -> bool:
        """Whether the output matrix is the embedding, to the bit, in the file to be made."""
        output, embedding = self.meant["output.weight"], self.meant["tok_embeddings.weight"]
        dtype = self.dtypes["output.weight"]
        return dtype == self.dtypes["tok_embeddings.weight"] and same_values(output, embedding, dtype)

    def _sources(self) -> dict[str, Part]:
        """The parameters as they were trained: where on a quantised base, its matrices are those after quantising."""
        found = self.found
        sources: dict[str, Part] = dict(found.weights.tensors)
        base = read_base(found.source.folder)
        if self.request.merge and base and base.quantised and self.request.merge_into == "trained":
            for name in found.config.quantisable(base.quantised.skip):
                sources[name] = self.quantiser.rounded(name, found.weights.tensors[name])
        return sources

    def _meant(self) -> dict[str, Part]:
        found, tuning = self.found, self.config.tuning
        names = [name for name in self.config.parameter_shapes() if not found.is_part or name in found.weights.tensors]
        if self.request.to == "peft":
            names = [name for name in names if tuning.trains(name)]
        if found.subtracted is not None:
            return {name: difference(self.sources[name], found.subtracted.tensors[name]) for name in names}
        return {name: merged_source(name, self.sources) if self.request.merge else self.sources[name] for name in names}

    def _shards(self) -> Iterator[tuple[str, list[Entry]]]:
        for rank in range(self.size):
            name = f"consolidated.{rank:02d}"
            if self.request.to == "consolidated":
                name += f"-of-{self.size:02d}.model" + ("-diff" if self.request.diff else "")
            yield f"{name}.pth", [entry for parameter in self.meant for entry in self._shares(parameter, rank)]

    def _shares(self, parameter: str, rank: int) -> Iterator[Entry]:
        whole, dimension = self.meant[parameter], split_dimension(parameter)
        prefix = "llma." if self.request.to == "consolidated" else ""
        if parameter in self.quantised:
            matrix = prefix + parameter.removesuffix(".weight")
            for leaf, source in self.quantiser.tensors(parameter, self.found.weights.tensors[parameter]).items():
                yield Entry(parameter, f"{matrix}.{leaf}", source, source.dtype)
            return
        if dimension is not None:
            length = local_shape(parameter, whole.shape, self.size)[dimension]
            whole = whole.narrow(dimension, rank * length, (rank + 1) * length)
        yield Entry(parameter, prefix + parameter, whole, self.dtypes[parameter])

    def _single_files(self) -> Iterator[tuple[str, list[Entry]]]:
        """Hugging Face's, of which each is kept small, or PEFT's, of which there is one whatever its size."""
        files: list[list[Entry]] = [[]]
        most = self.request.file_bytes if self.request.to == "hf" else None
        for parameter in self.meant:
            if self.tied and parameter == "output.weight":
                continue
            entry = self._single_entry(parameter)
            if most and files[-1] and sum(other.nbytes for other in files[-1]) + entry.nbytes > most:
                files.append([])
            files[-1].append(entry)
        for place, entries in enumerate(files, 1):
            numbered = f"model-{place:05d}-of-{len(files):05d}.safetensors"
            name = PEFT_FILE if self.request.to == "peft" else "model.safetensors"
            yield name if len(files) == 1 else numbered, entries

    def _single_entry(self, parameter: str) -> Entry:
        source, heads = self.meant[parameter], rotated_heads(parameter, self.config)
        source = source if heads is None else source.deinterleave(heads)
        name = peft_name(parameter) if self.request.to == "peft" else huggingface_name(parameter)
        return Entry(parameter, name, source, self.dtypes[parameter])


def _size(request: Request, found: Found, config: ModelConfig) -> int:
    if request.to in ("hf", "peft"):
        return 1
    size = 1 if request.quantize else request.model_parallel_size or found.source.model_parallel_size
    check_divides(config, size)
    return size


def _dtypes(request: Request, weights: Weights, names: Sequence[str]) -> dict[str, torch.dtype]:
    """In which type each parameter is written."""
    if request.dtype is not None:
        return dict.fromkeys(names, _TYPES[request.dtype])
    dtypes = {name: weights.tensors[name].dtype for name in names}
    strange = [f"{name} holds {dtype}" for name, dtype in dtypes.items() if dtype not in _TYPES.values()]
    if strange:
        raise UserError(f"types that cannot be written:\n{listed(strange)}", f"choose one: --dtype {'|'.join(_TYPES)}")
    return dtypes
