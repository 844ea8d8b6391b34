"""Fit the output projection to a target in closed form, pulled towards where it came from: the step `refit`."""

import torch
from torch import Tensor

from moe2dense.student.ffn.dense import DenseFFN, dense
from moe2dense.student.ffn.symmetric import add_product, mirror
from moe2dense.student.footprint import rows_at_once


def ridge_solve(gram: Tensor, cross: Tensor, start: Tensor, ridge: float) -> Tensor:
    """Return the W [M, H] that minimises |T - H W|^2 + lambda |W - W0|^2, from the Gram H'H [M, M] and cross products H'T [M, H].

    W = W0 + (H'H + lambda I)^-1 (H'T - H'H W0), with lambda = `ridge` times the mean of the Gram's diagonal: directions that the data never
    uses keep W0. Solved in float64 (Cholesky) on the Gram's device; the result is where `start` is.
    """
    damped, start64 = gram.to(torch.float64, copy=True), start.to(gram.device, torch.float64)
    missed = cross.double() - damped @ start64
    damped.diagonal().add_(ridge * damped.diagonal().mean().clamp_min(1e-12))
    torch.linalg.cholesky(damped, out=damped)
    return (start64 + torch.cholesky_solve(missed, damped)).to(start)


def grams(
    ffn: DenseFFN, x: Tensor, target: Tensor, chunk: int = 0, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Return (H'H, H'T) on `device`, of the FFN's activations on x [T, H] against target [T, H], summed over chunks of tokens.

    A constant neuron is appended where the FFN has an output bias. By default a chunk's activations take some 64 MB.
    """
    chunk = chunk or rows_at_once(ffn.width)
    size, ffn = ffn.width + (ffn.down_bias is not None), ffn.to(device)
    gram, cross = (x.new_zeros(size, columns, device=device) for columns in (size, target.shape[1]))
    for i in range(0, len(x), chunk):
        h = ffn.hidden(x[i : i + chunk].to(device))
        if ffn.down_bias is not None:
            h = torch.cat([h, h.new_ones(len(h), 1)], dim=1)
        add_product(gram, h.T, h, lower=True)
        cross.addmm_(h.T, target[i : i + chunk].to(device))
    return mirror(gram), cross


def _fitted(ffn: DenseFFN, x: Tensor, target: Tensor, ridge: float, device: torch.device | str) -> DenseFFN:
    gram, cross = grams(ffn, x, target, device=device)
    start = ffn.down.T if ffn.down_bias is None else torch.cat([ffn.down.T, ffn.down_bias[None]])
    fitted = ridge_solve(gram, cross, start, ridge)
    down = fitted[: ffn.width].T.contiguous()
    bias = None if ffn.down_bias is None else fitted[ffn.width]
    return DenseFFN(ffn.gate, ffn.up, down, ffn.gate_bias, ffn.up_bias, bias, ffn.gating)


def refit(
    ffn: DenseFFN,
    x: Tensor,
    target: Tensor,
    ridge: float = 1e-3,
    limit: int = 0,
    device: torch.device | str = "cpu",
    sweeps: int = 2,
) -> DenseFFN:
    """Return `ffn` with the down projection (and output bias) that fits target [T, H] on inputs x [T, H]; computed on `device`.

    limit: most neurons a Gram matrix may have, 0 = no limit. A wider FFN is fitted in groups, in turn, each to what the others
    leave over, in `sweeps` rounds. This is block Gauss-Seidel: each fit lowers the same error, apart from the ridge, which
    pulls a group towards its last weights.
    """
    if not limit or ffn.width <= limit:
        return _fitted(ffn, x, target, ridge, device)
    ffn, count = dense(ffn), -(-ffn.width // limit)
    residual = target.clone()  # what the whole FFN misses
    _add_output(ffn, x, residual, -1, device)
    for number in range(sweeps * count):
        rows = torch.arange(number % count, ffn.width, count)
        part = dense(ffn, rows=rows)
        part.down_bias = ffn.down_bias if number % count == 0 else None
        _add_output(part, x, residual, 1, device)
        fitted = _fitted(part, x, residual, ridge, device)
        _add_output(fitted, x, residual, -1, device)
        ffn.down[:, rows] = fitted.down
        ffn.down_bias = fitted.down_bias if number % count == 0 else ffn.down_bias
    return ffn


def _add_output(ffn: DenseFFN, x: Tensor, total: Tensor, sign: int, device: torch.device | str) -> None:
    """Add sign * ffn(x [T, H]) to total [T, H], computed on `device` for some tokens at a time."""
    chunk, ffn = rows_at_once(ffn.width), ffn.to(device)
    for i in range(0, len(x), chunk):
        total[i : i + chunk].add_(ffn(x[i : i + chunk].to(device)).to(total.device), alpha=sign)
