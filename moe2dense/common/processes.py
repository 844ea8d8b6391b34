"""Several processes share a text: each streams its own blocks, and the sums are added up. Under torchrun or accelerate launch."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from moe2dense.errors import UserError


def world() -> tuple[int, int]:
    """(rank, processes); (0, 1) when torch.distributed is not set up."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def my_share(blocks: int) -> slice:
    """The contiguous rows of `blocks` that this process streams; shares differ by one at most."""
    return share_of(blocks, *world())


def share_of(blocks: int, rank: int, processes: int) -> slice:
    """The contiguous rows of `blocks` that process `rank` streams."""
    return slice(blocks * rank // processes, blocks * (rank + 1) // processes)


def _device() -> torch.device:
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def gather_rows(rows: Tensor) -> Tensor:
    """Rows of all processes in order of rank, on every one; processes may hold different numbers of rows."""
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


@contextlib.contextmanager
def processes() -> Iterator[int]:
    """The rank of this process among those that torchrun started, which know each other inside; 0 when it is alone."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield world()[0]
        return
    dist.init_process_group("gloo")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def from_first(work: Callable[[], Any]) -> Any:
    """What `work` returns on rank 0, on every process; a UserError that it raises there is raised on all."""
    rank, processes = world()
    if processes == 1:
        return work()
    found: list[Any] = [None, ""]
    if rank == 0:
        try:
            found[0] = work()
        except UserError as error:
            found[1] = str(error)
    dist.broadcast_object_list(found)
    if found[1]:
        raise UserError(found[1])
    return found[0]


def process() -> tuple[int, int]:
    """(rank, number of processes) of this one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
