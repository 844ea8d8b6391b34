"""Functional coverage: how much of what an expert computes can be read from a student's neurons, by ridge regression.

The scale needs no opinion: 0 is what a random FFN of the student's width reaches on the same tokens, 1 what an FFN of that
width reaches that holds the whole expert (its neurons, the rest of the width random). Linear read-out of one network from
another's activations follows linear probing (Alain and Bengio, 1610.01644).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe2dense.common.counters import count_flops
from moe2dense.common.flops import product
from moe2dense.evaluation.bootstrap import Bootstrap, Estimate
from moe2dense.teacher.experts import ExpertWeights

# n tokens, H hidden, M student width, F expert width

RIDGES = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4)  # of the kernel's mean diagonal; leave-one-out chooses among them
_EIGEN = 9.0  # FLOPs of all eigenvalues and vectors by the size cubed (LAPACK, divide and conquer)
SKETCH = 64  # random directions of the output on which the choice is made
LEAST_GAP = 0.02  # of the outputs' squared size: below this, a random FFN reads the expert as well as a copy does


def eigen_flops(size: float) -> float:
    """Return the FLOPs of all eigenvalues and vectors of a symmetric matrix [size, size]."""
    return _EIGEN * size**3


def ridge_errors(
    features_nM: Tensor,
    targets_nH: Tensor,
    train: Tensor,
    weights: Tensor | None = None,
    ridges: tuple[float, ...] = RIDGES,
) -> Tensor:
    """Return the squared error [m] of each held-out token after a ridge regression on the tokens `train` [n] bool.

    weights [n] multiply each token's features, targets and error, as in weighted least squares. Solved in the dual on tokens,
    so a wide FFN costs no more than the tokens squared; the intercept is a constant feature as large as all others
    together. The ridge is a multiple of the kernel's mean diagonal, chosen for each set of features by its leave-one-out
    error (Allen's PRESS), since one fixed ridge would favour some features over others.
    """
    x, y = features_nM.float(), targets_nH.float()
    constant = x[train].square().sum(1).mean().sqrt().clamp_min(1e-12).expand(len(x), 1)
    x = torch.cat([x, constant], 1)
    if weights is not None:
        x, y = x * weights[:, None].to(x), y * weights[:, None].to(y)
    a, b, t = x[train], x[~train], y[train]
    tokens, width = a.shape
    products = (
        product(tokens + len(b), width, tokens) + eigen_flops(tokens) + product(len(x) + tokens, tokens, t.shape[1])
    )
    count_flops(products, x.device.type)
    kernel = a @ a.T
    size = kernel.diagonal().mean().clamp_min(1e-30)
    values, vectors = torch.linalg.eigh((kernel / size).double())
    values, vectors = values.clamp_min(0).float(), vectors.float()
    sketch = t
    if t.shape[1] > SKETCH:
        directions = torch.randn(t.shape[1], SKETCH, generator=torch.Generator().manual_seed(0))
        sketch = t @ directions.to(t)
    ridge = ridges[int(torch.stack([press(values + r, vectors, sketch) for r in ridges]).argmin())]
    dual = vectors @ ((vectors.T @ t) / (values + ridge)[:, None])
    return ((b @ a.T / size) @ dual - y[~train]).square().sum(1)


def relative_weights(outputs_nH: Tensor) -> Tensor:
    """Return 1 / max(|f|, median |f|) [n]: tokens count by relative error, and a few huge outputs do not decide alone."""
    size = outputs_nH.float().norm(dim=1)
    return 1 / size.clamp_min(size.median().clamp_min(1e-12))


def tempered(errors: Tensor) -> Tensor:
    """Return squared errors [n] of outputs of size 1, in which an error beyond the output's size counts linearly (Huber's loss).

    A student that writes a massive activation (2402.17762) for one held-out token would else have a coverage of minus thousands.
    """
    return torch.where(errors > 1, 2 * errors.clamp_min(0).sqrt() - 1, errors)


def press(values: Tensor, vectors: Tensor, targets: Tensor) -> Tensor:
    """Return the leave-one-out squared error of kernel ridge, from eigenvalues (ridge added) and vectors of the kernel."""
    dual = vectors @ ((vectors.T @ targets) / values[:, None])
    inverse_diagonal = (vectors.square() / values).sum(1)
    return (dual / inverse_diagonal[:, None]).square().sum()


@dataclass(frozen=True)
class RandomFFN:
    """Directions of a random gated FFN's rows, drawn once and given the spread of any expert's weights.

    gate, up [M, H]: standard normal.
    """

    gate: Tensor
    up: Tensor

    def to(self, device: torch.device) -> "RandomFFN":
        """Return the same directions on a device."""
        return RandomFFN(self.gate.to(device), self.up.to(device))

    def features(self, x: Tensor, like: ExpertWeights) -> Tensor:
        """Return its activations [n, M] on x [n, H] with the spread and the gating of an expert's weights."""
        count_flops(2 * product(len(x), x.shape[1], len(self.gate)), x.device.type)
        gate, up = (
            x @ rows.to(x).T * weight.float().std() for rows, weight in ((self.gate, like.gate), (self.up, like.up))
        )
        return like.gating(gate, up)


def random_ffn(width: int, hidden_size: int, generator: torch.Generator) -> RandomFFN:
    """Draw a random FFN of `width` neurons."""
    gate, up = (torch.randn(width, hidden_size, generator=generator) for _ in range(2))
    return RandomFFN(gate, up)


def coverage(
    errors_student: Tensor,
    errors_random: Tensor,
    errors_copy: Tensor,
    size: float,
    cluster: Tensor | None = None,
    resamples: int = 200,
    seed: int = 0,
) -> Estimate | None:
    """Return (random - student) / (random - copy) of squared errors on the same held-out tokens, with an interval.

    cluster [n]: the work or passage of each token, which is resampled; by default every token is its own. None where a copy
    reads the expert hardly better than a random FFN does: there is nothing to tell apart.
    """
    errors = torch.stack([errors_random, errors_student, errors_copy], 1).double()
    index = torch.arange(len(errors)) if cluster is None else cluster.unique(return_inverse=True)[1]
    count = int(index.max()) + 1
    sums = torch.zeros(count, 3, dtype=torch.float64).index_add_(0, index, errors).numpy()
    random, _, copy = sums.sum(0)
    if not np.isfinite(sums).all() or random - copy < LEAST_GAP * size:
        return None
    bootstrap = Bootstrap(count, resamples, seed)
    return bootstrap.estimate(sums, lambda t: (t[..., 0] - t[..., 1]) / (t[..., 0] - t[..., 2]))


def split(n: int, generator: torch.Generator, held_out: float = 1 / 3) -> Tensor:
    """Return a random mask [n], True for the tokens to fit on."""
    train = torch.ones(n, dtype=torch.bool)
    train[torch.randperm(n, generator=generator)[: max(1, round(n * held_out))]] = False
    return train
