"""Measure how much of a held-out text stands word for word in a training text too: what was learnt by heart is no test."""

import torch
from torch import Tensor

from moe2dense.data.blocks import Blocks

# N blocks, S block length, w tokens of a passage
WINDOW = 32  # tokens: no two texts share so many in a row by chance
WORTH_SAYING = 0.05  # share of the held-out text
_CHUNK = 2**20  # tokens of the training text at a time


def seen_share(held_out: Blocks, training: Blocks, window: int = WINDOW) -> float:
    """Return the share of the held-out text, in pieces of `window` tokens, that stands somewhere in the training text.

    Blocks that are shorter are compared whole.
    """
    window = min(window, held_out.input_ids.shape[1])
    factors = torch.randint(-(2**62), 2**62, (window,), generator=torch.Generator().manual_seed(0)) | 1
    pieces = held_out.input_ids.unfold(1, window, window).flatten(0, 1)  # [n, w]
    wanted, place = (pieces * factors).sum(1).unique(return_inverse=True)
    found = torch.zeros(len(wanted), dtype=torch.bool)
    ids = training.input_ids.flatten()
    for start in range(0, len(ids) - window + 1, _CHUNK):
        hashes = _hashes(ids[start : start + _CHUNK + window - 1].long(), factors)
        at = torch.searchsorted(wanted, hashes).clamp(max=len(wanted) - 1)
        found[at[wanted[at] == hashes]] = True
    return float(found[place].float().mean())


def _hashes(ids: Tensor, factors: Tensor) -> Tensor:
    """Return a 64-bit hash of the tokens from each place on, as many as there are factors."""
    count = len(ids) - len(factors) + 1
    total = torch.zeros(count, dtype=torch.int64)
    for i, factor in enumerate(factors.tolist()):
        total.add_(ids[i : i + count], alpha=factor)  # wraps around, as it should
    return total


def overlap_warning(share: float, what: str = "held-out") -> str:
    """Return a sentence where so much of a text was also trained on that scores on it say little, else ''."""
    if share < WORTH_SAYING:
        return ""
    return (
        f"{share:.0%} of the {what} text stands word for word in the training text too, so scores on it say how well it was learnt by "
        f"heart; give held-out text of its own (--valid)"
    )
