"""Fit one layer's FFN by gradient steps to what the teacher's layer does, keeping the step that is best on held-out tokens."""

import math

import torch
from torch import Tensor

from moe2dense.common.shared_rows import any_row, mean_of_rows, share_of_rows
from moe2dense.student.ffn.dense import DenseFFN, dense
from moe2dense.student.ffn.errors import relative_error
from moe2dense.student.fit import Fit, fit


def local(
    ffn: DenseFFN,
    x: Tensor,
    target: Tensor,
    held_out: Tensor,
    steps: int = 300,
    lr: float = 2e-3,
    batch: int = 2048,
    seed: int = 0,
    device: torch.device | str = "cpu",
    weights: Tensor | None = None,
) -> tuple[DenseFFN, Fit]:
    """Train `ffn` for `steps` batches of tokens towards target [T, H] on inputs x [T, H]; return it and a record of the fit.

    weights [T]: how much each token's squared error counts; None = all alike. `held_out` [T] bool marks the tokens that choose the step; the error on them is never above what it was at the start.
    x and target are this process's tokens; a batch is one of those of all processes.
    Computed on `device`, to which a batch of tokens is brought at a time; the result is where `ffn` is.
    """
    copy = dense(ffn).to(device)
    weights = x.new_ones(len(x)) if weights is None else weights
    held_out = held_out.to(x.device)
    rows = torch.nonzero(~held_out).flatten()
    judged = x[held_out], target[held_out], weights[held_out]
    scale = mean_of_rows(target.pow(2).mean(1) * weights).clamp_min(1e-30).to(device)

    def loss(index: Tensor) -> Tensor:
        pick = rows[index.to(rows.device)]
        entering, wanted, weight = (t[pick].to(device) for t in (x, target, weights))
        return ((copy(entering) - wanted).pow(2).mean(1) * weight).mean() / scale

    def check() -> float:
        with torch.no_grad():
            return relative_error(copy, *judged)

    share = share_of_rows(len(rows))
    if share.total == 0 or not any_row(held_out):
        return copy.to(ffn.down.device), Fit(math.nan, math.nan, 0)
    result = fit(copy.parameters(), loss, check, share, steps, lr, batch, seed)
    return copy.to(ffn.down.device), result
