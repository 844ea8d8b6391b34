"""Choose blocks to judge on from as many passages as there are: blocks of one passage tell less than as many of several."""

import torch
from torch import Tensor

from moe2dense.data.blocks import Blocks


def spread_over_passages(blocks: Blocks, count: int) -> Blocks:
    """Return `count` of the blocks, in their order, as many of each passage as of any other where it has so many.

    A block counts as its commonest passage's; those of one passage are evenly spaced. Blocks whose passages are not known
    are chosen evenly spaced.
    """
    if count >= len(blocks):
        return blocks
    if blocks.passages is None:
        return blocks[_evenly(torch.arange(len(blocks)), count)]
    owners = blocks.passages.mode(1).values
    rows = [torch.nonzero(owners == owner).flatten() for owner in owners.unique()]
    shares = level_shares([len(r) for r in rows], count)
    chosen = [_evenly(r, share) for r, share in zip(rows, shares, strict=True) if share]
    return blocks[torch.cat(chosen).sort().values]


def level_shares(sizes: list[int], count: int) -> list[int]:
    """Return how many of `count` each of several groups gives: the same of each, all of a group that has fewer.

    What is left by rounding goes to groups that are evenly spaced.
    """
    level = max(n for n in range(count + 1) if sum(min(size, n) for size in sizes) <= count)
    shares = [min(size, level) for size in sizes]
    able = torch.tensor([i for i, size in enumerate(sizes) if size > level], dtype=torch.int64)
    for i in _evenly(able, min(len(able), count - sum(shares))).tolist():
        shares[i] += 1
    return shares


def _evenly(rows: Tensor, count: int) -> Tensor:
    """Return `count` of the rows, evenly spaced."""
    return rows[[i * len(rows) // count for i in range(count)]] if count else rows[:0]
