"""Give freed memory back to the system.

glibc serves blocks of up to 32 MB, the size of many weights and activations, from a heap that it shortens only from its end.
Building layer after layer leaves holes there, so a process that holds one layer at a time grows by about one layer each time
(malloc(3), mallopt(3)).
"""

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of malloc.h
# bytes: where glibc's own growing threshold ends, and the threshold of a build that is short of memory
_USUAL, _EAGER = 32 << 20, 1 << 20


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    """Return the C library where it is glibc, else None: others need none of this, or offer no way."""
    try:
        library = ctypes.CDLL(None)
        return library if library.malloc_trim and library.mallopt else None
    except (OSError, AttributeError, TypeError):
        return None


def release_freed_memory() -> None:
    """Return freed memory to the system, where the C library does not do that by itself."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


@contextmanager
def eager_release(wanted: bool = True) -> Iterator[None]:
    """Return freed blocks of over 1 MB to the system at once within the context; their pages must then be made anew."""
    library = _glibc() if wanted else None
    if library is None:
        yield
        return
    library.mallopt(_MMAP_THRESHOLD, _EAGER)
    try:
        yield
    finally:
        library.mallopt(_MMAP_THRESHOLD, _USUAL)
        library.mallopt(_TRIM_THRESHOLD, 2 * _USUAL)
        library.malloc_trim(0)
