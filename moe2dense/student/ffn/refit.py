"""`refit`: the output projection that fits a target best, in closed form, pulled towards where it came from."""

import torch
from torch import Tensor

from moe2dense.student.footprint import rows_at_once
from moe2dense.student.types import DenseFFN


def ridge_solve(gram: Tensor, cross: Tensor, start: Tensor, ridge: float) -> Tensor:
    """The W [M, H] that minimises |T - H W|^2 + lambda |W - W0|^2, from the Gram H'H [M, M] and the cross products H'T [M, H].

    W = W0 + (H'H + lambda I)^-1 (H'T - H'H W0), with lambda = `ridge` times the mean of the Gram's diagonal: directions that the data never
    lit up keep W0. Solved in float64 (Cholesky).
    """
    damped, start64 = gram.to(torch.float64, copy=True), start.double()
    missed = cross.double() - damped @ start64
    damped.diagonal().add_(ridge * damped.diagonal().mean().clamp_min(1e-12))
    torch.linalg.cholesky(damped, out=damped)
    return (start64 + torch.cholesky_solve(missed, damped)).to(start)


def grams(ffn: DenseFFN, x: Tensor, target: Tensor, chunk: int = 0) -> tuple[Tensor, Tensor]:
    """(H'H, H'T) of the FFN's activations on x [T, H] against target [T, H], summed over chunks of tokens; a constant
    neuron is appended where the FFN has an output bias. By default a chunk's activations take some 64 MB."""
    chunk = chunk or rows_at_once(ffn.width)
    size = ffn.width + (ffn.down_bias is not None)
    gram, cross = x.new_zeros(size, size), x.new_zeros(size, target.shape[1])
    for i in range(0, len(x), chunk):
        h = ffn.hidden(x[i : i + chunk])
        if ffn.down_bias is not None:
            h = torch.cat([h, h.new_ones(len(h), 1)], dim=1)
        gram += h.T @ h
        cross += h.T @ target[i : i + chunk]
    return gram, cross


def refit(ffn: DenseFFN, x: Tensor, target: Tensor, ridge: float = 1e-3) -> DenseFFN:
    """`ffn` with the down projection (and output bias, where there is one) that fits target [T, H] on inputs x [T, H]."""
    gram, cross = grams(ffn, x, target)
    start = ffn.down.T if ffn.down_bias is None else torch.cat([ffn.down.T, ffn.down_bias[None]])
    fitted = ridge_solve(gram, cross, start, ridge)
    down = fitted[: ffn.width].T.contiguous()
    bias = None if ffn.down_bias is None else fitted[ffn.width]
    return DenseFFN(ffn.gate, ffn.up, down, ffn.gate_bias, ffn.up_bias, bias, ffn.gating)
