"""`local`: a short gradient fit of one layer to what the teacher's layer does, with held-out early stopping."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe2dense.student.footprint import rows_at_once
from moe2dense.student.types import DenseFFN, dense


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


def relative_error(ffn: DenseFFN, x: Tensor, target: Tensor) -> float:
    """Mean of |f(x) - t|^2 over tokens, relative to the mean of |t|^2; x [T, H], target [T, H]. Computed where the FFN is."""
    if len(x) == 0:
        return math.nan
    chunk, device, missed = rows_at_once(ffn.width), ffn.down.device, 0.0
    for i in range(0, len(x), chunk):
        got = ffn(x[i : i + chunk].to(device))
        missed += float((got - target[i : i + chunk].to(device)).pow(2).sum())
    return missed / max(float(target.pow(2).sum()), 1e-30)


def local(
    ffn: DenseFFN,
    x: Tensor,
    target: Tensor,
    held_out: Tensor,
    steps: int = 300,
    lr: float = 2e-3,
    batch: int = 2048,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[DenseFFN, Fit]:
    """`ffn` trained for `steps` batches of tokens towards target [T, H] on inputs x [T, H]: local feature distillation.

    `held_out` [T] bool marks the tokens that are kept back to choose the step; the result's error on them is never above the start's.
    Computed on `device`; the result is on the CPU.
    """
    copy = dense(ffn).to(device)
    x, target, held_out = (t.to(device) for t in (x, target, held_out))
    rows = torch.nonzero(~held_out).flatten()
    x_held, t_held = x[held_out], target[held_out]
    scale = target.pow(2).mean().clamp_min(1e-30)

    def loss(index: Tensor) -> Tensor:
        pick = rows[index.to(rows.device)]
        return (copy(x[pick]) - target[pick]).pow(2).mean() / scale

    def check() -> float:
        with torch.no_grad():
            return relative_error(copy, x_held, t_held)

    if len(rows) == 0 or not bool(held_out.any()):
        return copy.to("cpu"), Fit(math.nan, math.nan, 0)
    done = fit(copy.parameters(), loss, check, len(rows), steps, lr, batch, seed)
    return copy.to("cpu"), done
