"""Compute the objective (1 - alpha) T^2 divergence(teacher, student) + alpha cross-entropy (Hinton et al., 1503.02531)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moe2dense.errors import UserError
from moe2dense.losses.divergences import cross_entropy
from moe2dense.losses.teacher_rows import RowLoss, TeacherRows
from moe2dense.losses.tiled import TILE_BYTES, TileLoss, compute_dtype, tiled_loss
from moe2dense.modeling.head import OutputHead

# n tokens, H hidden, V vocabulary


@dataclass
class Loss:
    """The objective and its parts, as means over tokens."""

    # the objective, differentiable
    total: Tensor
    # T^2 times the divergence
    kd: Tensor
    # the hard-label loss
    ce: Tensor
    # what the watched tokens add to `kd`
    watched: Tensor


@dataclass
class _Settings:
    """The objective's numbers, and what of them a tile of tokens needs."""

    teacher: TeacherRows | None
    labels: Tensor | None
    weights: Tensor | None
    watch: Tensor | None
    loss: str
    temperature: float
    alpha: float
    scale: float
    label_scale: float

    def tile_loss(self, rows: slice, dtype: torch.dtype) -> TileLoss:
        """Return the loss of the tokens `rows`."""
        divergence = None
        if self.teacher is not None and self.alpha < 1:
            divergence = self.teacher.tile(rows, self.loss, self.temperature, dtype)
        labels, watch, weights = (None if x is None else x[rows] for x in (self.labels, self.watch, self.weights))

        def tile(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
            kd = ce = torch.zeros(len(logits), dtype=dtype, device=logits.device)
            grad = None
            if labels is not None:
                ce, grad = cross_entropy(labels[part], F.log_softmax(logits, -1))
                grad = grad.mul_(self.alpha * self.label_scale) if self.alpha > 0 else None
                ce = ce * self.label_scale
            if divergence is not None:
                kd, soft = self._soft(logits, divergence, part, None if weights is None else weights[part].to(dtype))
                grad = soft if grad is None else grad.add_(soft)
            assert grad is not None
            watched = kd if watch is None else kd * watch[part]
            return torch.stack([(1 - self.alpha) * kd + self.alpha * ce, kd, ce, watched]), grad

        return tile

    def _soft(self, logits: Tensor, divergence: RowLoss, part: slice, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the teacher's part: values [r] and gradient [r, V]. Ids of one side alone, which are padding, do not count."""
        assert self.teacher is not None
        width = min(logits.shape[1], self.teacher.vocabulary or logits.shape[1])
        known = logits if width == logits.shape[1] else logits[:, :width]
        log_q = F.log_softmax(known if self.temperature == 1.0 else known / self.temperature, -1)
        kd, grad = divergence(log_q, part)
        factor: float | Tensor = (1 - self.alpha) * self.scale / self.temperature
        if weights is not None:
            kd, factor = kd * weights, factor * weights[:, None]
        grad = grad.mul_(factor)
        if width < logits.shape[1]:
            grad = F.pad(grad, (0, logits.shape[1] - width))
        return kd * self.scale, grad


def distillation_loss(
    hidden: Tensor,
    head: OutputHead | None,
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
    """Return the distillation objective over n tokens, exact, computed in tiles.

    hidden [n, H] with the student's head, or its logits [n, V] with head None; teacher: n rows, or None when alpha is
    1; labels [n], -100 = none; mask [n] bool: tokens that count; weights [n]: of each token; watch [n] bool: tokens whose
    part is reported apart. alpha weighs the hard labels.
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

    settings = _Settings(teacher, labels, weights, watch, loss, temperature, alpha, scale, label_scale)
    dtype = compute_dtype(hidden.dtype)
    parts = tiled_loss(hidden, head, lambda rows: settings.tile_loss(rows, dtype), tile_bytes)
    if len(hidden) == 0:
        parts = parts.expand(4)
    return Loss(parts[0], *(p.detach() for p in parts[1:]))
