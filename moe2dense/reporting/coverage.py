"""Functional coverage: how much of what an expert computes can be read from a student's neurons, by ridge regression.

The scale needs no opinion: 0 is what a random FFN of the student's width reaches on the same tokens, 1 what an FFN of that
width reaches that holds the whole expert (its neurons, the rest of the width random). Linear read-out of one network from
another's activations follows linear probing (Alain and Bengio, 1610.01644).
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

# n tokens, H hidden, M student width, F expert width

RIDGE = 1e-3  # of the kernel's mean diagonal
LEAST_GAP = 0.02  # of the outputs' variance: below this, a random FFN reads the expert as well as a copy does


def ridge_errors(features_nM: Tensor, targets_nH: Tensor, train: Tensor, ridge: float = RIDGE) -> Tensor:
    """Squared error [m] of each held-out token after a ridge regression on the tokens `train` [n] bool.

    Solved in the dual, (K + lambda I)^-1 on tokens, so a wide FFN costs no more than the tokens squared. Features and
    targets are centred on the training tokens; lambda is `ridge` times the kernel's mean diagonal.
    """
    x, y = features_nM.float(), targets_nH.float()
    mean_x, mean_y = x[train].mean(0), y[train].mean(0)
    a, b = x[train] - mean_x, x[~train] - mean_x
    kernel = a @ a.T
    size = kernel.diagonal().mean().clamp_min(1e-30)
    eye = torch.eye(len(a), device=a.device)
    factor, info = torch.linalg.cholesky_ex(kernel / size + ridge * eye)
    if int(info):
        factor = torch.linalg.cholesky((kernel / size).double() + ridge * eye.double()).float()
    weights = torch.cholesky_solve(y[train] - mean_y, factor)
    predicted = (b @ a.T / size) @ weights + mean_y
    return (predicted - y[~train]).square().sum(1)


def random_features(
    x: Tensor,
    width: int,
    gate_std: float,
    up_std: float,
    generator: torch.Generator,
    glu: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Activations [n, width] of a random gated FFN whose weights have the given spread."""
    shape = (width, x.shape[1])
    gate, up = (torch.randn(shape, generator=generator).to(x) * s for s in (gate_std, up_std))
    return glu(x @ gate.T, x @ up.T)


def coverage(errors_student: Tensor, errors_random: Tensor, errors_copy: Tensor, variance: float) -> float | None:
    """(random - student) / (random - copy), from squared errors on the same held-out tokens.

    None where a copy reads the expert hardly better than a random FFN does: there is nothing to tell apart.
    """
    random, student, copy = (float(e.double().sum()) for e in (errors_random, errors_student, errors_copy))
    if not math.isfinite(random - copy) or random - copy < LEAST_GAP * variance:
        return None
    return (random - student) / (random - copy)


def split(n: int, generator: torch.Generator, held_out: float = 1 / 3) -> Tensor:
    """[n] bool, True for the tokens to fit on."""
    train = torch.ones(n, dtype=torch.bool)
    train[torch.randperm(n, generator=generator)[: max(1, round(n * held_out))]] = False
    return train


def domain_lift(counts_NE: np.ndarray, domains: list[str], shuffles: int = 200, seed: int = 0) -> dict[str, np.ndarray]:
    """Which domains an expert's tokens come from, against chance.

    counts_NE: tokens of each block routed to each expert; domains: one label per block. Returns "names", "share_ED" (of the
    expert's tokens), "overall_D" (of all routed tokens), "lift_E" (largest share / overall, of the expert's favourite
    domain), and "chance_E": the 95th percentile of that when labels are shuffled among blocks.
    """
    names = sorted(set(domains))
    index = np.array([names.index(d) for d in domains])
    overall = _onehot(index, len(names)).T @ counts_NE.sum(1, keepdims=True)
    overall = overall[:, 0] / max(overall.sum(), 1)

    def shares(labels: np.ndarray) -> np.ndarray:
        per = counts_NE.T @ _onehot(labels, len(names))
        return per / np.maximum(per.sum(1, keepdims=True), 1)

    def top(share: np.ndarray, base: np.ndarray) -> np.ndarray:
        return (share / np.maximum(base, 1e-12)).max(1)

    rng = np.random.default_rng(seed)
    total = counts_NE.sum(1)
    chance = []
    for _ in range(shuffles if len(names) > 1 else 0):
        labels = rng.permutation(index)
        base = np.bincount(labels, total, len(names)) / max(total.sum(), 1)
        chance.append(top(shares(labels), base))
    share = shares(index)
    used = counts_NE.sum(0) > 0
    return {
        "names": np.array(names, dtype=object),
        "share_ED": share,
        "overall_D": overall,
        "lift_E": np.where(used, top(share, overall), np.nan),
        "chance_E": np.quantile(chance, 0.95, axis=0) if chance else np.ones(counts_NE.shape[1]),
    }


def _onehot(index: np.ndarray, size: int) -> np.ndarray:
    return np.eye(size)[index]
