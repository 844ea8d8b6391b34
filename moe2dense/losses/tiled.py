"""Compute a loss over the vocabulary tile by tile: values and gradients in one pass, never all of the [tokens, V] matrix.

A tile of tokens is multiplied with the head, the loss turns its logits into their gradient in place, and two more products
give the gradients of the hidden states and of the head. Nothing is computed twice, and at most two tiles are in memory: the
student's and the teacher's.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe2dense.common.counters import count_flops
from moe2dense.common.flops import product as product_flops
from moe2dense.modeling.head import OutputHead

# n tokens, t tokens of a tile, H hidden, V vocabulary
# logits [r, V], rows of the tile -> parts [P, r], grad [r, V]
TileLoss = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
# rows of the batch -> the loss of that tile
MakeTileLoss = Callable[[slice], TileLoss]
TILE_BYTES = 192 * 2**20  # of one [t, V] buffer, at most: products of few tokens are slow
CACHE_BYTES = 2**22  # rows that are turned into gradients at a time on a CPU: what stays in its cache


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the precision inside a loss: float64 stays, everything else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a @ b, accumulated in `dtype`; half precision enters a GPU's product as it is."""
    if a.dtype == dtype and b.dtype == dtype:
        return a @ b
    if a.is_cuda and a.dtype == b.dtype and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


class _Tiled(torch.autograd.Function):
    """Sums of the parts [P] over all tokens; only the first, the objective, has a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: OutputHead | None,
        make_loss: MakeTileLoss,
        size: int,
    ):
        dtype = compute_dtype(hidden.dtype)
        weight = weight.detach().to(hidden.dtype if hidden.is_cuda else dtype)
        wants = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(hidden) if wants[0] else None
        d_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if wants[1] else None
        d_bias = torch.zeros(len(weight), dtype=dtype, device=weight.device) if wants[2] else None
        sums: Tensor | None = None
        products = 1 + (d_hidden is not None) + (d_weight is not None)
        count_flops(products * product_flops(len(hidden), hidden.shape[1], len(weight)), hidden.device.type)
        for rows in _slices(len(hidden), size):
            logits = product(hidden[rows], weight.T, dtype)
            if bias is not None:
                logits += bias
            parts, grad = _through_rules(logits, head, make_loss(rows))
            sums = parts if sums is None else sums + parts
            narrow = grad.to(weight.dtype)
            if d_hidden is not None:
                d_hidden[rows] = product(narrow, weight, dtype)
            if d_weight is not None:
                _accumulate(d_weight, narrow, hidden[rows])
            if d_bias is not None:
                d_bias += grad.sum(0)
            del logits, grad, narrow  # before the next tile is made
        ctx.grads = (d_hidden, d_weight, d_bias)
        return hidden.new_zeros(1, dtype=dtype) if sums is None else sums

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor):
        if ctx.grads is None:
            raise RuntimeError("the gradients of this loss were handed out already; compute it again")
        grads, ctx.grads = ctx.grads, None
        factor = outputs[0][0]
        return (*(None if g is None else g.mul_(factor.to(g.dtype)) for g in grads), None, None, None)


def _slices(n: int, most: int) -> list[slice]:
    """Divide n tokens into equal parts of at most `most`."""
    size = max(1, math.ceil(n / max(1, math.ceil(n / most))))
    return [slice(a, min(a + size, n)) for a in range(0, n, size)]


def _accumulate(d_weight: Tensor, grad: Tensor, hidden: Tensor) -> None:
    if grad.dtype == d_weight.dtype:
        d_weight.addmm_(grad.T, hidden.to(grad.dtype))
    else:
        d_weight += product(grad.T, hidden, d_weight.dtype)


def _through_rules(logits: Tensor, head: OutputHead | None, loss: TileLoss) -> tuple[Tensor, Tensor]:
    """Return the parts summed over a tile, and the gradient with respect to hidden @ weight.T, which overwrites `logits`."""
    scale, cap = (1.0, None) if head is None else (head.scale, head.softcap)
    step = len(logits) if logits.is_cuda else max(1, CACHE_BYTES // (logits.shape[1] * logits.element_size()))
    sums: Tensor | None = None
    for start in range(0, len(logits), step):
        rows = slice(start, start + step)
        part = logits[rows]
        if scale != 1.0:
            part.mul_(scale)
        slope = None
        if cap:
            part.div_(cap).tanh_()
            slope = 1 - part.square()
            part.mul_(cap)
        values, grad = loss(part, rows)
        if slope is not None:
            grad = grad * slope
        torch.mul(grad, scale, out=part)
        total = values.sum(1)
        sums = total if sums is None else sums + total
    assert sums is not None
    return sums, logits


class _FromLogits(torch.autograd.Function):
    """The same for logits that exist already."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, make_loss: MakeTileLoss, size: int):
        dtype = compute_dtype(logits.dtype)
        d_logits = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        sums: Tensor | None = None
        for rows in _slices(len(logits), size):
            parts, grad = _through_rules(logits[rows].to(dtype, copy=True), None, make_loss(rows))
            sums = parts if sums is None else sums + parts
            if d_logits is not None:
                d_logits[rows] = grad
        ctx.grads = d_logits
        return logits.new_zeros(1, dtype=dtype) if sums is None else sums

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor):
        if ctx.grads is None:
            raise RuntimeError("the gradients of this loss were handed out already; compute it again")
        grads, ctx.grads = ctx.grads, None
        return grads.mul_(outputs[0][0].to(grads.dtype)), None, None


@torch.compiler.disable()
def tiled_loss(
    hidden: Tensor, head: OutputHead | None, make_loss: MakeTileLoss, tile_bytes: int = TILE_BYTES
) -> Tensor:
    """Return the parts [P] of a loss summed over n tokens; differentiable in its first part.

    hidden [n, H] with head (weight [V, H], bias, scale, softcap), or logits [n, V] with head None. `make_loss(rows)` returns
    the loss of a tile, which maps logits [r, V] to parts [P, r], the first being the objective, and the gradient of
    the objective; it may overwrite the logits. Inside, float32 (float64 for float64 input).
    """
    vocabulary = hidden.shape[1] if head is None else len(head.weight)
    size = max(1, tile_bytes // (vocabulary * compute_dtype(hidden.dtype).itemsize))
    with torch.autocast(hidden.device.type, enabled=False):
        if head is None:
            return _FromLogits.apply(hidden, make_loss, size)  # type: ignore[return-value]
        return _Tiled.apply(hidden, head.weight, head.bias, head, make_loss, size)  # type: ignore[return-value]
