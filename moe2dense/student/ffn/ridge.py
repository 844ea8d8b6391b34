"""Solve ridge regressions from a Gram matrix: in float64, and for wide FFNs in float32 with residuals that are added up in float64.

The Gram matrix of a wide FFN is summed in float32, so it is itself uncertain by some 1e-7 of its entries. A float32 factor
alone would add an error a hundred times as large. One or two steps of iterative refinement (Wilkinson 1963; LAPACK's dsposv),
whose residuals add blocks of a float32 product in float64, take it down to what the Gram matrix is worth, at the speed of float32.
"""

import torch
from torch import Tensor

from moe2dense.common.counters import count_flops
from moe2dense.common.devices import exact_products
from moe2dense.common.flops import cholesky, product
from moe2dense.common.flops import ridge_solve as ridge_solve_flops

# M neurons, H hidden
EXACT_WIDTH = 2048  # neurons up to which the solution is float64 throughout
_BLOCK = 1024  # terms of a sum that are added in float32
_REFINEMENTS = 5
# size of a correction by that of the solution: what is left after it is about the square, and too large to go on
_ENOUGH, _TOO_LARGE = 1e-3, 0.3
ROUGHLY = 3e-2  # enough to tell ridges apart


def ridge_solve(gram: Tensor, cross: Tensor, start: Tensor, ridge: float) -> Tensor:
    """Return the W [M, H] that minimises |T - H W|^2 + lambda |W - W0|^2, from the Gram H'H [M, M] and cross products H'T [M, H].

    W = W0 + (H'H + lambda I)^-1 (H'T - H'H W0), with lambda = `ridge` times the mean of the Gram's diagonal: directions that the data never
    uses keep W0. Computed on the Gram's device; the result is where `start` is.
    """
    if len(gram) <= EXACT_WIDTH:
        return _solve_double(gram, cross, start, ridge)
    return RidgeProblem(gram, cross, start).solve(ridge)


def _solve_double(gram: Tensor, cross: Tensor, start: Tensor, ridge: float) -> Tensor:
    """Solve by Cholesky in float64."""
    count_flops(ridge_solve_flops(len(start), start.shape[1]), gram.device.type)
    damped, start64 = gram.to(torch.float64, copy=True), start.to(gram.device, torch.float64)
    missed = cross.double() - damped @ start64
    damped.diagonal().add_(ridge * damped.diagonal().mean().clamp_min(1e-12))
    torch.linalg.cholesky(damped, out=damped)
    return (start64 + torch.cholesky_solve(missed, damped)).to(start)


class RidgeProblem:
    """A wide regression that is solved for several ridges; what W0 misses is computed once."""

    def __init__(self, gram: Tensor, cross: Tensor, start: Tensor):
        self.gram, self.cross, self.start = gram, cross, start
        self.start_there = start.to(gram.device, torch.float32)
        self.missed = cross.double() - summed_product(gram, self.start_there)
        self.scale = gram.diagonal().double().mean().clamp_min(1e-12)

    def solve(self, ridge: float, enough: float = _ENOUGH) -> Tensor:
        """Return W [M, H] for one ridge; in float64 where float32 cannot hold the problem. enough: see ROUGHLY."""
        change = self._refined(float(ridge * self.scale), enough)
        if change is None:
            return _solve_double(self.gram, self.cross, self.start, ridge)
        return (self.start_there.double() + change).to(self.start)

    def _refined(self, damping: float, enough: float = _ENOUGH) -> Tensor | None:
        """Return (gram + damping I)^-1 missed [M, H] in float64; None where refinement does not converge."""
        device, solve = self.gram.device.type, product(len(self.gram), len(self.gram), self.missed.shape[1])
        count_flops(cholesky(len(self.gram)) + solve, device)
        factor = self.gram.clone()
        factor.diagonal().add_(damping)
        failed = factor.new_empty((), dtype=torch.int32)
        torch.linalg.cholesky_ex(factor, out=(factor, failed))
        if int(failed):
            return None
        with exact_products():
            part = torch.cholesky_solve(self.missed.float(), factor)
            solution, left = part.double(), self.missed
            for _ in range(_REFINEMENTS):
                count_flops(solve, device)
                left = left - self._times(part, damping)  # the parts are float32, so their products lose nothing
                part = torch.cholesky_solve(left.float(), factor)
                share = float(part.norm() / solution.norm().clamp_min(1e-30))
                solution += part
                if share < enough:
                    return solution
                if not share < _TOO_LARGE:
                    break
        return None

    def _times(self, part: Tensor, damping: float) -> Tensor:
        """Return (gram + damping I) @ part [M, H] in float64, of a part in float32."""
        return summed_product(self.gram, part).add_(part.double(), alpha=damping)


def summed_product(left: Tensor, right: Tensor) -> Tensor:
    """Return left [m, k] @ right [k, n] in float64: products of blocks in float32, added up in float64."""
    count_flops(product(len(left), left.shape[1], right.shape[1]), left.device.type)
    total = torch.zeros(len(left), right.shape[1], dtype=torch.float64, device=left.device)
    with exact_products():
        for start in range(0, left.shape[1], _BLOCK):
            total += left[:, start : start + _BLOCK] @ right[start : start + _BLOCK]
    return total
