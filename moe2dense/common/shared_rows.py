"""Rows that several processes share: each has some of them, and sums, means and picks are those of all.

Every function here is called by all processes that have joined, in the same order. A process that runs alone has all rows, and
its numbers are those that it would have without this module, to the last digit.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

from moe2dense.common.processes import add_over_processes, gather_objects, on_exchange, world


@dataclass(frozen=True)
class Share:
    """The rows that this process has of a whole: `own` of `total`, from row `start` of the whole on."""

    start: int
    own: int
    total: int

    def pick(self, index: Tensor) -> Tensor:
        """Return those of `index`, rows of the whole, that are here, as numbers of this process's rows."""
        here = index - self.start
        return here[(here >= 0) & (here < self.own)]

    def of_first(self, count: int) -> int:
        """Return how many of the first `count` rows of the whole are here."""
        return max(0, min(self.own, count - self.start))


def share_of_rows(own: int) -> Share:
    """Return what `own` rows are of those of all processes, which are in order of rank."""
    counts = gather_objects(own)
    return Share(sum(counts[: world()[0]]), own, sum(counts))


def any_row(mask: Tensor) -> bool:
    """Return whether a mask is true for any row of any process."""
    return any(gather_objects(bool(mask.any())))


def mean_of_rows(values: Tensor) -> Tensor:
    """Return the mean of `values` over the rows of all processes, where `values` is; summed in float64 where there are several."""
    if world()[1] == 1:
        return values.mean()
    sums = torch.stack([values.double().sum(), values.new_tensor(values.numel(), dtype=torch.float64)])
    add_over_processes(sums)
    return (sums[0] / sums[1]).to(values)


def from_first_process(compute: Callable[[], Tensor], like: Tensor) -> Tensor:
    """Return what rank 0 computes, a tensor of the shape, kind and device of `like`, on every process.

    For what is not worth sharing, or where each must have the very same: a solution, or a choice that rounding could turn.
    """
    rank, processes = world()
    if processes == 1:
        return compute()
    value = compute().to(like) if rank == 0 else torch.empty_like(like)
    return same_as_first(value)


def same_as_first(value: Tensor) -> Tensor:
    """Return rank 0's `value` on every process, where `value` is."""
    if world()[1] == 1:
        return value
    sent = on_exchange(value).contiguous()
    dist.broadcast(sent, 0)
    return sent.to(value.device)
