"""Fit one layer's FFN by gradient steps to what the teacher's layer does, keeping the step that is best on held-out tokens."""

import math

import torch
from torch import Tensor

from moe2dense.student.ffn.dense import DenseFFN, dense
from moe2dense.student.fit import Fit, fit
from moe2dense.student.footprint import rows_at_once


def relative_error(ffn: DenseFFN, x: Tensor, target: Tensor) -> float:
    """Return the mean of |f(x) - t|^2 over tokens relative to that of |t|^2; x and target [T, H]. Computed where the FFN is."""
    if len(x) == 0:
        return math.nan
    chunk, device, missed = rows_at_once(ffn.width), ffn.down.device, 0.0
    for i in range(0, len(x), chunk):
        output = ffn(x[i : i + chunk].to(device))
        missed += float((output - target[i : i + chunk].to(device)).pow(2).sum())
    return missed / max(float(target.pow(2).sum()), 1e-30)


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
) -> tuple[DenseFFN, Fit]:
    """Train `ffn` for `steps` batches of tokens towards target [T, H] on inputs x [T, H]; return it and a record of the fit.

    `held_out` [T] bool marks the tokens that choose the step; the error on them is never above what it was at the start.
    Computed on `device`; the result is on the CPU.
    """
    copy = dense(ffn).to(device)
    x, target, held_out = (t.to(device) for t in (x, target, held_out))
    rows = torch.nonzero(~held_out).flatten()
    x_held_out, target_held_out = x[held_out], target[held_out]
    scale = target.pow(2).mean().clamp_min(1e-30)

    def loss(index: Tensor) -> Tensor:
        pick = rows[index.to(rows.device)]
        return (copy(x[pick]) - target[pick]).pow(2).mean() / scale

    def check() -> float:
        with torch.no_grad():
            return relative_error(copy, x_held_out, target_held_out)

    if len(rows) == 0 or not bool(held_out.any()):
        return copy.to("cpu"), Fit(math.nan, math.nan, 0)
    result = fit(copy.parameters(), loss, check, len(rows), steps, lr, batch, seed)
    return copy.to("cpu"), result
