"""Which blocks each step, process and forward pass sees: a pure function of the seed, so a run can stop anywhere."""

import functools
import math

import torch
from torch import Tensor


@functools.lru_cache(maxsize=2)
def _epoch(blocks: int, epoch: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(blocks, generator=generator)


def total_steps(blocks: int, per_step: int, epochs: float) -> int:
    """Return the whole steps in `epochs` passes over the blocks; at least one."""
    return max(1, math.floor(blocks * epochs / per_step + 1e-9))


def step_blocks(blocks: int, per_step: int, step: int, seed: int) -> list[int]:
    """Return the blocks of one optimiser step: the next ones in an endless row of shuffled passes over all blocks."""
    places = range(step * per_step, (step + 1) * per_step)
    return [int(_epoch(blocks, p // blocks, seed)[p % blocks]) for p in places]


def micro_batches(indices: list[int], rank: int, world: int, size: int) -> list[list[int]]:
    """Return one process's share of a step in forward passes of at most `size` blocks, as many on every process.

    Some may be empty where the blocks do not divide.
    """
    own = indices[rank::world]
    count = math.ceil(math.ceil(len(indices) / world) / size)
    return [own[i * size : (i + 1) * size] for i in range(count)]
