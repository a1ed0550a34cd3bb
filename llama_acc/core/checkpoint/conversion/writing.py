"""Writing a conversion's files, a few megabytes at a time, and what describes them."""

import contextlib
import json
import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llama_acc.core.checkpoint.base import BASE_FILE, read_base
from llama_acc.core.checkpoint.companions import companions, special_ids
from llama_acc.core.checkpoint.computed import read_block
from llama_acc.core.checkpoint.conversion.plan import Entry, Plan
from llama_acc.core.checkpoint.fingerprint import base_fingerprint, fingerprint
from llama_acc.core.checkpoint.huggingface import INDEX_FILE, huggingface_config
from llama_acc.core.checkpoint.layout import inspect, locate
from llama_acc.core.checkpoint.parts import blocks_of
from llama_acc.core.checkpoint.peft_files import peft_config
from llama_acc.core.checkpoint.quantised import QUANTIZATION_FILE, Quantization
from llama_acc.core.checkpoint.shards import Weights
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
from llama_acc.core.input_files import read_object
from llama_acc.core.model.vision_config import VISION_FILE
from llama_acc.core.tokenizer_folder import CONFIG_FILE, SENTENCEPIECE_FILE


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
    if plan.request.to == "peft":
        _write_json(folder / "adapter_config.json", peft_config(plan.config.tuning, _peft_base(plan)))
    elif plan.request.to == "hf":
        _describe_huggingface(plan, folder)
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


def _describe_huggingface(plan: Plan, folder: Path) -> None:
    dtype = str(plan.dtype).removeprefix("torch.")
    config = huggingface_config(plan.config, dtype, plan.tied, special_ids(plan.found.layouts))
    _write_json(folder / "config.json", config)
    _describe_tokenizer(folder)
    if len(plan.files) > 1:
        places = {entry.name: name for name, entries in plan.files.items() for entry in entries}
        _write_json(folder / INDEX_FILE, {"metadata": {"total_size": plan.nbytes}, "weight_map": places})


def _describe_tokenizer(folder: Path) -> None:
    """Says what transformers would take otherwise, where nothing says it."""
    path = folder / CONFIG_FILE
    if (folder / SENTENCEPIECE_FILE).exists() and not path.exists():
        # Without it transformers 5 leaves BOS out and splits the first word otherwise.
        _write_json(path, {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True})
    elif path.exists():
        values = read_object(path)
        is_generic = values.get("tokenizer_class") in (None, "PreTrainedTokenizerFast")
        if is_generic and "model_input_names" not in values:
            # The generic class gives token_type_ids besides, which a LLaMA's `generate` refuses in transformers 4.
            _write_json(path, values | {"model_input_names": ["input_ids", "attention_mask"]})


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
        values = None if request.calibration is None else _fingerprint_of_quantised(plan)
        told = Quantization(tuple(request.quantize_skip), base_fingerprint(found.layouts, plan.config), values)
        (folder / QUANTIZATION_FILE).write_bytes(told.to_json())


def _fingerprint_of_quantised(plan: Plan) -> str:
    return fingerprint(Weights({name: plan.written(name) for name in plan.quantised}), sorted(plan.quantised))


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
