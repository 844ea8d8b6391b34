"""One optimiser step and one validation of a distillation, for any number of processes."""

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import torch

from moe2dense.config.schedules import learning_rate, scheduled
from moe2dense.config.schema import TrainConfig
from moe2dense.distillation.batches import Batches
from moe2dense.distillation.batching import micro_batches, step_blocks
from moe2dense.distillation.fsdp import full_tensor
from moe2dense.losses.feature_match import feature_weights

# N blocks, S block length, n = N S tokens


@dataclass
class Plan:
    """The numbers of one step: a pure function of the settings and the step."""

    indices: list[int]
    lr: float
    alpha: float
    temperature: float
    feature_weights: tuple[float, ...] = ()  # of each term of the features


def plan_step(config: TrainConfig, blocks: int, per_step: int, step: int, steps: int, seed: int) -> Plan:
    """Which blocks step `step` (from 0) sees, and with what settings."""
    return Plan(
        indices=step_blocks(blocks, per_step, step, seed),
        lr=learning_rate(step, steps, config.lr, config.warmup),
        alpha=scheduled(config.alpha_schedule or config.alpha, step, steps),
        temperature=scheduled(config.temperature_schedule or config.temperature, step, steps),
        feature_weights=feature_weights(config.features, config.feature_weight, step, steps),
    )


def train_step(
    accelerator: Any, objective: Any, optimizer: Any, batches: Batches, plan: Plan, config: TrainConfig
) -> dict[str, Any]:
    """One optimiser step over the global batch; returns loss, parts, lr, grad_norm.

    Raises FloatingPointError, with the weights untouched, when loss or gradient is not finite.
    """
    world, device = accelerator.num_processes, accelerator.device
    for group in optimizer.param_groups:
        group["lr"] = plan.lr
    counts = batches.denominators(plan.indices)
    parts = micro_batches(plan.indices, accelerator.process_index, world, config.micro_batch)
    sums = torch.zeros(4, device=device, dtype=torch.float64)
    objective.train()
    for i, part in enumerate(parts):
        inputs, teacher, options = batches.part(part, device, plan.alpha > 0, plan.indices[0])
        last = i == len(parts) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(objective):
            found = objective(
                inputs, teacher if plan.alpha < 1 else None,
                loss=config.loss, temperature=plan.temperature, alpha=plan.alpha,
                feature_weights=plan.feature_weights, **counts, **options,
            )  # fmt: skip
            # processes average their gradients, and each holds its share of one mean
            accelerator.backward(found[0] * world if world > 1 else found[0])
        total, kd, ce, _, features = found
        sums += torch.stack([x.detach() for x in (total, kd, ce, features)])
    norm = float(full_tensor(accelerator.clip_grad_norm_(objective.parameters(), config.clip or math.inf)))
    if world > 1:
        sums = accelerator.reduce(sums, "sum")
    loss, kd, ce, features = sums.tolist()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        optimizer.zero_grad(set_to_none=True)
        raise FloatingPointError(f"the loss is {loss:g} and the gradient's norm {norm:g}")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    named = ({"kd": kd} if plan.alpha < 1 else {}) | ({"ce": ce} if plan.alpha > 0 else {})
    named |= {"features": features} if plan.feature_weights else {}
    return {"loss": loss, "parts": named, "lr": plan.lr, "grad_norm": norm}


@torch.no_grad()
def validate(accelerator: Any, objective: Any, batches: Batches, micro: int) -> dict[str, float]:
    """KL(teacher || student), at the targets' own temperature, and the student's NLL, over all positions that count."""
    everything = list(range(len(batches.blocks)))
    counts, device = batches.denominators(everything), accelerator.device
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    objective.eval()
    for part in micro_batches(everything, accelerator.process_index, accelerator.num_processes, micro):
        inputs, teacher, options = batches.part(part, device, True)
        temperature = getattr(teacher, "temperature", 1.0)
        _, kl, nll, watched, _ = objective(inputs, teacher, temperature=temperature, **counts, **options)
        sums += torch.stack([kl / temperature**2, nll, watched / temperature**2])
    if accelerator.num_processes > 1:
        sums = accelerator.reduce(sums, "sum")
    found = {"valid_kl": float(sums[0]), "valid_nll": float(sums[1])}
    if batches.watch is not None:
        share = float((batches.watch & batches.mask).sum()) / counts["denominator"]
        found["valid_rare_kl"] = float(sums[2]) / max(share, 1e-12)
    return found
