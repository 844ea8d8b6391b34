"""Files as tensors: a column of numbers that lies on disk, of which only what is looked at takes memory."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moe2dense.common.files import place_errors

_NUMPY = {torch.int32: np.int32, torch.uint8: np.uint8, torch.bool: np.bool_}


def mapped_file(path: Path, dtype: torch.dtype, count: int) -> Tensor:
    """Return the first `count` numbers of a file [count], mapped; the file is never written through it."""
    if count == 0:
        return torch.zeros(0, dtype=dtype)
    return torch.from_numpy(np.memmap(path, _NUMPY[dtype], mode="c", shape=(count,)))


def empty_map(shape: Sequence[int], dtype: torch.dtype, folder: Path) -> Tensor:
    """Return a tensor of zeros in a new file in `folder`; the file goes with the tensor, also when the process is killed.

    Raises UserError where the folder cannot be written or is full.
    """
    if 0 in shape:
        return torch.zeros(*shape, dtype=dtype)
    size = int(np.prod(shape)) * np.dtype(_NUMPY[dtype]).itemsize
    with place_errors(folder), tempfile.TemporaryFile(dir=folder) as file:  # the mapping outlives the name
        os.posix_fallocate(file.fileno(), 0, size)  # a full disk is said here, not while it is written to
        return torch.from_numpy(np.memmap(file, _NUMPY[dtype], mode="r+", shape=tuple(shape)))
