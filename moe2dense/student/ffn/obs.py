"""`obs`: choose neurons by optimal-brain-surgeon elimination in the space of the block's output."""

import torch
from torch import Tensor


def eliminate(
    gram: Tensor,
    cross: Tensor,
    start: Tensor,
    width: int,
    ridge: float = 1e-3,
    block: int = 1,
    overwrite: bool = False,
) -> Tensor:
    """Indices [width], ascending, of the neurons left after dropping, again and again, those that the fit misses least.

    The fit is that of `refit.ridge_solve`: W minimises |T - H W|^2 + lambda |W - W0|^2. Forcing W_i = 0 raises that minimum by
    |W_i|^2 / [A^-1]_ii with A = H'H + lambda I (optimal brain surgeon, Hassibi and Stork 1993; for experts in output space HEAPr,
    arXiv 2509.22299), after which W and A^-1 are downdated exactly. `block` neurons are dropped per step; 1 is the exact greedy order.

    gram [P, P], cross [P, H], start [P, H] (W0); lambda is `ridge` times the Gram's mean diagonal. `overwrite`: the memory of `gram` and `cross` may be used.
    """
    least = 10 * torch.finfo(gram.dtype).eps * len(gram) ** 0.5  # below it rounding leaves no positive definite matrix
    strength = max(ridge, least) * gram.diagonal().mean().clamp_min(1e-12)
    inverse = gram if overwrite else gram.clone()
    inverse.diagonal().add_(strength)
    torch.linalg.cholesky(inverse, out=inverse)
    weights = torch.addcmul(cross, start, strength.expand_as(start), out=cross if overwrite else None)
    weights = torch.cholesky_solve(weights, inverse)
    torch.cholesky_inverse(inverse, out=inverse)
    index = torch.arange(len(gram), device=gram.device)  # of what is still stored
    alive = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    left = len(gram)
    while left > width:
        score = (weights.pow(2).sum(1) / inverse.diagonal()).masked_fill(~alive, torch.inf)
        drop = score.topk(min(block, left - width), largest=False).indices
        columns = inverse[:, drop]
        solved = torch.linalg.solve(columns[drop], torch.cat([weights[drop], columns.T], dim=1))
        weights.addmm_(columns, solved[:, : weights.shape[1]], alpha=-1)
        inverse.addmm_(columns, solved[:, weights.shape[1] :], alpha=-1)
        alive[drop] = False
        left -= len(drop)
        if left < 0.8 * len(alive):  # compacting costs as much as a downdate, so it is done now and then
            index, weights, inverse = index[alive], weights[alive], inverse[alive][:, alive]
            alive = alive[alive]
    return index[alive].sort().values
