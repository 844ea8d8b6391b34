"""Multiply matrices whose product is symmetric in half the operations: panel by panel, below the diagonal."""

from torch import Tensor

from moe2dense.common.counters import count_flops
from moe2dense.common.flops import PANEL, symmetric_product


def add_product(total: Tensor, left: Tensor, right: Tensor, alpha: float = 1.0, lower: bool = False) -> Tensor:
    """Add alpha * left @ right to total [P, P] in place, for left [P, n] and right [n, P] with a symmetric product.

    lower: only the lower triangle matters; what is above the diagonal may be wrong afterwards. Else `total` must be symmetric.
    """
    size = len(total)
    count_flops(symmetric_product(size, left.shape[1]), total.device.type)
    for start in range(0, size, PANEL):
        stop = min(start + PANEL, size)
        total[start:, start:stop].addmm_(left[start:], right[:, start:stop], alpha=alpha)
    return total if lower else mirror(total)


def mirror(total: Tensor) -> Tensor:
    """Make `total` [P, P] symmetric in place, from its lower triangle."""
    size = len(total)
    for start in range(0, size, PANEL):
        stop = min(start + PANEL, size)
        corner = total[start:stop, start:stop]
        corner.copy_(corner.tril() + corner.tril(-1).T)
        total[start:stop, stop:] = total[stop:, start:stop].T
    return total
