"""Read any tensor of a safetensors checkpoint, or a slice of its first axis, by its byte range and on demand.

Headers are read once and checked against the files before anything else runs. Reads go through `preadv` into a buffer, with the
kernel's readahead switched off and, for models larger than memory, the pages given back: a mapped file would read up to twice the
bytes that are asked for. Nothing is ever written.
"""

import itertools
import json
import math
import os
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe2dense.common.counters import count_disk
from moe2dense.errors import UserError
from moe2dense.weights.files import GGUF_SUFFIX, WeightFiles, weight_files
from moe2dense.weights.gguf_file import tensor_entries

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
_MAX_HEADER = 100_000_000  # the safetensors format's own bound
_COMPARED_AT_ONCE = 1 << 24  # bytes
_PREADV = hasattr(os, "preadv")
_FADVISE = hasattr(os, "posix_fadvise")


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: absolute byte offset `start` in `file`."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int
    packing: str = ""  # of GGUF: the type of its blocks, whose bytes the last dimension counts

    @property
    def row_bytes(self) -> int:
        """Return the bytes of one entry of the first axis."""
        return self.nbytes // self.shape[0] if self.shape and self.shape[0] else self.nbytes


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    """Return (header, offset of the data, file size). Raises UserError naming the file."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8 or length > min(_MAX_HEADER, size - 8):
                raise UserError(
                    f"checkpoint file {path} is not a safetensors file: its header claims {length} bytes "
                    f"and the file has {size}; download it again"
                )
            text = file.read(length)
    except OSError as error:
        raise UserError(f"checkpoint file {path} cannot be read: {error.strerror}") from error
    try:
        header = json.loads(text)
        assert isinstance(header, dict)
    except (ValueError, AssertionError, RecursionError) as error:
        raise UserError(f"checkpoint file {path} has a damaged header; download it again") from error
    return header, 8 + length, size


def _tensor_info(path: Path, name: str, entry: Any, base: int, size: int) -> TensorInfo:
    """Return one entry of a header, checked against the file's `size`. Raises UserError naming file and tensor."""
    try:
        tag, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if any(type(n) is not int or n < 0 for n in shape) or type(start) is not int or type(stop) is not int:
            raise TypeError
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"checkpoint file {path}: the header's entry for tensor {name!r} is damaged") from error
    if not isinstance(tag, str) or tag not in DTYPES:
        known = ", ".join(DTYPES)
        raise UserError(f"checkpoint file {path}: tensor {name!r} has dtype {tag!r}, which is not one of {known}")
    wanted = math.prod(shape) * DTYPES[tag].itemsize
    if start < 0 or stop - start != wanted:
        raise UserError(
            f"checkpoint file {path}: tensor {name!r} of shape {list(shape)} and dtype {tag} needs {wanted} bytes, "
            f"its header says {stop - start}"
        )
    if base + stop > size:
        raise UserError(
            f"checkpoint file {path} is truncated: tensor {name!r} ends at byte {base + stop} and the file has {size}; "
            "download it again"
        )
    return TensorInfo(name, path, DTYPES[tag], shape, base + start, wanted)


def read_header(path: str | Path) -> dict[str, TensorInfo]:
    """Read the header of one safetensors file: its tensors, every offset checked against the file. Raises UserError naming file and tensor."""
    path = Path(path)
    if path.suffix == GGUF_SUFFIX:
        return _gguf_header(path)
    header, base, size = _header(path)
    tensors = {n: _tensor_info(path, n, e, base, size) for n, e in header.items() if n != "__metadata__"}
    ordered = sorted(tensors.values(), key=lambda t: t.start)
    for before, after in itertools.pairwise(ordered):
        if after.start < before.start + before.nbytes:
            raise UserError(f"checkpoint file {path}: tensors {before.name!r} and {after.name!r} overlap")
    return tensors


def _gguf_header(path: Path) -> dict[str, TensorInfo]:
    """Read the header of a GGUF file. Raises UserError naming file and tensor."""
    size, tensors = path.stat().st_size, {}
    for name, dtype, shape, start, count, packing in tensor_entries(path):
        if start + count > size:
            raise UserError(
                f"checkpoint file {path} is truncated: tensor {name!r} ends at byte {start + count} and the file has {size}; "
                "download it again"
            )
        tensors[name] = TensorInfo(name, path, dtype, shape, start, count, packing)
    return tensors


def _all_tensors(source: WeightFiles) -> dict[str, TensorInfo]:
    """Return where every tensor of a folder lies.

    Raises UserError for what is missing or damaged, and for a tensor that two files hold with different values.
    """
    tensors: dict[str, TensorInfo] = {}
    for path in source.files:
        for name, info in read_header(path).items():
            other = tensors.get(name)
            if other is not None and not same_values(other, info):
                raise UserError(
                    f"checkpoint {source.folder}: {other.file.name} and {path.name} both hold tensor {name!r}, with different values; "
                    "download it again"
                )
            tensors[name] = info
    for name, file in (source.weight_map or {}).items():
        info = tensors.get(name)
        if info is None or info.file.name != Path(file).name:
            raise UserError(f"checkpoint file {source.folder / file}: tensor {name!r}, named in the index, is missing")
    return tensors


def same_values(a: TensorInfo, b: TensorInfo) -> bool:
    """Return whether two tensors on disk have the same dtype, shape and bytes."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    try:
        with a.file.open("rb") as first, b.file.open("rb") as second:
            first.seek(a.start)
            second.seek(b.start)
            for left in range(a.nbytes, 0, -_COMPARED_AT_ONCE):
                count = min(left, _COMPARED_AT_ONCE)
                if first.read(count) != second.read(count):
                    return False
    except OSError as error:
        raise UserError(f"checkpoint file {a.file} or {b.file} cannot be read: {error.strerror}") from error
    return True


def _close_all(files: dict[Path, int]) -> None:
    """Close these file descriptors and forget them."""
    while files:
        os.close(files.popitem()[1])


class Checkpoint:
    """The tensors of a safetensors folder by name, read on demand and from any thread.

    `drop_pages` gives pages back to the kernel after each read (for models larger than memory). `bytes_read` counts what was asked for.
    Raises UserError naming file and tensor for anything missing, truncated or damaged.
    """

    def __init__(self, folder: str | Path, drop_pages: bool = False):
        self.folder = Path(folder)
        self.drop_pages = drop_pages
        self.bytes_read = 0
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()
        weakref.finalize(self, _close_all, self._files)  # at the latest before the interpreter takes its modules apart
        self.files = weight_files(self.folder)
        self.tensors = _all_tensors(self.files)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors.values())

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        with self._lock:
            _close_all(self._files)

    def __getitem__(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise UserError(f"checkpoint {self.folder}: tensor {name!r} is missing")
        return self.tensors[name]

    def _open(self, path: Path, name: str) -> int:
        """Return the descriptor of a file, opened at first use. Raises UserError naming the tensor `name`."""
        with self._lock:
            if path not in self._files:
                try:
                    fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
                except OSError as error:
                    raise UserError(
                        f"checkpoint file {path}, which holds tensor {name!r}, cannot be opened: {error.strerror}"
                    ) from error
                if _FADVISE:
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
                self._files[path] = fd
            return self._files[path]

    def _fill(self, view: memoryview, info: TensorInfo, offset: int) -> None:
        """Read from `offset` of a tensor's file until `view` is full. Raises UserError naming file and tensor."""
        fd, done = self._open(info.file, info.name), 0
        if os.fstat(fd).st_nlink == 0:  # the open descriptor would hide it
            raise UserError(f"checkpoint file {info.file} was deleted or replaced before tensor {info.name!r} was read")
        while done < len(view):
            try:
                if _PREADV:
                    got = os.preadv(fd, [view[done:]], offset + done)
                else:
                    with self._lock:
                        os.lseek(fd, offset + done, os.SEEK_SET)
                        data = os.read(fd, len(view) - done)
                    got = len(data)
                    view[done : done + got] = data
            except OSError as error:
                raise UserError(
                    f"checkpoint file {info.file}: reading tensor {info.name!r} failed: {error.strerror}"
                ) from error
            if got == 0:
                raise UserError(
                    f"checkpoint file {info.file} ended inside tensor {info.name!r}: it changed while in use"
                )
            done += got
        if self.drop_pages and _FADVISE:
            os.posix_fadvise(fd, offset, len(view), os.POSIX_FADV_DONTNEED)
        self.bytes_read += len(view)
        count_disk(len(view))

    def read(self, name: str, start: int = 0, stop: int | None = None, buffer: Tensor | None = None) -> Tensor:
        """Read tensor `name`, or entries [start, stop) of its first axis, in its stored dtype.

        `buffer`: uint8 tensor to read into; the result is a view of its head. Without one, fresh memory is used.
        """
        info = self[name]
        if not info.shape:
            shape, offset, count = (), info.start, info.nbytes
        else:
            stop = info.shape[0] if stop is None else stop
            assert 0 <= start <= stop <= info.shape[0], (name, start, stop, info.shape)
            shape, offset = (stop - start, *info.shape[1:]), info.start + start * info.row_bytes
            count = (stop - start) * info.row_bytes
        raw = torch.empty(count, dtype=torch.uint8) if buffer is None else buffer[:count]
        assert raw.numel() == count, (name, count, raw.numel())
        if count:
            self._fill(memoryview(raw.numpy().data), info, offset)
        return raw.view(info.dtype).view(shape)
