"""Multi-token prediction by self-distillation: small heads that predict the tokens after the next one.

Head j reads the student's last hidden state at t and learns the teacher's distribution at t + j, which is of the token
t + j + 1. Heads are Medusa's (2401.10774): x + silu(W x), W zero at first, followed by the student's own output embedding. Untrained
heads have a gradient that would disturb the student: `regime.trunk` is the share of it that reaches the student's own weights, by
default none, as in Medusa's first stage; a schedule that rises trains the heads first. The exported model has no heads; with
regime.keep_heads they are written beside it as mtp_heads.safetensors, which `load_heads` here reads and no serving stack does.
"""

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from moe2dense.common.files import atomic_write
from moe2dense.config.schedules import scheduled
from moe2dense.config.training import RegimeConfig
from moe2dense.distillation.batches import Batches
from moe2dense.distillation.regime import Regime, RunView
from moe2dense.distillation.step import StepPlan
from moe2dense.errors import UserError
from moe2dense.losses.distillation import distillation_loss
from moe2dense.losses.teacher_rows import TeacherRows
from moe2dense.modeling.documents import document_numbers
from moe2dense.modeling.head import Head, model_head
from moe2dense.modeling.kinds import BuiltStudent
from moe2dense.teacher.kinds import AnyTeacher
from moe2dense.weights.tensors import read_tensors

# N blocks, S block length, n = N S tokens, H hidden, K heads
HEADS_FILE = "mtp_heads.safetensors"
_IN_CHECKPOINT = "extra.heads."  # what precedes the heads' names among a checkpoint's weights


class Heads(nn.Module):
    """K maps [n, H] -> [n, H], whose results the model's own head turns into logits of tokens further ahead."""

    def __init__(self, count: int, hidden: int):
        super().__init__()
        maps = [nn.Linear(hidden, hidden, bias=False) for _ in range(count)]
        for linear in maps:
            nn.init.zeros_(linear.weight)
        self.maps = nn.ModuleList(maps)

    def ahead(self, hidden: Tensor, head: int) -> Tensor:
        """Return the hidden states of head `head` (from 0)."""
        return hidden + F.silu(self.maps[head](hidden))


def scaled(value: Tensor, share: float) -> Tensor:
    """Return `value`, exactly, through which `share` of a gradient passes."""
    return value.detach() if share == 0 else torch.lerp(value.detach(), value, share)


class HeadsLoss(nn.Module):
    """The heads' distillation loss, `weight` times their mean.

    `trunk` of its gradient reaches the model that they sit on. `values`: the loss of each head [K], summed over the passes of
    a step.
    """

    def __init__(self, heads: Heads):
        super().__init__()
        self.heads, self.weight, self.trunk = heads, 0.0, 1.0
        self.values = torch.zeros(len(heads.maps), dtype=torch.float64)

    def forward(
        self,
        hidden: Tensor,
        head: Head,
        inputs: dict[str, Tensor],
        teacher: TeacherRows | None,
        options: dict[str, Any],
    ) -> Tensor:
        """Return the loss at hidden [n, H] of N blocks; teacher: their n rows; options: those of `distillation_loss`."""
        if teacher is None:
            raise UserError("the mtp regime learns from the teacher's distributions; train.alpha must stay below 1")
        total = sum((p.sum() * 0.0 for p in self.parameters()), hidden.new_zeros(()))
        hidden, bias = scaled(hidden, self.trunk), head.bias
        head = replace(
            head, weight=scaled(head.weight, self.trunk), bias=None if bias is None else scaled(bias, self.trunk)
        )
        for j in range(len(self.heads.maps)):
            positions, goals = pairs(inputs, options.get("mask"), j + 1)
            if len(positions) == 0:
                continue
            loss = distillation_loss(
                self.heads.ahead(hidden[positions], j), head, teacher.select(goals), loss=options.get("loss", "forward_kl"),
                temperature=options.get("temperature", 1.0), denominator=options["denominator"],
            )  # fmt: skip
            self.values[j] += loss.kd.detach().double().cpu()
            total = total + loss.total / len(self.heads.maps)
        return self.weight * total


def pairs(inputs: dict[str, Tensor], mask: Tensor | None, ahead: int) -> tuple[Tensor, Tensor]:
    """Return flat indices of positions t and t + ahead of one document, where the latter counts."""
    ids = inputs["input_ids"]
    index = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
    positions, goals = index[:, :-ahead].flatten(), index[:, ahead:].flatten()
    keep = torch.ones_like(positions, dtype=torch.bool)
    if "position_ids" in inputs:
        documents = document_numbers(inputs["position_ids"]).flatten()
        keep &= documents[positions] == documents[goals]
    if "attention_mask" in inputs:
        keep &= inputs["attention_mask"].flatten()[positions].bool()
    if mask is not None:
        keep &= mask[goals]
    return positions[keep], goals[keep]


class MultiToken(Regime):
    """Trains `regime.heads` heads with the student, their loss weighted by `regime.head_weight`."""

    name = "mtp"

    def __init__(self, options: RegimeConfig):
        self.options = options

    @classmethod
    def create(
        cls, options: RegimeConfig, teacher: AnyTeacher | None, peer: BuiltStudent | PreTrainedModel | None
    ) -> Regime:
        """Make the regime for one run."""
        return cls(options)

    def settings(self) -> dict[str, Any]:
        """Return the options of the heads' training."""
        return {k: getattr(self.options, k) for k in ("heads", "head_weight", "trunk")}

    def extra_loss(self, model: PreTrainedModel) -> nn.Module:
        """Return the heads with their loss."""
        weight = model_head(model).weight
        self.loss = HeadsLoss(Heads(self.options.heads, weight.shape[1])).to(weight.device, weight.dtype)
        return self.loss

    def begin(self, run: RunView) -> None:
        """Note the run."""
        self.steps, self.accelerator = run.steps, run.accelerator

    def batches_for(self, step: int, batches: Batches, plan: StepPlan) -> tuple[Batches, StepPlan]:
        """Set the heads' weights of this step."""
        self.loss.weight = scheduled(self.options.head_weight, step, self.steps)
        self.loss.trunk = scheduled(self.options.trunk, step, self.steps)
        self.loss.values.zero_()
        return batches, plan

    def after_step(self, step: int, batches: Batches, plan: StepPlan) -> dict[str, float]:
        """Return each head's loss."""
        values = self.loss.values.to(self.accelerator.device)
        if self.accelerator.num_processes > 1:
            values = self.accelerator.reduce(values, "sum")
        return {f"head_{j + 1}": v for j, v in enumerate(torch.as_tensor(values).tolist()) if math.isfinite(v)}

    def finish(self, out: Path | None) -> None:
        """Write the heads where they are to be kept."""
        if out is not None and self.options.keep_heads and self.accelerator.is_main_process:
            save_heads(self.loss.heads, out / HEADS_FILE)


def save_heads(heads: Heads, path: Path) -> None:
    """Write heads to a safetensors file, whole or not at all."""
    atomic_write(path, save({k: v.detach().cpu().contiguous() for k, v in heads.state_dict().items()}))


def keep_heads_of(weights: dict[str, Tensor], run: Path) -> None:
    """Put the heads of a checkpoint's weights in the place of the last step's, where the run kept any."""
    own = {n.removeprefix(_IN_CHECKPOINT): v for n, v in weights.items() if n.startswith(_IN_CHECKPOINT)}
    if own and (run / HEADS_FILE).is_file():
        atomic_write(run / HEADS_FILE, save({name: value.contiguous() for name, value in own.items()}))


def copy_heads(run: Path, model: Path) -> None:
    """Copy the heads that a training run kept into its exported model's folder; do nothing where it kept none."""
    if (run / HEADS_FILE).is_file():
        shutil.copyfile(run / HEADS_FILE, model / HEADS_FILE)


def load_heads(path: str | Path) -> Heads:
    """Load the heads beside an exported model from their file, or its folder. Raises UserError when there are none."""
    path = Path(path)
    path = path / HEADS_FILE if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path} does not exist; train with regime mtp and keep_heads = true")
    tensors = read_tensors(path, "train again with keep_heads = true")
    heads = Heads(len(tensors), len(next(iter(tensors.values()))))
    heads.load_state_dict(tensors)
    return heads
