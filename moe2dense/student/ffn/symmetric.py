"""Products of matrices whose result is symmetric, made in half the operations: panel by panel, below the diagonal."""

from torch import Tensor

_PANEL = 1024  # columns at once: wide enough for full speed, and what is made above the diagonal is little


def add_product(total: Tensor, left: Tensor, right: Tensor, alpha: float = 1.0, lower: bool = False) -> Tensor:
    """total [P, P] += alpha * left @ right in place, for left [P, n] and right [n, P] with a symmetric product.

    `lower`: what stands above the diagonal is of no interest, and need not be right afterwards; else `total` must be symmetric.
    """
    size = len(total)
    for start in range(0, size, _PANEL):
        stop = min(start + _PANEL, size)
        total[start:, start:stop].addmm_(left[start:], right[:, start:stop], alpha=alpha)
    return total if lower else mirror(total)


def mirror(total: Tensor) -> Tensor:
    """Make `total` [P, P] symmetric in place, from what stands on and below the diagonal."""
    size = len(total)
    for start in range(0, size, _PANEL):
        stop = min(start + _PANEL, size)
        corner = total[start:stop, start:stop]
        corner.copy_(corner.tril() + corner.tril(-1).T)
        total[start:stop, stop:] = total[stop:, start:stop].T
    return total
