"""Hold hidden states: in memory while they fit, memory-mapped beyond that, and in memory that is used again."""

import contextlib
import math
import mmap
import os
import shutil
import tempfile
import weakref
from pathlib import Path

import torch
from torch import Tensor

from moe2dense.common.units import show_bytes
from moe2dense.errors import UserError


class SpillFolder:
    """Holds files for what does not fit in memory; removed with the object. Raises UserError when the disk is full."""

    def __init__(self, folder: str | Path | None = None):
        self.base = Path(folder) if folder else Path(tempfile.gettempdir())
        self._folder: Path | None = None

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype, what: str) -> "SpilledTensor":
        """Return a memory-mapped tensor, its space reserved first so that a full disk is an error here and not a crash later."""
        nbytes = math.prod(shape) * dtype.itemsize
        try:
            if self._folder is None:
                self._folder = Path(tempfile.mkdtemp(prefix="moe2dense-", dir=self.base))
                weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
            fd, name = tempfile.mkstemp(dir=self._folder)
        except OSError as error:
            raise UserError(f"no file can be made in {self.base} to spill {what}: {error.strerror}") from error
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(fd, 0, nbytes)
            else:
                if shutil.disk_usage(self._folder).free < nbytes:
                    raise OSError(28, "No space left on device")
                os.truncate(fd, nbytes)
            mapped = mmap.mmap(fd, nbytes)
        except OSError as error:
            raise UserError(
                f"{what} needs {show_bytes(nbytes)} in {self._folder} beyond the memory budget, and the file cannot be made: "
                f"{error.strerror}; free some disk, set TMPDIR to a larger one, or raise memory"
            ) from error
        finally:
            os.close(fd)
            os.unlink(name)  # the mapping keeps the file alive, and nothing is left behind whatever happens
        return SpilledTensor(mapped, shape, dtype)


class SpilledTensor:
    """A tensor over a memory-mapped file; `release` gives its pages back (the file keeps the contents)."""

    def __init__(self, mapped: mmap.mmap, shape: tuple[int, ...], dtype: torch.dtype):
        self._mapped = mapped
        self.tensor: Tensor = torch.frombuffer(mapped, dtype=dtype).view(shape)

    def release(self) -> None:
        """Drop the pages from this process's memory."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._mapped.madvise(mmap.MADV_DONTNEED)


class Arena:
    """Named buffers within a byte budget: on `device` while they fit, in `ram` bytes of this machine's memory beside it, then on disk."""

    def __init__(self, budget: int, device: torch.device, spill: SpillFolder, ram: int = 0):
        self.budget, self.device, self.spill, self.ram = budget, device, spill, ram
        self.used = self.used_ram = 0
        self.spilled: dict[str, SpilledTensor] = {}
        self._buffers: dict[str, Tensor] = {}

    def buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return the buffer `name`, allocated at first use and reused after that (its contents are whatever was there)."""
        if name in self._buffers and self._buffers[name].shape == shape and self._buffers[name].dtype == dtype:
            return self._buffers[name]
        assert name not in self._buffers, f"buffer {name} changed its shape"
        nbytes = math.prod(shape) * dtype.itemsize
        if self.used + nbytes <= self.budget:
            self.used += nbytes
            self._buffers[name] = torch.empty(shape, dtype=dtype, device=self.device)
        elif self.used_ram + nbytes <= self.ram:
            self.used_ram += nbytes
            self._buffers[name] = host_memory(nbytes, for_gpu=True).view(dtype).view(shape)
        else:
            self.spilled[name] = self.spill.tensor(shape, dtype, f"spilling the buffer {name!r}")
            self._buffers[name] = self.spilled[name].tensor
        return self._buffers[name]

    def release(self) -> None:
        """Drop every spilled buffer's pages from memory."""
        for item in self.spilled.values():
            item.release()


def host_memory(nbytes: int, for_gpu: bool) -> Tensor:
    """Return memory [nbytes] uint8; for a GPU it is pinned where the system allows, so that it is copied without the CPU's help."""
    if for_gpu:
        with contextlib.suppress(RuntimeError):
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    return torch.empty(nbytes, dtype=torch.uint8)


class Scratch:
    """Memory that is used again and again, by name: fresh memory costs a page fault every 4 KB, a fifth of an expert's time."""

    def __init__(self):
        self._memory: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a tensor with whatever was there, over the memory that `name` had before where that is large enough."""
        n, memory = math.prod(shape), self._memory.get(name)
        if memory is None or memory.numel() < n or memory.dtype != dtype or memory.device != device:
            memory = self._memory[name] = torch.empty(n, dtype=dtype, device=device)
        return memory[:n].view(shape)
