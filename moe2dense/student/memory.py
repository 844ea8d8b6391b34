"""Freed memory, handed back to the system.

glibc serves blocks of up to 32 MB, the size of many weights and activations, from a heap that it shortens only from its end: layer after
layer leaves holes there, and a process that holds one layer at a time grows by about one layer each (malloc(3), mallopt(3)).
"""

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of malloc.h
_USUAL, _CLOSE = (
    32 << 20,
    1 << 20,
)  # bytes: where glibc's own, growing threshold ends, and the one of a build that is short of memory


@functools.cache
def _glibc() -> Any:
    try:
        library = ctypes.CDLL(None)
        return library if library.malloc_trim and library.mallopt else None
    except (OSError, AttributeError, TypeError):  # another C library, which needs none of this or offers no way
        return None


def release_freed_memory() -> None:
    """Return what was freed to the system, where the C library does not do that by itself."""
    if _glibc() is not None:
        _glibc().malloc_trim(0)


@contextmanager
def eager_release(wanted: bool = True) -> Iterator[None]:
    """Within the context freed blocks of over 1 MB go back to the system at once, which costs their pages being made anew."""
    library = _glibc() if wanted else None
    if library is None:
        yield
        return
    library.mallopt(_MMAP_THRESHOLD, _CLOSE)
    try:
        yield
    finally:
        library.mallopt(_MMAP_THRESHOLD, _USUAL)
        library.mallopt(_TRIM_THRESHOLD, 2 * _USUAL)
        library.malloc_trim(0)


def free_bytes(device: torch.device) -> int:
    """What a CUDA device has left, and what torch holds of it without use."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def device_with_room(wanted: torch.device | str, need: int) -> torch.device:
    """`wanted`, or the CPU where it is a CUDA device with less than `need` bytes left."""
    wanted = torch.device(wanted)
    return torch.device("cpu") if wanted.type == "cuda" and free_bytes(wanted) < need else wanted
