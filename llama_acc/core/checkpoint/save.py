"""Writing a checkpoint: the weights LLaMA2-Accessory and this toolkit read, and beside them what a resume needs.

    consolidated.NN-of-MM.model.pth     the weights, one file for each model-parallel rank
    state/training-NN-of-MM.safetensors float32 masters where the saved weights are rounded, AdamW's moments
    state/rng-RRRRR-of-WWWWW.safetensors  the random number generators of every rank
    state/progress.json                 where the run stands

All ranks write at once, each the rows it has, into files that were laid out before: nothing is gathered, and files may
be larger than memory. The folder must lie on a disk that all ranks see. A .pth is a zip archive with one uncompressed
record for each tensor's bytes; safetensors is 8 bytes of header length, a JSON header and raw bytes
(https://github.com/huggingface/safetensors).
"""

import contextlib
import json
import os
import shutil
import struct
import threading
import zipfile
import zlib
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from llama_acc.core.atomic import (
    abandon_folder,
    aside_of,
    begin_folder,
    digest_of,
    finish_folder,
    remove_folder,
    write_text_whole,
)
from llama_acc.core.device import device_type
from llama_acc.core.distributed.environment import in_background
from llama_acc.core.distributed.groups import Parallel
from llama_acc.core.errors import RunError, UserError
from llama_acc.core.input_files import read_object

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_SAFETENSORS_TYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.int64: "I64",
}
_ALIGNMENT, _GGUF_ALIGNMENT = 64, 32
_LOCAL_HEADER, _CENTRAL_HEADER = 30, 46  # bytes before the record's name (APPNOTE.TXT 4.3.7, 4.3.12)
_BLOCK = 1 << 22
# Of larger ones, newer kernels make as large pages of their cache, and looking for free ones can take eight times as
# long as the rest (Linux 6.18, ext4, a virtual machine: 2.2 GB in 5 s by 2 MB, in 0.6 s by 256 KB, 1.2 to 1.9 by 64).
_WRITTEN_AT_ONCE = 1 << 18


# Files


class TensorSpec(NamedTuple):
    """Shape and type of a tensor that is to be written."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


Specs = Mapping[str, TensorSpec]


def lay_out(path: Path, specs: Specs, flat: bool = False) -> None:
    """Writes a file of tensors, a .pth or safetensors by its ending, with a hole in the place of each one's bytes; they
    lie in the order of `specs`. `flat`: a .pth maps names to tensors (Meta's); otherwise it is `{"model": mapping}`."""
    if path.suffix == ".pth":
        # Memory that is never touched is never taken.
        tensors = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}
        with torch.serialization.skip_data():
            torch.save(tensors if flat else {"model": tensors}, path)
        return
    # transformers reads whose tensors these are.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in specs.items():
        begin, end = end, end + specs[name].nbytes
        header[name] = {"dtype": _SAFETENSORS_TYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def stored_sizes(path: Path, specs: Specs) -> list[int]:
    """Bytes that each tensor takes in a file that ends with them, safetensors or GGUF."""
    alignment = _GGUF_ALIGNMENT if path.suffix == ".gguf" else 1
    return [spec.nbytes + -spec.nbytes % alignment for spec in specs.values()]


def tensor_offsets(path: Path, specs: Specs) -> dict[str, int]:
    """Where each tensor begins in such a file."""
    sizes = stored_sizes(path, specs)
    return dict(zip(specs, accumulate(sizes, initial=path.stat().st_size - sum(sizes)), strict=False))


class TensorFile:
    """A file of `lay_out`, or of `lay_out_gguf`, open for writing."""

    def __init__(self, path: Path, specs: Specs) -> None:
        """Opens it; `specs` are those it was laid out with."""
        self.path, self._file = path, path.open("r+b", buffering=0)
        self._records: list[tuple[zipfile.ZipInfo, int]] = []  # a .pth's, with where their bytes begin
        if path.suffix == ".pth":
            with zipfile.ZipFile(path) as archive:
                self._central, records = archive.start_dir, archive.infolist()
            for record in records:
                sizes = struct.unpack("<HH", self._read(4, record.header_offset + 26))  # of name and extra field
                self._records.append((record, record.header_offset + _LOCAL_HEADER + sum(sizes)))
            # Tensors are numbered in their order: ARCHIVE/data/NUMBER.
            begins = {record.filename.partition("/")[2]: begin for record, begin in self._records}
            self._offsets = {name: begins[f"data/{number}"] for number, name in enumerate(specs)}
        else:
            self._offsets = tensor_offsets(path, specs)
        self._specs = specs
        self._found = bytearray(_WRITTEN_AT_ONCE)

    def settled(self, name: str) -> int:
        """How many bytes from its begin on stay as they are, once all tensors up to this one are written."""
        return 0 if self._records else self._offsets[name] + self._specs[name].nbytes

    def _read(self, size: int, offset: int) -> bytes:
        return os.pread(self._file.fileno(), size, offset)

    def write(self, name: str, rows: Tensor, first: int = 0, verified: bool = False) -> None:
        """Writes some rows of a tensor, the first of which has number `first`; `verified`: and reads them back.

        Raises:
            RunError: what is read back is something else.
        """
        begin = self._offsets[name] + first * (rows.nbytes // max(1, len(rows)) if rows.dim() else 0)
        data = rows.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        for start in range(0, len(data), _WRITTEN_AT_ONCE):
            piece, done = data[start : start + _WRITTEN_AT_ONCE], 0
            while done < len(piece):
                done += os.pwrite(self._file.fileno(), piece[done:], begin + start + done)
            if verified:  # at once, while it lies in the core's cache
                found = self._found if len(piece) == len(self._found) else bytearray(len(piece))
                os.preadv(self._file.fileno(), [found], begin + start)
                if found != piece:
                    raise RunError(f"read back from the disk: {name} is not what was written")

    def seal(self) -> None:
        """Puts a .pth's checksums in, once all is written: torch ignores them, other readers of zip archives do not."""
        central = self._central if self._records else 0
        for record, begin in self._records:
            end = begin + record.file_size
            if "/data/" in record.filename and record.file_size:
                checksum = 0
                for offset in range(begin, end, _BLOCK):
                    checksum = zlib.crc32(self._read(min(_BLOCK, end - offset), offset), checksum)
                # A data descriptor follows the bytes: a signature, then the checksum.
                for place in (end + 4, central + 16):
                    os.pwrite(self._file.fileno(), struct.pack("<I", checksum), place)
            central += _CENTRAL_HEADER + sum(struct.unpack("<HHH", self._read(6, central + 28)))

    def close(self, durable: bool = True) -> None:
        """Closes it; `durable`: once all is on the disk."""
        if durable:
            os.fsync(self._file.fileno())
        self._file.close()


# Checkpoints


class Rows(NamedTuple):
    """Some rows of a tensor, as a rank holds them."""

    tensor: Tensor
    first: int  # number of the first one
    shape: tuple[int, ...]  # of all rows together, which is what this model-parallel rank has of the tensor
    shared: bool  # whether every data-parallel rank has the same rows, rather than others


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint is to hold, as one rank has it."""

    weights: Mapping[str, Rows]  # the trained parameters, by Meta's names
    state: Mapping[str, Rows]  # what else a resume needs, by its own names
    rng: Mapping[str, Tensor]  # this rank's random number generators
    dtype: torch.dtype
    files: Mapping[str, bytes]  # small files by name, written as they are
    parallel: Parallel  # the ranks that write together

    def copied(self) -> "Snapshot":
        """The same with tensors of its own, in the host's memory; a tensor that is there twice is copied once."""
        copies: dict[int, Tensor] = {}

        def copy(piece: Rows) -> Rows:
            pointer = piece.tensor.data_ptr()
            if pointer not in copies or not pointer:
                copies[pointer] = piece.tensor.detach().to("cpu", copy=True)
            return piece._replace(tensor=copies[pointer])

        weights, state = ({name: copy(piece) for name, piece in kept.items()} for kept in (self.weights, self.state))
        return replace(self, weights=weights, state=state)

    def nbytes(self) -> int:
        """Bytes of `copied`."""
        pieces = [*self.weights.values(), *self.state.values()]
        return sum({piece.tensor.data_ptr(): piece.tensor.nbytes for piece in pieces}.values())


def write_checkpoint(snapshot: Snapshot, folder: Path, keep: int) -> None:
    """Writes a checkpoint, together with all other ranks, points `latest` at it and removes old ones.

    A kill at any moment leaves the run's folder with a whole newest checkpoint. As many as `keep` stay there (0 = all),
    the newest, and what progress.json says is the best.
    """
    parallel, aside = snapshot.parallel, aside_of(folder)
    try:
        parallel.run_on_rank_zero(lambda: _write_files(snapshot.files, begin_folder(folder)))
        parallel.raise_together(lambda: _lay_out(snapshot, aside))
        parallel.raise_together(lambda: _write_rows(snapshot, aside))
        gathered = parallel.gather(parallel.raise_together(lambda: _seal(snapshot, aside)))
        digests = {name: sha256 for own in gathered for name, sha256 in own.items()}
        parallel.run_on_rank_zero(lambda: _publish(folder, digests, keep))
    except BaseException:
        if parallel.is_main:
            abandon_folder(folder)
        raise


def _write_files(files: Mapping[str, bytes], aside: Path) -> None:
    (aside / "state").mkdir()
    for name, content in files.items():
        (aside / name).write_bytes(content)


def _files(snapshot: Snapshot) -> dict[str, tuple[Specs, Mapping[str, Rows]]]:
    """This model-parallel rank's files: the tensors of each, and the rows of them that are here."""
    part = f"{snapshot.parallel.model_rank:02d}-of-{snapshot.parallel.model_size:02d}"
    weights = {f"llma.{name}": rows for name, rows in snapshot.weights.items()}
    rounded = {name: TensorSpec(rows.shape, snapshot.dtype) for name, rows in weights.items()}
    state = {name: TensorSpec(rows.shape, rows.tensor.dtype) for name, rows in snapshot.state.items()}
    return {
        f"consolidated.{part}.model.pth": (rounded, weights),
        f"state/training-{part}.safetensors": (state, snapshot.state),
    }


def _lay_out(snapshot: Snapshot, aside: Path) -> None:
    parallel = snapshot.parallel
    rng = f"rng-{parallel.rank:05d}-of-{parallel.world_size:05d}.safetensors"
    save_file({name: tensor.cpu() for name, tensor in snapshot.rng.items()}, aside / "state" / rng)
    if parallel.data_rank == 0:
        for name, (specs, _) in _files(snapshot).items():
            lay_out(aside / name, specs)


def _write_rows(snapshot: Snapshot, aside: Path) -> None:
    """Writes this rank's rows, rounded one tensor at a time, and its turn of what every data-parallel rank has."""
    turns = [0] * snapshot.parallel.data_size
    for file_name, (specs, tensors) in _files(snapshot).items():
        with contextlib.closing(TensorFile(aside / file_name, specs)) as file:
            for name, (tensor, first, _, shared) in tensors.items():
                if shared:
                    turn = turns.index(min(turns))
                    turns[turn] += tensor.nbytes
                    if turn != snapshot.parallel.data_rank:
                        continue
                file.write(name, tensor.detach().to("cpu", specs[name].dtype), first)


def _seal(snapshot: Snapshot, aside: Path) -> dict[str, str]:
    """Completes this model-parallel rank's files, once every rank has written. Returns their SHA-256."""
    files = {} if snapshot.parallel.data_rank else _files(snapshot)
    for name, (specs, _) in files.items():
        with contextlib.closing(TensorFile(aside / name, specs)) as file:
            file.seal()
    return {name: digest_of(aside / name) for name in files}


def _publish(folder: Path, digests: Mapping[str, str], keep: int) -> None:
    finish_folder(folder, digests)
    run = folder.parent
    write_text_whole(run / "latest", folder.name + "\n")
    # One with more steps can be there: a kill between the two lines above leaves it, and the run went on from before.
    found, best = checkpoints(run), (_progress(folder).get("best") or {}).get("step")
    others = [path for step, path in found if path != folder and step != best]
    for old in others[: max(0, len(found) - keep)] if keep else []:
        remove_folder(old)


class Saver:
    """Writes checkpoints while training goes on, one at a time.

    A copy is taken while the next step's forward and backward passes run, on a GPU in a stream of its own; only its
    update has to wait for that.
    """

    def __init__(self) -> None:
        self._copied = threading.Event()
        self._saving: Future[Path] | None = None

    def start(self, snapshot: Snapshot, folder: Path, keep: int) -> None:
        """Begins to write; `wait_for_copy` before anything in `snapshot` changes. No other one may be under way."""
        assert self._saving is None
        self._copied.clear()
        stream: Any = None
        if any(device_type(rows.tensor) == "cuda" for rows in snapshot.weights.values()):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())  # for the update, and for nothing that comes after it

        def work() -> Path:
            try:
                with torch.cuda.stream(stream):
                    copy = snapshot.copied()
            finally:
                self._copied.set()
            write_checkpoint(copy, folder, keep)
            return folder

        self._saving = in_background(work)

    def wait_for_copy(self) -> None:
        """Returns once the tensors being saved may change."""
        if self._saving is not None:
            self._copied.wait()

    def finished(self, wait: bool) -> Path | None:
        """The checkpoint that became whole since it was last asked, if any; its error is raised here. `wait`: for the
        one under way."""
        if self._saving is None or not (wait or self._saving.done()):
            return None
        saving, self._saving = self._saving, None
        return saving.result()


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """The run's whole checkpoints with their steps, oldest first. One that does not say its step is none of them."""
    found = ((saved_step(path), path) for path in run.glob("epoch*"))
    return sorted((step, path) for step, path in found if step is not None)


def saved_step(checkpoint: Path) -> int | None:
    """How many steps a checkpoint has done; None if it does not say so, or no more."""
    step = _progress(checkpoint).get("step")
    return step if type(step) is int and step >= 0 else None


def _progress(checkpoint: Path) -> dict[str, Any]:
    try:
        return read_object(checkpoint / "state" / "progress.json")
    except UserError:
        return {}


def free_bytes(folder: Path) -> int:
    """Free space on the disk a folder is, or will be, on."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def needed_bytes(saved: int, trained: int, tensors: int, dtype: torch.dtype) -> int:
    """Size of one checkpoint without its tokenizer, a little more than it will be.

    Of each parameter that trains there are AdamW's two moments, and a master where the saved weights, of type `dtype`,
    are rounded; names of tensors take room as well.
    """
    masters = 0 if dtype == torch.float32 else 4
    return saved * dtype.itemsize + trained * (8 + masters) + tensors * (1 << 10) + (1 << 15)
