"""Targets that are a mixture of several distributions: the teacher's with a peer's, an average's or other views'.

For forward KL the gradient of the loss to a mixture is the weighted sum of the gradients of the losses to its parts.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moe2dense.distillation.targets.protocols import Targets, WholeRows, row_features
from moe2dense.errors import UserError
from moe2dense.losses.divergences import divergence
from moe2dense.losses.teacher_rows import RowLoss, TeacherRows

# n tokens, t tokens of a tile, V vocabulary


@dataclass
class MixedRows:
    """Rows whose distribution is sum_i weight_i softmax(logits_i / temperature), over the ids that all parts know."""

    parts: Sequence[tuple[float, WholeRows]]

    @property
    def vocabulary(self) -> int | None:
        """How many ids all parts know."""
        return min(v for _, rows in self.parts if (v := rows.vocabulary) is not None)

    @property
    def features(self) -> dict[str, Tensor] | None:
        """The features of the first part that has any."""
        return next((f for _, rows in self.parts if (f := row_features(rows))), None)

    def __len__(self) -> int:
        return len(self.parts[0][1])

    def _map(self, change: Callable[[WholeRows], WholeRows]) -> "MixedRows":
        return MixedRows([(w, change(rows)) for w, rows in self.parts])

    def select(self, index: Tensor) -> "MixedRows":
        """Return the rows of some tokens, index [m]."""
        return self._map(lambda rows: rows.select(index))

    def to(self, device: torch.device) -> "MixedRows":
        """Return the rows on another device."""
        return self._map(lambda rows: rows.to(device))

    def tile(self, rows: slice, loss: str, temperature: float, dtype: torch.dtype) -> RowLoss:
        """Return the divergence of one tile from the student's log-probabilities at `temperature`."""
        compute, weighted = divergence(loss), [(math.log(w), r.logits_of(rows, dtype)) for w, r in self.parts]

        def value_and_gradient(log_q: Tensor, part: slice) -> tuple[Tensor, Tensor]:
            width, log_p = log_q.shape[1], None
            for log_weight, logits in weighted:
                log_p_part = F.log_softmax(logits[part, :width] / temperature, -1).add_(log_weight)
                log_p = log_p_part if log_p is None else torch.logaddexp(log_p, log_p_part)
            assert log_p is not None
            return compute(log_p, log_q)

        return value_and_gradient


@dataclass
class MixedTargets:
    """Targets of several sources with weights that sum to 1; those of weight 0 are not asked."""

    parts: Sequence[tuple[float, Targets]]

    def __len__(self) -> int:
        return len(self.parts[0][1])

    def batch(self, indices: Sequence[int]) -> TeacherRows:
        """Return the mixture on some blocks, or the rows of the one source that has all the weight.

        Raises UserError for targets without whole distributions.
        """
        sources = [(w, targets.batch(indices)) for w, targets in self.parts if w > 0]
        if len(sources) == 1:
            return sources[0][1]
        parts: list[tuple[float, WholeRows]] = []
        for w, rows in sources:
            if isinstance(rows, MixedRows):
                parts += [(w * v, r) for v, r in rows.parts]
            elif isinstance(rows, WholeRows):
                parts.append((w, rows))
            else:
                raise UserError(
                    f"a mixture with the teacher needs its whole distributions, found {type(rows).__name__}; store `hidden` "
                    f"or `full` targets, or use regime.share 1"
                )
        return MixedRows(parts)
