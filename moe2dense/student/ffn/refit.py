"""Fit the output projection to a target in closed form, pulled towards where it came from: the step `refit`.

Of several processes each adds the products of its own tokens, the first one solves, and each judges the solution on its tokens.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moe2dense.common.counters import count_flops
from moe2dense.common.devices import exact_products
from moe2dense.common.flops import product
from moe2dense.common.processes import add_over_processes, from_first
from moe2dense.common.shared_rows import any_row, from_first_process, share_of_rows
from moe2dense.student.ffn.dense import DenseFFN, dense
from moe2dense.student.ffn.errors import relative_error
from moe2dense.student.ffn.kernel import FEW_TOKENS, KernelProblem, weighted_rows
from moe2dense.student.ffn.ridge import EXACT_WIDTH, ROUGHLY, RidgeProblem, ridge_solve
from moe2dense.student.ffn.symmetric import add_product, mirror
from moe2dense.student.footprint import rows_at_once

SWEEPS = 2  # over the groups of an FFN that is too wide to be fitted at once


def grams(
    ffn: DenseFFN,
    x: Tensor,
    target: Tensor,
    chunk: int = 0,
    device: torch.device | str = "cpu",
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (H'H, H'T) on `device`, of the FFN's activations on x [T, H] against target [T, H], summed over chunks of tokens.

    Of the tokens of all processes.
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
        with exact_products():
            add_product(gram, h.T, h, lower=True)
            cross.addmm_(h.T, wanted)
        count_flops(product(size, *wanted.shape), cross.device.type)
    for total in (gram, cross):
        add_over_processes(total)
    return mirror(gram), cross


def _fitted(
    ffn: DenseFFN, x: Tensor, target: Tensor, ridge: float, device: torch.device | str, weights: Tensor | None
) -> DenseFFN:
    if _few_tokens(ffn, len(x)):
        rows, start = weighted_rows(ffn.to(device), x, target, weights), _output_weights(ffn)
        return _with_output(ffn, from_first_process(lambda: KernelProblem(*rows, start).solve(ridge).to(start), start))
    return _solved(ffn, *grams(ffn, x, target, device=device, weights=weights), ridge)


def _few_tokens(ffn: DenseFFN, own: int) -> bool:
    """Return whether a wide FFN is fitted to so few tokens, `own` of them in this process, that matrices of tokens cost less."""
    return ffn.width > EXACT_WIDTH and share_of_rows(own).total < FEW_TOKENS * ffn.width


def _output_weights(ffn: DenseFFN) -> Tensor:
    """Return what a refit changes, [M, H]: the output projection, and a row for the output bias where there is one."""
    return ffn.down.T if ffn.down_bias is None else torch.cat([ffn.down.T, ffn.down_bias[None]])


def _solved(ffn: DenseFFN, gram: Tensor, cross: Tensor, ridge: float) -> DenseFFN:
    """Return `ffn` with the output projection that these products and this ridge give."""
    start = _output_weights(ffn)
    return _with_output(ffn, from_first_process(lambda: ridge_solve(gram, cross, start, ridge), start))


def _with_output(ffn: DenseFFN, fitted: Tensor) -> DenseFFN:
    """Return `ffn` with other output weights [M, H]."""
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
    sweeps: int = SWEEPS,
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
    if not any_row(held_out):
        return RefitResult(refit(ffn, x, target, first, limit, device, weights=weights), first, float("nan"))
    fitted = ~held_out
    inner = None if weights is None else weights[fitted]
    outer = None if weights is None else weights[held_out]
    judged = x[held_out], target[held_out]
    start = relative_error(ffn.to(device), *judged, outer)
    wide = ffn.width > EXACT_WIDTH and target.shape[1] > 2 * SKETCH
    if not (limit and ffn.width > limit) and _few_tokens(ffn, int(fitted.sum())):
        outside = weighted_rows(ffn.to(device), *judged, outer)
        return _refit_by_tokens(
            ffn, weighted_rows(ffn.to(device), x[fitted], target[fitted], inner), outside, first, start
        )
    if limit and ffn.width > limit:
        wide, fit = False, lambda ridge: refit(ffn, x[fitted], target[fitted], ridge, limit, device, weights=inner)
    else:
        products = grams(ffn, x[fitted], target[fitted], device=device, weights=inner)
        fit = lambda ridge: _solved(ffn, *products, ridge)  # noqa: E731
        if wide:
            first = _ridge_by_sketch(ffn, products, *judged, outer, first)
    at = functools.cache(fit)

    def error(ridge: float) -> float:
        return relative_error(at(ridge).to(device), *judged, outer)

    ridge, reached = (first, error(first)) if wide else choose_ridge(error, first)
    return RefitResult(at(ridge), ridge, reached) if reached < start else RefitResult(ffn, None, start)


def _refit_by_tokens(
    ffn: DenseFFN, fitted: tuple[Tensor, Tensor], judged: tuple[Tensor, Tensor], first: float, before: float
) -> RefitResult:
    """Refit on few tokens (activations, targets) and choose the ridge on others; `before`: the error of `ffn` as it came."""
    start = _output_weights(ffn)
    problem = functools.cache(lambda: KernelProblem(*fitted, start))  # the first process alone has one
    ridge, reached = from_first(lambda: choose_ridge(problem().judge(*judged).error, first))
    if not reached < before:
        return RefitResult(ffn, None, before)
    weights = from_first_process(lambda: problem().solve(ridge).to(start), start)
    return RefitResult(_with_output(ffn, weights), ridge, reached)


def choose_ridge(error: Callable[[float], float], first: float) -> tuple[float, float]:
    """Return the ridge of RIDGES with the least error, and that error, sought from `first` on in the direction in which the error falls."""
    error = functools.cache(error)
    best, place = first, RIDGES.index(first)
    for direction in (1, -1):
        step = place + direction
        while 0 <= step < len(RIDGES) and error(RIDGES[step]) < error(best):
            best, step = RIDGES[step], step + direction
        if best != first:
            break
    return best, error(best)


SKETCH = 256  # random directions of the output on which a wide FFN's ridge is chosen
_KEPT_BYTES = 1_000_000_000  # of held-out activations that are kept from one ridge to the next


def _ridge_by_sketch(
    ffn: DenseFFN, products: tuple[Tensor, Tensor], x: Tensor, target: Tensor, weights: Tensor | None, first: float
) -> float:
    """Return the ridge whose error on the held-out tokens x, target [T, H] is least, by a sketch of the outputs.

    Errors of all outputs and of their projections on SKETCH random directions agree to a few per cent (Johnson and Lindenstrauss),
    and all ridges are judged on the same directions.
    """
    gram, cross = products
    signs = torch.randint(0, 2, (target.shape[1], SKETCH), generator=torch.Generator().manual_seed(0))
    directions = (2.0 * signs - 1.0).to(gram) / SKETCH**0.5
    start = _output_weights(ffn).to(gram) @ directions
    problem = functools.cache(lambda: RidgeProblem(gram, cross @ directions, start))  # the first process alone has one
    parts = _Activations(ffn.to(gram.device), x)

    def error(ridge: float) -> float:
        solution = from_first_process(lambda: problem().solve(ridge, ROUGHLY), start)
        missed = torch.zeros((), dtype=torch.float64, device=gram.device)
        for rows, hidden in parts:
            squares = (hidden @ solution - target[rows].to(gram) @ directions).pow(2).sum(1)
            missed += (squares if weights is None else squares * weights[rows].to(gram)).sum()
        add_over_processes(missed)
        return float(missed)

    return choose_ridge(error, first)[0]


class _Activations:
    """Iterate over (rows, activations [t, M]) of an FFN on inputs [T, H], a constant neuron after them where it has an output bias.

    They are kept for the next time where they take little memory.
    """

    def __init__(self, ffn: DenseFFN, x: Tensor):
        self.ffn, self.x = ffn, x
        self.kept: dict[int, Tensor] | None = {} if len(x) * ffn.width * x.element_size() <= _KEPT_BYTES else None

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        chunk = rows_at_once(self.ffn.width)
        for i in range(0, len(self.x), chunk):
            hidden = None if self.kept is None else self.kept.get(i)
            if hidden is None:
                hidden = self.ffn.hidden(self.x[i : i + chunk].to(self.ffn.down.device))
                if self.ffn.down_bias is not None:
                    hidden = torch.cat([hidden, hidden.new_ones(len(hidden), 1)], dim=1)
                if self.kept is not None:
                    self.kept[i] = hidden
            yield slice(i, i + chunk), hidden
