"""Several processes share a text: each streams its own blocks, and the sums are added up.

They are started by torchrun or `accelerate launch`. A process that runs alone is rank 0 of 1, and nothing here does anything.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from moe2dense.errors import UserError

T = TypeVar("T")
# what one process does while others wait for it, such as building a student, has no limit of time: a process that dies is seen by
# the launcher, which stops the others
_PATIENCE = timedelta(days=60)
_alone = False
_left: list[dist.ProcessGroup | None] = []  # groups that were left, see `leave_processes`


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Let this process act within the context as if it were the only one: what it does there, it does without the others."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def joined() -> bool:
    """Return whether torch.distributed is set up, so that this process can talk to others."""
    return not _alone and dist.is_available() and dist.is_initialized()


def world() -> tuple[int, int]:
    """Return (rank, number of processes) among those that have joined; (0, 1) when torch.distributed is not set up."""
    return (dist.get_rank(), dist.get_world_size()) if joined() else (0, 1)


def launched() -> tuple[int, int]:
    """Return (rank, number of processes) among those that were launched together, whether or not they have joined yet."""
    if joined() or _alone:
        return world()
    return (int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


@contextlib.contextmanager
def join_processes() -> Iterator[int]:
    """Let the processes that were launched together talk to each other within the context; yield the rank of this one.

    On a machine with GPUs each takes its own, by LOCAL_RANK. A launcher's only process joins too: accelerate would set up a group for the
    first training and miss it in the next.
    """
    if joined() or (launched()[1] == 1 and not _has_launcher()):
        yield world()[0]
        return
    if torch.cuda.is_available() and not os.environ.get("ACCELERATE_USE_CPU"):
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=_PATIENCE)
    else:
        os.environ["ACCELERATE_USE_CPU"] = (
            "true"  # accelerate takes several processes without GPUs for one each otherwise
        )
        dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield dist.get_rank()
    finally:
        leave_processes()


def _has_launcher() -> bool:
    """Return whether torchrun or accelerate started this process, be it the only one."""
    return not _alone and {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def leave_processes() -> None:
    """End the talk with other processes, where there is any.

    The group itself stays until this process exits. If a trained model were the last to refer to it, it would be freed with that
    model: its destructor waits for a thread while it holds Python's lock, for which that thread may be waiting (torch 2.13, Gloo).
    """
    if dist.is_available() and dist.is_initialized():
        _left.append(dist.group.WORLD)
        dist.destroy_process_group()


def writers_group() -> dist.ProcessGroup:
    """Return a new group of all processes, in which threads that write files may talk while training goes on. All processes call it."""
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    assert isinstance(group, dist.ProcessGroup), "every process is in it"
    return group


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


def on_exchange(value: Tensor) -> Tensor:
    """Return `value` on a device whose tensors the processes can exchange: where it is, if there is a way between such devices."""
    backends = dist.get_backend_config()  # "cpu:gloo,cuda:nccl"
    return value if f"{value.device.type}:" in backends else value.to(_device())


def add_over_processes(value: Tensor) -> None:
    """Replace `value` by its sum over all processes, in place and on every one."""
    if world()[1] > 1:
        total = on_exchange(value).contiguous()
        dist.all_reduce(total)
        if total is not value:
            value.copy_(total)


def over_processes(rows: int, compute: Callable[[slice], Tensor]) -> Tensor:
    """Return `compute(rows)` of all rows, to which each process adds its share; of too few rows each computes all."""
    if rows < world()[1]:
        return compute(slice(0, rows))
    return gather_rows(compute(my_share(rows)))


def gather_objects(value: T) -> list[T]:
    """Return what every process passes, in order of rank, on every one. Values are pickled."""
    _, processes = world()
    if processes == 1:
        return [value]
    values: list = [None] * processes
    dist.all_gather_object(values, value)
    return values


def from_first(work: Callable[[], T]) -> T:
    """Return on every process what `work` returns on rank 0, which does it alone; a UserError that it raises is raised on all."""
    rank, processes = world()
    if processes == 1:
        return work()
    message: list = [None, ""]  # the result and the text of the error
    if rank == 0:
        try:
            with alone():
                message[0] = work()
        except UserError as error:
            message[1] = str(error)
    dist.broadcast_object_list(message)
    if message[1]:
        raise UserError(message[1])
    return message[0]
