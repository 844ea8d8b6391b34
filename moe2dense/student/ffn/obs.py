"""Choose neurons by optimal-brain-surgeon elimination in the space of the layer's output: the method `obs`."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from moe2dense.common.counters import count_flops
from moe2dense.common.devices import by_rows, device_with_room, exact_products
from moe2dense.common.flops import cholesky, product
from moe2dense.common.shared_rows import from_first_process
from moe2dense.student.ffn.dense import concatenate, dense
from moe2dense.student.ffn.kernel import FEW_TOKENS, weighted_rows
from moe2dense.student.ffn.refit import grams
from moe2dense.student.ffn.ridge import EXACT_WIDTH
from moe2dense.student.ffn.select import select_method
from moe2dense.student.ffn.symmetric import add_product
from moe2dense.student.ffn.task import FFNTask, SourcedFFN
from moe2dense.student.footprint import activation_bytes, pool_bytes


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

    The fit is that of `ridge.ridge_solve`: W minimises |T - H W|^2 + lambda |W - W0|^2. Forcing W_i = 0 raises that minimum by
    |W_i|^2 / [A^-1]_ii with A = H'H + lambda I (optimal brain surgeon, Hassibi and Stork 1993; for experts in output space HEAPr,
    arXiv 2509.22299), after which W and A^-1 are downdated exactly. `block` neurons are dropped per step; 1 is the exact greedy order.

    gram [P, P], cross [P, H], start [P, H] (W0), all on the device that computes; lambda is `ridge` times the Gram's mean diagonal.
    `overwrite`: the memory of `gram` and `cross` may be used.
    """
    strength = _strength(gram.diagonal().mean(), ridge, len(gram), gram.dtype)
    inverse = gram if overwrite else gram.clone()
    inverse.diagonal().add_(strength)
    pool = len(gram)
    count_flops(cholesky(pool) + product(pool, pool, cross.shape[1]) + 2 * pool**3 / 3, gram.device.type)
    torch.linalg.cholesky(inverse, out=inverse)
    weights = torch.addcmul(cross, start, strength.expand_as(start), out=cross if overwrite else None)
    weights = torch.cholesky_solve(weights, inverse)
    torch.cholesky_inverse(inverse, out=inverse)
    return _drop_to(_Remaining(weights, WholeInverse(inverse), width), width, block)


def eliminate_by_tokens(
    hidden: Tensor, target: Tensor, start: Tensor, width: int, ridge: float = 1e-3, block: int = 1
) -> Tensor:
    """Return what `eliminate` returns, from activations hidden [T, P] and targets [T, H] of fewer tokens than neurons.

    With K = H H' + lambda I [T, T] and V = L^-1 H, where L L' = K, A^-1 = (I - V'V) / lambda and W = W0 + V' L^-1 (T - H W0)
    (Woodbury), so no [P, P] matrix is made, factored or inverted.
    """
    strength = _strength(hidden.pow(2).sum(0).mean(), ridge, hidden.shape[1], hidden.dtype)
    tokens, pool, size = len(hidden), hidden.shape[1], target.shape[1]
    count_flops(
        cholesky(tokens) + product(tokens, tokens, pool + size) / 2 + 2 * product(tokens, pool, size),
        hidden.device.type,
    )
    kernel = add_product(hidden.new_zeros(tokens, tokens), hidden, hidden.T, lower=True)
    kernel.diagonal().add_(strength)
    factor = torch.linalg.cholesky(kernel)
    missed = target - hidden @ start
    solved = torch.linalg.solve_triangular(factor, torch.cat([hidden, missed], dim=1), upper=False)
    reduced, missed = solved[:, : hidden.shape[1]], solved[:, hidden.shape[1] :]
    weights = start + reduced.T @ missed
    return _drop_to(_Remaining(weights, InverseByTokens(reduced, strength), width), width, block)


def _strength(mean_diagonal: Tensor, ridge: float, count: int, dtype: torch.dtype) -> Tensor:
    """Return lambda: the ridge, or the least with which rounding leaves a positive definite matrix."""
    least = 10 * torch.finfo(dtype).eps * count**0.5
    return max(ridge, least) * mean_diagonal.clamp_min(1e-12)


def _drop_to(remaining: "_Remaining", width: int, block: int) -> Tensor:
    while remaining.count > width:
        remaining.drop(min(block, remaining.count - width))
        # compacting costs as much as a downdate, so it is done now and then
        if remaining.count < 0.8 * len(remaining.index):
            remaining.compact()
    return remaining.survivors()[0]


class WholeInverse:
    """A^-1 [P, P], of which the lower triangle alone is kept up to date."""

    def __init__(self, inverse: Tensor):
        self.inverse = inverse

    def diagonal(self) -> Tensor:
        """Return the diagonal [P]."""
        return self.inverse.diagonal().clone()

    def columns(self, pick: Tensor) -> Tensor:
        """Return some columns [P, n]."""
        above = torch.arange(len(self.inverse), device=pick.device)[:, None] < pick
        return torch.where(above, self.inverse[pick].T, self.inverse[:, pick])

    def waiting_columns(self, to_drop: int) -> int:
        """Return how many columns' downdates may wait: enough for fast products, few enough to cost little while they wait."""
        return max(32, min(512, len(self.inverse) // 16))

    def downdate(self, done: Tensor, owed: Tensor) -> bool:
        """Subtract done [P, n] @ owed [n, P]; return whether that is carried out, so that it need not wait any longer."""
        add_product(self.inverse, done, owed, -1, lower=True)
        return True

    def compact(self, places: Tensor) -> None:
        """Keep some rows and columns alone."""
        self.inverse = self.inverse[places][:, places]


class InverseByTokens:
    """A^-1 = (I - V'V) / lambda, of V [T, P]; its downdates wait for good."""

    def __init__(self, reduced: Tensor, strength: Tensor):
        self.reduced, self.strength = reduced, strength

    def diagonal(self) -> Tensor:
        """Return the diagonal [P]: sums in float64, since little is left of them for a neuron of much energy."""
        squares = torch.zeros(self.reduced.shape[1], dtype=torch.float64, device=self.reduced.device)
        for part in self.reduced.split(1024):
            squares += part.double().pow(2).sum(0)
        floor = torch.finfo(self.reduced.dtype).eps
        return ((1 - squares).clamp_min(floor) / self.strength).to(self.reduced)

    def columns(self, pick: Tensor) -> Tensor:
        """Return some columns [P, n]."""
        tokens, pool = self.reduced.shape
        count_flops(product(pool, tokens, len(pick)), self.reduced.device.type)
        columns = torch.mm(self.reduced.T, self.reduced[:, pick]).neg_()
        columns[pick, torch.arange(len(pick), device=pick.device)] += 1
        return columns.div_(self.strength)

    def waiting_columns(self, to_drop: int) -> int:
        """Return how many columns' downdates may wait: all."""
        return to_drop

    def downdate(self, done: Tensor, owed: Tensor) -> bool:
        """Carry nothing out."""
        return False

    def compact(self, places: Tensor) -> None:
        """Keep some neurons alone."""
        self.reduced = self.reduced[:, places]


class _Remaining:
    """The neurons that are left, their weights W [P, H] and A^-1.

    Downdates of A^-1 wait until there are enough of them for one matrix product, as in blocked factorisations (LAPACK's pstrf):
    A^-1 is `inverse` - `done` @ `owed`. Every shape is known without looking at values.
    """

    def __init__(self, weights: Tensor, inverse: WholeInverse | InverseByTokens, width: int):
        self.weights, self.inverse = weights, inverse
        self.index = torch.arange(len(weights), device=weights.device)  # of what is still stored
        self.diagonal = inverse.diagonal()
        self.gone = torch.zeros_like(self.index)
        self.count = len(weights)
        self.waiting = 0
        self.most = inverse.waiting_columns(len(weights) - width)
        self.done = weights.new_empty(len(weights), self.most)
        self.owed = weights.new_empty(self.most, len(weights))

    def drop(self, number: int) -> None:
        """Force those weights to zero whose loss costs least."""
        if self.waiting + number > self.most:
            self.settle()
        score = (torch.linalg.vector_norm(self.weights, dim=1).square_() / self.diagonal).masked_fill(
            self.gone.bool(), torch.inf
        )
        drop = score.topk(number, largest=False).indices
        columns = self._columns(drop)
        solved = torch.linalg.solve(columns[drop], torch.cat([self.weights[drop], columns.T], dim=1))
        weights, owed = solved.split([self.weights.shape[1], len(self.index)], dim=1)
        self.weights.addmm_(columns, weights, alpha=-1)
        count_flops(product(len(self.weights), self.weights.shape[1], number), self.weights.device.type)
        self.diagonal -= (columns * owed.T).sum(1)
        if number > self.most:
            self.inverse.downdate(columns, owed)
        else:
            self.done[:, self.waiting : self.waiting + number] = columns
            self.owed[self.waiting : self.waiting + number] = owed
            self.waiting += number
        self.gone[drop] = 1
        self.count -= number

    def _columns(self, pick: Tensor) -> Tensor:
        """Return columns [P, n] of A^-1 as it is now, from what is stored and what waits."""
        columns = self.inverse.columns(pick)
        if self.waiting:
            count_flops(product(len(columns), self.waiting, len(pick)), columns.device.type)
            columns.addmm_(self.done[:, : self.waiting], self.owed[: self.waiting, pick], alpha=-1)
        return columns

    def settle(self) -> None:
        """Carry out the downdates that wait, where they do not wait for good."""
        if self.waiting and self.inverse.downdate(self.done[:, : self.waiting], self.owed[: self.waiting]):
            self.waiting = 0
            self.diagonal = self.inverse.diagonal()

    def survivors(self) -> tuple[Tensor, Tensor]:
        """Return the indices of the neurons that are left, ascending, and where they are stored."""
        places = self.gone.topk(self.count, largest=False).indices.sort().values
        return self.index[places], places

    def compact(self) -> None:
        """Store only what is left."""
        self.settle()
        self.index, places = self.survivors()
        self.weights, self.diagonal = self.weights[places], self.diagonal[places]
        self.inverse.compact(places)
        self.gone = torch.zeros_like(self.index)
        if self.waiting:
            self.done, self.owed = self.done[places], self.owed[:, places].contiguous()
        else:
            self.done, self.owed = self.done[: self.count], self.owed[:, : self.count].contiguous()


def obs_method(task: FFNTask, width: int) -> SourcedFFN:
    """Eliminate neurons of a pool down to `width`; the pool is preselected by energy where all neurons would not fit in memory.

    Of several processes each adds its tokens to the Gram matrix, and the first one eliminates: a choice that rounding could turn
    must be the same on all.
    """
    pool = select_method(task, task.pool_limit or sum(len(e) for e in task.energies))
    shared = concatenate(task.always_on) if task.always_on else None
    own, looked_at = task.gram_tokens
    tokens = slice(0, own)
    target = task.target[tokens]
    if shared is not None:  # shared neurons stay whole; elimination works on what they leave over
        x, compute = task.x[tokens], shared.down.device
        target = target - by_rows(shared, [x], compute).to(target)
    count = pool.ffn.width
    if count <= width:
        return pool
    need = pool_bytes(count, task.hidden_size) + activation_bytes(count, looked_at)
    device, step = device_with_room(task.device, need), max(1, count // 256)
    weights = None if task.weights is None else task.weights[tokens]
    plain, x, start = replace(pool.ffn, down_bias=None), task.x[tokens], pool.ffn.down.T.to(device)
    with exact_products():
        if count > EXACT_WIDTH and looked_at < FEW_TOKENS * count:
            rows = weighted_rows(plain.to(device), x, target, weights)
            choose = partial(eliminate_by_tokens, *rows, start, width, task.ridge, step)
        else:
            products = grams(plain, x, target, device=device, weights=weights)
            choose = partial(eliminate, *products, start, width, task.ridge, step, overwrite=True)
        keep = from_first_process(choose, start.new_empty(width, dtype=torch.int64)).cpu()
    return SourcedFFN(dense(pool.ffn, rows=keep), pool.expert[keep], pool.neuron[keep])
