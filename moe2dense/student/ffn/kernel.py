"""Solve ridge regressions of fewer tokens than neurons on matrices of tokens, in float64.

With K = H H' + lambda I [T, T] the solution is W = W0 + H' K^-1 (T - H W0) (the dual of the ridge regression), so that no [M, M] matrix is
made or factored, and another ridge costs a factor of [T, T]. Tokens that are held out are judged by their products with the others.
Matrices of tokens are small, so all of it is float64: a float32 kernel would be uncertain by 1e-7 of its largest eigenvalue, which the
least ridges do not reach.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from moe2dense.common.counters import count_flops
from moe2dense.common.devices import by_rows
from moe2dense.common.flops import cholesky, product
from moe2dense.common.processes import gather_rows
from moe2dense.student.ffn.dense import DenseFFN
from moe2dense.student.ffn.symmetric import add_product, mirror
from moe2dense.student.footprint import rows_at_once

# T tokens that are fitted, t that are judged, M neurons, H hidden
FEW_TOKENS = 0.7  # tokens by neurons below which matrices of tokens cost less than Gram matrices
_COLUMNS = 1024  # neurons whose activations are in float64 at once


def weighted_rows(ffn: DenseFFN, x: Tensor, target: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (activations [T, M], targets [T, H]) on the FFN's device, each token's times the root of its weight, of all processes.

    A constant neuron is appended where the FFN has an output bias.
    """
    device = ffn.down.device
    hidden, target = by_rows(ffn.hidden, [x], device, rows_at_once(ffn.width)).to(device), target.to(device)
    if ffn.down_bias is not None:
        hidden = torch.cat([hidden, hidden.new_ones(len(hidden), 1)], dim=1)
    if weights is not None:
        root = weights.to(device).sqrt()[:, None]
        hidden, target = hidden * root, target * root
    return gather_rows(hidden), gather_rows(target)


class KernelProblem:
    """A regression of few tokens that is solved for several ridges and judged on other tokens."""

    def __init__(self, hidden: Tensor, target: Tensor, start: Tensor):
        """Take activations [T, M], targets [T, H] and W0 [M, H]."""
        self.hidden, self.start = hidden, start.to(hidden)
        self.missed = self._missed(hidden, target)
        self.scale = hidden.double().pow(2).sum() / hidden.shape[1]
        self.kernel = torch.zeros(len(hidden), len(hidden), dtype=torch.float64, device=hidden.device)
        for columns in self._columns():
            part = hidden[:, columns].double()
            add_product(self.kernel, part, part.T, lower=True)
        mirror(self.kernel)
        self._solved: dict[float, Tensor] = {}

    def _columns(self) -> Iterator[slice]:
        for start in range(0, self.hidden.shape[1], _COLUMNS):
            yield slice(start, start + _COLUMNS)

    def _missed(self, hidden: Tensor, target: Tensor) -> Tensor:
        count_flops(product(hidden.shape[0], hidden.shape[1], target.shape[1]), hidden.device.type)
        return (target - hidden @ self.start).double()

    def coefficients(self, ridge: float) -> Tensor:
        """Return K^-1 (T - H W0) [T, H], with lambda = `ridge` times the mean energy of a neuron."""
        if ridge not in self._solved:
            tokens, size = self.missed.shape
            count_flops(cholesky(tokens) + product(tokens, tokens, size), self.kernel.device.type)
            factor = self.kernel.clone()
            factor.diagonal().add_(ridge * self.scale.clamp_min(1e-12))
            torch.linalg.cholesky(factor, out=factor)
            self._solved = {ridge: torch.cholesky_solve(self.missed, factor)}
        return self._solved[ridge]

    def judge(self, hidden: Tensor, target: Tensor) -> "Judge":
        """Return what judges ridges on other tokens: their activations [t, M] and targets [t, H]."""
        cross = torch.zeros(len(hidden), len(self.hidden), dtype=torch.float64, device=hidden.device)
        for columns in self._columns():
            cross += hidden[:, columns].double() @ self.hidden[:, columns].double().T
        count_flops(product(hidden.shape[0], hidden.shape[1], len(self.hidden)), hidden.device.type)
        return Judge(self, cross, self._missed(hidden, target), float(target.double().pow(2).sum()))

    def solve(self, ridge: float) -> Tensor:
        """Return W [M, H]."""
        coefficients = self.coefficients(ridge)
        count_flops(product(self.hidden.shape[1], len(coefficients), coefficients.shape[1]), coefficients.device.type)
        weights = self.start.clone()
        for columns in self._columns():
            weights[columns] += (self.hidden[:, columns].double().T @ coefficients).to(weights)
        return weights


class Judge:
    """Tokens that are held out, as products with those that are fitted."""

    def __init__(self, problem: KernelProblem, cross: Tensor, missed: Tensor, size: float):
        self.problem, self.cross, self.missed, self.size = problem, cross, missed, size

    def error(self, ridge: float) -> float:
        """Return the squared error of the solution with this ridge, relative to the targets' squared size."""
        coefficients = self.problem.coefficients(ridge)
        count_flops(product(self.cross.shape[0], self.cross.shape[1], coefficients.shape[1]), self.cross.device.type)
        missed = self.missed - self.cross @ coefficients
        return float(missed.pow(2).sum()) / max(self.size, 1e-30)
