"""Writing a conversion's files, a few megabytes at a time, and what describes them."""

import contextlib
import json
import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llama_acc.core.checkpoint.adapter import BASE_FILE, base_fingerprint, read_base
from llama_acc.core.checkpoint.companions import companions, special_ids, tokenizer_of
from llama_acc.core.checkpoint.computed import read_block
from llama_acc.core.checkpoint.conversion.plan import Entry, Plan
from llama_acc.core.checkpoint.hf_tokenizer import write_tokenizer
from llama_acc.core.checkpoint.huggingface import INDEX_FILE, huggingface_config
from llama_acc.core.checkpoint.layout import inspect, locate
from llama_acc.core.checkpoint.lazy import blocks_of
from llama_acc.core.checkpoint.peft import peft_config
from llama_acc.core.checkpoint.quantized import QUANTIZATION_FILE, Quantization
from llama_acc.core.checkpoint.tensor_files import (
    Spec,
    lay_out_pth,
    lay_out_safetensors,
    pth_offsets,
    safetensors_offsets,
    seal_pth,
    write_at,
)
from llama_acc.core.errors import UserError
from llama_acc.core.model.vision_config import VISION_FILE


class _File(NamedTuple):
    """An output file that was laid out, open for writing."""

    descriptor: int
    offsets: Mapping[str, int]

    def write(self, entry: Entry) -> None:
        offset = self.offsets[entry.name]
        for start, stop in blocks_of(entry.source.shape):
            block = read_block(entry.source, start, stop, entry.dtype)
            write_at(self.descriptor, offset, block)
            offset += block.nbytes


def write_weights(plan: Plan, folder: Path, progress: Callable[[int], None]) -> None:
    """Writes the files with weights: all shares of a parameter, then the next parameter."""
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(_open(plan, folder / name, held)) for name, held in plan.files.items()}
        waiting = {name: list(entries) for name, entries in plan.files.items()}
        for parameter in plan.meant:
            for name, entries in waiting.items():
                while entries and entries[0].parameter == parameter:
                    entry = entries.pop(0)
                    files[name].write(entry)
                    progress(entry.nbytes)
    if not plan.is_safetensors:
        for name in plan.files:
            seal_pth(folder / name)


@contextlib.contextmanager
def _open(plan: Plan, path: Path, entries: list[Entry]) -> Iterator[_File]:
    specs = {entry.name: Spec(entry.source.shape, entry.dtype) for entry in entries}
    if plan.is_safetensors:
        lay_out_safetensors(path, specs)
        offsets = safetensors_offsets(path)
    else:
        lay_out_pth(path, specs, flat=plan.request.to == "meta")
        offsets = pth_offsets(path, specs)
    descriptor = os.open(path, os.O_WRONLY)
    try:
        yield _File(descriptor, offsets)
    finally:
        os.close(descriptor)


def write_description(plan: Plan, folder: Path) -> None:
    """Writes what says the shape, and what belongs to a checkpoint besides."""
    for path in companions(plan.found.layouts):
        (folder / path.name).write_bytes(path.read_bytes())
    tokenizer = tokenizer_of(plan.found.layouts)
    for name, data in {} if tokenizer is None else tokenizer.files().items():
        (folder / name).write_bytes(data)
    ids = special_ids(plan.found.layouts, tokenizer)
    if plan.request.to in ("hf", "peft") and tokenizer is not None:
        plan.notes.extend(write_tokenizer(tokenizer, folder, ids))
    if plan.request.to == "peft":
        _write_json(folder / "adapter_config.json", peft_config(plan.config.tuning, _peft_base(plan)))
    elif plan.request.to == "hf":
        _describe_huggingface(plan, folder, ids)
    else:
        _describe_shards(plan, folder)


def _peft_base(plan: Plan) -> str | None:
    """The folder of the base if PEFT can load it: it is Hugging Face's; else None, and a note on what to do."""
    known = read_base(plan.found.source.folder)
    bases = [str(plan.request.base)] if plan.request.base is not None else list(known.pretrained) if known else []
    if len(bases) == 1:
        try:
            base = inspect(locate(bases[0]))
        except UserError:
            pass  # it was moved, or it is on another machine
        else:
            if base.format == "huggingface":
                return str(base.folder.resolve())
    base_name = shlex.quote(bases[0]) if len(bases) == 1 else "BASE"
    plan.notes.append(
        "adapter_config.json names no base, as PEFT loads Hugging Face's models only: make one with llama-acc "
        f"convert-checkpoint {base_name} NEW --to hf and give it with --base NEW, or write its name into that file"
    )
    return None


def _describe_huggingface(plan: Plan, folder: Path, ids: Mapping[str, Any]) -> None:
    dtype = str(plan.dtype).removeprefix("torch.")
    config = huggingface_config(plan.config, dtype, plan.tied, ids)
    _write_json(folder / "config.json", config)
    if len(plan.files) > 1:
        places = {entry.name: name for name, entries in plan.files.items() for entry in entries}
        _write_json(folder / INDEX_FILE, {"metadata": {"total_size": plan.nbytes}, "weight_map": places})


def _describe_shards(plan: Plan, folder: Path) -> None:
    request, found = plan.request, plan.found
    _write_json(folder / ("params.json" if request.to == "meta" else "config.json"), plan.config.to_params())
    if request.to == "consolidated":
        _write_json(folder / "meta.json", {"llama_type": plan.config.llama_type})
        if plan.config.vision is not None:
            (folder / VISION_FILE).write_bytes(plan.config.vision.to_json())
    if found.is_part and (found.source.folder / BASE_FILE).is_file():
        (folder / BASE_FILE).write_bytes((found.source.folder / BASE_FILE).read_bytes())
    if request.quantize:
        told = Quantization(tuple(request.quantize_skip), base_fingerprint(found.layouts, plan.config))
        (folder / QUANTIZATION_FILE).write_bytes(told.to_json())


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
