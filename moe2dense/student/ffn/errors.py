"""Measure how far an FFN is from what it should write."""

import math

import torch
from torch import Tensor

from moe2dense.common.devices import by_rows
from moe2dense.common.processes import add_over_processes
from moe2dense.common.shared_rows import mean_of_rows
from moe2dense.student.ffn.dense import DenseFFN
from moe2dense.student.footprint import rows_at_once


def relative_error(ffn: DenseFFN, x: Tensor, target: Tensor, weights: Tensor | None = None) -> float:
    """Return the mean of |f(x) - t|^2 over tokens relative to that of |t|^2; x and target [T, H]. Computed where the FFN is.

    weights [T]: how much each token counts; None = all alike. Over the tokens of all processes; NaN without any.
    """
    chunk, device = rows_at_once(ffn.width), ffn.down.device
    missed = torch.zeros((), dtype=torch.float64, device=device)
    for i in range(0, len(x), chunk):
        squares = (ffn(x[i : i + chunk].to(device)) - target[i : i + chunk].to(device)).pow(2)
        if weights is not None:
            squares = squares * weights[i : i + chunk, None].to(device)
        missed += squares.sum()
    size = target.pow(2) if weights is None else target.pow(2) * weights[:, None]
    sums = torch.tensor([float(missed), float(size.sum()), len(x)], dtype=torch.float64)
    add_over_processes(sums)
    return float(sums[0]) / max(float(sums[1]), 1e-30) if float(sums[2]) else math.nan


def wide_enough(states: Tensor) -> Tensor:
    """Return states in float32 where they are in half precision."""
    return states.to(torch.promote_types(states.dtype, torch.float32))


def weights_by_size(states: Tensor, device: torch.device | None = None) -> Tensor:
    """Return [T] weights that make each token's squared error relative to its own hidden state [T, H]; their mean is 1 over all processes.

    What reads a residual stream norms it, so an error counts by its share of the token's state. Without such weights the few
    tokens whose states are hundreds of times larger than the others' (attention sinks, "massive activations",
    arXiv 2402.17762) are all that a least-squares fit sees. Computed on `device`, by default where the states are.
    """
    sizes = by_rows(lambda part: wide_enough(part).pow(2).mean(1), [states], device or states.device)
    weights = 1.0 / sizes.clamp_min(1e-20)
    return weights / mean_of_rows(weights)
