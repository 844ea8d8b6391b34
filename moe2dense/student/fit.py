"""Fit parameters by gradient steps and keep the values that were best on held-out tokens."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Fit:
    """What a fit did: relative squared error on held-out tokens before and after, and the step that was kept."""

    before: float
    after: float
    best_step: int


def cosine(step: int, steps: int, warmup: float = 0.0) -> float:
    """Learning-rate factor: linear to 1 over the `warmup` share of the steps, then half a cosine to 0."""
    rise = warmup * steps
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def fit(
    parameters: list[Tensor],
    loss: Callable[[Tensor], Tensor],
    held_out: Callable[[], float],
    rows: int,
    steps: int,
    lr: float,
    batch: int,
    seed: int = 0,
    weight_decay: float = 0.0,
    checks: int = 6,
    clip: float = 0.0,
    warmup: float = 0.0,
) -> Fit:
    """Adam on `parameters` (cosine to zero), keeping the values with the lowest held-out loss: never worse than the start.

    `loss(index)` is the loss on training rows `index` (each of `rows` once per epoch, in seeded order); `held_out()` is measured at the start
    and `checks` times. A step whose loss is not finite ends the fit at the best values so far.
    """
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay)
    first = best = held_out()
    kept, best_step = [p.detach().clone() for p in parameters], 0
    order = torch.randperm(rows, generator=generator)
    every = max(1, steps // checks)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * cosine(step, steps, warmup)
        if len(order) < min(batch, rows):
            order = torch.cat([order, torch.randperm(rows, generator=generator)])
        index, order = order[:batch], order[batch:]
        value = loss(index)
        if not torch.isfinite(value):
            break
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        if clip:
            nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        if (step + 1) % every == 0 or step + 1 == steps:
            now = held_out()
            if now < best:
                best, best_step = now, step + 1
                for best_value, p in zip(kept, parameters, strict=True):
                    best_value.copy_(p.detach())
    with torch.no_grad():
        for p, value in zip(parameters, kept, strict=True):
            p.copy_(value)
            p.requires_grad_(False)
            p.grad = None
    return Fit(first, best, best_step)
