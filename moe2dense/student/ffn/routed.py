"""Fold routing weights into a layer's experts, so that a method can treat them as plain FFNs."""

import torch
from torch import Tensor

from moe2dense.student.ffn.dense import DenseFFN, Experts, dense
from moe2dense.student.ffn.task import FFNTask

# E experts


class InputScaled:
    """Routed experts whose inputs are multiplied with their mean routing weights [E], read on demand."""

    def __init__(self, experts: Experts, weight: Tensor):
        self.experts, self.weight = experts, weight

    def __len__(self) -> int:
        return len(self.experts)

    def __getitem__(self, expert: int, /) -> DenseFFN:
        ffn, weight = dense(self.experts[expert]), float(self.weight[expert])
        ffn.gate, ffn.up = ffn.gate * weight, ffn.up * weight
        return ffn


def folded(task: FFNTask) -> tuple[Experts, Tensor]:
    """Return a layer's experts and what each one's output counts in the mean over all tokens [E].

    That is the mean routing weight. Where the routing weight multiplies an expert's input instead, its mean over the expert's
    tokens goes into gate and up projections, and the output counts by the share of tokens that choose the expert. An expert that
    no token chose gets the mean of the others.
    """
    if not task.input_scaled:
        return task.experts, task.alpha
    assert task.stats is not None
    overall = task.stats.weight.sum() / task.stats.count.sum().clamp(min=1)
    weight = torch.where(task.stats.count > 0, task.stats.mean_weight, overall)
    return InputScaled(task.experts, weight.float()), task.stats.load.float()
