"""Fit the output projection to a target in closed form, pulled towards where it came from: the step `refit`."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe2dense.student.ffn.dense import DenseFFN, dense
from moe2dense.student.ffn.errors import relative_error
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
    ffn: DenseFFN,
    x: Tensor,
    target: Tensor,
    chunk: int = 0,
    device: torch.device | str = "cpu",
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (H'H, H'T) on `device`, of the FFN's activations on x [T, H] against target [T, H], summed over chunks of tokens.

    weights [T]: how much each token's squared error counts; None = all alike. A constant neuron is appended where the FFN has an output bias. By default a chunk's activations take some 64 MB.
    """
    chunk = chunk or rows_at_once(ffn.width)
    size, ffn = ffn.width + (ffn.down_bias is not None), ffn.to(device)
    gram, cross = (x.new_zeros(size, columns, device=device) for columns in (size, target.shape[1]))
    for i in range(0, len(x), chunk):
        h = ffn.hidden(x[i : i + chunk].to(device))
        if ffn.down_bias is not None:
            h = torch.cat([h, h.new_ones(len(h), 1)], dim=1)
        wanted = target[i : i + chunk].to(device)
        if weights is not None:
            root = weights[i : i + chunk].to(device).sqrt()[:, None]
            h, wanted = h * root, wanted * root
        add_product(gram, h.T, h, lower=True)
        cross.addmm_(h.T, wanted)
    return mirror(gram), cross


def _fitted(
    ffn: DenseFFN, x: Tensor, target: Tensor, ridge: float, device: torch.device | str, weights: Tensor | None
) -> DenseFFN:
    return _solved(ffn, *grams(ffn, x, target, device=device, weights=weights), ridge)


def _solved(ffn: DenseFFN, gram: Tensor, cross: Tensor, ridge: float) -> DenseFFN:
    """Return `ffn` with the output projection that these products and this ridge give."""
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
    weights: Tensor | None = None,
) -> DenseFFN:
    """Return `ffn` with the down projection (and output bias) that fits target [T, H] on inputs x [T, H]; computed on `device`.

    weights [T]: how much each token's squared error counts; None = all alike. limit: most neurons a Gram matrix may have, 0 = no limit. A wider FFN is fitted in groups, in turn, each to what the others
    leave over, in `sweeps` rounds. This is block Gauss-Seidel: each fit lowers the same error, apart from the ridge, which
    pulls a group towards its last weights.
    """
    if not limit or ffn.width <= limit:
        return _fitted(ffn, x, target, ridge, device, weights)
    ffn, count = dense(ffn), -(-ffn.width // limit)
    residual = target.clone()  # what the whole FFN misses
    _add_output(ffn, x, residual, -1, device)
    for number in range(sweeps * count):
        rows = torch.arange(number % count, ffn.width, count)
        part = dense(ffn, rows=rows)
        part.down_bias = ffn.down_bias if number % count == 0 else None
        _add_output(part, x, residual, 1, device)
        fitted = _fitted(part, x, residual, ridge, device, weights)
        _add_output(fitted, x, residual, -1, device)
        ffn.down[:, rows] = fitted.down
        ffn.down_bias = fitted.down_bias if number % count == 0 else ffn.down_bias
    return ffn


def _add_output(ffn: DenseFFN, x: Tensor, total: Tensor, sign: int, device: torch.device | str) -> None:
    """Add sign * ffn(x [T, H]) to total [T, H], computed on `device` for some tokens at a time."""
    chunk, ffn = rows_at_once(ffn.width), ffn.to(device)
    for i in range(0, len(x), chunk):
        total[i : i + chunk].add_(ffn(x[i : i + chunk].to(device)).to(total.device), alpha=sign)


# ridges that are tried, relative to the Gram matrix's mean diagonal: few tokens a neuron need the large ones
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
FIRST_RIDGE = 1e-2


@dataclass(frozen=True)
class RefitResult:
    """An FFN after a refit, and its error on held-out tokens relative to their targets."""

    ffn: DenseFFN
    # None: no ridge helped, and the FFN is as it came
    ridge: float | None
    held_out_error: float


def refit_by_held_out(
    ffn: DenseFFN,
    x: Tensor,
    target: Tensor,
    held_out: Tensor,
    first: float = FIRST_RIDGE,
    limit: int = 0,
    device: torch.device | str = "cpu",
    weights: Tensor | None = None,
) -> RefitResult:
    """Refit on the tokens that are not held out, with the ridge of RIDGES whose error on the held-out ones is least.

    held_out [T] bool. The search starts at `first` and goes on in the direction in which the error falls, since the error
    has one valley over the ridge as a rule. Without held-out tokens `first` is taken. The result is never worse on the
    held-out tokens than `ffn` as it came.
    """
    if not bool(held_out.any()):
        return RefitResult(refit(ffn, x, target, first, limit, device, weights=weights), first, float("nan"))
    fitted = ~held_out
    inner = None if weights is None else weights[fitted]
    outer = None if weights is None else weights[held_out]
    products = None
    if not limit or ffn.width <= limit:
        products = grams(ffn, x[fitted], target[fitted], device=device, weights=inner)
    cache: dict[float, RefitResult] = {}

    def at(ridge: float) -> RefitResult:
        if ridge not in cache:
            if products is None:
                result = refit(ffn, x[fitted], target[fitted], ridge, limit, device, weights=inner)
            else:
                result = _solved(ffn, *products, ridge)
            error = relative_error(result.to(device), x[held_out], target[held_out], outer)
            cache[ridge] = RefitResult(result, ridge, error)
        return cache[ridge]

    best = at(first)
    place = RIDGES.index(first)
    for direction in (1, -1):
        step = place + direction
        while 0 <= step < len(RIDGES) and at(RIDGES[step]).held_out_error < best.held_out_error:
            best, step = at(RIDGES[step]), step + direction
        if best.ridge != first:
            break
    start = relative_error(ffn.to(device), x[held_out], target[held_out], outer)
    return best if best.held_out_error < start else RefitResult(ffn, None, start)
