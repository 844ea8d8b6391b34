"""Choose neurons by optimal-brain-surgeon elimination in the space of the layer's output: the method `obs`."""

from dataclasses import replace

import torch
from torch import Tensor

from moe2dense.student.ffn.dense import concatenate, dense
from moe2dense.student.ffn.refit import grams
from moe2dense.student.ffn.select import select_method
from moe2dense.student.ffn.symmetric import add_product
from moe2dense.student.ffn.task import FFNTask, SourcedFFN
from moe2dense.student.footprint import activation_bytes, pool_bytes
from moe2dense.student.memory import device_with_room


def eliminate(
    gram: Tensor,
    cross: Tensor,
    start: Tensor,
    width: int,
    ridge: float = 1e-3,
    block: int = 1,
    overwrite: bool = False,
) -> Tensor:
    """Drop, again and again, the neurons that the fit misses least; return the indices [width], ascending, of those left.

    The fit is that of `refit.ridge_solve`: W minimises |T - H W|^2 + lambda |W - W0|^2. Forcing W_i = 0 raises that minimum by
    |W_i|^2 / [A^-1]_ii with A = H'H + lambda I (optimal brain surgeon, Hassibi and Stork 1993; for experts in output space HEAPr,
    arXiv 2509.22299), after which W and A^-1 are downdated exactly. `block` neurons are dropped per step; 1 is the exact greedy order.

    gram [P, P], cross [P, H], start [P, H] (W0), all on the device that computes; lambda is `ridge` times the Gram's mean diagonal.
    `overwrite`: the memory of `gram` and `cross` may be used.
    """
    least = 10 * torch.finfo(gram.dtype).eps * len(gram) ** 0.5  # below it rounding leaves no positive definite matrix
    strength = max(ridge, least) * gram.diagonal().mean().clamp_min(1e-12)
    inverse = gram if overwrite else gram.clone()
    inverse.diagonal().add_(strength)
    torch.linalg.cholesky(inverse, out=inverse)
    weights = torch.addcmul(cross, start, strength.expand_as(start), out=cross if overwrite else None)
    weights = torch.cholesky_solve(weights, inverse)
    torch.cholesky_inverse(inverse, out=inverse)
    remaining = _Remaining(weights, inverse)
    while remaining.count > width:
        remaining.drop(min(block, remaining.count - width))
        # compacting costs as much as a downdate, so it is done now and then
        if remaining.count < 0.8 * len(remaining.index):
            remaining.compact()
    return remaining.survivors()[0]


class _Remaining:
    """The neurons that are left, their weights W [P, H] and A^-1 [P, P], of which the lower triangle alone is kept up to date.

    Downdates of A^-1 wait until there are enough of them for one matrix product, as in blocked factorisations (LAPACK's pstrf):
    A^-1 is `inverse` - `done` @ `owed`. Every shape is known without looking at values.
    """

    def __init__(self, weights: Tensor, inverse: Tensor):
        self.weights, self.inverse = weights, inverse
        self.index = torch.arange(len(weights), device=weights.device)  # of what is still stored
        self.diagonal = inverse.diagonal().clone()
        self.gone = torch.zeros_like(self.index)
        self.count = len(weights)
        self.waiting = 0
        self.most = max(32, min(512, len(weights) // 16))  # columns that may wait
        self.done = weights.new_empty(len(weights), self.most)
        self.owed = weights.new_empty(self.most, len(weights))

    def drop(self, number: int) -> None:
        """Force those weights to zero whose loss costs least."""
        if self.waiting + number > self.most:
            self.settle()
        score = (self.weights.pow(2).sum(1) / self.diagonal).masked_fill(self.gone.bool(), torch.inf)
        drop = score.topk(number, largest=False).indices
        columns = self._columns(drop)
        solved = torch.linalg.solve(columns[drop], torch.cat([self.weights[drop], columns.T], dim=1))
        weights, owed = solved.split([self.weights.shape[1], len(self.index)], dim=1)
        self.weights.addmm_(columns, weights, alpha=-1)
        self.diagonal -= (columns * owed.T).sum(1)
        if number > self.most:
            add_product(self.inverse, columns, owed, -1, lower=True)
        else:
            self.done[:, self.waiting : self.waiting + number] = columns
            self.owed[self.waiting : self.waiting + number] = owed
            self.waiting += number
        self.gone[drop] = 1
        self.count -= number

    def _columns(self, pick: Tensor) -> Tensor:
        """Return columns [P, n] of A^-1 as it is now, from the lower triangle and what waits."""
        above = torch.arange(len(self.index), device=pick.device)[:, None] < pick
        columns = torch.where(above, self.inverse[pick].T, self.inverse[:, pick])
        if self.waiting:
            columns.addmm_(self.done[:, : self.waiting], self.owed[: self.waiting, pick], alpha=-1)
        return columns

    def settle(self) -> None:
        """Carry out the downdates that wait."""
        if self.waiting:
            add_product(self.inverse, self.done[:, : self.waiting], self.owed[: self.waiting], -1, lower=True)
            self.waiting = 0
            self.diagonal = self.inverse.diagonal().clone()

    def survivors(self) -> tuple[Tensor, Tensor]:
        """Return the indices of the neurons that are left, ascending, and where they are stored."""
        places = self.gone.topk(self.count, largest=False).indices.sort().values
        return self.index[places], places

    def compact(self) -> None:
        """Store only what is left."""
        self.settle()
        self.index, places = self.survivors()
        self.weights, self.diagonal = self.weights[places], self.diagonal[places]
        self.inverse = self.inverse[places][:, places]
        self.gone = torch.zeros_like(self.index)
        self.done, self.owed = self.done[: self.count], self.owed[:, : self.count].contiguous()


def obs_method(task: FFNTask, width: int) -> SourcedFFN:
    """Eliminate neurons of a pool down to `width`; the pool is preselected by energy where all neurons would not fit in memory."""
    pool = select_method(task, task.pool_limit or sum(len(e) for e in task.energies))
    shared = concatenate(task.always_on) if task.always_on else None
    tokens = slice(0, task.config.gram_tokens or None)
    target = task.target[tokens]
    if shared is not None:  # shared neurons stay whole; elimination works on what they leave over
        target = target - shared(task.x[tokens])
    count = pool.ffn.width
    if count <= width:
        return pool
    need = pool_bytes(count, task.hidden_size) + activation_bytes(count, len(target))
    device, step = device_with_room(task.device, need), max(1, count // 256)
    weights = None if task.weights is None else task.weights[tokens]
    gram, cross = grams(replace(pool.ffn, down_bias=None), task.x[tokens], target, device=device, weights=weights)
    start = pool.ffn.down.T.to(device)
    keep = eliminate(gram, cross, start, min(width, count), task.ridge, step, overwrite=True).cpu()
    return SourcedFFN(dense(pool.ffn, rows=keep), pool.expert[keep], pool.neuron[keep])
