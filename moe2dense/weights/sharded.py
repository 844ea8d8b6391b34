"""Tensors that are spread over processes, each of which writes and reads its own part: safetensors files by torch.distributed.checkpoint.

Nothing is pickled: where a part lies in its tensor stands in the header of its file. What several processes wrote is read by any number.
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save


def save_sharded(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write tensors to a new folder; every process calls it with the same names. A number without dimensions gets one."""
    flat = {name: value.reshape(1) if value.dim() == 0 else value for name, value in tensors.items()}
    save(flat, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))


def sharded_sizes(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return the whole size and the type of every tensor in a folder."""
    known = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: (entry.size, entry.properties.dtype) for name, entry in known.items()}  # type: ignore[union-attr]


def load_sharded(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a folder, whole, on the CPU. One process alone may call it."""
    tensors = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in sharded_sizes(folder).items()}
    load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    return tensors


def load_into(tensors: dict[str, Tensor], folder: Path) -> None:
    """Fill tensors, spread or not, from a folder; every process calls it with the same names and reads its own parts."""
    load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)))
