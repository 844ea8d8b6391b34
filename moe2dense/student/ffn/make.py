"""Make a layer's FFN by a method: shared experts first, then the method's neurons, padded to the student's width."""

import pkgutil
from collections.abc import Callable

import torch
from torch import Tensor

from moe2dense.student.ffn.dense import DenseFFN, concatenate
from moe2dense.student.ffn.energy import trim_to_width
from moe2dense.student.ffn.methods import METHODS
from moe2dense.student.ffn.randomized import pad
from moe2dense.student.ffn.task import FFNTask, SourcedFFN
from moe2dense.student.types import MIXED, NEW, SHARED, LayerProvenance

# E experts, F expert width, M student FFN width


def make_ffn(task: FFNTask, base: str) -> tuple[DenseFFN, LayerProvenance | None]:
    """Return the FFN of exactly `task.width` neurons that method `base` makes, and where its neurons come from.

    FFNs that every token passes come first, unscaled, unless the method uses nothing of the teacher. The routed experts get the rest of the width. What
    no method fills is padded with neurons that write zero. A layer without routed experts keeps its own FFN.
    """
    row = METHODS[base]
    method: Callable[[FFNTask, int], SourcedFFN] = pkgutil.resolve_name(row.implementation)
    if not row.uses_teacher:
        whole = method(task, task.width)
        return whole.ffn.to(task.device), _provenance(task, whole.expert, whole.neuron)
    parts: list[SourcedFFN] = []
    for ffn in task.always_on:
        trimmed = trim_to_width(ffn, task.x, task.width - _width(parts))
        if trimmed.width:
            marks = torch.full((trimmed.width,), SHARED)
            parts.append(SourcedFFN(trimmed, marks, torch.arange(trimmed.width)))
    left = task.width - _width(parts)
    if task.experts and left > 0:
        parts.append(method(task, left))
    narrow = concatenate([part.ffn for part in parts])
    padded = pad(narrow, task.width, task.std, task.seed)
    padding = torch.full((task.width - narrow.width,), NEW)
    expert = torch.cat([*(part.expert for part in parts), padding])
    neuron = torch.cat([*(part.neuron for part in parts), torch.full_like(padding, -1)])
    return padded, _provenance(task, expert, neuron)


def _width(parts: list[SourcedFFN]) -> int:
    return sum(part.ffn.width for part in parts)


def _provenance(task: FFNTask, expert: Tensor, neuron: Tensor) -> LayerProvenance | None:
    if not task.experts:
        return None
    energies = torch.stack(task.energies).float()  # [E, F]
    total = energies.sum(1)
    energy_kept = torch.zeros_like(total)
    routed = expert >= 0
    energy_kept.index_add_(0, expert[routed], energies[expert[routed], neuron[routed]])
    mixed = int((expert == MIXED).sum())
    if mixed:  # an average holds 1/E of each neuron that went into it
        energy_kept += total * min(1.0, mixed / energies.numel())
    return LayerProvenance(expert, neuron, total, energy_kept)
