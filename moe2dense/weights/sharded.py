"""Tensors that are spread over processes, each of which writes and reads its own part: safetensors files by torch.distributed.checkpoint.

Nothing is pickled: where a part lies in its tensor stands in the header of its file. What several processes wrote is read by any number.
"""

import contextlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, wait
from pathlib import Path

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.tensor import DTensor

FILE_BYTES = 512_000_000  # a file is put together in memory before it is written, so that a part is written as several


def save_sharded(tensors: dict[str, Tensor], folder: Path, group: dist.ProcessGroup) -> Future[None]:
    """Begin to write tensors to a new folder; every process calls it with the same names. A number without dimensions gets one.

    The tensors are copied to the CPU first and may change afterwards; while they are written FILE_BYTES more are held, or one tensor's.
    What is returned is done on the first process once every process has written its part. group: of all processes, on gloo; one save at a
    time talks in it.
    """
    flat = {name: value.reshape(1) if value.dim() == 0 else value for name, value in tensors.items()}
    writer = HuggingFaceStorageWriter(str(folder), file_numbers(flat), save_distributed=True)
    saving = async_save(flat, storage_writer=writer, process_group=group)
    assert isinstance(saving, Future)
    return saving


def file_numbers(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Return in which of its files, from 1 on, a process writes each tensor, so that none is larger than FILE_BYTES or one tensor."""
    numbers, number, size = {}, 1, 0
    for name, value in tensors.items():
        own = (value.to_local() if isinstance(value, DTensor) else value).nbytes
        if size and size + own > FILE_BYTES:
            number, size = number + 1, 0
        numbers[name], size = number, size + own
    return numbers


def wait_for_saves(saves: Iterable[Future[None]]) -> None:
    """Return once all saves have ended. Raises what kept a process from writing its part, on every process."""
    for save in wait(saves).done:
        with _first_failure():
            save.result()


@contextlib.contextmanager
def _first_failure() -> Iterator[None]:
    """Raise what went wrong in one of the processes instead of torch's collection, which is no Exception."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


def sharded_sizes(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return the whole size and the type of every tensor in a folder."""
    known = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: (entry.size, entry.properties.dtype) for name, entry in known.items()}  # type: ignore[union-attr]


def load_sharded(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a folder, whole, on the CPU. One process alone may call it."""
    tensors = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in sharded_sizes(folder).items()}
    with _first_failure():
        load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    return tensors


def load_into(tensors: dict[str, Tensor], folder: Path) -> None:
    """Fill tensors, spread or not, from a folder; every process calls it with the same names and reads its own parts."""
    with _first_failure():
        load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)))
