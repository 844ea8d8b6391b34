"""The objective: (1 - alpha) T^2 divergence(teacher, student) + alpha cross-entropy, as Hinton et al., 1503.02531."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moe2dense.errors import UserError
from moe2dense.losses.chunked import TILE_BYTES, TileLoss, tiled_loss
from moe2dense.losses.logits import cross_entropy
from moe2dense.losses.rows import TeacherRows

# n tokens, H hidden, V vocabulary


@dataclass
class Loss:
    """total: the objective, differentiable; kd: T^2 times the divergence; ce: the hard-label loss. Means over tokens.

    watched: what the watched tokens add to kd.
    """

    total: Tensor
    kd: Tensor
    ce: Tensor
    watched: Tensor


def distillation_loss(
    hidden: Tensor,
    head: Any,
    teacher: TeacherRows | None,
    *,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    watch: Tensor | None = None,
    loss: str = "forward_kl",
    temperature: float = 1.0,
    alpha: float = 0.0,
    denominator: float | None = None,
    label_denominator: float | None = None,
    tile_bytes: int = TILE_BYTES,
) -> Loss:
    """The distillation objective over n tokens, exact and in tiles.

    hidden [n, H] with the student's head, or its logits [n, V] with head None; teacher: n rows, or None when alpha is
    1; labels [n], -100 = none; mask [n] bool: tokens that count; weights [n]: of each token; watch [n] bool. alpha weighs the hard labels.
    The two losses are divided by `denominator` (default: what counts here) and `label_denominator` (default: the
    labels here): pass the global batch's when this is a part of it. Raises UserError when a part lacks what it needs.
    """
    if not 0 <= alpha <= 1 or temperature <= 0:
        raise UserError(f"alpha must lie in [0, 1] and temperature above 0; found {alpha:g} and {temperature:g}")
    if (teacher is None and alpha < 1) or (labels is None and alpha > 0):
        raise UserError(f"alpha={alpha:g} needs {'labels' if labels is None else 'a teacher'}, which were not given")
    if mask is not None and not bool(mask.all()):
        index = mask.nonzero()[:, 0]
        hidden, teacher = hidden[index], None if teacher is None else teacher.select(index)
        labels, weights, watch = (None if x is None else x[index] for x in (labels, weights, watch))
    if denominator is None:
        denominator = float(len(hidden) if weights is None else weights.sum())
    if label_denominator is None:
        label_denominator = float(len(hidden) if labels is None else (labels >= 0).sum())
    scale = temperature**2 / max(denominator, 1e-12)
    label_scale = 1 / max(label_denominator, 1e-12)

    def opened(rows: slice) -> TileLoss:
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        divergence = teacher.tile(rows, loss, temperature, dtype) if teacher is not None and alpha < 1 else None
        here = None if labels is None else labels[rows]
        watched = None if watch is None else watch[rows]
        token_weights = None if weights is None else weights[rows].to(dtype)

        def tile(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
            kd = ce = torch.zeros(len(logits), dtype=dtype, device=logits.device)
            grad = None
            if here is not None:
                ce, grad = cross_entropy(here[part], F.log_softmax(logits, -1))
                grad = grad.mul_(alpha * label_scale) if alpha > 0 else None
                ce = ce * label_scale
            if divergence is not None:
                log_q = F.log_softmax(logits if temperature == 1.0 else logits / temperature, -1)
                kd, soft = divergence(log_q, part)
                kd = kd * scale
                factor = (1 - alpha) * scale / temperature
                if token_weights is None:
                    soft = soft.mul_(factor)
                else:
                    kd = kd * token_weights[part]
                    soft = soft.mul_(token_weights[part, None] * factor)
                grad = soft if grad is None else grad.add_(soft)
            assert grad is not None
            seen = kd if watched is None else kd * watched[part]
            return torch.stack([(1 - alpha) * kd + alpha * ce, kd, ce, seen]), grad

        return tile

    parts = tiled_loss(hidden, head, opened, tile_bytes)
    if len(hidden) == 0:
        parts = parts.expand(4)
    return Loss(parts[0], *(p.detach() for p in parts[1:]))
