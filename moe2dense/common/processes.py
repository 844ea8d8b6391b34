"""Several processes share a text: each streams its own blocks, and the sums are added up.

They are started by torchrun or `accelerate launch`. A process that runs alone is rank 0 of 1, and nothing here does anything.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from moe2dense.errors import UserError

T = TypeVar("T")


def joined() -> bool:
    """Return whether torch.distributed is set up, so that this process can talk to others."""
    return dist.is_available() and dist.is_initialized()


def world() -> tuple[int, int]:
    """Return (rank, number of processes) among those that have joined; (0, 1) when torch.distributed is not set up."""
    return (dist.get_rank(), dist.get_world_size()) if joined() else (0, 1)


def launched() -> tuple[int, int]:
    """Return (rank, number of processes) among those that were launched together, whether or not they have joined yet."""
    return world() if joined() else (int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


@contextlib.contextmanager
def join_processes() -> Iterator[int]:
    """Let the processes that were launched together talk to each other within the context; yield the rank of this one."""
    if launched()[1] == 1 or joined():
        yield world()[0]
        return
    dist.init_process_group("gloo")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def wait_for_all() -> None:
    """Return once every process has come here."""
    if world()[1] > 1:
        dist.barrier()


def share_of(blocks: int, rank: int, processes: int) -> slice:
    """Return the contiguous rows of `blocks` that process `rank` streams; shares differ by one at most."""
    return slice(blocks * rank // processes, blocks * (rank + 1) // processes)


def my_share(blocks: int) -> slice:
    """Return the contiguous rows of `blocks` that this process streams."""
    return share_of(blocks, *world())


def _device() -> torch.device:
    """Return the device whose tensors the processes can exchange."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def gather_rows(rows: Tensor) -> Tensor:
    """Return the rows of all processes in order of rank, on every one; processes may hold different numbers of rows."""
    _, processes = world()
    if processes == 1:
        return rows
    counts = [torch.zeros(1, dtype=torch.int64, device=_device()) for _ in range(processes)]
    dist.all_gather(counts, torch.tensor([len(rows)], device=_device()))
    most = max(int(c) for c in counts)
    padded = torch.zeros(most, *rows.shape[1:], dtype=rows.dtype, device=_device())
    padded[: len(rows)] = rows.to(_device())
    parts = [torch.empty_like(padded) for _ in range(processes)]
    dist.all_gather(parts, padded)
    return torch.cat([p[: int(c)] for p, c in zip(parts, counts, strict=True)]).to(rows.device)


def add_over_processes(value: Tensor) -> None:
    """Replace `value` by its sum over all processes, in place and on every one."""
    if world()[1] > 1:
        total = value.to(_device())
        dist.all_reduce(total)
        value.copy_(total)


def from_first(work: Callable[[], T]) -> T:
    """Return on every process what `work` returns on rank 0; a UserError that it raises there is raised on all."""
    rank, processes = world()
    if processes == 1:
        return work()
    message: list = [None, ""]  # the result and the text of the error
    if rank == 0:
        try:
            message[0] = work()
        except UserError as error:
            message[1] = str(error)
    dist.broadcast_object_list(message)
    if message[1]:
        raise UserError(message[1])
    return message[0]
