"""One optimiser step and one validation of a distillation, for any number of processes."""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from moe2dense.config import TrainConfig
from moe2dense.data import Blocks
from moe2dense.losses.matching import feature_weights
from moe2dense.metrics import model_inputs
from moe2dense.order import micro_batches, step_blocks
from moe2dense.schedules import learning_rate, scheduled
from moe2dense.sharding import whole
from moe2dense.targets.memory import Targets

# N blocks, S block length, n = N S tokens


@dataclass
class Lesson:
    """Blocks with what the teacher says about them."""

    blocks: Blocks
    targets: Targets | None
    watch: Tensor | None = None  # [N, S] bool: tokens whose KL is reported apart
    weights: Tensor | None = None  # [N, S]: of each token's distillation loss

    @cached_property
    def mask(self) -> Tensor:
        """[N, S] bool: the positions that count."""
        return self.blocks.loss_mask()

    @cached_property
    def labels(self) -> Tensor:
        """[N, S]: next tokens, -100 where there is none."""
        return self.blocks.labels()

    def denominators(self, indices: Sequence[int]) -> dict[str, float]:
        """How many positions and labels some blocks have."""
        rows = list(indices)
        kept = self.mask[rows]
        return {
            "denominator": float(kept.sum()),
            "label_denominator": float((self.labels[rows][kept] >= 0).sum()),
        }

    def part(self, indices: list[int], device: torch.device, labels: bool, spare: int = 0) -> tuple[Any, Any, dict]:
        """Model inputs, teacher rows and per-token options of one forward pass.

        Without blocks it is a wholly masked copy of block `spare`, so that every process runs the same number of passes.
        """
        rows = indices or [spare]
        mask = self.mask[rows].flatten() & bool(indices)
        options: dict[str, Any] = {} if bool(mask.all()) else {"mask": mask.to(device)}
        if labels:
            options["labels"] = self.labels[rows].flatten().to(device)
        if self.watch is not None:
            options["watch"] = self.watch[rows].flatten().to(device)
        if self.weights is not None:
            options["weights"] = self.weights[rows].flatten().to(device)
        teacher = None if self.targets is None else self.targets.batch(rows)
        return model_inputs(self.blocks[rows], device), _to(teacher, device), options


def _to(rows: Any, device: torch.device) -> Any:
    return rows if rows is None or device.type == "cpu" else rows.to(device)


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
    accelerator: Any, objective: Any, optimizer: Any, lesson: Lesson, plan: Plan, config: TrainConfig
) -> dict[str, Any]:
    """One optimiser step over the global batch; returns loss, parts, lr, grad_norm.

    Raises FloatingPointError, with the weights untouched, when loss or gradient is not finite.
    """
    world, device = accelerator.num_processes, accelerator.device
    for group in optimizer.param_groups:
        group["lr"] = plan.lr
    counts = lesson.denominators(plan.indices)
    parts = micro_batches(plan.indices, accelerator.process_index, world, config.micro_batch)
    sums = torch.zeros(4, device=device, dtype=torch.float64)
    objective.train()
    for i, part in enumerate(parts):
        inputs, teacher, options = lesson.part(part, device, plan.alpha > 0, plan.indices[0])
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
    norm = float(whole(accelerator.clip_grad_norm_(objective.parameters(), config.clip or math.inf)))
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
def validate(accelerator: Any, objective: Any, lesson: Lesson, micro: int) -> dict[str, float]:
    """KL(teacher || student), at the targets' own temperature, and the student's NLL, over all positions that count."""
    everything = list(range(len(lesson.blocks)))
    counts, device = lesson.denominators(everything), accelerator.device
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    objective.eval()
    for part in micro_batches(everything, accelerator.process_index, accelerator.num_processes, micro):
        inputs, teacher, options = lesson.part(part, device, True)
        temperature = getattr(teacher, "temperature", 1.0)
        _, kl, nll, watched, _ = objective(inputs, teacher, temperature=temperature, **counts, **options)
        sums += torch.stack([kl / temperature**2, nll, watched / temperature**2])
    if accelerator.num_processes > 1:
        sums = accelerator.reduce(sums, "sum")
    found = {"valid_kl": float(sums[0]), "valid_nll": float(sums[1])}
    if lesson.watch is not None:
        share = float((lesson.watch & lesson.mask).sum()) / counts["denominator"]
        found["valid_rare_kl"] = float(sums[2]) / max(share, 1e-12)
    return found


def rare_positions(held: Blocks, training: Blocks, share: float = 0.1) -> Tensor:
    """[N, S] bool: the held-out positions whose next token is among the rarest `share` by its count in the training text."""
    labels = held.labels()
    size = int(max(held.input_ids.max(), training.input_ids.max())) + 1
    counts = torch.bincount(training.input_ids.flatten(), minlength=size)[labels.clamp(min=0)]
    known = labels >= 0
    if not bool(known.any()):
        return known
    bound = counts[known].sort().values[int(share * (int(known.sum()) - 1))]
    return known & (counts <= bound)
