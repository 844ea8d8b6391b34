"""One optimiser step and one validation of a distillation, for any number of processes."""

import contextlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from moe2dense.config.schedules import learning_rate, scheduled
from moe2dense.config.training import TrainConfig
from moe2dense.distillation.batches import Batches
from moe2dense.distillation.batching import micro_batches, step_blocks
from moe2dense.distillation.fsdp import full_tensor
from moe2dense.distillation.optimizers import RATE
from moe2dense.distillation.targets.formats import written_temperature
from moe2dense.losses.feature_spec import feature_weights
from moe2dense.optimizers.tensorwise import TensorwiseOptimizer

# N blocks, S block length, n = N S tokens

# blocks of a forward pass -> the context in which the student makes it
PassContext = Callable[[list[int]], AbstractContextManager[None]]


@dataclass
class StepPlan:
    """The numbers of one step: a pure function of the settings and the step."""

    indices: list[int]
    lr: float
    alpha: float
    temperature: float
    # of each term of the features
    feature_weights: tuple[float, ...] = ()


def plan_step(config: TrainConfig, blocks: int, per_step: int, step: int, steps: int, seed: int) -> StepPlan:
    """Return which blocks step `step` (from 0) sees, and with what settings."""
    return StepPlan(
        indices=step_blocks(blocks, per_step, step, seed),
        lr=learning_rate(step, steps, config.lr, config.warmup, config.cooldown),
        alpha=scheduled(config.alpha_schedule or config.alpha, step, steps),
        temperature=scheduled(config.temperature_schedule or config.temperature, step, steps),
        feature_weights=feature_weights(config.features, config.feature_weight, step, steps),
    )


def plain_pass(rows: list[int]) -> AbstractContextManager[None]:
    """Return a context that changes nothing."""
    return contextlib.nullcontext()


def inner_optimizer(optimizer: torch.optim.Optimizer) -> TensorwiseOptimizer:
    """Return the optimiser inside accelerate's wrapper, which steps tensor by tensor."""
    inner = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    assert isinstance(inner, TensorwiseOptimizer)
    return inner


def asked_anywhere(accelerator: Accelerator, asked: bool) -> bool:
    """Return whether any process was asked to stop, so that all stop after the same step."""
    if accelerator.num_processes == 1:
        return asked
    return bool(torch.as_tensor(accelerator.reduce(torch.tensor(float(asked), device=accelerator.device))))


def train_step(
    accelerator: Accelerator,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    plan: StepPlan,
    config: TrainConfig,
    pass_context: PassContext = plain_pass,
) -> dict[str, Any]:
    """Make one optimiser step over the global batch; return loss, parts, lr, grad_norm.

    pass_context: of the student's forward pass on some blocks. Raises FloatingPointError, with the weights untouched, when
    loss or gradient is not finite.
    """
    world, device = accelerator.num_processes, accelerator.device
    for group in optimizer.param_groups:
        group["lr"] = plan.lr * group.get(RATE, 1.0)
    counts = batches.denominators(plan.indices)
    parts = micro_batches(plan.indices, accelerator.process_index, world, config.micro_batch)
    sums = torch.zeros(4, device=device, dtype=torch.float64)
    objective.train()
    for i, part in enumerate(parts):
        inputs, teacher, options = batches.part(part, device, plan.alpha > 0, plan.indices[0])
        last = i == len(parts) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(objective):
            with pass_context(part or plan.indices[:1]):
                total, kd, ce, _, features = objective(
                    inputs, teacher if plan.alpha < 1 else None,
                    loss=config.loss, temperature=plan.temperature, alpha=plan.alpha,
                    feature_weights=plan.feature_weights, **counts, **options,
                )  # fmt: skip
            # processes average their gradients, and each holds its share of one mean
            accelerator.backward(total * world if world > 1 else total)
        sums += torch.stack([x.detach() for x in (total, kd, ce, features)])
    if config.step_in_backward:
        norm = float(inner_optimizer(optimizer).norm_of_backward())
    else:
        clipped: Any = accelerator.clip_grad_norm_(objective.parameters(), config.clip or math.inf)
        norm = float(full_tensor(clipped))
    if world > 1:
        sums = torch.as_tensor(accelerator.reduce(sums, "sum"))
    loss, kd, ce, features = sums.tolist()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        optimizer.zero_grad(set_to_none=True)
        raise FloatingPointError(f"the loss is {loss:g} and the gradient's norm {norm:g}")
    if not config.step_in_backward:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    named = ({"kd": kd} if plan.alpha < 1 else {}) | ({"ce": ce} if plan.alpha > 0 else {})
    named |= {"features": features} if plan.feature_weights else {}
    return {"loss": loss, "parts": named, "lr": plan.lr, "grad_norm": norm}


@torch.no_grad()
def validate(accelerator: Accelerator, objective: nn.Module, batches: Batches, micro: int) -> dict[str, float]:
    """Return KL(teacher || student) and the student's NLL over all positions that count.

    The KL is taken at the targets' own temperature.
    """
    everything = list(range(len(batches.blocks)))
    counts, device = batches.denominators(everything), accelerator.device
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    objective.eval()
    for part in micro_batches(everything, accelerator.process_index, accelerator.num_processes, micro):
        inputs, teacher, options = batches.part(part, device, True)
        temperature = written_temperature(teacher) or 1.0
        _, kl, nll, watched, _ = objective(inputs, teacher, temperature=temperature, **counts, **options)
        sums += torch.stack([kl / temperature**2, nll, watched / temperature**2])
    if accelerator.num_processes > 1:
        sums = torch.as_tensor(accelerator.reduce(sums, "sum"))
    scores = {"valid_kl": float(sums[0]), "valid_nll": float(sums[1])}
    if batches.watch is not None:
        share = float((batches.watch & batches.mask).sum()) / counts["denominator"]
        scores["valid_rare_kl"] = float(sums[2]) / max(share, 1e-12)
    return scores
