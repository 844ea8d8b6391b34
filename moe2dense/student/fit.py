"""Fit parameters by gradient steps and keep the values that are best on held-out tokens.

Several processes that have joined fit one copy each: a step's batch is drawn from the rows of all, each computes the gradient of
those that it has, and the sum of these is the gradient that one process with all rows has.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe2dense.common.processes import add_over_processes, world
from moe2dense.common.shared_rows import Share
from moe2dense.optimizers.prepare import take_step

CHECKS = 6  # of the held-out loss, beside that at the start


@dataclass(frozen=True)
class Fit:
    """What a fit did: the held-out loss before and after it, and the step whose values were kept."""

    before: float
    after: float
    best_step: int


def cosine(step: int, steps: int, warmup: float = 0.0) -> float:
    """Return a learning-rate factor: linear to 1 over the `warmup` share of the steps, then half a cosine to 0."""
    rise = warmup * steps
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def fit(
    parameters: list[Tensor],
    loss: Callable[[Tensor], Tensor],
    held_out_loss: Callable[[], float],
    rows: int | Share,
    steps: int,
    lr: float,
    batch: int,
    seed: int = 0,
    weight_decay: float = 0.0,
    checks: int = CHECKS,
    clip: float = 0.0,
    warmup: float = 0.0,
    optimizer: torch.optim.Optimizer | None = None,
    best_rest: torch.device | None = None,
    weigh: Callable[[Tensor], float] = len,
    after_step: Callable[[int], None] | None = None,
) -> Fit:
    """Run Adam on `parameters`, its rate a cosine to zero, and keep the values of lowest held-out loss.

    The result is never worse than the start. `loss(index)` is the loss on training rows `index`, each of `rows` once per
    epoch in seeded order. `held_out_loss()` is measured at the start and `checks` times. A step whose loss is not finite
    ends the fit at the best values so far. optimizer: another one over the parameters. best_rest: where the best values rest, by
    default where the parameters are.
    rows: how many there are, or which of them this process has; `loss` is then a mean over those of `index` that are here, which
    `weigh(index)` weighs against the others' means, and `held_out_loss` that of all processes. after_step: called with the
    number of steps taken.
    """
    share = rows if isinstance(rows, Share) else Share(0, rows, rows)
    rows = share.total
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.requires_grad_(True)
    optimizer = optimizer or torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay)
    first = best = held_out_loss()
    best_values = [p.detach().to(best_rest or p.device, copy=True) for p in parameters]
    best_step = 0
    order = torch.randperm(rows, generator=generator)
    every = max(1, steps // checks)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * cosine(step, steps, warmup)
        if len(order) < min(batch, rows):
            order = torch.cat([order, torch.randperm(rows, generator=generator)])
        index, order = order[:batch], order[batch:]
        optimizer.zero_grad(set_to_none=True)
        value = _gradients(parameters, loss, index, share, weigh)
        if not torch.isfinite(value):
            break
        take_step(optimizer, parameters, clip)
        if after_step:
            after_step(step + 1)
        if (step + 1) % every == 0 or step + 1 == steps:
            now = held_out_loss()
            if now < best:
                best, best_step = now, step + 1
                for best_value, p in zip(best_values, parameters, strict=True):
                    best_value.copy_(p.detach())
    with torch.no_grad():
        for p, value in zip(parameters, best_values, strict=True):
            p.copy_(value)
            p.requires_grad_(False)
            p.grad = None
    return Fit(first, best, best_step)


def _gradients(
    parameters: list[Tensor],
    loss: Callable[[Tensor], Tensor],
    index: Tensor,
    share: Share,
    weigh: Callable[[Tensor], float],
) -> Tensor:
    """Give parameters the gradient of the loss on rows `index`, to which every process adds what it has of them; return the loss."""
    if world()[1] == 1:
        value = loss(index)
        if torch.isfinite(value):  # a backward pass may make the step
            value.backward()
        return value.detach()
    own = share.pick(index)
    # of the weights, and of the weighted losses
    sums = torch.zeros(2, dtype=torch.float64, device=parameters[0].device)
    if len(own):
        weight = float(weigh(own))
        value = loss(own) * weight
        value.backward()
        sums = torch.stack([torch.full_like(sums[0], weight), value.detach().to(sums)])
    add_over_processes(sums)
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        add_over_processes(p.grad)
        p.grad /= float(sums[0])
    return sums[1] / sums[0]


RATE_FACTOR, RATE_TRIES = 4.0, 4


def fit_at_a_rate_that_helps(run: Callable[[float], Fit], lr: float, tries: int = RATE_TRIES) -> tuple[Fit, float]:
    """Run a fit at rate `lr`; as long as it keeps step 0, run it again at a quarter of the rate, `tries` times in all.

    `run(rate)` starts from the same values each time and leaves them where nothing helped. Rates that suit narrow models are
    too high for wide ones, where a fit would otherwise be computed and thrown away. Returns the last fit and its rate, which
    later layers begin with.
    """
    for _ in range(tries):
        result = run(lr)
        if result.best_step > 0 or not math.isfinite(result.before):
            break
        lr /= RATE_FACTOR
    else:
        lr *= RATE_FACTOR
    return result, lr
