"""Identify the weights and the text that a result came from, without reading a large checkpoint whole."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

import torch
import xxhash
from torch import Tensor

from moe2dense.errors import UserError
from moe2dense.weights.checkpoint import Checkpoint, TensorInfo

TENSORS = 4096  # of a checkpoint that are sampled, evenly over their sorted names
VALUES = 64  # of a tensor that are read, at its start and again at its middle


def checkpoint_fingerprint(folder: str | Path) -> str:
    """Return 32 hex digits of a safetensors checkpoint's content: every tensor's name and shape, and values of a sample of them.

    Values are rounded to bfloat16 first, so that neither another sharding nor a copy in float32 changes it. Reads a
    megabyte at most beside the headers. Raises UserError where the folder holds no whole safetensors checkpoint.
    """
    tensors = Checkpoint(folder).tensors
    names = sorted(tensors)
    digest = xxhash.xxh3_128()
    for name in names:
        digest.update(f"{name} {tensors[name].shape}\n".encode())
    for i in range(min(TENSORS, len(names))):
        info = tensors[names[i * len(names) // min(TENSORS, len(names))]]
        for value in _values(info):
            digest.update(value.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tensors_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Return 32 hex digits of tensors in memory: every name and shape, and values of a sample of them, rounded to bfloat16."""
    names = sorted(tensors)
    digest = xxhash.xxh3_128()
    for name in names:
        digest.update(f"{name} {tuple(tensors[name].shape)}\n".encode())
    for i in range(min(TENSORS, len(names))):
        values = tensors[names[i * len(names) // min(TENSORS, len(names))]].detach().flatten()
        for first in (0, len(values) // 2):
            sample = values[first : first + VALUES].to("cpu", torch.bfloat16)
            digest.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _values(info: TensorInfo) -> list[Tensor]:
    """Read a few values from the start and the middle; floating point as bfloat16."""
    size = info.dtype.itemsize
    count = min(VALUES, info.nbytes // size)
    values = []
    try:
        with info.file.open("rb") as file:
            for first in (0, info.nbytes // size // 2):
                file.seek(info.start + first * size)
                raw = file.read(min(count, info.nbytes // size - first) * size)
                value = torch.frombuffer(bytearray(raw), dtype=info.dtype) if raw else torch.empty(0)
                values.append(value.to(torch.bfloat16) if value.is_floating_point() and size > 1 else value)
    except OSError as error:
        raise UserError(f"checkpoint file {info.file} cannot be read: {error.strerror}") from error
    return values


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weight_hashes(files: Iterable[str | Path]) -> dict[str, str]:
    """Return the SHA-256 of every weight file among `files`, by file name."""
    suffixes = (".safetensors", ".gguf")
    return {Path(f).name: file_sha256(f) for f in files if str(f).endswith(suffixes) and os.path.isfile(f)}


class Hashed(Protocol):
    """A text in blocks, each of which has a hash of its contents (`moe2dense.data.blocks.Blocks`)."""

    def keys(self) -> list[str]:
        """Return a content hash per block."""
        ...


def text_hash(blocks: Hashed) -> str:
    """Return 32 hex digits of the blocks' contents in their order."""
    return xxhash.xxh3_128_hexdigest("".join(blocks.keys()).encode())
