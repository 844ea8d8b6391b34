"""Several processes share a text: each streams its own blocks, and the sums are added up. Under torchrun or accelerate launch."""

from dataclasses import fields

import torch
from torch import Tensor
from torch import distributed as dist

from moe2dense.teacher.capture import RoutingStats


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


def reduce_stats(stats: RoutingStats) -> None:
    """Add the statistics of all processes, in place and on every one; a no-op for a single process."""
    if world()[1] == 1:
        return
    for index in sorted(stats.layers):
        layer = stats.layers[index]
        for item in fields(layer):
            value = getattr(layer, item.name)
            if value is not None:
                total = value.to(_device())
                dist.all_reduce(total)
                value.copy_(total)


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
