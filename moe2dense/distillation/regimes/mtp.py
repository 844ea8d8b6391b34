"""Multi-token prediction by self-distillation: small heads that predict the tokens after the next one.

Head j reads the student's last hidden state at t and learns what the teacher says at t + j: its distribution of the token
t + j + 1. Heads are Medusa's (2401.10774): x + silu(W x), W zero at first, read by the student's own output embedding. The
heads know nothing at first, so their gradient would push the student off its course: `regime.trunk` says how much of it reaches the
student's own weights, by default none, as in Medusa's first stage; a schedule that rises warms the heads up first. The exported model
has none; with regime.keep_heads they lie beside it in mtp_heads.safetensors, which `load_heads` here reads and no serving stack does.
"""

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from moe2dense.config.schedules import scheduled
from moe2dense.config.schema import RegimeConfig
from moe2dense.distillation.batches import Batches
from moe2dense.distillation.regime import Regime, RunView
from moe2dense.distillation.step import Plan
from moe2dense.errors import UserError
from moe2dense.losses.distillation import distillation_loss

# N blocks, S block length, n = N S tokens, H hidden, K heads
FILE = "mtp_heads.safetensors"


class Heads(nn.Module):
    """K maps [n, H] -> [n, H], whose results the model's own head turns into logits of tokens further ahead."""

    def __init__(self, count: int, hidden: int):
        super().__init__()
        maps = [nn.Linear(hidden, hidden, bias=False) for _ in range(count)]
        for one in maps:
            nn.init.zeros_(one.weight)
        self.maps = nn.ModuleList(maps)

    def ahead(self, hidden: Tensor, head: int) -> Tensor:
        """The hidden states of head `head` (from 0)."""
        return hidden + F.silu(self.maps[head](hidden))


def scaled(value: Tensor, share: float) -> Tensor:
    """`value`, exactly, through which `share` of a gradient passes."""
    return value.detach() if share == 0 else torch.lerp(value.detach(), value, share)


class HeadsLoss(nn.Module):
    """The heads' distillation loss, `weight` times their mean; `trunk` of its gradient reaches the model that they sit on.

    `seen`: its value [K], summed over the passes of a step.
    """

    def __init__(self, heads: Heads):
        super().__init__()
        self.heads, self.weight, self.trunk = heads, 0.0, 1.0
        self.seen = torch.zeros(len(heads.maps), dtype=torch.float64)

    def forward(self, hidden: Tensor, head: Any, inputs: dict[str, Tensor], teacher: Any, options: dict) -> Tensor:
        """hidden [n, H] of N blocks; teacher: their n rows; options: those of `distillation_loss`."""
        if teacher is None:
            raise UserError("the mtp regime learns from the teacher's distributions; train.alpha must stay below 1")
        total = sum((p.sum() * 0.0 for p in self.parameters()), hidden.new_zeros(()))
        hidden, bias = scaled(hidden, self.trunk), head.bias
        head = replace(
            head, weight=scaled(head.weight, self.trunk), bias=None if bias is None else scaled(bias, self.trunk)
        )
        for j in range(len(self.heads.maps)):
            here, there = pairs(inputs, options.get("mask"), j + 1)
            if len(here) == 0:
                continue
            found = distillation_loss(
                self.heads.ahead(hidden[here], j), head, teacher.select(there), loss=options.get("loss", "forward_kl"),
                temperature=options.get("temperature", 1.0), denominator=options["denominator"],
            )  # fmt: skip
            self.seen[j] += found.kd.detach().double().cpu()
            total = total + found.total / len(self.heads.maps)
        return self.weight * total


def pairs(inputs: dict[str, Tensor], mask: Tensor | None, ahead: int) -> tuple[Tensor, Tensor]:
    """Flat indices of positions t and t + ahead of one document, where the latter counts."""
    ids = inputs["input_ids"]
    index = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
    here, there = index[:, :-ahead].flatten(), index[:, ahead:].flatten()
    keep = torch.ones_like(here, dtype=torch.bool)
    if "position_ids" in inputs:
        documents = (inputs["position_ids"] == 0).cumsum(1).flatten()
        keep &= documents[here] == documents[there]
    if "attention_mask" in inputs:
        keep &= inputs["attention_mask"].flatten()[here].bool()
    if mask is not None:
        keep &= mask[there]
    return here[keep], there[keep]


class MultiToken(Regime):
    """`regime.heads` heads train beside the student, their loss weighted by `regime.head_weight`."""

    name = "mtp"

    def __init__(self, options: RegimeConfig):
        self.options = options

    def about(self) -> dict[str, Any]:
        return {k: getattr(self.options, k) for k in ("heads", "head_weight", "trunk")}

    def extra(self, model: Any) -> nn.Module:
        weight = model.get_output_embeddings().weight
        self.loss = HeadsLoss(Heads(self.options.heads, weight.shape[1])).to(weight.device, weight.dtype)
        return self.loss

    def begin(self, run: RunView) -> None:
        self.steps, self.accelerator = run.steps, run.accelerator

    def batches_for(self, step: int, batches: Batches, plan: Plan) -> tuple[Batches, Plan]:
        self.loss.weight = scheduled(self.options.head_weight, step, self.steps)
        self.loss.trunk = scheduled(self.options.trunk, step, self.steps)
        self.loss.seen.zero_()
        return batches, plan

    def after_step(self, step: int, batches: Batches, plan: Plan) -> dict[str, float]:
        seen = self.loss.seen.to(self.accelerator.device)
        if self.accelerator.num_processes > 1:
            seen = self.accelerator.reduce(seen, "sum")
        return {f"head_{j + 1}": v for j, v in enumerate(torch.as_tensor(seen).tolist()) if math.isfinite(v)}

    def finish(self, out: Path | None) -> None:
        if out is not None and self.options.keep_heads and self.accelerator.is_main_process:
            save_heads(self.loss.heads, out / FILE)


def save_heads(heads: Heads, path: Path) -> None:
    """Write heads to a safetensors file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    save_file({k: v.detach().cpu().contiguous() for k, v in heads.state_dict().items()}, temporary)
    temporary.replace(path)


def copy_heads(run: Path, model: Path) -> None:
    """Put the heads that a training run kept beside its exported model; nothing where it kept none."""
    if (run / FILE).is_file():
        shutil.copyfile(run / FILE, model / FILE)


def load_heads(path: str | Path) -> Heads:
    """The heads beside an exported model: the file, or the folder that holds it. Raises UserError when there are none."""
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path} does not exist; train with regime mtp and keep_heads = true")
    tensors = load_file(path)
    heads = Heads(len(tensors), len(next(iter(tensors.values()))))
    heads.load_state_dict(tensors)
    return heads
