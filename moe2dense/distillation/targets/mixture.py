"""Targets that are a mixture of several models' distributions: the teacher's with a peer's, an average's or other views'.

For forward KL the gradient of the loss to a mixture is the weighted sum of the gradients of the losses to its parts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moe2dense.distillation.targets.memory import Targets
from moe2dense.errors import UserError
from moe2dense.losses.divergences import divergence
from moe2dense.losses.teacher_rows import RowLoss

# n tokens, t tokens of a tile, V vocabulary


@dataclass
class MixedRows:
    """Rows whose distribution is sum_i weight_i softmax(logits_i / temperature), over the ids that all parts know."""

    parts: list[tuple[float, Any]]

    @property
    def vocabulary(self) -> int | None:
        return min(rows.vocabulary for _, rows in self.parts)

    @property
    def features(self) -> Any:
        """What the first part that has any knows of its layers."""
        return next((f for _, rows in self.parts if (f := getattr(rows, "features", None))), None)

    def __len__(self) -> int:
        return len(self.parts[0][1])

    def select(self, index: Tensor) -> "MixedRows":
        return MixedRows([(w, rows.select(index)) for w, rows in self.parts])

    def to(self, device: torch.device) -> "MixedRows":
        return MixedRows([(w, rows.to(device)) for w, rows in self.parts])

    def tile(self, rows: slice, loss: str, temperature: float, dtype: torch.dtype) -> RowLoss:
        compute, found = divergence(loss), [(math.log(w), r.logits_of(rows, dtype)) for w, r in self.parts]

        def value_and_gradient(log_q: Tensor, part: slice) -> tuple[Tensor, Tensor]:
            width, log_p = log_q.shape[1], None
            for log_weight, logits in found:
                one = F.log_softmax(logits[part, :width] / temperature, -1).add_(log_weight)
                log_p = one if log_p is None else torch.logaddexp(log_p, one)
            assert log_p is not None
            return compute(log_p, log_q)

        return value_and_gradient


@dataclass
class MixedTargets:
    """Targets of several sources with weights that sum to 1; those of weight 0 are not asked."""

    parts: list[tuple[float, Targets]]
    head = None  # there is none that gives their logits

    def __len__(self) -> int:
        return len(self.parts[0][1])

    def batch(self, indices: Sequence[int]) -> Any:
        """One source's own rows where it has all the weight. Raises UserError for targets without whole distributions."""
        asked = [(w, targets.batch(indices)) for w, targets in self.parts if w > 0]
        if len(asked) == 1:
            return asked[0][1]
        asked = [
            part
            for w, rows in asked
            for part in ([(w * v, r) for v, r in rows.parts] if isinstance(rows, MixedRows) else [(w, rows)])
        ]
        for _, rows in asked:
            if not hasattr(rows, "logits_of"):
                raise UserError(
                    f"a mixture with the teacher needs its whole distributions, found {type(rows).__name__}; store `hidden` "
                    f"or `full` targets, or use regime.share 1"
                )
        return MixedRows(asked)
