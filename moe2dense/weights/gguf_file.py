"""Read the header of a GGUF file: where its tensors lie, how they are packed, and of which architecture they are."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe2dense.errors import UserError, first_line

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


@lru_cache(maxsize=4)
def _reader(path: Path, _changed: int) -> Any:
    """Open a file's header. Raises UserError where `gguf` is not installed or the file cannot be read."""
    try:
        import gguf
    except ImportError:
        raise UserError(
            f"checkpoint file {path} is a GGUF file, which the package gguf reads: pip install 'moe2dense[gguf]'"
        ) from None
    try:
        return gguf.GGUFReader(path)
    except (OSError, ValueError, KeyError, IndexError, OverflowError) as error:
        raise UserError(
            f"checkpoint file {path} cannot be read as GGUF: {first_line(error)}; download it again"
        ) from error


def reader(path: Path) -> Any:
    """Return the `gguf.GGUFReader` of a file, opened anew where the file has changed."""
    try:
        return _reader(path, path.stat().st_mtime_ns)
    except OSError as error:
        raise UserError(f"checkpoint file {path} cannot be read: {error.strerror}") from error


def architecture(path: Path) -> str:
    """Return the architecture that a file names, "" where it names none."""
    field = reader(path).fields.get("general.architecture")
    return "" if field is None else bytes(field.parts[field.data[0]]).decode()


def tensor_entries(path: Path) -> list[tuple[str, torch.dtype, tuple[int, ...], int, int, str]]:
    """Return (name, dtype, shape as stored, first byte, bytes, packing) of each tensor; packing is "" for plain numbers.

    A packed tensor is uint8, and its last dimension counts the bytes of a row.
    """
    entries = []
    for tensor in reader(path).tensors:
        kind = tensor.tensor_type.name
        plain = _PLAIN.get(kind)
        sizes = tuple(int(n) for n in reversed(tensor.shape))
        if plain is None:
            sizes = (*sizes[:-1], int(tensor.n_bytes) // max(1, int(np.prod(sizes[:-1]))))
        entry = (plain or torch.uint8, sizes, int(tensor.data_offset), int(tensor.n_bytes), "" if plain else kind)
        entries.append((tensor.name, *entry))
    return entries
